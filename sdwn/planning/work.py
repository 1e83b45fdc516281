"""Work that tasks share: its shards, a cluster's slice of them, and their common interface.

A plan's shards are made (`sdwn.planning.plan.Plan`), a release's images are classified
(`sdwn.prediction.plan.PredictionPlan`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sdwn.errors import UsageError
from sdwn.paths import RunPaths


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``start`` up to ``stop``: of a plan's table, in whole synsets; or of images."""

    index: int
    start: int
    stop: int


class ShardedWork(Protocol):
    """Work cut into shards that tasks of one stage finish, each by itself and in any order."""

    @property
    def stage(self) -> str:
        """The stage whose tasks work on it."""

    @property
    def digest(self) -> str:
        """A digest of it, which a task compares with the one that it was submitted for."""

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in order."""

    @property
    def assigned_shards(self) -> Sequence[Shard]:
        """The shards that this folder is to have: those of its slice."""

    @property
    def assigned_images(self) -> int:
        """Number of images of these shards."""

    def shard_images(self, shard: Shard) -> int:
        """Count a shard's images."""

    def done(self, paths: RunPaths) -> set[int]:
        """List the shards of a folder that are finished."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The ``number``-th of ``count`` equal shares, counted from 1: every ``count``-th shard."""

    number: int = 1
    count: int = 1

    def __contains__(self, shard: int) -> bool:
        """Return whether a shard, by its index, is in this share."""
        return shard % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        """True if it is all of the plan."""
        return self.count == 1


WHOLE = Slice()


def parse_slice(text: str) -> Slice:
    """Read a slice.

    >>> [shard for shard in range(7) if shard in parse_slice("2/3")]
    [1, 4]

    Raises:
        UsageError: it is not a slice.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text.strip(), re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise UsageError(f"slice {text}: expected a share such as 2/3, the second of three")
    return Slice(int(match[1]), int(match[2]))
