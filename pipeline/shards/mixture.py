"""A stream that is drawn from several: which of them comes at position P, and at which of its own positions.

Positions are cut into cycles of 1000. In each, source s takes c_s places, its share of the weight in thousandths by the
largest remainder, so shares are exact over a cycle; places are permuted by (seed, cycle). With P = 1000 cycle + i,

    position within the source = cycle c_s + (places before i in this cycle that s takes)

which counts up without a gap: each source goes through its own epochs, whatever the others do. Nothing is carried from
one position to the next.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pipeline.shards.order import permutation

CYCLE = 1000
"""Positions over which shares are exact."""


class Mixture:
    """Sources by weight.

    Args:
        weights: weight of each source, > 0, relative to the others.
        seed: root of the order.
        name: what is mixed: mixtures of different names are independent.

    Raises:
        UserError: a source's share is so small that it would never come.
    """

    def __init__(self, weights: Sequence[float], seed: int, name: str) -> None:
        self._counts = _counts(np.asarray(weights, np.float64))
        self._name = f"{name}/{seed}"
        self._cycles: deque[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = deque(maxlen=2)

    def locate(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(source, position within that source) at each position."""
        found: list[tuple[int, int]] = []
        for position in positions:
            number, place = divmod(position, CYCLE)
            sources, ranks = self._cycle(number)
            source = int(sources[place])
            found.append((source, number * int(self._counts[source]) + int(ranks[place])))
        return found

    def by_source(self, positions: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
        """What each source gives to a batch: {source: [(place in the batch, position within that source), ...]}."""
        entries: dict[int, list[tuple[int, int]]] = {}
        for place, (source, position) in enumerate(self.locate(positions)):
            entries.setdefault(source, []).append((place, position))
        return entries

    def before(self, position: int) -> list[int]:
        """How many of the positions before this one each source takes: where each of them goes on."""
        number, place = divmod(position, CYCLE)
        in_cycle = np.bincount(self._cycle(number)[0][:place], minlength=len(self._counts))
        return (number * self._counts + in_cycle).tolist()

    def _cycle(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place of a cycle, and how often that source came before in it."""
        for known, sources, ranks in self._cycles:
            if known == number:
                return sources, ranks
        sources = np.repeat(np.arange(len(self._counts)), self._counts)[permutation(CYCLE, f"{self._name}/{number}")]
        ranks = np.empty(CYCLE, np.int64)
        for source, count in enumerate(self._counts):
            ranks[sources == source] = np.arange(count)
        self._cycles.append((number, sources, ranks))
        return sources, ranks


def _counts(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places of each source in a cycle: whole parts first, then one more for the largest remainders."""
    exact = weights / weights.sum() * CYCLE
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")[: CYCLE - int(counts.sum())]
    counts[largest] += 1
    for number, count in enumerate(counts):
        if count == 0:
            raise UserError(
                f"data.mix: weight {weights[number]:g} of dataset {number + 1} is less than a thousandth of all; "
                "raise it, or leave the dataset out"
            )
    return counts
