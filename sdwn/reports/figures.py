"""The same charts for print, by matplotlib: PNG and SVG at a column's width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sdwn.io import atomic
from sdwn.paths import ComparisonPaths, EvaluationPaths
from sdwn.reports.chart_data import (
    ACCENT,
    GREY,
    Bars,
    GroupStyle,
    MeanLine,
    changed_groups,
    class_rates,
    diameters,
    group_means,
    map_circles,
    report_bars,
    side_bars,
)

# In inches: a column of most journals.
COLUMN = 3.5
DPI = 300
# In characters, of a group's name.
LONGEST = 26
# In points, of a class with none and with all of its images correct (a smaller ring looks like a
# disc); of the circle of most classes.
SMALLEST, LARGEST, LARGEST_OF_CLASSES = 2.0, 6.5, 17.0
# Bars, above which they are not labelled one by one.
MANY = 21

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


def write_report_figures(evaluation: Mapping[str, Any], paths: EvaluationPaths) -> list[Path]:
    """Write all figures that an evaluation has; the same evaluation gives the same bytes."""
    drawn: dict[str, Callable[[], Figure]] = {}
    if evaluation["classes"]:
        drawn["histogram"] = partial(histogram_figure, *report_bars(evaluation))
    if group_means(evaluation):
        drawn["groups"] = partial(group_means_figure, evaluation)
    if evaluation["map"]:
        drawn["map"] = partial(map_figure, evaluation)
    return _write(drawn, paths)


def write_comparison_figures(comparison: Mapping[str, Any], paths: ComparisonPaths) -> list[Path]:
    """Write all figures of a comparison; the same comparison gives the same bytes."""
    drawn = {"histogram": partial(histogram_figure, side_bars(comparison))}
    if changed_groups(comparison):
        drawn["groups"] = partial(group_rates_figure, comparison)
    for pair in range(len(comparison["pairs"])):
        drawn[f"classes-{pair}"] = partial(class_rates_figure, comparison, pair)
    return _write(drawn, paths)


def _write(
    drawn: Mapping[str, Callable[[], Figure]], paths: EvaluationPaths | ComparisonPaths
) -> list[Path]:
    written = []
    with mpl.rc_context(STYLE):
        for name, draw in drawn.items():
            figure = draw()
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                written.append(paths.figure(name, kind))
                with atomic(written[-1]) as temporary:
                    figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
    return written


def histogram_figure(sides: Sequence[Bars], means: Sequence[MeanLine] = ()) -> Figure:
    """Plot how many classes have 0, 1, ... N correct images: one evaluation, or side by side."""
    figure, axes = _axes(2.35)
    most, width = max(len(side.counts) for side in sides), 0.85 / len(sides)
    for index, side in enumerate(sides):
        x = [number - 0.425 + width * (index + 0.5) for number in range(len(side.counts))]
        bars = axes.bar(x, side.counts, width, color=side.colour, label=_plain(side.name))
        if most <= MANY and len(sides) == 1:
            axes.bar_label(bars, padding=1, fontsize=6)
    if most <= MANY:
        axes.set_xticks(range(most))
    axes.set_xlabel(f"correct images of {most - 1}")
    axes.set_ylabel("classes")
    axes.margins(y=0.12)
    lines = [
        axes.axvline(
            line.mean,
            # On bars of the same colour it would not be seen.
            color="black" if line.colour == ACCENT else line.colour,
            linewidth=1,
            linestyle="-" if line.colour == ACCENT else "--",
            label=f"{line.name} {line.mean:.2f}",
        )
        for line in means
    ]
    if lines:
        figure.legend(handles=lines, frameon=False, loc="outside upper center", ncols=2)
    else:
        axes.legend(frameon=False)
    return figure


def group_means_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Plot each group's mean with its interval, the best at the top."""
    rows, most = group_means(evaluation), evaluation["figures"]["images_per_class"]
    figure, axes = _axes(0.7 + 0.16 * len(rows))
    for at, row in enumerate(rows):
        axes.plot([row.low, row.high], [at, at], color=ACCENT, linewidth=1.2)
    axes.plot([row.mean for row in rows], range(len(rows)), "o", color=ACCENT, markersize=4)
    axes.set_yticks(range(len(rows)), [f"{_short(row.name)} ({row.classes})" for row in rows])
    axes.axvline(evaluation["figures"]["mean_correct"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.02 * most, 1.02 * most)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"mean correct of {most}, with 95 % interval", loc="right")
    axes.grid(axis="x", linewidth=0.3)
    return figure


