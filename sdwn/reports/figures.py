"""The figures of reports and comparisons: PNG, SVG and PDF for print, the SVG on the page too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sdwn.io import atomic
from sdwn.measures.record import Records
from sdwn.paths import ComparisonPaths, EvaluationPaths, ResultPaths
from sdwn.reports.circles import COLOURS, GREY, LABEL_HEIGHT, GroupStyle, map_circles, map_labels

ACCENT, PAPER = "#0072b2", "#d55e00"
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
    # As TrueType, which printers and arXiv take, and editors can change.
    "pdf.fonttype": 42,
    # Without it each SVG names its parts anew.
    "svg.hashsalt": "sdwn",
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    # A page's own ground is seen through it.
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Each kind of file, and what would make it another one at another time.
KINDS: Any = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}
# What is printed in the left colour has on a page the page's own, which may be a dark one.
PAGE_COLOURS = {"#000000": "currentColor", ACCENT: "var(--chart)", PAPER: "var(--chart-paper)"}

# A figure of a page: SVG by name.
Drawn = dict[str, Markup]


def write_report_figures(
    evaluation: Mapping[str, Any], paths: EvaluationPaths, records: Records | None = None
) -> Drawn:
    """Write the figures of an evaluation, and of what was measured; always the same bytes."""
    drawn, figures = {}, evaluation["figures"]
    with mpl.rc_context(STYLE):
        if evaluation["classes"]:
            means = {"mean": figures["mean_correct"]}
            if paper := evaluation.get("paper"):
                means["paper's mean"] = paper["mean_correct"]
            drawn["histogram"] = histogram_figure({"": figures["histogram"]}, means)
        if any(group["classes"] for group in evaluation["groups"]):
            drawn["groups"] = group_means_figure(evaluation)
        if evaluation["map"]:
            drawn["map"] = map_figure(evaluation)
        for (kind, name), record in (records or {}).items():
            if kind == "transfer":
                drawn[f"transfer-{name}"] = learning_curve_figure(record)
        return _write(drawn, paths)


def write_comparison_figures(comparison: Mapping[str, Any], paths: ComparisonPaths) -> Drawn:
    """Write the figures of a comparison; the same comparison gives the same bytes."""
    histograms = {side["name"]: side["figures"]["histogram"] for side in comparison["sides"]}
    with mpl.rc_context(STYLE):
        drawn = {"histogram": histogram_figure(histograms)}
        if any(group["classes"] for group in comparison["pairs"][0]["groups"]):
            drawn["groups"] = group_rates_figure(comparison)
        for pair in range(len(comparison["pairs"])):
            drawn[f"classes-{pair}"] = class_rates_figure(comparison, pair)
        for name in (names := [row["setting"] for row in comparison["settings"]]):
            sweep = comparison.get("sweep", {"cells": [{}]})
            if all(type(cell.get(name)) in (int, float) for cell in sweep["cells"]):
                drawn[name] = setting_figure(sweep, names, name)
        return _write(drawn, paths)


def _write(drawn: Mapping[str, Figure], paths: ResultPaths) -> Drawn:
    found: Drawn = {}
    for name, figure in drawn.items():
        for kind, metadata in KINDS.items():
            with atomic(paths.figure(name, kind)) as temporary:
                figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
        svg = paths.figure(name, "svg").read_text(encoding="utf-8")
        svg = re.sub("<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        # Without the white ground.
        svg = svg.replace('style="fill: #ffffff"', 'style="fill: none"', 1)
        for printed, own in PAGE_COLOURS.items():
            svg = svg.replace(f": {printed}", f": {own}")
        found[name] = Markup(svg)
    return found


def histogram_figure(
    histograms: Mapping[str, Sequence[int]], means: Mapping[str, float] | None = None
) -> Figure:
    """Plot how many classes have 0, 1, ... N correct images: one evaluation, or side by side."""
    sides = len(histograms)
    most, width = max(map(len, histograms.values())), 0.85 / sides
    height, xlabel = 2.35 + 0.14 * sides * (sides > 1), f"correct images of {most - 1}"
    figure, axes = _axes(height, xlabel=xlabel, ylabel="classes")
    for index, (name, counts) in enumerate(histograms.items()):
        x = [number - 0.425 + width * (index + 0.5) for number in range(len(counts))]
        bars = axes.bar(x, counts, width, color=side_colour(index), label=plain_text(name))
        if most <= MANY and sides == 1:
            axes.bar_label(bars, padding=1, fontsize=6)
    if most <= MANY:
        axes.set_xticks(range(most))
    axes.margins(y=0.12)
    # The first is not of the bars' colour, on which it would not be seen.
    looks = (("black", "-"), (PAPER, "--"))
    lines = [
        axes.axvline(mean, color=colour, linewidth=1, linestyle=line, label=f"{name} {mean:.2f}")
        for (name, mean), (colour, line) in zip((means or {}).items(), looks, strict=False)
    ]
    if lines:
        figure.legend(handles=lines, frameon=False, loc="outside upper center", ncols=2)
    else:
        figure.legend(frameon=False, loc="outside upper center")
    return figure


def group_means_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Plot each group's mean with its interval, the best at the top."""
    rows = sorted(
        (group for group in evaluation["groups"] if group["classes"]),
        key=lambda group: (group["mean_correct"], group["name"]),
    )
    most, means = evaluation["figures"]["images_per_class"], [row["mean_correct"] for row in rows]
    figure, axes = _axes(0.7 + 0.16 * len(rows), "x")
    for at, row in enumerate(rows):
        if ends := row["intervals"]["mean_correct"]:
            axes.plot(ends, [at, at], color=ACCENT, linewidth=1.2)
    axes.plot(means, range(len(rows)), "o", color=ACCENT, markersize=4)
    axes.set_yticks(
        range(len(rows)), [plain_text(f"{_short(row['name'])} ({row['classes']})") for row in rows]
    )
    axes.axvline(evaluation["figures"]["mean_correct"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.02 * most, 1.02 * most)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"mean correct of {most}, with 95 % interval", loc="right")
    return figure


