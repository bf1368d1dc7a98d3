"""Which samples of a dataset are trained on, and which are held out.

Let the M selected samples (all stored ones without a selection) be numbered in order of their keys. Held out are those
numbered floor((i + 0.5) M / H), i < H: evenly spread, and the same whatever the shards, the seed or the world. All
others are trained on.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pipeline.shards.layout import key
from pipeline.shards.records import Commit, Run
from pipeline.shards.selection import Selection


class Split:
    """The samples of some shards, split in two. Ids are int64 and increase.

    Args:
        root: address of the dataset, for messages.
        run: the dataset's identity and layout.
        commits: records of the shards, in order.
        selection: only these samples; None: all that are stored.
        holdout: number of samples to hold out.

    Raises:
        UserError: the selection names samples that the shards do not store, or nothing is left to train on.
    """

    def __init__(
        self, root: str, run: Run, commits: Sequence[Commit], selection: Selection | None, holdout: int
    ) -> None:
        self._run = run
        self._commits = commits
        self._selected = selection.sample_ids if selection else None
        counts = [commit.num_samples for commit in commits]
        if selection is not None:
            counts = [len(self.samples(unit)) for unit in range(len(commits))]
            if sum(counts) != len(selection.sample_ids):
                raise UserError(
                    f"data.selection: {len(selection.sample_ids) - sum(counts)} of its samples are not in {root} "
                    f"(the first is {key(self._first_unknown(selection.sample_ids))}); select among those that are"
                )
        total = sum(counts)
        if holdout >= total:
            raise UserError(
                f"data.holdout: {holdout} pairs are to be held out of {root}, which has {total} to choose from; "
                "lower it, or select more"
            )
        ends = np.cumsum(counts)
        numbers = np.array([(2 * i + 1) * total // (2 * holdout) for i in range(holdout)], np.int64)
        units = np.searchsorted(ends, numbers, "right")
        rows = numbers - (ends[units] - np.array(counts)[units])
        self.held_out = [
            (unit, int(self.samples(unit)[row])) for unit, row in zip(units.tolist(), rows.tolist(), strict=True)
        ]
        """(number of the shard among ``commits``, sample id) of the held-out samples, in order of their keys."""
        self._held_out = np.array([sample_id for _, sample_id in self.held_out], np.int64)
        self.sizes = (np.array(counts) - np.bincount(units, minlength=len(counts))).tolist()
        """Number of samples to train on, of each shard."""

    def samples(self, unit: int) -> NDArray[np.int64]:
        """Ids of the selected samples of a shard, held-out ones included."""
        stored = stored_ids(self._run, self._commits[unit])
        if self._selected is None:
            return stored
        ids = self._run.sample_ids(self._commits[unit].shard)
        first, last = np.searchsorted(self._selected, [ids.start, ids.stop])
        return np.intersect1d(self._selected[first:last], stored, assume_unique=True)

    def training(self, unit: int) -> NDArray[np.int64]:
        """Ids of the samples of a shard that are trained on."""
        return np.setdiff1d(self.samples(unit), self._held_out, assume_unique=True)

    def _first_unknown(self, selected: NDArray[np.int64]) -> int:
        known = np.concatenate([self.samples(unit) for unit in range(len(self._commits))])
        return int(np.setdiff1d(selected, known, assume_unique=True)[0])


def stored_ids(run: Run, commit: Commit) -> NDArray[np.int64]:
    """Ids of the samples that lie in a shard."""
    ids = run.sample_ids(commit.shard)
    rejected = np.array([int(rejection.key) for rejection in commit.rejected], np.int64)
    return np.setdiff1d(np.arange(ids.start, ids.stop), rejected, assume_unique=True)
