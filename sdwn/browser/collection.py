"""A release's concepts and images, and what a classifier predicted; search and tree over them.

Pages count over 262,040 images at once, so facts about images stand in arrays by row of the
release, and counts of concepts in arrays by ``position``, which is a concept's index by name:

    rows of the release    number, status, position, rank, best class, ...
      |  order, starts     (the rows of each concept, by number)
    positions of concepts  entries, images, black, labelled, correct, ...
"""

from __future__ import annotations

import io
import re
import sqlite3
import threading
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn.errors import SdwnError
from sdwn.measures.record import FLOAT, SCORES, prediction_scores
from sdwn.planning.plan import Concept
from sdwn.prediction.table import TOP, Predictions
from sdwn.releases.release import Release
from sdwn.storage.codecs import CODECS, ImageCodec
from sdwn.storage.columns import BLACK, numbers
from sdwn.wordnet.corpus import Synset, class_name
from sdwn.wordnet.taxonomy import Taxonomy

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
# Of an image that was not classified, or whose concept is no ImageNet class.
NONE = -1
# Thumbnails kept in memory: of photographs about 10 MB, of noise 40.
KEPT = 1024


class Guess(NamedTuple):
    """One of the classes that a classifier predicted."""

    wnid: str
    name: str  # its first lemma
    probability: float


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image as pages show it: its row in the release, and what a classifier predicted."""

    entry: Entry
    number: int
    row: int
    status: str
    top5: tuple[Guess, ...] = ()  # empty where it was not classified
    rank: int | None = None  # of its own class, from 0; None where it has none
    subtree_probability: float | None = None  # None where no class is at or below it

    @property
    def black(self) -> bool:
        """True if it shows nothing: blackened by the safety checker, NaN, or imported so."""
        return self.status in BLACK

    @property
    def correct(self) -> bool | None:
        """True if the best class is its own; None where it has none."""
        return None if self.rank is None else self.rank == 0

    @property
    def state(self) -> str:
        """One of right, wrong, black (whatever was predicted), unjudged, and other: no class."""
        if self.black:
            return "black"
        states = {None: "other", True: "right", False: "wrong"}
        return states[self.correct] if self.top5 else "unjudged"


# Not frozen, for that takes three times as long, and there may be a million.
@dataclass(slots=True)
class Entry:
    """A concept that has images here; ``position`` is its index by name."""

    position: int
    concept: Concept
    images: int
    black: int

    @property
    def id(self) -> str:
        """The concept's key, which pages have in their addresses."""
        return self.concept.id

    @property
    def label(self) -> str:
        """Its name for people: of a synset, the first lemma."""
        return self.concept.label or self.concept.name

    @property
    def prompt(self) -> str | None:
        """The prompt of all its images; None where they differ or it is not recorded."""
        return self.concept.prompt if len(self.concept.prompts) == 1 else None

    @property
    def lemmas(self) -> tuple[str, ...]:
        """All words for it, of a synset."""
        lemmas = self.concept.lemmas
        return tuple(lemmas.replace("_", " ").split(", ")) if lemmas else ()

    @property
    def names(self) -> dict[str, None]:
        """All words that people may call it by, once each: lemmas, label, and an id of theirs."""
        ids = () if self.id == self.concept.wnid else (self.id,)
        return dict.fromkeys((*self.lemmas, self.label, *ids))


