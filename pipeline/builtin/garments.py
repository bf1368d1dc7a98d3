"""Fashion-MNIST made text-to-image: 32x32 RGB, each garment tinted by a colour, on a plain ground, with a caption.

With the grey value g in [0, 1] of a pixel, 0 outside of the garment:

    opacity = min(g / OPAQUE, 1),   image = (1 - opacity) ground + opacity colour (SHADE + (1 - SHADE) g)

A batch is a function of (seed, split, step): which garments it holds, their colours and their captions. Colours are
drawn anew whenever a garment comes by.
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from configs.errors import UserError
from pipeline.builtin.captions import COLOURS, GARMENTS, GROUNDS, Look, caption
from pipeline.builtin.randomness import generator

SIZE = 32
"""Height and width of a picture; the garments, 28 x 28, get a margin."""
OPAQUE = 0.2
SHADE = 0.45
JITTER = 0.02
"""Standard deviation of a tint around its colour."""
SPLITS = {"train": "train", "test": "t10k"}
"""Our name of a split -> that of its files."""


@dataclass(frozen=True)
class Batch:
    """Some garments.

    Attributes:
        images: (B, 3, 32, 32), float32, in [-1, 1].
        captions: B texts.
        looks: what is to be seen in each.
    """

    images: Tensor
    captions: list[str]
    looks: list[Look]


class Garments:
    """One split of Fashion-MNIST.

    Args:
        folder: holds the four files as they are published, ``train-images-idx3-ubyte.gz`` and so on.
        split: ``train`` or ``test``.
        seed: root of all that is drawn.

    Raises:
        UserError: a file is missing or none of Fashion-MNIST.
    """

    def __init__(self, folder: Path, split: str, seed: int) -> None:
        prefix = SPLITS[split]
        self._grey = _read(folder / f"{prefix}-images-idx3-ubyte.gz", (28, 28))
        self._garment = _read(folder / f"{prefix}-labels-idx1-ubyte.gz", ())
        if len(self._grey) != len(self._garment):
            raise UserError(f"{folder}: {len(self._grey)} images but {len(self._garment)} labels; copy the files again")
        self._seed, self._split = seed, split

    def __len__(self) -> int:
        return len(self._grey)

    @property
    def digest(self) -> str:
        """sha256 of the garments and their classes: what a training that goes on must find as it was."""
        return hashlib.sha256(self._grey.numpy().tobytes() + self._garment.numpy().tobytes()).hexdigest()

    def batch(self, step: int, size: int) -> Batch:
        """Garments ``step * size`` to ``(step + 1) * size`` of an endless row: one shuffled epoch after another."""
        draws = generator(self._seed, self._split, step)
        chosen = self._chosen(step, size)
        colours = torch.randint(len(COLOURS), (size,), generator=draws)
        grounds = torch.randint(len(GROUNDS), (size,), generator=draws)
        looks = [
            Look(*look) for look in zip(self._garment[chosen].tolist(), colours.tolist(), grounds.tolist(), strict=True)
        ]
        tint = torch.tensor(list(COLOURS.values()))[colours] + JITTER * torch.randn(size, 3, generator=draws)
        images = _paint(self._grey[chosen], tint.clamp(0, 1), torch.tensor(list(GROUNDS.values()))[grounds])
        return Batch(images, [caption(look, draws) for look in looks], looks)

    def untinted(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The same garments as they are: grey on black, (B, 3, 32, 32) float32 in [-1, 1]; their classes, (B,)."""
        chosen = self._chosen(step, size)
        margin = (SIZE - self._grey.shape[-1]) // 2
        grey = functional.pad(self._grey[chosen].float() / 127.5 - 1, (margin,) * 4, value=-1.0)
        return grey[:, None].repeat(1, 3, 1, 1), self._garment[chosen]

    def _chosen(self, step: int, size: int) -> Tensor:
        places = torch.arange(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in set((places // len(self)).tolist())}
        return torch.stack([orders[int(place) // len(self)][int(place) % len(self)] for place in places])

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=generator(self._seed, f"{self._split} epoch", epoch))


def _paint(grey: Tensor, tint: Tensor, ground: Tensor) -> Tensor:
    """(B, 28, 28) uint8 with (B, 3) colours in [0, 1] to (B, 3, 32, 32) float32 in [-1, 1]."""
    margin = (SIZE - grey.shape[-1]) // 2
    g = functional.pad(grey.float() / 255, (margin,) * 4)[:, None]
    opacity = (g / OPAQUE).clamp(max=1)
    image = (1 - opacity) * ground[:, :, None, None] + opacity * tint[:, :, None, None] * (SHADE + (1 - SHADE) * g)
    return 2 * image - 1


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes: two zeros, the type, the rank, the sizes as big-endian int32, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"data: {path} is missing; Fashion-MNIST is published at github.com/zalandoresearch/fashion-mnist and in "
            "the Debian package dataset-fashion-mnist"
        ) from None
    except (OSError, EOFError) as error:
        raise UserError(f"data: {path} cannot be read ({error}); copy it again") from None
    rank = 1 + len(shape)
    sizes = np.frombuffer(content, ">i4", count=rank, offset=4).tolist() if len(content) >= 4 + 4 * rank else []
    if (
        content[:4] != bytes((0, 0, 8, rank))
        or tuple(sizes[1:]) != shape
        or len(content) != 4 + 4 * rank + np.prod(sizes)
    ):
        raise UserError(f"data: {path} is no file of Fashion-MNIST; copy it again")
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes)
    if rank == 1 and array.max(initial=0) >= len(GARMENTS):
        raise UserError(f"data: {path} has a label {array.max()}; Fashion-MNIST has {len(GARMENTS)} classes")
    return torch.from_numpy(array.copy()).to(torch.uint8 if rank > 1 else torch.int64)
