"""The parts of the built-in teacher: a miniature of Stable Diffusion, of the same classes, 5.5 M parameters.

autoencoder    (3, 32, 32) <-> (4, 8, 8), a quarter of each side where Stable Diffusion has an eighth
text encoder   16 tokens of 128 numbers
UNet           8x8 and 4x4, text read at 4x4
schedule       Stable Diffusion's own: scaled linear betas, 1000 timesteps, eps
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.builtin.captions import vocabulary

TOKENS = 16
"""Longest caption, with its two marks."""
WIDTH = 128
"""Numbers a token becomes."""
_WORD_END = "</w>"


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind of byte pair encoding, grown on the words of the captions until each is one token.

    Args:
        folder: gets ``vocab.json`` and ``merges.txt``.
    """
    merges = _merges(sorted({word for text in vocabulary() for word in re.findall(r"[a-z]+|-", text)}))
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), "<|startoftext|>"]
    tokens.append("<|endoftext|>")  # the largest id, by which encoders find it
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: place for place, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Join the pair that occurs most often, again and again (Sennrich et al. 2016, Algorithm 1); of equals the first.

    The trainer of the tokenizers library breaks ties by chance, and weights trained with one vocabulary mean nothing
    with another.
    """
    split = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for symbols in split for pair in pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_joined(symbols, best) for symbols in split]
    return merges


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def autoencoder() -> AutoencoderKL:
    """Pictures to latents and back; its scaling_factor is measured when it is trained."""
    return AutoencoderKL(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        force_upcast=False,
    )


class TextToImage(nn.Module):
    """What is trained together: the UNet and the text encoder it listens to.

    Args:
        tokenizer: whose tokens the text encoder takes.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Predict eps of noisy latents (B, 4, 8, 8) at times (B,), given (B, TOKENS) token ids."""
        condition = self.text_encoder(token_ids)[0]
        return self.unet(x_t, t, encoder_hidden_states=condition, return_dict=False)[0]


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
