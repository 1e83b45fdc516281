"""Evaluation of a release: images classified here or by tasks, predictions merged, measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.metrics import read_groups
from sdwn.evaluation.record import (
    build_record,
    main_figures,
    read_own_predictions,
)
from sdwn.io import Advance, OnMessage, ignore, refuse_links
from sdwn.jobs.submit import submission_lock
from sdwn.jobs.task import Stage
from sdwn.paths import EvaluationPaths, ReleasePaths, RunPaths, work_paths
from sdwn.prediction.encode import conclude_features
from sdwn.prediction.features import FeatureTable
from sdwn.prediction.plan import (
    FeaturePlan,
    PredictionPlan,
    evaluation_of,
    open_planned_release,
    open_prediction_plan,
)
from sdwn.prediction.table import IMAGE_KEY, ImageTable, Predictions, find_by_key
from sdwn.prediction.task import ENCODE, PREDICT, complete_shards, conclude_table
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import Taxonomy

log = logging.getLogger(__name__)


def evaluate(
    release: Release,
    chosen: EvaluationConfig,
    advance: Advance = lambda _: None,
    on_message: OnMessage = ignore,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Classify a release's images in this process and write the figures; return the main ones.

    Shards that are finished are kept, and so are undamaged predictions of this release, model,
    weights and selection; the figures are computed anew.
    """
    work, plan = open_prediction_plan(release, chosen)
    check = partial(require_evaluable, plan.evaluation, lambda: release.taxonomy)
    complete_shards(work, release, plan, advance, on_message, batch_size, check)
    return write_evaluation(release, work, plan, on_message)


def require_evaluable(chosen: EvaluationConfig, taxonomy: Callable[[], Taxonomy]) -> None:
    """Refuse wrong groups, word vectors or models here, before tasks wait and work in vain."""
    if chosen.embedding is not None and not chosen.embedding.is_file():
        raise UsageError(f"{chosen.embedding}: no such file of word vectors")
    if chosen.model != EvaluationConfig().model:
        # Seconds, for timm imports torch; only it knows its names.
        from sdwn.prediction.pretrained import own_classes, require_known

        require_known(chosen.model)
        if own_classes(chosen.model):
            return
    read_groups(chosen.groups, taxonomy())


def write_evaluation(
    release: Release, work: RunPaths, plan: PredictionPlan, on_message: OnMessage
) -> dict[str, Any]:
    """Merge the shards of predictions, unless they are merged already, and write the figures."""
    paths = evaluation_of(work)
    with submission_lock(work, on_message):
        found = conclude_table(release, work, plan)
        classifier = {**found.network, "predicted_on": list(found.made_on)}
        labelled = release.labelled_by(plan.class_names)
        record = build_record(labelled, paths, found.table, classifier, plan.evaluation)
    return main_figures(paths, record)


def keep_computed(old: Release, new: ReleasePaths) -> None:
    """Lay the predictions and features of a release's images into one that has these images.

    That one was grown from it, or has some of them. Its evaluations and features take the rows
    whose id, number and SHA-256 are the same there, if the classifier or encoder is.
    """
    whole, most = Release(old.paths.root), old.manifest.most_rows

    def keep(own: Path, read: Callable[[], ImageTable]) -> None:
        try:
            refuse_links(old.paths.evaluations)
            found = read()
        except IntegrityError as error:
            log.warning("rows of images are not kept: %s", error)
        else:
            rows = find_by_key(old.metadata, found.table, IMAGE_KEY)
            replace(found, table=found.table.take(pa.array(rows[rows >= 0]))).write(own)

    for folder in sorted(old.paths.evaluations.glob("*/")):
        theirs, own = old.paths.evaluation(folder.name), new.evaluation(folder.name).earlier
        if theirs.evaluation.exists():
            keep(own, partial(_read_predictions, whole, theirs))
        elif theirs.earlier.exists():  # made so itself, and not evaluated since
            keep(own, partial(Predictions.read, theirs.earlier, most))
    for folder in sorted(old.paths.evaluations.glob("features/*/")):
        encoded, own = old.paths.features(folder.name), new.features(folder.name).earlier
        path = encoded.features if encoded.features.exists() else encoded.earlier
        if path.exists():
            keep(own, partial(FeatureTable.read, path, most))


def _read_predictions(release: Release, paths: EvaluationPaths) -> Predictions:
    return read_own_predictions(release, paths)[1]


def conclude(work: Path, _: Iterable[int], __: TaskOptions = NO_OPTIONS) -> None:
    """Write the figures of a release that tasks have classified, or the features they made."""
    paths = work_paths(work)
    release, plan = open_planned_release(paths)
    if isinstance(plan, FeaturePlan):
        log.info("encoded: %s", json.dumps(conclude_features(release, paths, plan, log.info)))
    elif isinstance(plan, PredictionPlan):
        log.info("evaluated: %s", json.dumps(write_evaluation(release, paths, plan, log.info)))


CONCLUDE = Stage("conclude", conclude)
# All stages in the journal of the work on a release's images.
IMAGE_STAGES = {stage.name: stage for stage in (PREDICT, ENCODE, CONCLUDE)}
