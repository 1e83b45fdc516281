"""Estimate of what a run takes, before it is submitted: tasks, hours, GPU-hours and bytes.

The arithmetic is one for estimates and pilots. Nothing is measured here, and no torch imported.
Published speeds are of diffusers, which is what tasks run, in fp16 with guidance: collected, but
for the H100's and H200's, which this project measured; benchmarks/gpus.md lays them out. Those of
Stable Diffusion 1, 512x512 in 50 steps, are scaled to other work.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from sdwn.config import RunConfig
from sdwn.devices.device import GB
from sdwn.devices.tuning import run_workload, stored_profiles
from sdwn.errors import IntegrityError, command, counted, duration
from sdwn.io import Format, read_json, reading, refuse_planted
from sdwn.jobs.profile import ClusterProfile, group_into_tasks, minutes
from sdwn.jobs.task import TaskRecord, read_records
from sdwn.models.families import is_guided
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import Plan
from sdwn.storage.codecs import CODECS

WIDTH = HEIGHT = 512
STEPS = 50
GUIDED_PASSES = 2
# Work of the VAE, the safety checker and the text encoder, as a share of the UNet's.
VAE_SHARE, SAFETY_SHARE, TEXT_SHARE = 0.03, 0.002, 0.0003
OTHER_SHARE = VAE_SHARE + SAFETY_SHARE + TEXT_SHARE

# Importing torch and reading weights from a shared file system; a pilot measures it.
LOADING_SECONDS = 60.0
# Where no card is named: one of each generation, fast to slow, that universities still run.
SHOWN = ("A100", "V100", "T4")
# Each look at a file of a run is a question to a shared file system.
MOST_SEEN = 100
# What a plan is laid out on before anybody names a site.
ONE_GPU = ClusterProfile(array_parallelism=1, time="366-0")

# What sdwn selftest finds of a machine.
SELFTEST = Format("sdwn-selftest", 1, "make it again with: sdwn selftest")
SELFTEST_FILES = "selftest_*.json"


# --- Published speeds ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Card:
    """A GPU and its images a second by batch size: plain, and by what torch.compile is given."""

    name: str
    plain: Mapping[int, float]
    whole: Mapping[int, float]
    blocks: Mapping[int, float] = field(default_factory=dict)
    source: str = ""  # by default published


def looped(iterations: Mapping[int, float]) -> dict[int, float]:
    """Turn the published iterations a second of each batch into whole images a second."""
    # diffusers' progress bar counts 50 iterations where PNDM calls 51 times, and ends before the
    # VAE; what the VAE adds is taken from its share of the work.
    return {batch: batch * each / STEPS / (1 + OTHER_SHARE) for batch, each in iterations.items()}


def batched(seconds: Mapping[int, float]) -> dict[int, float]:
    """Turn the published seconds of each batch into images a second."""
    return {batch: batch / each for batch, each in seconds.items()}


# From two tables of diffusers' on PyTorch 2, whose addresses are in benchmarks/gpus.md: seconds,
# and compiled iterations a second, of each batch. Later ones, of single images: fal-ai's of the
# A100, and stable-fast's of an H100, which do not say whether it is SXM or PCIe.
T4 = {4: 29.74, 8: 55.99, 10: 69.86, 16: 113.26}
V100 = {4: 8.09, 8: 15.44, 10: 19.28, 16: 29.84}
RTX_3090 = {1: 2.42, 4: 7.72, 8: 14.88, 10: 18.62, 16: 28.88, 32: 57.42, 64: 114.27}
RTX_4090 = {1: 1.28, 4: 3.76, 8: 7.43, 16: 14.98, 32: 30.18, 64: 61.34}
A100 = {1: 1.604, 2: 2.38, 4: 3.89, 8: 7.04, 10: 8.67, 16: 13.55, 32: 26.68, 64: 53.03}
CARDS = (
    Card("T4", batched(T4), looped({1: 7.56, 4: 1.99, 16: 1 / 1.99})),
    Card("V100", batched(V100), looped({1: 22.17, 4: 6.86, 16: 1.90})),
    Card("RTX 3090", batched(RTX_3090), looped({1: 25.69, 4: 7.30, 16: 1.91})),
    Card("RTX 4090", batched(RTX_4090), looped({1: 49.81, 4: 15.59, 16: 3.85})),
    Card("A100", batched(A100), batched({1: 1.058}) | looped({4: 17.27, 16: 4.68})),
    # This project's own: benchmarks/gpu-nvidia-h100-80gb-hbm3.md, gpu-nvidia-h200.md.
    Card(
        "H100",
        looped({1: 54.5}) | {10: 2.78, 20: 2.96, 40: 3.06},
        looped({1: 66.0}) | {20: 3.96},
        {20: 3.27},
        "sdwn's own measurement of an H100, of single images a published one",
    ),
    Card(
        "H200",
        {1: 0.63, 10: 2.93, 20: 3.12, 40: 3.18},
        {20: 4.21},
        {20: 3.43},
        "sdwn's own measurement of an H200",
    ),
)
# Stable Diffusion XL in as many steps at this size, single images, from the same two.
XL, XL_SIDE = re.compile(r"(.*/)?stable-diffusion-xl-base-1\.0/*"), 1024
XL_CARDS = {
    "A100": Card("A100", batched({1: 5.932}), batched({1: 5.136})),
    "H100": Card("H100", looped({1: 14.9}), looped({1: 18.5})),
}
# Stable Diffusion 1's own weights by name, and its architecture in any folder.
PUBLISHED_MODEL = re.compile(r"(.*/)?stable-diffusion-v1-[1-5]/*")
PUBLISHED_UNET = {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}
# Words of a name that make it another card, or a slice of one.
OTHERS = frozenset({"d", "grid", "laptop", "max", "mig", "s", "ti", "x"})


def is_published_model(name: str) -> bool:
    """Return whether a model has the architecture that the published figures are of."""
    if PUBLISHED_MODEL.fullmatch(name):
        return True
    try:
        unet = read_json(Path(name) / "unet" / "config.json")
    except IntegrityError:
        return False
    return all(unet.get(key) == value for key, value in PUBLISHED_UNET.items())


def may_be(device: str, kind: str) -> bool:
    """Return whether a device may be what a site calls so in a request.

    >>> [may_be("NVIDIA A100-SXM4-40GB", kind) for kind in ("a100_40gb", "a40", "a10")]
    [True, False, False]
    >>> [may_be("NVIDIA GeForce GTX 1080 Ti", kind) for kind in ("gtx1080ti", "1080")]
    [True, True]
    """
    parts = re.findall(r"[A-Za-z0-9]+", kind)
    return all(f" {_words(part)} " in f" {_words(device)} " for part in parts)


def _words(text: str) -> str:
    # One may write gtx1080ti where the other has GTX 1080 Ti; but A40 is not in SXM4-40GB.
    return " ".join(re.findall(r"[a-z]+|[0-9]+", text.lower()))


def find_card(name: str) -> Card | None:
    """Find a card by what torch or a site calls it; None where it is another, or a slice.

    >>> named = "NVIDIA A100-SXM4-40GB", "a100_80gb", "rtx3090", "3090", "gpu-t4"
    >>> [find_card(name).name for name in named]
    ['A100', 'A100', 'RTX 3090', 'RTX 3090', 'T4']
    >>> find_card("a100_3g.20gb")
    """
    words = _words(name)
    if OTHERS & set(words.split()) or re.search(r"\d g \d+ gb", words):
        return None
    # Many leave a GeForce card's first name out.
    return next((card for card in CARDS if may_be(f"{words} rtx", card.name)), None)


def published_speed(card: Card, batch_size: int | None = None, way: str = "plain") -> float:
    """Return a card's images a second in the largest batch up to a size; by default the fastest."""
    speeds: Mapping[int, float] = getattr(card, way) or card.whole
    if batch_size is None:
        return max(speeds.values())
    return speeds[max((size for size in speeds if size <= batch_size), default=min(speeds))]


