"""How fast the devices are that tasks may get, and who says so; nothing is measured here.

The first of these that says anything: the run's own pilot, the GPU profiles that ``sdwn tune``
kept for the same work, published figures. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdwn.devices.published import (
    HEIGHT,
    STEPS,
    WIDTH,
    Card,
    card_called,
    find_card,
    scaled,
    speed_at,
)
from sdwn.errors import IntegrityError, command
from sdwn.io import read_json
from sdwn.paths import RunPaths

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.devices.profiles import GpuProfile
    from sdwn.jobs.profile import ClusterProfile

# Importing torch and reading weights from a shared file system; a pilot measures it.
LOADING_SECONDS = 60.0

# Where no card is named: one of each generation, fast to slow, that universities still run.
SHOWN = ("A100", "V100", "T4")

# Stable Diffusion 1's own weights by name, and its architecture in any folder.
PUBLISHED_MODEL = re.compile(r"(.*/)?stable-diffusion-v1-[1-5]/*")
PUBLISHED_UNET = {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Speed of a device on a config's images, and its source; in batches, where known."""

    device: str
    images_per_second: float
    speed_source: str
    loading_seconds: float = LOADING_SECONDS
    loading_source: str = "assumed"
    batch_size: int | None = None


def speeds(
    config: RunConfig, profile: ClusterProfile | None, paths: RunPaths
) -> tuple[DeviceSpeed, ...]:
    """Say how fast the devices are that a profile's tasks may get; nothing where none is known.

    Without a profile, any device that something is known of.
    """
    return (
        _pilots(config, profile, paths)
        or _set_pace(config)
        or _tuned(config, profile)
        or _published(config, profile)
    )


def _pilots(
    config: RunConfig, profile: ClusterProfile | None, paths: RunPaths
) -> tuple[DeviceSpeed, ...]:
    try:
        found = read_json(paths.pilot.answers)
        device, speed = str(found["device"]), float(found["images_per_second"])
        loading, batch = float(found["loading_seconds"]), int(found.get("batch_size", 1))
    except (IntegrityError, KeyError, TypeError, ValueError):
        return ()
    if speed <= 0 or _another_device(device, config, profile):
        return ()
    return (DeviceSpeed(device, speed, "the run's pilot", loading, "as in the pilot", batch),)


def _another_device(device: str, config: RunConfig, profile: ClusterProfile | None) -> bool:
    """Tell whether a pilot's device is surely none that the profile's tasks get."""
    if profile is None:
        return False
    if device == "cpu":
        return profile.asks_for_gpu and config.model.builtin is None
    card, cards = find_card(device), [card_called(kind) for kind in _kinds(profile)]
    return card is not None and bool(cards) and None not in cards and card not in cards


def _set_pace(config: RunConfig) -> tuple[DeviceSpeed, ...]:
    if config.model.builtin != "noise":
        return ()
    from sdwn.generation.noise import SECONDS_A_STEP

    speed = 1 / (SECONDS_A_STEP * config.generation.num_inference_steps)
    return (DeviceSpeed("cpu", speed, "the set pace of builtin:noise", 0.0, "nothing to load"),)


def _kinds(profile: ClusterProfile | None) -> tuple[str, ...]:
    """Give what a profile calls its cards: in its request, else by feature, else by partition."""
    if profile is None:
        return ()
    if profile.gpu_kind:
        return (profile.gpu_kind,)
    for text in (profile.constraint, profile.partition):
        words = re.findall(r"[\w.-]+", text or "")
        if named := tuple(word for word in words if card_called(word)):
            return named
    return ()


def _tuned(config: RunConfig, profile: ClusterProfile | None) -> tuple[DeviceSpeed, ...]:
    """Take GPU profiles of the same work; of one kind of card the latest."""
    if profile is not None and not profile.asks_for_gpu:
        return ()
    from sdwn.devices import profiles as gpus

    kinds = _kinds(profile)
    latest = {
        (one.workload.device, one.workload.memory_gb): one
        for one in sorted(gpus.stored(), key=lambda one: one.measured)
        if _same_work(one, config) and (not kinds or _is_called(one.workload.device, kinds))
    }
    return tuple(_as_tuned(one, config, _asked_batch(config, profile)) for one in latest.values())


