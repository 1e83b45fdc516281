"""Estimate of what a run takes, before it is submitted: tasks, hours, GPU-hours and bytes.

The arithmetic is one for estimates and pilots. Nothing is measured here, and no torch imported.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from sdwn.devices.published import (
    HEIGHT,
    STEPS,
    WIDTH,
    card_called,
    find_card,
    published_speed,
    scaled,
)
from sdwn.devices.tuning import GpuProfile, stored_profiles
from sdwn.errors import IntegrityError, command, counted, duration
from sdwn.io import read_json
from sdwn.jobs.profile import ClusterProfile, minutes
from sdwn.jobs.task import deal_to_processes
from sdwn.paths import RunPaths
from sdwn.storage.codecs import CODECS

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.planning.plan import Plan

# Importing torch and reading weights from a shared file system; a pilot measures it.
LOADING_SECONDS = 60.0

# Where no card is named: one of each generation, fast to slow, that universities still run.
SHOWN = ("A100", "V100", "T4")

# Stable Diffusion 1's own weights by name, and its architecture in any folder.
PUBLISHED_MODEL = re.compile(r"(.*/)?stable-diffusion-v1-[1-5]/*")
PUBLISHED_UNET = {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}

# What a plan is laid out on before anybody names a site.
ONE_GPU = ClusterProfile(array_parallelism=1, time="366-0")

# Each look at a finished shard's size is a question to a shared file system.
MOST_SHARDS_SEEN = 100


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Speed of a device on a config's images, and its source; in batches, where known."""

    device: str
    images_per_second: float
    speed_source: str
    loading_seconds: float = LOADING_SECONDS
    loading_source: str = "assumed"
    batch_size: int | None = None


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
    if profile is None:
        tasks: Sequence[tuple[int, ...]] = [(index,) for index in indices]
    else:
        from sdwn.jobs.cluster import group_into_tasks  # submitit

        tasks = group_into_tasks(indices, profile)
    images = _count_images(indices, plan)
    size, source = stored_bytes(paths, plan, images)
    found = known_speeds(plan.config, profile, paths)
    return Estimate(
        images=images,
        shards=len(indices),
        tasks=len(tasks),
        devices_per_task=profile.processes if profile else 1,
        bytes=size,
        bytes_source=source,
        costs=tuple(cost(plan, tasks, profile or ONE_GPU, speed) for speed in found),
        unknown=None if found else _why_unknown(plan.config, profile, paths),
    )


def _count_images(indices: Iterable[int], plan: Plan) -> int:
    return sum(plan.shard_images(plan.shards[index]) for index in indices)