class Collection:
    """A release's concepts by name, and its images by concept and number; threads may share it.

    ``order[starts[p]:starts[p + 1]]`` are the rows of the concept at position p, by number.
    """

    def __init__(self, release: Release) -> None:
        self.release, table = release, release.metadata
        self.thumbnail = lru_cache(KEPT)(self._thumbnail)
        columns = (table[name].combine_chunks() for name in ("id", "status"))
        ids, statuses = (column.dictionary_encode() for column in columns)
        planned = release.concepts
        concepts = [planned.get(one) or Concept(one) for one in ids.dictionary.to_pylist()]
        by_name = sorted(range(len(concepts)), key=lambda i: (concepts[i].name, concepts[i].id))
        self.numbers: NDArray[np.uint32] = numbers(table["number"])
        self.positions: Rows = np.argsort(by_name)[numbers(ids.indices)]
        known = np.array(statuses.dictionary.to_pylist(), str)
        self.statuses: NDArray[np.str_] = known[numbers(statuses.indices)]
        self.black: Mask = np.isin(self.statuses, BLACK)
        self.order: Rows = np.lexsort((self.numbers, self.positions))
        images = np.bincount(self.positions, minlength=len(concepts))
        self.starts: Rows = np.concatenate([[0], np.cumsum(images)]).astype(np.int64)

        black = self.count(self.black).tolist()
        facts = ((concepts[index] for index in by_name), images.tolist(), black)
        self.entries = list(map(Entry, count(), *facts))
        self.by_id = {entry.id: entry for entry in self.entries}
        self.by_wnid: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.concept.wnid:
                self.by_wnid.setdefault(entry.concept.wnid, []).append(entry)

    def __len__(self) -> int:
        return len(self.entries)

    def rows(self, *entries: Entry) -> Rows:
        """Return the rows of the images of these concepts, by number."""
        ends = [self.starts[entry.position : entry.position + 2] for entry in entries]
        return np.concatenate([self.order[:0], *(self.order[start:end] for start, end in ends)])

    def count(self, mask: Mask) -> Rows:
        """Count, by position, each concept's images of a mask of rows."""
        return np.bincount(self.positions[mask], minlength=len(self.starts) - 1)

    def read(self, row: int) -> tuple[bytes, ImageCodec]:
        """Return an image as it is stored, and its codec; raw pixels as PNG, for browsers."""
        where, buffer = self.release.location(row), io.BytesIO()
        codec = CODECS[where["codec"]]
        if codec.media_type:
            return self.release.payload(where), codec
        self.release.image(row).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue(), CODECS["png"]

    def _thumbnail(self, row: int, pixels: int) -> bytes:
        """Return an image as WebP, its longer side of so many pixels or as small as it is."""
        image, buffer = self.release.image(row), io.BytesIO()
        image.thumbnail((pixels, pixels), reducing_gap=2.0)
        image.save(buffer, "WEBP", quality=80, method=2)
        return buffer.getvalue()


class ImagePredictions:
    """The predictions of one evaluation of a release, by row; threads may share it.

    Unknown are NONE in ``rank`` (of the label, from 0) and ``best`` (a class), NaN in ``scores``.
    """

    def __init__(self, collection: Collection, name: str, record: dict[str, Any]) -> None:
        self.name, self.record, release = name, record, collection.release
        self.model = str(record["classifier"]["model"])
        self.groups = {one["name"]: one["wnid"] for one in record["groups"]}
        path = release.paths.evaluation(name).predictions
        found = Predictions.read(path, release.manifest.most_rows)
        # Each image has an id; the label is what only images of ImageNet classes have.
        column = "imagenet_class" if record["selection"] == "imagenet" else "id"
        labelled, table = release.labelled_by(found.network.get("class_names", ())), found.table
        self.classes = labelled.classes
        classified = numbers(pc.is_valid(labelled.metadata[column]))

        def by_row(column: pa.ChunkedArray, none: float, *width: int) -> NDArray[Any]:
            values = column.combine_chunks()
            known = numbers(values.flatten() if width else values, none).reshape(-1, *width)
            found = np.full((len(classified), *width), none, known.dtype)
            found[classified] = known
            return found

        top = min(TOP, len(self.classes))
        self._top5 = by_row(table["top5"], NONE, top)
        self._probabilities = by_row(table["top5_probability"], 0, top)
        self.rank = by_row(table["label_rank"], NONE)
        scores = prediction_scores(table)
        names = [name for name in SCORES if name in scores.column_names]
        self.scores = {name: by_row(scores[name].cast(FLOAT), np.nan) for name in names}
        self.best = self._top5[:, 0]

    def of_row(self, row: int) -> dict[str, Any]:
        """Return what was predicted of an image, as `ImageView` has it; nothing if it was not."""
        if self.best[row] == NONE:
            return {}
        rank, subtree = int(self.rank[row]), float(self.scores["subtree_probability"][row])
        best = [self.classes[index] for index in self._top5[row]]
        top5 = zip(best, map(class_name, best), self._probabilities[row].tolist(), strict=True)
        return {
            "top5": tuple(map(Guess._make, top5)),
            "rank": None if rank == NONE else rank,
            "subtree_probability": None if np.isnan(subtree) else subtree,
        }

    def predicted_classes(self, rows: Rows) -> list[tuple[str, str, int]]:
        """Count what images were classified as: wnid, name, how many; most first."""
        classes = sorted(i for i in self.best[rows].tolist() if i != NONE)
        ranked = [(self.classes[i], n) for i, n in Counter(classes).most_common()]
        return [(wnid, class_name(wnid), n) for wnid, n in ranked]


