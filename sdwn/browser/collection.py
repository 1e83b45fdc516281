"""A release's synsets and images, and what a classifier predicted, as arrays.

Pages count over 26,204 synsets and 262,040 images at once (how many are correct? which are
black?), so all facts about images stand in arrays with a value for each row of the release,
and all counts of synsets in arrays with a value for each ``position`` of a synset by name:

    rows of the release   number, status, position, rank, best class, ...
      |  order, starts    (the rows of each synset, by number)
    positions of synsets  entries, images, black, labelled, correct, ...
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn.errors import DiskError, IntegrityError
from sdwn.prediction.table import TOP, read_predictions
from sdwn.releases.release import Release
from sdwn.storage.codecs import CODECS, ImageCodec
from sdwn.storage.columns import BLACK, STATUSES, numbers
from sdwn.storage.images import decode
from sdwn.wordnet.imagenet import class_name, class_wnids

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
# Of an image that was not classified, or whose synset is no ImageNet class.
NONE = -1
# Thumbnails kept in memory: of photographs about 10 MB, of noise 40.
KEPT = 1024


class Guess(NamedTuple):
    """One of the classes that a classifier predicted: wnid, first lemma, probability."""

    wnid: str
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image as pages show it: its row in the release, and what a classifier predicted.

    ``top5`` is empty where it was not classified. ``correct`` and ``rank`` (of the label among the
    1000 classes, from 0) are None where the synset is no ImageNet-1k class,
    ``subtree_probability`` where it has no class at or below it.
    """

    wnid: str
    synset: str
    number: int
    row: int
    status: str
    top5: tuple[Guess, ...] = ()
    correct: bool | None = None
    rank: int | None = None
    subtree_probability: float | None = None

    @property
    def black(self) -> bool:
        """True if it shows nothing: blackened by the safety checker, NaN, or imported so."""
        return self.status in BLACK

    @property
    def state(self) -> str:
        """One of right, wrong, black (whatever was predicted), unjudged, and other: no class."""
        if self.black:
            return "black"
        if not self.top5:
            return "unjudged"
        return {None: "other", True: "right", False: "wrong"}[self.correct]


# Not frozen, for that takes three times as long, and there are 26,204.
@dataclass(slots=True)
class Entry:
    """A synset that has images here; ``position`` is its index by name.

    ``prompt`` is the one of all its images, None where they differ or it is not recorded.
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

    What reads an image raises IntegrityError where it is damaged or its disk does not answer.

    Attributes:
        entries: the synsets, by position; ``by_wnid``, the same by wnid.
        order: rows of the release, synset by synset, within a synset by number.
        starts: ``order[starts[p]:starts[p + 1]]`` are the rows of the synset at position p.
        numbers, positions, statuses, black: by row.
    """

    def __init__(self, release: Release) -> None:
        self.release, table = release, release.metadata
        self.thumbnail = lru_cache(KEPT)(self._thumbnail)
        columns = (table[name].combine_chunks() for name in ("wnid", "synset", "status"))
        wnids, names, statuses = (column.dictionary_encode() for column in columns)
        known = np.array(statuses.dictionary.to_pylist(), str)
        if unknown := set(known.tolist()) - set(STATUSES):
            raise IntegrityError(f"{release.paths.metadata}: no status {min(unknown)[:40]!r}")
        codes = numbers(wnids.indices)
        # Codes count up in the order in which wnids appear; a synset's first row has its name.
        _, first = np.unique(codes, return_index=True)
        texts = names.dictionary.to_pylist()
        named = [texts[code] for code in numbers(names.indices)[first].tolist()]
        synsets = list(zip(named, wnids.dictionary.to_pylist(), strict=True))
        by_name = sorted(range(len(synsets)), key=synsets.__getitem__)
        self.numbers: NDArray[np.uint32] = numbers(table["number"])
        self.positions: Rows = np.argsort(by_name)[codes] if len(codes) else np.arange(0)
        self.statuses: NDArray[np.str_] = known[numbers(statuses.indices)]
        self.black: Mask = np.isin(self.statuses, BLACK)
        self.order: Rows = np.lexsort((self.numbers, self.positions))
        counts = np.bincount(self.positions, minlength=len(synsets))
        self.starts: Rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

        prompts, planned = self._prompts(len(synsets)), release.synsets
        black, self.entries = self.count(self.black).tolist(), list[Entry]()
        for position, index in enumerate(by_name):
            name, wnid = synsets[index]
            own, prompt, images = planned.get(wnid), prompts[position], int(counts[position])
            lemmas = tuple(own.lemmas.replace("_", " ").split(", ")) if own and own.lemmas else ()
            said = (own.definition, prompt, own.imagenet_class) if own else ("", prompt, None)
            entry = Entry(position, wnid, name, lemmas, *said, images, black[position])
            self.entries.append(entry)
        self.by_wnid = {entry.wnid: entry for entry in self.entries}

    def __len__(self) -> int:
        return len(self.entries)

    def rows(self, wnid: str) -> Rows:
        """Return the rows of a synset's images, by number; none if it has none."""
        entry = self.by_wnid.get(wnid)
        return self.rows_at(entry.position) if entry else self.order[:0]

    def rows_at(self, position: int) -> Rows:
        """Return the rows of the images of the synset at a position, by number."""
        return self.order[self.starts[position] : self.starts[position + 1]]

    def count(self, mask: Mask) -> Rows:
        """Count, by position, each synset's images of a mask of rows."""
        found: Rows = np.bincount(self.positions[mask], minlength=len(self.starts) - 1)
        return found

    def read(self, row: int) -> tuple[bytes, ImageCodec]:
        """Return an image as it is stored, and its codec; raw pixels as PNG, for browsers."""
        codec = CODECS.get(self.release.location(row)["codec"])
        if codec is not None and codec.media_type:
            return self.payload(row), codec
        return self._encoded(row, "PNG", compress_level=1), CODECS["png"]

    def payload(self, row: int) -> bytes:
        """Return the bytes that are stored of an image."""
        try:
            return self.release.payload(self.release.location(row))
        except DiskError as error:
            raise IntegrityError(f"it cannot be read: {str(error).partition(';')[0]}") from None

    def _thumbnail(self, row: int, pixels: int) -> bytes:
        """Return an image as WebP, its longer side of so many pixels or as small as it is."""
        return self._encoded(row, "WEBP", pixels, quality=80, method=2)

    def _encoded(self, row: int, form: str, pixels: int | None = None, **options: int) -> bytes:
        where, buffer = self.release.location(row), io.BytesIO()
        image = decode(self.payload(row), where["codec"], where["width"], where["height"])
        if pixels is not None:
            image.thumbnail((pixels, pixels), reducing_gap=2.0)
        image.save(buffer, form, **options)
        return buffer.getvalue()

    def _prompts(self, count: int) -> list[str | None]:
        """Return, by position, the prompt of each synset whose images have one and the same."""
        table = self.release.metadata
        if "prompt" not in table.column_names or table["prompt"].type != pa.string() or not count:
            return [None] * count
        prompts = table["prompt"].combine_chunks().dictionary_encode("encode")
        codes = numbers(prompts.indices)[self.order]
        # Of each synset the first image's prompt, and whether any of its images has another.
        first, at = codes[self.starts[:-1]], np.repeat(np.arange(count), np.diff(self.starts))
        differs = (np.bincount(at[codes != first[at]], minlength=count) > 0).tolist()
        texts = prompts.dictionary.to_pylist()
        return [None if differs[i] else texts[code] for i, code in enumerate(first.tolist())]


