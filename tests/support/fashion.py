"""A made-up Fashion-MNIST of a few garments, in the files the real one has."""

import gzip
from pathlib import Path

import numpy as np


def write_fashion(folder: Path, *, train: int = 64, test: int = 40) -> Path:
    """Blocks of random grey on black; garment i of a split is of class i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    for prefix, count in (("train", train), ("t10k", test)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:24, 6:22] = random.integers(1, 256, (count, 20, 16))
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()))