# --- Search ---------------------------------------------------------------------------------------
# Words that differ in more are others; of short ones hardly anything would be left.
LEAST_ALIKE = 0.6
# An id's, a wnid's or a name's beginning, which hardly a lemma has; and what keeps them apart.
_IDENTIFIER, _KEY = re.compile(r"[0-9]|\.n\b"), "\x01"
# morphy(7WN): ends of plurals, and of their singulars.
_PLURALS = (
    *(("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh")),
    *(("men", "man"), ("ies", "y")),
)
_WORD = re.compile(r"[^\W_]+")
_SCHEMA = """
CREATE VIRTUAL TABLE texts USING fts5
  (lemmas, said, content='', tokenize='unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE words USING fts5vocab(texts, 'col');
CREATE TABLE called (lemma, rank, position, PRIMARY KEY (lemma, rank, position)) WITHOUT ROWID;
"""
_WORDS = "SELECT term, sum(doc + ? * (col = 'lemmas')) FROM words GROUP BY term ORDER BY term"
_TEXTS = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank"
# Shorter lemmas first, then earlier ones of a synset.
_CALLED = """SELECT position FROM called WHERE lemma BETWEEN ? AND ?
ORDER BY length(lemma), rank, position"""


class SearchIndex:
    """A search over names, wnids, glosses and prompts, in memory; threads may share it.

    What is found earlier in this list comes first:

    - names, ids and wnids that begin so;
    - lemmas, labels and ids that are so, then those that begin so;
    - all words in lemmas, then all words in gloss and prompt, by SQLite's full text search;
    - if nothing was found: the same again for the nearest known words, then for any of the words.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection, entries = collection, collection.entries
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.executescript(_SCHEMA)
        texts = (
            (" ".join(e.names), " ".join({e.concept.definition, *e.concept.prompts}))
            for e in entries
        )
        # SQLite splits and folds what is ASCII as `fold` does.
        folded = ([t if t.isascii() else fold(t) for t in pair] for pair in texts)
        called = (
            (f"{kind}{fold(name)}", rank, entry.position)
            for entry in entries
            for kind, names in (
                ("", entry.names),
                (_KEY, filter(None, (entry.id, entry.concept.wnid, entry.concept.name))),
            )
            for rank, name in enumerate(names)
        )
        with self._database as database:
            insert = "INSERT INTO texts(rowid, lemmas, said) VALUES (?, ?, ?)"
            database.executemany(insert, ((i, *pair) for i, pair in enumerate(folded)))
            database.executemany("INSERT INTO called VALUES (?, ?, ?)", called)
        # All words in order, weighed: those of lemmas first, then those of more concepts.
        weighed = self._database.execute(_WORDS, (len(entries),))
        self._words: dict[str, int] = dict(weighed.fetchall())

    def search(self, text: str) -> tuple[Rows, str | None]:
        """Find the positions of concepts, best first; return the corrected words too."""
        if not text.strip():
            return np.arange(len(self._collection)), None
        whole, corrected = fold(text), None
        words = _WORD.findall(whole)
        found = self._with_all(whole, words)
        if not found:
            nearest = [self._nearest_word(word) for word in words]
            if nearest != words:
                words, corrected = nearest, " ".join(nearest)
                found = self._with_all(corrected, words)
        if not found and (some := " OR ".join(f'"{word}" *' for word in filter(_tells, words))):
            found = [*self._ask(_TEXTS, f"lemmas : ({some})"), *self._ask(_TEXTS, some)]
        return np.array(list(dict.fromkeys(found)), np.int64), corrected

    def _with_all(self, whole: str, words: list[str]) -> list[int]:
        found = list[int]()
        if _IDENTIFIER.search(whole):
            found += self._ask(_CALLED, _KEY + whole, f"{_KEY}{whole}\U0010ffff")
        if whole:
            # Also what is the plural of a lemma, or written apart, is called so.
            for lemma in (whole, *singulars(whole), whole.replace(" ", "")):
                found += self._ask(_CALLED, lemma, lemma)
            found += self._ask(_CALLED, whole, f"{whole}\U0010ffff")
        if words:
            every = " AND ".join(f'"{word}" *' for word in words)
            found += self._ask(_TEXTS, f"lemmas : ({every})")
            if any(map(_tells, words)):
                found += self._ask(_TEXTS, every)
        return found

    def _ask(self, query: str, *values: str) -> list[int]:
        with self._lock:
            return [position for (position,) in self._database.execute(query, values)]

    def _nearest_word(self, word: str) -> str:
        """Return the known word that was most likely meant: itself, if any begins so."""
        words = list(self._words)
        index = bisect_left(words, word)
        if words[index : index + 1] and words[index].startswith(word):
            return word
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        alike = OSA.normalized_similarity
        near = process.extract(word, words, scorer=alike, score_cutoff=LEAST_ALIKE, limit=8)
        best: str = max(near, key=lambda one: (one[1], self._words[one[0]]), default=(word,))[0]
        return best


def _tells(word: str) -> bool:
    # A word of one letter is in nearly every gloss.
    return len(word) > 1 or not word.isascii()


def singulars(text: str) -> list[str]:
    """Return what a noun may be the plural of, by the rules of morphy(7WN)."""
    return [text.removesuffix(end) + instead for end, instead in _PLURALS if text.endswith(end)]


def fold(text: str) -> str:
    """Return a text as names are compared: no case, no accents, ``_`` as a space."""
    bare = text.casefold()
    if not bare.isascii():
        parts = unicodedata.normalize("NFKD", bare)
        bare = "".join(c for c in parts if not unicodedata.combining(c))
    return " ".join(bare.replace("_", " ").split())


# --- The tree ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Synset):
    """A synset, and counts of all concepts at or below it, by however many paths."""

    label: str  # its name for people
    concepts: int
    images: int
    labelled: int  # those that were classified and have a label
    correct: int
    black: int
    children: tuple[str, ...]  # by label
    rate: float | None  # the share of the labelled ones that is correct


class SynsetTree:
    """All synsets that have images and all that are above them; threads may share it."""

    def __init__(self, taxonomy: Taxonomy, collection: Collection, rank: NDArray[Any]) -> None:
        self._taxonomy, self._collection = taxonomy, collection
        # By wnid: the positions of the concepts at or below it.
        self._below: dict[str, list[int]] = {}
        for of_class, entries in collection.by_wnid.items():
            with suppress(SdwnError):  # a stranger's wnid may be none of WordNet's
                for wnid in taxonomy.above(of_class):
                    self._below.setdefault(wnid, []).extend(entry.position for entry in entries)
        masks = {"labelled": rank >= 0, "correct": rank == 0, "black": collection.black}
        self._counts = {name: collection.count(mask) for name, mask in masks.items()}
        self._counts["images"] = np.diff(collection.starts)

        self._synsets = dict[str, Synset]()
        # By wnid, children; and those with others below them, by all that people may call them.
        self._children, self._called = dict[str, list[str]](), dict[str, list[str]]()
        for wnid, below in self._below.items():
            synset = self._synsets[wnid] = taxonomy.synset(wnid)
            if len(below) > len(collection.by_wnid.get(wnid, ())):
                for name in {wnid, *map(fold, (synset.name, *synset.lemmas))}:
                    self._called.setdefault(name, []).append(wnid)
        for wnid in sorted(self._below, key=lambda one: (self._label(one), one)):
            for parent in self._synsets[wnid].parents:
                self._children.setdefault(parent, []).append(wnid)
        # The lowest of those that have most below them.
        lowest = {wnid: (len(self._below[wnid]), len(taxonomy.above(wnid))) for wnid in self._below}
        self.root = max(lowest, key=lowest.__getitem__, default="")

    def _label(self, wnid: str) -> str:
        return self._synsets[wnid].lemmas[0].replace("_", " ")

    def node(self, wnid: str) -> Node | None:
        """Describe a synset; None if there are no images at or below it."""
        if (below := self._below.get(wnid)) is None:
            return None
        counts = {name: int(values[below].sum()) for name, values in self._counts.items()}
        return Node(
            **asdict(self._synsets[wnid]) | counts,
            label=self._label(wnid),
            concepts=len(below),
            children=tuple(self._children.get(wnid, ())),
            rate=counts["correct"] / counts["labelled"] if counts["labelled"] else None,
        )

    def nodes(self, wnids: Iterable[str]) -> list[Node]:
        """Describe the synsets that have images at or below them."""
        return [node for wnid in wnids if (node := self.node(wnid)) is not None]

    def named(self, text: str) -> list[Node]:
        """Find the nodes with others below them that a text names, most concepts first."""
        whole = fold(text)
        found = {w for one in (whole, *singulars(whole)) for w in self._called.get(one, ())}
        return sorted(self.nodes(found), key=lambda node: (-node.concepts, node.wnid))

    def below(self, wnid: str) -> Mask:
        """Return, by position in the collection, which concepts are of this synset or below it."""
        found = np.zeros(len(self._collection), dtype=bool)
        found[self._below.get(wnid, [])] = True
        return found

    def path(self, wnid: str) -> list[Node]:
        """Return the nodes of a shortest path from the root down to one, or it alone."""
        path, root = [wnid], self.root
        while path[0] in self._synsets and path[0] != root:
            parents = self._synsets[path[0]].parents
            steps = {up: self._taxonomy.above(up).get(root) for up in parents}
            ups = [(found, self._label(up), up) for up, found in steps.items() if found is not None]
            if not ups:
                break
            path.insert(0, min(ups)[-1])
        return self.nodes(path)
