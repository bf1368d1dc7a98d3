"""What a person, and a program, can see of a run.

On a terminal a live bar, elsewhere a line every few seconds; always JSON lines in ``events/`` and, at the end,
``report.json``. Rates count committed samples only: what is in flight may still be lost.
"""

import json
import sys
import time
import uuid
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

from configs.errors import RunStopped
from pipeline.driver import Executor, Outcome
from pipeline.lease import Lease
from pipeline.shard_maker import ShardResult, max_rejected
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import REPORT

_WINDOW_S = 60.0
_FLUSH_EVERY_S = 60.0
_FLUSH_EVERY_EVENTS = 10_000


class Progress:
    """Watches one run of a dataset; an Observer of :func:`pipeline.driver.drive`.

    Args:
        dataset: the dataset.
        lease: checked at every tick.
        num_done: samples that were committed before this run.
        period_s: seconds between lines when the output is no terminal.
        max_rejected_fraction: share of rejected samples above which the run stops.
    """

    def __init__(
        self, dataset: Dataset, lease: Lease, num_done: int, period_s: float, max_rejected_fraction: float
    ) -> None:
        self._dataset = dataset
        self._lease = lease
        self._total = dataset.run.spec.num_samples
        self._num_before = num_done
        self._period_s = period_s
        self._max_rejected_fraction = max_rejected_fraction
        self._started_at, self._started = datetime.now(UTC), time.monotonic()
        self._ended: float | None = None
        self._last_line = self._last_flush = self._started
        self._window: deque[tuple[float, int]] = deque()
        self._num_stored = 0
        self._num_adopted_shards = 0
        self._num_shards = 0
        self._rejected: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._parked: dict[int, str] = {}
        self._per_worker: dict[str, tuple[int, float]] = {}
        self._lost_device_seconds = 0.0
        self._events: list[str] = []
        self._run_id = f"{self._started_at:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        self._num_flushed = 0
        self._bar = tqdm(
            total=self._total,
            initial=num_done,
            unit=f" {dataset.run.holds}",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    @property
    def num_rejected(self) -> int:
        """Samples rejected in this run."""
        return self._rejected.total()

    @property
    def num_finished(self) -> int:
        """Samples of this run that are stored or rejected."""
        return self._num_stored + self.num_rejected

    def committed(self, outcome: Outcome[ShardResult], result: ShardResult) -> None:
        """Count a shard that exists now.

        Raises:
            RunStopped: too many samples are rejected.
        """
        commit = result.commit
        self._num_shards += 1
        self._num_stored += commit.num_samples
        self._rejected.update(commit.rejected_by_reason)
        if result.adopted:
            self._num_adopted_shards += 1
            self._lost_device_seconds += result.device_seconds
        else:
            images, seconds = self._per_worker.get(outcome.worker, (0, 0.0))
            self._per_worker[outcome.worker] = (images + commit.num_samples, seconds + result.device_seconds)
        num = commit.num_samples + len(commit.rejected)
        self._window.append((time.monotonic(), num))
        self._bar.update(num)
        self._event(
            "committed",
            shard=commit.shard,
            worker=outcome.worker,
            samples=commit.num_samples,
            rejected=len(commit.rejected),
            device_seconds=round(result.device_seconds, 3),
            adopted=result.adopted,
        )
        self._check_rejected()

    def failed(self, outcome: Outcome[ShardResult], attempt: int) -> None:
        """Count an attempt that will be repeated."""
        self._lost_device_seconds += outcome.lost_seconds
        cause = "worker died" if outcome.crashed else type(outcome.error).__name__
        self._retries[cause] += 1
        self.say(f"shard {outcome.shard}: attempt {attempt} came to nothing ({cause}: {_first_line(outcome.error)})")
        self._event("failed", shard=outcome.shard, worker=outcome.worker, attempt=attempt, cause=cause)

    def parked(self, shard: int, outcome: Outcome[ShardResult], attempts: int, reason: str) -> None:
        """Count a shard that is given up for this run, and leave its note."""
        self._lost_device_seconds += outcome.lost_seconds
        self._parked[shard] = f"{type(outcome.error).__name__}: {_first_line(outcome.error)}"
        self._dataset.park(
            shard, json.dumps({"shard": shard, "attempts": attempts, "reason": reason}, indent=1).encode()
        )
        self.say(f"shard {shard}: parked after {attempts} attempts ({self._parked[shard]})")
        self._event("parked", shard=shard, worker=outcome.worker, attempts=attempts, reason=reason)

    def tick(self, executor: Executor[ShardResult], num_waiting: int) -> None:
        """Show the state if it is time to, and write events out now and then.

        Raises:
            RunStopped: another run has taken the output over.
        """
        self._lease.check()
        now = time.monotonic()
        while self._window and self._window[0][0] < now - _WINDOW_S:
            self._window.popleft()
        if self._bar.disable and now - self._last_line >= self._period_s:
            self._last_line = now
            print(self._line(executor, num_waiting), flush=True)
        elif not self._bar.disable:
            self._bar.set_postfix(workers=executor.num_workers, rejected=self.num_rejected, refresh=False)
        if now - self._last_flush >= _FLUSH_EVERY_S or len(self._events) >= _FLUSH_EVERY_EVENTS:
            self.flush()

    def all_made(self) -> None:
        """From here on nothing is made: what follows is not time of making."""
        self._ended = time.monotonic()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def flush(self) -> None:
        """Write the events since the last call to ``events/``."""
        self._last_flush = time.monotonic()
        if not self._events:
            return
        path = f"events/{self._run_id}-{self._num_flushed:05d}.jsonl"
        try:
            self._dataset.storage.write(path, "".join(self._events).encode())
        except OSError as error:  # a log that cannot be written is no reason to stop: the workers judge the storage
            self.say(f"{path} not written, kept for later ({error})")
            return
        self._events.clear()
        self._num_flushed += 1

    def close(self, outcome: str) -> None:
        """Write the last events and ``report.json``."""
        self._bar.close()
        report = self.report(outcome)
        self._event("ended", **report)
        self.flush()
        self._dataset.storage.write(REPORT, json.dumps(report, indent=1).encode())

    def report(self, outcome: str) -> dict[str, Any]:
        """Everything counted in this run."""
        seconds = (self._ended or time.monotonic()) - self._started
        return {
            "outcome": outcome,
            "run": self._run_id,
            "started": self._started_at.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "samples_total": self._total,
            "samples_before": self._num_before,
            "samples_stored": self._num_stored,
            "shards_committed": self._num_shards,
            "shards_adopted": self._num_adopted_shards,
            "shards_parked": {str(shard): reason for shard, reason in sorted(self._parked.items())},
            "images_per_second": round(self._num_stored / seconds, 3),
            "images_per_device_second": {
                worker: round(images / seconds, 3) if seconds else None
                for worker, (images, seconds) in sorted(self._per_worker.items())
            },
            "retries_by_cause": dict(self._retries),
            "rejected_by_reason": dict(self._rejected),
            "lost_device_seconds": round(self._lost_device_seconds, 3),
        }

    def _line(self, executor: Executor[ShardResult], num_waiting: int) -> str:
        done = self._num_before + self.num_finished
        elapsed = time.monotonic() - self._started
        window = min(elapsed, _WINDOW_S)
        mean = self.num_finished / elapsed
        eta = tqdm.format_interval((self._total - done) / mean) if mean else "?"
        return (
            f"{self._dataset.run.holds} {done:,}/{self._total:,} ({done / self._total:.0%}) | "
            f"{sum(num for _, num in self._window) / window:.1f} images/s, mean {mean:.1f} | ETA {eta} | "
            f"workers {executor.num_workers}, shards in flight {executor.in_flight}, waiting {num_waiting} | "
            f"retries {self._retries.total()}, rejected {self.num_rejected}, parked {len(self._parked)}"
        )

    def _check_rejected(self) -> None:
        """Stop a run that produces rubbish, yet not for the first bad sample of a small shard."""
        if self.num_rejected > max_rejected(self._max_rejected_fraction, self.num_finished, self._total):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._rejected.most_common())
            raise RunStopped(
                f"{self.num_rejected} of {self.num_finished} samples are rejected ({reasons}); "
                f"{self._dataset.run.what_to_mend}, or raise runtime.max_rejected_fraction"
            )

    def _event(self, event: str, **about: Any) -> None:
        time_ = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events.append(json.dumps({"time": time_, "event": event, **about}) + "\n")


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
