"""Smooth random pictures, and a folder of them."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(count: int, height: int = 20, width: int = 24, seed: int = 0) -> list[np.ndarray]:
    """Smooth random pictures, (height, width, 3), uint8."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(0, 256, (count, 5, 6, 3), np.uint8)
    return [
        np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)) for picture in coarse
    ]


def save_pictures(folder: Path, images: list[np.ndarray]) -> Path:
    """Write pictures as PNG files, in order of name, into a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for at, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{at:05d}.png")
    return folder
