"""A shard that is open for reading: its tar verified, its index checked against the commit record."""

from collections.abc import Sequence
from io import FileIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key
from pipeline.shards.manifest import read_index
from pipeline.shards.pair_decoder import StoredSample
from pipeline.shards.records import Commit
from pipeline.shards.shard_cache import ShardCache
from pipeline.shards.split import Split, stored_ids
from pipeline.shards.writer import DamagedShard


class OpenShard:
    """The stored samples of one shard, by row: their number in order of their keys.

    Attributes:
        shard: its number.
        training: the rows that are trained on, increasing.
    """

    def __init__(
        self, commit: Commit, file: FileIO, index: pa.Table, ids: NDArray[np.int64], training: NDArray[np.int64]
    ) -> None:
        """Use :class:`ShardOpener`; this only keeps the parts."""
        self.shard = commit.shard
        self.training = np.searchsorted(ids, training)
        self._file = file
        self._ids = ids
        self._offsets: NDArray[np.int64] = index["offset"].to_numpy()
        self._lengths: NDArray[np.int64] = index["length"].to_numpy()
        self._digests = index["noise_digest"].combine_chunks()
        self._prompts = index["prompt"].combine_chunks()

    @property
    def descriptor(self) -> int:
        """Of the tar, for ``os.pread``."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the tar."""
        self._file.close()

    def row_of(self, sample_id: int) -> int:
        """The row of a stored sample."""
        return int(np.searchsorted(self._ids, sample_id))

    def sample(self, row: int) -> StoredSample:
        """The sample of a row, and where it lies."""
        return StoredSample(
            int(self._ids[row]), int(self._offsets[row]), int(self._lengths[row]), self._digests[row].as_py()
        )

    def prompt(self, row: int) -> str:
        """The prompt of a row."""
        return self._prompts[row].as_py()


class ShardOpener:
    """Opens shards of a dataset, by their place among ``commits``. For any thread."""

    def __init__(self, dataset: Dataset, commits: Sequence[Commit], split: Split, cache: ShardCache) -> None:
        self._dataset = dataset
        self._commits = commits
        self._split = split
        self._cache = cache

    def open(self, unit: int) -> OpenShard:
        """Open and verify a shard.

        Raises:
            DamagedShard: its tar or its index is missing, or is not the one that was committed.
            RunStopped: the disk of the cache is full.
            OSError: the storage failed.
        """
        commit = self._commits[unit]
        index = read_index(self._dataset, commit)
        index = index.filter(pc.field("status") == "ok")
        ids = stored_ids(self._dataset.run, commit)
        if index["key"].to_pylist() != [key(i) for i in ids.tolist()]:
            raise DamagedShard(f"shard {commit.shard}: {commit.index_path} does not list the samples of its record")
        return OpenShard(commit, self._cache.open(commit), index, ids, self._split.training(unit))
