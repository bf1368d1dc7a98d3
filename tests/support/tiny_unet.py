"""EDM teachers of a few thousand weights that diffusers itself has saved: a UNet2DModel and a scheduler."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, UNet2DModel

SIZE = 8
"""Height and width of the images."""
PLAIN: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "freq_shift": 1,
    "flip_sin_to_cos": False,
}
"""Convolutions that resample, noise level and class that shift, Song's frequencies."""
OPENAI: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 4,
}
"""As diffusers' script makes them of OpenAI's files: blocks that resample, noise level and class that scale too."""
SCHEDULERS = {
    scheduler.__name__: scheduler
    for scheduler in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler, CMStochasticIterativeScheduler)
}


def unet(kind: Mapping[str, Any] = PLAIN, **settings: Any) -> UNet2DModel:
    """Two levels of one block, attention at the lower one; every weight random, those of normalisations too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arguments = {
            "sample_size": SIZE,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "num_class_embeds": 10,
        }
        network = UNet2DModel(**{**arguments, **kind, **settings})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return network.eval()


def build(folder: Path, scheduler: str = "EDMEulerScheduler", sigma_data: float = 0.5, **settings: Any) -> Path:
    """Write a teacher's folder and return it; ``settings`` as :func:`unet` has them."""
    unet(**settings).save_pretrained(folder / "unet")
    SCHEDULERS[scheduler](sigma_data=sigma_data).save_pretrained(folder / "scheduler")
    return folder


def edit(path: Path, **entries: Any) -> None:
    """Change entries of a config; those that become ``...`` are taken away."""
    content = {**json.loads(path.read_bytes()), **entries}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
