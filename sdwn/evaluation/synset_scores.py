"""Scores by WordNet, for every synset, whether or not the classifier has it as a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.evaluation.metrics import Floats, intervals
from sdwn.prediction.table import group_by_wnid, top1
from sdwn.storage.columns import numbers
from sdwn.wordnet.imagenet import CLASSES, class_wnids
from sdwn.wordnet.taxonomy import NearestSubtree, Taxonomy, nearest_subtrees

# Of a score, what the figures of many depend on.
_COLUMNS = ("images", "inside", "subtree_probability", "distance")


@dataclass(frozen=True, slots=True)
class SynsetScore:
    """The figures of one synset: what a classifier sees in its images, by WordNet.

    ``subtree`` is the smallest one around it that the classifier has classes in, and ``chance``
    the share of the classifier's classes that lie there. ``subtree_probability`` is the mean
    probability of these classes together; where ``subtree.steps`` is 0 it is the in-subtree
    probability of "Hypernymy Understanding Evaluation of Text-to-Image Models via WordNet
    Hierarchy" (arXiv 2310.09247). ``inside`` counts the images whose best ImageNet-1k class lies
    in the subtree; of a classifier that knows more classes than these, many subtrees have none of
    the 1000.

    ``distance`` is the mean number of steps from the synset to the best class,
    ``miss_distance`` the same of the images whose best class is not the synset itself, None if
    there is none; ``least_distance`` is that of the nearest of the 1000 classes.
    """

    wnid: str
    images: int
    subtree: NearestSubtree
    chance: float
    subtree_probability: float | None
    inside: int
    distance: float
    miss_distance: float | None
    least_distance: int


def score_synsets(
    predictions: pa.Table, taxonomy: Taxonomy, classes: Sequence[str | None]
) -> list[SynsetScore]:
    """Score each synset of the predictions, in the order of wnids.

    ``classes`` are the wnids of the classifier's own classes, which ``subtree_probability`` was
    added up over; the best class is always one of ImageNet-1k.

    Raises:
        UsageError: a synset that WordNet does not have.
    """
    wnids, of_image = group_by_wnid(predictions)
    subtrees = nearest_subtrees(taxonomy, wnids, classes)

    def totals(values: NDArray[Any]) -> Floats:
        """Add up a value an image, synset by synset."""
        found: Floats = np.zeros(len(wnids))
        np.add.at(found, of_image, values)
        return found

    # Each pair of synset and best class once: of ten images many are classified the same.
    pairs, of_pair = np.unique(of_image * CLASSES + top1(predictions), return_inverse=True)
    found = [(wnids[pair // CLASSES], class_wnids()[pair % CLASSES]) for pair in pairs.tolist()]
    inside = np.array([taxonomy.is_below(best, subtrees[wnid].wnid) for wnid, best in found])
    steps = np.array([taxonomy.distance(wnid, best) for wnid, best in found])[of_pair]
    images = np.bincount(of_image, minlength=len(wnids))
    probability = totals(numbers(predictions["subtree_probability"], np.nan)) / images
    far, missed = totals(steps), totals(steps > 0)
    miss_distance = np.divide(far, missed, out=np.full(len(wnids), np.nan), where=missed > 0)
    # Steps down from each hypernym to the nearest of the 1000 classes below it.
    down: dict[str, int] = {}
    for wnid in class_wnids():
        for hypernym, up in taxonomy.above(wnid).items():
            down[hypernym] = min(up, down.get(hypernym, up))
    columns: dict[str, list[Any]] = {
        "images": images.tolist(),
        "subtree_probability": _plain(probability),
        "inside": totals(inside[of_pair]).astype(np.int64).tolist(),
        "distance": _plain(far / images),
        "miss_distance": _plain(miss_distance),
        "least_distance": [
            min(up + down[top] for top, up in taxonomy.above(wnid).items() if top in down)
            for wnid in wnids
        ],
    }
    return [
        SynsetScore(
            wnid=wnid,
            subtree=subtrees[wnid],
            chance=len(subtrees[wnid].classes) / len(classes),
            **{name: values[row] for name, values in columns.items()},
        )
        for row, wnid in enumerate(wnids)
    ]


def summarise_scores(scores: Sequence[SynsetScore]) -> dict[str, dict[str, Any] | None]:
    """Sum up the synsets whose subtree is their own, and those with a hypernym's.

    ``inside_percent`` is of images; the other figures are means over synsets. ``intervals``
    resamples synsets with all their images, for what depends on the images. None where there is
    no such synset.
    """
    own = [row for row in scores if row.subtree.steps == 0]
    return {"own": _summary(own), "nearest": _summary([row for row in scores if row.subtree.steps])}


def _summary(rows: Sequence[SynsetScore]) -> dict[str, Any] | None:
    if not rows:
        return None
    # What is not known, None, becomes NaN here.
    columns = {name: np.array([getattr(row, name) for row in rows], float) for name in _COLUMNS}

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
        "chance": float(np.mean([row.chance for row in rows])),
        "least_distance": float(np.mean([row.least_distance for row in rows])),
        "intervals": {
            name: None if found[name] is None else interval
            for name, interval in intervals(columns, statistics).items()
        },
    }


def _plain(values: Floats) -> list[float | None]:
    """Turn numbers into what JSON can hold: NaN, which is not known, into None."""
    return [None if np.isnan(value) else value for value in values.tolist()]
