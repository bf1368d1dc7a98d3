"""Make the judge: a small open_clip model of garments and captions, independent of the teacher it will judge.

    open_clip's own contrastive loss (Radford et al. 2021) over the image-caption pairs of a batch

The judge is written as a folder that open_clip itself loads (``local-dir:FOLDER``), with what real garments of the test
split look like to it: the mean and covariance of its features.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from configs.builtin_schema import BuiltinJudgeConfig
from pipeline.builtin.captions import COLOURS, names
from pipeline.builtin.card import write_card
from pipeline.builtin.fit import fit
from pipeline.builtin.garments import SIZE, Garments
from pipeline.builtin.networks import TOKENS, tokenizer
from pipeline.builtin.randomness import generator

MAX_SHIFT = 2
"""Garments are shifted by up to so many pixels each way while training, so that place does not matter."""
_BATCH = 500
_KID_ROWS = 1000
"""Test images whose own features are kept: KID needs them, FID does with mean and covariance."""
_ABOUT = """A small open_clip model: it says how well a picture of a garment fits a caption, and its image features, 64
numbers, are the space in which pictures of the built-in teacher and of its students are compared with real ones
(`reference.npz`: their mean and covariance). It was trained without the teacher."""


def train_judge(config: BuiltinJudgeConfig) -> Path:
    """Train what is not trained yet, try the judge on the test split, and write it, weights in float16.

    Returns:
        The folder, ``output/judge``: ``open_clip_config.json``, ``open_clip_model.safetensors``, the tokenizer, the
        card, and ``reference.npz``.

    Raises:
        UserError: the data is missing, or a checkpoint is of another network, other settings or other data.
    """
    train, test = (Garments(config.data, split, config.seed) for split in ("train", "test"))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = config.output / "judge"
    tokens = tokenizer(folder)
    tokens.save_pretrained(folder)  # as it is: its file would say how it was last called
    model_config = _model_config(len(tokens))
    with torch.random.fork_rng(devices=[]):  # open_clip draws the first weights from the global generator
        torch.manual_seed(config.seed)
        model = open_clip.CLIP(**model_config).to(device)
    _fit(model, config, train, tokens, device)
    model.half().float()  # what is tried below is what is written
    _write(model, model_config, folder)
    metrics = _judge_the_test_split(model, test, tokens, device, folder)
    size = sum(weight.numel() for weight in model.parameters())
    write_card(
        folder, "The judge of the built-in teacher", _ABOUT, "train_builtin_judge.py", config, metrics, size=size
    )
    print(json.dumps(metrics))
    return folder


def _fit(
    model: nn.Module, config: BuiltinJudgeConfig, train: Garments, tokens: CLIPTokenizer, device: torch.device
) -> None:
    contrastive = ClipLoss()
    size = config.contrastive.batch_size

    def loss(step: int) -> Tensor:
        batch = train.batch(step, size)
        images = _shifted(batch.images, generator(config.seed, "shift", step)).to(device)
        image_features, text_features, scale = model(images, _token_ids(tokens, batch.captions).to(device))
        return contrastive(image_features, text_features, scale)

    settings = {"seed": config.seed, "data": train.digest}
    fit(model, loss, config.contrastive, config.output / "judge.pt", config.save_every_steps, settings)


def _shifted(images: Tensor, draws: torch.Generator) -> Tensor:
    """Each picture moved by whole pixels; its ground, which is plain, fills in."""
    padded = functional.pad(images, (MAX_SHIFT,) * 4, mode="replicate")
    shifts = torch.randint(2 * MAX_SHIFT + 1, (len(images), 2), generator=draws).tolist()
    return torch.stack([picture[:, y : y + SIZE, x : x + SIZE] for picture, (y, x) in zip(padded, shifts, strict=True)])


def _write(model: nn.Module, model_config: dict[str, Any], folder: Path) -> None:
    half = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(half, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def _judge_the_test_split(
    model: nn.Module, test: Garments, tokens: CLIPTokenizer, device: torch.device, folder: Path
) -> dict[str, float]:
    """How well it tells the hundred garments of :func:`names` apart, and what real garments look like to it."""
    texts = model.encode_text(_token_ids(tokens, names()).to(device), normalize=True)
    features, right = [], []
    size = min(_BATCH, len(test))
    for step in range(len(test) // size):
        batch = test.batch(step, size)
        image_features = model.encode_image(batch.images.to(device))
        chosen = (functional.normalize(image_features, dim=-1) @ texts.T).argmax(-1).cpu()
        truth = torch.tensor([(look.garment, look.colour) for look in batch.looks])
        right.append(torch.stack([chosen // len(COLOURS), chosen % len(COLOURS)], -1) == truth)
        features.append(image_features.double().cpu())
    rows, correct = torch.cat(features).numpy(), torch.cat(right)
    np.savez(
        folder / "reference.npz",
        mu=rows.mean(0),
        sigma=np.cov(rows, rowvar=False),
        count=len(rows),
        features=rows[:_KID_ROWS].astype(np.float16),
    )
    return {
        "garment named right": correct[:, 0].double().mean().item(),
        "colour named right": correct[:, 1].double().mean().item(),
        "both named right": correct.all(-1).double().mean().item(),
    }


def _token_ids(tokens: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokens(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def _model_config(vocabulary: int) -> dict[str, Any]:
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 10, "head_width": 32},  # CLIP's own ResNet
        "text_cfg": {
            "context_length": TOKENS,
            "vocab_size": vocabulary,
            "width": 64,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": ".",
        },
    }
