"""Evaluation of a release by array tasks under a site's profile, and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdwn.config import EvaluationConfig, validated
from sdwn.errors import QueueFullError, UsageError, command
from sdwn.evaluation.evaluate import (
    CONCLUDE,
    EVALUATION_STAGES,
    has_predictions,
    removed_if_empty,
    require_evaluable,
    write_evaluation,
)
from sdwn.io import OnMessage
from sdwn.jobs.journal import failed_shards, live_jobs, read_journal, unfinished_shards
from sdwn.jobs.logs import failure
from sdwn.jobs.profile import ClusterProfile, load_profile, overridden, stage_profile
from sdwn.jobs.submit import WorkOrder, changed_code, submission_lock, submit_once
from sdwn.prediction.plan import open_prediction_plan
from sdwn.releases.release import Release
from sdwn.workflow.later_stages import submit_behind
from sdwn.workflow.status import FAILURES_SHOWN
from sdwn.workflow.submitting import Display, SubmitOptions, follow_to_end

# Shards that a GPU classifies in turn, the classifier loaded once.
SHARDS_PER_TASK = 8


def evaluation_settings(
    release: Path, model: str | None, checkpoint: Path | None, given: dict[str, Any], say: OnMessage
) -> EvaluationConfig:
    """Return the settings to evaluate a release: its run's config, replaced by the arguments.

    ``given`` has ``images``, ``groups`` and ``embedding``; None: as the config says.
    """
    opened = Release(release)
    recorded = opened.manifest.evaluation or {}
    # A later sdwn may have recorded more.
    known = {name: recorded[name] for name in EvaluationConfig.model_fields if name in recorded}
    for name in ("groups", "embedding"):
        file = known.get(name)
        path = Path(file) if isinstance(file, str) else Path()
        if path.is_absolute() and not path.is_file() and not given[name]:
            say(f"the run's {name}, {file}, is not here: the default is used")
            del known[name]
    config = validated(EvaluationConfig, known, source=str(opened.paths.manifest))
    update = {name: value for name, value in given.items() if value is not None}
    chosen = with_classifier(config, model, checkpoint).model_copy(update=update)
    if chosen.checkpoint and not chosen.checkpoint.is_file() and checkpoint is None:
        raise UsageError(
            f"{chosen.checkpoint}: the run's config takes the classifier's weights from this file, "
            "and it is not here; give another with --checkpoint, or a model with --model"
        )
    origin = "from the run's config" if recorded else "the default"
    weights = f" with {chosen.checkpoint}" if chosen.checkpoint else ""
    by = "from the command line" if model or checkpoint else f"{origin}; another with --model"
    say(f"classifier: {chosen.model}{weights} ({by})")
    return chosen


def with_classifier(
    config: EvaluationConfig, model: str | None, checkpoint: Path | None
) -> EvaluationConfig:
    """Return settings with this classifier, if one is given; the config's own weights then go."""
    if not (model or checkpoint):
        return config
    return config.model_copy(update={"model": model or config.model, "checkpoint": checkpoint})


def evaluation_profiles(name: str, site: dict[str, str]) -> tuple[ClusterProfile, ClusterProfile]:
    """Read a profile for an evaluation: for tasks that classify, and for the figures' job.

    What its ``stages`` say of ``evaluate`` is for the tasks, of ``report`` for the figures' job.
    A flag of ``site`` is for the tasks, whatever the profile says of them.
    """
    profile = load_profile(name, site)
    staged = stage_profile(profile, "evaluate").model_dump(mode="json", exclude_defaults=True)
    fields = {"shards_per_task": SHARDS_PER_TASK, **staged}
    tasks = overridden(fields, site, source=f"profile {name} to evaluate")
    return tasks, stage_profile(profile, "report")


def evaluate_by_tasks(
    release: Path,
    config: EvaluationConfig,
    profiles: tuple[ClusterProfile, ClusterProfile],
    options: SubmitOptions,
    display: Display,
) -> dict[str, Any]:
    """Classify a release by array tasks; write the figures, or queue a job that writes them.

    Returns:
        The evaluation's main figures, or how its tasks stand.
    """
    say, opened, (profile, figures) = display.say, Release(release), profiles
    work, plan = open_prediction_plan(opened, config)
    if "%" in str(work.root.absolute()):
        raise UsageError(
            f"{work.root}: SLURM and submitit read % in a path as a placeholder; move the release "
            "to a folder whose path has none"
        )
    order = WorkOrder(work, plan, EVALUATION_STAGES, profile)
    if not has_predictions(opened, work, plan, say):
        with removed_if_empty(work):
            require_evaluable(config, opened.taxonomy)
            from sdwn.prediction.pretrained import find_classifier  # torch and timm

            if find_classifier(config.model, plan.evaluation.checkpoint) is None:
                say(
                    f"the weights of {config.model} are not here: each task would download them; "
                    f"before that: sdwn prefetch CONFIG --set evaluation.model={config.model}"
                )
        if options.wait:
            follow_to_end(order, options, display)
        elif unfinished_shards(work, plan) or live_jobs(work):
            return _submit_tasks(order, plan.name, figures, say)
    with display.progress("writing the figures"):
        return write_evaluation(opened, work, plan, say)


def _submit_tasks(
    order: WorkOrder, name: str, figures: ClusterProfile, say: OnMessage
) -> dict[str, Any]:
    """Submit what is neither finished nor live, and the figures' job; return how all stands."""
    work, plan, submissions = order.paths, order.work, read_journal(order.paths)
    if changed := changed_code(submissions):
        say(changed)
    lost = failed_shards(work, plan, submissions, live_jobs(work, submissions))[:FAILURES_SHOWN]
    failures = [f"shard {index}: {failure(work, index, submissions)}" for index in lost]
    jobs, remaining = submit_once(order, say)
    live = live_jobs(work)
    found: dict[str, Any] = {
        "evaluation": name,
        "submitted": len(jobs),
        "shards": len(plan.assigned_shards),
        "done": len(plan.done(work)),
        "live": len({index for job in live for index in job.indices}),
        "remaining": remaining,
        "failures": failures,
        "job_ids": [job.id for job in jobs],
        "work": str(work.root),
    }
    if order.profile.executor == "slurm" and not remaining:
        found["then"] = {}
        with submission_lock(work, say):
            # Of the jobs here, only the one that writes the figures has no shards.
            waiting = [job for job in live_jobs(work) if not job.indices]
            try:
                if jobs or not waiting:
                    waiting = [submit_behind(work, plan, CONCLUDE, figures, say)]
                found["then"] = {"conclude": waiting[0].id}
            except QueueFullError as error:
                say(str(error))
    if job := found.get("then", {}).get("conclude"):
        see = command("status", work.root)
        say(f"job {job} writes the figures when all have ended; see: {see}")
    elif not remaining:
        say("when all have ended, run the same command again: it writes the figures")
    return found
