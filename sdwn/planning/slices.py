"""Slices: the share of a plan's shards that one of several clusters makes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdwn.errors import UsageError


@dataclass(frozen=True, slots=True)
class Slice:
    """The ``number``-th of ``count`` equal shares, counted from 1: every ``count``-th shard."""

    number: int = 1
    count: int = 1

    def __contains__(self, shard: int) -> bool:
        """Tell whether a shard, by its index, is in this share."""
        return shard % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        """Whether it is all of the plan."""
        return self.count == 1


WHOLE = Slice()


def parse_slice(text: str) -> Slice:
    """Read a slice.

    >>> [shard for shard in range(7) if shard in parse_slice("2/3")]
    [1, 4]

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text.strip(), re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise UsageError(
            f"slice {text}: expected a share such as 2/3, the second of three; found something else"
        )
    return Slice(int(match[1]), int(match[2]))
