"""Two releases side by side: the synsets of both, those that differ most first."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdwn.browser.collection import Entry, ImageView
from sdwn.browser.library import PAGE, Library


@dataclass(frozen=True, slots=True)
class PairSide:
    """A synset in one of two releases: how many images are labelled, and correct; the first."""

    labelled: int
    correct: int
    image: ImageView


@dataclass(frozen=True, slots=True)
class SynsetPair:
    """A synset of both; ``difference`` is how much more is correct there, from -1 to 1.

    It is None where a side has no labelled images.
    """

    entry: Entry
    here: PairSide
    there: PairSide
    difference: float | None


class SideBySide:
    """The synsets of two releases; threads may share it.

    Attributes:
        names: the two names; of one catalog they are the same, and told apart by their folders.
        only_here, only_there: how many synsets the other has not.
        labelled: how many synsets have labelled images in both.
        rates: the mean share of correct images of these, here and there; None without any.
    """

    def __init__(self, here: Library, there: Library) -> None:
        self._here, self._there = here, there
        both = [
            (entry.position, other.position)
            for entry in here.collection.entries
            if (other := there.collection.entry(entry.wnid)) is not None
        ]
        # By name, as the synsets of a collection are.
        self._ours, self._theirs = np.array(both, np.int64).reshape(-1, 2).T
        rates = [
            library.predictions.rates()[positions]
            if library.predictions
            else np.full(len(positions), np.nan)
            for library, positions in ((here, self._ours), (there, self._theirs))
        ]
        self._differences = rates[1] - rates[0]
        known = ~np.isnan(self._differences)
        # A stable sort leaves equal ones by name, and NaN is last.
        self._order = np.argsort(-np.abs(self._differences), kind="stable")
        self.names = _told_apart(here, there)
        self.only_here = len(here.collection) - len(both)
        self.only_there = len(there.collection) - len(both)
        self.labelled = int(np.count_nonzero(known))
        means = [float(rate[known].mean()) for rate in rates] if self.labelled else None
        self.rates = (means[0], means[1]) if means else None
        self.pages = max(1, math.ceil(len(both) / PAGE))

    def __len__(self) -> int:
        return len(self._ours)

    def page(self, number: int) -> list[SynsetPair]:
        """Return a page of the list, counted from 1."""
        return [self._pair(int(i)) for i in self._order[(number - 1) * PAGE : number * PAGE]]

    def find(self, wnid: str) -> tuple[SynsetPair, Entry | None, Entry | None] | None:
        """Return a synset of both, and those before and after it by name; None if it is not."""
        entry = self._here.collection.entry(wnid)
        index = int(np.searchsorted(self._ours, entry.position)) if entry else len(self)
        if entry is None or index == len(self) or self._ours[index] != entry.position:
            return None
        beside = [
            self._here.collection.entries[int(self._ours[i])] if 0 <= i < len(self) else None
            for i in (index - 1, index + 1)
        ]
        return self._pair(index), beside[0], beside[1]

    def images(self, wnid: str) -> list[tuple[ImageView | None, ImageView | None]]:
        """Return the images of a synset in both by number; None where a side lacks one."""
        here, there = (
            {image.number: image for image in library.images(wnid)}
            for library in (self._here, self._there)
        )
        return [(here.get(n), there.get(n)) for n in sorted(here.keys() | there.keys())]

    def _pair(self, index: int) -> SynsetPair:
        ours, theirs = int(self._ours[index]), int(self._theirs[index])
        difference = float(self._differences[index])
        return SynsetPair(
            self._here.collection.entries[ours],
            _side(self._here, ours),
            _side(self._there, theirs),
            None if math.isnan(difference) else difference,
        )


def _side(library: Library, position: int) -> PairSide:
    entry = library.collection.entries[position]
    correct, labelled = library.predictions.tally(entry) if library.predictions else (0, 0)
    first = library.describe(int(library.collection.rows_at(position)[0]))
    return PairSide(labelled, correct, first)


def _told_apart(here: Library, there: Library) -> tuple[str, str]:
    if here.name != there.name:
        return here.name, there.name
    ours, theirs = _path_ends(Path(here.root).absolute(), Path(there.root).absolute())
    return f"{here.name} ({ours})", f"{there.name} ({theirs})"


def _path_ends(ours: Path, theirs: Path) -> tuple[Path, Path]:
    """Return the ends of two paths, from where they differ.

    >>> [str(end) for end in _path_ends(Path("/data/one/release"), Path("/data/two/release"))]
    ['one/release', 'two/release']
    >>> [str(end) for end in _path_ends(Path("/data"), Path("/data/two"))]
    ['data', 'data/two']
    """
    shared = len(Path(os.path.commonpath([ours, theirs])).parts)
    start = min(shared, len(ours.parts) - 1, len(theirs.parts) - 1)
    return Path(*ours.parts[start:]), Path(*theirs.parts[start:])
