"""Shuffled orders that are addressed by position: which row comes at position P of an endless stream.

    N = rows of all units,   epoch = P // N
    epoch:   the units, permuted by (name, seed, epoch), are cut into windows of ``window`` units
    window:  all its rows, permuted by (name, seed, epoch, number of the window)

Every row comes exactly once an epoch, and epochs follow each other without a gap. The order is a function of its
arguments alone. Whoever knows a position can go on from it: in another process, with other workers, in another world.

A unit is whatever is read as a whole (a shard, a row group): a window is what has to be at hand at one time.

A permutation is the stable argsort of raw Philox words. NumPy promises that a bit generator's stream stays the same for
ever, and does not promise that of its shuffles (NEP 19).
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WINDOWS_KEPT = 4
"""A batch may straddle two windows, and the next one is looked at ahead of time."""


def permutation(size: int, name: str) -> NDArray[np.int64]:
    """The numbers below ``size`` in the order that ``name`` stands for."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True)
class _Epoch:
    """One pass over all rows: the units in its order, and the place of each window's first row; N at the end."""

    number: int
    units: NDArray[np.int64]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class _Window:
    """The rows of the positions ``start <= P < stop``, and the units that they lie in."""

    start: int
    stop: int
    members: list[int]
    units: NDArray[np.int64]
    rows: NDArray[np.int64]


class ShuffledOrder:
    """The order of the rows of some units. Memory: the units, and the rows of a few windows.

    Args:
        sizes: number of rows of each unit; a unit without rows takes no part.
        seed: root of the order.
        window: units whose rows are shuffled together.
        name: what is shuffled: orders of different names are independent.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int, name: str) -> None:
        self._sizes = np.asarray(sizes, np.int64)
        self._filled = np.flatnonzero(self._sizes)
        self.num_rows = int(self._sizes.sum())
        """Rows of all units: positions of an epoch."""
        if self.num_rows == 0:
            raise ValueError("no rows to put in order")
        self._name = f"{name}/{seed}"
        self._window = window
        self._epochs: deque[_Epoch] = deque(maxlen=2)
        self._windows: deque[_Window] = deque(maxlen=_WINDOWS_KEPT)

    def locate(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(unit, row within the unit) at each position, in any order of positions."""
        found: list[tuple[int, int]] = []
        for position in positions:
            window = self._window_at(position)
            place = position - window.start
            found.append((int(window.units[place]), int(window.rows[place])))
        return found

    def units_from(self, position: int) -> list[int]:
        """The units of the window that ``position`` lies in, then those of the next: what is needed from there on."""
        window = self._window_at(position)
        return [*window.members, *self._window_at(window.stop).members]

    def _window_at(self, position: int) -> _Window:
        for window in reversed(self._windows):
            if window.start <= position < window.stop:
                return window
        number, place = divmod(position, self.num_rows)
        epoch = self._epoch(number)
        at = int(np.searchsorted(epoch.starts, place, "right")) - 1
        members = epoch.units[at * self._window : (at + 1) * self._window]
        sizes = self._sizes[members]
        shuffled = permutation(int(sizes.sum()), f"{self._name}/{number}/{at}")
        first = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(len(members)), sizes)[shuffled]
        start = number * self.num_rows + int(epoch.starts[at])
        window = _Window(start, start + len(shuffled), members.tolist(), members[owner], shuffled - first[owner])
        self._windows.append(window)
        return window

    def _epoch(self, number: int) -> _Epoch:
        for epoch in self._epochs:
            if epoch.number == number:
                return epoch
        units = self._filled[permutation(len(self._filled), f"{self._name}/{number}")]
        ends = np.cumsum(self._sizes[units])
        epoch = _Epoch(number, units, np.concatenate([[0], ends[self._window - 1 : -1 : self._window], ends[-1:]]))
        self._epochs.append(epoch)
        return epoch
