"""Scores by WordNet: they judge every synset, whether or not the classifier has it as a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.evaluation.metrics import Floats, intervals
from sdwn.prediction.table import top1
from sdwn.wordnet.imagenet import CLASSES, class_wnids
from sdwn.wordnet.taxonomy import Scope, Taxonomy, scopes

# Of a score, what the figures of many depend on.
_COLUMNS = ("images", "inside", "subtree_probability", "distance")


@dataclass(frozen=True, slots=True)
class SynsetScore:
    """What a classifier sees in the images of one synset.

    ``scope`` is the smallest subtree around it that the classifier has classes in, and
    ``chance`` the share of the classifier's classes that lie there. ``subtree_probability`` is
    the mean probability of these classes together; where ``scope.steps`` is 0 it is the
    in-subtree probability of "Hypernymy Understanding Evaluation of Text-to-Image Models via
    WordNet Hierarchy" (arXiv 2310.09247). ``inside`` counts the images whose best
    ImageNet-1k class lies in the scope; of a classifier that knows more classes than these, many
    scopes have none of the 1000.

    ``distance`` is the mean number of steps from the synset to the best class,
    ``miss_distance`` the same of the images whose best class is not the synset itself, None if
    there is none; ``least_distance`` is that of the nearest of the 1000 classes.
    """

    wnid: str
    images: int
    scope: Scope
    chance: float
    subtree_probability: float | None
    inside: int
    distance: float
    miss_distance: float | None
    least_distance: int


@dataclass(frozen=True)
class _Seen:
    """Which synset each image is of, which class is seen in it: indices into lists of wnids."""

    wnids: list[str]
    synset: NDArray[np.int64]
    top1: NDArray[np.int64]

    @property
    def images(self) -> NDArray[np.int64]:
        return np.bincount(self.synset, minlength=len(self.wnids))

    def totals(self, values: NDArray[Any]) -> Floats:
        """Add up a value an image, synset by synset."""
        found: Floats = np.zeros(len(self.wnids))
        np.add.at(found, self.synset, values)
        return found


def score(
    predictions: pa.Table, taxonomy: Taxonomy, classes: Sequence[str | None]
) -> list[SynsetScore]:
    """Score each synset of the predictions, in the order of wnids.

    ``classes`` are the wnids of the classifier's own classes, which ``subtree_probability`` was
    added up over; the best class is always one of ImageNet-1k.

    Raises:
        UsageError: a synset that WordNet does not have.
    """
    seen = _seen(predictions)
    around = scopes(taxonomy, seen.wnids, classes)
    columns = _columns(seen, predictions["subtree_probability"].to_numpy(), around, taxonomy)
    return [
        SynsetScore(
            wnid=wnid,
            scope=around[wnid],
            chance=len(around[wnid].classes) / len(classes),
            **{name: values[row] for name, values in columns.items()},
        )
        for row, wnid in enumerate(seen.wnids)
    ]


def _columns(
    seen: _Seen, probability: NDArray[np.floating], around: Mapping[str, Scope], taxonomy: Taxonomy
) -> dict[str, list[Any]]:
    inside, distance = _relations(seen, around, taxonomy)
    images, steps, missed = seen.images, seen.totals(distance), seen.totals(distance > 0)
    far = np.full(len(images), np.nan)
    np.divide(steps, missed, out=far, where=missed > 0)
    return {
        "images": images.tolist(),
        "subtree_probability": _plain(seen.totals(probability) / images),
        "inside": seen.totals(inside).astype(np.int64).tolist(),
        "distance": _plain(steps / images),
        "miss_distance": _plain(far),
        "least_distance": _least(seen.wnids, taxonomy),
    }


def _seen(predictions: pa.Table) -> _Seen:
    wnids, synset = np.unique(
        np.asarray(predictions["wnid"].to_pylist(), dtype=str), return_inverse=True
    )
    return _Seen(wnids.tolist(), synset.astype(np.int64), top1(predictions))


def _relations(
    seen: _Seen, around: Mapping[str, Scope], taxonomy: Taxonomy
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Tell, image by image, whether its best class lies in the scope, and how far off it is."""
    names = class_wnids()
    # Each pair once: of ten images of a synset many are taken for the same.
    pairs, place = np.unique(seen.synset * CLASSES + seen.top1, return_inverse=True)
    found = [(seen.wnids[pair // CLASSES], names[pair % CLASSES]) for pair in pairs.tolist()]
    inside = [taxonomy.is_below(best, around[wnid].wnid) for wnid, best in found]
    distance = [taxonomy.distance(wnid, best) for wnid, best in found]
    return np.array(inside)[place], np.array(distance)[place]


def _least(wnids: Sequence[str], taxonomy: Taxonomy) -> list[int]:
    """Count the steps from each synset to the nearest of the 1000 classes."""
    down: dict[str, int] = {}
    for wnid in class_wnids():
        for hypernym, steps in taxonomy.above(wnid).items():
            down[hypernym] = min(steps, down.get(hypernym, steps))
    return [
        min(steps + down[top] for top, steps in taxonomy.above(wnid).items() if top in down)
        for wnid in wnids
    ]


def summaries(scores: Sequence[SynsetScore]) -> dict[str, dict[str, Any] | None]:
    """Sum up the synsets whose scope is their own subtree, and those with a hypernym's.

    ``inside_percent`` is of images; the other figures are means over synsets. ``intervals``
    resamples synsets with all their images, for what depends on the images. None where there is
    no such synset.
    """
    kinds = {
        "own": [row for row in scores if row.scope.steps == 0],
        "nearest": [row for row in scores if row.scope.steps],
    }
    return {kind: _summary(rows) for kind, rows in kinds.items()}


def _summary(rows: Sequence[SynsetScore]) -> dict[str, Any] | None:
    if not rows:
        return None
    # What is not known, None, becomes NaN here.
    columns = {name: np.array([getattr(row, name) for row in rows], float) for name in _COLUMNS}
    means = {name: values.mean() for name, values in columns.items()}
    found = {name: _plain(value[None])[0] for name, value in _statistics(means).items()}
    return {
        "synsets": len(rows),
        "images": int(columns["images"].sum()),
        **found,
        "chance": float(np.mean([row.chance for row in rows])),
        "least_distance": float(np.mean([row.least_distance for row in rows])),
        "intervals": {
            name: None if found[name] is None else interval
            for name, interval in intervals(columns, _statistics).items()
        },
    }


def _statistics(means: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "subtree_probability": means["subtree_probability"],
        "inside_percent": 100 * means["inside"] / means["images"],
        "distance": means["distance"],
    }


def _plain(values: Floats) -> list[float | None]:
    """Turn numbers into what JSON can hold: NaN, which is not known, into None."""
    return [None if np.isnan(value) else value for value in values.tolist()]
