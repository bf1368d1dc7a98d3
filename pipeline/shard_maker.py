"""One shard from samples to its commit, whatever the samples are: pairs, or real images.

A worker has a :class:`ShardMaker` and gives it an iterator of samples and a function that encodes one. Calls of
:meth:`ShardMaker.make` may overlap: the device is held by one at a time, so a shard is encoded, written and uploaded
while the next one is computed. Memory is bounded by the samples in flight; of a finished sample only its index row is
held.
"""

import os
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from configs.errors import RunStopped, UserError
from configs.schema import DatasetRuntime
from pipeline.full_disk import FULL_DISK
from pipeline.processes import has_ended, process_identity
from pipeline.provenance import code_revision, library_versions
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import RUN, Row, key
from pipeline.shards.records import Commit, Timing
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard, ShardWriter, commit_shard

NUM_PREVIEWS = 24
"""Pictures on the data card."""
_TEMP_PREFIX = "potstill-"
MAX_BATCHES_IN_FLIGHT = 4
"""Batches of a shard that may wait for the encoder: the bound of a worker's memory."""


class HasRow(Protocol):
    """A sample, stored or rejected."""

    @property
    def row(self) -> Row:
        """Its index row; its place in the shard is filled in by the writer."""
        ...


MadeSample = TypeVar("MadeSample", bound=HasRow)


@dataclass(frozen=True)
class ShardResult:
    """What a worker tells the driver about a shard: its commit record, and what came of this attempt.

    Attributes:
        commit: the record that stands.
        adopted: somebody else had committed the shard first.
        device_seconds: seconds the device was held by this attempt.
    """

    commit: Commit
    adopted: bool
    device_seconds: float


class ShardMaker:
    """Makes shards of one dataset on one device.

    Args:
        dataset: has its ``run.json``.
        runtime: batch size, temporary folder, share of bad samples. ``cpus_per_actor`` is the number of encoders.
        device: the one that :meth:`make` lets one call at a time use.
    """

    def __init__(self, dataset: Dataset, runtime: DatasetRuntime, device: torch.device) -> None:
        self._dataset = dataset
        self._runtime = runtime
        self._device = device
        self._temp_dir = Path(runtime.temp_dir or tempfile.gettempdir())
        self._temp_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale_files(self._temp_dir)
        self._encoders = ThreadPoolExecutor(max(1, round(runtime.cpus_per_actor)), thread_name_prefix="encode")
        self._device_lock = threading.Lock()

    def make(
        self,
        shard: int,
        attempt: int,
        samples: Callable[[int, range], Iterator[MadeSample]],
        encode: Callable[[MadeSample], dict[str, bytes]],
    ) -> ShardResult:
        """Make a shard and commit it, or adopt it if it exists.

        Args:
            shard: its number.
            attempt: 1 for the first try of a run.
            samples: ``samples(shard, ids)`` yields one sample for each id, in order, rejected ones included.
            encode: the members of a sample by suffix; called in several threads, also for rejected samples.

        Raises:
            OSError: the disk or the storage is full or away.
            RunStopped: so many samples are bad that something is broken; nothing of the shard is committed.
            DamagedShard: the local disk returns other bytes than were written.
        """
        existing = self._dataset.commit(shard)
        if existing is not None:
            return ShardResult(existing, adopted=True, device_seconds=0.0)
        started, clock = datetime.now(UTC), time.monotonic()
        ids = self._dataset.run.sample_ids(shard)
        path = self._temp_dir / f"{_TEMP_PREFIX}{process_identity(os.getpid())}-{shard:06d}-{time.monotonic_ns()}.tar"
        with _named_if_full(self._temp_dir), ShardWriter(path) as writer:
            pending: deque[tuple[Row, Future[dict[str, bytes]]]] = deque()
            with self._device_lock, torch.inference_mode():
                held = time.monotonic()
                for sample in self._while_sound(shard, ids, samples(shard, ids)):
                    pending.append((sample.row, self._encoders.submit(encode, sample)))
                    in_flight = MAX_BATCHES_IN_FLIGHT * self._runtime.batch_size
                    while pending and (pending[0][1].done() or len(pending) > in_flight):
                        _write(writer, *pending.popleft())
                device_seconds = time.monotonic() - held
            while pending:
                _write(writer, *pending.popleft())
            written = writer.finish()
            if [row.key for row in written.rows] != [key(i) for i in ids]:
                raise DamagedShard(f"shard {shard}: {len(written.rows)} samples were made, {len(ids)} belong into it")
            timing = Timing(
                attempt=attempt,
                host=socket.gethostname(),
                device=_device_name(self._device),
                started=started.isoformat(timespec="milliseconds"),
                sample_seconds=round(device_seconds, 3),
                total_seconds=round(time.monotonic() - clock, 3),
                code_revision=code_revision(),
                versions=library_versions(),
            )
            commit = commit_shard(self._dataset.storage, self._dataset.run.fingerprint, shard, written, timing)
        return ShardResult(commit, adopted=commit.timing != timing, device_seconds=device_seconds)

    def _while_sound(self, shard: int, ids: range, samples: Iterator[MadeSample]) -> Iterator[MadeSample]:
        """The samples, as long as few enough are bad."""
        rejected: Counter[str] = Counter()
        allowed = max_rejected(self._runtime.max_rejected_fraction, len(ids), self._dataset.run.spec.num_samples)
        for number, sample in enumerate(samples, start=1):
            rejected.update([sample.row.reason] if sample.row.status == "rejected" else [])
            if rejected.total() > allowed:
                reasons = ", ".join(f"{reason}: {count}" for reason, count in rejected.items())
                raise RunStopped(
                    f"shard {shard}: {rejected.total()} of its first {number} samples are bad "
                    f"({reasons}); {self._dataset.run.what_to_mend}, or raise runtime.max_rejected_fraction"
                )
            yield sample


