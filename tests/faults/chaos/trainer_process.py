"""A training command as a process that starts in a moment, and can be told to die in the middle of a change.

Forked from a server that has imported what a trainer needs and has done nothing else, so that dozens of starts cost
seconds.
"""

import multiprocessing
import os
import signal
import sys
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from configs.errors import exit_codes
from configs.train_schema import TrainConfig

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "accelerate", "diffusers", "transformers", "matplotlib.pyplot", "trainer.loop", __name__]
)
_CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR


def start(config: TrainConfig, log: Path, fatal: int = 0) -> BaseProcess:
    """Start a training run.

    Args:
        config: of the run.
        log: gets what it prints.
        fatal: number of the change of the run directory, from 1, right before which it kills itself; 0: it does not.
    """
    process = _CONTEXT.Process(target=_run, args=(config, log, fatal))
    process.start()
    return process


def _run(config: TrainConfig, log: Path, fatal: int) -> None:
    with log.open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    from trainer.loop import train

    if fatal:
        _die_before(fatal, Path(config.output))
    with exit_codes():
        train(config)


def _die_before(fatal: int, run_dir: Path) -> None:
    seen = count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if _is_change(event, arguments, str(run_dir)) and next(seen) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _is_change(event: str, arguments: tuple[Any, ...], run_dir: str) -> bool:
    """Whether a system call is about to change the run directory. Removals name files relative to open folders."""
    if event == "open":
        path, _, flags = arguments
        return bool(flags & _WRITES) and str(path).startswith(run_dir)
    return event in _CHANGES and (str(arguments[0]).startswith(run_dir) or event in ("os.remove", "os.rmdir"))
