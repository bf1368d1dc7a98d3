"""Which of many texts were there before, at 16 bytes each."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from configs.errors import UserError


class SeenDigests:
    """A growing set of 16-byte digests in sorted arrays, at 16 bytes each; a Python set takes about 100.

    Runs at least halve in length from one to the next, so there are O(log n) of them and each digest is merged
    O(log n) times.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._runs: list[npt.NDArray[np.bytes_]] = []

    def add(self, digests: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Add digests and say of each whether it is the first of its kind."""
        unique, first = np.unique(np.frombuffer(b"".join(digests), "S16"), return_index=True)
        new = np.ones(len(unique), bool)
        for run in self._runs:
            at = np.searchsorted(run, unique)
            new &= run[np.minimum(at, len(run) - 1)] != unique
        if new.any():
            self._runs.append(unique[new])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        is_new = np.zeros(len(digests), bool)
        is_new[first[new]] = True
        return is_new

    def refuse_collisions(self) -> None:
        """Raise UserError if two different digests agree in their first 8 bytes: their prompts would share an id."""
        ids = np.sort(np.concatenate(self._runs).astype("S8"))
        same = np.flatnonzero(ids[1:] == ids[:-1])
        if len(same):
            raise UserError(
                f"two different prompts have the id {ids[same[0]].item().ljust(8, bytes(1)).hex()}; leave one out"
            )