def learning_curve_figure(record: Mapping[str, Any]) -> Figure:
    """Plot a probe's accuracy over the images a class that it learnt from, with intervals."""
    labels = {"xlabel": "training images a class", "ylabel": "correct real images, %"}
    figure, axes = _axes(2.35, "y", **labels)
    lines = {"transfer_accuracy": "trained on this release", "real_accuracy": "on real images"}
    for index, (name, label) in enumerate(lines.items()):
        points = [row for row in record["curve"] if name in row["figures"]]
        if not points:
            continue
        found = [row["figures"][name] for row in points]
        x, values = [row["name"] for row in points], [one["value"] for one in found]
        axes.plot(x, values, "o-", color=side_colour(index), markersize=3, linewidth=1, label=label)
        low, high = (
            [one["value"] if one[end] is None else one[end] for one in found]
            for end in ("low", "high")
        )
        axes.vlines(x, low, high, color=side_colour(index), linewidth=0.6)
    chance = record["figures"]["chance"]["value"]
    axes.axhline(chance, color="black", linewidth=0.8, linestyle=":", label="by chance")
    sizes = [row["name"] for row in record["curve"]]
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
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
    behind = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.2}
    for label in map_labels(evaluation):
        axes.text(
            *(label.x, label.y, plain_text(label.text)),
            fontsize=72 * COLUMN / across * LABEL_HEIGHT * 0.95,
            ha=label.side,
            va="center",
            bbox=behind,
        )
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
    pairs, sides = comparison["pairs"], comparison["sides"]
    first = [group for group in pairs[0]["groups"] if group["classes"]]
    rows = sorted(first, key=lambda row: (row["mean"], row["name"]))
    rates = {row["name"]: [100 * row["rates"][0]] for row in rows}
    for group in (group for pair in pairs for group in pair["groups"] if group["classes"]):
        rates[group["name"]].append(100 * group["rates"][1])
    figure, axes = _axes(0.9 + 0.16 * len(rows), "x", xlabel="correct images, %")
    for at, values in enumerate(rates.values()):
        axes.plot([min(values), max(values)], [at, at], color=GREY, linewidth=0.8, zorder=1)
    for index, side in enumerate(sides):
        x, label = [values[index] for values in rates.values()], plain_text(side["name"])
        axes.scatter(x, range(len(rows)), s=14, color=side_colour(index), label=label, zorder=2)
    axes.set_yticks(range(len(rows)), [plain_text(_short(name)) for name in rates])
    axes.set_xlim(-2, 102)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def class_rates_figure(comparison: Mapping[str, Any], pair: int) -> Figure:
    """Plot the classes by their rates on both sides of a pair, equal ones as one circle."""
    names, sides = comparison["pairs"][pair], (0, pair + 1)
    xlabel, ylabel = (f"{plain_text(names[one])}: correct images, %" for one in ("first", "second"))
    figure, axes = _axes(COLUMN, xlabel=xlabel, ylabel=ylabel)
    classes = Counter(
        tuple(round(100 * row["correct"][side] / row["images"][side], 1) for side in sides)
        for row in comparison["classes"]
    )
    # Areas are as the numbers of classes.
    areas = [LARGEST_OF_CLASSES**2 * n / max(classes.values()) for n in classes.values()]
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    x, y = zip(*classes, strict=True)
    axes.scatter(x, y, s=areas, color=side_colour(pair + 1), alpha=0.75, linewidths=0)
    # Wherever the classes lie: their own span may be a line.
    axes.set(xlim=(-7, 107), ylim=(-7, 107), aspect="equal")
    return figure


