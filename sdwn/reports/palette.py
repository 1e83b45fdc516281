"""How groups of classes look, alike on the page and in print: order, colours, circles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours, which most colour-blind readers tell apart, without black and yellow
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


def ranked_groups(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the groups that have classes, the one recognised best last: at the top of a figure."""
    rows = [group for group in evaluation["groups"] if group["classes"]]
    return sorted(rows, key=lambda group: (group["mean_correct"], group["name"]))


@dataclass(frozen=True, slots=True)
class GroupStyle:
    """A group on the map: its colour and shape, and how many classes wear them."""

    name: str
    colour: str
    shape: str
    classes: int


def group_styles(groups: Iterable[str | None]) -> list[GroupStyle]:
    """Give a style to the group of each class, the largest first, what has no group last.

    >>> [(s.name, s.colour, s.classes) for s in group_styles(["dogs", None, "birds", "dogs"])]
    [('dogs', '#0072b2', 2), ('birds', '#e69f00', 1), ('no group', '#8b949e', 1)]
    """
    counts = Counter(groups)
    others = counts.pop(None, 0)
    ranked = sorted(((name, n) for name, n in counts.items() if name), key=lambda g: (-g[1], g[0]))
    styles = [GroupStyle(name, *_look(place), n) for place, (name, n) in enumerate(ranked)]
    return styles + ([GroupStyle(NO_GROUP, GREY, "disc", others)] if others else [])


def _look(place: int) -> tuple[str, str]:
    turn, colour = divmod(place, len(COLOURS))
    return (COLOURS[colour], SHAPES[turn]) if turn < len(SHAPES) else (GREY, "ring")


@dataclass(frozen=True, slots=True)
class Circle:
    """A class on the map: where, how large (0 to 1, the root of its share of right images)."""

    wnid: str
    x: float
    y: float
    size: float


def circles(evaluation: dict[str, Any]) -> list[tuple[GroupStyle, list[Circle]]]:
    """Gather the map's circles by group, in the legend's order, large ones first."""
    places = evaluation["map"]["places"]
    placed = [row for row in evaluation["classes"] if row["wnid"] in places]
    styles = group_styles(row["group"] for row in placed)
    found: dict[str, list[Circle]] = {style.name: [] for style in styles}
    for row in sorted(placed, key=lambda row: (-row["correct"] / row["images"], row["wnid"])):
        size = (row["correct"] / row["images"]) ** 0.5
        x, y = places[row["wnid"]]
        found[row["group"] or NO_GROUP].append(Circle(row["wnid"], x, y, size))
    return [(style, found[style.name]) for style in styles]
