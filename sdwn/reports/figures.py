"""Figures for pages and print, LaTeX tables, references, and grids of images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sdwn import __version__
from sdwn.errors import UsageError, command
from sdwn.evaluation.class_map import COLOURS, GREY, LABEL_HEIGHT, map_circles, map_labels
from sdwn.evaluation.metrics import Metric, metrics_shown
from sdwn.evaluation.record import as_recorded
from sdwn.io import atomic, write_text
from sdwn.measures.record import MEASURES, Records, all_records, score_table
from sdwn.paths import ComparisonPaths, EvaluationPaths, ResultPaths
from sdwn.releases.release import Release
from sdwn.storage.columns import numbers

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
# In inches, the width of the text of most papers, and the height of a caption. Images a row.
WIDTH, CAPTION, COLUMNS, RANKED_COLUMNS = 6.8, 0.18, 8, 5

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
    "legend.frameon": False,
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


@mpl.rc_context(STYLE)
def write_report_files(
    paths: EvaluationPaths, release: Release, evaluation: Mapping[str, Any], records: Records
) -> Drawn:
    """Write an evaluation's figures, tables for LaTeX and references; always the same bytes."""
    with as_recorded(paths.evaluation):  # not drawing, whose errors are others
        drawn, figures = dict[str, Figure](), evaluation["figures"]
        groups = [group for group in evaluation["groups"] if group["classes"]]
        if evaluation["classes"]:
            means = {"mean": figures["mean_correct"]}
            if paper := evaluation.get("paper"):
                means["paper's mean"] = paper["mean_correct"]
            drawn["histogram"] = histogram_figure({"": figures["histogram"]}, means)
        if groups:
            drawn["groups"] = group_means_figure(groups, figures)
        if evaluation["map"]:
            drawn["map"] = map_figure(evaluation)
        for (kind, name), record in records.items():
            if kind == "transfer":
                drawn[f"transfer-{name}"] = learning_curve_figure(record)
        shown = metrics_shown("terminal") if evaluation["classes"] else []
        columns, value = metrics_shown("group columns"), "value (95 % interval)"
        short = [one.heading(figures, short=True) for one in columns]
        metrics = [[one.heading(figures), with_interval(one, figures)] for one in shown]
        of_groups = [
            [group["name"], f"{group['classes']:,}", *(one.number(group) for one in columns)]
            for group in groups
        ]
        measured = [
            [one.label, one.text(figure), f"{figure['images']:,}", record["features"]["name"]]
            for record in records.values()
            for name, one in MEASURES.items()
            if (figure := record["figures"].get(name))
        ]
        for name, head, rows in (
            ("figures", ["", value], metrics),
            ("groups", ["group", "classes", *short], of_groups),
            ("measures", ["measure", value, "images", "features"], measured),
        ):
            if rows:
                write_text(paths.table(name, "tex"), latex_table(head, rows))
        used = names_used(release, evaluation["classifier"]["model"], records)
        write_text(paths.references, references(used))
    return _write(drawn, paths)


@mpl.rc_context(STYLE)
def write_comparison_files(
    comparison: Mapping[str, Any], releases: Sequence[Release], paths: ComparisonPaths
) -> Drawn:
    """Write a comparison's figures, table for LaTeX and references; always the same bytes."""
    sides, shown = comparison["sides"], metrics_shown("compared")
    head = ["", *(one.heading(sides[0]["figures"], short=True) for one in shown)]
    rows, used = list[list[str]](), set[str]()
    for side, release in zip(sides, releases, strict=True):
        rows.append([side["name"], *(with_interval(one, side["figures"]) for one in shown)])
        used |= names_used(release, side["classifier"]["model"], all_records(release))
    for record in comparison["measures"]:
        for name, figures in record["figures"].items():
            head.append(MEASURES[name].label)
            for row, figure in zip(rows, figures, strict=True):
                row.append(MEASURES[name].text(figure))
    write_text(paths.table("figures", "tex"), latex_table(head, rows))
    write_text(paths.references, references(used))
    histograms = {side["name"]: side["figures"]["histogram"] for side in sides}
    drawn = {"histogram": histogram_figure(histograms)}
    if any(group["classes"] for group in comparison["pairs"][0]["groups"]):
        drawn["groups"] = group_rates_figure(comparison)
    for pair in range(len(comparison["pairs"])):
        drawn[f"classes-{pair}"] = class_rates_figure(comparison, pair)
    sweep = comparison.get("sweep", {"cells": [{}]})
    for name in (names := [row["setting"] for row in comparison["settings"]]):
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
    figure.legend(handles=lines or None, loc="outside upper center", ncols=2 if lines else 1)
    return figure


