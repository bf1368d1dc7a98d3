"""From a config to a report: draw, score, measure, write.

    for each system:  draw its images; a worker that has drawn a shard scores it while it draws the next
    then:             numbers and times of each, kept in results/  ->  report.html, report.json, report.md

    EVAL_DIR/prompts.parquet      the prompts of all systems
    EVAL_DIR/images/SYSTEM/       a pair dataset with pictures, and its scores/
    EVAL_DIR/results/SYSTEM.json  its numbers and times, with a digest of what they depend on
    EVAL_DIR/grid/SYSTEM/         the pictures that the report shows
    EVAL_DIR/report.*             the report, with quality.png and grid.png

Each step finds what is done already, so the same command again goes on where it stopped, and its numbers are those of
an uninterrupted run. Times are measured when nothing else runs here; those of another device are taken again by a
machine that has what the workers have.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from configs.errors import RunStopped, UserError
from configs.evaluate_schema import EvaluateConfig, OpenClipFeaturesConfig
from pipeline import teachers
from pipeline.class_labels import CLASSES, write_labels
from pipeline.driver import StopRequest
from pipeline.evaluation.labels import Labels
from pipeline.evaluation.measure import Measurements, Yardstick
from pipeline.evaluation.reference import Reference, open_reference
from pipeline.evaluation.report import write_report
from pipeline.evaluation.scores import Scores
from pipeline.evaluation.systems import System, build_systems, check_student, count_images, existing_pairs
from pipeline.generate import generate_pairs
from pipeline.prompts import PromptTable, prepare_prompts, store_table
from pipeline.shards.layout import PROMPTS
from pipeline.shards.manifest import read_commits
from pipeline.shards.storage import Storage


def evaluate(config: EvaluateConfig) -> None:
    """Bring the evaluation at ``config.output`` to its end, from wherever it is.

    Raises:
        UserError: the config cannot work, or the output holds another evaluation's images.
        RunStopped: it ended early; what is done is kept.
    """
    storage = Storage.open(config.output)
    systems = build_systems(config, f"{storage.uri}/{PROMPTS}")
    check_student(config)
    scores = Scores(config)
    prompts = _prompts(config, storage)
    if config.pairs is not None:
        systems[0] = replace(systems[0], pairs=existing_pairs(config, systems[0], prompts), is_drawn=False)
    yardstick = _yardstick(config, prompts, scores)
    scores.let_go()
    with StopRequest().installed() as stop:
        for system in systems:
            _go_on(stop)
            _draw_and_score(system, scores, stop)
        measurements = Measurements(yardstick, storage, systems[0], partial(_go_on, stop))
        results = [measurements.of(system) for system in systems]
        reference = yardstick.reference.source if yardstick.reference is not None else None
        write_report(config, storage, results, _protocol(yardstick, systems[-1], prompts), reference)
    if not config.keep_images:
        _remove_images(systems)
    print(f"open {storage.uri}/report.html")


def _prompts(config: EvaluateConfig, storage: Storage) -> PromptTable:
    """The prompts of all systems, put into the output."""
    output = f"{storage.uri}/{PROMPTS}"
    if config.prompts.path != CLASSES:
        prepare_prompts(config.prompts, output)
        return PromptTable.open(storage, PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        table, num_classes = Path(folder) / PROMPTS, teachers.num_classes(config.teacher)
        info = write_labels(
            table, config.prompts, num_classes, config.seed, config.num_images, config.images_per_prompt
        )
        store_table(table, info, output)
    return PromptTable.open(storage, PROMPTS)


def _yardstick(config: EvaluateConfig, prompts: PromptTable, scores: Scores) -> Yardstick:
    """Everything that is not a system, found or found missing before any image is drawn."""
    num_images = count_images(config, prompts)
    reference = open_reference(config, scores)
    _check_count(config, num_images, reference)
    if config.labels is None or not isinstance(config.features, OpenClipFeaturesConfig):
        return Yardstick(config, scores, reference, None, None)
    labels = Labels.read(config.labels)
    num_prompts = min(-(-num_images // config.images_per_prompt), prompts.num_prompts)
    labels.truth(prompts.rows(0, num_prompts)[1])
    from pipeline.scoring.open_clip_scorer import OpenClipNetwork

    caption_features = OpenClipNetwork(config.features, scores.device).encode_texts(labels.captions)
    return Yardstick(config, scores, reference, labels, caption_features.cpu().numpy())


def _check_count(config: EvaluateConfig, num_images: int, reference: Reference | None) -> None:
    if reference is None or config.allow_few_images:
        return
    width = len(reference.statistics.mu)
    if num_images <= width:
        raise UserError(
            f"num_images: {num_images:,} images are too few for FID with {width:,} features; draw more than "
            f"{width:,}, or set allow_few_images: true"
        )


def _draw_and_score(system: System, scores: Scores, stop: StopRequest) -> None:
    """Draw a system and score its shards as they appear; then what an earlier run drew, and did not come to score."""
    if system.is_drawn:
        generate_pairs(system.pairs, scores.followers())
    scores.make(system.dataset, stop)


def _go_on(stop: StopRequest) -> None:
    """Raise that a stop was asked for, if it was."""
    if stop.requested:
        raise RunStopped("on request; what is drawn and measured is kept, run the same command again to go on")


def _protocol(yardstick: Yardstick, system: System, prompts: PromptTable) -> dict[str, JsonValue]:
    """What the numbers depend on besides the system; the same for all of them."""
    config, scores, reference = yardstick.config, yardstick.scores, yardstick.reference
    return {
        "prompts": {"number": prompts.num_prompts, "digest": prompts.digest},
        "images": system.dataset.run.spec.num_samples,
        "images_per_prompt": config.images_per_prompt,
        "seed": config.seed,
        "features": scores.identities[scores.features],
        "reference": None if reference is None else reference.about,
        "clip": None if scores.clip is None else scores.identities[scores.clip],
        "labels": None if yardstick.labels is None else yardstick.labels.digest,
    }


def _remove_images(systems: list[System]) -> None:
    """Remove the tars that were drawn for this evaluation: tables, indices and commit records stay."""
    for system in systems:
        if system.is_drawn:
            for commit in read_commits(system.dataset):
                system.dataset.storage.delete(commit.path)
