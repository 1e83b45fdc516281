"""WordNet's tree above a release's synsets, with what lies below each node counted once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sdwn.browser.collection import Collection, ImagePredictions, Mask
from sdwn.browser.search import fold, singulars
from sdwn.wordnet.taxonomy import Taxonomy


@dataclass(frozen=True, slots=True)
class Node:
    """A synset of WordNet at which or below which there are images.

    ``synsets`` and the counts of images are of all synsets at or below it, each counted once,
    however many paths lead to it. ``labelled`` images were classified and have a label; ``rate``
    is the share of them that is correct, None if there are none. ``children`` are by name.
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

    @property
    def rate(self) -> float | None:
        """Share of the labelled images that are correct."""
        return self.correct / self.labelled if self.labelled else None


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
                self._parents[wnid] = taxonomy.parents(wnid) if wnid in taxonomy else ()
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
            lemmas = taxonomy.lemmas(wnid) if entry is None else entry.lemmas
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
        index = self._index.get(wnid)
        if index is None:
            return None
        return Node(
            wnid=wnid,
            name=self._names[wnid],
            definition=self._taxonomy.definition(wnid) if wnid in self._taxonomy else "",
            parents=self._parents[wnid],
            children=tuple(self._children.get(wnid, ())),
            **{name: int(counts[index]) for name, counts in self._counts.items()},
        )

    def nodes(self, wnids: Iterable[str]) -> list[Node]:
        """Describe the synsets that have images at or below them."""
        return [node for wnid in wnids if (node := self.node(wnid)) is not None]

    def full_name(self, wnid: str) -> str:
        """Return a synset's name with part of speech and sense, as ``animal.n.01``."""
        entry = self._collection.by_wnid.get(wnid)
        return entry.synset if entry else self._taxonomy.name(wnid)

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
        goal = self.root
        if goal not in above:
            tops = [one for one in above if not self._parents[one]]
            goal = min(tops, key=lambda one: (above[one], self._names[one]))
        path = [wnid]
        while path[0] != goal:
            steps = {one: self._taxonomy.above(one) for one in self._parents[path[0]]}
            ups = [one for one in steps if goal in steps[one]]
            path.insert(0, min(ups, key=lambda one: (steps[one][goal], self._names[one])))
        return self.nodes(path)
