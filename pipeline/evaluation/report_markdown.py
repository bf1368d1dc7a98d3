"""``report.md``: the same evaluation for a terminal, a diff or a forge; its pictures lie beside it."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from pydantic import JsonValue

from pipeline.evaluation import tables
from pipeline.evaluation.grid import GRID
from pipeline.evaluation.plots import QUALITY
from pipeline.evaluation.results import Report
from pipeline.markdown_table import markdown_cell, markdown_row

MARKDOWN = "report.md"


def render_markdown(report: Report, *, has_quality: bool, curves: Sequence[str]) -> str:
    """The text.

    Args:
        report: what was found.
        has_quality: whether there is a plot of quality against evaluations.
        curves: files with the curves of training runs.
    """
    timings = tables.timing_rows(report)
    parts = [
        f"# {report.title}",
        *tables.summary(report),
        _table(tables.header(report), tables.rows(report)),
        "\n".join(f"- **{markdown_cell(title)}**: {meaning}" for title, meaning in tables.meanings(report)),
        f"![quality against network evaluations]({QUALITY})" if has_quality else "",
        f"![the same prompts and noise through every system]({GRID})" if report.grid else "",
        *(f"![{PurePath(name).stem}]({name})" for name in curves),
        f"## Time\n\n{tables.timed_on(report)}\n\n{_table(timings[0], timings[1:])}" if len(timings) > 1 else "",
        f"## What the numbers depend on\n\n{_about(report.protocol)}",
        f"## The student's training run\n\n{_about(report.run)}" if report.run else "",
        f"## Provenance\n\n{_about(report.provenance)}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join(map(markdown_row, lines))


def _about(values: Mapping[str, JsonValue]) -> str:
    return _table(["", ""], tables.about_rows(dict(values)), align="---")
