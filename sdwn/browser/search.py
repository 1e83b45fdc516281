"""Finding synsets: search by words, and WordNet's tree above them.

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
from dataclasses import dataclass

import numpy as np

from sdwn.browser.collection import Collection, ImagePredictions, Mask, Rows
from sdwn.wordnet.taxonomy import Taxonomy

# More words only narrow down to nothing.
MOST_WORDS = 12
# Words that differ in more are others; of short ones hardly anything would be left.
LEAST_ALIKE = 0.6
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
CREATE TABLE called (lemma, rank, position, PRIMARY KEY (lemma, rank, position)) WITHOUT ROWID;
"""
_TEXTS = "SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rank"
# Shorter lemmas first, then earlier ones of a synset.
_CALLED = """SELECT position FROM called WHERE lemma BETWEEN ? AND ?
ORDER BY length(lemma), rank, position"""


class SearchIndex:
    """A search over lemmas, names, wnids, glosses and prompts, in memory; threads may share it."""

    def __init__(self, collection: Collection) -> None:
        self._collection, entries = collection, collection.entries
        # Held while the database is used.
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.executescript(_SCHEMA)
        texts = ((" ".join(e.lemmas), " ".join({e.definition, e.prompt or ""})) for e in entries)
        # SQLite splits and folds what is ASCII as `fold` does.
        folded = ([t if t.isascii() else fold(t) for t in pair] for pair in texts)
        called = (
            (fold(lemma), rank, entry.position)
            for entry in entries
            for rank, lemma in enumerate(entry.lemmas)
        )
        with self._database as database:
            insert = "INSERT INTO texts(rowid, lemmas, said) VALUES (?, ?, ?)"
            database.executemany(insert, ((i, *pair) for i, pair in enumerate(folded)))
            database.executemany("INSERT INTO called VALUES (?, ?, ?)", called)
        # All words in order, weighed: those of lemmas first, then those of more synsets.
        self._words: dict[str, int] = {}
        vocabulary = self._database.execute("SELECT term, col, doc FROM words ORDER BY term")
        for word, column, synsets in vocabulary:
            weight = synsets + len(entries) * (column == "lemmas")
            self._words[word] = self._words.get(word, 0) + weight

    def search(self, text: str) -> tuple[Rows, str | None]:
        """Find synsets; of an empty text all. Each word may be the beginning of one.

        Returns:
            Positions in the collection, best first; and what was searched for instead, if anything.
        """
        if not text.strip():
            return np.arange(len(self._collection)), None
        # Half of a character, which nothing is called by, cannot be looked up.
        whole, corrected = fold(text.encode(errors="ignore").decode()), None
        words = _WORD.findall(whole)[:MOST_WORDS]
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
        if _IDENTIFIER.match(whole):
            found += [
                entry.position
                for entry in self._collection.entries
                if entry.wnid.startswith(whole) or fold(entry.synset).startswith(whole)
            ]
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


# --- The tree ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Node:
    """A synset of WordNet at which or below which there are images.

    Its counts are of all synsets at or below it, each counted once, however many paths lead to it.
    ``labelled`` images were classified and have a label; ``rate`` is the share of them that is
    correct, None if there are none. ``children`` are by name.
    """

    wnid: str
    name: str
    definition: str
    synsets: int
    images: int
    labelled: int
    correct: int
    black: int
    parents: tuple[str, ...]
    children: tuple[str, ...]
    rate: float | None


