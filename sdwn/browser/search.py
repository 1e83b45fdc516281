"""Search by words: first by names of synsets, then by words in their texts.

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
from dataclasses import dataclass
from functools import lru_cache

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
        # Held while the database is used, and while what is below is built.
        self._lock = threading.Lock()
        self._built = False
        # A word stays while others are typed after it.
        self._corrected = lru_cache(REMEMBERED)(self._nearest_word)

    def build(self) -> None:
        """Build it now; later calls do nothing, and calls meanwhile wait."""
        with self._lock:
            if self._built:
                return
            entries = self._collection.entries
            self._database.execute("BEGIN")
            self._database.executemany(_INSERT, map(_texts, entries))
            self._database.execute("COMMIT")
            # All lemmas in order, so that those that begin alike stand side by side; with the
            # position of their synset, their rank among its lemmas, and their length.
            called = sorted(
                (fold(lemma), entry.position, rank)
                for entry in entries
                for rank, lemma in enumerate(entry.lemmas)
            )
            self._lemmas = [lemma for lemma, *_ in called]
            keys = [(position, rank, len(lemma)) for lemma, position, rank in called]
            self._keys = np.array(keys, np.int64).reshape(-1, 3).T
            # All words in order, weighed: those of lemmas first, then those of more synsets.
            self._words: dict[str, int] = {}
            for word, column, synsets in self._database.execute(_VOCABULARY):
                weight = synsets + len(entries) * (column == "lemmas")
                self._words[word] = self._words.get(word, 0) + weight
            self._built = True

    def search(self, text: str) -> Matches:
        """Find synsets; of an empty text all, in the collection's order.

        Each word may be the beginning of one.
        """
        if not text.strip():
            return Matches(np.arange(len(self._collection)))
        self.build()
        whole = fold(text[:LONGEST_QUERY])
        words = _WORD.findall(whole)[:MOST_WORDS]
        found = self._with_all(whole, words)
        if found:
            return _matches(found)
        corrected = [self._corrected(word) for word in words]
        if corrected == words:
            return _matches(self._with_any(words))
        whole = " ".join(corrected)
        return _matches(self._with_all(whole, corrected) or self._with_any(corrected), whole)

    def _with_all(self, whole: str, words: list[str]) -> list[int]:
        found = list[int]()
        if _IDENTIFIER.match(whole):
            found += [
                entry.position
                for entry in self._collection.entries
                if entry.wnid.startswith(whole) or fold(entry.synset).startswith(whole)
            ]
        # Also what is the plural of a lemma, or written apart, is called so.
        for spelling in (whole, *singulars(whole), whole.replace(" ", "")):
            found += self._lemmas_between(spelling, spelling + "\0")
        if whole:
            found += self._lemmas_between(whole, whole + "\U0010ffff")
        if words:
            every = " AND ".join(f'"{word}" *' for word in words)
            found += self._full_text(f"lemmas : ({every})")
            if any(map(_is_telling, words)):
                found += self._full_text(every)
        return found

    def _with_any(self, words: list[str]) -> list[int]:
        some = " OR ".join(f'"{word}" *' for word in words if _is_telling(word))
        if not some:
            return []
        return self._full_text(f"lemmas : ({some})") + self._full_text(some)

    def _lemmas_between(self, first: str, last: str) -> list[int]:
        """Return the positions of synsets: shorter lemmas first, then earlier ones of a synset."""
        start, stop = (bisect_left(self._lemmas, lemma) for lemma in (first, last))
        keys = self._keys[:, start:stop]
        found: list[int] = keys[0][np.lexsort(keys)].tolist()
        return found

    def _full_text(self, query: str) -> list[int]:
        with self._lock:
            return [row for (row,) in self._database.execute(_FIND, (query,))]

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
        if not near:
            return word
        best: str = max(near, key=lambda one: (one[1], self._words[one[0]]))[0]
        return best


def _matches(positions: list[int], corrected: str | None = None) -> Matches:
    return Matches(np.array(list(dict.fromkeys(positions)), dtype=np.int64), corrected)


def _texts(entry: Entry) -> tuple[int, str, str]:
    """Return what is searched of a synset: lemmas; gloss and prompt, which mostly repeats it."""
    prompt, gloss = entry.prompt or "", entry.definition
    texts = " ".join(entry.lemmas), prompt if gloss in prompt else f"{gloss} {prompt}"
    # SQLite splits and folds what is ASCII as `fold` does.
    lemmas, said = (text if text.isascii() else fold(text) for text in texts)
    return entry.position, lemmas, said


def _is_telling(word: str) -> bool:
    return len(word) >= SHORTEST_WORD or not word.isascii()


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
