"""One image as pages show it, and what a classifier said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from sdwn.storage.columns import BLACK

STATES = ("right", "wrong", "black", "unjudged", "other")


@dataclass(frozen=True, slots=True)
class Guess:
    """A class that a classifier saw: its wnid, its first lemma, its probability."""

    wnid: str
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a classifier said of an image, its best classes first.

    ``right`` and ``rank`` (the label's place among the 1000, from 0) are None where the synset is
    no class of ImageNet-1k; ``subtree_probability`` where the synset has no scope.
    """

    top5: tuple[Guess, ...]
    right: bool | None
    rank: int | None
    subtree_probability: float | None


@dataclass(frozen=True, slots=True)
class Shot:
    """An image: ``row`` is its index in the release, ``verdict`` None where it was not judged."""

    wnid: str
    synset: str
    number: int
    row: int
    status: str
    verdict: Verdict | None = None

    @property
    def black(self) -> bool:
        """Whether it shows nothing: blackened by the safety checker, NaN, or imported so."""
        return self.status in BLACK

    @property
    def state(self) -> str:
        """What to mark it as, one of ``STATES``: a black image is black, whatever was seen in it.

        ``other`` was judged, but what is right is not known: the synset is no ImageNet-1k class.
        """
        if self.black:
            return "black"
        if self.verdict is None:
            return "unjudged"
        if self.verdict.right is None:
            return "other"
        return "right" if self.verdict.right else "wrong"


class Shots(Sequence[Shot]):
    """Images by their rows in the release, each described when it is looked at.

    >>> shots = Shots(np.array([3, 1]), lambda row: Shot("n02391049", "zebra.n.01", row, row, "ok"))
    >>> len(shots), shots[-1].number, [shot.number for shot in shots[:1]]
    (2, 1, [3])
    """

    def __init__(self, rows: NDArray[np.int64], describe: Callable[[int], Shot]) -> None:
        self._rows, self._describe = rows, describe

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Shot: ...

    @overload
    def __getitem__(self, place: slice) -> Shots: ...

    def __getitem__(self, place: int | slice) -> Shot | Shots:
        if isinstance(place, slice):
            return Shots(self._rows[place], self._describe)
        return self._describe(int(self._rows[place]))

    def place(self, row: int) -> int:
        """Find the image of a row, without a look at the others; IndexError if it is not there."""
        return int(np.flatnonzero(self._rows == row)[0])
