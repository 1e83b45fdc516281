"""Samplers of images, and the choice of the batch size. Only diffusers needs torch."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdwn.batches import BatchSize, Placement, next_smaller_batch, on_grid
from sdwn.config import RunConfig
from sdwn.devices.device import Device
from sdwn.devices.tuning import Workload, find_profile, run_workload
from sdwn.errors import SdwnError
from sdwn.io import private_folder, writable_cache
from sdwn.models.weights import Weights
from sdwn.planning.plan import ImageSpec
from sdwn.storage.images import Pixels

# An estimate goes no higher, unless one concept has more images: published speeds hardly grow
# beyond, and a kill costs the batch under way.
ENOUGH_IMAGES = 16
# The set pace of plain noise.
SECONDS_A_STEP = 0.01


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled image and what happened to it."""

    pixels: Pixels  # RGB, of shape (height, width, 3)
    status: str  # ok; nsfw: the safety checker blackened it; nan: the model gave NaN, black
    tokens: int  # of the whole prompt, start and end included
    truncated: bool  # the text encoder took fewer
    retried_fp32: bool = False  # NaN in half precision, and sampled again, alone and in float32
    vae_slicing: bool = False  # its batch was decoded one by one


class ImageSampler:
    """A sampler of images on a device; what is not overridden suits one without a model."""

    config: RunConfig
    device: Device
    provenance: dict[str, Any]  # what the images are made with
    workload: Workload  # what a measured speed holds for
    vae_slicing = False
    loading_seconds = 0.0
    # How many prompts each text encoder took in part, of those encoded until now.
    cut_prompts: dict[str, int]

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Make a batch of images, in their order; after an OutOfMemoryError fewer may fit."""
        raise NotImplementedError

    def in_float32(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Make images again that were NaN, each alone and in float32."""
        return [self.sample([spec])[0] for spec in specs]

    def check(self, samples: list[Sample]) -> list[Sample]:
        """Blacken what the safety checker flags, beside :meth:`sample` in another thread."""
        return samples

    def time_batch(self, specs: Sequence[ImageSpec]) -> float:
        """Return how many seconds a batch takes; of many steps only a few are timed."""
        began = time.perf_counter()
        self.sample(specs)
        return time.perf_counter() - began

    def slice_vae(self) -> bool:
        """Decode images one at a time from now on; return whether that changes anything."""
        return False

    def fits(self, sliced: bool) -> int | None:
        """Estimate how many images a batch may have; None without a GPU."""
        return None

    def predicted_bytes(self, images: int) -> int:
        """Predict what a batch makes torch reserve, weights included; 0 without torch."""
        return 0


class NoiseSampler(ImageSampler):
    """A sampler without a model, to rehearse a cluster: noise from the seed, at a set pace."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.cut_prompts, self.device = config, {}, Device(gpu=False)
        self.provenance = {
            "model": config.model.name,
            "device": "cpu",
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        guided = config.generation.guidance_scale > 1
        self.workload = run_workload(config, self.provenance, self.device.total_bytes, guided)

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Make a batch of images."""
        generation, samples = self.config.generation, list[Sample]()
        shape = (generation.height, generation.width, 3)
        time.sleep(SECONDS_A_STEP * generation.num_inference_steps * len(specs))
        # RandomState's stream is frozen: the same noise under every NumPy.
        stream = np.random.RandomState()
        for spec in specs:
            stream.seed(spec.seed % 2**32)
            pixels = stream.randint(0, 256, shape, dtype=np.uint8)
            samples.append(Sample(pixels, "ok", len(spec.prompt.split()), truncated=False))
        return samples


def load_sampler(
    config: RunConfig,
    weights: Weights | None = None,
    specs: Iterable[ImageSpec] = (),
    placement: Placement = "auto",
) -> ImageSampler:
    """Load what the config's model needs; the arguments are those of `sampler.Sampler`."""
    if config.model.builtin == "noise":
        return NoiseSampler(config)
    began = time.monotonic()
    if config.generation.compile:
        # This user's tasks share what one of them compiled. It is code that is run, so the folder
        # is one that nobody else can write to; without it, each task compiles for itself.
        with suppress(SdwnError):
            folder = private_folder(writable_cache() / "inductor")
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    from sdwn.generation.sampler import Sampler

    sampler = Sampler(config, weights, specs, placement)
    sampler.loading_seconds = time.monotonic() - began
    return sampler


def choose_batch(
    config: RunConfig, images: int, sampler: ImageSampler, requested: int | None = None
) -> BatchSize:
    """Choose the batch size by the first of these that is set.

    The command line or the site's profile (``requested``); the config; a GPU profile; an estimate
    from the card's free memory; one concept, whose ``images`` a batch does not tear apart.
    """
    if requested is not None:
        return BatchSize(on_grid(requested, images), "from the command line or the profile")
    if (size := config.generation.batch_size) is not None:
        return BatchSize(size, "from the config")
    if (profile := find_profile(sampler.workload)) is not None:
        size = on_grid(profile.tuning.batch_size, images)
        return BatchSize(size, f"tuned {profile.measured}", profile.vae_slicing)
    if (whole := sampler.fits(sliced=False)) is None:
        return BatchSize(images, "one synset")
    # Decoding one by one is slower: only where a whole synset does not fit otherwise.
    sliced = (sampler.fits(sliced=True) or 0) if whole < images else 0
    size = on_grid(min(max(1, whole, sliced), max(images, ENOUGH_IMAGES)), images)
    return BatchSize(size, "estimated from free memory", vae_slicing=sliced > whole)


def smaller_batch(sampler: ImageSampler, batch: BatchSize, grid: int, reason: str) -> BatchSize:
    """Return a batch that takes less memory: images decoded one by one first, then fewer."""
    if sampler.slice_vae():
        return replace(batch, vae_slicing=True)
    if (size := next_smaller_batch(batch.images, grid)) is None:
        raise SdwnError(
            f"no room for a single image: {reason}; take a larger card, a smaller size, "
            "half precision, or --placement offload"
        )
    return replace(batch, images=size)
