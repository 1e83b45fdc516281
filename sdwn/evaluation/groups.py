"""Groups of classes by WordNet subtree: read from a file, and what was found of each."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdwn import paths as shipped
from sdwn.config import read_yaml
from sdwn.errors import UsageError
from sdwn.evaluation.metrics import (
    ClassResult,
    figures_of,
    intervals_of,
    metrics_shown,
    tally_of,
)
from sdwn.wordnet.imagenet import class_wnids
from sdwn.wordnet.taxonomy import Taxonomy

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Group:
    """The classes that are a synset or lie below it, under a name of the user's."""

    name: str
    wnid: str
    synset: str


def read_groups(name: str | None, taxonomy: Taxonomy) -> tuple[Group, ...]:
    """Read a YAML mapping of names to synsets, from a file or of those shipped.

    Raises:
        UsageError: there is no such file, it is no such mapping, or WordNet has no such synset.
    """
    path = shipped.shipped_file("groups", name or DEFAULT)
    content = read_yaml(path, "group names to synsets")
    if not content:
        raise UsageError(f"{path}: expected at least one group, as in animals: animal.n.01")
    return tuple(_group(path, key, value, taxonomy) for key, value in content.items())


def _group(path: Path, name: Any, identifier: Any, taxonomy: Taxonomy) -> Group:
    if not isinstance(name, str) or not is_line(name):
        raise UsageError(f"{path}: expected a group's name, a line of text, found {name!r}")
    if not isinstance(identifier, str):
        found = repr(identifier)[:80]
        raise UsageError(f"{path}: {name}: expected a synset such as dog.n.01, found {found}")
    try:
        wnid = taxonomy.find(identifier)
    except UsageError as error:
        raise UsageError(f"{path}: {name}: {error}") from None
    return Group(name, wnid, taxonomy.name(wnid))


def is_line(text: str) -> bool:
    """Tell whether a name can be shown: something to see, on one line."""
    unfit = {"Cc", "Cs", "Zl", "Zp"}  # control, half of a character, ends of lines
    return bool(text.strip()) and not any(unicodedata.category(c) in unfit for c in text)


def smallest_groups(
    groups: Sequence[Group], wnids: Iterable[str], taxonomy: Taxonomy
) -> dict[str, str | None]:
    """Name, for each class, the group that holds it and fewest of ImageNet-1k's classes.

    So a class has the same one in every release. Of equal groups the first is taken; None where
    no group holds the class.
    """
    sizes = [sum(taxonomy.is_below(one, group.wnid) for one in class_wnids()) for group in groups]
    by_size = [groups[i].name for i in sorted(range(len(groups)), key=sizes.__getitem__)]
    roots = {group.name: group.wnid for group in groups}

    def smallest(wnid: str) -> str | None:
        return next((name for name in by_size if taxonomy.is_below(wnid, roots[name])), None)

    return {wnid: smallest(wnid) for wnid in wnids}


def group_figures(
    groups: Iterable[Group], classes: Sequence[ClassResult], most: int, taxonomy: Taxonomy
) -> list[dict[str, Any]]:
    """Compute the table of groups, in their order; a class counts in each that holds it.

    Figures as in an `Evaluation`, on its scale of ``most``; None for a group without classes.
    """
    table = []
    for group in groups:
        rows = [row for row in classes if taxonomy.is_below(row.wnid, group.wnid)]
        named = {"name": group.name, "wnid": group.wnid, "synset": group.synset}
        table.append({**named, **_figures(rows, most)})
    return table


def _figures(rows: Sequence[ClassResult], most: int) -> dict[str, Any]:
    shown: dict[str, Any] = {metric.name: None for metric in metrics_shown("group")}
    interval = None
    if rows:
        tally = tally_of(rows, most)
        shown = {key: value for key, value in figures_of(tally).items() if key in shown}
        interval = intervals_of(tally)["mean_correct"]
    return {
        "classes": len(rows),
        "images": sum(row.images for row in rows),
        **shown,
        "none_correct_classes": sum(row.correct == 0 for row in rows),
        "all_correct_classes": sum(row.correct == row.images for row in rows),
        "intervals": {"mean_correct": interval},
    }
