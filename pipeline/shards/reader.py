"""Pairs of one dataset by position in an endless shuffled stream.

    position -> (shard, sample)          pipeline.shards.order, over the samples that are trained on
    shard    -> verified tar, its index  pipeline.shards.shard_cache, in the background for the next window
    sample   -> noise, target            pipeline.shards.pair_decoder

Opening reads ``run.json``, the seal, all commit records and the selection, and refuses what does not fit together.
A tar and its index are checked whole, against their sha256, before the first of their samples is used. So damage stops
a run at the first batch that it would have touched, or before; nothing is skipped.

Memory: all commit records, about 1 kB each; the indices of the shards of two windows; one batch. As many tars are
open. A reader belongs to one thread of one process: open one in each worker.
"""

import shlex
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pipeline.noise import check_noise_recipe
from pipeline.shards.ahead import Ahead
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import SEALED, key
from pipeline.shards.manifest import read_commits, summary
from pipeline.shards.open_shard import OpenShard, ShardOpener
from pipeline.shards.order import ShuffledOrder
from pipeline.shards.pair_decoder import PairDecoder, Target
from pipeline.shards.records import Commit, DamagedRecord
from pipeline.shards.selection import read_selection
from pipeline.shards.shard_cache import ShardCache
from pipeline.shards.split import Split
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard

if TYPE_CHECKING:
    from torch import Tensor

_WINDOWS_OPEN = 2
"""The one that is read from, and the next."""


@dataclass(frozen=True)
class PairBatch:
    """Some pairs.

    Attributes:
        keys: their keys.
        noise: (B, *sample_shape), float16, unit variance: what the teacher's sampler started from.
        target: (B, ...): what the teacher made of it: x0, float16 or float32 as it is stored, or an image in [-1, 1].
        prompts: their prompts.
    """

    keys: list[str]
    noise: "Tensor"
    target: "Tensor"
    prompts: list[str]


