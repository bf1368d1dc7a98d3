"""Forty-eight pictures: every shape in every colour, drawn with integers so that they are the same bytes everywhere.

A pixel is mixed from the colour and the ground by the share of its SUBPIXELS x SUBPIXELS sub-pixel centres that lie
within the shape. Centres, tests and mixture are integer arithmetic: no rounding mode, math library or processor can
change a level.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 150, 40),
    "yellow": (240, 225, 60),
    "green": (50, 170, 70),
    "blue": (40, 80, 220),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
"""Name -> 8-bit red, green, blue."""
GROUND = (150, 150, 150)
"""The plain grey behind every shape."""
SUBPIXELS = 8
"""Sub-pixels along one side of a pixel."""
EXTENT = 1000
"""The picture spans the square |x| < EXTENT, |y| < EXTENT; x runs right and y down."""

Inside = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]

SHAPES: dict[str, Inside] = {
    "circle": lambda x, y: x * x + y * y < 700**2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 620,
    "triangle": lambda x, y: (y < 600) & (2 * abs(x) < y + 700),
    "diamond": lambda x, y: abs(x) + abs(y) < 850,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 250) & (np.maximum(abs(x), abs(y)) < 750),
    "ring": lambda x, y: (x * x + y * y < 780**2) & (x * x + y * y > 450**2),
}
"""Name -> whether a point lies within."""


def captions() -> list[str]:
    """``a red circle``, ``an orange ring``, ... one for each picture, in the order of :func:`draw_all`."""
    return [f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" for colour in COLOURS for shape in SHAPES]


def draw_all(size: int) -> NDArray[np.uint8]:
    """All pictures, (48, 3, size, size), 8-bit levels."""
    return np.stack([_draw(colour, shape, size) for colour in COLOURS.values() for shape in SHAPES.values()])


def _draw(colour: tuple[int, int, int], inside: Inside, size: int) -> NDArray[np.uint8]:
    """One picture, (3, size, size)."""
    steps = np.arange(size * SUBPIXELS, dtype=np.int64)
    centres = (2 * steps + 1) * EXTENT // (size * SUBPIXELS) - EXTENT
    mask = inside(centres[None, :], centres[:, None])
    covered = mask.reshape(size, SUBPIXELS, size, SUBPIXELS).sum(axis=(1, 3), dtype=np.int64)
    total = SUBPIXELS**2
    levels = [
        (covered * front + (total - covered) * back + total // 2) // total
        for front, back in zip(colour, GROUND, strict=True)
    ]
    return np.stack(levels).astype(np.uint8)
