"""A release's synsets and images, and what a classifier predicted, as arrays.

Pages count over 26,204 synsets and 262,040 images at once (how many are correct? which are
black?), so all facts about images stand in arrays with a value for each row of the release,
and all counts of synsets in arrays with a value for each ``position`` of a synset by name:

    rows of the release   number, status, position, rank, best class, ...
      |  order, starts    (the rows of each synset, by number)
    positions of synsets  entries, images, black, labelled, correct, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn.errors import IntegrityError
from sdwn.prediction.table import IMAGE, TOP, disagreements, read_predictions
from sdwn.releases.release import Release
from sdwn.storage.columns import BLACK, STATUSES, numbers
from sdwn.wordnet.imagenet import class_index, class_name, class_wnids

Rows = NDArray[np.int64]
# Of an image that was not classified, or whose synset is no ImageNet class.
NONE = -1


@dataclass(frozen=True, slots=True)
class Guess:
    """One of the classes that a classifier predicted: wnid, first lemma, probability."""

    wnid: str
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A classifier's prediction of an image, the best classes first.

    ``correct`` and ``rank`` (of the label among the 1000 classes, from 0) are None where the
    synset is no ImageNet-1k class, ``subtree_probability`` where it has no class at or below it.
    """

    top5: tuple[Guess, ...]
    correct: bool | None
    rank: int | None
    subtree_probability: float | None


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image as pages show it.

    ``row`` is its index in the release; ``prediction`` is None where it was not classified.
    """

    wnid: str
    synset: str
    number: int
    row: int
    status: str
    prediction: Prediction | None = None

    @property
    def black(self) -> bool:
        """True if it shows nothing: blackened by the safety checker, NaN, or imported so."""
        return self.status in BLACK

    @property
    def state(self) -> str:
        """One of right, wrong, black, unjudged and other, as in addresses and ``show --json``.

        A black image is black whatever was predicted. ``other`` was classified, but whether
        correctly is not known: its synset is no ImageNet-1k class.
        """
        if self.black:
            return "black"
        if self.prediction is None:
            return "unjudged"
        if self.prediction.correct is None:
            return "other"
        return "right" if self.prediction.correct else "wrong"


# Not frozen, for that takes three times as long, and there are 26,204.
@dataclass(slots=True)
class Entry:
    """A synset that has images here; ``position`` is its index by name.

    ``prompt`` is the one of all its images, None where they differ or it is not recorded.
    ``lemmas`` have spaces between words.
    """

    position: int
    wnid: str
    synset: str
    lemmas: tuple[str, ...]
    definition: str
    prompt: str | None
    imagenet_class: int | None
    images: int
    black: int

    @property
    def label(self) -> str:
        """The first lemma, which people call it by."""
        return self.lemmas[0] if self.lemmas else self.synset


class Collection:
    """A release's synsets by name, and its images by synset and number; threads may share it.

    Attributes:
        entries: the synsets, by position.
        order: rows of the release, synset by synset, within a synset by number.
        starts: ``order[starts[p]:starts[p + 1]]`` are the rows of the synset at position p.
        numbers, positions, black: by row; ``statuses`` also, as indices in ``STATUSES``.
        by_wnid: the same by wnid.
        in_imagenet: by position, whether a synset is an ImageNet-1k class.

    Raises:
        IntegrityError: the release's table is damaged.
    """

    def __init__(self, release: Release) -> None:
        self.release = release
        table = release.metadata
        if problem := _problem(release, table):
            raise IntegrityError(f"{release.paths.metadata}: {problem}")
        columns = (table[name].combine_chunks() for name in ("wnid", "synset", "status"))
        wnids, names, statuses = (column.dictionary_encode() for column in columns)
        codes = numbers(wnids.indices)
        # Codes count up in the order in which wnids appear; a synset's first row has its name.
        _, first = np.unique(codes, return_index=True)
        texts = names.dictionary.to_pylist()
        named = [texts[code] for code in numbers(names.indices)[first].tolist()]
        synsets = list(zip(named, wnids.dictionary.to_pylist(), strict=True))
        by_name = np.array(sorted(range(len(synsets)), key=synsets.__getitem__), int)
        self.numbers: NDArray[np.uint32] = numbers(table["number"])
        self.positions: NDArray[np.int32] = np.argsort(by_name).astype(np.int32)[codes]
        known = np.array([STATUSES.index(one) for one in statuses.dictionary.to_pylist()], np.uint8)
        self.statuses: NDArray[np.uint8] = known[numbers(statuses.indices)]
        self.black: NDArray[np.bool_] = np.isin(self.statuses, [STATUSES.index(s) for s in BLACK])
        self.order: Rows = np.lexsort((self.numbers, self.positions))
        counts = np.bincount(self.positions, minlength=len(synsets))
        self.starts: Rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.entries = self._entries([synsets[i] for i in by_name.tolist()])
        self.in_imagenet = np.array([e.imagenet_class is not None for e in self.entries], bool)
        self.by_wnid = {entry.wnid: entry for entry in self.entries}

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, wnid: str) -> Entry | None:
        """Find a synset that has images here."""
        return self.by_wnid.get(wnid)

    def rows(self, wnid: str) -> Rows:
        """Return the rows of a synset's images, by number; none if it has none."""
        entry = self.entry(wnid)
        return self.rows_at(entry.position) if entry else self.order[:0]

    def rows_at(self, position: int) -> Rows:
        """Return the rows of the images of the synset at a position, by number."""
        return self.order[self.starts[position] : self.starts[position + 1]]

    def count(self, mask: NDArray[np.bool_]) -> Rows:
        """Count, by position, each synset's images of a mask of rows."""
        found: Rows = np.bincount(self.positions[mask], minlength=len(self.starts) - 1)
        return found

    def _entries(self, synsets: Sequence[tuple[str, str]]) -> tuple[Entry, ...]:
        images, black = np.diff(self.starts).tolist(), self.count(self.black).tolist()
        prompts, planned, found = self._prompts(), self.release.synsets, []
        for position, (name, wnid) in enumerate(synsets):
            known = planned.get(wnid)
            joined = known.lemmas.replace("_", " ") if known else ""
            found.append(
                Entry(
                    position=position,
                    wnid=wnid,
                    synset=name,
                    lemmas=tuple(joined.split(", ")) if joined else (),
                    definition=known.definition if known else "",
                    prompt=prompts[position],
                    imagenet_class=known.imagenet_class if known else None,
                    images=images[position],
                    black=black[position],
                )
            )
        return tuple(found)

    def _prompts(self) -> list[str | None]:
        """Return, by position, the prompt of each synset whose images have one and the same."""
        table, count = self.release.metadata, len(self.starts) - 1
        if "prompt" not in table.column_names or not count:
            return [None] * count
        prompts = table["prompt"].combine_chunks().dictionary_encode("encode")
        codes = numbers(prompts.indices)[self.order]
        # Of each synset the first image's prompt, and whether any of its images has another.
        first, at = codes[self.starts[:-1]], np.repeat(np.arange(count), np.diff(self.starts))
        differs = (np.bincount(at[codes != first[at]], minlength=count) > 0).tolist()
        texts = prompts.dictionary.to_pylist()
        return [None if differs[i] else texts[code] for i, code in enumerate(first.tolist())]


