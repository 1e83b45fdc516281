"""Search by words: first synsets with such a name, then those with such words in their texts.

A search goes down this list, and what is found earlier comes first:

- names and wnids that begin so;
- lemmas that are so, then lemmas that begin so;
- all words in lemmas, then all words in gloss and prompt, by SQLite's full text search;
- if nothing was found: the same again for the nearest known words, then for any of the words.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.collection import Collection, Entry
from sdwn.errors import SdwnError

# More letters and words only narrow down to nothing.
LONGEST_QUERY = 200
MOST_WORDS = 12
# A word of fewer letters is in nearly every gloss.
SHORTEST_WORD = 2
# Words that differ in more are others; of short ones hardly anything would be left.
LEAST_ALIKE = 0.6
REMEMBERED = 1024
# A wnid's or a name's beginning, which no lemma has.
_IDENTIFIER = re.compile(r"n[0-9]|.*\.n\b")
# morphy(7WN): ends of plurals, and of their singulars.
_PLURALS = (
    *(("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh")),
    *(("men", "man"), ("ies", "y")),
)
_WORD = re.compile(r"[^\W_]+")
_SCHEMA = (
    "CREATE VIRTUAL TABLE texts USING fts5"
    "(lemmas, said, content='', tokenize='unicode61 remove_diacritics 2')",
    "CREATE VIRTUAL TABLE words USING fts5vocab(texts, 'col')",
)
_INSERT = "INSERT INTO texts(rowid, lemmas, said) VALUES (?, ?, ?)"
_VOCABULARY = "SELECT term, col, doc FROM words ORDER BY term"
_FIND = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank"


@dataclass(frozen=True, eq=False, slots=True)
class Matches:
    """Positions in the collection, best first; ``corrected`` is what was searched for instead.

    It is None where words were taken as they were written.
    """

    positions: NDArray[np.int64]
    corrected: str | None = None


class SearchIndex:
    """A search over lemmas, names, wnids, glosses and prompts, in memory; threads may share it.

    It is built at the first search, in a fraction of a second.

    Raises:
        SdwnError: this Python's SQLite has no full text search.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        try:
            for statement in _SCHEMA:
                self._database.execute(statement)
        except sqlite3.OperationalError as error:
            raise SdwnError(
                f"searching takes SQLite with FTS5, this Python's {sqlite3.sqlite_version} has "
                f"none ({error}); take a Python from conda or python.org"
            ) from None
        # Held while the database is used, and while the two below are built.
        self._lock = threading.RLock()
        self._lemmas: LemmaTable | None = None
        self._weights: dict[str, int] = {}
        # A word stays while others are typed after it.
        self._corrected = lru_cache(REMEMBERED)(self._nearest_word)

    def close(self) -> None:
        """Free its memory."""
        with self._lock:
            self._database.close()

    def build(self) -> None:
        """Build it now, so that the first search need not wait."""
        self._lemma_table()
        self._vocabulary()

    def search(self, text: str) -> Matches:
        """Find synsets; of an empty text all, in the collection's order.

        First those that are called so (lemma, name or wnid), then those with a lemma that begins
        so, with all words in their lemmas, with all words in gloss or prompt; if there are none,
        those with any of the words. Each word may be the beginning of one. Where a word begins
        no word here, the nearest one is taken instead.
        """
        whole = fold(text[:LONGEST_QUERY])
        words = _WORD.findall(whole)[:MOST_WORDS]
        if not text.strip():
            return Matches(np.arange(len(self._collection)))
        found = self._with_all(whole, words)
        if len(found):
            return Matches(found)
        corrected = [self._corrected(word) for word in words]
        if corrected == words:
            return Matches(self._with_any(words))
        found = self._with_all(" ".join(corrected), corrected)
        return Matches(found if len(found) else self._with_any(corrected), " ".join(corrected))

    def _with_all(self, whole: str, words: list[str]) -> NDArray[np.int64]:
        found = list[int]()
        if _IDENTIFIER.match(whole):
            found += [
                entry.position
                for entry in self._collection.entries
                if entry.wnid.startswith(whole) or fold(entry.synset).startswith(whole)
            ]
        found += self._lemma_table().find(whole)
        if words:
            every = " AND ".join(map(_beginning, words))
            found += self._full_text(f"lemmas : ({every})")
            if any(map(_is_telling, words)):
                found += self._full_text(every)
        return _distinct(found)

    def _with_any(self, words: list[str]) -> NDArray[np.int64]:
        some = " OR ".join(_beginning(word) for word in words if _is_telling(word))
        if not some:
            return _distinct([])
        return _distinct([*self._full_text(f"lemmas : ({some})"), *self._full_text(some)])

    def _full_text(self, query: str) -> list[int]:
        with self._lock:
            return [row for (row,) in self._database.execute(_FIND, (query,))]

    def _lemma_table(self) -> LemmaTable:
        """Return the lemmas; the first call fills the database, and others wait for it."""
        with self._lock:
            if self._lemmas is None:
                entries = self._collection.entries
                rows = ((e.position, _folded(" ".join(e.lemmas)), _gloss(e)) for e in entries)
                self._database.execute("BEGIN")
                self._database.executemany(_INSERT, rows)
                self._database.execute("COMMIT")
                self._lemmas = LemmaTable(entries)
            return self._lemmas

    def _vocabulary(self) -> dict[str, int]:
        """Return all words in order, with weights: lemmas' first, then those of more synsets."""
        with self._lock:
            if not self._weights:
                for word, column, synsets in self._database.execute(_VOCABULARY):
                    more = synsets + len(self._collection) * (column == "lemmas")
                    self._weights[word] = self._weights.get(word, 0) + more
            return self._weights

    def _nearest_word(self, word: str) -> str:
        """Return the known word that was most likely meant: itself, if any begins so."""
        weights = self._vocabulary()
        words = list(weights)
        index = bisect_left(words, word)
        if words[index : index + 1] and words[index].startswith(word):
            return word
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        alike = OSA.normalized_similarity
        near = process.extract(word, words, scorer=alike, score_cutoff=LEAST_ALIKE, limit=8)
        if not near:
            return word
        best: str = max(near, key=lambda one: (one[1], weights[one[0]]))[0]
        return best


