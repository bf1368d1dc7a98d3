"""The numbers of each system, from the tables of scores beside its images; nothing here draws an image.

Numbers are functions of tables, images, reference and config. What was found of a system is kept with a digest of all
that, and taken from there the next time: numbers need not be computed twice, and images may be removed. Times that are
missing, or of another device than this machine's, are measured by the machine that finds them so.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from configs.evaluate_schema import EvaluateConfig
from configs.schema import Model
from pipeline.evaluation.grid import keep_tiles, shown_ids
from pipeline.evaluation.images import all_stored_ids, paired_distances
from pipeline.evaluation.labels import Labels
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.results import KID_GIVEN, SystemResult
from pipeline.evaluation.scores import Scores
from pipeline.evaluation.systems import System
from pipeline.evaluation.timing import Stopwatch
from pipeline.metrics.diversity import prompt_diversity
from pipeline.metrics.frechet import Statistics, frechet_distance, kernel_distance
from pipeline.metrics.paired import feature_cosine
from pipeline.prompts import PromptTable
from pipeline.scoring.score_table import read_column
from pipeline.scoring.zero_shot import zero_shot_accuracy
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS
from pipeline.shards.manifest import read_commits, summary
from pipeline.shards.storage import Storage


@dataclass(frozen=True)
class Yardstick:
    """What all systems are measured with.

    Attributes:
        config: of the evaluation.
        scores: names of the tables.
        reference: real images.
        labels: possible captions.
        caption_features: theirs, (C, D); None without labels.
    """

    config: EvaluateConfig
    scores: Scores
    reference: Reference | None
    labels: Labels | None
    caption_features: NDArray[np.float32] | None

    def numbers(self, dataset: Dataset, teacher: Dataset | None) -> dict[str, float]:
        """Measure a system whose tables are in.

        Args:
            dataset: its images.
            teacher: those of the teacher with most steps, for another system than that.

        Returns:
            Name, of :data:`pipeline.evaluation.results.METRICS`, -> value.
        """
        config = self.config
        ids, features = all_stored_ids(dataset), self._features(dataset)
        found: dict[str, float] = {}
        if self.reference is not None:
            found["frechet_distance"] = frechet_distance(
                Statistics.of(features), self.reference.statistics, allow_few=config.allow_few_images
            )
            if self.reference.kid == KID_GIVEN and self.reference.features is not None:
                found["kernel_distance"] = kernel_distance(features, self.reference.features, seed=config.seed)
        if self.scores.clip is not None:
            found["clip_score"] = _mean(read_column(dataset, self.scores.clip, "clip"))
        if self.labels is not None and self.caption_features is not None:
            truth = self.labels.truth(_prompts(dataset, ids))
            found |= zero_shot_accuracy(features, self.caption_features, truth, self.labels.properties)
        if config.images_per_prompt > 1:
            found["diversity"] = _mean(prompt_diversity(features, ids // config.images_per_prompt))
        if teacher is not None:
            _, here, there = np.intersect1d(ids, all_stored_ids(teacher), assume_unique=True, return_indices=True)
            found["paired_distance"] = _mean(paired_distances(dataset, teacher))
            found["paired_cosine"] = _mean(feature_cosine(features[here], self._features(teacher)[there]))
        return found

    def digest(self, dataset: Dataset, teacher: Dataset | None) -> str:
        """Of all that the result of a system depends on; arguments as of :meth:`numbers`."""
        config, reference = self.config, self.reference
        depends: dict[str, JsonValue] = {
            "images": _content(dataset),
            "teacher": None if teacher is None else _content(teacher),
            "scores": list(self.scores.identities.values()),
            "reference": None if reference is None else reference.about,
            "labels": None if self.labels is None else self.labels.digest,
            "seed": config.seed,
            "latency": None if config.latency is None else config.latency.model_dump(mode="json"),
            "grid_prompts": config.grid_prompts,
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def _features(self, dataset: Dataset) -> NDArray[np.float32]:
        return read_column(dataset, self.scores.features, "features")


class Measurements:
    """The results of an evaluation's systems, each measured once.

    Args:
        yardstick: what they are measured with.
        storage: the evaluation's folder.
        teacher: the system that others are paired with, if it is a teacher.
        go_on: called now and then; raises when measuring is to stop.
    """

    def __init__(
        self, yardstick: Yardstick, storage: Storage, teacher: System, go_on: Callable[[], None] = lambda: None
    ) -> None:
        self._yardstick = yardstick
        self._storage = storage
        self._teacher = teacher
        self._go_on = go_on
        config = yardstick.config
        self._stopwatch = Stopwatch(config.latency, config.runtime, go_on) if config.latency is not None else None

    def of(self, system: System) -> SystemResult:
        """The result of a system whose tables are in: what is kept of it, and what is missing found now."""
        self._go_on()
        dataset = system.dataset
        is_paired = not self._teacher.is_student and system.name != self._teacher.name
        teacher = self._teacher.dataset if is_paired else None
        digest = self._yardstick.digest(dataset, teacher)
        result = self._kept(system, digest)
        if result is None:
            print(f"{system.title}: measuring", flush=True)
            result = self._measured(system, dataset, teacher)
            self._keep(result, digest)  # before it is timed, which another machine may have to do
        if self._stopwatch is not None and not self._stopwatch.has_timed(result.timings):
            result = result.model_copy(update={"timings": self._stopwatch.time(system)})
            self._keep(result, digest)
        return result

    def _measured(self, system: System, dataset: Dataset, teacher: Dataset | None) -> SystemResult:
        """All but the times. The pictures of the grid are kept on the way."""
        config, about = self._yardstick.config, summary(dataset, read_commits(dataset), 0)
        shown = shown_ids(dataset.run.spec.num_samples, config.images_per_prompt, config.grid_prompts)
        keep_tiles(self._storage, system.name, dataset, shown)
        return SystemResult(
            name=system.name,
            title=system.title,
            family=system.name if system.is_student else "teacher",
            is_student=system.is_student,
            steps=system.steps,
            evaluations=system.evaluations,
            sampling=system.sampling,
            num_images=about["num_samples"],
            num_rejected=about["num_rejected"],
            numbers=self._yardstick.numbers(dataset, teacher),
            timings=(),
            fingerprint=dataset.run.fingerprint,
            content_sha256=about["content_sha256"],
            weights_digest=dataset.run.spec.teacher.weights_digest,
        )

    def _keep(self, result: SystemResult, digest: str) -> None:
        self._storage.write(_path(result.name), _Kept(digest=digest, result=result).model_dump_json(indent=1).encode())

    def _kept(self, system: System, digest: str) -> SystemResult | None:
        """The result that is kept, if it is of the same images and settings."""
        try:
            kept = _Kept.model_validate_json(self._storage.read(_path(system.name)))
        except (FileNotFoundError, ValidationError):
            return None
        return kept.result if kept.digest == digest else None


class _Kept(Model):
    """``results/SYSTEM.json``."""

    digest: str
    """Of all that the result depends on, but for the device that timed it, which the times name."""
    result: SystemResult
    """What was found."""


def _path(name: str) -> str:
    """Where the result of a system lies below an evaluation's folder."""
    return f"results/{name}.json"


def _content(dataset: Dataset) -> str:
    return summary(dataset, read_commits(dataset), 0)["content_sha256"]


def _prompts(dataset: Dataset, ids: NDArray[np.int64]) -> list[str]:
    """The prompt of each sample."""
    rows = ids // dataset.run.spec.pairs_per_prompt
    prompts = PromptTable.open(dataset.storage, PROMPTS).rows(0, int(rows[-1]) + 1)[1]
    return [prompts[row] for row in rows.tolist()]


def _mean(values: NDArray[np.floating]) -> float:
    return float(values.mean(dtype=np.float64))
