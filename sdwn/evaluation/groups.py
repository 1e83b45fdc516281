"""Figures by WordNet: of groups of classes, and of every synset, whether a class or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.config import read_yaml
from sdwn.errors import UsageError
from sdwn.evaluation import metrics
from sdwn.evaluation.metrics import ClassResult, Floats, metrics_shown
from sdwn.paths import shipped_file
from sdwn.prediction.table import group_by_wnid, top1
from sdwn.storage.columns import numbers
from sdwn.wordnet.imagenet import CLASSES, class_wnids
from sdwn.wordnet.taxonomy import Taxonomy, nearest_subtrees

# --- Groups of classes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """The classes that are a synset or lie below it, under a name of the user's."""

    name: str
    wnid: str
    synset: str


def read_groups(name: str | None, taxonomy: Taxonomy) -> tuple[Group, ...]:
    """Read a YAML mapping of names to synsets, from a file or of those shipped."""
    path = shipped_file("groups", name or "default")
    content = read_yaml(path, "group names to synsets")
    if not content:
        raise UsageError(f"{path}: expected at least one group, as in animals: animal.n.01")
    groups = []
    for title, identifier in content.items():
        try:
            found = taxonomy.synset(str(identifier))
        except UsageError as error:
            raise UsageError(f"{path}: {title}: {error}") from None
        groups.append(Group(str(title), found.wnid, found.name))
    return tuple(groups)


def smallest_groups(
    groups: Sequence[Group], wnids: Iterable[str], taxonomy: Taxonomy
) -> dict[str, str | None]:
    """Map each class to the name of the group that holds it and fewest ImageNet-1k classes.

    So a class has the same one in every release. Of equal groups the first is taken; None where
    no group holds the class.
    """
    by_size = sorted(groups, key=lambda g: sum(taxonomy.is_below(c, g.wnid) for c in class_wnids()))
    return {
        wnid: next((g.name for g in by_size if taxonomy.is_below(wnid, g.wnid)), None)
        for wnid in wnids
    }


def group_figures(
    groups: Iterable[Group], classes: Sequence[ClassResult], most: int, taxonomy: Taxonomy
) -> list[dict[str, Any]]:
    """Compute the table of groups, in their order; a class counts in each that holds it."""
    table = []
    for group in groups:
        rows = [row for row in classes if taxonomy.is_below(row["wnid"], group.wnid)]
        tally = metrics.tally_of(rows, most) if rows else None
        figures = metrics.figures_of(tally) if tally else {}
        table.append(
            {
                **asdict(group),
                "classes": len(rows),
                "images": sum(row["images"] for row in rows),
                **{metric.name: figures.get(metric.name) for metric in metrics_shown("group")},
                "none_correct_classes": sum(row["correct"] == 0 for row in rows),
                "all_correct_classes": sum(row["correct"] == row["images"] for row in rows),
                "intervals": {
                    "mean_correct": metrics.intervals_of(tally)["mean_correct"] if tally else None
                },
            }
        )
    return table


# --- Every synset ------------------------------------------------------------------------------
def score_synsets(
    predictions: pa.Table, taxonomy: Taxonomy, classes: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Score each synset of the predictions, in the order of wnids.

    ``classes`` are the wnids of the classifier's own classes. The ``scope`` is the smallest subtree
    around a synset that has some of them, ``scope_steps`` up; ``chance`` is the share of them that
    lie there, ``subtree_probability`` the mean probability of these together; where ``scope_steps``
    is 0 it is the in-subtree probability of "Hypernymy Understanding Evaluation of Text-to-Image
    Models via WordNet Hierarchy" (arXiv 2310.09247). ``inside`` counts the images whose best
    ImageNet-1k class lies in the subtree; of a classifier that knows more classes than these, many
    subtrees have none of the 1000. ``distance`` is the mean number of steps from the synset to the
    best class, ``miss_distance`` the same of the images whose best class is not the synset itself,
    None if there is none; ``least_distance`` is that of the nearest of the 1000 classes.
    """
    wnids, of_image = group_by_wnid(predictions)
    subtrees = nearest_subtrees(taxonomy, wnids, classes)

    def totals(values: NDArray[Any]) -> Floats:
        found: Floats = np.zeros(len(wnids))
        np.add.at(found, of_image, values)
        return found

    # Each pair of synset and best class once: of ten images many are classified the same.
    pairs, of_pair = np.unique(of_image * CLASSES + top1(predictions), return_inverse=True)
    found = [(wnids[pair // CLASSES], class_wnids()[pair % CLASSES]) for pair in pairs.tolist()]
    inside = np.array([taxonomy.is_below(best, subtrees[wnid].wnid) for wnid, best in found])
    steps = np.array([taxonomy.distance(wnid, best) for wnid, best in found])[of_pair]
    images = np.bincount(of_image, minlength=len(wnids))
    far, missed = totals(steps), totals(steps > 0)
    miss_distance = np.divide(far, missed, out=np.full(len(wnids), np.nan), where=missed > 0)
    # Steps down from each hypernym to the nearest of the 1000 classes below it.
    down: dict[str, int] = {}
    for wnid in class_wnids():
        for hypernym, up in taxonomy.above(wnid).items():
            down[hypernym] = min(up, down.get(hypernym, up))
    columns = {
        "images": images.tolist(),
        "subtree_probability": _plain(
            totals(numbers(predictions["subtree_probability"], np.nan)) / images
        ),
        "inside": totals(inside[of_pair]).astype(np.int64).tolist(),
        "distance": _plain(far / images),
        "miss_distance": _plain(miss_distance),
    }
    rows = []
    for row, wnid in enumerate(wnids):
        subtree, above = subtrees[wnid], taxonomy.above(wnid)
        rows.append(
            {
                "wnid": wnid,
                "synset": taxonomy.synset(wnid).name,
                "scope_wnid": subtree.wnid,
                "scope_synset": taxonomy.synset(subtree.wnid).name,
                "scope_steps": subtree.steps,
                "scope_classes": len(subtree.classes),
                "chance": len(subtree.classes) / len(classes),
                **{name: values[row] for name, values in columns.items()},
                "least_distance": min(up + down[top] for top, up in above.items() if top in down),
            }
        )
    return rows


def summarise_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Sum up the synsets whose subtree is their own, and those with a hypernym's.

    ``inside_percent`` is of images; the other figures are means over synsets. None where there is
    no such synset.
    """
    own = [row for row in scores if row["scope_steps"] == 0]
    return {
        "own": _summary(own),
        "nearest": _summary([row for row in scores if row["scope_steps"]]),
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    # What is not known, None, becomes NaN here.
    columns = {
        name: np.array([row[name] for row in rows], float)
        for name in ("images", "inside", "subtree_probability", "distance")
    }

    def statistics(means: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "subtree_probability": means["subtree_probability"],
            "inside_percent": 100 * means["inside"] / means["images"],
            "distance": means["distance"],
        }

    means = statistics({name: values.mean() for name, values in columns.items()})
    found = {name: _plain(value[None])[0] for name, value in means.items()}
    return {
        "synsets": len(rows),
        "images": int(columns["images"].sum()),
        **found,
        "chance": float(np.mean([row["chance"] for row in rows])),
        "least_distance": float(np.mean([row["least_distance"] for row in rows])),
        "intervals": {
            name: None if found[name] is None else interval
            for name, interval in metrics.intervals(columns, statistics).items()
        },
    }


def _plain(values: Floats) -> list[float | None]:
    """Turn numbers into what JSON can hold: NaN, which is not known, into None."""
    return [None if np.isnan(value) else value for value in values.tolist()]