def scaled(images_per_second: float, width: int, height: int, steps: int, guidance: float) -> float:
    """Scale images a second to other settings, by work: rough, for attention grows faster.

    ``guidance`` up to 1 is off, as in diffusers, and halves the UNet's work.
    """
    pixels = width * height / (WIDTH * HEIGHT)
    passes = GUIDED_PASSES if guidance > 1 else 1
    # Under PNDM, Stable Diffusion 1.4's scheduler, the UNet is called once more than the steps.
    calls = (steps + 1) * passes / ((STEPS + 1) * GUIDED_PASSES)
    return images_per_second * (1 + OTHER_SHARE) / (pixels * (calls + OTHER_SHARE))


# --- Speeds of devices on a run's images ---------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Speed of a device on a config's images, and its source; in batches, where known."""

    device: str
    images_per_second: float
    speed_source: str
    loading_seconds: float = LOADING_SECONDS
    loading_source: str = "assumed"
    batch_size: int | None = None


def known_speeds(
    config: RunConfig, profile: ClusterProfile | None, paths: RunPaths
) -> list[DeviceSpeed]:
    """Return the speeds of the devices that a profile's tasks may get; none where none is known.

    Without a profile: of any device that something is known of.
    """
    # In the order of trust: the first that says anything is taken.
    for measured in (_own_speeds(paths), _pilot_speed(paths)):
        if found := [one for one in measured if not _is_another(one.device, config, profile)]:
            return found
    if config.model.builtin == "noise":
        from sdwn.generation.batching import SECONDS_A_STEP  # numpy and Pillow: not for status

        speed = 1 / (SECONDS_A_STEP * config.generation.num_inference_steps)
        return [DeviceSpeed("cpu", speed, "the set pace of builtin:noise", 0.0, "nothing to load")]
    if profile is not None and not profile.gpu_request:
        return []
    kind = profile.gpu_kind if profile else None
    batch = config.generation.batch_size or (profile.batch_size if profile else None)
    return _tuned_speeds(config, kind, batch) or _card_speeds(config, kind, batch)


