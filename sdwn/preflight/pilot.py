"""The stage that makes a pilot: a few images of a plan, as any task makes them, and their speed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sdwn.batches import next_smaller_batch
from sdwn.errors import OutOfMemoryError
from sdwn.generation.batching import ImageSampler, load_sampler
from sdwn.generation.task import make_shards
from sdwn.io import write_text
from sdwn.models.lock import locked_weights
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan, read_plan

IMAGES = 20


def pilot_plan(plan: Plan) -> Plan:
    """Pick whole synsets, evenly over the plan: at least :data:`IMAGES` images, one shard.

    An image of the pilot is the image that the whole run makes.
    """
    count = min(len(plan.synsets), math.ceil(IMAGES / plan.config.images_per_synset))
    rows = [int((number + 0.5) * len(plan.synsets) / count) for number in range(count)]
    images = count * plan.config.images_per_synset
    sizes = {"images_per_shard": images, "shard_hours": None, "images_per_second": None}
    storage = plan.config.storage.model_copy(update=sizes)
    config = plan.config.model_copy(update={"storage": storage})
    return Plan(plan.catalog, config, tuple(replace(plan.synsets[row], shard=0) for row in rows))


@dataclass(frozen=True, slots=True)
class Speed:
    """A device's speed once it is warm, at the batch size that the run's tasks would take."""

    batch_size: int
    images_per_second: float
    peak_bytes: int


def make_pilot(run: Path, indices: Iterable[int], batch_size: int | None = None) -> None:
    """Make the pilot's images as any task would, then time whole batches."""
    paths = RunPaths(run)
    plan = read_plan(paths)
    shards = [plan.shards[index] for index in indices]
    if not shards:
        return  # a process whose GPU is not needed
    weights = locked_weights(paths, plan.config.model)
    sampler = load_sampler(plan.config, weights)
    batch = make_shards(paths, plan, shards, sampler, batch_size)
    speed = _timed(sampler, list(plan.specs(plan.shards[0])), batch.images)
    write_text(paths.speed, json.dumps(asdict(speed)) + "\n")


def _timed(sampler: ImageSampler, specs: list[ImageSpec], size: int) -> Speed:
    """Time batches as large as the run's, which may have more images than the pilot."""
    filled = [specs[number % len(specs)] for number in range(size)]
    try:
        seconds = min(sampler.seconds(filled) for _ in range(2))
    except OutOfMemoryError:
        smaller = next_smaller_batch(size, sampler.config.images_per_synset)
        if smaller is None:
            raise
    else:
        return Speed(size, size / seconds, sampler.peak_bytes)
    sampler.forget_peak()
    return _timed(sampler, specs, smaller)