class PairReader:
    """Reads a pair dataset in shuffled order.

    Args:
        root: the dataset.
        seed: root of the order.
        window: shards whose samples are shuffled together.
        holdout: number of samples that are kept out of the stream.
        selection: selection file: only these samples; None: all.
        cache_folder: where shards of a remote dataset are kept.
        cache_bytes: the largest size of that folder.
        allow_partial: take the shards that exist of a dataset that is not finished.

    Attributes:
        root: its address.
        run: its identity and layout.
        content_sha256: over the sha256 of the shards in use, in order: names the very bytes.
        selection_digest: identity of the selection; None without one.
        num_samples: samples of an epoch: the selected ones without those held out.
        target: what the targets are: x0 in the space of the noise, or images.
        prompt_rows: rows of the dataset's prompt table that the selected samples were made of, increasing.

    Raises:
        UserError: there is no such dataset, it is not finished, or nothing is left to train on.
        DamagedRecord: its records do not fit together.
    """

    def __init__(
        self,
        root: str,
        *,
        seed: int,
        window: int,
        holdout: int,
        selection: str | None,
        cache_folder: Path,
        cache_bytes: int,
        allow_partial: bool,
    ) -> None:
        storage = Storage.open(root)
        self.root = storage.uri
        dataset = Dataset.open(storage)
        self.run = dataset.run
        if not self.run.pairs.fields.noise:
            check_noise_recipe()
        with self._naming_the_repair():
            commits, self.content_sha256 = _read_commits(dataset, allow_partial)
        selected = read_selection(selection, self.run.fingerprint) if selection is not None else None
        self.selection_digest = selected.digest if selected else None
        per_prompt = self.run.pairs.pairs_per_prompt
        self.prompt_rows: range | NDArray[np.int64] = range(-(-self.run.pairs.num_samples // per_prompt))
        if selected is not None:
            self.prompt_rows = np.unique(selected.sample_ids // per_prompt)
        self._split = Split(self.root, self.run, commits, selected, holdout)
        self._order = ShuffledOrder(self._split.sizes, seed, window, f"pairs/{self.run.fingerprint[:16]}")
        self.num_samples = self._order.num_rows
        self._decoder = PairDecoder(self.run.pairs)
        self.target: Target = self._decoder.target
        self._opener = ShardOpener(dataset, commits, self._split, ShardCache(storage, cache_folder, cache_bytes))
        self._shards = Ahead(self._opener.open, _WINDOWS_OPEN * window, OpenShard.close)

    def read(self, positions: Sequence[int]) -> PairBatch:
        """The pairs at some positions of the stream, in the order given; increasing positions are fast.

        Raises:
            DamagedShard: a shard is missing, or is not what was written; names it and the command that mends it.
            OSError: the storage failed.
        """
        batch = _Batch(self._decoder, len(positions))
        places: dict[int, list[tuple[int, int]]] = {}
        for place, (unit, row) in enumerate(self._order.locate(positions)):
            places.setdefault(unit, []).append((place, row))
        with self._naming_the_repair():
            for unit, entries in places.items():
                shard = self._shards.get(unit)
                for place, row in entries:
                    batch.fill(place, shard, int(shard.training[row]))
        self._shards.request(self._order.units_from(positions[-1]))
        return batch.pairs()

    def held_out(self) -> PairBatch:
        """The pairs that are kept out of the stream, in order of their keys. Raises as :meth:`read` does."""
        batch = _Batch(self._decoder, len(self._split.held_out))
        with self._naming_the_repair():
            for place, (unit, sample_id) in enumerate(self._split.held_out):
                with closing(self._opener.open(unit)) as shard:
                    batch.fill(place, shard, shard.row_of(sample_id))
        return batch.pairs()

    @contextmanager
    def _naming_the_repair(self) -> Generator[None, None, None]:
        try:
            yield
        except (DamagedShard, DamagedRecord) as error:
            verify = f"python stages/verify_shards.py {shlex.quote(self.root)} --repair"
            raise type(error)(f"{error}; run `{verify}`, then generate_pairs.py again, to have it made anew") from None


class _Batch:
    """A batch that is being filled."""

    def __init__(self, decoder: PairDecoder, size: int) -> None:
        self._decoder = decoder
        self._keys = [""] * size
        self._prompts = [""] * size
        self._noise = np.empty((size, *decoder.noise_shape), np.float16)
        self._target = np.empty((size, *decoder.target_shape), decoder.target_dtype)

    def fill(self, place: int, shard: OpenShard, row: int) -> None:
        """Put a row of a shard at a place of the batch."""
        sample = shard.sample(row)
        self._keys[place] = key(sample.sample_id)
        self._prompts[place] = shard.prompt(row)
        try:
            self._decoder.decode(shard.descriptor, sample, self._noise[place], self._target[place])
        except ValueError as error:
            raise DamagedShard(f"shard {shard.shard}: sample {self._keys[place]}: {error}") from None

    def pairs(self) -> PairBatch:
        from torch import from_numpy

        return PairBatch(self._keys, from_numpy(self._noise), from_numpy(self._target), self._prompts)


def _read_commits(dataset: Dataset, allow_partial: bool) -> tuple[list[Commit], str]:
    """All commit records in order, and the sha256 over their contents."""
    root, run, sealed = dataset.storage.uri, dataset.run, dataset.sealed
    if sealed is None and not allow_partial:
        raise UserError(
            f"{root}: is not finished, {len(dataset.committed())} of {run.num_shards} shards exist; "
            "let generate_pairs.py end, or set data.allow_partial: true"
        )
    commits = read_commits(dataset)
    if not commits:
        raise UserError(f"{root}: no shard exists yet; wait for generate_pairs.py")
    for commit in commits:
        if commit.num_samples + len(commit.rejected) != len(run.sample_ids(commit.shard)):
            raise DamagedRecord(f"{root}: the commit record of shard {commit.shard} does not count its samples right")
    about = summary(dataset, commits, 0)
    if sealed is not None:
        for name in ("fingerprint", "num_shards", "num_samples", "content_sha256"):
            if sealed.get(name) != about[name]:
                raise DamagedRecord(f"{root}: {name} of {SEALED} is not that of the commit records")
    return commits, about["content_sha256"]