def map_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Plot a circle for each class, coloured by group and sized by the number correct."""
    groups = map_circles(evaluation)
    columns = 3 if max(len(_short(style.name)) for style, _ in groups) <= 12 else 2
    points = [(circle.x, circle.y) for _, circles in groups for circle in circles]
    across, up = (max(values) - min(values) + 0.2 for values in zip(*points, strict=True))
    legend = 0.13 * -(-len(groups) // columns) + 0.25
    figure, axes = _axes(COLUMN * up / across + legend)
    for style, circles in groups:
        look: dict[str, Any] = {"color": style.colour, "edgecolors": "white", "linewidths": 0.2}
        if style.shape != "disc":
            look = {"facecolors": "none", "edgecolors": style.colour, "linewidths": 0.5}
        areas = [(SMALLEST + (LARGEST - SMALLEST) * circle.size) ** 2 for circle in circles]
        x, y = [circle.x for circle in circles], [circle.y for circle in circles]
        axes.scatter(x, y, s=areas, alpha=0.85, **look)
        if style.shape == "target":
            axes.scatter(x, y, s=1, color=style.colour, linewidths=0)
    axes.set_aspect("equal")
    axes.margins(0.02)
    axes.set_axis_off()
    figure.legend(
        handles=[_legend_handle(style) for style, _ in groups],
        labels=[f"{_short(style.name)} ({style.classes})" for style, _ in groups],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handletextpad=0.1,
        columnspacing=0.8,
        title=f"Size: correct images. Positions: {evaluation['map']['source']}",
        title_fontsize=6.5,
    )
    return figure


def _legend_handle(style: GroupStyle) -> Line2D | tuple[Line2D, ...]:
    marker: dict[str, Any] = {"color": style.colour, "linestyle": "", "marker": "o"}
    ring = Line2D([], [], markersize=4, markeredgewidth=0.7, markerfacecolor="none", **marker)
    dot = Line2D([], [], markersize=1, markeredgewidth=0, **marker)
    if style.shape == "disc":
        return Line2D([], [], markersize=4, markeredgewidth=0, **marker)
    return (ring, dot) if style.shape == "target" else ring


def group_rates_figure(comparison: Mapping[str, Any]) -> Figure:
    """Plot each group's rate on every side, the most changed at the top."""
    rows = changed_groups(comparison)
    figure, axes = _axes(0.9 + 0.16 * len(rows))
    for at, (_, rates) in enumerate(rows):
        axes.plot([min(rates), max(rates)], [at, at], color=GREY, linewidth=0.8, zorder=1)
    for index, side in enumerate(side_bars(comparison)):
        x, label = [rates[index] for _, rates in rows], _plain(side.name)
        axes.scatter(x, range(len(rows)), s=14, color=side.colour, label=label, zorder=2)
    axes.set_yticks(range(len(rows)), [_plain(name) for name, _ in rows])
    axes.set_xlim(-2, 102)
    axes.set_xlabel("correct images, %")
    axes.grid(axis="x", linewidth=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def class_rates_figure(comparison: Mapping[str, Any], pair: int) -> Figure:
    """Plot the classes by their rates on both sides of a pair, equal ones as one circle."""
    figure, axes = _axes(COLUMN)
    classes, names = class_rates(comparison, pair), comparison["pairs"][pair]
    areas = [size**2 for size in diameters(classes, LARGEST_OF_CLASSES)]
    colour = side_bars(comparison)[pair + 1].colour
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    x, y = zip(*classes, strict=True)
    axes.scatter(x, y, s=areas, color=colour, alpha=0.75, linewidths=0)
    axes.set_xlabel(f"{_plain(names['first'])}: correct images, %")
    axes.set_ylabel(f"{_plain(names['second'])}: correct images, %")
    # Wherever the classes lie: their own span may be a line.
    axes.set_xlim(-7, 107)
    axes.set_ylim(-7, 107)
    axes.set_aspect("equal")
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    """Begin a figure as wide as a column and so many inches high."""
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.subplots()


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _plain(text: str) -> str:
    # Between two of these signs matplotlib would set a formula; a legend leaves out what begins
    # with an underscore.
    return " " * text.startswith("_") + text.replace("$", r"\$")