def _is_another(device: str, config: RunConfig, profile: ClusterProfile | None) -> bool:
    """Return whether tasks surely get another device than this one."""
    if profile is None:
        return False
    if device == "cpu":
        return bool(profile.gpu_request) and config.model.builtin is None
    card, named = find_card(device), find_card(profile.gpu_kind or "")
    return card is not None and named is not None and card is not named


def _own_speeds(paths: RunPaths) -> list[DeviceSpeed]:
    """Return what tasks of the run that have finished took, by device."""
    records = dict[str, list[TaskRecord]]()
    for record in filter(None, read_records(paths, most=MOST_SEEN)):
        finished = record.ended and record.done >= record.total
        if finished and min(record.busy, record.seconds, record.images) > 0:
            records.setdefault(record.device, []).append(record)
    return [
        DeviceSpeed(
            device,
            # What the device waited for batches to be taken from it is in it.
            sum(one.images for one in own) / sum(one.seconds / one.busy for one in own),
            "the run's own finished tasks",
            sum(one.loading_seconds for one in own) / len(own),
            "as in these tasks",
            own[-1].batch_size,
        )
        for device, own in records.items()
    ]


def _pilot_speed(paths: RunPaths) -> list[DeviceSpeed]:
    with suppress(IntegrityError), reading(paths.pilot.answers):
        found, source = read_json(paths.pilot.answers), ("the run's pilot", "as in the pilot")
        speed, loading = float(found["images_per_second"]), float(found["loading_seconds"])
        batch = found.get("batch_size")
        return [DeviceSpeed(found["device"], speed, source[0], loading, source[1], batch)]
    return []


def _tuned_speeds(config: RunConfig, kind: str | None, batch: int | None) -> list[DeviceSpeed]:
    """Return what ``sdwn tune`` measured on the same work; of one kind of card the latest."""
    generation, guided, found = config.generation, is_guided(config), dict[str, DeviceSpeed]()
    for one in sorted(stored_profiles(), key=lambda one: one.measured):
        work, tuning = one.workload, one.tuning
        # Whatever the card, the weights' commit and torch.
        same = work == run_workload(config, asdict(work), round(work.memory_gb * GB), guided)
        same &= one.scheduler == generation.scheduler
        same &= one.num_inference_steps == generation.num_inference_steps
        if same and work.device != "cpu" and (kind is None or may_be(work.device, kind)):
            device, source = f"{work.device}, {work.memory_gb} GB", one.measured[:10]
            speeds = {probe.batch_size: probe.images_per_second for probe in tuning.probes}
            size = batch or tuning.batch_size
            speed = speeds.get(size) or tuning.images_per_second
            found[device] = DeviceSpeed(device, speed, f"sdwn tune, {source}", batch_size=size)
    return list(found.values())


def _card_speeds(config: RunConfig, kind: str | None, batch: int | None) -> list[DeviceSpeed]:
    """Return the speeds of cards in fp16, a self-test's before published ones.

    Those of Stable Diffusion 1 are scaled by work, those of XL only by steps.
    """
    generation = config.generation
    width, height, steps = generation.width, generation.height, generation.num_inference_steps
    of_xl = XL.fullmatch(config.model.name) is not None
    as_published = width == height == XL_SIDE and generation.guidance_scale > 1
    fits = as_published if of_xl else is_published_model(config.model.name)
    if generation.precision != "fp16" or not fits:
        return []
    compiled = "whole" if generation.compile == "whole" else "blocks"
    way = compiled if generation.compile else "plain"
    cards = [] if of_xl else [card for card in _self_tested(kind) if getattr(card, way)]
    if not cards:
        named = filter(None, map(find_card, (kind,) if kind else SHOWN))
        known = (XL_CARDS.get(card.name) if of_xl else card for card in named)
        cards = list(filter(None, known))
    found = []
    for card in cards:
        speed = published_speed(card, batch, way)
        own, how = speed * STEPS / steps, "scaled from"
        if not of_xl:
            own = scaled(speed, width, height, steps, generation.guidance_scale)
            how = f"scaled by work from {WIDTH}x{HEIGHT} and"
        article = "an" if card.name[0] in "AHR" else "a"
        source = card.source or f"published speed of {article} {card.name}"
        source += ", compiled" * (way != "plain")
        source += ", an image at a time" * (max(card.plain, default=0) == 1)
        if not math.isclose(own, speed):
            source += f", {how} {STEPS} steps"
        found.append(DeviceSpeed(card.name, own, source))
    return found


