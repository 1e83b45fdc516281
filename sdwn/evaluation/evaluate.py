"""Evaluations and features of a release: planned, made here or by tasks, merged and written."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.evaluation.metrics import read_groups
from sdwn.evaluation.record import build_record, main_figures, read_own_predictions
from sdwn.io import Advance, OnMessage, ignore, refuse_links
from sdwn.jobs.journal import unfinished_shards
from sdwn.jobs.submit import submission_lock
from sdwn.jobs.task import Stage
from sdwn.paths import ReleasePaths, ResultPaths, RunPaths, work_paths
from sdwn.prediction import plan as image_plans
from sdwn.prediction import table
from sdwn.prediction.plan import ImagePlan
from sdwn.prediction.table import FeatureTable, ImageTable, Predictions
from sdwn.prediction.task import ENCODE, PREDICT, make_tables
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import Taxonomy

log = logging.getLogger(__name__)


def open_image_plan(release: Release, chosen: EvaluationConfig | str) -> tuple[RunPaths, ImagePlan]:
    """Plan an evaluation, or the features of the encoder named; or find that plan in its folder."""
    if isinstance(chosen, str):
        return image_plans.open_feature_plan(release, chosen)
    require_evaluable(chosen, lambda: release.taxonomy)
    return image_plans.open_prediction_plan(release, chosen)


def make_results(  # noqa: PLR0913, PLR0917
    release: Release,
    work: RunPaths,
    plan: ImagePlan,
    advance: Advance = lambda _: None,
    on_message: OnMessage = ignore,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Do an image plan in this process: write an evaluation, or features; return what was written.

    Finished shards are kept, and so is an undamaged table of this release, model and weights; the
    figures are computed anew.
    """
    with submission_lock(work, on_message):
        if has_table(release, work, plan, on_message):
            advance(plan.images)
        elif busy := image_plans.count_live_tasks(work):
            watch, end = command("status", work.root, "--watch"), command("cancel", work.root)
            raise SdwnError(
                f"{busy} tasks are live, {plan.doing} this; run the same command when they have "
                f"ended (follow them with: {watch}), or end them with: {end}"
            )
        else:
            todo = [plan.shards[index] for index in unfinished_shards(work, plan)]
            advance(plan.images - sum(shard.images for shard in todo))
            if todo:
                make_tables(work, release, plan, todo, advance, batch_size)
    return write_results(release, work, plan, on_message)


def has_table(release: Release, work: RunPaths, plan: ImagePlan, on_message: OnMessage) -> bool:
    """Return whether a plan's undamaged table is there; remove a damaged one, with a message."""
    path = plan.table_file(work)
    if path.exists():
        try:
            table.read_whole_table(release, work, plan)
        except IntegrityError as error:
            on_message(f"{plan.doing} again, earlier {plan.table_name} cannot be kept: {error}")
            path.unlink(missing_ok=True)
    return path.exists()


def require_evaluable(chosen: EvaluationConfig, taxonomy: Callable[[], Taxonomy]) -> None:
    """Refuse wrong groups, word vectors or models here, before tasks wait and work in vain."""
    files = {"checkpoint file": chosen.checkpoint, "file of word vectors": chosen.embedding}
    for what, path in files.items():
        if path is not None and not path.is_file():
            raise UsageError(f"{path}: no such {what}")
    if chosen.model != EvaluationConfig().model:
        # Seconds, for timm imports torch; only it knows its names.
        from sdwn.prediction.pretrained import own_classes, require_known

        require_known(chosen.model)
        if own_classes(chosen.model):
            return
    if chosen.groups is not None:
        read_groups(chosen.groups, taxonomy())


def write_results(
    release: Release, work: RunPaths, plan: ImagePlan, on_message: OnMessage
) -> dict[str, Any]:
    """Merge a plan's shards, unless that is done, and remove them; write predictions' figures."""
    path = plan.table_file(work)
    with submission_lock(work, on_message):
        if not path.exists():
            table.merge_shards(release, work, plan).write(path)
        # As it lies on the disk; only then may the shards go. Of tasks, their records stay.
        found = table.read_whole_table(release, work, plan)
        shutil.rmtree(work.shards if work.submissions.exists() else work.root, ignore_errors=True)
        ResultPaths(path.parent).earlier.unlink(missing_ok=True)
        if isinstance(plan, image_plans.PredictionPlan):
            paths = release.paths.evaluation(plan.name)
            classifier = {**found.network, "predicted_on": list(found.made_on)}
            labelled = release.labelled_by(plan.class_names)
            record = build_record(labelled, paths, found.table, classifier, plan.evaluation)
            return main_figures(paths, record)
    return {
        "features": plan.name,
        "model": plan.model,
        "images": len(found.table),
        "dimensions": table.vectors_of(found.table).shape[1],
        "bytes": path.stat().st_size,
        "path": str(path),
    }


def keep_computed(old: Release, new: ReleasePaths) -> None:
    """Lay the predictions and features of a release's images into one that has some of them.

    They are taken where id, number and SHA-256 of an image and the network are the same.
    """
    most, found = old.manifest.most_rows, dict[Path, Callable[[], ImageTable]]()
    for folder in sorted(old.paths.evaluations.glob("*/")):
        theirs, own = old.paths.evaluation(folder.name), new.evaluation(folder.name).earlier
        if theirs.evaluation.exists():
            found[own] = partial(read_own_predictions, Release(old.paths.root), theirs)
        elif theirs.earlier.exists():  # made so itself, and not evaluated since
            found[own] = partial(Predictions.read, theirs.earlier, most)
    for folder in sorted(old.paths.evaluations.glob("features/*/")):
        encoded, own = old.paths.features(folder.name), new.features(folder.name).earlier
        path = encoded.features if encoded.features.exists() else encoded.earlier
        if path.exists():
            found[own] = partial(FeatureTable.read, path, most)
    for own, read in found.items():
        try:
            refuse_links(old.paths.evaluations)
            kept = read()
        except IntegrityError as error:
            log.warning("rows of images are not kept: %s", error)
        else:
            rows = table.find_by_key(old.metadata, kept.table, table.IMAGE_KEY)
            replace(kept, table=kept.table.take(pa.array(rows[rows >= 0]))).write(own)


def conclude(work: Path, _: Iterable[int], __: TaskOptions = NO_OPTIONS) -> None:
    """Write the figures of a release that tasks have classified, or the features they made."""
    paths = work_paths(work)
    release, plan = image_plans.open_planned_release(paths)
    found = write_results(release, paths, plan, log.info)
    log.info("wrote the %s: %s", plan.result, json.dumps(found))


CONCLUDE = Stage("conclude", conclude)
# All stages in the journal of the work on a release's images.
IMAGE_STAGES = {stage.name: stage for stage in (PREDICT, ENCODE, CONCLUDE)}
