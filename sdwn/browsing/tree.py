"""WordNet's nouns above a release's synsets, with what lies below each counted once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdwn.browsing.collection import Collection
from sdwn.browsing.judgement import Judgement
from sdwn.hypernyms import Nouns

# The nodes below a node: places in the tree's numbering, as pieces from a start up to a stop.
Pieces = tuple[tuple[int, int], ...]


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


class Tree:
    """What lies below what, of all synsets that have images and all that are above them.

    Nodes are numbered depth first, so that most subtrees are one run of numbers, and the few
    synsets that have several hypernyms add runs to the others: counting is a difference of sums.
    """

    def __init__(
        self, nouns: Nouns, collection: Collection, judgement: Judgement | None = None
    ) -> None:
        self._nouns, self._collection = nouns, collection
        self._parents = _closure(nouns, [entry.wnid for entry in collection.synsets])
        self._names = {wnid: self._name(wnid) for wnid in self._parents}
        self._children = self._below_each()
        self._numbers, stops = _numbered(self._tops(), self._children)
        self._pieces = _pieces(self._numbers, stops, self._children)
        self._positions = self._positions_by_number()
        self._sums = self._summed(judgement)
        self.root = self._lowest()

    def __contains__(self, wnid: str) -> bool:
        return wnid in self._parents

    def node(self, wnid: str) -> Node | None:
        """Describe a synset; None if there are no images at or below it."""
        if wnid not in self._parents:
            return None
        counts = {name: self._count(sums, wnid) for name, sums in self._sums.items()}
        return Node(
            wnid=wnid,
            name=self._names[wnid],
            definition=self._nouns.definition(wnid),
            in_release=self._collection.entry(wnid) is not None,
            parents=self._parents[wnid],
            children=tuple(self._children.get(wnid, ())),
            **counts,
        )

    def below(self, wnid: str) -> NDArray[np.bool_]:
        """Tell, by position in the collection, which synsets are this one or lie below it."""
        found = np.zeros(len(self._collection), dtype=bool)
        for start, stop in self._pieces.get(wnid, ()):
            positions = self._positions[start:stop]
            found[positions[positions >= 0]] = True
        return found

    def path(self, wnid: str) -> list[Node]:
        """Give the nodes from the root, or else the top, down to one: the shortest way by name."""
        return [node for one in self._way(wnid) if (node := self.node(one))]

    def _way(self, wnid: str) -> list[str]:
        """Go up in rings: the first way to reach the root is a shortest one."""
        if wnid not in self._parents:
            return []
        goal = self.root if self._holds(self.root, wnid) else None
        ring: list[tuple[str, ...]] = [(wnid,)]
        seen = {wnid}
        while ring:
            for way in ring:
                if way[0] == goal or (goal is None and not self._parents[way[0]]):
                    return list(way)
            above = sorted(
                ((parent, *way) for way in ring for parent in self._parents[way[0]]),
                key=lambda way: [self._names[one] for one in way],
            )
            ring = []
            for way in above:
                if way[0] not in seen:
                    seen.add(way[0])
                    ring.append(way)
        return [wnid]

    def _holds(self, wnid: str, other: str) -> bool:
        number = self._numbers[other]
        return any(start <= number < stop for start, stop in self._pieces[wnid])

    def _count(self, sums: NDArray[np.int64], wnid: str) -> int:
        return sum(int(sums[stop] - sums[start]) for start, stop in self._pieces[wnid])

    def _name(self, wnid: str) -> str:
        if entry := self._collection.entry(wnid):
            return entry.synset
        lemmas = self._nouns.lemmas(wnid)
        return lemmas[0].replace("_", " ") if lemmas else wnid

    def _below_each(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {}
        for wnid in sorted(self._parents, key=lambda one: (self._names[one], one)):
            for parent in self._parents[wnid]:
                children.setdefault(parent, []).append(wnid)
        return children

    def _tops(self) -> list[str]:
        return sorted(wnid for wnid, parents in self._parents.items() if not parents)

    def _positions_by_number(self) -> NDArray[np.int64]:
        """Give the collection's position of each node, -1 where the release has it not."""
        found = np.full(len(self._numbers), -1, np.int64)
        for entry in self._collection.synsets:
            found[self._numbers[entry.wnid]] = entry.position
        return found

    def _summed(self, judgement: Judgement | None) -> dict[str, NDArray[np.int64]]:
        entries, collection = len(self._collection), self._collection
        nothing = np.zeros(entries, np.int64)
        counts = {
            "synsets": np.ones(entries, np.int64),
            "images": np.diff(collection.starts),
            "judged": judgement.judged if judgement else nothing,
            "right": judgement.right if judgement else nothing,
            "black": collection.total(collection.black),
        }
        return {name: self._running(values) for name, values in counts.items()}

    def _running(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        # The last place, -1, stands for nodes that the release has not.
        placed = np.append(values, 0)[self._positions]
        return np.concatenate([[0], np.cumsum(placed)])

    def _lowest(self) -> str:
        """Find the lowest node that holds all synsets; of several tops, the one that holds most."""
        synsets = self._sums["synsets"]
        if not self._parents:
            return ""
        found = max(self._tops(), key=lambda wnid: self._count(synsets, wnid))
        whole = self._count(synsets, found)
        while True:
            children = self._children.get(found, ())
            lower = next((one for one in children if self._count(synsets, one) == whole), None)
            if lower is None:
                return found
            found = lower


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


def _numbered(
    tops: list[str], children: dict[str, list[str]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Number nodes depth first, from 0; also say where each one's own run of numbers stops."""
    numbers: dict[str, int] = {}
    stops: dict[str, int] = {}
    for top in tops:
        numbers[top] = len(numbers)
        ways: list[tuple[str, Iterator[str]]] = [(top, iter(children.get(top, ())))]
        while ways:
            wnid, rest = ways[-1]
            child = next((one for one in rest if one not in numbers), None)
            if child is None:
                stops[wnid] = len(numbers)
                ways.pop()
            else:
                numbers[child] = len(numbers)
                ways.append((child, iter(children.get(child, ()))))
    return numbers, stops


def _pieces(
    numbers: dict[str, int], stops: dict[str, int], children: dict[str, list[str]]
) -> dict[str, Pieces]:
    """Give, for each node, the numbers of all that is at or below it."""
    found: dict[str, Pieces] = {}
    # In the order in which numbering left them, what is below a node stands before it.
    for wnid, stop in stops.items():
        own = (numbers[wnid], stop)
        others = {
            piece
            for child in children.get(wnid, ())
            for piece in found[child]
            if not own[0] <= piece[0] < piece[1] <= own[1]
        }
        found[wnid] = _joined([own, *others]) if others else (own,)
    return found


def _joined(pieces: list[tuple[int, int]]) -> Pieces:
    """Join pieces that overlap or touch.

    >>> _joined([(5, 8), (0, 2), (1, 3), (8, 9)])
    ((0, 3), (5, 9))
    """
    found: list[tuple[int, int]] = []
    for start, stop in sorted(pieces):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)
