"""The same figures for print: PNG and SVG at a column's width, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sdwn.io import atomic
from sdwn.paths import ComparisonPaths, EvaluationPaths
from sdwn.reports.palette import ACCENT, PAPER, GroupStyle, circles, ranked_groups

# In inches: a column of most journals.
COLUMN = 3.5
DPI = 300
# In characters, of a group's name.
LONGEST = 26
# In points, of a class with none and with all of its images right. Of a smaller circle a ring
# cannot be told from a disc.
SMALLEST, LARGEST = 2.0, 6.5

STYLE: Any = {
    # Text stays text: it can be searched, and set in the paper's own type.
    "svg.fonttype": "none",
    # Without it each SVG names its parts anew.
    "svg.hashsalt": "sdwn",
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Draw = Callable[[dict[str, Any]], Figure]


def write_figures(evaluation: dict[str, Any], paths: EvaluationPaths) -> list[Path]:
    """Write all figures that an evaluation has; the same evaluation gives the same bytes."""
    drawn: dict[str, Draw] = {"histogram": histogram} if evaluation["classes"] else {}
    if ranked_groups(evaluation):
        drawn["groups"] = groups
    if evaluation["map"]:
        drawn["map"] = class_map
    with mpl.rc_context(STYLE):
        return [
            path for name, draw in drawn.items() for path in save(draw(evaluation), paths, name)
        ]


def save(figure: Figure, paths: EvaluationPaths | ComparisonPaths, name: str) -> list[Path]:
    """Write a figure as PNG and as SVG; the same figure gives the same bytes."""
    targets = [paths.figure(name, extension) for extension in ("png", "svg")]
    for target in targets:
        kind = target.suffix[1:]
        dated = {"Date": None} if kind == "svg" else {"Software": None}
        with atomic(target) as temporary:
            figure.savefig(temporary, format=kind, dpi=DPI, metadata=dated)
    return targets


def histogram(evaluation: dict[str, Any]) -> Figure:
    """Draw how many classes have 0, 1, ... N right images, and the means."""
    figures, paper = evaluation["figures"], evaluation.get("paper")
    counts = figures["histogram"]
    figure, axes = column_axes(2.3)
    bars = axes.bar(range(len(counts)), counts, color=ACCENT, width=0.85)
    if len(counts) <= 21:
        axes.bar_label(bars, padding=1, fontsize=6)
        axes.set_xticks(range(len(counts)))
    axes.set_xlabel(f"right images of {len(counts) - 1}")
    axes.set_ylabel("classes")
    axes.margins(y=0.12)
    mean = figures["mean_correct"]
    axes.axvline(mean, color="black", linewidth=1, label=f"mean {mean:.2f}")
    if paper:
        told = paper["mean_correct"]
        axes.axvline(told, color=PAPER, linewidth=1, linestyle="--", label=f"paper {told:.2f}")
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return figure


def groups(evaluation: dict[str, Any]) -> Figure:
    """Draw each group's mean with its interval, the best at the top."""
    rows = ranked_groups(evaluation)
    figure, axes = column_axes(0.7 + 0.16 * len(rows))
    means, most = [row["mean_correct"] for row in rows], evaluation["figures"]["images_per_class"]
    for place, row in enumerate(rows):
        low, high = row["intervals"]["mean_correct"] or [means[place]] * 2
        axes.plot([low, high], [place, place], color=ACCENT, linewidth=1.2)
    axes.plot(means, range(len(rows)), "o", color=ACCENT, markersize=4)
    axes.set_yticks(range(len(rows)), [f"{_short(row['name'])} ({row['classes']})" for row in rows])
    axes.axvline(evaluation["figures"]["mean_correct"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.02 * most, 1.02 * most)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"mean right of {most}, with 95 % interval", loc="right")
    axes.grid(axis="x", linewidth=0.3)
    return figure


def class_map(evaluation: dict[str, Any]) -> Figure:
    """Draw a circle for each class, coloured by group and sized by the number right."""
    found = circles(evaluation)
    longest = max(len(_short(style.name)) for style, _ in found)
    columns = 3 if longest <= 12 else 2
    points = [circle for _, group in found for circle in group]
    across, up = _span([circle.x for circle in points]), _span([circle.y for circle in points])
    legend = 0.13 * -(-len(found) // columns) + 0.25
    figure, axes = column_axes(COLUMN * up / across + legend)
    for style, group in found:
        sizes = [(SMALLEST + (LARGEST - SMALLEST) * circle.size) ** 2 for circle in group]
        x, y = [circle.x for circle in group], [circle.y for circle in group]
        axes.scatter(x, y, s=sizes, alpha=0.85, **_look(style))
        if style.shape == "target":
            axes.scatter(x, y, s=1, color=style.colour, linewidths=0)
    axes.set_aspect("equal")
    axes.margins(0.02)
    axes.set_axis_off()
    figure.legend(
        handles=[_handle(style) for style, _ in found],
        labels=[f"{_short(style.name)} ({style.classes})" for style, _ in found],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handletextpad=0.1,
        columnspacing=0.8,
        title=f"Size: right images. Places: {evaluation['map']['source']}",
        title_fontsize=6.5,
    )
    return figure


def _look(style: GroupStyle) -> dict[str, Any]:
    if style.shape == "disc":
        return {"color": style.colour, "edgecolors": "white", "linewidths": 0.2}
    return {"facecolors": "none", "edgecolors": style.colour, "linewidths": 0.5}


def _handle(style: GroupStyle) -> Line2D | tuple[Line2D, ...]:
    marker: dict[str, Any] = {"color": style.colour, "linestyle": "", "marker": "o"}
    ring = Line2D([], [], markersize=4, markeredgewidth=0.7, markerfacecolor="none", **marker)
    dot = Line2D([], [], markersize=1, markeredgewidth=0, **marker)
    if style.shape == "disc":
        return Line2D([], [], markersize=4, markeredgewidth=0, **marker)
    return (ring, dot) if style.shape == "target" else ring


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _span(values: list[float]) -> float:
    return max(values) - min(values) + 0.2


def column_axes(height: float) -> tuple[Figure, Axes]:
    """Begin a figure as wide as a column and so many inches high."""
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.subplots()
