"""WordNet's tree above a release's synsets, with what lies below each node counted once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.collection import Collection, ImagePredictions
from sdwn.wordnet.hypernyms import Nouns

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


@dataclass(frozen=True, slots=True)
class _Shape:
    """The nodes by wnid: what is above and below each, and the labels of what is at or below it.

    ``tops`` have nothing above them. ``positions`` are, by label, those in the collection, -1
    where the release lacks the synset.
    ``sums`` add counts up in the order of labels, so that a count below a node is, for each
    range, a difference of two sums.
    """

    tops: list[str]
    parents: dict[str, tuple[str, ...]]
    names: dict[str, str]
    children: dict[str, list[str]]
    labels: dict[str, int]
    ranges: dict[str, Ranges]
    positions: NDArray[np.int64]
    sums: dict[str, NDArray[np.int64]]

    def count(self, name: str, wnid: str) -> int:
        """Count at and below a node."""
        sums = self.sums[name]
        return sum(int(sums[stop] - sums[start]) for start, stop in self.ranges[wnid])


class SynsetTree:
    """All synsets that have images and all that are above them.

    It is built when it is first asked something, in a fraction of a second; threads may share it.
    """

    def __init__(
        self, taxonomy: Nouns, collection: Collection, predictions: ImagePredictions | None = None
    ) -> None:
        self._taxonomy, self._collection, self._predictions = taxonomy, collection, predictions
        self._lock = threading.Lock()
        self._built: tuple[_Shape, str] | None = None

    def build(self) -> tuple[_Shape, str]:
        """Return the nodes and the root; the first call builds them, and others wait for it."""
        with self._lock:
            if self._built is None:
                shape = self._shape()
                self._built = shape, _lowest_of_all(shape)
            return self._built

    @property
    def root(self) -> str:
        """The lowest node that has all synsets below it; of several tops, below the largest."""
        return self.build()[1]

    def node(self, wnid: str) -> Node | None:
        """Describe a synset; None if there are no images at or below it."""
        shape, _ = self.build()
        if wnid not in shape.parents:
            return None
        return Node(
            wnid=wnid,
            name=shape.names[wnid],
            definition=self._taxonomy.definition(wnid),
            in_release=self._collection.entry(wnid) is not None,
            parents=shape.parents[wnid],
            children=tuple(shape.children.get(wnid, ())),
            **{name: shape.count(name, wnid) for name in shape.sums},
        )

    def nodes(self, wnids: Sequence[str]) -> list[Node]:
        """Describe the synsets that have images at or below them."""
        return [node for wnid in wnids if (node := self.node(wnid)) is not None]

    def below(self, wnid: str) -> NDArray[np.bool_]:
        """Return, by position in the collection, which synsets are this one or lie below it."""
        shape, _ = self.build()
        found = np.zeros(len(self._collection), dtype=bool)
        for start, stop in shape.ranges.get(wnid, ()):
            positions = shape.positions[start:stop]
            found[positions[positions >= 0]] = True
        return found

    def path(self, wnid: str) -> list[Node]:
        """Return the nodes from the root down to one; from a top, if it is not below the root.

        Of several paths a shortest, of these the first by name.
        """
        shape, root = self.build()
        if wnid not in shape.parents:
            return []
        label = shape.labels[wnid]
        below_root = any(start <= label < stop for start, stop in shape.ranges[root])
        # Breadth first, upwards: the first path that arrives is a shortest one.
        ring: list[tuple[str, ...]] = [(wnid,)]
        seen = {wnid}
        while True:
            for path in ring:
                if (path[0] == root) if below_root else not shape.parents[path[0]]:
                    return self.nodes(path)
            above = [(parent, *path) for path in ring for parent in shape.parents[path[0]]]
            above.sort(key=lambda path: [shape.names[one] for one in path])
            ring = []
            for path in above:
                if path[0] not in seen:
                    seen.add(path[0])
                    ring.append(path)

    def _shape(self) -> _Shape:
        collection, predictions = self._collection, self._predictions
        # The synsets of the release and all that are above them, to their parents.
        parents: dict[str, tuple[str, ...]] = {}
        left = [entry.wnid for entry in collection.entries]
        while left:
            wnid = left.pop()
            if wnid not in parents:
                parents[wnid] = self._taxonomy.parents(wnid)
                left += parents[wnid]
        names = {wnid: self._name(wnid) for wnid in parents}
        children: dict[str, list[str]] = {}
        for wnid in sorted(parents, key=lambda one: (names[one], one)):
            for parent in parents[wnid]:
                children.setdefault(parent, []).append(wnid)
        tops = sorted(wnid for wnid, above in parents.items() if not above)
        labels, ranges = interval_labels(tops, children)
        positions = np.full(len(labels), -1, np.int64)
        for entry in collection.entries:
            positions[labels[entry.wnid]] = entry.position
        nothing = np.zeros(len(collection), np.int64)
        counts = {
            "synsets": nothing + 1,
            "images": np.diff(collection.starts),
            "labelled": predictions.labelled if predictions else nothing,
            "correct": predictions.correct if predictions else nothing,
            "black": collection.count(collection.black),
        }
        sums = {
            # The last value, which -1 takes, is of nodes that the release lacks.
            name: np.concatenate([[0], np.cumsum(np.append(values, 0)[positions])])
            for name, values in counts.items()
        }
        return _Shape(tops, parents, names, children, labels, ranges, positions, sums)

    def _name(self, wnid: str) -> str:
        if entry := self._collection.entry(wnid):
            return entry.synset
        lemmas = self._taxonomy.lemmas(wnid)
        return lemmas[0].replace("_", " ") if lemmas else wnid


def _lowest_of_all(shape: _Shape) -> str:
    """Find the lowest node that has all synsets below it; of several tops, below the largest."""
    lowest = max(shape.tops, key=lambda top: shape.count("synsets", top), default="")
    whole = shape.count("synsets", lowest) if lowest else 0
    lower: str | None = lowest
    while lower:
        lowest = lower
        children = shape.children.get(lowest, ())
        lower = next((one for one in children if shape.count("synsets", one) == whole), None)
    return lowest


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
