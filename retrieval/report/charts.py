"""The report's figures, as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

INK, SOFT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
COLORS = ("#1769aa", "#c2571a", "#2f855a", "#7b4fa3", "#8a6d00")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nextclick",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
DOT, NEAR = 6.0, 24
"""Dot size in points, and label offset from which a leader line is drawn."""
OFFSETS = sorted(
    (
        (sign_x * dx, sign_y * dy)
        for dx in (6, 24, 48)
        for dy in range(5, 120, 6)
        for sign_y in (1, -1)
        for sign_x in (1, -1)
    ),
    key=lambda offset: abs(offset[0]) + abs(offset[1]),
)
"""Allowed label offsets, in points from the dot."""
SIZE = (4.6, 2.9)
"""Figure size in inches, close to that on a phone, so that labels stay legible."""


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ', r"<svg \1", svg, count=1)


def _axes(x: str, y: str, *, height: float = SIZE[1]) -> tuple[Any, Axes]:
    figure, axes = plt.subplots(figsize=(SIZE[0], height), dpi=72)  # the resolution at which SVG measures text
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def curves(lines: Mapping[str, Sequence[Sequence[float]]], y: str) -> str:
    """Lines over epochs: name → `(epoch, value)` pairs."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes("epoch", y)
        for color, (name, pairs) in zip(COLORS, lines.items(), strict=False):
            axes.plot(*zip(*pairs, strict=True), marker="o", markersize=3, color=color, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.legend()
        return _svg(figure)


def fidelity(tried: Sequence[tuple[float, float]], requested: float) -> str:
    """Recall against queries per second, one point per search effort; the requested recall is dotted."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes("queries a second", "recall@20 of exact search")
        axes.plot([rate for rate, _ in tried], [recall for _, recall in tried], marker="o", color=COLORS[0])
        axes.axhline(requested, color=SOFT, linestyle=":")
        axes.set_xscale("log")
        rates = sorted(rate for rate, _ in tried)
        axes.set_xticks([rates[0], rates[-1]], [f"{rates[0]:,.0f}", f"{rates[-1]:,.0f}"])
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
        axes.set_ylim(top=1.01)
        return _svg(figure)


def calibration(tasks: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Reliability diagram: share of positives against mean score by bin and task; the diagonal is perfect."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes("predicted", "observed")
        low, high = 1.0, 1e-4
        for color, (name, (predicted, observed)) in zip(COLORS, tasks.items(), strict=False):
            shown = [(p, o) for p, o in zip(predicted, observed, strict=True) if p > 0 and o > 0]
            axes.plot([p for p, _ in shown], [o for _, o in shown], marker="o", markersize=3, color=color, label=name)
            low, high = min([low, *predicted]), max([high, *predicted])
        axes.plot([low, high], [low, high], color=SOFT, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
        axes.legend()
        return _svg(figure)


def histogram(value: npt.NDArray[Any], count: npt.NDArray[Any], x: str, y: str) -> str:
    """Bars of counts at integer values."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(x, y)
        axes.bar(value, count, width=1.0, color=COLORS[0], edgecolor="white", linewidth=0.4)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        return _svg(figure)


def popularity(clicks: npt.NDArray[Any]) -> str:
    """Train clicks of items by popularity rank, log-log."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes("items by popularity (rank)", "train clicks")
        descending = np.sort(clicks[clicks > 0])[::-1]
        rank = (
            np.unique(np.geomspace(1, max(len(descending), 1), 400).astype(int))
            if len(descending)
            else np.zeros(0, int)
        )
        axes.loglog(rank, descending[rank - 1], color=COLORS[0], linewidth=2)
        axes.fill_between(rank, descending[rank - 1], 0.8, color=COLORS[0], alpha=0.12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        return _svg(figure)


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float | None]], x: str, y: str) -> str:
    """Grouped bars: one group per label, one colour per series."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(x, y)
        width = 0.8 / max(len(series), 1)
        for number, (color, (name, values)) in enumerate(zip(COLORS, series.items(), strict=False)):
            left = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
            axes.bar(left, [v or 0.0 for v in values], width, color=color, label=name)
        axes.set_xticks(range(len(groups)), groups)
        axes.grid(axis="x", visible=False)
        top = max((v or 0.0 for values in series.values() for v in values), default=0.0)
        axes.set_ylim(top=(top or 1.0) * (1.1 + 0.12 * len(series)))  # room for the legend above the bars
        axes.legend(loc="upper right")
        return _svg(figure)


def forest(rows: Sequence[tuple[str, float, float | None, float | None]], x: str) -> str:
    """Forest plot of differences with intervals; the dotted line is no difference."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(x, "", height=0.9 + 0.3 * len(rows))
        for y, (_, value, low, high) in enumerate(rows):
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=COLORS[0], linewidth=2, alpha=0.5)
            axes.plot([value], [y], "o", color=COLORS[0], markersize=5)
        axes.axvline(0.0, color=SOFT, linestyle=":")
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure)


def named_points(pairs: Sequence[tuple[str, float, float]], x: str, y: str) -> str:
    """Labelled scatter plot of (name, x, y); x is logarithmic."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(x, y, height=3.6 if len(pairs) <= 8 else 4.8)
        axes.plot([cost for _, cost, _ in pairs], [value for *_, value in pairs], "o", color=COLORS[0], markersize=5)
        axes.set_xscale("log")
        axes.margins(x=0.3, y=0.15)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
        name_dots(axes, pairs)
        return _svg(figure)


def name_dots(axes: Axes, pairs: Sequence[tuple[str, float, float]]) -> list[Annotation]:
    """Label each (name, x, y) near its dot, without covering dots or other labels if possible.

    Labels are placed greedily from the highest dot down, each at the nearest free offset; distant labels get a leader
    line.
    """
    axes.autoscale_view()
    dots = axes.transData.transform([(cost, value) for _, cost, value in pairs])
    taken = [Bbox.from_bounds(x - DOT / 2, y - DOT / 2, DOT, DOT) for x, y in dots]
    names = []
    for name, cost, value in sorted(pairs, key=lambda pair: -pair[2]):
        tried: list[tuple[int, int, Annotation, Bbox]] = []
        for number, (dx, dy) in enumerate(OFFSETS):
            text = axes.annotate(
                name,
                (cost, value),
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=8,
                ha="left" if dx > 0 else "right",
                va="center",
                arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.5} if abs(dx) + abs(dy) > NEAR else None,
            )
            box = text.get_window_extent()
            outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1)
            covered = sum(box.overlaps(other) for other in taken) + 2 * outside
            tried.append((covered, number, text, box))
            if not covered:
                break
        _, _, best, box = min(tried, key=lambda one: one[:2])
        for *_, text, _ in tried:
            if text is not best:
                text.remove()
        taken.append(box)
        names.append(best)
    return names


def points(pairs: Sequence[tuple[Any, float]], x: str, y: str) -> str:
    """Scatter plot; text is categorical, positive numbers that span more than a factor of 8 are on a log axis."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(x, y)
        values = [value for value, _ in pairs]
        numeric = all(type(value) in (int, float) for value in values)
        x_values = values if numeric else [sorted(set(map(str, values))).index(str(value)) for value in values]
        axes.plot(x_values, [y_value for _, y_value in pairs], "o", color=COLORS[0], alpha=0.6, markersize=5)
        if not numeric:
            names = sorted(set(map(str, values)))
            axes.set_xticks(range(len(names)), names)
        elif min(values) > 0 and max(values) > 8 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
        return _svg(figure)


def heat_map(rows: Sequence[str], values: npt.NDArray[np.float64], x: str) -> str:
    """Heat map of a matrix of shares, annotated with the numbers."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(x, "", height=0.9 + 0.42 * len(rows))
        axes.grid(visible=False)
        top = max(float(values.max()), 1e-9)
        axes.imshow(values, cmap="Blues", vmin=0.0, vmax=top, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.6 * top else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xticks(range(values.shape[1]), [str(i + 1) for i in range(values.shape[1])])
        return _svg(figure)
