"""Groups of classes by WordNet subtree: read from a file, and their figures."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdwn.config import read_yaml
from sdwn.errors import UsageError
from sdwn.evaluation.metrics import (
    ClassResult,
    figures_of,
    intervals_of,
    metrics_shown,
    tally_of,
)
from sdwn.paths import shipped_file
from sdwn.wordnet.imagenet import class_wnids
from sdwn.wordnet.taxonomy import Taxonomy


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
    path = shipped_file("groups", name or "default")
    content = read_yaml(path, "group names to synsets")
    if not content:
        raise UsageError(f"{path}: expected at least one group, as in animals: animal.n.01")
    groups = []
    for title, identifier in content.items():
        if not isinstance(title, str) or not is_line(title):
            raise UsageError(f"{path}: expected a group's name, a line of text, found {title!r}")
        if not isinstance(identifier, str):
            found = repr(identifier)[:80]
            raise UsageError(f"{path}: {title}: expected a synset such as dog.n.01, found {found}")
        try:
            wnid = taxonomy.find(identifier)
        except UsageError as error:
            raise UsageError(f"{path}: {title}: {error}") from None
        groups.append(Group(title, wnid, taxonomy.name(wnid)))
    return tuple(groups)


def is_line(text: str) -> bool:
    """Return whether a name can be shown: something to see, on one line."""
    unfit = {"Cc", "Cs", "Zl", "Zp"}  # control, half of a character, ends of lines
    return bool(text.strip()) and not any(unicodedata.category(c) in unfit for c in text)


def smallest_groups(
    groups: Sequence[Group], wnids: Iterable[str], taxonomy: Taxonomy
) -> dict[str, str | None]:
    """Map each class to the name of the group that holds it and fewest ImageNet-1k classes.

    So a class has the same one in every release. Of equal groups the first is taken; None where
    no group holds the class.
    """

    def size(group: Group) -> int:
        return sum(taxonomy.is_below(one, group.wnid) for one in class_wnids())

    by_size = sorted(groups, key=size)
    return {
        wnid: next((g.name for g in by_size if taxonomy.is_below(wnid, g.wnid)), None)
        for wnid in wnids
    }


def group_figures(
    groups: Iterable[Group], classes: Sequence[ClassResult], most: int, taxonomy: Taxonomy
) -> list[dict[str, Any]]:
    """Compute the table of groups, in their order; a class counts in each that holds it.

    Figures as in the record of an evaluation, on its scale of ``most``; None for a group without
    classes.
    """
    table = []
    for group in groups:
        rows = [row for row in classes if taxonomy.is_below(row.wnid, group.wnid)]
        shown: dict[str, Any] = {metric.name: None for metric in metrics_shown("group")}
        interval = None
        if rows:
            tally = tally_of(rows, most)
            shown = {name: value for name, value in figures_of(tally).items() if name in shown}
            interval = intervals_of(tally)["mean_correct"]
        table.append(
            {
                **asdict(group),
                "classes": len(rows),
                "images": sum(row.images for row in rows),
                **shown,
                "none_correct_classes": sum(row.correct == 0 for row in rows),
                "all_correct_classes": sum(row.correct == row.images for row in rows),
                "intervals": {"mean_correct": interval},
            }
        )
    return table
