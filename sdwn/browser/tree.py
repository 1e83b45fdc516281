"""WordNet's nouns above a release's synsets, with what lies below each counted once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.collection import Collection
from sdwn.browser.judgement import Judgement
from sdwn.browser.numbering import Pieces, numbered
from sdwn.browser.once import Once
from sdwn.wordnet.hypernyms import Nouns


@dataclass(frozen=True, slots=True)
class Node:
    """A synset of WordNet at which or below which there are images.

    ``synsets`` and the counts of images are of all synsets at or below it, each counted once,
    however many ways lead to it. ``rate`` is the share of right ones, None if none was judged.
    ``children`` are sorted by name.
    """

    wnid: str
    name: str
    definition: str
    in_release: bool
    synsets: int
    images: int
    judged: int
    right: int
    black: int
    parents: tuple[str, ...]
    children: tuple[str, ...]

    @property
    def rate(self) -> float | None:
        """Share of the judged images that are right."""
        return self.right / self.judged if self.judged else None


@dataclass(frozen=True, slots=True)
class _Shape:
    """The nodes by wnid: what is above and below each, and their numbers.

    Nodes are numbered depth first, so that most subtrees are one run of numbers, and the few
    synsets that have several hypernyms add runs to the others: counting is a difference of sums.
    ``sums`` add up counts in the order of numbers, from 0; ``positions`` are those in the
    collection, -1 where the release has not the synset.
    """

    parents: dict[str, tuple[str, ...]]
    names: dict[str, str]
    children: dict[str, list[str]]
    numbers: dict[str, int]
    pieces: dict[str, Pieces]
    positions: NDArray[np.int64]
    sums: dict[str, NDArray[np.int64]]

    def count(self, name: str, wnid: str) -> int:
        """Count at and below a node."""
        sums = self.sums[name]
        return sum(int(sums[stop] - sums[start]) for start, stop in self.pieces[wnid])

    def holds(self, wnid: str, other: str) -> bool:
        """Tell whether a node is another one or above it."""
        number = self.numbers[other]
        return any(start <= number < stop for start, stop in self.pieces[wnid])


class Tree:
    """What lies below what, of all synsets that have images and all that are above them.

    It is made when it is first asked something, in a fraction of a second; threads may share it.
    """

    def __init__(
        self, nouns: Nouns, collection: Collection, judgement: Judgement | None = None
    ) -> None:
        self._nouns, self._collection, self._judgement = nouns, collection, judgement
        self._shape = Once(self._grown)
        self._root = Once(self._lowest)

    def __contains__(self, wnid: str) -> bool:
        return wnid in self._shape().parents

    def warm(self) -> None:
        """Make it now."""
        self._root()

    @property
    def root(self) -> str:
        """The lowest node that holds all synsets; of several tops, below the one with most."""
        return self._root()

    def node(self, wnid: str) -> Node | None:
        """Describe a synset; None if there are no images at or below it."""
        shape = self._shape()
        if wnid not in shape.parents:
            return None
        return Node(
            wnid=wnid,
            name=shape.names[wnid],
            definition=self._nouns.definition(wnid),
            in_release=self._collection.entry(wnid) is not None,
            parents=shape.parents[wnid],
            children=tuple(shape.children.get(wnid, ())),
            **{name: shape.count(name, wnid) for name in shape.sums},
        )

    def below(self, wnid: str) -> NDArray[np.bool_]:
        """Tell, by position in the collection, which synsets are this one or lie below it."""
        shape = self._shape()
        found = np.zeros(len(self._collection), dtype=bool)
        for start, stop in shape.pieces.get(wnid, ()):
            positions = shape.positions[start:stop]
            found[positions[positions >= 0]] = True
        return found

    def path(self, wnid: str) -> list[Node]:
        """Give the nodes from the root down to one, or from the top to what is above the root.

        Of several ways a shortest, of these the first by name.
        """
        shape = self._shape()
        if wnid not in shape.parents:
            return []
        goal = self.root if shape.holds(self.root, wnid) else ""
        way = _way(shape, wnid, goal)
        return [node for one in way if (node := self.node(one))]

    def _grown(self) -> _Shape:
        parents = _closure(self._nouns, [entry.wnid for entry in self._collection.synsets])
        names = {wnid: self._name(wnid) for wnid in parents}
        children = _children(parents, names)
        numbers, pieces = numbered(_tops(parents), children)
        positions = self._positions(numbers)
        sums = {name: _summed(values, positions) for name, values in self._counts().items()}
        return _Shape(parents, names, children, numbers, pieces, positions, sums)

    def _name(self, wnid: str) -> str:
        if entry := self._collection.entry(wnid):
            return entry.synset
        lemmas = self._nouns.lemmas(wnid)
        return lemmas[0].replace("_", " ") if lemmas else wnid

    def _positions(self, numbers: dict[str, int]) -> NDArray[np.int64]:
        found = np.full(len(numbers), -1, np.int64)
        for entry in self._collection.synsets:
            found[numbers[entry.wnid]] = entry.position
        return found

    def _counts(self) -> dict[str, NDArray[np.int64]]:
        collection, judgement = self._collection, self._judgement
        nothing = np.zeros(len(collection), np.int64)
        return {
            "synsets": nothing + 1,
            "images": np.diff(collection.starts),
            "judged": judgement.judged if judgement else nothing,
            "right": judgement.right if judgement else nothing,
            "black": collection.total(collection.black),
        }

    def _lowest(self) -> str:
        shape = self._shape()
        found = max(_tops(shape.parents), key=lambda top: shape.count("synsets", top), default="")
        whole = shape.count("synsets", found) if found else 0
        lower: str | None = found
        while lower:
            found = lower
            children = shape.children.get(found, ())
            lower = next((one for one in children if shape.count("synsets", one) == whole), None)
        return found


def _way(shape: _Shape, wnid: str, goal: str) -> list[str]:
    """Go up ring by ring: the first way that arrives is a shortest one. No goal is any top."""
    ring: list[tuple[str, ...]] = [(wnid,)]
    seen = {wnid}
    while True:
        for way in ring:
            if way[0] == goal or not (goal or shape.parents[way[0]]):
                return list(way)
        above = [(parent, *way) for way in ring for parent in shape.parents[way[0]]]
        above.sort(key=lambda way: [shape.names[one] for one in way])
        ring = []
        for way in above:
            if way[0] not in seen:
                seen.add(way[0])
                ring.append(way)


def _summed(values: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    # The last place, -1, stands for nodes that the release has not.
    return np.concatenate([[0], np.cumsum(np.append(values, 0)[positions])])


def _tops(parents: dict[str, tuple[str, ...]]) -> list[str]:
    return sorted(wnid for wnid, above in parents.items() if not above)


def _children(parents: dict[str, tuple[str, ...]], names: dict[str, str]) -> dict[str, list[str]]:
    """Map synsets to what is right below them, by name."""
    children: dict[str, list[str]] = {}
    for wnid in sorted(parents, key=lambda one: (names[one], one)):
        for parent in parents[wnid]:
            children.setdefault(parent, []).append(wnid)
    return children


def _closure(nouns: Nouns, wnids: list[str]) -> dict[str, tuple[str, ...]]:
    """Map synsets, and all that are above them, to their parents."""
    parents: dict[str, tuple[str, ...]] = {}
    left = list(wnids)
    while left:
        wnid = left.pop()
        if wnid not in parents:
            parents[wnid] = nouns.parents(wnid)
            left += parents[wnid]
    return parents
