"""The stages that classify or encode images: shards in turn, each written once it is whole.

::

    complete_shards  all that are missing, in this process   ─┐
    predict          those of a task: the stages' function   ─┴▶ make_tables ─▶ work/shards
                                                                                   │
    conclude_table   once all are there: merged, checked, and the shards removed ◀─┘
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.devices.device import Device, missing_gpu
from sdwn.errors import DiskError, IntegrityError, SdwnError, command
from sdwn.io import Advance, OnMessage
from sdwn.jobs.journal import unfinished_shards
from sdwn.jobs.submit import submission_lock
from sdwn.jobs.task import Meter, RunDisk, Stage
from sdwn.paths import RunPaths, work_paths
from sdwn.planning.plan import Shard
from sdwn.prediction.plan import (
    FeaturePlan,
    ImagePlan,
    PredictionPlan,
    count_live_tasks,
    open_planned_release,
)
from sdwn.prediction.table import (
    ImageTable,
    find_by_key,
    merge_shards,
    read_earlier,
    read_whole_table,
    remove_damaged_shards,
)
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
    file: object = plan.source
    network: ImageNetwork
    if isinstance(plan, PredictionPlan):
        from sdwn.prediction.pretrained import load_classifier  # torch and timm

        file = plan.evaluation.checkpoint or file
        network = classifier = load_classifier(plan.source, plan.evaluation.checkpoint)
        if images.has_tree:
            wnids = pc.drop_null(images.metadata["wnid"].unique()).to_pylist()
            known = classifier.classes
            classifier.subtrees = nearest_subtrees(images.taxonomy, wnids, known) if wnids else {}
        same_classes = tuple(network.record.get("class_names", ())) == plan.class_names
    else:
        from sdwn.prediction.encoder import load_encoder  # torch and timm

        network, same_classes = load_encoder(plan.source), True
    weights = network.record["checkpoint_sha256"]
    if plan.checkpoint_sha256 not in (None, weights) or not same_classes:
        raise SdwnError(
            f"{file}: expected the checkpoint {str(plan.checkpoint_sha256)[:12]} that "
            f"this was planned for, found {str(weights)[:12]}; restore it, or {plan.FORMAT.remedy}"
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

    Images that an earlier release had, and of which the same weights made rows there, are not
    classified or encoded again.
    """
    from sdwn.prediction.network import BatchRunner, network_batch_size, run_batches  # torch

    began, device, images = time.monotonic(), Device(), plan.images_of(release)
    network = _load(plan, images)
    record, most = network.record, release.manifest.most_rows
    earlier = read_earlier(plan.table_kind, plan.earlier_file(paths), most, record)
    known = find_by_key(images.metadata, earlier)
    batch, workers = network_batch_size(network, batch_size), len(os.sched_getaffinity(0))
    runner = BatchRunner(network, batch, workers)
    meter = Meter(
        paths,
        device=device,
        batch=runner.batch,
        loading_seconds=time.monotonic() - began,
        total=sum(int((known[one.start : one.stop] < 0).sum()) for one in shards),
        no_gpu=missing_gpu(device.name),
        doing=plan.doing,
    )

    def rows_of(chosen: Release) -> list[pa.Table]:
        tables, began = list[pa.Table](), time.monotonic()
        try:
            for table in run_batches(runner, chosen):
                tables.append(table)
                ended = time.monotonic()
                meter.count_batch(len(table), ended - began, device.peak_bytes)
                began = ended
                if runner.batch.images < meter.record.batch_size:
                    meter.note_smaller_batch(runner.batch)
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
            here = {name: record[name] for name in ("device", "dtype")}
            here |= {"batch_size": runner.batch.images, "images": len(todo)}
            before = {"device": "of an earlier release", "images": len(kept)}
            used = [one for one in (before, here) if one["images"]]
            found = plan.table_kind(table, plan.release, plan.digest, record, used)
            disk.retry(partial(found.write, paths.shard(shard.index)))
    finally:
        meter.end()


# --- All of a plan -----------------------------------------------------------------------------
def complete_shards(  # noqa: PLR0913, PLR0917
    paths: RunPaths,
    release: Release,
    plan: ImagePlan,
    advance: Advance,
    on_message: OnMessage,
    batch_size: int | None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make a plan's missing shards in this process, unless its table is there.

    ``check`` refuses what could not be made before anything is loaded.

    Raises:
        SdwnError: tasks are making them.
    """
    with submission_lock(paths, on_message):
        if has_table(release, paths, plan, on_message):
            advance(plan.images)
            return
        with removed_if_empty(paths):
            if busy := count_live_tasks(paths):
                raise SdwnError(
                    f"{busy} tasks are live that are {plan.doing} this; run the same command when "
                    "they have ended (follow them with: "
                    f"{command('status', paths.root, '--watch')}), or end them with: "
                    f"{command('cancel', paths.root)}"
                )
            check()
            todo = [plan.shards[index] for index in unfinished_shards(paths, plan)]
            advance(plan.images - sum(shard.images for shard in todo))
            if todo:
                make_tables(paths, release, plan, todo, advance, batch_size)


@contextmanager
def removed_if_empty(work: RunPaths) -> Iterator[None]:
    """Remove the empty folder of work that failed at once, as by a mistyped model."""
    try:
        yield
    except SdwnError:
        if not work.submissions.exists() and not work.done_shards():
            shutil.rmtree(work.root, ignore_errors=True)
            with suppress(OSError):  # an earlier table lies there
                work.root.absolute().parent.rmdir()
        raise


def has_table(release: Release, work: RunPaths, plan: ImagePlan, on_message: OnMessage) -> bool:
    """Return whether a plan's undamaged table is there.

    A damaged or foreign one is removed, and so are damaged shards, with a message.
    """
    path = plan.table_file(work)
    if not path.exists():
        for problem in remove_damaged_shards(release, work, plan):
            on_message(f"{plan.doing} again: {problem}")
        return False
    try:
        read_whole_table(release, work, plan)
    except IntegrityError as error:
        on_message(f"{plan.doing} again, earlier {plan.table_kind.WHAT} cannot be kept: {error}")
        path.unlink(missing_ok=True)
        return False
    return True


def conclude_table(release: Release, work: RunPaths, plan: ImagePlan) -> ImageTable:
    """Merge a plan's shards, unless they are merged already; return the table as it was read."""
    path = plan.table_file(work)
    if not path.exists():
        merge_shards(release, work, plan).write(path)
    # As it lies on the disk; only then may the shards go. Of tasks, their records stay.
    found = read_whole_table(release, work, plan)
    shutil.rmtree(work.shards if work.submissions.exists() else work.root, ignore_errors=True)
    plan.earlier_file(work).unlink(missing_ok=True)
    return found
