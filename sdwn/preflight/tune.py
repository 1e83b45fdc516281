"""The stage that measures: a device's best batch size, kept as a GPU profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from sdwn.config import RunConfig, validated
from sdwn.devices import profiles as gpus
from sdwn.devices import visible
from sdwn.devices.profiles import GpuProfile
from sdwn.devices.tuning import Run, Tuning, search
from sdwn.errors import OutOfMemoryError, SdwnError
from sdwn.generation.batching import ImageSampler, load_sampler
from sdwn.io import now, read_json, writable_cache
from sdwn.models.weights import find_weights
from sdwn.planning.plan import ImageSpec, image_seed

log = logging.getLogger(__name__)

MOST_IMAGES = 200
# As long as the glosses of WordNet are: its length decides nothing, but there must be one.
PROMPT = "a member of the genus Canis that has been domesticated since prehistoric times"


def tune_into(folder: Path, indices: Iterable[int]) -> None:
    """Measure this task's device under the config in a folder, and leave the answer there."""
    config = validated(RunConfig, read_json(folder / "config.json"), source=str(folder))
    for index in indices:
        gpus.write_profile(tune_device(config), answer(folder, index))


def answer(folder: Path, index: int) -> Path:
    """Name the file in which a task leaves its profile for whoever asked."""
    return folder / f"answer-{index}.json"


def tune_device(config: RunConfig) -> GpuProfile:
    """Find this device's batch size for a config's images, and keep it.

    Raises:
        SdwnError: there is no room for a single image, or no GPU where one was given.
    """
    writable_cache()  # Fail before anything is measured that could not be kept.
    # Any revision is as fast as another: what is there is taken, and no hub is asked.
    sampler = load_sampler(config, find_weights(config))
    # Plain noise is drawn without torch.
    if sampler.workload.torch and (reason := visible.missing(sampler.workload.device)):
        raise SdwnError(f"nothing is measured: {reason}")
    tuning = _search(sampler, config.images_per_synset)
    if tuning is None or tuning.batch_size < config.images_per_synset:
        tuning = _sliced(sampler, config.images_per_synset, tuning)
    steps, scheduler = config.generation.num_inference_steps, config.generation.scheduler
    return gpus.store(
        GpuProfile(sampler.workload, sampler.vae_slicing, tuning, now(), steps, scheduler)
    )


def _search(sampler: ImageSampler, images_per_synset: int) -> Tuning | None:
    try:
        return search(_timer(sampler), images_per_synset, sampler.limit_bytes, MOST_IMAGES)
    except SdwnError as error:
        log.warning("%s", error)
        return None


def _sliced(sampler: ImageSampler, images_per_synset: int, whole: Tuning | None) -> Tuning:
    """Decode images one by one where that makes room; keep what is faster."""
    if not sampler.slice_vae():
        if whole is None:
            raise SdwnError(_NO_ROOM)
        return whole
    sliced = _search(sampler, images_per_synset)
    if sliced is None:
        raise SdwnError(_NO_ROOM)
    if whole is not None and whole.images_per_second >= sliced.images_per_second:
        sampler.slice_vae(False)
        return whole
    return sliced


_NO_ROOM = (
    "no room for a single image: free the device of other work, take a larger one, "
    "a smaller size, or half precision"
)


def _timer(sampler: ImageSampler) -> Callable[[int], Run]:
    specs = [
        ImageSpec(number, "n02084071", "dog.n.01", number, PROMPT, image_seed(0, "tune", number))
        for number in range(MOST_IMAGES)
    ]

    def run(size: int) -> Run:
        sampler.forget_peak()
        try:
            seconds = sampler.seconds(specs[:size])
        except OutOfMemoryError as error:
            reason = str(error)
        else:
            log.info("%d images a batch: %.2f images/s", size, size / seconds)
            return Run(size / seconds, sampler.peak_bytes)
        # Outside the handler, whose exception keeps the batch's memory.
        sampler.release()
        log.info("%d images a batch: %s", size, reason)
        raise OutOfMemoryError(reason)

    return run
