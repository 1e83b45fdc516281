"""WordNet's tree above a release's synsets, with what lies below each node counted once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.collection import Collection, ImagePredictions
from sdwn.wordnet.taxonomy import Taxonomy

# Ranges of labels, each from a start up to a stop, apart and in order.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A synset of WordNet at which or below which there are images.

    ``synsets`` and the counts of images are of all synsets at or below it, each counted once,
    however many ways lead to it. ``labelled`` images were classified and have a label; ``rate``
    is the share of them that is correct, None if there are none. ``children`` are by name.
    """

    wnid: str
    name: str
    definition: str
    in_release: bool
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

    It is built when it is first asked something, in a fraction of a second; threads may share it.

    The nodes have labels such that all that is at or below one are a few ranges of labels, see
    `interval_labels`. Counts are added up in the order of labels, so that a count at or below a
    node is, for each range, a difference of two sums.
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
            # The synsets of the release and all that are above them, to their parents.
            self._parents: dict[str, tuple[str, ...]] = {}
            left = [entry.wnid for entry in collection.entries]
            while left:
                wnid = left.pop()
                if wnid not in self._parents:
                    self._parents[wnid] = self._taxonomy.parents(wnid)
                    left += self._parents[wnid]
            self._names = {wnid: self._name(wnid) for wnid in self._parents}
            self._children: dict[str, list[str]] = {}
            for wnid in sorted(self._parents, key=lambda one: (self._names[one], one)):
                for parent in self._parents[wnid]:
                    self._children.setdefault(parent, []).append(wnid)
            tops = sorted(wnid for wnid, above in self._parents.items() if not above)
            self._labels, self._ranges = interval_labels(tops, self._children)
            # By label, the position in the collection, -1 where the release lacks the synset.
            self._positions = np.full(len(self._labels), -1, np.int64)
            for entry in collection.entries:
                self._positions[self._labels[entry.wnid]] = entry.position
            nothing = np.zeros(len(collection), np.int64)
            counts = {
                "synsets": nothing + 1,
                "images": np.diff(collection.starts),
                "labelled": predictions.labelled if predictions else nothing,
                "correct": predictions.correct if predictions else nothing,
                "black": collection.count(collection.black),
            }
            self._sums = {
                # The last value, which -1 takes, is of nodes that the release lacks.
                name: np.concatenate([[0], np.cumsum(np.append(values, 0)[self._positions])])
                for name, values in counts.items()
            }
            # The lowest node that has all synsets below it; of several tops, below the largest.
            root = max(tops, key=lambda top: self._count("synsets", top), default="")
            whole, lower = self._count("synsets", root), root
            while lower:
                root = lower
                below = self._children.get(root, ())
                lower = next((c for c in below if self._count("synsets", c) == whole), "")
            self._root = root

    def _name(self, wnid: str) -> str:
        if entry := self._collection.entry(wnid):
            return entry.synset
        lemmas = self._taxonomy.lemmas(wnid)
        return lemmas[0].replace("_", " ") if lemmas else wnid

    def _count(self, name: str, wnid: str) -> int:
        sums = self._sums[name]
        return sum(int(sums[stop] - sums[start]) for start, stop in self._ranges.get(wnid, ()))

    @property
    def root(self) -> str:
        """The lowest node that has all synsets below it; of several tops, below the largest."""
        self.build()
        return str(self._root)

    def node(self, wnid: str) -> Node | None:
        """Describe a synset; None if there are no images at or below it."""
        self.build()
        if wnid not in self._parents:
            return None
        return Node(
            wnid=wnid,
            name=self._names[wnid],
            definition=self._taxonomy.definition(wnid),
            in_release=self._collection.entry(wnid) is not None,
            parents=self._parents[wnid],
            children=tuple(self._children.get(wnid, ())),
            **{name: self._count(name, wnid) for name in self._sums},
        )

    def nodes(self, wnids: Sequence[str]) -> list[Node]:
        """Describe the synsets that have images at or below them."""
        return [node for wnid in wnids if (node := self.node(wnid)) is not None]

    def below(self, wnid: str) -> NDArray[np.bool_]:
        """Return, by position in the collection, which synsets are this one or lie below it."""
        self.build()
        found = np.zeros(len(self._collection), dtype=bool)
        for start, stop in self._ranges.get(wnid, ()):
            positions = self._positions[start:stop]
            found[positions[positions >= 0]] = True
        return found

    def path(self, wnid: str) -> list[Node]:
        """Return the nodes from the root down to one; from a top, if it is not below the root.

        Of several paths a shortest, of these the first by name.
        """
        self.build()
        if wnid not in self._parents:
            return []
        label, root = self._labels[wnid], self.root
        below_root = any(start <= label < stop for start, stop in self._ranges[root])
        # Breadth first, upwards: the first path that arrives is a shortest one.
        ring: list[tuple[str, ...]] = [(wnid,)]
        seen = {wnid}
        while True:
            for path in ring:
                if (path[0] == root) if below_root else not self._parents[path[0]]:
                    return self.nodes(path)
            above = [(parent, *path) for path in ring for parent in self._parents[path[0]]]
            above.sort(key=lambda path: [self._names[one] for one in path])
            ring = []
            for path in above:
                if path[0] not in seen:
                    seen.add(path[0])
                    ring.append(path)


def interval_labels(
    tops: Sequence[str], children: Mapping[str, Sequence[str]]
) -> tuple[dict[str, int], dict[str, Ranges]]:
    """Label all nodes of a graph without cycles from 0, and find the labels at or below each.

    Labels count up depth first, so that in a tree all that is at or below a node is one range.
    A node that has several parents adds ranges to those that it was not labelled under
    ("Efficient management of transitive relationships in large data and knowledge bases",
    SIGMOD 1989).

    >>> labels, ranges = interval_labels(["a"], {"a": ["b", "c"], "b": ["d", "e"], "c": ["d", "f"]})
    >>> labels["d"], ranges["b"], ranges["c"]
    (2, ((1, 4),), ((2, 3), (4, 6)))
    """
    labels: dict[str, int] = {}
    stops: dict[str, int] = {}
    for top in tops:
        labels[top] = len(labels)
        paths: list[tuple[str, Iterator[str]]] = [(top, iter(children.get(top, ())))]
        while paths:
            node, rest = paths[-1]
            child = next((one for one in rest if one not in labels), None)
            if child is None:
                stops[node] = len(labels)
                paths.pop()
            else:
                labels[child] = len(labels)
                paths.append((child, iter(children.get(child, ()))))
    ranges: dict[str, Ranges] = {}
    # In the order in which the walk left them, what is below a node stands before it.
    for node, stop in stops.items():
        start = labels[node]
        outside = {
            one
            for child in children.get(node, ())
            for one in ranges[child]
            if one[0] < start or one[1] > stop
        }
        joined: list[tuple[int, int]] = []
        for first, last in sorted([(start, stop), *outside]):
            if joined and first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(last, joined[-1][1])
            else:
                joined.append((first, last))
        ranges[node] = tuple(joined)
    return labels, ranges
