"""make bench: what pair generation, evaluation and training cost on top of their networks, as ratios within one run.

    python -m tests.benchmarks.run [actors] [driver] [plain] [memory] [reading] [evaluating] [step]
        [step-memory]

``actors``  images/s of one and two actors against a bare loop over the same teacher and batch size
``driver``  no-op shards a second, at 1,000 and at 20,000 shards
``plain``   images/s against the plain StableDiffusionPipeline loop most people would write
``memory``  resident memory of driver and actor over 200 small shards
``reading``  pairs/s that a trainer reads from shards, on one core
``evaluating``  images/s of an evaluation against a plain loop into a folder and clean-fid over that
``step``    seconds of a training step against those of its network calls
``step-memory``  memory of a training step, by recipe

Every process is kept to one torch thread, so that ratios between them mean something. Absolute numbers are those of
the machine; report them with it.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import torch

from configs.schema import GeneratePairsConfig
from pipeline import teachers
from pipeline.driver import Executor, Outcome, StopRequest, drive
from pipeline.noise import noise
from pipeline.provenance import code_revision
from pipeline.ray_executor import RayExecutor
from pipeline.ray_head import ray_head
from pipeline.shard_maker import ShardResult
from tests.benchmarks.evaluating import bench_evaluating
from tests.benchmarks.reading import bench_reading
from tests.benchmarks.training import bench_memory as bench_step_memory
from tests.benchmarks.training import bench_step
from tests.support import tiny_sd
from tests.support.workers import nothing

PROMPTS = [f"photo {i}" for i in range(32)]
STEPS = 20
GUIDANCE_SCALE = 3.0
BATCH_SIZE = 8
SAMPLES_PER_SHARD = 16


def sd_config(folder: Path, output: Path, num_samples: int, actors: int) -> GeneratePairsConfig:
    """Pairs of a small Stable Diffusion pipeline: DDIM, guidance, latents and PNG."""
    teacher, prompts = folder / "teacher", folder / "prompts.txt"
    if not teacher.exists():
        tiny_sd.build(teacher, width=16, sample_size=16)
        prompts.write_text("\n".join(PROMPTS) + "\n")
    return GeneratePairsConfig.model_validate(
        {
            "output": str(output),
            "teacher": {"kind": "stable_diffusion", "path": str(teacher)},
            "prompts": {"path": str(prompts)},
            "spec": {
                "sampler": {"name": "diffusers", "scheduler": "DDIMScheduler", "steps": STEPS},
                "guidance_scale": GUIDANCE_SCALE,
                "pairs_per_prompt": num_samples // len(PROMPTS),
            },
            "layout": {"samples_per_shard": SAMPLES_PER_SHARD},
            "runtime": {"batch_size": BATCH_SIZE, "actors": actors},
        }
    )


def bare_loop(config: GeneratePairsConfig, num_samples: int) -> float:
    """Images/s of nothing but the teacher: encode, sample, decode; results are dropped."""
    torch.set_num_threads(1)
    teacher = teachers.load(config.teacher, torch.device("cpu"))
    spec = config.spec

    def batch(start: int) -> None:
        ids = list(range(start, start + BATCH_SIZE))
        z = torch.from_numpy(np.stack([noise(0, i, teacher.identity.sample_shape) for i in ids])).float()
        condition = teacher.encode_prompts([PROMPTS[i % len(PROMPTS)] for i in ids])
        unconditional = teacher.encode_prompts([""])
        teacher.decode(
            teacher.sample(z, condition, unconditional, spec.sampler, GUIDANCE_SCALE, seed=0, sample_ids=ids)
        )

    with torch.inference_mode():
        batch(0)
        started = time.perf_counter()
        for start in range(0, num_samples, BATCH_SIZE):
            batch(start)
    return num_samples / (time.perf_counter() - started)


def generated(config: GeneratePairsConfig) -> float:
    """Images/s of a run, from the start of its first shard to its last commit."""
    from pipeline.generate import generate_pairs

    generate_pairs(config)
    root = Path(config.output)
    starts = [json.loads(path.read_bytes())["timing"]["started"] for path in (root / "commits").glob("*.json")]
    events = [json.loads(line) for path in (root / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
    commits = [event["time"] for event in events if event["event"] == "committed"]
    seconds = (datetime.fromisoformat(max(commits)) - datetime.fromisoformat(min(starts))).total_seconds()
    return json.loads((root / "SEALED.json").read_bytes())["num_samples"] / seconds


def bench_actors(folder: Path) -> dict[str, float]:
    """One and two actors against the bare loop, twice each; the better of two, as noise only ever slows down."""
    num = 256
    config = sd_config(folder, folder / "unused", num, 1)
    bare = max(bare_loop(config, num // 2) for _ in range(2))
    one = max(generated(sd_config(folder, folder / f"one-{i}", num, 1)) for i in range(2))
    two = max(generated(sd_config(folder, folder / f"two-{i}", num, 2)) for i in range(2))
    return {
        "bare loop, images/s": bare,
        "one actor, images/s": one,
        "two actors, images/s": two,
        "one actor / bare loop": one / bare,
        "two actors / one actor": two / one,
    }


class NoopWorker:
    """A worker whose shards cost nothing."""

    def run(self, shard: int, attempt: int) -> ShardResult:
        """Return a commit record of nothing."""
        return nothing(shard)


class _Silent:
    """An observer that says nothing."""

    def committed(self, outcome: Outcome, result: ShardResult) -> None: ...
    def failed(self, outcome: Outcome, attempt: int) -> None: ...
    def parked(self, shard: int, outcome: Outcome, attempts: int, reason: str) -> None: ...
    def tick(self, executor: Executor, num_waiting: int) -> None: ...


def bench_driver(folder: Path) -> dict[str, float]:
    """No-op shards a second through Ray."""
    runtime = sd_config(folder, folder / "unused", 64, 1).runtime
    rates: dict[str, float] = {}
    for num_shards in (1_000, 20_000):
        executor = RayExecutor(NoopWorker, runtime)  # type: ignore[arg-type]
        drive(executor, range(50), _Silent(), StopRequest(), max_errors_per_shard=1, max_crashes_per_shard=1)
        started = time.perf_counter()
        drive(executor, range(num_shards), _Silent(), StopRequest(), max_errors_per_shard=1, max_crashes_per_shard=1)
        rates[f"shards/s at {num_shards:,}"] = num_shards / (time.perf_counter() - started)
        executor.close()
    first, last = rates.values()
    return {**rates, "cost a shard, 20,000 / 1,000": first / last}


def bench_plain(folder: Path) -> dict[str, float]:
    """The loop most people would write: a StableDiffusionPipeline, a batch at a time, a PNG per image."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    num = 256
    config = sd_config(folder, folder / "ours", num, 1)
    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(folder / "teacher", safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    target = folder / "plain"
    target.mkdir()

    def batch(start: int) -> None:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(start, start + BATCH_SIZE)]
        for i, image in enumerate(pipe(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE).images):
            image.save(target / f"{start + i:06d}.png")

    batch(0)
    started = time.perf_counter()
    for start in range(0, num, BATCH_SIZE):
        batch(start)
    plain = num / (time.perf_counter() - started)
    ours = generated(config)
    return {"plain loop, images/s": plain, "one actor, images/s": ours, "one actor / plain loop": ours / plain}