def setting_figure(sweep: Mapping[str, Any], names: Sequence[str], x: str) -> Figure:
    """Plot what ranks a sweep's cells over a setting, a line for each choice of the others."""
    by = sweep["by"]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(sweep["cells"], key=lambda row: row[x]):
        others = (str(row[name]) for name in names if name != x)
        lines.setdefault(", ".join(others), []).append(row)
    ylabel = "correct images, %" if by == "top1_percent" else sweep["figures"][by]
    xlabel = x.rpartition(".")[2].replace("_", " ")
    figure, axes = _axes(2.35 + 0.13 * len(lines), "y", xlabel=xlabel, ylabel=ylabel)
    for index, (label, line) in enumerate(lines.items()):
        ends = [(row[f"{by}_low"], row[f"{by}_high"]) for row in line]
        at, middle = [row[x] for row in line], [row[by] for row in line]
        colour, text = side_colour(index), plain_text(_short(label))
        axes.plot(at, middle, "o-", color=colour, markersize=4, linewidth=1, label=text)
        axes.vlines(at, *zip(*ends, strict=True), color=colour, linewidth=0.6)
    if len(names) > 1:
        figure.legend(loc="outside upper center", frameon=False)
    return figure


def side_colour(index: int) -> str:
    """Return the colour of a side of a comparison; an evaluation by itself has the first."""
    return COLOURS[index % len(COLOURS)]


def _axes(height: float, grid: Any = None, **labels: str) -> tuple[Figure, Axes]:
    """Begin a figure as wide as a column and so many inches high; ``labels`` are its axes'."""
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    if grid:
        axes.grid(axis=grid, linewidth=0.3)
    return figure, axes


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def plain_text(text: str) -> str:
    """Return text so that matplotlib sets it as it is."""
    # Between two of these signs matplotlib would set a formula; a legend leaves out what begins
    # with an underscore.
    return " " * text.startswith("_") + text.replace("$", r"\$")