def group_means_figure(groups: Iterable[Mapping[str, Any]], figures: Mapping[str, Any]) -> Figure:
    """Plot each group's mean with its interval, the best at the top."""
    rows = sorted(groups, key=lambda group: (group["mean_correct"], group["name"]))
    most, means = figures["images_per_class"], [row["mean_correct"] for row in rows]
    figure, axes = _axes(0.7 + 0.16 * len(rows), "x")
    for at, row in enumerate(rows):
        if ends := row["intervals"]["mean_correct"]:
            axes.plot(ends, [at, at], color=ACCENT, linewidth=1.2)
    axes.plot(means, range(len(rows)), "o", color=ACCENT, markersize=4)
    names = [plain_text(f"{_short(row['name'])} ({row['classes']})") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.axvline(figures["mean_correct"], color="black", linewidth=0.8, linestyle=":")
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
        found, colour = [row["figures"][name] for row in points], side_colour(index)
        x, values = [row["name"] for row in points], [one["value"] for one in found]
        axes.plot(x, values, "o-", color=colour, markersize=3, linewidth=1, label=label)
        low, high = ([one[end] for one in found] for end in ("low", "high"))
        axes.vlines(x, low, high, color=colour, linewidth=0.6)
    chance = record["figures"]["chance"]["value"]
    axes.axhline(chance, color="black", linewidth=0.8, linestyle=":", label="by chance")
    sizes = [row["name"] for row in record["curve"]]
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def map_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Plot a circle for each class, coloured by group and sized by the number correct."""
    groups = map_circles(evaluation)
    columns = 3 if max(len(_short(style["name"])) for style, _ in groups) <= 12 else 2
    points = [(circle["x"], circle["y"]) for _, circles in groups for circle in circles]
    across, up = (max(values) - min(values) + 0.2 for values in zip(*points, strict=True))
    legend = 0.13 * -(-len(groups) // columns) + 0.25
    figure, axes = _axes(COLUMN * up / across + legend)
    for style, circles in groups:
        colour, shape = style["colour"], style["shape"]
        look: dict[str, Any] = {"color": colour, "edgecolors": "white", "linewidths": 0.2}
        if shape != "disc":
            look = {"facecolors": "none", "edgecolors": colour, "linewidths": 0.5}
        areas = [(SMALLEST + (LARGEST - SMALLEST) * circle["size"]) ** 2 for circle in circles]
        x, y = ([circle[name] for circle in circles] for name in "xy")
        axes.scatter(x, y, s=areas, alpha=0.85, **look)
        if shape == "target":
            axes.scatter(x, y, s=1, color=colour, linewidths=0)
    behind = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.2}
    size = 72 * COLUMN / across * LABEL_HEIGHT * 0.95
    for label in map_labels(evaluation):
        look = {"ha": label["side"], "va": "center", "bbox": behind, "fontsize": size}
        axes.text(label["x"], label["y"], plain_text(label["text"]), **look)
    axes.set_aspect("equal")
    axes.margins(0.02)
    axes.set_axis_off()
    figure.legend(
        handles=[_legend_handle(style["colour"], style["shape"]) for style, _ in groups],
        labels=[plain_text(f"{_short(style['name'])} ({style['classes']})") for style, _ in groups],
        loc="outside lower center",
        ncols=columns,
        handletextpad=0.1,
        columnspacing=0.8,
        title=f"Size: correct images. Positions: {plain_text(evaluation['map']['source'])}",
        title_fontsize=6.5,
    )
    return figure


def _legend_handle(colour: str, shape: str) -> tuple[Line2D, ...]:
    marker: dict[str, Any] = {"color": colour, "linestyle": "", "marker": "o"}
    disc, dot = (Line2D([], [], markersize=n, markeredgewidth=0, **marker) for n in (4, 1))
    ring = Line2D([], [], markersize=4, markeredgewidth=0.7, markerfacecolor="none", **marker)
    return {"disc": (disc,), "ring": (ring,), "target": (ring, dot)}[shape]


def group_rates_figure(comparison: Mapping[str, Any]) -> Figure:
    """Plot each group's rate on every side, the most changed at the top."""
    pairs, sides = comparison["pairs"], comparison["sides"]
    rows = [group for group in pairs[0]["groups"] if group["classes"]]
    rows.sort(key=lambda row: (row["mean"], row["name"]))
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
    figure.legend(loc="outside upper center", ncols=2)
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
        figure.legend(loc="outside upper center")
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


# --- Tables for LaTeX, and references ----------------------------------------------------------
_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"\u2013": "--"}
)
_ENTRY = re.compile(r"^% for: (?P<used>.+)\n(?P<entry>@(?:.+\n)+?\}\n)", re.MULTILINE)


