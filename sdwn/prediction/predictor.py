"""A loaded classifier over a release's images: read ahead, in batches that memory has room for.

threads                this process                      GPU
read, check, decode,  ->   batch n+1: start   ->   runs n+1 while batch n
resize and crop            batch n: wait, score    is scored and yielded
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torchvision.io  # noqa: F401 - the faster decoder
from PIL import Image

from sdwn.batches import BatchSize
from sdwn.devices.device import Device, plain_out_of_memory
from sdwn.devices.tuning import GB, GpuProfile, Workload, find_profile, store_profile, tune
from sdwn.errors import OutOfMemoryError, SdwnError
from sdwn.io import in_threads, now
from sdwn.prediction.classifier import Classifier, Logits
from sdwn.prediction.plan import PredictionPlan
from sdwn.prediction.pretrained import load_classifier
from sdwn.prediction.table import IMAGE, SCHEMA
from sdwn.releases.release import LOCATION, Release
from sdwn.storage.images import Pixels
from sdwn.wordnet.taxonomy import NearestSubtree, nearest_subtrees

log = logging.getLogger(__name__)

# Images that each thread may have ready beside those of the next batches.
WAITING = 4
# Records are taken out of the table by so many: all at once would be a gigabyte.
AT_ONCE = 256
# On a CPU larger batches gain nothing.
CPU_BATCH = 32
# The grid of batch sizes that are tried: 1, 2, 4, 8, 16, 24 ...
STEP, MOST_IMAGES = 8, 512

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Predictor:
    """A loaded classifier, the nearest subtree of each synset, its batch size, its readers.

    ``workers`` threads read the images. A synset without a subtree has no
    ``subtree_probability``.
    """

    classifier: Classifier
    subtrees: Mapping[str, NearestSubtree]
    batch: BatchSize
    workers: int

    @property
    def batch_now(self) -> BatchSize:
        """Its batch size, smaller once memory has run out."""
        most = self.classifier.most_images or self.batch.images
        return replace(self.batch, images=min(most, self.batch.images))


def load_predictor(release: Release, plan: PredictionPlan, batch_size: int | None) -> Predictor:
    """Load the classifier of a plan and find the subtrees of the classified synsets.

    Raises:
        SdwnError: it cannot be had, or the checkpoint is another one by now.
    """
    chosen = plan.chosen
    classifier = load_classifier(chosen.model, chosen.checkpoint)
    weights = classifier.record["checkpoint_sha256"]
    if plan.checkpoint_sha256 not in (None, weights):
        raise SdwnError(
            f"{chosen.checkpoint}: expected the checkpoint {plan.checkpoint_sha256[:12]} that "
            f"this was planned for, found {weights[:12]}; restore it, or evaluate again"
        )
    wnids = plan.images_of(release).metadata["wnid"].unique().to_pylist()
    subtrees = nearest_subtrees(release.taxonomy, wnids, classifier.classes)
    workers = len(os.sched_getaffinity(0))
    return Predictor(classifier, subtrees, classifier_batch_size(classifier, batch_size), workers)


def predict_images(predictor: Predictor, release: Release) -> Iterator[pa.Table]:
    """Classify all images of a release, or of a subset of one; a table a batch, in their order.

    The next batch is started before one is waited for. Once memory runs out batches are halved,
    also those of later calls.

    Raises:
        IntegrityError: an image is damaged; the message names it.
        SdwnError: memory has no room for a single image, or the model gives NaN.
    """
    log.info("%s", predictor.batch)
    classifier, ahead = predictor.classifier, 2 * predictor.batch.images
    images = prepared_images(release, classifier.prepare, predictor.workers, ahead)
    running: tuple[list[Row], Logits] | None = None
    while chunk := list(itertools.islice(images, predictor.batch_now.images)):
        # Where there is no room for the chunk, its parts are tried.
        while chunk:
            part = chunk[: classifier.most_images]
            logits = _start(classifier, [pixels for _, pixels in part])
            if logits is None:
                continue
            chunk = chunk[len(part) :]
            if running is not None:
                yield _finish(predictor, *running)
            running = [row for row, _ in part], logits
    if running is not None:
        yield _finish(predictor, *running)


def prepared_images(
    release: Release, prepare: Callable[[Image.Image], Pixels], workers: int, ahead: int
) -> Iterator[tuple[Row, Pixels]]:
    """Yield each image's record and its pixels as ``prepare`` makes them, in order.

    So many images ahead of the one that is taken are made ready by ``workers`` threads; without
    any, each when it is taken. Threads, not processes: reading, checking, decoding and resizing
    all leave Python's lock to others, so that they scale as processes do; but nothing is imported
    again, copied between processes, forked beside torch's own threads, or left behind by a signal.

    Raises:
        IntegrityError: an image is damaged; the message names it.
    """

    def ready(row: Row) -> tuple[Row, Pixels]:
        return row, prepare(release.image(row))

    chosen = release.metadata.select([*IMAGE, *LOCATION])
    rows = (row for batch in chosen.to_batches(max_chunksize=AT_ONCE) for row in batch.to_pylist())
    if workers == 0:
        yield from map(ready, rows)
    else:
        yield from in_threads(ready, rows, workers, ahead + WAITING * workers)


def _start(classifier: Classifier, pixels: list[Pixels]) -> Logits | None:
    """Start a batch; None if there was no room, and batches are smaller from now on."""
    try:
        with plain_out_of_memory():
            return classifier.start(np.stack(pixels))
    except OutOfMemoryError as error:
        reason = str(error)
    # Only here is the failed batch's memory free: an exception keeps what its frames hold.
    Device().release()
    if len(pixels) == 1:
        raise SdwnError(
            f"{classifier.name}: no room for a single image: {reason}; "
            "take a larger card or a smaller model"
        )
    classifier.most_images = len(pixels) // 2
    log.warning("%s; %d images a batch from now on", reason, classifier.most_images)
    return None


def _finish(predictor: Predictor, rows: list[Row], logits: Logits) -> pa.Table:
    """Wait for a batch and turn its scores into a table, null where there is none."""
    around = [predictor.subtrees.get(row["wnid"]) for row in rows]
    scores = predictor.classifier.finish(
        logits,
        [row["imagenet_class"] for row in rows],
        [None if subtree is None else subtree.classes for subtree in around],
    )
    none, mass = scores.label_rank < 0, scores.subtree_probability
    columns = {
        **{name: [row[name] for row in rows] for name in IMAGE},
        "top5": pa.array(list(scores.top5), pa.list_(pa.int16())),
        "top5_probability": pa.array(list(scores.top5_probability), pa.list_(pa.float32())),
        "label_rank": pa.array(scores.label_rank, pa.int16(), mask=none),
        "label_probability": pa.array(scores.label_probability, pa.float32(), mask=none),
        "subtree_probability": pa.array(mass, pa.float32(), mask=np.isnan(mass)),
    }
    return pa.table(columns, schema=SCHEMA)


# --- The batch size ----------------------------------------------------------------------------


def classifier_batch_size(classifier: Classifier, requested: int | None = None) -> BatchSize:
    """Return the batch size that is requested, or one tuned on this card, now if never before.

    Raises:
        SdwnError: a card has no room for a single image.
    """
    if requested is not None:
        return BatchSize(requested, "from the command line")
    if (profile := find_profile(classifier_workload(classifier))) is not None:
        return BatchSize(profile.tuning.batch_size, f"tuned {profile.measured}")
    if not Device().is_gpu:
        return BatchSize(CPU_BATCH, "the default on a CPU")
    return BatchSize(tune_classifier(classifier).tuning.batch_size, "tuned just now")


def classifier_workload(classifier: Classifier) -> Workload:
    """Describe a classifier's work on this process's device; it holds for any weights."""
    device, (_, height, width) = Device(), classifier.preprocessing["input_size"]
    return Workload(
        device=device.name,
        memory_gb=round(device.total_bytes / GB),
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


def tune_classifier(classifier: Classifier, most: int = MOST_IMAGES) -> GpuProfile:
    """Find this device's batch size for a classifier, and keep it for later tasks if possible.

    Raises:
        SdwnError: there is no room for a single image.
    """
    device, (_, height, width) = Device(), classifier.preprocessing["input_size"]

    def seconds(size: int) -> float:
        pixels = np.zeros((size, height, width, 3), dtype=np.uint8)
        with plain_out_of_memory():
            began = time.perf_counter()
            classifier.start(pixels)
            device.synchronize()
            return time.perf_counter() - began

    try:
        tuning = tune(seconds, device, STEP, most)
    finally:
        device.release()
    profile = GpuProfile(
        classifier_workload(classifier), vae_slicing=False, tuning=tuning, measured=now()
    )
    try:
        return store_profile(profile)
    except OSError as error:
        log.warning("%s: the batch size is not kept for later tasks: %s", profile.path, error)
        return profile
