"""Speeds of devices on a run's images, and what each rests on; nothing is measured here.

Published figures are of diffusers, which is what tasks run, in fp16 with guidance: collected, but
for the H200's, which this project measured; benchmarks/gpus.md lays them out. Those of Stable
Diffusion 1, 512x512 in 50 steps, are scaled to other work; another model has its own, which are
not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sdwn.config import Record, RunConfig
from sdwn.devices.device import GB
from sdwn.devices.tuning import GpuProfile, run_workload, stored_profiles
from sdwn.errors import IntegrityError, command
from sdwn.io import Format, read_json, refuse_planted
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.task import TaskRecord, read_record
from sdwn.models.families import is_guided
from sdwn.paths import TASK_NAME, RunPaths, cache_folder

WIDTH = HEIGHT = 512
STEPS = 50
GUIDED_PASSES = 2
# Work of the VAE, the safety checker and the text encoder, as a share of the UNet's.
VAE_SHARE, SAFETY_SHARE, TEXT_SHARE = 0.03, 0.002, 0.0003
OTHER_SHARE = VAE_SHARE + SAFETY_SHARE + TEXT_SHARE

# Words of a device name that make it another card, or a slice of one.
OTHERS = frozenset({"d", "grid", "laptop", "max", "mig", "ti"})

# Importing torch and reading weights from a shared file system; a pilot measures it.
LOADING_SECONDS = 60.0

# Where no card is named: one of each generation, fast to slow, that universities still run.
SHOWN = ("A100", "V100", "T4")

# Stable Diffusion 1's own weights by name, and its architecture in any folder.
PUBLISHED_MODEL = re.compile(r"(.*/)?stable-diffusion-v1-[1-5]/*")
PUBLISHED_UNET = {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}

# What sdwn selftest finds of a machine.
SELFTEST = Format("sdwn-selftest", 1, "make it again with: sdwn selftest")
SELFTEST_FILES = "selftest_*.json"

# Each look at a file of a run is a question to a shared file system.
MOST_SEEN = 100


# Published


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU and its images a second by batch size: plain, and by what torch.compile is given."""

    name: str
    plain: Mapping[int, float]
    whole: Mapping[int, float]
    blocks: Mapping[int, float] = field(default_factory=dict)
    source: str = ""  # by default published


def unet_calls(steps: int) -> int:
    """Count UNet calls: one more than the steps under PNDM, Stable Diffusion 1.4's scheduler."""
    return steps + 1


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
    Card("H100", looped({1: 54.5}), looped({1: 66.0})),
    # This project's own: benchmarks/gpu-nvidia-h200.md.
    Card("H200", {20: 3.12}, {20: 4.21}, {20: 3.52}, "sdwn's own measurement of an H200"),
)

# Stable Diffusion XL in as many steps at this size, single images, from the same two.
XL, XL_SIDE = re.compile(r"(.*/)?stable-diffusion-xl-base-1\.0/*"), 1024
XL_CARDS = {
    "A100": Card("A100", batched({1: 5.932}), batched({1: 5.136})),
    "H100": Card("H100", looped({1: 14.9}), looped({1: 18.5})),
}


def find_card(device_name: str) -> Card | None:
    """Find a card by what ``torch.cuda.get_device_name`` calls it; None where it is another.

    >>> find_card("NVIDIA A100-SXM4-40GB").name
    'A100'
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & OTHERS:
        return None
    return next((card for card in CARDS if words.issuperset(card.name.lower().split())), None)


def card_called(name: str) -> Card | None:
    """Find a card by what a site calls it in a request; a slice of one is another.

    >>> [card_called(name).name for name in ("a100_80gb", "rtx3090", "3090", "gpu-t4")]
    ['A100', 'RTX 3090', 'RTX 3090', 'T4']
    >>> card_called("a100_3g.20gb")
    """
    if re.search(r"\dg[._-]?\d+gb", name.lower()):
        return None
    # Many leave a GeForce card's first name out, or write both as one word.
    return find_card(name.lower().replace("rtx", "rtx ") + " rtx")


def published_speed(card: Card, batch_size: int | None = None, way: str = "plain") -> float:
    """Return a card's images a second in the largest batch up to a size; by default the fastest."""
    speeds: Mapping[int, float] = getattr(card, way) or card.whole
    if batch_size is None:
        return max(speeds.values())
    return speeds[max((size for size in speeds if size <= batch_size), default=min(speeds))]


