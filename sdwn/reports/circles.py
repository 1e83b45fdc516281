"""The class map's groups, circles and labels: the same on pages and in print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdwn.wordnet.imagenet import class_name

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
# Of classes recognised best and worst.
LABELS = 16
# In the map's units, of which the whole map has two: a label's height, and its letters' mean width.
LABEL_HEIGHT = 0.052
LETTER_WIDTH = 0.6 * LABEL_HEIGHT


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


@dataclass(frozen=True, slots=True)
class MapLabel:
    """The name of a class on the map; ``x`` is its left or its right end, as ``side`` says."""

    text: str
    x: float
    y: float
    side: str


def recognition_rank(row: Mapping[str, Any]) -> tuple[float, float, float, str]:
    """Return a class's sort key: the best recognised first.

    Many have all or none correct: of these the one with the most probability on its subtree.
    """
    images, probability = row["images"], row["subtree_probability"] or 0
    return -row["correct"] / images, -row["correct_top5"] / images, -probability, row["wnid"]


def map_circles(evaluation: Mapping[str, Any]) -> list[tuple[GroupStyle, list[MapCircle]]]:
    """Return the circles by group: the largest group first, classes without a group last.

    In a group the large circles are first, so that small ones are drawn over them.
    """
    positions = evaluation["map"]["places"]
    rows = [row for row in evaluation["classes"] if row["wnid"] in positions]
    found: dict[str, list[MapCircle]] = {}
    for row in sorted(rows, key=lambda row: (-row["correct"] / row["images"], row["wnid"])):
        (x, y), size = positions[row["wnid"]], (row["correct"] / row["images"]) ** 0.5
        found.setdefault(row["group"] or NO_GROUP, []).append(MapCircle(row["wnid"], x, y, size))
    looks = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    classes = Counter({name: len(circles) for name, circles in found.items() if name != NO_GROUP})
    ranked = sorted(classes.items(), key=lambda group: (-group[1], group[0]))
    styles = [
        GroupStyle(name, *(looks[rank] if rank < len(looks) else (GREY, "ring")), count)
        for rank, (name, count) in enumerate(ranked)
    ]
    if NO_GROUP in found:
        styles.append(GroupStyle(NO_GROUP, GREY, "disc", len(found[NO_GROUP])))
    return [(style, found[style.name]) for style in styles]


def map_labels(evaluation: Mapping[str, Any]) -> list[MapLabel]:
    """Return labels of the classes recognised best and worst, none over another.

    A label stands right of its circle, or left where there is no room; a class without room on
    either side is passed over for the next best, or the next worst.
    """
    positions = evaluation["map"]["places"]
    rows = sorted(
        (row for row in evaluation["classes"] if row["wnid"] in positions), key=recognition_rank
    )
    # The best, the worst, the next best, the next worst, and so on.
    extremes = [row for pair in zip(rows, rows[::-1], strict=True) for row in pair][: len(rows)]
    left, right = min(x for x, _ in positions.values()), max(x for x, _ in positions.values())
    labels, boxes = list[MapLabel](), list[tuple[float, float, float]]()
    for row in extremes:
        text = f"{class_name(row['wnid'])} {row['correct']}/{row['images']}"
        (x, y), width = positions[row["wnid"]], LETTER_WIDTH * len(text)
        gap = 0.02 + 0.02 * (row["correct"] / row["images"]) ** 0.5
        for start, side in ((x + gap, "left"), (x - gap - width, "right")):
            end = start + width
            apart = (
                end < other_start or other_end < start or abs(y - other_y) > LABEL_HEIGHT
                for other_start, other_end, other_y in boxes
            )
            if start >= left - 0.05 and end <= right + 0.05 and all(apart):
                boxes.append((start, end, y))
                labels.append(MapLabel(text, start if side == "left" else end, y, side))
                break
        if len(labels) == LABELS:
            break
    return labels
