"""Batch sizes, the grid that they lie on, and what else a task is asked for. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, cast

from sdwn.errors import UsageError

# Carry a profile's batch size and placement through the job script into a task's process, where
# they are read once; within a process they are an argument.
VARIABLE = "SDWN_BATCH_SIZE"
PLACEMENT_VARIABLE = "SDWN_PLACEMENT"

# Where a model's weights lie while it samples: all on the card; each part there only while it
# works; or whichever fits.
Placement = Literal["auto", "gpu", "offload"]


@dataclass(frozen=True, slots=True)
class BatchSize:
    """A number of images, and where it comes from."""

    images: int
    source: str
    vae_slicing: bool = False

    def __str__(self) -> str:
        slicing = ", decoded one by one" if self.vae_slicing else ""
        return f"{self.images} images a batch ({self.source}{slicing})"


def batch_sizes(each: int, most: int) -> list[int]:
    """List the sizes up to ``most`` on the grid: equal parts and multiples of a synset's images.

    >>> batch_sizes(10, 40)
    [1, 2, 5, 10, 20, 30, 40]
    """
    return [size for size in range(1, most + 1) if size % each == 0 or each % size == 0]


def on_grid(size: int, each: int) -> int:
    """Return the largest size on the grid that is not above ``size``, which is at least 1."""
    return size - size % each if size > each else batch_sizes(each, size)[-1]


def next_smaller_batch(size: int, each: int) -> int | None:
    """Return the next smaller size, None below one image; its grid divides the larger one's.

    >>> [next_smaller_batch(size, 10) for size in (80, 30, 10, 5, 2, 1)]
    [40, 10, 5, 1, 1, None]
    """
    smaller = (size // n for n in range(2, size + 1) if size % n == 0)
    return next((s for s in smaller if on_grid(s, each) == s), None)


def off_grid(size: int, each: int) -> str | None:
    """Return why a batch of this size would tear synsets apart; None if it does not.

    >>> off_grid(15, 10)
    '15 is neither a multiple of images_per_synset (10) nor an equal part of it; try 10 or 20'
    """
    below = on_grid(size, each)
    if size == below:
        return None
    reason = f"{size} is neither a multiple of images_per_synset ({each}) nor an equal part of it"
    return f"{reason}; try {below} or {each * (size // each + 1)}"


def parse_batch_size(text: str, source: str) -> int:
    """Read a number of images; ``source`` names where it stands in error messages."""
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{source}: expected a number of images, found {text!r}")
    return int(text)


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of a task's process, from the command line or a profile."""

    batch_size: int | None = None
    placement: Placement = "auto"


NO_OPTIONS = TaskOptions()


def options_of_task() -> TaskOptions:
    """Read what a profile asks for, at the start of a task's process."""
    text, placement = os.environ.get(VARIABLE), os.environ.get(PLACEMENT_VARIABLE, "auto")
    size = parse_batch_size(text, VARIABLE) if text else None
    return TaskOptions(size, cast(Placement, placement))
