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
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from sdwn.browser.collection import Collection, Rows

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
_SCHEMA = """
CREATE VIRTUAL TABLE texts USING fts5
  (lemmas, said, content='', tokenize='unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE words USING fts5vocab(texts, 'col');
"""


class SearchIndex:
    """A search over lemmas, names, wnids, glosses and prompts, in memory; threads may share it."""

    def __init__(self, collection: Collection) -> None:
        self._collection, entries = collection, collection.entries
        # Held while the database is used.
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.executescript(_SCHEMA)
        texts = (
            # What is said of a synset: gloss and prompt, which mostly repeats it.
            (" ".join(one.lemmas), said if one.definition in said else f"{one.definition} {said}")
            for one in entries
            for said in [one.prompt or ""]
        )
        # SQLite splits and folds what is ASCII as `fold` does.
        folded = ([t if t.isascii() else fold(t) for t in pair] for pair in texts)
        insert = "INSERT INTO texts(rowid, lemmas, said) VALUES (?, ?, ?)"
        with self._database:
            self._database.executemany(insert, ((i, *pair) for i, pair in enumerate(folded)))
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
        vocabulary = self._database.execute("SELECT term, col, doc FROM words ORDER BY term")
        for word, column, synsets in vocabulary:
            weight = synsets + len(entries) * (column == "lemmas")
            self._words[word] = self._words.get(word, 0) + weight
        # A word stays while others are typed after it.
        self._corrected = lru_cache(REMEMBERED)(self._nearest_word)

    def search(self, text: str) -> tuple[Rows, str | None]:
        """Find synsets; of an empty text all, in the collection's order.

        Each word may be the beginning of one.

        Returns:
            Positions in the collection, best first; and what was searched for instead, None where
            words were taken as they were written.
        """
        if not text.strip():
            return np.arange(len(self._collection)), None
        whole, corrected = fold(text[:LONGEST_QUERY]), None
        words = _WORD.findall(whole)[:MOST_WORDS]
        found = self._with_all(whole, words)
        if not found:
            nearest = [self._corrected(word) for word in words]
            if nearest != words:
                words, corrected = nearest, " ".join(nearest)
                found = self._with_all(corrected, words)
        if not found and (some := " OR ".join(f'"{word}" *' for word in filter(_tells, words))):
            found = [*self._full_text(f"lemmas : ({some})"), *self._full_text(some)]
        return np.array(list(dict.fromkeys(found)), np.int64), corrected

    def _with_all(self, whole: str, words: list[str]) -> list[int]:
        found = list[int]()
        if _IDENTIFIER.match(whole):
            found += [
                entry.position
                for entry in self._collection.entries
                if entry.wnid.startswith(whole) or fold(entry.synset).startswith(whole)
            ]
        # Also what is the plural of a lemma, or written apart, is called so.
        ends = [(one, f"{one}\0") for one in (whole, *singulars(whole), whole.replace(" ", ""))]
        for first, last in [*ends, (whole, f"{whole}\U0010ffff")] if whole else ():
            start, stop = (bisect_left(self._lemmas, lemma) for lemma in (first, last))
            keys = self._keys[:, start:stop]
            # Shorter lemmas first, then earlier ones of a synset.
            found += keys[0][np.lexsort(keys)].tolist()
        if words:
            every = " AND ".join(f'"{word}" *' for word in words)
            found += self._full_text(f"lemmas : ({every})")
            if any(map(_tells, words)):
                found += self._full_text(every)
        return found

    def _full_text(self, query: str) -> Iterable[int]:
        with self._lock:
            find = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank"
            return [row for (row,) in self._database.execute(find, (query,))]

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
