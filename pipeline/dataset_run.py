"""From an identity to a finished dataset, wherever it stands: of pairs, or of real images.

``run.json`` fixes the identity, a lease keeps other runs away, the shards that have no commit are made, and at the end
the manifest and the data card are written. Whoever calls has checked everything that a user can have got wrong.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from configs.errors import RunStopped, UserError
from configs.schema import DatasetRuntime
from pipeline.driver import Executor, StopRequest, drive
from pipeline.lease import Lease
from pipeline.progress import Progress
from pipeline.shard_maker import ShardResult
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import MAX_SAMPLES, MAX_SHARDS, RUN
from pipeline.shards.manifest import seal, write_manifest
from pipeline.shards.records import Run
from pipeline.shards.storage import Storage

KEPT = "every committed shard is intact"
"""What a run that ends early leaves."""


@dataclass(frozen=True)
class DatasetRun:
    """How a dataset is brought to its end.

    Attributes:
        storage: its root.
        run: its identity, as ``run.json`` is to say.
        runtime: retries, lease, share of bad samples.
        make_executor: starts the workers; called only if there is a shard to make.
        store_table: puts the table that the samples refer to beside the shards, if it is not there.
        write_card: writes the data card of what ``SEALED.json`` is to say.
    """

    storage: Storage
    run: Run
    runtime: DatasetRuntime
    make_executor: Callable[[], Executor[ShardResult]]
    store_table: Callable[[], None]
    write_card: Callable[[Dataset, dict[str, Any]], None]

    def complete(self) -> None:
        """Make what is missing, and seal.

        Raises:
            UserError: the output holds something else; nothing has been written.
            RunStopped: the run ended early or shards are parked; everything committed is kept.
        """
        storage, run = self.storage, self.run
        if storage.exists(RUN) and not _missing(dataset := Dataset.create_or_open(storage, run)):
            if dataset.sealed is not None:
                print(f"{storage.uri}: all {run.num_shards} shards exist; nothing to do")
                return
            with Lease(storage, self.runtime.lease_period_s) as lease:
                self.store_table()
                with _reported(self._progress(dataset, lease, [])):  # the run that made the last shard did not seal
                    summary = self._summary(dataset)
                self._seal(dataset, summary)
            return
        executor = self.make_executor()
        try:
            dataset = Dataset.create_or_open(storage, run)
            with Lease(storage, self.runtime.lease_period_s) as lease, StopRequest().installed() as stop:
                self.store_table()
                missing = _missing(dataset)
                progress = self._progress(dataset, lease, missing)
                with _reported(progress):
                    self._make(missing, dataset, executor, progress, stop)
                    summary = self._summary(dataset)
                self._seal(dataset, summary)
        finally:
            executor.close()

    def _make(
        self,
        missing: list[int],
        dataset: Dataset,
        executor: Executor[ShardResult],
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        runtime, run = self.runtime, dataset.run
        dataset.unpark()
        print(f"{dataset.storage.uri}: {len(missing)} of {run.num_shards} shards to make", flush=True)
        parked = drive(
            executor,
            missing,
            progress,
            stop,
            max_errors_per_shard=runtime.max_errors_per_shard,
            max_crashes_per_shard=runtime.max_crashes_per_shard,
        )
        progress.all_made()
        if stop.requested:
            raise _Ended("interrupted", "on request; committed shards are kept, run the same command again to go on")
        if parked:
            raise _Ended(
                "parked",
                f"{len(parked)} of {run.num_shards} shards are parked, reasons in {dataset.storage.uri}/parked/; "
                "mend the cause, then run the same command again",
            )

    def _progress(self, dataset: Dataset, lease: Lease, missing: list[int]) -> Progress:
        run, runtime = dataset.run, self.runtime
        num_done = run.spec.num_samples - sum(len(run.sample_ids(shard)) for shard in missing)
        return Progress(dataset, lease, num_done, runtime.progress_period_s, runtime.max_rejected_fraction)

    def _summary(self, dataset: Dataset) -> dict[str, Any]:
        """Write the manifest; what ``SEALED.json`` is to say, of a dataset that may be sealed."""
        asked = dataset.run.spec.num_samples
        summary = write_manifest(dataset)
        num_listed = summary["num_samples"] + summary["num_rejected"]
        if num_listed != asked:
            raise RunStopped(f"{dataset.storage.uri}: {num_listed:,} samples listed, {asked:,} asked")
        if summary["num_rejected"] > self.runtime.max_rejected_fraction * asked:
            raise RunStopped(
                f"{summary['num_rejected']:,} of {asked:,} samples are rejected "
                f"({summary['rejected_by_reason']}), not sealed; accept that by raising runtime.max_rejected_fraction, "
                "or mend the cause and have their shards made again: verify_shards.py --repair --redo_rejected"
            )
        return summary

    def _seal(self, dataset: Dataset, summary: dict[str, Any]) -> None:
        self.write_card(dataset, summary)
        seal(dataset, summary)
        print(
            f"{dataset.storage.uri}: complete, {summary['num_samples']:,} {dataset.run.holds} in "
            f"{summary['num_shards']:,} shards, {summary['num_bytes'] / 1e6:,.1f} MB, "
            f"{summary['num_rejected']:,} rejected; see README.md there"
        )


class _Ended(RunStopped):
    """An end that ``report.json`` has a word for."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


@contextmanager
def _reported(progress: Progress) -> Generator[None]:
    """Ends with ``report.json``, however it ends; that says complete of a dataset that may be, and is to be, sealed."""
    try:
        yield
    except BaseException as error:
        outcome = f"stopped: {error}" if isinstance(error, RunStopped) else "failed"
        with suppress(OSError):  # the report of a full disk may not fit on it; the cause is on its way up already
            progress.close(error.outcome if isinstance(error, _Ended) else outcome)
        raise
    progress.close("complete")


def num_shards(num_samples: int, samples_per_shard: int) -> int:
    """Shards of a dataset. Raises UserError if the format has no numbers for so many."""
    count = -(-num_samples // samples_per_shard)
    if num_samples > MAX_SAMPLES or count > MAX_SHARDS:
        raise UserError(
            f"layout.samples_per_shard: {num_samples:,} samples in {count:,} shards; a dataset holds at most "
            f"{MAX_SAMPLES:,} samples in {MAX_SHARDS:,} shards"
        )
    return count


def _missing(dataset: Dataset) -> list[int]:
    committed = dataset.committed()
    return [shard for shard in range(dataset.run.num_shards) if shard not in committed]