def _asked_batch(config: RunConfig, profile: ClusterProfile | None) -> int | None:
    return config.generation.batch_size or (profile.batch_size if profile else None)


def _same_work(tuned: GpuProfile, config: RunConfig) -> bool:
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


def _is_called(device: str, kinds: Sequence[str]) -> bool:
    """Tell whether a device may be what a site calls by one of these names.

    >>> [_is_called("NVIDIA A100-SXM4-40GB", [kind]) for kind in ("a100_80gb", "a40", "a10")]
    [True, False, False]
    >>> [_is_called("NVIDIA GeForce GTX 1080 Ti", [kind]) for kind in ("gtx1080ti", "1080")]
    [True, True]
    """
    return any(
        find_card(device) is card if (card := card_called(kind)) else _is_in(device, kind)
        for kind in kinds
    )


def _is_in(device: str, kind: str) -> bool:
    return all(_spaced(part) in _spaced(device) for part in re.findall(r"[A-Za-z0-9]+", kind))


def _spaced(name: str) -> str:
    # One may write gtx1080ti where the other has GTX 1080 Ti; but A40 is not in SXM4-40GB.
    return f" {' '.join(re.findall(r'[a-z]+|[0-9]+', name.lower()))} "


def _as_tuned(tuned: GpuProfile, config: RunConfig, batch_size: int | None) -> DeviceSpeed:
    probes = {probe.batch_size: probe.images_per_second for probe in tuned.tuning.probes}
    speed = probes.get(batch_size or 0) or tuned.tuning.images_per_second
    steps, measured = config.generation.num_inference_steps, tuned.num_inference_steps or 1
    source = f"sdwn tune, {tuned.measured[:10]}"
    if steps != measured:
        source += f", scaled from {measured} steps"
    device = f"{tuned.workload.device}, {tuned.workload.memory_gb} GB"
    size = batch_size or tuned.tuning.batch_size
    return DeviceSpeed(device, speed * measured / steps, source, batch_size=size)


def _published(config: RunConfig, profile: ClusterProfile | None) -> tuple[DeviceSpeed, ...]:
    has_figures = config.generation.precision == "fp16" and _is_published_model(config.model.name)
    if not has_figures or (profile is not None and not profile.asks_for_gpu):
        return ()
    cards = {card.name: card for kind in _kinds(profile) or SHOWN if (card := card_called(kind))}
    found = (_as_published(card, config, profile) for card in cards.values())
    return tuple(speed for speed in found if speed is not None)


def _is_published_model(name: str) -> bool:
    """Tell whether a model has the architecture that the published figures are of."""
    if PUBLISHED_MODEL.fullmatch(name):
        return True
    try:
        unet = read_json(Path(name) / "unet" / "config.json")
    except IntegrityError:
        return False
    return all(unet.get(key) == value for key, value in PUBLISHED_UNET.items())


def _as_published(
    card: Card, config: RunConfig, profile: ClusterProfile | None
) -> DeviceSpeed | None:
    generation = config.generation
    speed = speed_at(card, _asked_batch(config, profile), compiled=generation.compile)
    if speed is None:
        return None
    steps, guidance = generation.num_inference_steps, generation.guidance_scale
    found = scaled(speed, generation.width, generation.height, steps, guidance)
    article = "an" if card.name[0] in "AR" else "a"
    source = f"published speed of {article} {card.name}{', compiled' if generation.compile else ''}"
    if not math.isclose(found, speed):
        source += f", scaled by work from {WIDTH}x{HEIGHT} and {STEPS} steps"
    return DeviceSpeed(card.name, found, source)


def why_unknown(config: RunConfig, profile: ClusterProfile | None, paths: RunPaths) -> str:
    """Say why no speed is known, and how to find out."""
    advice = f"run {command('pilot', paths.root, '--profile', 'PROFILE')}"
    if profile is not None and not profile.asks_for_gpu:
        return f"{advice} (the profile asks for no GPU; only a pilot can time what is there)"
    if not _is_published_model(config.model.name):
        return f"{advice} (nothing is published here for {config.model.name})"
    if config.generation.precision != "fp16":
        return f"{advice} (published figures are for fp16, not {config.generation.precision})"
    return f"{advice} (nothing is published here for {' or '.join(_kinds(profile))})"
