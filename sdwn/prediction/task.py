"""The stages that classify or encode images: shards in turn, each written once it is whole."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.devices.device import Device, missing_gpu
from sdwn.errors import DiskError, SdwnError
from sdwn.io import Advance
from sdwn.jobs.task import Meter, RunDisk, Stage
from sdwn.paths import ResultPaths, RunPaths, work_paths
from sdwn.planning.plan import Shard
from sdwn.prediction.plan import FeaturePlan, ImagePlan, PredictionPlan, open_planned_release
from sdwn.prediction.table import TABLES, find_by_key, read_earlier
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import nearest_subtrees

if TYPE_CHECKING:
    from sdwn.prediction.network import ImageNetwork


def predict(work: Path, indices: Iterable[int], options: TaskOptions = NO_OPTIONS) -> None:
    """Classify or encode the images of those shards that aren't finished yet: a task's stage."""
    paths = work_paths(work)
    release, plan = open_planned_release(paths)
    todo = [plan.shards[index] for index in indices if not paths.shard(index).exists()]
    if todo:
        make_tables(paths, release, plan, todo, batch_size=options.batch_size)


PREDICT, ENCODE = (Stage(kind.stage, predict) for kind in (PredictionPlan, FeaturePlan))


def _load(plan: ImagePlan, images: Release) -> ImageNetwork:
    """Load a plan's network for these images, checked to be the one that was planned."""
    from sdwn.prediction.pretrained import load_classifier, load_encoder  # torch and timm

    network: ImageNetwork
    file, names = None, tuple[str, ...]()
    if isinstance(plan, PredictionPlan):
        file, names = plan.evaluation.checkpoint, plan.class_names
        network = classifier = load_classifier(plan.model, file)
        wnids = pc.drop_null(images.metadata["wnid"].unique()).to_pylist()
        if images.has_tree and wnids:
            classifier.subtrees = nearest_subtrees(images.taxonomy, wnids, classifier.classes)
    else:
        network = load_encoder(plan.model)
    weights = network.record["checkpoint_sha256"]
    same_classes = tuple(network.record.get("class_names", ())) == names
    if plan.checkpoint_sha256 not in (None, weights) or not same_classes:
        raise SdwnError(
            f"{file or plan.model}: expected the checkpoint {str(plan.checkpoint_sha256)[:12]} "
            f"that this was planned for, found {str(weights)[:12]}; restore it, or "
            f"{plan.FORMAT.remedy}"
        )
    return network


def make_tables(  # noqa: PLR0913, PLR0917
    paths: RunPaths,
    release: Release,
    plan: ImagePlan,
    shards: Sequence[Shard],
    advance: Advance = lambda _: None,
    batch_size: int | None = None,
) -> None:
    """Classify or encode shards, the network loaded once; a kill costs the shard under way.

    Rows that the same weights made of an earlier release's images are kept.
    """
    from sdwn.prediction.network import network_batch_size, run_batches  # torch

    began, device, images = time.monotonic(), Device(), plan.images_of(release)
    network = _load(plan, images)
    record, kind = network.record, TABLES[plan.table_name]
    earlier_file = ResultPaths(paths.root.absolute().parent).earlier
    earlier = read_earlier(kind, earlier_file, release.manifest.most_rows, record)
    known = find_by_key(images.metadata, earlier)
    network.batch = network_batch_size(network, batch_size)
    meter = Meter(
        paths,
        device=device,
        batch=network.batch,
        loading_seconds=time.monotonic() - began,
        total=sum(int((known[one.start : one.stop] < 0).sum()) for one in shards),
        no_gpu=missing_gpu(device.name),
        doing=plan.doing,
    )

    def rows_of(chosen: Release) -> list[pa.Table]:
        tables, began = list[pa.Table](), time.monotonic()
        try:
            for table in run_batches(network, chosen):
                tables.append(table)
                ended = time.monotonic()
                meter.count_batch(len(table), ended - began, device.peak_bytes)
                began = ended
                if network.batch.images < meter.record.batch_size:
                    meter.note_smaller_batch(network.batch)
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
            rows = known[shard.start : shard.stop]
            todo, kept = np.flatnonzero(rows < 0), rows[rows >= 0]
            advance(len(kept))
            new = disk.retry(partial(rows_of, images.subset(rows=shard.start + todo)))
            table = pa.concat_tables([*[earlier.take(kept)] * bool(len(kept)), *new])
            # The earlier ones stand first there, and then the new ones.
            table = table.take(np.argsort(np.argsort(rows < 0, kind="stable")))
            here = {"device": record["device"], "dtype": record["dtype"]}
            here |= {"batch_size": network.batch.images, "images": len(todo)}
            before = {"device": "of an earlier release", "images": len(kept)}
            made_on = [one for one in (before, here) if one["images"]]
            found = kind(table, plan.release, plan.digest, record, made_on)
            disk.retry(partial(found.write, paths.shard(shard.index)))
    finally:
        meter.end()
