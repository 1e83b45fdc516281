"""The stage that classifies images: shards one after another, each written once it is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.devices.device import Device, missing_gpu
from sdwn.errors import DiskError, SdwnError
from sdwn.io import Advance
from sdwn.jobs.task import Meter, RunDisk, Stage
from sdwn.paths import RunPaths, work_paths
from sdwn.planning.plan import Shard
from sdwn.prediction.plan import PredictionPlan, evaluation_of, open_planned_release
from sdwn.prediction.table import Predictions, find_by_key, read_earlier, write_predictions
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
    """Classify shards, the classifier loaded once; a kill costs the shard under way.

    Images that an earlier release had, and that the same weights classified there, are not
    classified again.
    """
    # torch and timm
    from sdwn.prediction.classifier import Predictor, classifier_batch_size, predict_images
    from sdwn.prediction.pretrained import load_classifier

    began, device, chosen = time.monotonic(), Device(), plan.evaluation
    classifier = load_classifier(chosen.model, chosen.checkpoint)
    weights = classifier.record["checkpoint_sha256"]
    names = tuple(classifier.record.get("class_names", ()))
    if plan.checkpoint_sha256 not in (None, weights) or names != plan.class_names:
        raise SdwnError(
            f"{chosen.checkpoint or chosen.model}: expected the checkpoint "
            f"{str(plan.checkpoint_sha256)[:12]} that "
            f"this was planned for, found {str(weights)[:12]}; restore it, or evaluate again"
        )
    images = plan.images_of(release)
    most = release.manifest.most_rows
    earlier = read_earlier(evaluation_of(paths).earlier, most, classifier.record)
    known = find_by_key(images.metadata, earlier)
    wnids = pc.drop_null(images.metadata["wnid"].unique()).to_pylist() if images.has_tree else []
    predictor = Predictor(
        classifier,
        nearest_subtrees(release.taxonomy, wnids, classifier.classes) if wnids else {},
        classifier_batch_size(classifier, batch_size),
        workers=len(os.sched_getaffinity(0)),
    )
    meter = Meter(
        paths,
        device=device,
        batch=predictor.batch,
        loading_seconds=time.monotonic() - began,
        total=sum(int((known[one.start : one.stop] < 0).sum()) for one in shards),
        no_gpu=missing_gpu(device.name),
        doing="classifying",
    )

    def predict_rows(chosen: Release) -> list[pa.Table]:
        tables, began = list[pa.Table](), time.monotonic()
        try:
            for table in predict_images(predictor, chosen):
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
        return tables

    disk = RunDisk(paths)
    try:
        for shard in shards:
            rows, record = known[shard.start : shard.stop], classifier.record
            todo = np.flatnonzero(rows < 0)
            advance(len(rows) - len(todo))
            new = disk.retry(partial(predict_rows, images.subset(rows=shard.start + todo)))
            table = pa.concat_tables([earlier.take(rows[rows >= 0]), *new])
            # The earlier ones stand first there, and then the new ones.
            table = table.take(np.argsort(np.argsort(rows < 0, kind="stable")))
            here = {name: record[name] for name in ("device", "dtype")}
            here |= {"batch_size": predictor.batch.images, "images": len(todo)}
            before = {"device": "of an earlier release", "images": len(rows) - len(todo)}
            used = [one for one in (before, here) if one["images"]]
            found = Predictions(table, plan.release, plan.digest, record, used)
            disk.retry(partial(write_predictions, paths.shard(shard.index), found))
    finally:
        meter.end()
