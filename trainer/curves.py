"""The picture of a run: its metrics over its steps.

Each panel shows values of one kind. Losses and norms have a logarithmic axis when they span a factor of ten. Long runs
are drawn twice: every value, pale, and their running median.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
_COLUMNS = 3
_SMOOTHED_FROM = 100  # lines; fewer are readable as they are
_COLOURS = ("#1f5fa8", "#d1602b", "#3c8d5a", "#8a4f9e")
_BUCKET_COLOURS = ("#b9d3ea", "#7fb0d8", "#3f82bd", "#134f86")  # from little noise to much


@dataclass(frozen=True)
class _Panel:
    title: str
    names: dict[str, str]
    """Metric -> how the legend calls it."""
    log: bool = False
    from_zero: bool = False
    percent: bool = False
    colours: Sequence[str] = _COLOURS


_PANELS = (
    _Panel("loss of the student", {"loss/student": "student", "loss/regression": "regression"}, log=True),
    _Panel("distribution matching", {"loss/dm": "loss", "dm/rms_gradient": "gradient, rms"}, log=True),
    _Panel("loss of the critic", {"loss/critic": "critic"}, log=True),
    _Panel("distance to held-out pairs", {"holdout/distance": "held out"}, log=True),
    _Panel("gradient norm, before clipping", {"grad_norm/student": "student", "grad_norm/critic": "critic"}, log=True),
    _Panel(
        "cosine of real and fake score's x0",
        {
            "dm/cosine/bucket0": "least noise",
            "dm/cosine/bucket1": "less",
            "dm/cosine/bucket2": "more",
            "dm/cosine/bucket3": "most noise",
        },
        colours=_BUCKET_COLOURS,
    ),
    _Panel("the student's samples", {"student/mean": "mean", "student/std": "standard deviation"}),
    _Panel("images per second", {"images_per_second": "images per second"}, from_zero=True),
    _Panel("share of time waiting for data", {"data_wait_share": "data wait"}, from_zero=True, percent=True),
)


def draw_curves(lines: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of all panels of which there is at least one number.

    Args:
        lines: of metrics.jsonl, in order; at least one.
    """
    from matplotlib.figure import Figure

    steps = np.array([line["step"] for line in lines])
    panels = [panel for panel in _PANELS if any(line.get(name) is not None for line in lines for name in panel.names)]
    rows = max(1, math.ceil(len(panels) / _COLUMNS))
    # A Figure without pyplot: no window, no global state.
    figure = Figure(figsize=(4.6 * _COLUMNS, 2.9 * rows), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, steps, lines)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(ax: "Axes", panel: _Panel, steps: NDArray[np.int64], lines: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

    drawn: list[NDArray[np.float64]] = []
    for (name, label), colour in zip(panel.names.items(), panel.colours, strict=False):
        values = np.array([line.get(name) for line in lines], dtype=np.float64)  # None is NaN: a gap
        there = np.array([name in line for line in lines])
        if np.isnan(values).all():
            continue
        drawn.append(values[~np.isnan(values)])
        x, y = steps[there], values[there]
        marker = "o" if len(x) <= 3 else None
        if len(x) >= _SMOOTHED_FROM:
            ax.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
            y = _running_median(y, len(y) // 40 * 2 + 1)
        ax.plot(x, y, color=colour, linewidth=1.5, label=label, marker=marker, markersize=4)
    numbers = np.concatenate(drawn)
    if panel.log and numbers.min() > 0 and numbers.max() > 10 * numbers.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    elif panel.from_zero:
        ax.set_ylim(0, max(1.1 * numbers.max(), 1e-9))
    if panel.percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_title(panel.title, fontsize=11, loc="left")
    ax.set_xlabel("step", fontsize=9)
    ax.set_xlim(0, max(int(steps[-1]), 1))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.tick_params(labelsize=8.5)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if len(panel.names) > 1:
        ax.legend(fontsize=8.5, frameon=False)


def _running_median(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The median of the ``window`` (odd) values around each; at the ends of those that there are."""
    padded = np.pad(values, window // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    numbers = np.where(np.isnan(windows).all(1, keepdims=True), 0.0, windows)
    return np.where(np.isnan(values), np.nan, np.nanmedian(numbers, axis=1))
