"""``metrics.jsonl``: a line of JSON for every log line of a run, steps increasing.

    {"step": 50, "images": 6400, "critic_steps": 50, "time": "2025-01-31T12:00:00+00:00", "loss/student": 0.41, ...}

A value that is not finite is ``null``, since JSON has no other word for it, and ``nonfinite_metrics`` says how many of
them there are in the line. A process that dies may leave half a line at the end: it is no line.
"""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.errors import UserError
from pipeline.shards.storage import Storage

METRICS = "metrics.jsonl"


class MetricsFile:
    """The file of one run directory, for the one process that writes it.

    Args:
        run_dir: the run directory; must exist.
        step: the step that the run goes on from. Lines of later ones, which are done again, are removed.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._path = run_dir / METRICS
        if self._path.exists():
            kept = [line for line in _lines(self._path) if _parse(self._path, line)["step"] <= step]
            storage, name = Storage.of_file(str(self._path))
            storage.write(name, "".join(f"{line}\n" for line in kept).encode())

    def append(self, step: int, num_images: int, critic_steps: int, values: Mapping[str, float]) -> None:
        """Add a line."""
        finite = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()}
        line: dict[str, Any] = {
            "step": step,
            "images": num_images,
            "critic_steps": critic_steps,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **finite,
        }
        if num_nonfinite := list(finite.values()).count(None):
            line["nonfinite_metrics"] = num_nonfinite
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run; none when it has not written any.

    Raises:
        UserError: one of them is not what this program writes.
    """
    path = run_dir / METRICS
    return [_parse(path, line) for line in _lines(path)] if path.exists() else []


def last_metrics(run_dir: Path) -> dict[str, float]:
    """The finite metrics of the last line, without step, counts and time."""
    lines = read_metrics(run_dir)
    about = ("step", "images", "critic_steps", "time", "nonfinite_metrics")
    return (
        {name: value for name, value in lines[-1].items() if name not in about and value is not None} if lines else {}
    )


def _lines(path: Path) -> list[str]:
    """The lines that were written to their end."""
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return whole


def _parse(path: Path, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise UserError(f"{path}: {line[:60]!r} is not a line of metrics; remove it")
    return values
