"""An open_clip network of a few thousand weights, as a folder that open_clip loads."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from support import tiny_sd

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {
        "context_length": tiny_sd.TOKENS,
        "vocab_size": 190,
        "width": 16,
        "heads": 2,
        "layers": 2,
        "hf_tokenizer_name": ".",
    },
}
"""Twelve features; each letter is a token."""


def build(folder: Path, seed: int = 0) -> Path:
    """Write the network with random weights and return its folder. The global generator is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_sd._tokenizer(folder, pad="<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CONFIG)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    return folder
