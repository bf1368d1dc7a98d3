"""A Stable Diffusion pipeline of a few thousand weights, built from diffusers' and transformers' own classes.

Everything of the real thing is there: a byte-level CLIP tokenizer, a text encoder with projection width and head,
cross-attention in the UNet, a decoder with a scaling factor, SD's scheduler config. The weights are random, so the
pictures are noise; the arithmetic is that of the real pipeline.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 24
"""Length of a tokenized prompt; each letter is a token, so a prompt of more than 22 characters is truncated."""

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""Scheduler config of Stable Diffusion 1.5; prediction_type is added."""


def build(
    folder: Path,
    *,
    style: Literal["sd1", "sd2"] = "sd1",
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    width: int = 16,
    sample_size: int = 8,
    max_shard_size: str = "10GB",
    variant: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a tiny pipeline as ``save_pretrained`` does, and return its folder. The global generator is left alone.

    Args:
        folder: where to; made if missing.
        style: sd2 has another activation in the text encoder, pads with ``!`` and uses the attention mask.
        prediction_type: what the (random) UNet is said to predict.
        width: channels of the UNet's first level, a multiple of 8; the second one has twice as many.
        sample_size: height and width of the latents; pictures are twice as large.
        max_shard_size: smaller values split the weights into several files.
        variant: infix of the weight files.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            unet=UNet2DConditionModel(
                sample_size=sample_size,
                in_channels=4,
                out_channels=4,
                block_out_channels=(width, 2 * width),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=2 if style == "sd1" else (2, 4),
                use_linear_projection=style == "sd2",
                norm_num_groups=8,
            ),
            vae=AutoencoderKL(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
                latent_channels=4,
                norm_num_groups=4,
                sample_size=2 * sample_size,
                scaling_factor=0.18215,
            ),
            text_encoder=CLIPTextModel(_text_config(style)),
            tokenizer=_tokenizer(folder / "tokenizer", pad="<|endoftext|>" if style == "sd1" else "!"),
            scheduler=PNDMScheduler.from_config({**SCHEDULER, "prediction_type": prediction_type}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size, variant=variant)
    return folder


def _text_config(style: str) -> CLIPTextConfig:
    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu" if style == "sd1" else "gelu",
        bos_token_id=_vocabulary()["<|startoftext|>"],
        eos_token_id=_vocabulary()["<|endoftext|>"],
        pad_token_id=_vocabulary()["<|endoftext|>" if style == "sd1" else "!"],
    )
    if style == "sd2":
        config.use_attention_mask = True
    return config


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def _tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """A tokenizer in the files that Stable Diffusion's folders have: every character is a token of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**special, "pad_token": pad, "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)