def scaled(images_per_second: float, width: int, height: int, steps: int, guidance: float) -> float:
    """Scale a published speed to other settings, by work: rough, and of first order.

    Pixels count linearly, though attention grows faster; ``guidance`` up to 1 is off, as in
    diffusers, and halves the UNet's work. Images a second.
    """
    pixels = width * height / (WIDTH * HEIGHT)
    passes = GUIDED_PASSES if guidance > 1 else 1
    calls = unet_calls(steps) * passes / (unet_calls(STEPS) * GUIDED_PASSES)
    return images_per_second * (1 + OTHER_SHARE) / (pixels * (calls + OTHER_SHARE))


# Known of a run


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
) -> tuple[DeviceSpeed, ...]:
    """Return the speeds of the devices that a profile's tasks may get; none where none is known.

    Without a profile: of any device that something is known of.
    """
    # In the order of trust: the first that says anything is taken.
    if found := _own_speeds(config, profile, paths) or _pilot_speed(config, profile, paths):
        return found
    if config.model.builtin == "noise":
        from sdwn.generation.batching import SECONDS_A_STEP  # numpy and Pillow: not for status

        speed = 1 / (SECONDS_A_STEP * config.generation.num_inference_steps)
        return (DeviceSpeed("cpu", speed, "the set pace of builtin:noise", 0.0, "nothing to load"),)
    if profile is not None and not profile.asks_for_gpu:
        return ()
    return _tuned_speeds(config, profile) or _card_speeds(config, profile)


def _own_speeds(
    config: RunConfig, profile: ClusterProfile | None, paths: RunPaths
) -> tuple[DeviceSpeed, ...]:
    """Return what tasks of the run that have finished took, by device."""
    tasks = sorted(name for name in paths.task_names() if TASK_NAME.fullmatch(name))
    records = dict[str, list[TaskRecord]]()
    for name in tasks[:: math.ceil(len(tasks) / MOST_SEEN) or 1]:
        with suppress(IntegrityError):
            record = read_record(paths.tasks / name)
            finished = record.ended and record.done >= record.total
            finished &= min(record.busy, record.seconds, record.images) > 0
            if finished and not _is_another(record.device, config, profile):
                records.setdefault(record.device, []).append(record)
    return tuple(
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
    )


def _pilot_speed(
    config: RunConfig, profile: ClusterProfile | None, paths: RunPaths
) -> tuple[DeviceSpeed, ...]:
    try:
        found = read_json(paths.pilot.answers)
        device, speed = str(found["device"]), float(found["images_per_second"])
        loading, batch = float(found["loading_seconds"]), int(found.get("batch_size", 1))
    except (IntegrityError, KeyError, TypeError, ValueError, OverflowError):
        return ()
    finite = 0 < speed < math.inf and 0 <= loading < math.inf
    if not finite or _is_another(device, config, profile):
        return ()
    return (DeviceSpeed(device, speed, "the run's pilot", loading, "as in the pilot", batch),)


def _is_another(device: str, config: RunConfig, profile: ClusterProfile | None) -> bool:
    """Return whether tasks surely get another device than this one."""
    if profile is None:
        return False
    if device == "cpu":
        return profile.asks_for_gpu and config.model.builtin is None
    card, named = find_card(device), card_called(profile.gpu_kind or "")
    return card is not None and named is not None and card is not named


