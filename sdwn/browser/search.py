"""Search by words: what synsets are called first, then what is said of them."""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.collection import Collection, Entry
from sdwn.browser.once import Once
from sdwn.errors import SdwnError

Positions = NDArray[np.int64]

# More letters and words only narrow down to nothing.
LONGEST = 200
MOST_WORDS = 12
# A word of fewer letters is in nearly every gloss.
SHORTEST = 2
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
_WEIGH = "SELECT term, col, doc FROM words ORDER BY term"
_FIND = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank"


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """Positions in the collection, best first, and the text that was searched for if it was mended.

    ``corrected`` is None where words were taken as they were written.
    """

    positions: Positions
    corrected: str | None = None


class Index:
    """A search over lemmas, names, wnids, glosses and prompts, in memory; threads may share it.

    It is made when something is first searched for, in a fraction of a second.

    Raises:
        SdwnError: this Python's SQLite has no full text search.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._lock = threading.Lock()
        self._database = _database()
        self._lemmas = Once(self._filled)
        self._words = Once(self._vocabulary)
        # A word stays while others are typed after it.
        self._mended = lru_cache(REMEMBERED)(self._nearest)

    def close(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._database.close()

    def warm(self) -> None:
        """Make it now."""
        self._lemmas()
        self._words()

    def search(self, text: str) -> Found:
        """Find synsets; of an empty text all, in the collection's order.

        First those that are called so (lemma, name or wnid), then those with a lemma that begins
        so, with all words in their lemmas, with all words in gloss or prompt; if there are none,
        those with any of the words. Each word may be the beginning of one. Where a word begins
        no word here, the nearest one is taken instead.
        """
        whole = plain(text[:LONGEST])
        words = _WORD.findall(whole)[:MOST_WORDS]
        if not text.strip():
            return Found(np.arange(len(self._collection)))
        found = self._find(whole, words)
        if len(found):
            return Found(found)
        mended = [self._mended(word) for word in words]
        if mended == words:
            return Found(self._any(words))
        found = self._find(" ".join(mended), mended)
        return Found(found if len(found) else self._any(mended), " ".join(mended))

    def _find(self, whole: str, words: list[str]) -> Positions:
        return _once(
            [*self._identified(whole), *self._lemmas().find(whole), *self._with_all(words)]
        )

    def _identified(self, whole: str) -> Iterator[int]:
        """Give the synsets whose name or wnid begins so."""
        if _IDENTIFIER.match(whole):
            for entry in self._collection.synsets:
                if entry.wnid.startswith(whole) or plain(entry.synset).startswith(whole):
                    yield entry.position

    def _with_all(self, words: list[str]) -> Iterator[int]:
        if not words:
            return
        asked = " AND ".join(map(_beginning, words))
        yield from self._matching(f"lemmas : ({asked})")
        if any(map(_tells, words)):
            yield from self._matching(asked)

    def _any(self, words: list[str]) -> Positions:
        asked = " OR ".join(_beginning(word) for word in filter(_tells, words))
        if not asked:
            return _once([])
        return _once([*self._matching(f"lemmas : ({asked})"), *self._matching(asked)])

    def _matching(self, asked: str) -> list[int]:
        with self._lock:
            return [row for (row,) in self._database.execute(_FIND, (asked,))]

    def _filled(self) -> Lemmas:
        entries = self._collection.synsets
        rows = ((entry.position, _bare(" ".join(entry.lemmas)), _said(entry)) for entry in entries)
        with self._lock:
            self._database.execute("BEGIN")
            self._database.executemany(_INSERT, rows)
            self._database.execute("COMMIT")
        return Lemmas(entries)

    def _vocabulary(self) -> dict[str, int]:
        """Weigh all words, in order; those of lemmas first, then those that more synsets have."""
        weights: dict[str, int] = {}
        with self._lock:
            for word, column, synsets in self._database.execute(_WEIGH):
                more = synsets + len(self._collection) * (column == "lemmas")
                weights[word] = weights.get(word, 0) + more
        return weights

    def _nearest(self, word: str) -> str:
        """Give the word that was meant: itself, if any word here begins so."""
        weights = self._words()
        words = list(weights)
        place = bisect_left(words, word)
        if words[place : place + 1] and words[place].startswith(word):
            return word
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        alike = OSA.normalized_similarity
        near = process.extract(word, words, scorer=alike, score_cutoff=LEAST_ALIKE, limit=8)
        if not near:
            return word
        best: str = max(near, key=lambda one: (one[1], weights[one[0]]))[0]
        return best


def _database() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    try:
        for statement in _SCHEMA:
            database.execute(statement)
    except sqlite3.OperationalError as error:
        raise SdwnError(
            f"searching takes SQLite with FTS5, this Python's {sqlite3.sqlite_version} has none "
            f"({error}); take a Python from conda or python.org"
        ) from None
    return database


def _said(entry: Entry) -> str:
    """Put gloss and prompt together; most prompts repeat the gloss."""
    prompt, gloss = entry.prompt or "", entry.definition
    return _bare(prompt if gloss in prompt else f"{gloss} {prompt}")


def _bare(text: str) -> str:
    # SQLite splits and folds what is ASCII as `plain` does.
    return text if text.isascii() else plain(text)


class Lemmas:
    """What synsets are called, sorted, so that those that begin so stand beside one another."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        called = [
            (plain(lemma), entry.position, place)
            for entry in entries
            for place, lemma in enumerate(entry.lemmas)
        ]
        called.sort(key=itemgetter(0))
        self._names = [name for name, *_ in called]
        self._positions = np.array([position for _, position, _ in called], np.int64)
        self._places = np.array([place for *_, place in called], np.int64)
        self._lengths = np.array(list(map(len, self._names)), np.int64)

    def find(self, text: str) -> list[int]:
        """Give the positions of synsets that are called so, then of those that begin so.

        Also what is the plural of a name, or written apart, is called so. A shorter name is a
        better find for its beginning, an earlier lemma a better one.
        """
        spellings = (text, *singulars(text), text.replace(" ", ""))
        called = [self._between(one, one + "\0") for one in spellings]
        begun = self._between(text, text + "\U0010ffff") if text else []
        return [*chain(*called), *begun]

    def _between(self, first: str, last: str) -> list[int]:
        start, stop = (bisect_left(self._names, name) for name in (first, last))
        keys = (self._positions, self._places, self._lengths)
        order = start + np.lexsort([key[start:stop] for key in keys])
        found: list[int] = self._positions[order].tolist()
        return found


def singulars(text: str) -> list[str]:
    """Give what a noun may be the plural of, by the rules of morphy(7WN).

    >>> singulars("red foxes"), singulars("sheep")
    (['red foxe', 'red fox'], [])
    """
    return [text.removesuffix(end) + instead for end, instead in _PLURALS if text.endswith(end)]


def plain(text: str) -> str:
    """Write a text as names are compared: no case, no accents, ``_`` as a space.

    >>> plain("  Crème_brûlée ")
    'creme brulee'
    """
    bare = text.casefold()
    if not bare.isascii():
        parts = unicodedata.normalize("NFKD", bare)
        bare = "".join(c for c in parts if not unicodedata.combining(c))
    return " ".join(bare.replace("_", " ").split())


def _tells(word: str) -> bool:
    return len(word) >= SHORTEST or not word.isascii()


def _beginning(word: str) -> str:
    return f'"{word}" *'


def _once(positions: list[int]) -> Positions:
    return np.array(list(dict.fromkeys(positions)), dtype=np.int64)
