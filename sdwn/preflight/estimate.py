"""What a run takes, said before it is submitted: tasks, hours, GPU-hours, bytes, and by whom.

The arithmetic is one for estimates and pilots. Pure, but for files of measurements; no torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sdwn.errors import IntegrityError
from sdwn.io import read_json
from sdwn.jobs.processes import shares
from sdwn.jobs.profile import ClusterProfile, minutes
from sdwn.paths import RunPaths
from sdwn.preflight.known_speeds import DeviceSpeed, speeds, why_unknown
from sdwn.storage.codecs import CODECS

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.planning.plan import Plan

Part = tuple[int, ...]

# What a plan is laid out on before anybody names a site.
ONE_GPU = ClusterProfile(array_parallelism=1, time="366-0")

# Each look at a finished shard's size is a question to a shared file system.
MOST_SHARDS_SEEN = 100


@dataclass(frozen=True, slots=True)
class Cost:
    """What tasks take on a device.

    ``hours_per_task`` is the longest task's, loading included, ``device_hours`` what all tasks
    hold devices for, and ``hours`` the time until the last one ends if all that may run at once
    do so. ``warning`` says what will not work as planned, ``stuck`` that no start of a task would
    finish a batch.
    """

    speed: DeviceSpeed
    hours_per_task: float
    device_hours: float
    hours: float
    warning: str | None
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """What making shards takes: one :class:`Cost` for each device that they may run on.

    ``unknown`` says why there is none, and how to find out.
    """

    images: int
    shards: int
    tasks: int
    devices_per_task: int
    bytes: int
    bytes_source: str
    costs: tuple[Cost, ...]
    unknown: str | None

    def as_dict(self) -> dict[str, Any]:
        """Turn it into plain data; a cost and its speed are one mapping."""
        costs = [{**cost.pop("speed"), **cost} for cost in map(asdict, self.costs)]
        return {**asdict(self), "costs": costs}


def estimate(
    paths: RunPaths, plan: Plan, indices: Sequence[int], profile: ClusterProfile | None
) -> Estimate:
    """Estimate what making these shards takes under a profile, none of their images being there.

    Without a profile: a shard a task, one task at a time.
    """
    parts = _parts(indices, profile)
    images = _images(indices, plan)
    size, source = stored_bytes(paths, plan, images)
    found = speeds(plan.config, profile, paths)
    return Estimate(
        images=images,
        shards=len(indices),
        tasks=len(parts),
        devices_per_task=profile.processes if profile else 1,
        bytes=size,
        bytes_source=source,
        costs=tuple(cost(plan, parts, profile or ONE_GPU, speed) for speed in found),
        unknown=None if found else why_unknown(plan.config, profile, paths),
    )


def _parts(indices: Sequence[int], profile: ClusterProfile | None) -> list[Part]:
    if profile is None:
        return [(index,) for index in indices]
    from sdwn.jobs.cluster import cut

    return cut(indices, profile)


def _images(indices: Iterable[int], plan: Plan) -> int:
    return sum(plan.shard_images(plan.shards[index]) for index in indices)


def cost(plan: Plan, parts: Sequence[Part], profile: ClusterProfile, speed: DeviceSpeed) -> Cost:
    """Work out what tasks, given by their shards, take at a speed."""
    processes = profile.processes
    times = [
        # A task takes as long as the process with the most images.
        max(_images(share, plan) for share in shares(part, processes)) / speed.images_per_second
        + speed.loading_seconds
        for part in parts
    ]
    longest = max(times, default=0.0)
    asked = plan.config.generation.batch_size or profile.batch_size
    batch = asked or speed.batch_size or 1
    limit = 60 * minutes(profile.time) - profile.signal_delay_s
    first_batch = speed.loading_seconds + batch / speed.images_per_second
    too_long = longest > limit
    return Cost(
        speed=speed,
        hours_per_task=longest / 3600,
        device_hours=sum(times) * processes / 3600,
        hours=_seconds_in_all(times, profile.array_parallelism) / 3600,
        warning=_warning(longest, limit, speed, batch, profile) if too_long else None,
        stuck=too_long and limit <= first_batch,
    )


def _seconds_in_all(times: Sequence[float], at_once: int) -> float:
    """Say when the last task ends if so many run at once, each starting as another ends.

    >>> _seconds_in_all([3, 3, 3, 1], at_once=2), _seconds_in_all([3, 1], at_once=10**30)
    (6.0, 3.0)
    """
    ends = [0.0] * max(1, min(at_once, len(times)))
    for seconds in times:
        heapq.heappush(ends, heapq.heappop(ends) + seconds)
    return max(ends)


def _warning(
    longest: float, limit: float, speed: DeviceSpeed, batch: int, profile: ClusterProfile
) -> str:
    """Say what a time limit does to tasks that it is too short for; each start loads again."""
    loading = speed.loading_seconds
    what = f"a task takes {_time(longest)} and the time limit ends it after {_time(limit)}"
    advice = "ask for more --time, or plan smaller shards"
    if profile.shards_per_task > 1:
        advice += ", or fewer --shards-per-task"
    if limit <= loading:
        return f"{what}, before the model is loaded; {advice}"
    if limit <= loading + batch / speed.images_per_second:
        first = "a first image" if batch == 1 else f"a first batch of {batch} images"
        return f"{what}, before {first} is finished; {advice}, or smaller --batch-size"
    requeues = math.ceil((longest - loading) / (limit - loading)) - 1
    if requeues > profile.max_num_timeout:
        most = f"and max_num_timeout allows {profile.max_num_timeout}"
        return f"{what}: a task would be requeued {requeues} times {most}; {advice}"
    times = "once" if requeues == 1 else f"{requeues} times"
    return f"{what}: a task will be requeued {times}; {advice}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def stored_bytes(paths: RunPaths, plan: Plan, images: int) -> tuple[int, str]:
    """Estimate the bytes that so many of a plan's images take on disk, and say from what."""
    if each := _finished_bytes(paths, plan):
        return round(each * images), "as the run's finished shards"
    if each := _pilot_bytes(paths):
        return round(each * images), "as the run's pilot"
    generation = plan.config.generation
    ratio, source = _ratio(plan.config)
    return round(ratio * 3 * generation.width * generation.height * images), source


def _finished_bytes(paths: RunPaths, plan: Plan) -> float | None:
    """Give the bytes of an image in shards that are finished, some of them if they are many."""
    done = [index for index in sorted(paths.done_shards()) if index < len(plan.shards)]
    seen = done[:: math.ceil(len(done) / MOST_SHARDS_SEEN) or 1]
    if not seen:
        return None
    return sum(paths.shard(index).stat().st_size for index in seen) / _images(seen, plan)


def _pilot_bytes(paths: RunPaths) -> float | None:
    try:
        return float(read_json(paths.pilot.answers)["bytes_per_image"])
    except (IntegrityError, KeyError, TypeError, ValueError):
        return None  # there was no pilot, or one that says nothing


def _ratio(config: RunConfig) -> tuple[float, str]:
    codec = config.storage.codec
    if codec == "raw":
        return 1.0, "raw, 3 bytes a pixel"
    if config.model.builtin == "noise":
        return 1.0, "as raw: noise does not compress"
    ratio = CODECS[codec].size_ratio(config.storage.quality)
    return ratio, f"as photographs: {codec} at {100 * ratio:.3g} % of raw"
