"""The stage that judges images: shards one after another, each under its name once it is whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from sdwn.batches import BatchSize
from sdwn.devices import visible
from sdwn.errors import DiskError, SdwnError
from sdwn.io import Advance, now
from sdwn.jobs.disk import RunDisk
from sdwn.jobs.records import Meter, first_record
from sdwn.paths import RunPaths, work_paths
from sdwn.planning.plan import Shard
from sdwn.prediction.plan import Judging, judged_images, open_planned
from sdwn.prediction.predictions import Predictions, Source, write_predictions
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import Scope, Taxonomy, scopes

if TYPE_CHECKING:
    from sdwn.prediction.classify import Classifier

log = logging.getLogger(__name__)


def judge(work: Path, indices: Iterable[int], batch_size: int | None = None) -> None:
    """Judge those shards of a release that aren't finished yet."""
    paths = work_paths(work)
    release, judging = open_planned(paths)
    todo = [judging.shards[index] for index in indices if not paths.shard(index).exists()]
    if not todo:
        log.info("all shards of this task are finished already")
        return
    judge_shards(paths, release, judging, todo, batch_size=batch_size)


def judge_shards(  # noqa: PLR0913, PLR0917
    paths: RunPaths,
    release: Release,
    judging: Judging,
    shards: Sequence[Shard],
    advance: Advance = lambda _: None,
    batch_size: int | None = None,
) -> None:
    """Judge shards, the classifier loaded once; a kill costs the shard under way.

    Raises:
        DiskError: the disk of the release failed for minutes.
    """
    from sdwn.devices.device import Device
    from sdwn.devices.profiles import GB

    began = time.monotonic()
    judge = load_judge(release, judging, batch_size)
    device = Device()
    memory_gb = round(device.total_bytes / GB)
    record = first_record(device.name, memory_gb, judge.batch, time.monotonic() - began, now())
    record.total = sum(map(judging.shard_images, shards))
    meter = Meter(paths, record, "judging")
    meter.begin(judge.batch)
    meter.without_gpu(visible.missing(record.device))
    disk = RunDisk(paths)
    try:
        for shard in shards:
            images = judged_images(release, judging, shard)
            table = disk.retry(partial(_judged, judge, images, meter, advance))
            found = Predictions(table, judge.source(judging, shard))
            disk.retry(partial(write_predictions, paths.shard(shard.index), found))
    finally:
        meter.end()


@dataclass(frozen=True, slots=True)
class Judge:
    """A classifier that is loaded, the scope of each synset, and how images are fed to it."""

    classifier: Classifier
    scopes: dict[str, Scope]
    batch: BatchSize
    workers: int

    @property
    def batch_now(self) -> BatchSize:
        """Its batches as they are since memory ran out, if it did."""
        most = self.classifier.most or self.batch.images
        return replace(self.batch, images=min(most, self.batch.images))

    def source(self, judging: Judging, shard: Shard) -> Source:
        """Describe a shard that it has judged."""
        record = self.classifier.record
        kind = {"device": record["device"], "dtype": record["dtype"]}
        images = judging.shard_images(shard)
        return Source(
            release=judging.release,
            judging=judging.digest,
            start=shard.start,
            stop=shard.stop,
            classifier=record,
            judged_on=[{**kind, "batch_size": self.batch_now.images, "images": images}],
        )


def load_judge(release: Release, judging: Judging, batch_size: int | None = None) -> Judge:
    """Load the classifier and find the scopes of the judged synsets.

    Raises:
        SdwnError: it cannot be had, or the checkpoint is another one by now.
    """
    from sdwn.prediction.batching import choose_batch
    from sdwn.prediction.classify import load_classifier
    from sdwn.prediction.loading import cpus
    from sdwn.wordnet.corpus import shared_wordnet

    chosen = judging.chosen
    classifier = load_classifier(chosen.model, chosen.checkpoint)
    weights = classifier.record["checkpoint_sha256"]
    if judging.checkpoint_sha256 not in (None, weights):
        raise SdwnError(
            f"{chosen.checkpoint}: expected the checkpoint {judging.checkpoint_sha256[:12]} that "
            f"this was planned for, found {weights[:12]}; restore it, or evaluate again"
        )
    wnids = judged_images(release, judging).metadata["wnid"].unique().to_pylist()
    found = scopes(Taxonomy(shared_wordnet()), wnids, classifier.classes)
    return Judge(classifier, found, choose_batch(classifier, batch_size), cpus())


def _judged(judge: Judge, images: Release, meter: Meter, advance: Advance) -> pa.Table:
    from sdwn.devices.device import Device
    from sdwn.prediction.predict import judged

    tables, began, device = [], time.monotonic(), Device()
    try:
        for table in judged(images, judge.classifier, judge.scopes, judge.batch, judge.workers):
            tables.append(table)
            ended = time.monotonic()
            meter.sampled(len(table), ended - began, device.peak_bytes)
            began = ended
            if judge.batch_now.images < meter.record.batch_size:
                meter.lowered(judge.batch_now)
            advance(len(table))
    except DiskError:
        # The shard is begun anew once the disk works again.
        begun = sum(map(len, tables))
        meter.passed(-begun)
        advance(-begun)
        raise
    return pa.concat_tables(tables)
