"""Search by words: what synsets are called first, then what is said of them."""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdwn.browsing.collection import Collection, Entry
from sdwn.errors import SdwnError

# More words only narrow down to nothing.
MOST_WORDS = 12
# A word of fewer letters is in nearly every gloss.
SHORTEST = 2
# Words that differ in more are others; of short ones hardly anything would be left.
LEAST_ALIKE = 0.6
_WORD = re.compile(r"[^\W_]+")
_SCHEMA = (
    "CREATE VIRTUAL TABLE texts USING fts5"
    "(lemmas, said, content='', tokenize='unicode61 remove_diacritics 2', prefix='2 3')"
)
_VOCABULARY = "CREATE VIRTUAL TABLE words USING fts5vocab(texts, 'col')"
_FIND = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank"


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """Positions in the collection, best first, and the text that was searched for if it was mended.

    ``corrected`` is None where words were taken as they were written.
    """

    positions: NDArray[np.int64]
    corrected: str | None = None


class Index:
    """A search over lemmas, names, wnids, glosses and prompts, in memory; threads may share it.

    Raises:
        SdwnError: this Python's SQLite has no full text search.
    """

    def __init__(self, collection: Collection) -> None:
        entries = collection.synsets
        self._size = len(entries)
        self._names, self._named = _names(entries)
        self._lock = threading.Lock()
        self._database = _database(entries)
        self._words, self._weights = self._vocabulary()

    def close(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._database.close()

    def search(self, text: str) -> Found:
        """Find synsets; of an empty text all, in the collection's order.

        First those that are called so (lemma, name or wnid), then those with a lemma that begins
        so, with all words in their lemmas, with all words in gloss or prompt; if there are none,
        those with any of the words. Each word may be the beginning of one. Where a word begins
        no word here, the nearest one is taken instead.
        """
        whole = _plain(text)
        if not whole:
            return Found(np.arange(self._size))
        words = _WORD.findall(whole)[:MOST_WORDS]
        found = self._find(whole, words)
        if len(found):
            return Found(found)
        mended = [self._mended(word) for word in words]
        if mended == words:
            return Found(self._any(words))
        found = self._find(" ".join(mended), mended)
        return Found(found if len(found) else self._any(mended), " ".join(mended))

    def _find(self, whole: str, words: list[str]) -> NDArray[np.int64]:
        return _once([*self._called(whole), *self._with_all(words)])

    def _called(self, whole: str) -> Iterator[int]:
        """Give those that are called so, then those with a name that begins so."""
        start = bisect_left(self._names, whole)
        stop = bisect_left(self._names, whole + "\U0010ffff", lo=start)
        named = sorted(self._named[start:stop])
        yield from (position for *_, position in named)

    def _with_all(self, words: list[str]) -> Iterator[int]:
        longest = max(map(len, words), default=0)
        if not words:
            return
        asked = " AND ".join(map(_beginning, words))
        yield from self._matching(f"lemmas : ({asked})")
        if longest >= SHORTEST:
            yield from self._matching(asked)

    def _any(self, words: list[str]) -> NDArray[np.int64]:
        if not words:
            return _once([])
        asked = " OR ".join(map(_beginning, words))
        return _once([*self._matching(f"lemmas : ({asked})"), *self._matching(asked)])

    def _matching(self, asked: str) -> list[int]:
        with self._lock:
            return [row for (row,) in self._database.execute(_FIND, (asked,))]

    def _vocabulary(self) -> tuple[list[str], dict[str, int]]:
        """List all words; those of lemmas weigh more, then those that more synsets have."""
        weights: dict[str, int] = {}
        for word, column, synsets in self._database.execute("SELECT term, col, doc FROM words"):
            more = synsets + self._size * (column == "lemmas")
            weights[word] = weights.get(word, 0) + more
        return sorted(weights), weights

    def _mended(self, word: str) -> str:
        """Give the word that was meant: itself, if any word here begins so."""
        place = bisect_left(self._words, word)
        if self._words[place : place + 1] and self._words[place].startswith(word):
            return word
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        near = process.extract(
            word,
            self._words,
            scorer=OSA.normalized_similarity,
            score_cutoff=LEAST_ALIKE,
            limit=8,
        )
        best = max(near, key=lambda one: (one[1], self._weights[one[0]]), default=None)
        return best[0] if best else word


def _database(entries: tuple[Entry, ...]) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    try:
        database.execute(_SCHEMA)
    except sqlite3.OperationalError as error:
        raise SdwnError(
            f"searching takes SQLite with FTS5, this Python's {sqlite3.sqlite_version} has none "
            f"({error}); take a Python from conda or python.org"
        ) from None
    database.execute("BEGIN")
    rows = ((entry.position, " ".join(entry.lemmas), _said(entry)) for entry in entries)
    database.executemany("INSERT INTO texts(rowid, lemmas, said) VALUES (?, ?, ?)", rows)
    database.execute("COMMIT")
    database.execute(_VOCABULARY)
    return database


def _said(entry: Entry) -> str:
    """Put gloss and prompt together; most prompts repeat the gloss."""
    prompt, gloss = entry.prompt or "", entry.definition
    return prompt if gloss in prompt else f"{gloss} {prompt}"


def _names(
    entries: Iterable[Entry],
) -> tuple[list[str], list[tuple[int, int, str, int]]]:
    """List all that synsets are called, sorted; with each, how good a find it is and of which.

    A shorter name is a better find for its beginning, an earlier lemma a better one than a later.
    """
    called = sorted(
        (name, (len(name), place, entry.synset, entry.position))
        for entry in entries
        for place, name in enumerate(_called(entry))
    )
    return [name for name, _ in called], [rank for _, rank in called]


def _called(entry: Entry) -> list[str]:
    return [*map(_plain, entry.lemmas), entry.synset.casefold(), entry.wnid]


def _plain(text: str) -> str:
    """Write a text as names are compared: no case, no accents, ``_`` as a space.

    >>> _plain("  Crème_brûlée ")
    'creme brulee'
    """
    parts = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(c for c in parts if not unicodedata.combining(c))
    return " ".join(bare.replace("_", " ").split())


def _beginning(word: str) -> str:
    return f'"{word}" *'


def _once(positions: list[int]) -> NDArray[np.int64]:
    return np.array(list(dict.fromkeys(positions)), dtype=np.int64)
