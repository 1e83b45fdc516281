"""Estimate of what a run takes, before it is submitted: tasks, hours, GPU-hours and bytes.

The arithmetic is one for estimates and pilots. Nothing is measured here, and no torch imported.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.filesize import decimal

from sdwn.errors import IntegrityError, counted, duration
from sdwn.io import read_json
from sdwn.jobs.profile import ClusterProfile, group_into_tasks, minutes
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan
from sdwn.preflight.speeds import MOST_SEEN, DeviceSpeed, known_speeds, why_unknown
from sdwn.storage.codecs import CODECS

# What a plan is laid out on before anybody names a site.
ONE_GPU = ClusterProfile(array_parallelism=1, time="366-0")


@dataclass(frozen=True, slots=True)
class Cost:
    """The time that tasks take on a device.

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
    """The cost of making shards: one :class:`Cost` for each device that they may run on.

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
        """Return plain data; a cost and its speed are one mapping."""
        costs = [{**cost.pop("speed"), **cost} for cost in map(asdict, self.costs)]
        return {**asdict(self), "costs": costs}


def estimate(
    paths: RunPaths, plan: Plan, indices: Sequence[int], profile: ClusterProfile | None
) -> Estimate:
    """Estimate what making these shards takes under a profile, none of their images being there.

    Without a profile: a shard a task, one task at a time.
    """
    site = profile or ONE_GPU
    tasks = group_into_tasks(indices, site)
    images = _count_images(indices, plan)
    size, source = stored_bytes(paths, plan, images)
    found = known_speeds(plan.config, profile, paths)
    return Estimate(
        images=images,
        shards=len(indices),
        tasks=len(tasks),
        devices_per_task=site.processes,
        bytes=size,
        bytes_source=source,
        costs=tuple(cost(plan, tasks, site, speed) for speed in found),
        unknown=None if found else why_unknown(plan.config, profile, paths),
    )


def _count_images(indices: Iterable[int], plan: Plan) -> int:
    return sum(plan.shards[index].images for index in indices)


def cost(
    plan: Plan, tasks: Sequence[tuple[int, ...]], profile: ClusterProfile, speed: DeviceSpeed
) -> Cost:
    """Compute what tasks, given by their shards, take at a speed."""
    processes, loading = profile.processes, speed.loading_seconds
    times = [
        # A task takes as long as the process with the most images.
        max(_count_images(task[rank::processes], plan) for rank in range(processes))
        / speed.images_per_second
        + loading
        for task in tasks
    ]
    # Each task starts as soon as one of those that run at once has ended.
    ends = [0.0] * max(1, min(profile.array_parallelism, len(times)))
    for seconds in times:
        heapq.heappush(ends, heapq.heappop(ends) + seconds)
    longest = max(times, default=0.0)
    limit = 60 * minutes(profile.time) - profile.signal_delay_s
    batch = plan.config.generation.batch_size or profile.batch_size or speed.batch_size or 1
    first_batch, warning = loading + batch / speed.images_per_second, None
    if longest > limit:
        advice = "ask for more --time, or plan smaller shards"
        if profile.shards_per_task > 1:
            advice += ", or fewer --shards-per-task"
        if limit <= loading:
            end = ", before the model is loaded"
        elif limit <= first_batch:
            first = "a first image" if batch == 1 else f"a first batch of {batch} images"
            end, advice = f", before {first} is finished", f"{advice}, or smaller --batch-size"
        else:
            # What the limit ends starts again, and loads again.
            requeues = math.ceil((longest - loading) / (limit - loading)) - 1
            often = "once" if requeues == 1 else f"{requeues} times"
            end = f": a task will be requeued {often}"
            if requeues > profile.max_num_timeout:
                allowed = profile.max_num_timeout
                end = f": a task would be requeued {often} and max_num_timeout allows {allowed}"
        warning = f"a task takes {duration(longest)} and the time limit ends it after "
        warning += f"{duration(limit)}{end}; {advice}"
    return Cost(
        speed=speed,
        hours_per_task=longest / 3600,
        device_hours=sum(times) * processes / 3600,
        hours=max(ends) / 3600,
        warning=warning,
        stuck=warning is not None and limit <= first_batch,
    )


def stored_bytes(paths: RunPaths, plan: Plan, images: int) -> tuple[int, str]:
    """Estimate the bytes that so many of a plan's images take on disk, and name the source.

    The first of these that says anything: finished shards, some of them where they are many; the
    run's pilot; what photographs take.
    """
    done = [index for index in sorted(paths.done_shards()) if index < len(plan.shards)]
    if seen := done[:: math.ceil(len(done) / MOST_SEEN) or 1]:
        size = sum(paths.shard(index).stat().st_size for index in seen)
        return round(size / _count_images(seen, plan) * images), "as the run's finished shards"
    try:
        each = float(read_json(paths.pilot.answers)["bytes_per_image"])
        return round(each * images), "as the run's pilot"
    except (IntegrityError, KeyError, TypeError, ValueError):
        pass  # There was no pilot, or one that says nothing.
    generation, codec = plan.config.generation, plan.config.storage.codec
    raw = 3 * generation.width * generation.height * images
    if codec == "raw":
        return raw, "raw, 3 bytes a pixel"
    if plan.config.model.builtin == "noise":
        return raw, "as raw: noise does not compress"
    ratio = CODECS[codec].size_ratio(plan.config.storage.quality)
    return round(ratio * raw), f"as photographs: {codec} at {100 * ratio:.3g} % of raw"


def estimate_rows(found: Estimate) -> dict[str, str]:
    """Return a row of text for each device, with what each figure rests on."""
    gpus = f", {found.devices_per_task} GPUs each" if found.devices_per_task > 1 else ""
    tasks = f"{counted(found.tasks, 'task')} for {counted(found.shards, 'shard')}{gpus}"
    rows = {
        "to make": f"{counted(found.images, 'image')}, {tasks}",
        "to store": f"{decimal(found.bytes)} ({found.bytes_source})",
    }
    for cost in found.costs:
        speed, hours = cost.speed, cost.device_hours
        number = f"{hours:,.0f}" if hours >= 1000 else f"{hours:.3g}"
        number = number if hours >= 0.01 else "under 0.01"
        text = f"{duration(3600 * cost.hours_per_task)} a task, {number} "
        text += f"{'device' if speed.device == 'cpu' else 'GPU'}-hours"
        # Where tasks run one at a time, this is the device time once more.
        if cost.hours < 0.999 * hours:
            text += f", {duration(3600 * cost.hours)} in all"
        text += f"; {speed.images_per_second:.3g} images/s ({speed.speed_source}), "
        text += f"loading {duration(speed.loading_seconds)} ({speed.loading_source})"
        rows[f"on {speed.device}"] = text
    if found.unknown:
        rows["time"] = f"not known yet: {found.unknown}"
    for cost in found.costs:
        if cost.warning:
            rows[f"warning, {cost.speed.device}"] = cost.warning
    return rows