def bench_memory(folder: Path) -> dict[str, float]:
    """Resident memory after 50 and after 200 shards of 16 pairs."""
    from pipeline import generate

    config = sd_config(folder, folder / "memory", 200 * SAMPLES_PER_SHARD, 1)
    config = config.model_copy(
        update={"spec": config.spec.model_copy(update={"sampler": config.spec.sampler.model_copy(update={"steps": 2})})}
    )
    history: list[tuple[float, float]] = []

    class Watching(generate.Progress):
        def committed(self, outcome: Outcome, result: ShardResult) -> None:
            super().committed(outcome, result)
            me = psutil.Process()
            actors = [p for p in psutil.process_iter(["name"]) if p.info["name"].startswith("ray::_Actor")]
            history.append((me.memory_info().rss / 1e6, max(p.memory_info().rss / 1e6 for p in actors)))

    generate.Progress = Watching  # type: ignore[misc]
    generate.generate_pairs(config)
    (driver_50, actor_50), (driver_200, actor_200) = history[49], history[199]
    return {
        "driver, MB at 50 shards": driver_50,
        "driver, MB at 200 shards": driver_200,
        "actor, MB at 50 shards": actor_50,
        "actor, MB at 200 shards": actor_200,
    }


BENCHMARKS: dict[str, Callable[[Path], dict[str, float]]] = {
    "actors": bench_actors,
    "driver": bench_driver,
    "plain": bench_plain,
    "memory": bench_memory,
}
WITHOUT_RAY: dict[str, Callable[[Path], dict[str, float]]] = {
    "reading": bench_reading,
    "evaluating": bench_evaluating,
    "step": bench_step,
    "step-memory": bench_step_memory,
}


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all of them."""
    print(f"commit {code_revision()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    names = names or [*BENCHMARKS, *WITHOUT_RAY]
    for name in (name for name in names if name in WITHOUT_RAY):
        report(name, WITHOUT_RAY[name])
    if on_ray := [name for name in names if name in BENCHMARKS]:
        with ray_head(num_cpus=2) as head:
            os.environ["RAY_ADDRESS"] = head.address
            for name in on_ray:
                report(name, BENCHMARKS[name])


def report(name: str, benchmark: Callable[[Path], dict[str, float]]) -> None:
    """Run one and print its results."""
    with tempfile.TemporaryDirectory() as folder:
        results = benchmark(Path(folder))
    print(f"\n{name}")
    for what, value in results.items():
        print(f"  {what:<32} {value:>10.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