def cost(
    plan: Plan, tasks: Sequence[tuple[int, ...]], profile: ClusterProfile, speed: DeviceSpeed
) -> Cost:
    """Compute what tasks, given by their shards, take at a speed."""
    processes, loading = profile.processes, speed.loading_seconds
    times = [
        # A task takes as long as the process with the most images.
        max(_count_images(share, plan) for share in deal_to_processes(task, processes))
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
    first_batch = loading + batch / speed.images_per_second
    warning = None
    if longest > limit:
        # What the limit ends starts again, and loads again.
        warning = (
            f"a task takes {duration(longest)} and the time limit ends it after {duration(limit)}"
        )
        advice = "ask for more --time, or plan smaller shards"
        if profile.shards_per_task > 1:
            advice += ", or fewer --shards-per-task"
        if limit <= loading:
            warning += f", before the model is loaded; {advice}"
        elif limit <= first_batch:
            first = "a first image" if batch == 1 else f"a first batch of {batch} images"
            warning += f", before {first} is finished; {advice}, or smaller --batch-size"
        else:
            requeues = math.ceil((longest - loading) / (limit - loading)) - 1
            if requeues > (most := profile.max_num_timeout):
                warning += f": a task would be requeued {requeues} times and max_num_timeout "
                warning += f"allows {most}; {advice}"
            else:
                often = "once" if requeues == 1 else f"{requeues} times"
                warning += f": a task will be requeued {often}; {advice}"
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
    if seen := done[:: math.ceil(len(done) / MOST_SHARDS_SEEN) or 1]:
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


def known_speeds(
    config: RunConfig, profile: ClusterProfile | None, paths: RunPaths
) -> tuple[DeviceSpeed, ...]:
    """Return the speeds of the devices that a profile's tasks may get; none where none is known.

    Without a profile: of any device that something is known of.
    """
    # In the order of trust: the first that says anything is taken.
    return (
        _pilot_speed(config, profile, paths)
        or _noise_speed(config)
        or _tuned_speeds(config, profile)
        or _published_speeds(config, profile)
    )


def _pilot_speed(
    config: RunConfig, profile: ClusterProfile | None, paths: RunPaths
) -> tuple[DeviceSpeed, ...]:
    """Return what the run's own pilot measured, unless the tasks surely get another device."""
    try:
        found = read_json(paths.pilot.answers)
        device, speed = str(found["device"]), float(found["images_per_second"])
        loading, batch = float(found["loading_seconds"]), int(found.get("batch_size", 1))
    except (IntegrityError, KeyError, TypeError, ValueError):
        return ()
    if speed <= 0:
        return ()
    if profile is not None:
        card, cards = find_card(device), [card_called(name) for name in _card_names(profile)]
        if device == "cpu" and profile.asks_for_gpu and config.model.builtin is None:
            return ()
        if card is not None and cards and None not in cards and card not in cards:
            return ()
    return (DeviceSpeed(device, speed, "the run's pilot", loading, "as in the pilot", batch),)


def _noise_speed(config: RunConfig) -> tuple[DeviceSpeed, ...]:
    if config.model.builtin != "noise":
        return ()
    from sdwn.generation.batching import SECONDS_A_STEP  # numpy and Pillow, which status needs not

    speed = 1 / (SECONDS_A_STEP * config.generation.num_inference_steps)
    return (DeviceSpeed("cpu", speed, "the set pace of builtin:noise", 0.0, "nothing to load"),)


def _tuned_speeds(config: RunConfig, profile: ClusterProfile | None) -> tuple[DeviceSpeed, ...]:
    """Return what ``sdwn tune`` measured on the same work; of one kind of card the latest."""
    if profile is not None and not profile.asks_for_gpu:
        return ()
    names = _card_names(profile)
    latest = {
        (one.workload.device, one.workload.memory_gb): one
        for one in sorted(stored_profiles(), key=lambda one: one.measured)
        if _is_same_work(one, config) and (not names or _may_be(one.workload.device, names))
    }
    wanted, steps = _wanted_batch(config, profile), config.generation.num_inference_steps
    found = []
    for one in latest.values():
        probes = {probe.batch_size: probe.images_per_second for probe in one.tuning.probes}
        speed = probes.get(wanted or 0) or one.tuning.images_per_second
        measured, source = one.num_inference_steps or 1, f"sdwn tune, {one.measured[:10]}"
        if steps != measured:
            source += f", scaled from {measured} steps"
        device = f"{one.workload.device}, {one.workload.memory_gb} GB"
        size = wanted or one.tuning.batch_size
        found.append(DeviceSpeed(device, speed * measured / steps, source, batch_size=size))
    return tuple(found)


def _is_same_work(tuned: GpuProfile, config: RunConfig) -> bool:
    work, generation = tuned.workload, config.generation
    same = all(
        getattr(work, name) == getattr(generation, name)
        for name in ("precision", "height", "width", "channels_last", "compile")
    )
    return (
        same
        and work.device != "cpu"
        and work.model == config.model.name
        and work.guidance == (generation.guidance_scale > 1)
        and tuned.scheduler == generation.scheduler
        and tuned.num_inference_steps is not None
    )


def _published_speeds(config: RunConfig, profile: ClusterProfile | None) -> tuple[DeviceSpeed, ...]:
    """Return published speeds of Stable Diffusion 1 in fp16, scaled by work."""
    generation = config.generation
    if generation.precision != "fp16" or not _is_published_model(config.model.name):
        return ()
    if profile is not None and not profile.asks_for_gpu:
        return ()
    cards = {
        card.name: card for name in _card_names(profile) or SHOWN if (card := card_called(name))
    }
    compiled, found = generation.compile, []
    for card in cards.values():
        speed = published_speed(card, _wanted_batch(config, profile), compiled=compiled)
        if speed is None:
            continue
        work = generation.width, generation.height, generation.num_inference_steps
        own = scaled(speed, *work, generation.guidance_scale)
        article = "an" if card.name[0] in "AR" else "a"
        source = f"published speed of {article} {card.name}{', compiled' if compiled else ''}"
        if not math.isclose(own, speed):
            source += f", scaled by work from {WIDTH}x{HEIGHT} and {STEPS} steps"
        found.append(DeviceSpeed(card.name, own, source))
    return tuple(found)


def _is_published_model(name: str) -> bool:
    """Return whether a model has the architecture that the published figures are of."""
    if PUBLISHED_MODEL.fullmatch(name):
        return True
    try:
        unet = read_json(Path(name) / "unet" / "config.json")
    except IntegrityError:
        return False
    return all(unet.get(key) == value for key, value in PUBLISHED_UNET.items())


def _why_unknown(config: RunConfig, profile: ClusterProfile | None, paths: RunPaths) -> str:
    if profile is not None and not profile.asks_for_gpu:
        why = "the profile asks for no GPU; only a pilot can time what is there"
    elif not _is_published_model(config.model.name):
        why = f"nothing is published here for {config.model.name}"
    elif config.generation.precision != "fp16":
        why = f"published figures are for fp16, not {config.generation.precision}"
    else:
        why = f"nothing is published here for {' or '.join(_card_names(profile))}"
    return f"run {command('pilot', paths.root, '--profile', 'PROFILE')} ({why})"


def _wanted_batch(config: RunConfig, profile: ClusterProfile | None) -> int | None:
    return config.generation.batch_size or (profile.batch_size if profile else None)


def _card_names(profile: ClusterProfile | None) -> tuple[str, ...]:
    """Return what a profile calls its cards: in its request, else by feature, else by partition."""
    if profile is None:
        return ()
    if profile.gpu_kind:
        return (profile.gpu_kind,)
    for text in (profile.constraint, profile.partition):
        words = re.findall(r"[\w.-]+", text or "")
        if named := tuple(word for word in words if card_called(word)):
            return named
    return ()


def _may_be(device: str, names: Sequence[str]) -> bool:
    """Return whether a device may be what a site calls by one of these names.

    >>> [_may_be("NVIDIA A100-SXM4-40GB", [name]) for name in ("a100_80gb", "a40", "a10")]
    [True, False, False]
    >>> [_may_be("NVIDIA GeForce GTX 1080 Ti", [name]) for name in ("gtx1080ti", "1080")]
    [True, True]
    """

    def spaced(text: str) -> str:
        # One may write gtx1080ti where the other has GTX 1080 Ti; but A40 is not in SXM4-40GB.
        return f" {' '.join(re.findall(r'[a-z]+|[0-9]+', text.lower()))} "

    return any(
        find_card(device) is card
        if (card := card_called(name))
        else all(spaced(part) in spaced(device) for part in re.findall(r"[A-Za-z0-9]+", name))
        for name in names
    )


# --- As text -----------------------------------------------------------------------------------


def estimate_rows(found: Estimate) -> dict[str, str]:
    """Return a row for each device, with what each figure rests on."""
    rows = {
        "to make": f"{counted(found.images, 'image')}, {_tasks(found)}",
        "to store": f"{decimal(found.bytes)} ({found.bytes_source})",
    }
    for cost in found.costs:
        speed = cost.speed
        # Where tasks run one at a time, this is the device time once more.
        several = cost.hours < 0.999 * cost.device_hours
        rows[f"on {speed.device}"] = (
            f"{duration(3600 * cost.hours_per_task)} a task, {_device_hours(cost)}"
            + (f", {duration(3600 * cost.hours)} in all" if several else "")
            + f"; {speed.images_per_second:.3g} images/s ({speed.speed_source}), "
            f"loading {duration(speed.loading_seconds)} ({speed.loading_source})"
        )
    if found.unknown:
        rows["time"] = f"not known yet: {found.unknown}"
    for cost in found.costs:
        if cost.warning:
            rows[f"warning, {cost.speed.device}"] = cost.warning
    return rows


def submitting_lines(found: Estimate) -> list[str]:
    """Return a line on what is being submitted, then the warnings."""
    takes = "; ".join(
        f"about {duration(3600 * cost.hours_per_task)} each, {_device_hours(cost)} "
        f"({cost.speed.speed_source})"
        for cost in found.costs
    )
    takes = takes or f"time not known yet: {found.unknown}"
    warnings = [f"warning: {cost.warning}" for cost in found.costs if cost.warning]
    return [f"submitting {_tasks(found)}, {decimal(found.bytes)}: {takes}", *warnings]


def arrays_line(arrays: Sequence[tuple[Sequence[object], int]], tasks: int) -> str:
    """Return a line on how tasks are cut into arrays, of which the script is the first one's.

    Args:
        arrays: each array's tasks, and how many of them run at once.
        tasks: how many there are, those that come later included.

    >>> arrays_line([("abc", 2), ("de", 1)], 7)
    '2 arrays (the script is of the first): 3 tasks, 2 at once; 2 tasks, 1 at once; 2 tasks later'
    """
    each = [f"{counted(len(part), 'task')}, {at_once:,} at once" for part, at_once in arrays]
    later = tasks - sum(len(part) for part, _ in arrays)
    each += [f"{counted(later, 'task')} later"] * bool(later)
    return f"{counted(len(arrays), 'array')} (the script is of the first): {'; '.join(each)}"


def _tasks(found: Estimate) -> str:
    gpus = f", {found.devices_per_task} GPUs each" if found.devices_per_task > 1 else ""
    return f"{counted(found.tasks, 'task')} for {counted(found.shards, 'shard')}{gpus}"


def _device_hours(cost: Cost) -> str:
    hours = cost.device_hours
    number = f"{hours:,.0f}" if hours >= 1000 else f"{hours:.3g}"
    number = number if hours >= 0.01 else "under 0.01"
    return f"{number} {'device' if cost.speed.device == 'cpu' else 'GPU'}-hours"
