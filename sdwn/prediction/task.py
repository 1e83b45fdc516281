"""The stage that classifies images: shards one after another, each written once it is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.devices.device import Device, missing_gpu
from sdwn.devices.tuning import GB
from sdwn.errors import DiskError, SdwnError
from sdwn.io import Advance
from sdwn.jobs.task import Meter, RunDisk, Stage
from sdwn.paths import RunPaths, work_paths
from sdwn.planning.plan import Shard
from sdwn.prediction.plan import PredictionPlan, open_planned_release
from sdwn.prediction.table import Predictions, Source, write_predictions
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import nearest_subtrees


def predict(work: Path, indices: Iterable[int], options: TaskOptions = NO_OPTIONS) -> None:
    """Classify the images of those shards that aren't finished yet: a task's stage."""
    paths = work_paths(work)
    release, plan = open_planned_release(paths)
    todo = [plan.shards[index] for index in indices if not paths.shard(index).exists()]
    if todo:
        predict_shards(paths, release, plan, todo, batch_size=options.batch_size)


PREDICT = Stage("judge", predict)


def predict_shards(  # noqa: PLR0913, PLR0917
    paths: RunPaths,
    release: Release,
    plan: PredictionPlan,
    shards: Sequence[Shard],
    advance: Advance = lambda _: None,
    batch_size: int | None = None,
) -> None:
    """Classify shards, the classifier loaded once; a kill costs the shard under way."""
    # torch and timm
    from sdwn.prediction.classifier import Predictor, classifier_batch_size, predict_images
    from sdwn.prediction.pretrained import load_classifier

    began, device, chosen = time.monotonic(), Device(), plan.evaluation
    classifier = load_classifier(chosen.model, chosen.checkpoint)
    weights = classifier.record["checkpoint_sha256"]
    if plan.checkpoint_sha256 not in (None, weights):
        raise SdwnError(
            f"{chosen.checkpoint}: expected the checkpoint {plan.checkpoint_sha256[:12]} that "
            f"this was planned for, found {weights[:12]}; restore it, or evaluate again"
        )
    wnids = plan.images_of(release).metadata["wnid"].unique().to_pylist()
    predictor = Predictor(
        classifier,
        nearest_subtrees(release.taxonomy, wnids, classifier.classes),
        classifier_batch_size(classifier, batch_size),
        workers=len(os.sched_getaffinity(0)),
    )
    meter = Meter(
        paths,
        device=device.name,
        memory_gb=round(device.total_bytes / GB),
        batch=predictor.batch,
        loading_seconds=time.monotonic() - began,
        energy=lambda: device.energy_joules,
        total=sum(map(plan.shard_images, shards)),
        no_gpu=missing_gpu(device.name),
        doing="classifying",
    )

    def predict_shard(images: Release) -> pa.Table:
        tables, began = [], time.monotonic()
        try:
            for table in predict_images(predictor, images):
                tables.append(table)
                ended = time.monotonic()
                meter.count_batch(len(table), ended - began, device.peak_bytes)
                began = ended
                if predictor.batch.images < meter.record.batch_size:
                    meter.note_smaller_batch(predictor.batch)
                advance(len(table))
        except DiskError:
            # The shard is begun anew once the disk works again.
            begun = sum(map(len, tables))
            meter.count_done(-begun)
            advance(-begun)
            raise
        return pa.concat_tables(tables)

    disk = RunDisk(paths)
    try:
        for shard in shards:
            table = disk.retry(partial(predict_shard, plan.images_of(release, shard)))
            record, count = classifier.record, plan.shard_images(shard)
            device_used = {name: record[name] for name in ("device", "dtype")}
            used = [{**device_used, "batch_size": predictor.batch.images, "images": count}]
            source = Source(plan.release, plan.digest, shard.start, shard.stop, record, used)
            found = Predictions(table, source)
            disk.retry(partial(write_predictions, paths.shard(shard.index), found))
    finally:
        meter.end()
