"""Evaluation of a release: images classified here or by tasks, predictions merged, measured."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.evaluation.metrics import read_groups
from sdwn.evaluation.record import (
    build_record,
    main_figures,
    read_own_predictions,
)
from sdwn.io import Advance, OnMessage, ignore
from sdwn.jobs.journal import unfinished_shards
from sdwn.jobs.submit import submission_lock
from sdwn.jobs.task import Stage
from sdwn.paths import ReleasePaths, RunPaths, work_paths
from sdwn.prediction import table
from sdwn.prediction.plan import (
    PredictionPlan,
    count_live_tasks,
    evaluation_of,
    open_planned_release,
    open_prediction_plan,
)
from sdwn.prediction.task import PREDICT, predict_shards
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
    with submission_lock(work, on_message):
        if has_predictions(release, work, plan, on_message):
            advance(plan.images)
        else:
            with removed_if_empty(work):
                if busy := count_live_tasks(work):
                    watch = command("status", work.root, "--watch")
                    raise SdwnError(
                        f"{busy} tasks are live that classify this; run the same command when "
                        f"they have ended (follow them with: {watch}), or end them with: "
                        f"{command('cancel', work.root)}"
                    )
                require_evaluable(plan.evaluation, lambda: release.taxonomy)
                todo = [plan.shards[index] for index in unfinished_shards(work, plan)]
                advance(plan.images - sum(shard.images for shard in todo))
                if todo:
                    predict_shards(work, release, plan, todo, advance, batch_size)
    return write_evaluation(release, work, plan, on_message)


@contextmanager
def removed_if_empty(work: RunPaths) -> Iterator[None]:
    """Remove the empty folder of an evaluation that failed at once, as by a mistyped model."""
    try:
        yield
    except SdwnError:
        if not work.submissions.exists() and not work.done_shards():
            shutil.rmtree(work.root, ignore_errors=True)
            with suppress(OSError):  # an earlier evaluation lies there
                evaluation_of(work).root.rmdir()
        raise


def has_predictions(
    release: Release, work: RunPaths, plan: PredictionPlan, on_message: OnMessage
) -> bool:
    """Return whether undamaged predictions are there.

    Damaged or foreign ones are removed, and so are damaged shards, with a message.
    """
    paths = evaluation_of(work)
    if not paths.predictions.exists():
        for problem in table.remove_damaged_shards(release, work, plan):
            on_message(f"classifying again: {problem}")
        return False
    try:
        table.read_whole_predictions(release, paths, plan)
    except IntegrityError as error:
        on_message(f"classifying again, earlier predictions cannot be kept: {error}")
        paths.predictions.unlink(missing_ok=True)
        return False
    return True


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
        if not paths.predictions.exists():
            table.write_predictions(paths.predictions, table.merge_predictions(release, work, plan))
        # As it lies on the disk; only then may the shards go. Of tasks, their records stay.
        found = table.read_whole_predictions(release, paths, plan)
        shutil.rmtree(work.shards if work.submissions.exists() else work.root, ignore_errors=True)
        paths.earlier.unlink(missing_ok=True)
        classifier = {**found.classifier, "predicted_on": list(found.predicted_on)}
        labelled = release.labelled_by(plan.class_names)
        record = build_record(labelled, paths, found.table, classifier, plan.evaluation)
    return main_figures(paths, record)


def keep_predictions(old: Release, new: ReleasePaths) -> None:
    """Lay a release's predictions into one that was grown from it, for evaluations of that.

    These take the rows whose id, number and SHA-256 are the same there, if the classifier is.
    """
    for folder in old.paths.evaluations.glob("*/"):
        theirs = old.paths.evaluation(folder.name)
        try:
            if theirs.evaluation.exists():
                _, found = read_own_predictions(old, theirs)
            elif theirs.earlier.exists():  # grown itself, and not evaluated since
                found = table.read_predictions(theirs.earlier, old.manifest.most_rows)
            else:
                continue
        except IntegrityError as error:
            log.warning("predictions are not kept: %s", error)
        else:
            table.write_predictions(new.evaluation(folder.name).earlier, found)


def conclude(work: Path, _: Iterable[int], __: TaskOptions = NO_OPTIONS) -> None:
    """Write the figures of a release that tasks have classified: the stage behind them."""
    paths = work_paths(work)
    release, plan = open_planned_release(paths)
    log.info("evaluated: %s", json.dumps(write_evaluation(release, paths, plan, log.info)))


CONCLUDE = Stage("conclude", conclude)
# All stages in the journal of an evaluation's work.
EVALUATION_STAGES = {stage.name: stage for stage in (PREDICT, CONCLUDE)}
