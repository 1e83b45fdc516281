"""How many images a classifier takes at once: as asked, as tuned on this card, or a default."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from sdwn.batches import BatchSize
from sdwn.devices import profiles as gpus
from sdwn.devices.device import Device, out_of_memory_told
from sdwn.devices.profiles import GpuProfile, Workload
from sdwn.devices.tuning import Run, Tuning, search
from sdwn.errors import OutOfMemoryError
from sdwn.io import now
from sdwn.prediction.classify import Classifier

log = logging.getLogger(__name__)

# On a CPU larger batches gain nothing.
DEFAULT = 32
# The grid of sizes that are tried: 1, 2, 4, 8, 16, 24 ...
STEP = 8
MOST_IMAGES = 512


def choose_batch(classifier: Classifier, asked: int | None = None) -> BatchSize:
    """Take the batch size that is asked for, or one tuned on this card, now if never before.

    Raises:
        SdwnError: a card has no room for a single image.
    """
    if asked is not None:
        return BatchSize(asked, "as asked")
    if (profile := gpus.find(workload(classifier))) is not None:
        return BatchSize(profile.tuning.batch_size, f"as tuned {profile.measured}")
    if not Device().is_gpu:
        return BatchSize(DEFAULT, "the default on a CPU")
    return BatchSize(tune(classifier).tuning.batch_size, "as tuned just now")


def workload(classifier: Classifier) -> Workload:
    """Describe a classifier's work on this process's device; its name holds for any weights."""
    device, (_, height, width) = Device(), classifier.preprocessing["input_size"]
    return Workload(
        device=device.name,
        memory_gb=round(device.total_bytes / gpus.GB),
        model=f"classifier {classifier.name}",
        revision=classifier.record["class_list"],
        precision=classifier.record["dtype"],
        height=height,
        width=width,
        guidance=False,
        channels_last=True,
        compile=False,
        torch=str(torch.__version__),
    )


def tune(classifier: Classifier, most: int = MOST_IMAGES) -> GpuProfile:
    """Find this device's batch size for a classifier, and keep it for later tasks if possible.

    Raises:
        SdwnError: there is no room for a single image.
    """
    found = _search(classifier, most)
    profile = GpuProfile(workload(classifier), vae_slicing=False, tuning=found, measured=now())
    try:
        return gpus.store(profile)
    except OSError as error:
        log.warning("%s: the batch size is not kept for later tasks: %s", profile.path, error)
        return profile


def _search(classifier: Classifier, most: int) -> Tuning:
    device = Device()
    limit = gpus.below_head_room(device.usable_bytes, device.total_bytes)
    try:
        return search(_timer(classifier, device), STEP, limit, most)
    finally:
        device.release()


def _timer(classifier: Classifier, device: Device) -> Callable[[int], Run]:
    _, height, width = classifier.preprocessing["input_size"]

    def run(size: int) -> Run:
        device.forget_peak()
        pixels = np.zeros((size, height, width, 3), dtype=np.uint8)
        try:
            with out_of_memory_told():
                began = time.perf_counter()
                classifier.start(pixels)
                device.synchronize()
        except OutOfMemoryError as error:
            reason = str(error)
        else:
            speed = size / (time.perf_counter() - began)
            log.info("%d images a batch: %.1f images/s", size, speed)
            return Run(speed, device.peak_bytes)
        # Outside the handler, whose exception keeps the batch's memory.
        device.release()
        log.info("%d images a batch: %s", size, reason)
        raise OutOfMemoryError(reason)

    return run
