"""Images on their way to a network: an optional square, the network's own resizing, and a batch of them.

Resizing is half of a metric (Parmar et al. 2022): it is clean-fid's, or open_clip's, and never torch's on the device.
It runs in threads, since PIL lets go of the interpreter while it works.
"""

import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from pipeline.shards.parallel import parallel_map

_THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def batch_of(images: list[NDArray[np.uint8]], transform: Callable[[NDArray[np.uint8]], Tensor]) -> Tensor:
    """Transform each image and stack the results: B of (H, W, 3), uint8 -> (B, 3, S, S), float32.

    Raises:
        UserError: the transform leaves images as they are, and they are of several sizes.
    """
    transformed = list(parallel_map(transform, images, _THREADS))
    sizes = sorted({(pixels.shape[2], pixels.shape[1]) for pixels in transformed})
    if len(sizes) > 1:
        raise UserError(
            f"images of several sizes, such as {' and '.join(f'{width} x {height}' for width, height in sizes[:2])} "
            "pixels, are no batch for a network that resizes them itself; set features.resize"
        )
    return torch.stack(transformed)


def middle_square(image: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    """The largest square in the middle, brought to ``size`` pixels by PIL's Lanczos, 8 bits; None: the image itself.

    The corner is rounded as torchvision's ``center_crop`` does it.
    """
    if size is None:
        return image
    height, width, _ = image.shape
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def clean_resizer(size: int) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """clean-fid's: bicubic, with antialiasing, in float: (H, W, 3) -> (size, size, 3), 0 to 255, not rounded."""
    from cleanfid.resize import make_resizer

    return make_resizer("PIL", False, "bicubic", (size, size))


def mode_resizer(mode: str) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """clean-fid's for one of its modes. legacy_tensorflow leaves images as they are: its network resizes them."""
    from cleanfid.resize import build_resizer

    with warnings.catch_warnings():  # legacy_pytorch would switch off every warning of the process
        resize = build_resizer(mode)
    return lambda image: resize(np.array(image))  # torch warns of an array that it may not write to


def channels_first(image: NDArray[np.uint8] | NDArray[np.float32]) -> Tensor:
    """(H, W, 3) -> (3, H, W), float32, same values."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), np.float32))