class SynsetTree:
    """All synsets that have images and all that are above them; threads may share it.

    ``root`` is the lowest node that has all synsets below it; of several tops, below the largest.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        collection: Collection,
        predictions: ImagePredictions | None = None,
    ) -> None:
        self._taxonomy, self._collection = taxonomy, collection
        # What is at or above each synset of the release, and the parents of all of that.
        self._parents: dict[str, tuple[str, ...]] = {}
        above: dict[str, set[str]] = {}

        def at_or_above(wnid: str) -> set[str]:
            if wnid not in above:
                self._parents[wnid] = taxonomy.synset(wnid).parents if wnid in taxonomy else ()
                above[wnid] = {wnid}.union(*map(at_or_above, self._parents[wnid]))
            return above[wnid]

        # A pair of every synset with everything at or above it: its position and the node's
        # index. About ten a synset; a node's pairs are what is at or below it, once each.
        ups = [at_or_above(entry.wnid) for entry in collection.entries]
        self._index = index = {wnid: i for i, wnid in enumerate(above)}
        nodes = np.fromiter((index[wnid] for one in ups for wnid in one), np.int64)
        positions = np.repeat(np.arange(len(ups)), [len(one) for one in ups])
        order = np.argsort(nodes, kind="stable")
        self._positions = positions[order]
        self._starts = np.searchsorted(nodes[order], np.arange(len(index) + 1))
        nothing = np.zeros(len(collection), np.int64)
        counts = {
            "synsets": nothing + 1,
            "images": np.diff(collection.starts),
            "labelled": predictions.labelled if predictions else nothing,
            "correct": predictions.correct if predictions else nothing,
            "black": collection.count(collection.black),
        }
        self._counts = {
            name: np.bincount(nodes, values[positions], len(index)).astype(int)
            for name, values in counts.items()
        }

        # By name; and, of those with synsets below them, by all that people may call them.
        self._names, self._called = dict[str, str](), dict[str, list[str]]()
        for wnid in index:
            entry = collection.by_wnid.get(wnid)
            lemmas = taxonomy.synset(wnid).lemmas if entry is None else entry.lemmas
            self._names[wnid] = entry.synset if entry else lemmas[0].replace("_", " ")
            if self._counts["synsets"][index[wnid]] > (entry is not None):
                for name in {wnid, fold(self.full_name(wnid)), *map(fold, lemmas)}:
                    self._called.setdefault(name, []).append(wnid)
        self._children: dict[str, list[str]] = {}
        for wnid in sorted(index, key=lambda one: (self._names[one], one)):
            for parent in self._parents[wnid]:
                self._children.setdefault(parent, []).append(wnid)
        # Down from the largest top, while all that is below it is below one node.
        synsets = self._counts["synsets"]
        tops = sorted(wnid for wnid in index if not self._parents[wnid])
        self.root = max(tops, key=lambda one: synsets[index[one]], default="")
        while below := [
            one
            for one in self._children.get(self.root, ())
            if synsets[index[one]] == synsets[index[self.root]]
        ]:
            self.root = below[0]

    def node(self, wnid: str) -> Node | None:
        """Describe a synset; None if there are no images at or below it."""
        if (index := self._index.get(wnid)) is None:
            return None
        counts = {name: int(values[index]) for name, values in self._counts.items()}
        return Node(
            wnid=wnid,
            name=self._names[wnid],
            definition=self._taxonomy.synset(wnid).definition if wnid in self._taxonomy else "",
            parents=self._parents[wnid],
            children=tuple(self._children.get(wnid, ())),
            rate=counts["correct"] / counts["labelled"] if counts["labelled"] else None,
            **counts,
        )

    def nodes(self, wnids: Iterable[str]) -> list[Node]:
        """Describe the synsets that have images at or below them."""
        return [node for wnid in wnids if (node := self.node(wnid)) is not None]

    def full_name(self, wnid: str) -> str:
        """Return a synset's name with part of speech and sense, as ``animal.n.01``."""
        entry = self._collection.by_wnid.get(wnid)
        return entry.synset if entry else self._taxonomy.synset(wnid).name

    def named(self, text: str) -> list[Node]:
        """Find the nodes with synsets below them that a text names, most synsets first.

        It may be a lemma or the plural of one, a synset's name or a wnid.
        """
        whole = fold(text)
        found = {w for one in (whole, *singulars(whole)) for w in self._called.get(one, ())}
        return sorted(self.nodes(found), key=lambda node: (-node.synsets, node.wnid))

    def below(self, wnid: str) -> Mask:
        """Return, by position in the collection, which synsets are this one or lie below it."""
        found = np.zeros(len(self._collection), dtype=bool)
        index = self._index.get(wnid)
        if index is not None:
            found[self._positions[self._starts[index] : self._starts[index + 1]]] = True
        return found

    def path(self, wnid: str) -> list[Node]:
        """Return the nodes of a shortest path from the root down to one.

        If it is not below the root, from the nearest top.
        """
        if wnid not in self._index:
            return []
        above = self._taxonomy.above(wnid) if self._parents[wnid] else {wnid: 0}
        goal, path = self.root, [wnid]
        if goal not in above:
            tops = [one for one in above if not self._parents[one]]
            goal = min(tops, key=lambda one: (above[one], self._names[one]))
        while path[0] != goal:
            steps = {one: self._taxonomy.above(one).get(goal) for one in self._parents[path[0]]}
            ups = [
                (found, self._names[one], one) for one, found in steps.items() if found is not None
            ]
            path.insert(0, min(ups)[-1])
        return self.nodes(path)
