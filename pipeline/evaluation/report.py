"""The files a person opens: ``report.html`` first, and the same as ``report.json`` and ``report.md``."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from configs.evaluate_schema import EvaluateConfig
from pipeline.evaluation.grid import GRID, draw_grid, read_tiles, shown_ids
from pipeline.evaluation.plots import QUALITY, draw_quality
from pipeline.evaluation.report_markdown import MARKDOWN, render_markdown
from pipeline.evaluation.report_page import PAGE, render_page
from pipeline.evaluation.results import REPORT, Report, SystemResult
from pipeline.evaluation.systems import count_images, run_directory, training_run
from pipeline.prompts import PromptTable
from pipeline.provenance import code_revision, library_versions
from pipeline.shards.layout import PROMPTS, key
from pipeline.shards.storage import Storage

CURVES = "curves.png"
"""What the trainer draws of a run, in its directory; the evaluation has a copy."""
_METRICS = "metrics.jsonl"


def write_report(
    config: EvaluateConfig,
    storage: Storage,
    results: Sequence[SystemResult],
    protocol: dict[str, JsonValue],
    reference: str | None,
) -> Report:
    """Write the report of one evaluation.

    Args:
        config: of the evaluation.
        storage: its folder.
        results: of the systems, in the order they are shown.
        protocol: what the numbers depend on besides them.
        reference: where the real images are from.
    """
    run_dir = run_directory(config.student) if config.student is not None else None
    prompts = PromptTable.open(storage, PROMPTS)
    ids = shown_ids(count_images(config, prompts), config.images_per_prompt, config.grid_prompts)
    report = Report(
        title=f"{Path(storage.uri).name}: {'a student beside its teacher' if config.student else 'a teacher'}",
        protocol=protocol,
        systems=tuple(results),
        grid={key(i): _prompt(prompts, i // config.images_per_prompt) for i in ids},
        run=_about_run(run_dir) if run_dir is not None else {},
        provenance={
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_revision": code_revision(),
            "versions": {**library_versions(), **_versions("open_clip_torch", "clean-fid", "scipy")},
            "reference": reference,
            "student": config.student,
            "teacher": config.teacher.model_dump(mode="json", exclude_none=True),
        },
    )
    tiles = {system.name: read_tiles(storage, system.name, list(report.grid)) for system in results}
    curves = {}
    if run_dir is not None and (run_dir / CURVES).is_file():
        curves[CURVES] = (run_dir / CURVES).read_bytes()
    write_files(storage, report, tiles, curves)
    return report


def write_files(
    storage: Storage,
    report: Report,
    tiles: Mapping[str, Sequence[bytes | None]],
    curves: Mapping[str, bytes],
) -> None:
    """Write a report in its three forms, with the pictures that the second refers to.

    Args:
        storage: where to.
        report: what was found.
        tiles: name of a system -> its pictures, one for each prompt of the grid.
        curves: name of a file -> the curves of a training run.
    """
    for name, picture in curves.items():
        storage.write(name, picture)
    quality = draw_quality(report.systems)
    if quality is not None:
        storage.write(QUALITY, quality)
    columns = {system.title: tiles[system.name] for system in report.systems}
    storage.write(GRID, draw_grid(list(report.grid.values()), columns))
    storage.write(REPORT, report.to_json())
    storage.write(MARKDOWN, render_markdown(report, has_quality=quality is not None, curves=list(curves)).encode())
    storage.write(PAGE, render_page(report, tiles=tiles, quality=quality, curves=curves).encode())


def _prompt(prompts: PromptTable, row: int) -> str:
    return prompts.rows(row, row + 1)[1][0]


def _versions(*libraries: str) -> dict[str, str]:
    """Those that are installed."""
    installed = {library: next(iter(metadata.distributions(name=library)), None) for library in libraries}
    return {library: found.version for library, found in installed.items() if found is not None}


def _about_run(run_dir: Path) -> dict[str, JsonValue]:
    """What was trained and how, from the files that the trainer leaves in a run directory."""
    run: dict[str, Any] = training_run(run_dir)
    spec = run["spec"]
    about: dict[str, JsonValue] = {
        "directory": str(run_dir),
        "steps": _last_step(run_dir / _METRICS),
        **{section: spec[section] for section in ("loss", "student", "optimizer", "batch", "precision", "seed")},
        "pairs": ", ".join(f"{data['fingerprint'][:16]} (weight {data['weight']:g})" for data in spec["data"]),
    }
    return about | {name: run[name] for name in ("fingerprint", "created", "code_revision")}


def _last_step(metrics: Path) -> int | None:
    """The step of the last whole line of ``metrics.jsonl``; None when there is none."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.is_file() else []
    return json.loads(lines[-1])["step"] if lines else None
