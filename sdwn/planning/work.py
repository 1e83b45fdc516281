"""What tasks share: a plan's shards to make, or a release's images to classify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Shard


class ShardedWork(Protocol):
    """Work cut into shards that tasks of one stage finish, each by itself and in any order."""

    @property
    def stage(self) -> str:
        """Which of the stages of a task works on it."""

    @property
    def digest(self) -> str:
        """What a task that was submitted for it holds it against."""

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in order."""

    @property
    def own_shards(self) -> Sequence[Shard]:
        """The shards that this folder is to have."""

    @property
    def own_images(self) -> int:
        """Number of images of these shards."""

    def shard_images(self, shard: Shard) -> int:
        """Count a shard's images."""

    def done(self, paths: RunPaths) -> set[int]:
        """List the shards of a folder that are finished."""
