"""Micro-batches, read ahead by worker processes.

The order is a function of the numbers of the micro-batches, not of the workers: any number of them gives the same
stream, and it begins wherever the run goes on. Nothing ends without a word:

* What stops a run in a worker (damage, storage) is handed over as a value, and raised here as the same one line.
* A worker that dies is a RunStopped with the signal that ended it. PyTorch would raise that wherever the process is
  when the worker's death is noticed, in the middle of an optimizer's step for one; here it is raised when its
  micro-batch is asked for.
* Workers take no notice of the signals that ask a run to stop, which a terminal or a scheduler sends to all processes
  at once: the step that is under way needs them still.
* Whoever waits for long is told what for, once a minute.

Workers are spawned, not forked: the threads of the storage do not survive a fork.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from configs.errors import RunStopped, UserError
from trainer.data.positions import MicroBatchPositions
from trainer.data.training_data import GO_ON, MicroBatch, TrainingData
from trainer.data.waiting import WaitingNotice

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_HINTS = {
    signal.SIGKILL: " (is memory short? lower runtime.workers or runtime.prefetch)",
    signal.SIGBUS: " (is /dev/shm full? enlarge it, or lower runtime.workers or runtime.prefetch)",
}


class MicroBatchLoader(Iterator[MicroBatch]):
    """The micro-batches of one process without an end, in the order in which the loop takes them.

    Args:
        data: what to read; used by this process alone if there are no workers.
        rank: number of this process.
        world: number of processes.
        first_step: step to begin with.
    """

    def __init__(self, data: TrainingData, *, rank: int, world: int, first_step: int) -> None:
        runtime = data.config.runtime
        self._positions = MicroBatchPositions(data.config, rank, world)
        self._number = first_step * self._positions.per_step
        self._notice = WaitingNotice()
        loader = DataLoader(
            _MicroBatches(data, self._positions),
            batch_size=None,
            sampler=count(self._number),  # type: ignore[arg-type]
            num_workers=runtime.workers,
            prefetch_factor=runtime.prefetch if runtime.workers else None,
            multiprocessing_context="spawn" if runtime.workers else None,
            worker_init_fn=_ignore_stop_signals,
            collate_fn=_as_it_is,
        )
        before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # inherited: workers begin deaf to them
        try:
            self._batches: Iterator[MicroBatch | Exception] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        self._workers: set[BaseProcess] = set(multiprocessing.active_children()) - before
        with suppress(ValueError):  # signals are the main thread's, and so is PyTorch's handler
            signal.signal(signal.SIGCHLD, handler)

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises:
            UserError: a worker could not open the data.
            RunStopped: a shard is damaged, the storage failed, or a worker died.
        """
        assert self._batches is not None, "closed"
        step = self._positions.at(self._number).step
        with self._notice.waiting_for(f"data of step {step}"):
            try:
                batch = next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                if (cause := self._cause_of_death()) is not None:
                    raise RunStopped(f"a data worker {cause}; {GO_ON}") from error
                raise
        if isinstance(batch, Exception):
            raise batch
        self._number += 1
        return batch

    def close(self) -> None:
        """End the workers."""
        self._notice.close()
        self._batches = None  # asks them to end, and waits a few seconds
        for worker in self._workers:
            worker.kill()

    def _cause_of_death(self) -> str | None:
        """How a worker ended; None if all are alive."""
        ended = wait([worker.sentinel for worker in self._workers], timeout=1)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join()
                code = worker.exitcode or 0
                if code >= 0:
                    return f"ended with exit code {code}"
                return f"was ended by {signal.Signals(-code).name}{_HINTS.get(signal.Signals(-code), '')}"
        return None


class _MicroBatches(Dataset[Any]):
    """Micro-batches by number. A worker gets a copy that opens the data for itself."""

    def __init__(self, data: TrainingData, positions: MicroBatchPositions) -> None:
        self._config = data.config
        self._content = (data.identities, data.prompts_digest)
        self._positions = positions
        self._data: TrainingData | None = data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def __getitem__(self, number: int) -> MicroBatch | Exception:
        try:
            if self._data is None:
                self._data = self._open()
            return self._data.read(self._positions.at(number))
        except (UserError, RunStopped) as error:
            return error

    def _open(self) -> TrainingData:
        data = TrainingData(self._config)
        if (data.identities, data.prompts_digest) != self._content:
            raise RunStopped("the data has changed since this run began; let whatever changes it end, and start again")
        return data


def _ignore_stop_signals(_: int) -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item
