"""Shards in this process, with no Ray: for debugging, for small work and for machines without Ray.

Two threads run the worker, which lets one of them at a time use the device: so one shard is read, or encoded and
uploaded, while the other is computed. The shard function is the same as on a cluster.
"""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Generic

import torch

from configs.errors import UserError
from configs.schema import WorkersRuntime
from pipeline.driver import Outcome, Result, Worker

_SLOTS = 2


class InProcessExecutor(Generic[Result]):
    """Runs one worker in this process, built when the first shard is submitted.

    Args:
        make_worker: builds the worker; its errors are the caller's.
        runtime: whether a GPU is asked for.

    Raises:
        UserError: a GPU is asked for and there is none.
    """

    num_workers = 1

    def __init__(self, make_worker: Callable[[], Worker[Result]], runtime: WorkersRuntime) -> None:
        if runtime.gpus_per_actor > 0 and not torch.cuda.is_available():
            raise UserError(
                f"runtime.gpus_per_actor: {runtime.gpus_per_actor:g} asked, this machine has no GPU; "
                "set it to 0 to work on the CPU"
            )
        self._make_worker = cache(make_worker)
        self._threads = ThreadPoolExecutor(_SLOTS, thread_name_prefix="shard")
        self._running: dict[Future[Result], tuple[int, float]] = {}

    @property
    def in_flight(self) -> int:
        """Attempts submitted and not yet reported."""
        return len(self._running)

    def free_slots(self, num_waiting: int) -> int:
        """How many of ``num_waiting`` shards it can take now."""
        return min(num_waiting, _SLOTS - self.in_flight)

    def submit(self, shard: int, attempt: int) -> None:
        """Start an attempt."""
        run = self._make_worker().run
        self._running[self._threads.submit(run, shard, attempt)] = (shard, time.monotonic())

    def wait(self, timeout_s: float) -> list[Outcome[Result]]:
        """Outcomes since the last call; waits for at most ``timeout_s`` if there are none yet."""
        done, _ = wait(self._running, timeout=timeout_s, return_when=FIRST_COMPLETED)
        return [self._outcome(future) for future in done]

    def close(self) -> None:
        """Wait for what still runs."""
        self._threads.shutdown(cancel_futures=True)

    def _outcome(self, future: Future[Result]) -> Outcome[Result]:
        shard, started = self._running.pop(future)
        error = future.exception()
        if error is None:
            return Outcome(shard, "in-process", result=future.result())
        return Outcome(shard, "in-process", error=error, lost_seconds=time.monotonic() - started)
