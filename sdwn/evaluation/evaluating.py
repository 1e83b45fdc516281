"""A release becomes an evaluation: judged here or by tasks, merged, and figures made of it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.evaluation.groups import read_groups
from sdwn.evaluation.record import summary
from sdwn.io import Advance
from sdwn.jobs.cluster import Tell, quietly
from sdwn.jobs.live import missing
from sdwn.jobs.submit import alone
from sdwn.paths import RunPaths, work_paths
from sdwn.prediction.plan import (
    PredictionPlan,
    count_live_tasks,
    evaluation_of,
    open_planned_release,
    open_prediction_plan,
)
from sdwn.prediction.table import (
    merge_predictions,
    read_whole_predictions,
    remove_damaged_shards,
    write_predictions,
)
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import Taxonomy

log = logging.getLogger(__name__)


def evaluate(
    release: Release,
    chosen: EvaluationConfig,
    advance: Advance = lambda _: None,
    tell: Tell = quietly,
) -> dict[str, Any]:
    """Judge a release's images in this process and write the figures; return the main ones.

    Shards that are finished are kept, and so are sound predictions of this release, model,
    weights and selection; the figures are made anew.

    Raises:
        SdwnError: nothing is to be judged, tasks judge it now, or the model cannot be had.
    """
    work, judging = open_prediction_plan(release, chosen)
    return carry_out(release, work, judging, advance, tell)


def carry_out(  # noqa: PLR0913, PLR0917
    release: Release,
    work: RunPaths,
    judging: PredictionPlan,
    advance: Advance,
    tell: Tell,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Judge in this process what a plan says and is not judged, and write the figures."""
    with alone(work, tell):
        if is_judged(release, work, judging, tell):
            advance(judging.images)
        else:
            with nothing_left(work):
                _judge_here(release, work, judging, advance, batch_size)
        return _finish(release, work, judging)


@contextmanager
def nothing_left(work: RunPaths) -> Iterator[None]:
    """Leave no folder in the release for what came to nothing, as with a model's name mistyped."""
    try:
        yield
    except SdwnError:
        if not work.submissions.exists() and not work.done_shards():
            shutil.rmtree(work.root, ignore_errors=True)
            with suppress(OSError):  # an earlier evaluation lies there
                evaluation_of(work).root.rmdir()
        raise


def is_judged(release: Release, work: RunPaths, judging: PredictionPlan, tell: Tell) -> bool:
    """Return whether sound predictions are there; what is wrong with those that are not is told.

    Those go, and so do damaged shards of predictions.
    """
    paths = evaluation_of(work)
    if not paths.predictions.exists():
        for problem in remove_damaged_shards(release, work, judging):
            tell(f"judging again: {problem}")
        return False
    try:
        read_whole_predictions(release, paths, judging)
    except IntegrityError as error:
        tell(f"judging again, for what is there cannot be kept: {error}")
        paths.predictions.unlink(missing_ok=True)
        return False
    return True


def require_possible(chosen: EvaluationConfig, taxonomy: Taxonomy) -> None:
    """Find here what is wrong with groups or model, before tasks wait and work in vain.

    Raises:
        SdwnError: the groups or word vectors cannot be read, or timm has no
            such model.
    """
    if chosen.embedding is not None and not chosen.embedding.is_file():
        raise UsageError(f"{chosen.embedding}: no such file of word vectors")
    if chosen.model != EvaluationConfig().model:
        # Seconds, for timm imports torch; only it knows its names.
        from sdwn.prediction.pretrained import require_known

        require_known(chosen.model)
    read_groups(chosen.groups, taxonomy)


def _judge_here(
    release: Release,
    work: RunPaths,
    judging: PredictionPlan,
    advance: Advance,
    batch_size: int | None,
) -> None:
    from sdwn.prediction.task import predict_shards

    if busy := count_live_tasks(work):
        raise SdwnError(
            f"{busy} tasks are live that judge this; run the same command when they have ended "
            f"(follow them with: {command('status', work.root, '--watch')}), "
            f"or end them with: {command('cancel', work.root)}"
        )
    require_possible(judging.chosen, release.taxonomy)
    todo = [judging.shards[index] for index in missing(work, judging)]
    advance(judging.images - sum(map(judging.shard_images, todo)))
    if todo:
        predict_shards(work, release, judging, todo, advance, batch_size)


def finish(release: Release, work: RunPaths, judging: PredictionPlan, tell: Tell) -> dict[str, Any]:
    """Merge what is judged, unless it is merged already, and write the figures.

    Raises:
        IntegrityError: something is missing, damaged or foreign; each is named.
    """
    with alone(work, tell):
        return _finish(release, work, judging)


def _finish(release: Release, work: RunPaths, judging: PredictionPlan) -> dict[str, Any]:
    from sdwn.evaluation.conclude import conclude

    paths = evaluation_of(work)
    if not paths.predictions.exists():
        write_predictions(paths.predictions, merge_predictions(release, work, judging))
    # As it lies on the disk; only then may the shards go. Of tasks, what they said stays.
    found = read_whole_predictions(release, paths, judging)
    shutil.rmtree(work.shards if work.submissions.exists() else work.root, ignore_errors=True)
    classifier = {**found.source.classifier, "judged_on": list(found.source.judged_on)}
    return summary(paths, conclude(release, paths, found.table, classifier, judging.chosen))


def conclude_work(work: Path, _: Iterable[int]) -> None:
    """Write the figures of a release that tasks have judged.

    Raises:
        IntegrityError: something is missing, damaged or foreign; each is named.
    """
    paths = work_paths(work)
    release, judging = open_planned_release(paths)
    log.info("evaluated: %s", json.dumps(finish(release, paths, judging, log.info)))
