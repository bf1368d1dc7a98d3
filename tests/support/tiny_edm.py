"""EDM teachers of a few thousand weights, given by a formula: the same everywhere, so that outputs can be pinned."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.teachers.edm.architecture import WEIGHTS, EdmArchitecture, write_architecture
from pipeline.teachers.edm.networks import empty_network

SIZE = 16
"""Height and width of the images."""


def architecture(kind: str = "ddpm++", label_dim: int = 10, **settings: Any) -> EdmArchitecture:
    """Two levels, one block each, attention at the lower one; ADM's heads need 64 channels."""
    shape = {"model_channels": 8 if kind == "ddpm++" else 64, "channel_mult": (1, 2), "num_blocks": 1}
    return EdmArchitecture.model_validate(
        {
            "architecture": kind,
            "label_dim": label_dim,
            "img_resolution": SIZE,
            "attn_resolutions": (SIZE // 2,),
            **shape,
            **settings,
        }
    )


def wave(shape: tuple[int, ...], phase: float, scale: float = 1.0) -> Tensor:
    """scale sin(0.37 i + phase) for the elements i = 0, 1, ..., float32."""
    angles = 0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + phase
    return (scale * angles.sin()).float().reshape(shape)


def formula_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights by name that keep the variance of what passes through them: uniform numbers out of raw Philox bits, keyed
    by the name's place in the alphabet, of variance 1 / inputs; around 1 the scales of normalisations, around 0 the
    biases.
    """
    weights: dict[str, Tensor] = {}
    for place, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        bits = np.random.Philox(key=place).random_raw(math.prod(shape)) >> 40
        uniform = torch.from_numpy(bits.astype(np.float32) / 2**23 - 1).reshape(shape)
        is_scale = len(shape) == 1 and name.endswith("weight")
        weights[name] = uniform * math.sqrt(3 / max(math.prod(shape[1:]), 12)) + float(is_scale)
    return weights


def weights_of(described: EdmArchitecture) -> dict[str, Tensor]:
    """Weights by formula for a network."""
    network = empty_network(described, Path("config.json"))
    return formula_weights({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})


def build(folder: Path, kind: str = "ddpm++", label_dim: int = 10, **settings: Any) -> Path:
    """Write a teacher's folder and return it."""
    described = architecture(kind, label_dim, **settings)
    folder.mkdir(parents=True)
    save_file(weights_of(described), folder / WEIGHTS)
    write_architecture(described, folder)
    return folder


def noisy(sigmas: tuple[float, ...], size: int = SIZE) -> tuple[Tensor, Tensor]:
    """An image by formula at each noise level, (B, 3, size, size), and the levels."""
    x = torch.stack([wave((3, size, size), sigma, math.sqrt(sigma**2 + 0.25)) for sigma in sigmas])
    return x, torch.tensor(sigmas)
