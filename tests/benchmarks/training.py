"""What a training step costs beyond its network calls, and what it holds in memory.

``bench_step`` compares :func:`trainer.loop.step` with nothing but the calls that DMD cannot do without, on the same
networks and batch: the student forward and backward, teacher and fake score forward, the fake score forward and
backward. ``bench_memory`` runs each recipe in a process of its own and reports how far its resident memory rose.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configs.train_schema import TrainConfig
from tests.support.training import make_pairs, train_settings
from trainer.build import build
from trainer.data.training_data import MicroBatch
from trainer.loop import step
from trainer.training_run import TrainingRun

BATCH_SIZE = 8
STEPS = 12
RECIPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, checkpointing": {"runtime": {"gradient_checkpointing": True}},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, checkpointing": {"precision": "bfloat16", "runtime": {"gradient_checkpointing": True}},
    "regression alone": {"loss": {"dm_weight": 0.0}},
}


def settings(folder: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run whose networks are large enough to be worth calling, on pairs of a small teacher of the same shapes."""
    if not (folder / "pairs").exists():
        make_pairs(folder, width=64, sample_size=16)
    runtime = {"micro_batch": BATCH_SIZE, "workers": 1, **sections.pop("runtime", {})}
    batch = {"dm": BATCH_SIZE, "regression": BATCH_SIZE}
    return train_settings(folder, output, batch=batch, runtime=runtime, **sections)


def bare_step(run: TrainingRun, z: torch.Tensor, condition: torch.Tensor, t: torch.Tensor) -> None:
    """The network calls of one step and nothing else, on noise of the shapes that a step sees."""
    assert run.fake_score is not None
    assert run.matching is not None
    count = len(z) // 2  # half of the student's samples are those of pairs
    run.generator(z, condition).sum().backward()
    with torch.no_grad():
        run.matching.real_score(z[:count], t, condition[:count])
        run.matching.fake_score(z[:count], t, condition[:count])
    run.matching.fake_score(z[:count], t, condition[:count]).sum().backward()
    run.student.optimizer.zero_grad()
    run.fake_score.optimizer.zero_grad()


def bench_step(folder: Path) -> dict[str, float]:
    """Seconds of a step and of its bare network calls, in turns; medians."""
    torch.set_num_threads(1)
    config = TrainConfig.model_validate(settings(folder, folder / "run"))
    with build(config) as run:
        shape = (2 * BATCH_SIZE, *run.teacher.identity.sample_shape)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        condition = run.conditions(["a photo"] * len(z))
        t = torch.full((BATCH_SIZE,), 500)
        run.batches = waits = _Timed(run.batches)
        seconds: dict[str, list[float]] = {"step": [], "bare": []}
        for _ in range(STEPS):
            started = time.perf_counter()
            step(run)
            between = time.perf_counter()
            bare_step(run, z, condition, t)
            seconds["step"].append(between - started)
            seconds["bare"].append(time.perf_counter() - between)
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    return {
        "step, s": medians["step"],
        "its network calls, s": medians["bare"],
        "step / its network calls": medians["step"] / medians["bare"],
        "waiting for data, % of a step": 100 * waits.median / medians["step"],
    }


class _Timed(Iterator[MicroBatch]):
    """Micro-batches, and how long each was waited for."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches
        self._seconds: list[float] = []

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        batch = next(self._batches)
        self._seconds.append(time.perf_counter() - started)
        return batch

    @property
    def median(self) -> float:
        return sorted(self._seconds)[len(self._seconds) // 2]


def bench_memory(folder: Path) -> dict[str, float]:
    """How far resident memory rises in three steps, by recipe."""
    settings(folder, folder / "unused")
    rises: dict[str, float] = {}
    for number, name in enumerate(RECIPES):
        command = [sys.executable, "-m", "tests.benchmarks.training", str(folder), str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rises[f"{name}, MB"] = float(done.stdout.splitlines()[-1])
    return rises


def _rise(folder: Path, number: int) -> float:
    """MB that one recipe's steps add to what the process had when it was built: activations, gradients, moments."""
    torch.set_num_threads(1)
    recipe = list(RECIPES.values())[number]
    config = TrainConfig.model_validate(settings(folder, folder / f"run-{number}", **recipe))
    with build(config) as run:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _resident("VmRSS")
        for _ in range(3):
            step(run)
        return _resident("VmHWM") - before


def _resident(name: str) -> float:
    """MB of resident memory: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


if __name__ == "__main__":
    print(_rise(Path(sys.argv[1]), int(sys.argv[2])))
