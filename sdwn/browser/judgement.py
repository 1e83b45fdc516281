"""One evaluation of a release: what a classifier said of each image, in arrays."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn.browser.collection import Collection, Entry
from sdwn.browser.shot import Guess, Shot, Verdict
from sdwn.errors import IntegrityError
from sdwn.evaluation.problems import not_its_own
from sdwn.evaluation.record import read_evaluation
from sdwn.prediction.predictions import IMAGE, TOP, disagreements, read_predictions
from sdwn.storage.columns import numbers
from sdwn.wordnet.imagenet import class_index, class_lemmas, class_wnids

# Of an image that was not judged, or whose synset is no class.
NONE = -1


class Judgement:
    """The predictions of one evaluation, held to be of this release, row by row.

    ``record`` is its ``evaluation.json``. ``place`` gives each image's row in the predictions,
    ``rank`` its label's place among the 1000 classes, ``best`` the class seen in it; NONE where
    there is none. ``judged`` and ``right`` count a synset's images that have a label, in the
    order of the collection; black images are counted like any other, as in the evaluation.

    Raises:
        IntegrityError: the record or the predictions are damaged, or of another release.
    """

    def __init__(self, collection: Collection, name: str) -> None:
        release, self.name, self._collection = collection.release, name, collection
        paths = release.paths.evaluation(name)
        self.record: dict[str, Any] = read_evaluation(paths)
        if problem := not_its_own(release, paths, self.record):
            raise IntegrityError(problem)
        table = read_predictions(paths.predictions, release.manifest.most_rows).table
        judged = _judged(release.metadata, self.record)
        if differ := disagreements(table, release.metadata.select(IMAGE).filter(judged)):
            raise IntegrityError(f"{paths.predictions}: {differ[0]}")
        self._fill(table, numbers(judged))

    @property
    def model(self) -> str:
        """The classifier."""
        return str(self.record["classifier"]["model"])

    @property
    def note(self) -> str | None:
        """What a reader should know of what was judged; None if all images were."""
        unjudged = int((self.place == NONE).sum())
        if not unjudged:
            return None
        return (
            f"{unjudged:,} of {len(self.place):,} images are not judged: their synsets are no "
            "classes of ImageNet-1k"
        )

    def shot(self, row: int) -> Shot:
        """Describe an image, with what was said of it."""
        bare = self._collection.shot(row)
        return Shot(bare.wnid, bare.synset, bare.number, row, bare.status, self.verdict(row))

    def tally(self, entry: Entry) -> tuple[int, int]:
        """Count a synset's right images, and those that were judged and have a label."""
        return int(self.right[entry.position]), int(self.judged[entry.position])

    def verdict(self, row: int) -> Verdict | None:
        """Say what was seen in the image of a row; None if it was not judged."""
        place = int(self.place[row])
        if place == NONE:
            return None
        rank, share = int(self.rank[row]), float(self._subtree[place])
        return Verdict(
            top5=tuple(map(_guess, self._top5[place].tolist(), self._shares[place].tolist())),
            right=None if rank == NONE else rank == 0,
            rank=None if rank == NONE else rank,
            subtree_probability=None if np.isnan(share) else share,
        )

    def taken_for(self, rows: NDArray[np.int64]) -> list[tuple[str, str, int]]:
        """Count what images of some rows were taken for: wnid, name, how many; most first."""
        classes, counts = np.unique(self.best[rows], return_counts=True)
        ranked = sorted(zip(counts.tolist(), classes.tolist(), strict=True), key=lambda n: -n[0])
        names = _class_names()
        return [(class_wnids()[i], names[i], count) for count, i in ranked if i != NONE]

    def seen(self, wnid: str) -> NDArray[np.bool_]:
        """Tell, row by row, which images were taken for a class; none if it is no class."""
        found: NDArray[np.bool_] = self.best == class_index().get(wnid, len(class_wnids()))
        return found

    def _fill(self, table: pa.Table, judged: NDArray[np.bool_]) -> None:
        self._top5 = _matrix(table["top5"])
        self._shares = _matrix(table["top5_probability"])
        self._subtree: NDArray[np.float32] = numbers(table["subtree_probability"], np.nan)
        self.place = np.full(len(judged), NONE, np.int32)
        self.place[judged] = np.arange(table.num_rows)
        self.rank, self.best = (np.full(len(judged), NONE, np.int16) for _ in range(2))
        self.rank[judged] = numbers(table["label_rank"], NONE)
        self.best[judged] = self._top5[:, 0]
        self.judged = self._collection.total(self.rank >= 0)
        self.right = self._collection.total(self.rank == 0)


def _judged(metadata: pa.Table, record: dict[str, Any]) -> pa.ChunkedArray:
    """Tell which images were judged; each has a wnid."""
    column = "imagenet_class" if record["selection"] == "imagenet" else "wnid"
    return pc.is_valid(metadata[column])


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    return numbers(column.combine_chunks().flatten()).reshape(-1, TOP)


def _guess(index: int, probability: float) -> Guess:
    return Guess(class_wnids()[index], _class_names()[index], probability)


@cache
def _class_names() -> tuple[str, ...]:
    lemmas = class_lemmas()
    return tuple(lemmas.get(wnid, wnid).partition(",")[0] for wnid in class_wnids())
