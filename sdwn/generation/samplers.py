"""What makes images: the interface, which implementation a config needs, how many at a time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from sdwn.batches import ENOUGH, BatchSize, asked, on_grid
from sdwn.config import RunConfig
from sdwn.devices import profiles as gpus
from sdwn.devices.profiles import Workload
from sdwn.errors import SdwnError
from sdwn.io import private_folder, writable_cache
from sdwn.models.weights import Weights
from sdwn.planning.plan import ImageSpec
from sdwn.storage.images import Sample

log = logging.getLogger(__name__)


class ImageSampler(Protocol):
    """What makes images: diffusers in production, plain noise in rehearsals."""

    config: RunConfig
    provenance: dict[str, Any]
    workload: Workload
    vae_slicing: bool

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Make a batch of images."""

    def in_float32(self, spec: ImageSpec) -> Sample:
        """Make one image alone and in float32, as one that was NaN is made again."""

    def check(self, samples: list[Sample]) -> list[Sample]:
        """Blacken what the safety checker flags, beside :meth:`sample` in another thread."""

    def fits(self, sliced: bool) -> int | None:
        """Estimate how many images a batch may have; None where there is no card to ask."""

    def slice_vae(self, on: bool = True) -> bool:
        """Decode images one at a time, or no longer; False where that changes nothing."""

    def release(self) -> None:
        """Give memory back after running out of it."""

    def forget_peak(self) -> None:
        """Begin to look for a new peak."""

    def seconds(self, specs: Sequence[ImageSpec]) -> float:
        """Time a batch, of a model of many steps by some of them."""

    @property
    def peak_bytes(self) -> int:
        """The most memory used since then."""

    @property
    def limit_bytes(self) -> int:
        """The memory that a batch may use."""


def load_sampler(config: RunConfig, weights: Weights | None = None) -> ImageSampler:
    """Load what the config's model needs; only here do torch and diffusers come in.

    ``weights`` are those that a run is locked to.
    """
    if config.model.builtin == "noise":
        from sdwn.generation.noise import NoiseSampler

        return NoiseSampler(config)
    if config.generation.compile:
        _share_compiled()
    from sdwn.generation.sampler import Sampler

    return Sampler(config, weights)


def _share_compiled() -> None:
    """Let every task of this user read what the first one compiled; what lies there is run."""
    try:
        folder = private_folder(writable_cache() / "inductor")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    except SdwnError as error:
        log.warning("each task compiles for itself: %s", error)


def load_timed(config: RunConfig, weights: Weights | None = None) -> tuple[ImageSampler, float]:
    """Load a sampler and say how many seconds that took, imports included."""
    began = time.monotonic()
    sampler = load_sampler(config, weights)
    return sampler, time.monotonic() - began


def choose_batch(config: RunConfig, sampler: ImageSampler) -> BatchSize:
    """Take the batch size from whoever knows best.

    That is the command line or the site's profile, the config, a GPU profile, an estimate from
    the card's free memory, one synset.
    """
    images = config.images_per_synset
    if (size := asked()) is not None:
        return BatchSize(on_grid(size, images), "as the command line or the site asks")
    if (size := config.generation.batch_size) is not None:
        return BatchSize(size, "as the config asks")
    if (profile := gpus.find(sampler.workload)) is not None:
        size = on_grid(profile.tuning.batch_size, images)
        return BatchSize(size, f"as tuned {profile.measured}", profile.vae_slicing)
    return _estimated(images, sampler) or BatchSize(images, "one synset")


def _estimated(images: int, sampler: ImageSampler) -> BatchSize | None:
    fit = sampler.fits(sliced=False)
    if fit is None:
        return None
    sliced = sampler.fits(sliced=True) or 0
    slicing = fit < images and sliced > fit
    room = max(1, sliced if slicing else fit)
    size = on_grid(min(room, max(images, ENOUGH)), images)
    return BatchSize(size, "as free memory suggests", slicing)
