"""WordNet's tree above a release's synsets, with what lies below each node counted once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.collection import Collection, ImagePredictions
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
    """All synsets that have images and all that are above them.

    It is built at the first use, in a fraction of a second; threads may share it.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        collection: Collection,
        predictions: ImagePredictions | None = None,
    ) -> None:
        self._taxonomy, self._collection, self._predictions = taxonomy, collection, predictions
        self._lock = threading.Lock()
        self._root: str | None = None

    def build(self) -> None:
        """Build it now; later calls do nothing, and calls meanwhile wait."""
        with self._lock:
            if self._root is not None:
                return
            collection, predictions = self._collection, self._predictions
            # What is at or above each synset of the release, and the parents of all of that.
            self._parents: dict[str, tuple[str, ...]] = {}
            above: dict[str, set[str]] = {}

            def at_or_above(wnid: str) -> set[str]:
                if wnid not in above:
                    known = wnid in self._taxonomy
                    self._parents[wnid] = self._taxonomy.parents(wnid) if known else ()
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

            names = {wnid: self._name(wnid) for wnid in index}
            self._names, self._children = names, dict[str, list[str]]()
            for wnid in sorted(index, key=lambda one: (names[one], one)):
                for parent in self._parents[wnid]:
                    self._children.setdefault(parent, []).append(wnid)
            # Down from the largest top, while all that is below it is below one node.
            synsets = self._counts["synsets"]
            tops = sorted(wnid for wnid in index if not self._parents[wnid])
            root = max(tops, key=lambda one: synsets[index[one]], default="")
            while below := [
                one
                for one in self._children.get(root, ())
                if synsets[index[one]] == synsets[index[root]]
            ]:
                root = below[0]
            self._root = root

    def _name(self, wnid: str) -> str:
        if entry := self._collection.entry(wnid):
            return entry.synset
        return self._taxonomy.lemmas(wnid)[0].replace("_", " ")

    @property
    def root(self) -> str:
        """The lowest node that has all synsets below it; of several tops, below the largest."""
        self.build()
        return str(self._root)

    def node(self, wnid: str) -> Node | None:
        """Describe a synset; None if there are no images at or below it."""
        self.build()
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

    def below(self, wnid: str) -> NDArray[np.bool_]:
        """Return, by position in the collection, which synsets are this one or lie below it."""
        self.build()
        found = np.zeros(len(self._collection), dtype=bool)
        index = self._index.get(wnid)
        if index is not None:
            found[self._positions[self._starts[index] : self._starts[index + 1]]] = True
        return found

    def path(self, wnid: str) -> list[Node]:
        """Return the nodes of a shortest path from the root down to one.

        If it is not below the root, from the nearest top.
        """
        self.build()
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