class LemmaTable:
    """What synsets are called, sorted, so that names with one beginning stand side by side."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        called = [
            (fold(lemma), entry.position, rank)
            for entry in entries
            for rank, lemma in enumerate(entry.lemmas)
        ]
        called.sort(key=itemgetter(0))
        self._names = [name for name, *_ in called]
        self._positions = np.array([position for _, position, _ in called], np.int64)
        self._ranks = np.array([rank for *_, rank in called], np.int64)
        self._lengths = np.array(list(map(len, self._names)), np.int64)

    def find(self, text: str) -> list[int]:
        """Return the positions of synsets that are called so, then of those that begin so.

        Also what is the plural of a name, or written apart, is called so. A shorter name is a
        better match for its beginning, an earlier lemma a better one.
        """
        spellings = (text, *singulars(text), text.replace(" ", ""))
        called = [self._between(one, one + "\0") for one in spellings]
        begun = self._between(text, text + "\U0010ffff") if text else []
        return [*chain(*called), *begun]

    def _between(self, first: str, last: str) -> list[int]:
        start, stop = (bisect_left(self._names, name) for name in (first, last))
        keys = (self._positions, self._ranks, self._lengths)
        order = start + np.lexsort([key[start:stop] for key in keys])
        found: list[int] = self._positions[order].tolist()
        return found


def singulars(text: str) -> list[str]:
    """Return what a noun may be the plural of, by the rules of morphy(7WN).

    >>> singulars("red foxes"), singulars("sheep")
    (['red foxe', 'red fox'], [])
    """
    return [text.removesuffix(end) + instead for end, instead in _PLURALS if text.endswith(end)]


def fold(text: str) -> str:
    """Return a text as names are compared: no case, no accents, ``_`` as a space.

    >>> fold("  Crème_brûlée ")
    'creme brulee'
    """
    bare = text.casefold()
    if not bare.isascii():
        parts = unicodedata.normalize("NFKD", bare)
        bare = "".join(c for c in parts if not unicodedata.combining(c))
    return " ".join(bare.replace("_", " ").split())


def _folded(text: str) -> str:
    # SQLite splits and folds what is ASCII as `fold` does.
    return text if text.isascii() else fold(text)


def _gloss(entry: Entry) -> str:
    """Join gloss and prompt; most prompts repeat the gloss."""
    prompt, gloss = entry.prompt or "", entry.definition
    return _folded(prompt if gloss in prompt else f"{gloss} {prompt}")


def _is_telling(word: str) -> bool:
    return len(word) >= SHORTEST_WORD or not word.isascii()


def _beginning(word: str) -> str:
    return f'"{word}" *'


def _distinct(positions: list[int]) -> NDArray[np.int64]:
    return np.array(list(dict.fromkeys(positions)), dtype=np.int64)
