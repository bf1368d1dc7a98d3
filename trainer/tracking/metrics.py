"""Metrics of a run: collected in every step, without waiting for the device, and shown in every ``log_every``-th.

    metrics.add("loss/student", loss)                       in the loop, as often as it likes
    with metrics.timed("data_wait"): ...
    metrics.tick(step)                                      after each step
    metrics.log(step, num_images, critic_steps)             now and then, on all processes

A log line is about the steps since the one before: means over all samples of all processes, and how fast it went.

    NAME_share          share of the time spent in ``timed(NAME)``, mean over processes
    images_per_second   samples that the student learnt from, of all processes together
    seconds_per_step    wall time; what is done ``apart``, such as sample grids and checkpoints, is no part of it
    peak_memory_gb      most memory allocated on a GPU since the process began, mean over processes
"""

import math
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.tracking.means import Means
from trainer.tracking.metrics_file import MetricsFile
from trainer.tracking.progress_line import ProgressLine

if TYPE_CHECKING:
    from accelerate import Accelerator


class Metrics(Means):
    """Metrics of a run, from the step that it goes on from.

    Args:
        accelerator: of this process; its trackers get every log line.
        run_dir: where the main process writes ``metrics.jsonl``; lines of steps that are done again are removed.
        step: steps done.
        num_images: samples that the student has learnt from in them.
        total_steps: steps there will be.
    """

    def __init__(
        self, accelerator: "Accelerator", run_dir: Path, *, step: int, num_images: int, total_steps: int
    ) -> None:
        super().__init__(accelerator.device)
        self._accelerator = accelerator
        self._step, self._num_images, self._since = step, num_images, time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        is_main = accelerator.is_main_process
        self._file = MetricsFile(run_dir, step) if is_main else None
        self._progress = ProgressLine(step, total_steps) if is_main else None

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        """Count the time that the body takes; also when it raises."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - started

    @contextmanager
    def apart(self) -> Generator[None]:
        """Leave the time that the body takes out of all rates and shares: it is no part of a step."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - started

    def tick(self, step: int) -> None:
        """Show that ``step`` steps are done. Cheap."""
        if self._progress is not None:
            self._progress.tick(step)

    def say(self, message: str) -> None:
        """Print a line on the main process."""
        if self._progress is not None:
            self._progress.say(message)

    def log(self, step: int, num_images: int, critic_steps: int) -> dict[str, float]:
        """Write what has been collected since the last call. Every process must call it, after the same step.

        Args:
            step: steps done; more than at the last call.
            num_images: samples that the student has learnt from, of all processes.
            critic_steps: steps of the fake score.

        Returns:
            Metrics by name, not all finite, the same on every process.
        """
        now = time.monotonic()
        elapsed = now - self._since
        for name, seconds in self._seconds.items():
            self.add(f"{name}_share", seconds / elapsed)
        self.add("images_per_second", (num_images - self._num_images) / elapsed)
        self.add("seconds_per_step", elapsed / (step - self._step))
        if self._accelerator.device.type == "cuda":
            self.add("peak_memory_gb", torch.cuda.max_memory_allocated() / 1e9)
        values = self.take(self._accelerator)
        self._step, self._num_images, self._since = step, num_images, now
        self._seconds.clear()
        if self._file is not None and self._progress is not None:
            self._file.append(step, num_images, critic_steps, values)
            self._progress.show(values)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._accelerator.log({**finite, "images": num_images, "critic_steps": critic_steps}, step=step)
        return values

    def close(self) -> None:
        """Show where the run has got to."""
        if self._progress is not None:
            self._progress.close()