class ImagePredictions:
    """The predictions of one evaluation of a release, by row; threads may share it.

    Attributes:
        record: the evaluation's ``evaluation.json``; ``model``, the classifier in it.
        rank, best: by row, the label's rank from 0, and the predicted class; NONE where unknown.
        labelled, correct: by position, how many images have a label, and how many of these are
            correct. Black images are counted like any other, as in the evaluation.
    """

    def __init__(self, collection: Collection, name: str, record: dict[str, Any]) -> None:
        self.name, self.record, release = name, record, collection.release
        self.model = str(record["classifier"]["model"])
        path = release.paths.evaluation(name).predictions
        table = read_predictions(path, release.manifest.most_rows).table
        # Each image has a wnid; the label is what only images of ImageNet classes have.
        column = "imagenet_class" if record["selection"] == "imagenet" else "wnid"
        classified = numbers(pc.is_valid(release.metadata[column]))
        if len(table) != np.count_nonzero(classified):
            raise IntegrityError(f"{path}: of {len(table)} images, which are not this release's")

        def by_row(name: str, none: float, *width: int) -> NDArray[Any]:
            values = table[name].combine_chunks()
            known = numbers(values.flatten() if width else values, none).reshape(-1, *width)
            found = np.full((len(classified), *width), none, known.dtype)
            found[classified] = known
            return found

        self._top5 = by_row("top5", NONE, TOP)
        self._probabilities = by_row("top5_probability", 0, TOP)
        self._subtree = by_row("subtree_probability", np.nan)
        self.rank = by_row("label_rank", NONE)
        self.best = self._top5[:, 0]
        self.labelled = collection.count(self.rank >= 0)
        self.correct = collection.count(self.rank == 0)

    def of_row(self, row: int) -> dict[str, Any]:
        """Return what was predicted of an image, as `ImageView` has it; nothing if it was not."""
        if self.best[row] == NONE:
            return {}
        wnids, rank, subtree = class_wnids(), int(self.rank[row]), float(self._subtree[row])
        best = zip(self._top5[row].tolist(), self._probabilities[row].tolist(), strict=True)
        return {
            "top5": tuple(Guess(wnids[i], class_name(wnids[i]), share) for i, share in best),
            "correct": None if rank == NONE else rank == 0,
            "rank": None if rank == NONE else rank,
            "subtree_probability": None if np.isnan(subtree) else subtree,
        }

    def predicted_classes(self, rows: Rows) -> list[tuple[str, str, int]]:
        """Count what images were classified as: wnid, name, how many; most first."""
        classes = sorted(i for i in self.best[rows].tolist() if i != NONE)
        ranked = [(class_wnids()[i], n) for i, n in Counter(classes).most_common()]
        return [(wnid, class_name(wnid), n) for wnid, n in ranked]
