"""One shard's scores, as a function of its bytes and the scorer.

    tar (verified) -> images, decoded a few batches ahead -> scorer -> table, create-only

Calls of :meth:`ScoreWorker.run` may overlap: the scorer is called by one thread at a time, batch by batch, while others
read and decode. No batch crosses a shard, so what else is in flight changes nothing. Memory: the decoded batches in
flight, and the values of two shards.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import RunStopped
from configs.score_schema import ScoreRuntime
from pipeline.scoring.score_table import claim, create_table, record_of, table_path
from pipeline.scoring.scorer import Scorer
from pipeline.shard_maker import open_shared_dataset
from pipeline.shards.manifest import read_index
from pipeline.shards.members import decode_image, split_members
from pipeline.shards.parallel import parallel_map
from pipeline.shards.shard_cache import ShardCache
from pipeline.shards.writer import DamagedShard

MakeScorer = Callable[[torch.device], Scorer]


@dataclass(frozen=True)
class ScoredShard:
    """What a worker tells the driver about a shard.

    Attributes:
        num_images: images of the shard.
        adopted: somebody else had scored it first.
        device_seconds: seconds the scorer was busy with it.
    """

    num_images: int
    adopted: bool
    device_seconds: float


class ScoreWorker:
    """Scores shards of one dataset with one scorer on one device.

    Args:
        root: URI of the dataset.
        fingerprint: of that dataset.
        name: name of the scores.
        make_scorer: builds the scorer on a device.
        runtime: batch size, cache, devices. ``cpus_per_actor`` is the number of torch threads and of decoding threads.

    Raises:
        UserError: what this machine sees at ``root`` is not that dataset, the scorer cannot be built, or the scores of
            this name are another scorer's.
    """

    def __init__(self, root: str, fingerprint: str, name: str, make_scorer: MakeScorer, runtime: ScoreRuntime) -> None:
        self._threads = max(1, round(runtime.cpus_per_actor))
        torch.set_num_threads(self._threads)
        self._dataset = open_shared_dataset(root, fingerprint)
        self._batch_size = runtime.batch_size
        folder = runtime.cache_dir or f"{tempfile.gettempdir()}/potstill-shards-{os.getuid()}"
        self._cache = ShardCache(self._dataset.storage, Path(folder), int(runtime.cache_gb * 1e9))
        self._scorer = make_scorer(torch.device("cuda" if runtime.gpus_per_actor > 0 else "cpu"))
        self._record = record_of(self._dataset, name, self._scorer)
        claim(self._dataset, self._record)
        self._device_lock = threading.Lock()

    def run(self, shard: int, attempt: int = 1) -> ScoredShard:
        """Score a shard and write its table, or adopt it if it exists.

        Raises:
            DamagedShard: the shard is missing, or is not the one that was committed.
            RunStopped: the scorer gave a value that is not finite; nothing of the shard is written.
            OSError: the storage failed.
        """
        commit = self._dataset.commit(shard)
        if commit is None:
            raise DamagedShard(f"shard {shard}: its commit record has gone; run generate_pairs.py again")
        if self._dataset.storage.exists(table_path(self._record.name, commit)):
            return ScoredShard(commit.num_samples, adopted=True, device_seconds=0.0)
        rows = [row for row in read_index(self._dataset, commit).to_pylist() if row["status"] == "ok"]
        batches = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        device_seconds = 0.0
        parts: dict[str, list[NDArray[np.float32]]] = {
            column: [np.zeros((0, *([width] if width else [])), np.float32)]
            for column, width in self._record.columns.items()
        }
        with self._cache.open(commit) as file:
            decode = partial(self._decode, file.fileno())
            for batch, images in parallel_map(decode, batches, self._threads):
                with self._device_lock:
                    started = time.monotonic()
                    values = self._scorer(images, [row["prompt"] for row in batch])
                    device_seconds += time.monotonic() - started
                for column, found in self._checked(values, batch).items():
                    parts[column].append(found)
        made = create_table(
            self._dataset, self._record, commit, {column: np.concatenate(arrays) for column, arrays in parts.items()}
        )
        return ScoredShard(commit.num_samples, adopted=not made, device_seconds=device_seconds)

    def _decode(self, file: int, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[NDArray[np.uint8]]]:
        """The images of some index rows, (H, W, 3) each; the rows come along."""
        run = self._dataset.run
        kind, size = run.spec.fields.image, run.picture_size
        images: list[NDArray[np.uint8]] = []
        for row in rows:
            members = split_members(os.pread(file, row["length"], row["offset"]))
            images.append(decode_image(members[kind], size))
        return rows, images

    def _checked(
        self, values: dict[str, NDArray[np.float32]], rows: list[dict[str, Any]]
    ) -> dict[str, NDArray[np.float32]]:
        """The values of a batch, if they are what the scorer promises: every column, a finite float32 row an image."""
        columns = self._record.columns
        expected = {name: (len(rows),) if width is None else (len(rows), width) for name, width in columns.items()}
        found = {name: array.shape for name, array in values.items()}
        if found != expected or any(array.dtype != np.float32 for array in values.values()):
            raise ValueError(f"the scorer gave {found} for {len(rows)} images, and not {expected} in float32")
        for name, array in values.items():
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(rows), -1)).all(axis=1))
            if len(bad):
                raise RunStopped(
                    f"{self._record.name}: {name} of sample {rows[bad[0]]['key']} is not finite; "
                    "mend the scorer or its weights"
                )
        return values