def _tuned_speeds(config: RunConfig, profile: ClusterProfile | None) -> tuple[DeviceSpeed, ...]:
    """Return what ``sdwn tune`` measured on the same work; of one kind of card the latest."""
    kind, guided = profile.gpu_kind if profile else None, is_guided(config)
    latest = {
        (one.workload.device, one.workload.memory_gb): one
        for one in sorted(stored_profiles(), key=lambda one: one.measured)
        if _is_same_work(one, config, guided)
        and (kind is None or _may_be(one.workload.device, kind))
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


def _is_same_work(tuned: GpuProfile, config: RunConfig, guided: bool) -> bool:
    # Whatever the card, the weights' commit and torch.
    work = tuned.workload
    same = run_workload(config, asdict(work), round(work.memory_gb * GB), guided) == work
    known = tuned.scheduler == config.generation.scheduler and tuned.num_inference_steps
    return same and work.device != "cpu" and bool(known)


def _may_be(device: str, kind: str) -> bool:
    """Return whether a device may be what a site calls so in a request.

    >>> [_may_be("NVIDIA A100-SXM4-40GB", kind) for kind in ("a100_40gb", "a40", "a10")]
    [True, False, False]
    >>> [_may_be("NVIDIA GeForce GTX 1080 Ti", kind) for kind in ("gtx1080ti", "1080")]
    [True, True]
    """

    def spaced(text: str) -> str:
        # One may write gtx1080ti where the other has GTX 1080 Ti; but A40 is not in SXM4-40GB.
        return f" {' '.join(re.findall(r'[a-z]+|[0-9]+', text.lower()))} "

    return all(spaced(part) in spaced(device) for part in re.findall(r"[A-Za-z0-9]+", kind))


class _SelfTested(Record):
    """The speeds of a self-test: images a second by way of compiling and batch size."""

    device: str
    memory_gb: int
    measured: str
    speeds: dict[str, dict[int, Annotated[float, Field(gt=0, allow_inf_nan=False)]]]


def _card_speeds(config: RunConfig, profile: ClusterProfile | None) -> tuple[DeviceSpeed, ...]:
    """Return the speeds of cards in fp16, a self-test's before published ones.

    Those of Stable Diffusion 1 are scaled by work, those of XL only by steps.
    """
    generation, kind = config.generation, profile.gpu_kind if profile else None
    width, height, steps = generation.width, generation.height, generation.num_inference_steps
    of_xl = XL.fullmatch(config.model.name) is not None
    as_published = width == height == XL_SIDE and generation.guidance_scale > 1
    fits = as_published if of_xl else is_published_model(config.model.name)
    if generation.precision != "fp16" or not fits:
        return ()
    compiled = "whole" if generation.compile == "whole" else "blocks"
    way = compiled if generation.compile else "plain"
    cards = [] if of_xl else [card for card in _self_tested(kind) if getattr(card, way)]
    if not cards:
        named = filter(None, map(card_called, (kind,) if kind else SHOWN))
        known = (XL_CARDS.get(card.name) if of_xl else card for card in named)
        cards = list(filter(None, known))
    found = []
    for card in cards:
        speed = published_speed(card, _wanted_batch(config, profile), way)
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
    return tuple(found)


def _self_tested(kind: str | None) -> list[Card]:
    """Return what ``sdwn selftest`` measured of the cards that a site may call so."""
    found = []
    for path in sorted((cache_folder() / "gpus").glob(SELFTEST_FILES)):
        with suppress(IntegrityError, ValueError):
            refuse_planted(path)
            one = _SelfTested.model_validate_json(json.dumps(SELFTEST.read(path)))
            if kind is None or _may_be(one.device, kind):
                plain, whole, blocks = (
                    one.speeds.get(way, {}) for way in ("plain", "whole", "blocks")
                )
                name, day = f"{one.device}, {one.memory_gb} GB", one.measured[:10]
                found.append(Card(name, plain, whole, blocks, f"sdwn selftest, {day}"))
    return found


def is_published_model(name: str) -> bool:
    """Return whether a model has the architecture that the published figures are of."""
    if PUBLISHED_MODEL.fullmatch(name):
        return True
    try:
        unet = read_json(Path(name) / "unet" / "config.json")
    except IntegrityError:
        return False
    return all(unet.get(key) == value for key, value in PUBLISHED_UNET.items())


def why_unknown(config: RunConfig, profile: ClusterProfile | None, paths: RunPaths) -> str:
    """Return how to find out what no speed is known of."""
    on = profile.gpu_kind or ("such a GPU" if profile.asks_for_gpu else "a CPU") if profile else ""
    what = f"{config.model.name} in {config.generation.precision}" + f" on {on}" * bool(on)
    pilot = command("pilot", paths.root, "--profile", "PROFILE")
    return f"run {pilot} (no speed is measured or published for {what})"


def _wanted_batch(config: RunConfig, profile: ClusterProfile | None) -> int | None:
    return config.generation.batch_size or (profile.batch_size if profile else None)