def with_interval(metric: Metric, figures: Mapping[str, Any]) -> str:
    """Write a metric's value with its 95 % interval, without the unit."""
    span = metric.interval(figures)
    return f"{metric.number(figures)} ({span})" if span else metric.number(figures)


def latex_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for LaTeX with booktabs; all columns but the first are set to the right."""
    cells = ([cell.translate(_LATEX) for cell in row] for row in (head, *rows))
    first, *rest = (" & ".join(row) + r" \\" for row in cells)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    lines = [r"% \usepackage{booktabs}", begin, r"\toprule", first, r"\midrule", *rest]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def names_used(release: Release, classifier: str, records: Records) -> set[str]:
    """List the models, libraries and measures that an evaluated release rests on."""
    used = {"timm", classifier}
    for plan in release.manifest.plans:
        used |= {"diffusers", plan.settings["model"]["name"]}
    if release.has_tree:
        used |= {"wordnet", "imagenet"}
    for record in records.values():
        used |= {record["features"]["encoder"]["model"], *record["figures"]}
    return used


def references(used: Iterable[str]) -> str:
    """Return BibTeX entries for what was used: names of models, libraries and measures."""
    source = files("sdwn").joinpath("templates/paper/references.bib").read_text(encoding="utf-8")
    names, found = ["all", *used], _ENTRY.finditer(source)
    entries = [one["entry"] for one in found if any(re.search(one["used"], n) for n in names)]
    return "\n".join(entries).replace("VERSION", __version__)


# --- Grids of images ---------------------------------------------------------------------------
# A cell of a grid: the image's index, None where there is none, and its caption.
Cell = tuple[int | None, str]


@mpl.rc_context(STYLE)
def write_grid(
    release: Release, names: Sequence[str], ranked: int, evaluation: str | None, path: Path
) -> int:
    """Write images with captions as PNG or PDF; return how many.

    A row for each concept that is named; without ``names``, so many images as ``ranked`` says, of
    each concept the surest by the evaluation, or the least sure for a number below 0.
    """
    if not names:
        cells, columns = _ranked(release, ranked, evaluation), RANKED_COLUMNS
    else:
        each = [release.find(release.find_one(name)).tolist() for name in names]
        columns = min(COLUMNS, max(map(len, each)))
        cells = [
            (images[at] if at < len(images) else None, "" if at else name)
            for name, images in zip(names, each, strict=True)
            for at in range(columns)
        ]
    rows, side = -(-len(cells) // columns), WIDTH / columns
    figure = Figure(figsize=(WIDTH, rows * (side + CAPTION)))
    below = CAPTION / (rows * (side + CAPTION))
    gaps = {"left": 0, "right": 1, "top": 1, "bottom": below, "hspace": CAPTION / side}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=gaps | {"wspace": 0.05})
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (index, caption) in zip(axes.flat, cells, strict=False):
        if index is not None:
            image = release.image(index)
            image.thumbnail((round(side * DPI),) * 2)
            axis.imshow(image, interpolation="none")
            text = plain_text(caption)
            axis.text(0, -0.03, text, transform=axis.transAxes, va="top", fontsize=7)
    kind = path.suffix[1:].lower()
    with atomic(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=DPI, metadata=KINDS[kind])
    return sum(index is not None for index, _ in cells)


def _ranked(release: Release, ranked: int, evaluation: str | None) -> list[Cell]:
    """Pick one image of each concept, the surest or least sure, by the classifier."""
    shares = numbers(score_table(release, evaluation)["label_probability"], np.nan)
    known = np.flatnonzero(~np.isnan(shares))
    if not len(known):
        advice = command("evaluate", release.paths.root)
        raise UsageError(f"{release}: no image of a class is evaluated; run: {advice}")
    order = known[np.argsort(-ranked * shares[known], kind="stable")]
    ids, chosen = release.metadata["id"].take(order).to_pylist(), dict[str, int]()
    for row, id_ in zip(order.tolist(), ids, strict=True):
        chosen.setdefault(id_, row)
    return [
        (row, f"{release.concepts[id_].label or id_}, {100 * shares[row]:.0f} %")
        for id_, row in list(chosen.items())[: abs(ranked)]
    ]
