"""Evaluating releases, comparing evaluations, and their report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.cli import terminal
from sdwn.cli.steps_following import complete_run
from sdwn.errors import UsageError, command

if TYPE_CHECKING:
    from sdwn.cli.steps_submitting import SubmitOptions
    from sdwn.config import EvaluationConfig
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.paths import RunPaths
    from sdwn.prediction.plan import PredictionPlan

# Shards that a GPU judges in turn, the classifier loaded once.
SHARDS_PER_TASK = 8
FAILURES_SHOWN = 5


def classifier(
    default: EvaluationConfig, model: str | None, checkpoint: Path | None
) -> EvaluationConfig:
    """Choose a classifier: the one asked for, or the default."""
    if model or checkpoint:
        chosen = {"model": model or default.model, "checkpoint": checkpoint}
        return default.model_copy(update=chosen)
    return default


def settings_of(
    release: Path, model: str | None, checkpoint: Path | None, given: dict[str, Any]
) -> EvaluationConfig:
    """Choose how to evaluate a release: as its run's config says, but for what is given."""
    from sdwn.config import EvaluationConfig, validated
    from sdwn.releases.release import Release

    opened = Release(release)
    recorded = opened.manifest.evaluation or {}
    # A later sdwn may have recorded more.
    known = {name: recorded[name] for name in EvaluationConfig.model_fields if name in recorded}
    for name in ("groups", "embedding"):
        file = known.get(name)
        at = Path(file) if isinstance(file, str) else Path()
        if at.is_absolute() and not at.is_file() and not given[name]:
            terminal.say(f"the run's {name}, {file}, is not here: the default is taken")
            del known[name]
    default = validated(EvaluationConfig, known, source=str(opened.paths.manifest))
    chosen = classifier(default, model, checkpoint).model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
    if chosen.checkpoint and not chosen.checkpoint.is_file() and checkpoint is None:
        raise UsageError(
            f"{chosen.checkpoint}: the run's config takes the classifier's weights from this file, "
            "and it is not here; give another with --checkpoint, or a model with --model"
        )
    origin = "as the run's config names it" if recorded else "the default"
    weights = f" with {chosen.checkpoint}" if chosen.checkpoint else ""
    by = "as given" if model or checkpoint else f"{origin}; another with --model"
    terminal.say(f"classifier: {chosen.model}{weights} ({by})")
    return chosen


@dataclass(frozen=True, slots=True)
class Targets:
    """A site's profile as tasks that judge ask for it, and as the job that concludes does."""

    judging: ClusterProfile
    concluding: ClusterProfile


def targets(name: str, site: dict[str, str]) -> Targets:
    """Read a profile for an evaluation, with flags in the place of its fields.

    What its ``stages`` say of ``evaluate`` is for the tasks, of ``report`` for what concludes.
    """
    from sdwn.jobs.profile import load_profile, overridden, stage_profile

    profile = load_profile(name, site)
    staged = stage_profile(profile, "evaluate").model_dump(mode="json", exclude_defaults=True)
    fields = {"shards_per_task": SHARDS_PER_TASK, **staged}
    # A flag is for the tasks, whatever the profile says of them.
    judging = overridden(fields, site, source=f"profile {name} to evaluate")
    return Targets(judging, stage_profile(profile, "report"))


def evaluate_release(
    release: Path, chosen: EvaluationConfig, batch_size: str | None = None
) -> dict[str, Any]:
    """Judge a release in this process, and write the figures."""
    from sdwn.batches import parse_batch_size
    from sdwn.evaluation.evaluating import carry_out
    from sdwn.prediction.plan import open_prediction_plan
    from sdwn.releases.release import Release

    opened = Release(release)
    work, judging = open_prediction_plan(opened, chosen)
    size = None if batch_size is None else parse_batch_size(batch_size, "--batch-size")
    with terminal.progress("evaluate", judging.images, unit="images") as advance:
        return carry_out(opened, work, judging, advance, terminal.say, size)


def evaluate_by_tasks(
    release: Path, chosen: EvaluationConfig, sites: Targets, options: SubmitOptions
) -> dict[str, Any]:
    """Judge a release by array tasks; write the figures, or have them written behind those."""
    from sdwn.evaluation.evaluating import finish, is_judged, nothing_left, require_possible
    from sdwn.jobs.live import live_jobs, missing
    from sdwn.prediction.plan import open_prediction_plan
    from sdwn.prediction.pretrained import find_classifier
    from sdwn.releases.release import Release

    opened = Release(release)
    work, judging = open_prediction_plan(opened, chosen)
    if "%" in str(work.root.absolute()):
        raise UsageError(
            f"{work.root}: SLURM and submitit read % in a path as a placeholder; move the release "
            "to a folder whose path has none"
        )
    if not is_judged(opened, work, judging, terminal.say):
        with nothing_left(work):
            require_possible(chosen)
            if find_classifier(chosen.model, judging.chosen.checkpoint) is None:
                terminal.say(
                    f"the weights of {chosen.model} are not here: each task would download them; "
                    f"before that: sdwn prefetch CONFIG --set evaluation.model={chosen.model}"
                )
        if sites.judging.executor == "slurm" and not sites.judging.asks_for_gpu:
            terminal.say("the profile asks for no GPU: its tasks judge on CPUs")
        if options.wait:
            complete_run(work, judging, sites.judging, options.retries)
        elif missing(work, judging) or live_jobs(work):
            return _submitted(work, judging, sites)
    with terminal.working("figures"):
        return finish(opened, work, judging, terminal.say)


