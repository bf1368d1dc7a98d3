"""Quality against network evaluations: a panel for each number, teachers as curves and students as lines across.

A student's line crosses the teacher's curve where the teacher is as good, and so shows how many evaluations it saves.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluation.results import SystemResult, columns, metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUALITY = "quality.png"
_COLUMNS = 3
_TEACHER_COLOURS = ("#1f5fa8", "#3c8d5a", "#8a4f9e", "#6b6b6b")
_STUDENT_COLOURS = ("#d1602b", "#b0307a", "#a58a00", "#11807e", "#7a4a1e", "#c23b3b")
_MARKERS = "*Ps^vX"


def draw_quality(systems: Sequence[SystemResult]) -> bytes | None:
    """A PNG with a panel for each number of these systems that has a better end; None when there is none."""
    from matplotlib.figure import Figure

    names = [name for name in columns(systems) if metric(name).better]
    if not names:
        return None
    rows = -(-len(names) // _COLUMNS)
    width = min(len(names), _COLUMNS)
    # A Figure without pyplot: no window, no global state.
    figure = Figure(figsize=(4.6 * width, 3.3 * rows + 0.5), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(rows, width, squeeze=False).flatten()
    for ax, name in zip(axes, names, strict=False):
        _draw(ax, name, systems)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(ax: "Axes", name: str, systems: Sequence[SystemResult]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    about = metric(name)
    curves: dict[str, list[SystemResult]] = {}
    for system in systems:
        curves.setdefault(system.family, []).append(system)
    teachers = [curve for curve in curves.values() if not curve[0].is_student]
    students = [curve[0] for curve in curves.values() if curve[0].is_student]
    for at, curve in enumerate(teachers):
        points = sorted((one.evaluations, one.numbers[name]) for one in curve if name in one.numbers)
        x, y = np.array(points).reshape(-1, 2).T
        colour = _TEACHER_COLOURS[at % len(_TEACHER_COLOURS)]
        ax.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=4.5, label=curve[0].family)
    for at, student in enumerate(students):
        value = student.numbers.get(name, np.nan)  # an empty entry, so that the legend has all of them
        colour = _STUDENT_COLOURS[at % len(_STUDENT_COLOURS)]
        marker = _MARKERS[at % len(_MARKERS)]
        ax.axhline(value, color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        ax.plot(
            [student.evaluations], [value], color=colour, marker=marker, markersize=11, linestyle="none",
            label=student.title,
        )  # fmt: skip
    values = [one.numbers[name] for one in systems if name in one.numbers]
    evaluations = sorted({one.evaluations for one in systems})
    ax.set_xscale("log", base=2)
    ax.set_xticks(evaluations, [f"{count:,}" for count in evaluations])
    ax.set_xlim(evaluations[0] / 1.3, evaluations[-1] * 1.3)
    ax.xaxis.set_minor_locator(NullLocator())
    if about.better == "lower" and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title(f"{about.title} ({about.better} is better)", fontsize=11, loc="left")
    ax.set_xlabel("network evaluations of an image", fontsize=9)
    ax.tick_params(labelsize=8.5)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
