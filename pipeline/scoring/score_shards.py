"""From a scorer to a table for every committed shard: drive the workers, whatever executes them.

The state of a run is the set of tables on storage: whoever runs the same again goes on from there. No lease is needed,
since tables are create-only; two runs at once repeat work, and lose none. Only what is committed is scored, so a
dataset may still be growing.
"""

import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from configs.errors import RunStopped, UserError
from configs.evaluate_schema import ScorerConfig
from configs.score_schema import ScorePairsConfig, ScoreRuntime
from pipeline.driver import Executor, Outcome, StopRequest, drive
from pipeline.executors import make_executor
from pipeline.scoring.score_table import claim, record_of, shards_without_table
from pipeline.scoring.score_worker import MakeScorer, ScoredShard, ScoreWorker
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import read_commits
from pipeline.shards.storage import Storage


def score_pairs(config: ScorePairsConfig) -> None:
    """Score the dataset at ``config.root``. What ``stages/score_pairs.py`` does.

    Raises:
        UserError, RunStopped: as :func:`score_shards`.
    """
    from pipeline.scoring.build import build_scorer

    dataset = Dataset.open_any(Storage.open(config.root))
    score_shards(dataset, config.name, partial(build_scorer, with_absolute_paths(config.scorer)), config.runtime)


def with_absolute_paths(scorer: ScorerConfig) -> ScorerConfig:
    """A worker has another working directory: there a relative path would name nothing, or another file."""
    update: dict[str, str] = {}
    for name, scheme in (("path", ""), ("weights", ""), ("model", "local-dir:")):
        value = getattr(scorer, name, None)
        if value is not None and value.startswith(scheme) and (path := Path(value.removeprefix(scheme))).exists():
            update[name] = f"{scheme}{path.resolve()}"
    return scorer.model_copy(update=update)


def score_shards(
    dataset: Dataset, name: str, make_scorer: MakeScorer, runtime: ScoreRuntime, stop: StopRequest | None = None
) -> None:
    """Make the table of this name for every committed shard that has none.

    Args:
        dataset: the dataset.
        name: name of the scores.
        make_scorer: builds the scorer on a device; picklable.
        runtime: where and how.
        stop: asks to finish the shards in flight and to begin no more. None: SIGINT and SIGTERM do, which only the main
            thread may say.

    Raises:
        UserError: there is nothing to score, or the scores of this name are another scorer's.
        RunStopped: the run ended early, or shards were given up; finished tables are kept.
    """
    uri, fields = dataset.storage.uri, dataset.run.spec.fields
    if fields.image == "none":
        raise UserError(f"{uri}: its samples have no image (spec.fields.image is none); score a dataset that has them")
    commits = read_commits(dataset)
    if not commits:
        raise UserError(f"{uri}: has no shard yet; make some with generate_pairs.py")
    missing = shards_without_table(dataset, name, commits)
    if not missing:
        claim(dataset, record_of(dataset, name, make_scorer(torch.device("cpu"))))  # of this scorer, too
        print(f"{uri}: all {len(commits)} shards have scores {name}; nothing to do")
        return
    make_worker = partial(ScoreWorker, uri, dataset.run.fingerprint, name, make_scorer, runtime)
    executor = make_executor(make_worker, runtime)
    print(f"{uri}: {len(missing)} of {len(commits)} shards to score as {name}", flush=True)
    progress = _Progress(sum(commit.num_samples for commit in missing), runtime.progress_period_s)
    try:
        with nullcontext(stop) if stop else StopRequest().installed() as stop:
            parked = drive(
                executor,
                [commit.shard for commit in missing],
                progress,
                stop,
                max_errors_per_shard=runtime.max_errors_per_shard,
                max_crashes_per_shard=runtime.max_crashes_per_shard,
            )
    finally:
        progress.close()
        executor.close()
    if stop.requested:
        raise RunStopped("on request; finished shards keep their scores, run the same command again to go on")
    if parked:
        raise RunStopped(
            f"{len(parked)} of {len(commits)} shards could not be scored, reasons above; mend the cause, then run the "
            "same command again"
        )
    print(f"{uri}: all {len(commits)} shards have scores {name}; {progress.summary()}")


class _Progress:
    """Watches one run; an Observer of :func:`pipeline.driver.drive`. A live bar on a terminal, elsewhere lines."""

    def __init__(self, num_images: int, period_s: float) -> None:
        self._num_images, self._period_s = num_images, period_s
        self._started = self._last_line = time.monotonic()
        self._num_done = 0
        self._device_seconds = 0.0
        self._bar = tqdm(total=num_images, unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def committed(self, outcome: Outcome[ScoredShard], result: ScoredShard) -> None:
        self._num_done += result.num_images
        self._device_seconds += result.device_seconds
        self._bar.update(result.num_images)

    def failed(self, outcome: Outcome[ScoredShard], attempt: int) -> None:
        self._say(f"shard {outcome.shard}: attempt {attempt} came to nothing ({_name(outcome)})")

    def parked(self, shard: int, outcome: Outcome[ScoredShard], attempts: int, reason: str) -> None:
        self._say(f"shard {shard}: given up after {attempts} attempts: {reason}")

    def tick(self, executor: Executor[ScoredShard], num_waiting: int) -> None:
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= self._period_s:
            self._last_line = now
            self._say(
                f"{self.summary()} | workers {executor.num_workers}, shards in flight {executor.in_flight}, "
                f"waiting {num_waiting}"
            )

    def summary(self) -> str:
        """Images, per second in all, and per second of a busy scorer."""
        seconds = time.monotonic() - self._started
        device = f", {self._num_done / self._device_seconds:,.1f} per device second" if self._device_seconds else ""
        return f"{self._num_done:,}/{self._num_images:,} images, {self._num_done / seconds:,.1f} images/s{device}"

    def close(self) -> None:
        self._bar.close()

    def _say(self, message: str) -> None:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def _name(outcome: Outcome[ScoredShard]) -> str:
    lines = str(outcome.error).strip().splitlines()
    cause = "worker died" if outcome.crashed else type(outcome.error).__name__
    return f"{cause}: {lines[0][:200] if lines else ''}"
