"""Randomness derived from what it is for.

    key = blake2b-64(seed / purpose / step / turn / sample)  ->  a generator of its own for each sample

So a run that was killed draws what it would have drawn, and nothing that draws, however often, changes what others get.
``sample`` is the number of a sample among those of its turn, over all processes: what a sample gets does not depend on
the process or the micro-batch that it is in. The global generator is neither read nor set.
"""

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """A source of randomness for the samples of one batch. What is drawn depends on what was drawn before."""

    def normal(self, shape: torch.Size) -> Tensor:
        """Unit Gaussian noise of this shape, (B, *), float32."""
        ...

    def integers(self, first: int, last: int, count: int) -> Tensor:
        """Whole numbers, uniform over first .. last, both included: (count,), int64."""
        ...


class DerivedDraws:
    """A generator for each sample of a batch, derived from its number.

    Args:
        device: where numbers are drawn; a CPU's and a GPU's differ.
        seed: of the run.
        purpose: what it is for.
        step: number of the student's step, from 0.
        turn: number of the turn within the step: 0 is the student's and the first of the fake score, and so on.
        samples: numbers of the samples within the turn, over all processes.
    """

    def __init__(
        self, device: torch.device, *, seed: int, purpose: str, step: int, turn: int, samples: Iterable[int]
    ) -> None:
        self._device = device
        keys = (f"{seed}/{purpose}/{step}/{turn}/{sample}".encode() for sample in samples)
        digests = (hashlib.blake2b(key, digest_size=8).digest() for key in keys)
        self._generators = [torch.Generator(device).manual_seed(int.from_bytes(key, "little")) for key in digests]

    def normal(self, shape: torch.Size) -> Tensor:
        """Unit Gaussian noise, each sample's from its own generator."""
        noise = torch.empty(shape, device=self._device)
        for sample, generator in zip(noise, self._generators, strict=True):
            sample.normal_(generator=generator)
        return noise

    def integers(self, first: int, last: int, count: int) -> Tensor:
        """Whole numbers, each sample's from its own generator."""
        numbers = torch.empty(count, dtype=torch.int64, device=self._device)
        for number, generator in zip(numbers, self._generators, strict=True):
            number.random_(first, last + 1, generator=generator)
        return numbers