def _submitted(work: RunPaths, judging: PredictionPlan, sites: Targets) -> dict[str, Any]:
    """Submit what is neither finished nor live, and what follows; say how all of it stands."""
    from sdwn.jobs.live import failed, live_jobs
    from sdwn.jobs.logs import failure
    from sdwn.jobs.submit import changed_code, submit_once

    if changed := changed_code(work):
        terminal.say(changed)
    lost = failed(work, judging)[:FAILURES_SHOWN]
    failures = [f"shard {index}: {failure(work, index)}" for index in lost]
    jobs, remaining = submit_once(work, judging, sites.judging, terminal.say)
    live = live_jobs(work)
    found: dict[str, Any] = {
        "evaluation": judging.name,
        "submitted": len(jobs),
        "shards": len(judging.shards),
        "done": len(judging.done(work)),
        "live": len({index for job in live for index in job.indices}),
        "remaining": remaining,
        "failures": failures,
        "job_ids": [job.id for job in jobs],
        "work": str(work.root),
    }
    if sites.judging.executor == "slurm" and not remaining:
        found["then"] = _concluded(work, judging, sites.concluding, bool(jobs))
    if job := found.get("then", {}).get("conclude"):
        terminal.say(
            f"job {job} writes the figures when all have ended; see: {command('status', work.root)}"
        )
    elif not remaining:
        terminal.say("when all have ended, run the same command again: it writes the figures")
    return found


def _concluded(
    work: RunPaths, judging: PredictionPlan, profile: ClusterProfile, anew: bool
) -> dict[str, str]:
    """Queue what writes the figures behind all tasks, unless it waits there already."""
    from sdwn.errors import QueueFullError
    from sdwn.jobs.live import live_jobs
    from sdwn.jobs.submit import alone
    from sdwn.workflow import later_stages as chain

    with alone(work, terminal.say):
        # Only what writes the figures has no shards.
        waiting = [job for job in live_jobs(work) if not job.indices]
        if waiting and not anew:
            return {"conclude": waiting[0].id}
        try:
            return {"conclude": chain.submit_conclusion(work, judging, profile, terminal.say).id}
        except QueueFullError as error:
            terminal.say(str(error))
            return {}


def joined(merged: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """Put both results into one; ``images`` stays the release's."""
    return {**evaluated, "evaluated_images": evaluated["images"], **merged}


def report_on(release: Path, evaluation: str | None) -> Path:
    """Write an evaluation's report."""
    from sdwn.releases.release import Release
    from sdwn.reports.report import write_report

    with terminal.working("writing the report"):
        return write_report(Release(release), evaluation)


def compare_releases(which: list[str], evaluation: str | None, out: Path) -> dict[str, Any]:
    """Compare evaluations, write page, tables and figures, and give what follows."""
    from sdwn.paths import ComparisonPaths
    from sdwn.reports.compare import compare
    from sdwn.reports.compare_page import write_comparison
    from sdwn.reports.sides import open_sides
    from sdwn.wordnet.corpus import shared_wordnet
    from sdwn.wordnet.taxonomy import Taxonomy

    paths = ComparisonPaths(out)
    sides = open_sides(which, evaluation)
    for side in sides:
        if side.release.paths.root.resolve() in (out.resolve(), *out.resolve().parents):
            raise UsageError(f"--out {out}: it lies in {side.release}; choose another folder")
    with terminal.working("comparing"):
        found = compare(sides, Taxonomy(shared_wordnet()))
        write_comparison(found, sides, paths)
    return _compared(found, str(paths.page))


def _compared(found: dict[str, Any], page: str) -> dict[str, Any]:
    """Give of a comparison what the command prints."""
    from sdwn.reports.compare_page import verdict

    return {
        "sides": [{"name": side["name"], **_scalars(side["figures"])} for side in found["sides"]],
        "classes_in_common": found["classes_in_common"],
        "settings": found["settings"],
        "pairs": [
            {**{key: pair[key] for key in ("first", "second", "rate")}, "verdict": verdict(pair)}
            for pair in found["pairs"]
        ],
        "path": page,
    }


def _scalars(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
