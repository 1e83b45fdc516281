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
class SynsetPair:
    """A synset of both releases: its first images, and how many are (correct, labelled), in each.

    ``difference`` is how much more is correct in the second, from -1 to 1; None where one of
    them has no labelled images.
    """

    entry: Entry
    images: tuple[ImageView, ImageView]
    tallies: tuple[tuple[int, int], tuple[int, int]]
    difference: float | None


class SideBySide:
    """The synsets of two releases; threads may share it.

    Attributes:
        names: of the two; where they are the same, with the folders in which they differ.
        total, only_here, only_there: how many synsets are in both, and in one of them alone.
        labelled: how many synsets have labelled images in both.
        rates: the mean share of correct images of these, here and there; None without any.
        pages: of the list, at least one.
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
        rates = here.rates()[self._ours], there.rates()[self._theirs]
        self._differences = rates[1] - rates[0]
        # A stable sort leaves equal ones by name; NaN, where a side has no rate, is last.
        self._order = np.argsort(-np.abs(self._differences), kind="stable")
        known = ~np.isnan(self._differences)
        self.labelled = int(np.count_nonzero(known))
        self.rates = [float(rate[known].mean()) for rate in rates] if self.labelled else None
        self.names = tell_apart((here.name, there.name), (here.root, there.root))
        self.only_here = len(here.collection) - len(both)
        self.only_there = len(there.collection) - len(both)
        self.total = len(both)
        self.pages = max(1, math.ceil(len(both) / PAGE))

    def page(self, number: int) -> list[SynsetPair]:
        """Return a page of the list, counted from 1."""
        return [self._pair(i) for i in self._order[(number - 1) * PAGE : number * PAGE].tolist()]

    def find(self, entry: Entry) -> tuple[SynsetPair, Entry | None, Entry | None] | None:
        """Return a synset of both, and those before and after it by name; None if it is not."""
        index = int(np.searchsorted(self._ours, entry.position))
        if index == self.total or self._ours[index] != entry.position:
            return None
        before, after = (
            self._here.collection.entries[int(self._ours[i])] if 0 <= i < self.total else None
            for i in (index - 1, index + 1)
        )
        return self._pair(index), before, after

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
            (self._here.first_image(ours), self._there.first_image(theirs)),
            (self._here.tally(ours), self._there.tally(theirs)),
            None if math.isnan(difference) else difference,
        )


def tell_apart(names: tuple[str, str], roots: tuple[str, str]) -> tuple[str, str]:
    """Return two names; where they are the same, with the ends of the paths that differ.

    >>> tell_apart(("paper", "paper"), ("/data/one/release", "/data/two/release"))
    ('paper (one/release)', 'paper (two/release)')
    >>> tell_apart(("paper", "paper"), ("/data", "/data/two"))
    ('paper (data)', 'paper (data/two)')
    """
    if names[0] != names[1]:
        return names
    ours, theirs = (Path(root).parts for root in roots)
    shared = len(Path(os.path.commonpath(roots)).parts)
    start = min(shared, len(ours) - 1, len(theirs) - 1)
    ends = Path(*ours[start:]), Path(*theirs[start:])
    return f"{names[0]} ({ends[0]})", f"{names[1]} ({ends[1]})"
