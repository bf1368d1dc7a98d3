"""What a measurement of single images is: adding one takes one class.

A scorer maps images and their prompts to float32 numbers or vectors, each image by itself: neither the batch nor its
order matters but for rounding. ``identity`` says all that decides the values, so that equal identities mean equal
values; tables carry it (see ``pipeline/scoring/score_table.py``).
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue


class Scorer(Protocol):
    """Measures images."""

    @property
    def identity(self) -> dict[str, JsonValue]:
        """What decides the values: kind, model, digest of its weights, prefix of prompts, resizing."""
        ...

    @property
    def columns(self) -> dict[str, int | None]:
        """Column -> width of its vectors, or None for a number."""
        ...

    def __call__(self, images: list[NDArray[np.uint8]], prompts: list[str]) -> dict[str, NDArray[np.float32]]:
        """Measure a batch.

        Args:
            images: B pictures, each (height, width, 3); those of one dataset have one size.
            prompts: the prompt of each.

        Returns:
            Column -> (B,) or (B, width), for every one of ``columns``.
        """
        ...
