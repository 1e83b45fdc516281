"""Data of charts, the same on a page, in print and in the browser: order, colours, positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours, which most colour-blind readers can distinguish, without black and yellow
# (lost on a dark and on a light ground), and four more; the largest groups get the first ones.
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"),
    *("#8a63c9", "#999933", "#a8506c", "#8b6b4a"),
)
# When the colours are used up they come again as rings, then as rings with a dot.
SHAPES = ("disc", "ring", "target")
NO_GROUP = "no group"
GREY = "#8b949e"
ACCENT, PAPER = "#0072b2", "#d55e00"


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram: how many classes have 0, 1, ... N correct images."""

    name: str
    counts: Sequence[int]
    colour: str


@dataclass(frozen=True, slots=True)
class MeanLine:
    """A mean of correct images, drawn across a histogram."""

    mean: float
    name: str
    colour: str


@dataclass(frozen=True, slots=True)
class GroupMean:
    """A group's mean of correct images, and the ends of its 95 % interval."""

    name: str
    classes: int
    mean: float
    low: float
    high: float


def report_bars(evaluation: Mapping[str, Any]) -> tuple[list[Bars], list[MeanLine]]:
    """Return an evaluation's histogram, its mean, and the paper's mean beside it."""
    figures, paper = evaluation["figures"], evaluation.get("paper")
    means = [MeanLine(figures["mean_correct"], "mean", ACCENT)]
    means += [MeanLine(paper["mean_correct"], "paper's mean", PAPER)] if paper else []
    return [Bars("", figures["histogram"], ACCENT)], means


def group_means(evaluation: Mapping[str, Any]) -> list[GroupMean]:
    """Return the groups that have classes, the best last, which is at a figure's top."""
    found = []
    for group in evaluation["groups"]:
        if group["classes"]:
            mean = group["mean_correct"]
            low, high = group["intervals"]["mean_correct"] or (mean, mean)
            found.append(GroupMean(group["name"], group["classes"], mean, low, high))
    return sorted(found, key=lambda group: (group.mean, group.name))


# --- The map of classes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupStyle:
    """A group on the map: its colour and shape, and how many classes have them."""

    name: str
    colour: str
    shape: str
    classes: int


@dataclass(frozen=True, slots=True)
class MapCircle:
    """A class on the map: position, and size (0 to 1, the root of its share of correct images)."""

    wnid: str
    x: float
    y: float
    size: float


def group_styles(groups: Iterable[str | None]) -> list[GroupStyle]:
    """Return a style for the group of each class, the largest first, classes without one last.

    >>> [(s.name, s.colour, s.classes) for s in group_styles(["dogs", None, "birds", "dogs"])]
    [('dogs', '#0072b2', 2), ('birds', '#e69f00', 1), ('no group', '#8b949e', 1)]
    """
    counts = Counter(groups)
    without = counts.pop(None, 0)
    looks = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    styles = []
    ranked = sorted(counts.items(), key=lambda group: (-group[1], str(group[0])))
    for rank, (name, classes) in enumerate(ranked):
        colour, shape = looks[rank] if rank < len(looks) else (GREY, "ring")
        styles.append(GroupStyle(str(name), colour, shape, classes))
    return styles + ([GroupStyle(NO_GROUP, GREY, "disc", without)] if without else [])


def map_circles(evaluation: Mapping[str, Any]) -> list[tuple[GroupStyle, list[MapCircle]]]:
    """Return the map's circles by group, in the legend's order, large ones first."""
    positions = evaluation["map"]["places"]
    rows = [row for row in evaluation["classes"] if row["wnid"] in positions]
    styles = group_styles(row["group"] for row in rows)
    found: dict[str, list[MapCircle]] = {style.name: [] for style in styles}
    for row in sorted(rows, key=lambda row: (-row["correct"] / row["images"], row["wnid"])):
        size = (row["correct"] / row["images"]) ** 0.5
        x, y = positions[row["wnid"]]
        found[row["group"] or NO_GROUP].append(MapCircle(row["wnid"], x, y, size))
    return [(style, found[style.name]) for style in styles]


# --- A comparison ------------------------------------------------------------------------------


def side_bars(comparison: Mapping[str, Any]) -> list[Bars]:
    """Return the histogram of each side, in its colour."""
    return [
        Bars(side["name"], side["figures"]["histogram"], COLOURS[index % len(COLOURS)])
        for index, side in enumerate(comparison["sides"])
    ]


def changed_groups(comparison: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """Return the groups that have classes, with each side's rate in percent; most changed last."""
    pairs = comparison["pairs"]
    rows = [group for group in pairs[0]["groups"] if group["classes"]]
    found = []
    for row in sorted(rows, key=lambda row: (row["mean"], row["name"])):
        same = (next(g for g in pair["groups"] if g["name"] == row["name"]) for pair in pairs)
        rates = [row["rates"][0], *(group["rates"][1] for group in same)]
        found.append((row["name"], [100 * rate for rate in rates]))
    return found


def class_rates(comparison: Mapping[str, Any], pair: int) -> dict[tuple[float, float], list[str]]:
    """Return the classes of a pair by their percentages of correct images on both sides."""
    found: dict[tuple[float, float], list[str]] = {}
    for row in comparison["classes"]:
        first, second = (
            round(100 * row["correct"][side] / row["images"][side], 1) for side in (0, pair + 1)
        )
        found.setdefault((first, second), []).append(row["synset"])
    return found


def diameters(classes: Mapping[Any, Sequence[str]], largest: float) -> list[float]:
    """Return a diameter for each circle of classes, so that areas are as their numbers."""
    most = max(map(len, classes.values()))
    return [round(largest * (len(names) / most) ** 0.5, 1) for names in classes.values()]
