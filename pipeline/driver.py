"""The loop that turns a list of shards into commits, whatever executes them.

    while there is work:  fill free slots  ->  wait  ->  sort outcomes: done | error | crash

An *error* was raised by the worker's code: the shard's fault until shown otherwise, counted per shard, parked after
``max_errors_per_shard``. A *crash* is a worker that died (node lost, preempted, out of memory): tried again on its
own, larger budget. A parked shard does not hold up the rest. Some errors are nobody's shard and stop the run instead of
parking everything: a mistake of the user's (revoked credentials, say), a full disk three times in a row, and errors of
many shards on several workers with no success between them. One loop handles one shard in constant time, and the loop
holds no more than the shards' numbers.
"""

import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from configs.errors import RunStopped, UserError
from pipeline.full_disk import FULL_DISK
from pipeline.shards.writer import DamagedShard

Result = TypeVar("Result")
"""What a worker returns for a shard."""
_Made = TypeVar("_Made", covariant=True)
_Seen = TypeVar("_Seen", contravariant=True)

MAX_FULL_DISK_ERRORS = 3
"""Errors of a full disk, without a commit between them, after which the run stops."""
MAX_ERRORS_IN_A_ROW = 10
"""Errors of any kind, without a commit between them, after which the run stops if no worker is free of them."""
MIN_WORKERS_IN_ERROR = 3
"""Workers that have to be among them, if there are so many."""


class Worker(Protocol[_Made]):
    """Brings shards to a commit. Calls may overlap, two at a time."""

    def run(self, shard: int, attempt: int) -> _Made:
        """Make a shard, or adopt it if it exists; ``attempt`` is 1 for the first try of a run."""
        ...


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one attempt at a shard. Exactly one of ``result`` and ``error`` is set.

    Attributes:
        shard: number of the shard.
        worker: name of the worker.
        result: what the worker returned.
        error: what its code raised, or how it died.
        details: the error with the worker's traceback, if it came from another process.
        crashed: the worker died, or is to blame and has been replaced; ``error`` says how.
        lost_seconds: seconds the worker spent on the attempt when it came to nothing.
    """

    shard: int
    worker: str
    result: Result | None = None
    error: BaseException | None = None
    details: str = ""
    crashed: bool = False
    lost_seconds: float = 0.0


class Executor(Protocol[_Made]):
    """Something that runs :meth:`Worker.run`, several at a time."""

    @property
    def in_flight(self) -> int:
        """Attempts submitted and not yet reported."""
        ...

    @property
    def num_workers(self) -> int:
        """Workers that are up."""
        ...

    def free_slots(self, num_waiting: int) -> int:
        """How many of ``num_waiting`` shards it can take now."""
        ...

    def submit(self, shard: int, attempt: int) -> None:
        """Start an attempt. Only when there is a free slot."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome[_Made]]:
        """Outcomes since the last call; waits for at most ``timeout_s`` if there are none yet.

        Raises:
            UserError, RunStopped: no worker can be brought up.
        """
        ...

    def close(self) -> None:
        """Let go of the workers."""
        ...


class Observer(Protocol[_Seen]):
    """Who is told what happens. May raise RunStopped to end the run."""

    def committed(self, outcome: Outcome[_Seen], result: _Seen) -> None:
        """A shard exists now."""
        ...

    def failed(self, outcome: Outcome[_Seen], attempt: int) -> None:
        """An attempt came to nothing and will be repeated."""
        ...

    def parked(self, shard: int, outcome: Outcome[_Seen], attempts: int, reason: str) -> None:
        """A shard was given up for this run."""
        ...

    def tick(self, executor: Executor[_Seen], num_waiting: int) -> None:
        """Called at least about once a second."""
        ...


class StopRequest:
    """SIGINT and SIGTERM: the first asks the loop to finish the shards in flight, the second ends the process."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Handle the signals inside the context, and leave them to their handlers of before when it ends.

        For the main thread. Ray may be joined before or inside the context: a handler that
        :func:`pipeline.ray_executor.connect` finds stays in place.
        """
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            os.write(2, b"stopped at once; committed shards are kept, run the same command again to go on\n")
            os._exit(1)
        self.requested = True
        os.write(2, b"\nfinishing the shards in flight; once more to stop at once\n")


def drive(
    executor: Executor[Result],
    shards: Iterable[int],
    observer: Observer[Result],
    stop: StopRequest,
    *,
    max_errors_per_shard: int,
    max_crashes_per_shard: int,
) -> list[int]:
    """Bring every shard to a commit, or park it.

    Args:
        executor: runs the attempts.
        shards: numbers of the shards that do not exist yet.
        observer: is told what happens.
        stop: asks to finish what is in flight and to begin no more.
        max_errors_per_shard: attempts that may raise before a shard is parked.
        max_crashes_per_shard: attempts whose worker may die before a shard is parked.

    Returns:
        The parked shards.

    Raises:
        RunStopped: the disk is full, nothing works any more, or a worker or the observer said so.
        UserError: a worker met a mistake of the user's, or none can be brought up.
    """
    waiting = deque(shards)
    errors: Counter[int] = Counter()
    crashes: Counter[int] = Counter()
    parked: list[int] = []
    in_a_row: list[Outcome[Result]] = []
    while executor.in_flight or (waiting and not stop.requested):
        if not stop.requested:
            for _ in range(executor.free_slots(len(waiting))):
                shard = waiting.popleft()
                executor.submit(shard, attempt=errors[shard] + crashes[shard] + 1)
        for outcome in executor.wait(timeout_s=1.0):
            shard = outcome.shard
            if outcome.result is not None:
                in_a_row.clear()
                observer.committed(outcome, outcome.result)
                continue
            if isinstance(outcome.error, UserError | RunStopped) and not isinstance(outcome.error, DamagedShard):
                raise outcome.error
            (crashes if outcome.crashed else errors)[shard] += 1
            if not outcome.crashed:
                in_a_row.append(outcome)
                _stop_if_nothing_works(in_a_row, executor.num_workers)
            attempts = errors[shard] + crashes[shard]
            if errors[shard] < max_errors_per_shard and crashes[shard] < max_crashes_per_shard:
                observer.failed(outcome, attempts)
                waiting.append(shard)
            else:
                parked.append(shard)
                observer.parked(shard, outcome, attempts, outcome.details or describe(outcome.error))
        observer.tick(executor, len(waiting))
    return parked


def _stop_if_nothing_works(in_a_row: list[Outcome[Result]], num_workers: int) -> None:
    """Stop at errors that come one after the other, wherever and whatever the shard.

    Raises:
        RunStopped: names the last one.
    """
    last = in_a_row[-1]
    full = [outcome for outcome in in_a_row if isinstance(outcome.error, OSError) and outcome.error.errno in FULL_DISK]
    if len(full) >= MAX_FULL_DISK_ERRORS:
        raise RunStopped(
            f"no space left ({full[-1].error}, worker {full[-1].worker}); every committed shard is intact: "
            "free some space, then run the same command again"
        )
    shards, workers = {outcome.shard for outcome in in_a_row}, {outcome.worker for outcome in in_a_row}
    if len(shards) >= MAX_ERRORS_IN_A_ROW and len(workers) >= min(MIN_WORKERS_IN_ERROR, num_workers):
        raise RunStopped(
            f"{len(shards)} shards in a row failed on {len(workers)} workers, the last one with "
            f"{type(last.error).__name__}: {last.error}; every committed shard is intact: "
            "mend the cause, then run the same command again"
        )


def describe(error: BaseException | None) -> str:
    """An error with its traceback, as text."""
    return "".join(traceback.format_exception(error)).strip() if error else "unknown"