def _problem(release: Release, table: pa.Table) -> str | None:
    """Describe what is wrong with a release's table; None if nothing is."""
    if table.num_rows != len(release):
        return f"expected {len(release)} images, as in the manifest, found {table.num_rows}"
    named = table["status"].unique().to_pylist()
    if unknown := [status for status in named if status not in STATUSES]:
        return f"status: expected one of {', '.join(STATUSES)}, found {unknown[0][:40]!r}"
    if "prompt" in table.column_names and table["prompt"].type != pa.string():
        return f"prompt: expected {pa.string()}, found {table['prompt'].type}"
    return None


class ImagePredictions:
    """The predictions of one evaluation of a release, by row; threads may share it.

    Attributes:
        record: the evaluation's ``evaluation.json``.
        rank: by row, of the label among the 1000 classes, from 0; NONE where there is none.
        best: by row, the index of the predicted class; NONE where not classified.
        unclassified: how many images were not classified.
        labelled, correct: by position, how many images have a label, and how many of these are
            correct. Black images are counted like any other, as in the evaluation.

    Raises:
        IntegrityError: the predictions are damaged, or of another release.
    """

    def __init__(self, collection: Collection, name: str, record: dict[str, Any]) -> None:
        self.name, self.record = name, record
        self.model = str(record["classifier"]["model"])
        release = collection.release
        path = release.paths.evaluation(name).predictions
        table = read_predictions(path, release.manifest.most_rows).table
        # Each image has a wnid; the label is what only images of ImageNet classes have.
        column = "imagenet_class" if record["selection"] == "imagenet" else "wnid"
        chosen = pc.is_valid(release.metadata[column])
        if differ := disagreements(table, release.metadata.select(IMAGE).filter(chosen)):
            raise IntegrityError(f"{path}: {differ[0]}")
        classified = numbers(chosen)
        rows = len(classified)
        self._top5 = np.full((rows, TOP), NONE, np.int16)
        self._top5[classified] = numbers(table["top5"].combine_chunks().flatten()).reshape(-1, TOP)
        self._probabilities = np.zeros((rows, TOP), np.float32)
        shares = numbers(table["top5_probability"].combine_chunks().flatten())
        self._probabilities[classified] = shares.reshape(-1, TOP)
        self._subtree = np.full(rows, np.nan, np.float32)
        self._subtree[classified] = numbers(table["subtree_probability"], np.nan)
        self.best = self._top5[:, 0]
        self.unclassified = int(np.count_nonzero(self.best == NONE))
        self.rank = np.full(rows, NONE, np.int16)
        self.rank[classified] = numbers(table["label_rank"], NONE)
        self.labelled = collection.count(self.rank >= 0)
        self.correct = collection.count(self.rank == 0)

    def of_row(self, row: int) -> Prediction | None:
        """Return an image's prediction; None if it was not classified."""
        if self.best[row] == NONE:
            return None
        wnids, rank, subtree = class_wnids(), int(self.rank[row]), float(self._subtree[row])
        best = zip(self._top5[row].tolist(), self._probabilities[row].tolist(), strict=True)
        return Prediction(
            top5=tuple(Guess(wnids[i], class_name(wnids[i]), share) for i, share in best),
            correct=None if rank == NONE else rank == 0,
            rank=None if rank == NONE else rank,
            subtree_probability=None if np.isnan(subtree) else subtree,
        )

    def classified_as(self, wnid: str) -> NDArray[np.bool_]:
        """Return which rows were classified as a class."""
        found: NDArray[np.bool_] = self.best == class_index()[wnid]
        return found

    def predicted_classes(self, rows: Rows) -> list[tuple[str, str, int]]:
        """Count what images were classified as: wnid, name, how many; most first."""
        classes, counts = np.unique(self.best[rows], return_counts=True)
        ranked = sorted(zip(counts.tolist(), classes.tolist(), strict=True), key=lambda n: -n[0])
        found = [(class_wnids()[i], n) for n, i in ranked if i != NONE]
        return [(wnid, class_name(wnid), n) for wnid, n in found]
