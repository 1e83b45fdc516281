"""A comparison's figures for print: PNG and SVG at a column's width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sdwn.paths import ComparisonPaths
from sdwn.reports.compare_charts import class_spots, colours, group_rates, ranked, sizes
from sdwn.reports.figures import COLUMN, STYLE, column_axes, save
from sdwn.reports.palette import GREY

# In points, of the place with most classes.
LARGEST = 17.0


def write_comparison_figures(comparison: Mapping[str, Any], paths: ComparisonPaths) -> list[Path]:
    """Write all figures of a comparison; the same comparison gives the same bytes."""
    with mpl.rc_context(STYLE):
        drawn = {"histogram": histogram(comparison)}
        if ranked(comparison):
            drawn["groups"] = groups(comparison)
        for place in range(len(comparison["pairs"])):
            drawn[f"classes-{place}"] = classes(comparison, place)
        return [path for name, figure in drawn.items() for path in save(figure, paths, name)]


def histogram(comparison: Mapping[str, Any]) -> Figure:
    """Draw how many classes have 0, 1, ... N right images, each side beside the others."""
    figure, axes = column_axes(2.4)
    sides = comparison["sides"]
    width = 0.85 / len(sides)
    for place, (side, colour) in enumerate(zip(sides, colours(comparison), strict=True)):
        counts = side["figures"]["histogram"]
        left = [number - 0.425 + width * (place + 0.5) for number in range(len(counts))]
        axes.bar(left, counts, width, color=colour, label=_plain(side["name"]))
    axes.set_xlabel("right images of a class")
    axes.set_ylabel("classes")
    axes.legend(frameon=False)
    return figure


def groups(comparison: Mapping[str, Any]) -> Figure:
    """Draw each group's rate on every side, those that changed most at the top."""
    names = ranked(comparison)
    figure, axes = column_axes(0.9 + 0.16 * len(names))
    found = [
        [100 * rate for rate in group_rates(comparison, place, names)]
        for place in range(len(comparison["sides"]))
    ]
    for row, ends in enumerate(zip(*found, strict=True)):
        axes.plot([min(ends), max(ends)], [row, row], color=GREY, linewidth=0.8, zorder=1)
    for side, rates, colour in zip(comparison["sides"], found, colours(comparison), strict=True):
        label = _plain(side["name"])
        axes.scatter(rates, range(len(names)), s=14, color=colour, label=label, zorder=2)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_xlim(-2, 102)
    axes.set_xlabel("right images, %")
    axes.grid(axis="x", linewidth=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def classes(comparison: Mapping[str, Any], place: int) -> Figure:
    """Draw the classes by their rates on both sides of a pair; a circle is all of one place."""
    figure, axes = column_axes(COLUMN)
    spots, pair = class_spots(comparison, place), comparison["pairs"][place]
    areas = [size**2 for size in sizes(spots, LARGEST)]
    x, y = [spot[0] for spot in spots], [spot[1] for spot in spots]
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    axes.scatter(x, y, s=areas, color=colours(comparison)[place + 1], alpha=0.75, linewidths=0)
    axes.set_xlabel(f"{_plain(pair['first'])}: right images, %")
    axes.set_ylabel(f"{_plain(pair['second'])}: right images, %")
    # Wherever the classes lie: their own span may be a line.
    axes.set_xlim(-7, 107)
    axes.set_ylim(-7, 107)
    axes.set_aspect("equal")
    return figure


def _plain(text: str) -> str:
    # Between two of these signs matplotlib would set a formula; a legend leaves out what begins
    # with an underscore.
    return " " * text.startswith("_") + text.replace("$", r"\$")