def max_rejected(fraction: float, num_made: int, num_samples: int) -> float:
    """How many of ``num_made`` samples may be bad: a rate needs a thousand samples, or all there are, to mean much."""
    return fraction * max(num_made, min(num_samples, 1000))


def preview_ids(num_samples: int) -> list[int]:
    """The samples shown on the data card: at most NUM_PREVIEWS, evenly spread over the dataset."""
    count = min(NUM_PREVIEWS, num_samples)
    return sorted({round(i * (num_samples - 1) / max(count - 1, 1)) for i in range(count)})


def open_shared_dataset(root: str, fingerprint: str) -> Dataset:
    """The dataset at ``root`` as this machine sees it, of pairs or of images.

    Raises:
        UserError: it sees none, or another one.
    """
    host = socket.gethostname()
    storage = Storage.open(root)
    if not storage.exists(RUN):
        raise UserError(f"{root}: host {host} does not see it; a cluster of several machines needs a shared output")
    dataset = Dataset.open_any(storage)
    if dataset.run.fingerprint != fingerprint:
        raise UserError(f"{root}: on host {host} this is another dataset; a cluster needs a shared output")
    return dataset


def _write(writer: ShardWriter, row: Row, members: Future[dict[str, bytes]]) -> None:
    encoded = members.result()
    if row.status == "ok":
        writer.add(row, encoded)
    else:
        writer.reject(row)


@contextmanager
def _named_if_full(temp_dir: Path) -> Iterator[None]:
    """Name the disk in the error of a full one: writing to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, f"{socket.gethostname()}:{temp_dir}") from error


def _remove_stale_files(temp_dir: Path) -> None:
    """Remove what killed processes of this machine left behind; what another machine left is not ours to judge."""
    for stale in temp_dir.glob(f"{_TEMP_PREFIX}*.tar"):
        if has_ended("-".join(stale.name.removeprefix(_TEMP_PREFIX).split("-")[:4])):
            stale.unlink(missing_ok=True)


def _device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