def _self_tested(kind: str | None) -> list[Card]:
    """Return what ``sdwn selftest`` measured of the cards that a site may call so."""
    found = []
    for path in sorted((cache_folder() / "gpus").glob(SELFTEST_FILES)):
        with suppress(IntegrityError), reading(path):
            refuse_planted(path)
            one = SELFTEST.read(path)
            if kind is None or may_be(one["device"], kind):
                plain, whole, blocks = (
                    {int(size): float(speed) for size, speed in one["speeds"][way].items()}
                    for way in ("plain", "whole", "blocks")
                )
                name, source = f"{one['device']}, {one['memory_gb']} GB", one["measured"][:10]
                found.append(Card(name, plain, whole, blocks, f"sdwn selftest, {source}"))
    return found


# --- The estimate --------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Cost:
    """The time that tasks take on a device: the longest, all together, and until the last ends.

    ``warning`` says what will not work as planned, ``stuck`` that no start of a task would finish
    a batch.
    """

    speed: DeviceSpeed
    hours_per_task: float
    device_hours: float
    hours: float
    warning: str | None
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost on each device that tasks may run on; ``unknown`` says why there is none."""

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
    """Estimate what making these shards takes; without a profile, a shard a task, one at a time."""
    site, config = profile or ONE_GPU, plan.config
    tasks = group_into_tasks(indices, site)
    images = _count_images(indices, plan)
    size, source = stored_bytes(paths, plan, images)
    unknown, found = None, known_speeds(config, profile, paths)
    if not found:
        what = f"{config.model.name} in {config.generation.precision}"
        if profile:
            gpu = "such a GPU" if profile.gpu_request else "a CPU"
            what += f" on {profile.gpu_kind or gpu}"
        pilot = command("pilot", paths.root, "--profile", "PROFILE")
        unknown = f"run {pilot} (no speed is measured or published for {what})"
    return Estimate(
        images=images,
        shards=len(indices),
        tasks=len(tasks),
        devices_per_task=site.processes,
        bytes=size,
        bytes_source=source,
        costs=tuple(cost(plan, tasks, site, speed) for speed in found),
        unknown=unknown,
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
    stuck = limit <= min(longest, loading + batch / speed.images_per_second)
    warning = None
    if longest > limit:
        end = ", before a first batch is finished"
        if not stuck:
            # What the limit ends starts again, and loads again.
            requeues = math.ceil((longest - loading) / (limit - loading)) - 1
            end = f": a task will be requeued {counted(requeues, 'time')}"
        warning = f"a task takes {duration(longest)} and the time limit ends it after "
        warning += f"{duration(limit)}{end}; ask for more --time, or plan smaller shards"
    return Cost(
        speed=speed,
        hours_per_task=longest / 3600,
        device_hours=sum(times) * processes / 3600,
        hours=max(ends) / 3600,
        warning=warning,
        stuck=warning is not None and stuck,
    )


def stored_bytes(paths: RunPaths, plan: Plan, images: int) -> tuple[int, str]:
    """Estimate the bytes that so many of a plan's images take on disk, and name the source."""
    done = [index for index in sorted(paths.done_shards()) if index < len(plan.shards)]
    if seen := done[:: math.ceil(len(done) / MOST_SEEN) or 1]:
        size = sum(paths.shard(index).stat().st_size for index in seen)
        return round(size / _count_images(seen, plan) * images), "as the run's finished shards"
    with suppress(IntegrityError), reading(paths.pilot.answers):
        each = read_json(paths.pilot.answers)["bytes_per_image"]
        return round(each * images), "as the run's pilot"
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
        if cost.warning:
            rows[f"warning, {speed.device}"] = cost.warning
    if found.unknown:
        rows["time"] = f"not known yet: {found.unknown}"
    return rows
