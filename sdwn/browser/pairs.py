"""Two releases side by side: the synsets of both, those that came out most differently first."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.library import PAGE, Library

if TYPE_CHECKING:
    from sdwn.browser.collection import Entry
    from sdwn.browser.judgement import Judgement
    from sdwn.browser.shot import Shot


@dataclass(frozen=True, slots=True)
class Side:
    """A synset in one of the two: its images, how many were judged and right, and one of them."""

    images: int
    judged: int
    right: int
    shot: Shot | None

    @property
    def rate(self) -> float | None:
        """The share of judged images that is right."""
        return self.right / self.judged if self.judged else None


@dataclass(frozen=True, slots=True)
class Pair:
    """A synset of both; ``difference`` is how much more is right there, from -1 to 1.

    It is None where one of the two was not judged.
    """

    entry: Entry
    here: Side
    there: Side
    difference: float | None


class Pairs:
    """The synsets of two releases; threads may share it."""

    def __init__(self, here: Library, there: Library) -> None:
        self._here, self._there = here, there
        both = [
            (entry.position, other.position)
            for entry in here.collection.synsets
            if (other := there.collection.entry(entry.wnid)) is not None
        ]
        places = np.array(both, np.int64).reshape(-1, 2)
        self._ours, self._theirs = places[:, 0], places[:, 1]
        self._differences, self._known = self._compared()
        # Synsets stand by name, and a stable sort leaves equal ones so.
        weight = np.where(self._known, np.abs(self._differences), -1)
        self._order = np.argsort(-weight, kind="stable")
        self.only_here = len(here.collection.synsets) - len(self)
        self.only_there = len(there.collection.synsets) - len(self)

    def __len__(self) -> int:
        return len(self._ours)

    @property
    def pages(self) -> int:
        """How many pages the list has, at least one."""
        return max(1, math.ceil(len(self) / PAGE))

    @property
    def judged(self) -> int:
        """How many synsets were judged in both."""
        return int(np.count_nonzero(self._known))

    @property
    def rates(self) -> tuple[float, float] | None:
        """The mean share of right images, here and there, of the synsets judged in both."""
        ours, theirs = self._here.judgement, self._there.judgement
        if ours is None or theirs is None or not self.judged:
            return None
        here = _rates(ours, self._ours)[self._known].mean()
        return float(here), float(_rates(theirs, self._theirs)[self._known].mean())

    def page(self, number: int) -> list[Pair]:
        """Give a page of the list, counted from 1."""
        return [self.at(int(i)) for i in self._order[(number - 1) * PAGE : number * PAGE]]

    def find(self, wnid: str) -> tuple[Pair, Entry | None, Entry | None] | None:
        """Give a synset of both, and those before and after it by name; None if it is not."""
        entry = self._here.collection.entry(wnid)
        place = int(np.searchsorted(self._ours, entry.position)) if entry else len(self)
        if entry is None or place == len(self) or self._ours[place] != entry.position:
            return None
        return self.at(place), self._entry(place - 1), self._entry(place + 1)

    def at(self, place: int) -> Pair:
        """Give the synset of both that stands so, by name."""
        entry = self._here.collection.synsets[int(self._ours[place])]
        difference = float(self._differences[place]) if self._known[place] else None
        here = _side(self._here, int(self._ours[place]))
        return Pair(entry, here, _side(self._there, int(self._theirs[place])), difference)

    def _entry(self, place: int) -> Entry | None:
        inside = 0 <= place < len(self)
        return self._here.collection.synsets[int(self._ours[place])] if inside else None

    def _compared(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Give for each synset the difference of the rates, and whether both were judged."""
        ours, theirs = self._here.judgement, self._there.judgement
        if ours is None or theirs is None:
            return np.zeros(len(self)), np.zeros(len(self), bool)
        known = (ours.judged[self._ours] > 0) & (theirs.judged[self._theirs] > 0)
        return _rates(theirs, self._theirs) - _rates(ours, self._ours), known


def _rates(judgement: Judgement, positions: NDArray[Any]) -> NDArray[np.float64]:
    """Give the share of right images of synsets, 0 where none was judged."""
    judged = np.maximum(judgement.judged[positions], 1)
    found: NDArray[np.float64] = judgement.right[positions] / judged
    return found


def told_apart(here: Library, there: Library) -> tuple[str, str]:
    """Name two releases; those of one catalog have the same name, and are told by their folders."""
    if here.name != there.name:
        return here.name, there.name
    ours, theirs = _apart(Path(here.root).absolute(), Path(there.root).absolute())
    return f"{here.name} ({ours})", f"{there.name} ({theirs})"


def _apart(ours: Path, theirs: Path) -> tuple[Path, Path]:
    """Give the ends of two paths, from where they differ.

    >>> [str(end) for end in _apart(Path("/data/one/release"), Path("/data/two/release"))]
    ['one/release', 'two/release']
    >>> [str(end) for end in _apart(Path("/data"), Path("/data/two"))]
    ['data', 'data/two']
    """
    shared = len(Path(os.path.commonpath([ours, theirs])).parts)
    start = min(shared, len(ours.parts) - 1, len(theirs.parts) - 1)
    return Path(*ours.parts[start:]), Path(*theirs.parts[start:])


def _side(library: Library, position: int) -> Side:
    judgement, entry = library.judgement, library.collection.synsets[position]
    first = int(library.collection.numbers[library.collection.rows_at(position)[0]])
    judged, right = (
        (int(judgement.judged[position]), int(judgement.right[position])) if judgement else (0, 0)
    )
    return Side(entry.images, judged, right, library.shot(entry.wnid, first))
