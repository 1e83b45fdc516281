"""The steps of evaluating a release, with what a person sees of it meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn import terminal
from sdwn.errors import UsageError
from sdwn.steps import SubmitOptions, complete_run

if TYPE_CHECKING:
    from sdwn.config import EvaluationConfig
    from sdwn.evaluation.judging import Judging
    from sdwn.files import RunPaths
    from sdwn.profiles import ClusterProfile

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


def judging_profile(name: str, site: dict[str, str]) -> ClusterProfile:
    """Read a profile as it is for judging, with flags in the place of its fields."""
    from sdwn.profiles import load_profile, overridden, stage_profile

    profile = load_profile(name)
    staged = stage_profile(profile, "evaluate")
    asked = profile.stages.get("evaluate", {})
    own = {"shards_per_task": asked.get("shards_per_task", SHARDS_PER_TASK), **site}
    # What follows the judging asks for what the profile says of a report.
    fields = staged.model_dump(mode="json", exclude_defaults=True)
    stages = {stage: fields for stage, fields in profile.stages.items() if stage != "evaluate"}
    return overridden({**fields, "stages": stages}, own, source=f"profile {name} to evaluate")


def evaluate_release(
    release: Path, chosen: EvaluationConfig, batch_size: str | None = None
) -> dict[str, Any]:
    """Judge a release in this process, and write the figures."""
    from sdwn.batches import asked, asking
    from sdwn.evaluation.evaluating import carry_out
    from sdwn.evaluation.judging import open_judging
    from sdwn.release import Release

    opened = Release(release)
    work, judging = open_judging(opened, chosen)
    with (
        asking(batch_size),
        terminal.progress("evaluate", judging.images, unit="images") as advance,
    ):
        asked()  # what is no number is refused before anything is loaded
        return carry_out(opened, work, judging, advance, terminal.say)


def evaluate_by_tasks(
    release: Path, chosen: EvaluationConfig, profile: ClusterProfile, options: SubmitOptions
) -> dict[str, Any]:
    """Judge a release by array tasks; write the figures, or have them written behind those."""
    from sdwn.evaluation.evaluating import finish, is_judged, require_possible
    from sdwn.evaluation.judging import open_judging
    from sdwn.live import live_jobs, missing
    from sdwn.release import Release

    opened = Release(release)
    work, judging = open_judging(opened, chosen)
    _require_plain(work)
    if not is_judged(opened, work, judging, terminal.say):
        require_possible(chosen)
        if options.wait:
            complete_run(work, judging, profile, options.retries)
        elif missing(work, judging) or live_jobs(work):
            return _submitted(work, judging, profile)
    with terminal.working("figures"):
        return finish(opened, work, judging, terminal.say)


def _require_plain(work: RunPaths) -> None:
    if "%" in str(work.root):
        raise UsageError(
            f"{work.root}: SLURM and submitit read % in a path as a placeholder; move the release "
            "to a folder whose path has none"
        )


def _submitted(work: RunPaths, judging: Judging, profile: ClusterProfile) -> dict[str, Any]:
    """Submit what is neither finished nor live, and what follows; say how all of it stands."""
    from sdwn.joblogs import failure
    from sdwn.live import failed, live_jobs
    from sdwn.submission import changed_code, submit_once

    if changed := changed_code(work):
        terminal.say(changed)
    lost = {index: failure(work, index) for index in failed(work, judging)[:FAILURES_SHOWN]}
    jobs, remaining = submit_once(work, judging, profile, terminal.say)
    live = live_jobs(work)
    found: dict[str, Any] = {
        "evaluation": judging.name,
        "submitted": len(jobs),
        "shards": len(judging.shards),
        "done": len(judging.done(work)),
        "live": len({index for job in live for index in job.indices}),
        "remaining": remaining,
        "failures": [f"shard {index}: {reason}" for index, reason in lost.items()],
        "job_ids": [job.id for job in jobs],
        "work": str(work.root),
    }
    if profile.executor == "slurm" and not remaining:
        found["then"] = _concluded(work, judging, profile, bool(jobs))
    _say_how_it_ends(found, work, judging)
    return found


def _concluded(
    work: RunPaths, judging: Judging, profile: ClusterProfile, anew: bool
) -> dict[str, str]:
    """Queue what writes the figures behind all tasks, unless it waits there already."""
    from sdwn import chain
    from sdwn.errors import QueueFullError
    from sdwn.journal import read_journal
    from sdwn.live import live_each
    from sdwn.submission import alone

    with alone(work, terminal.say):
        waiting = [
            job
            for one, jobs in live_each(read_journal(work))
            for job in jobs
            if one.stage == "conclude"
        ]
        if waiting and not anew:
            return {"conclude": waiting[0].id}
        try:
            return {"conclude": chain.submit_conclusion(work, judging, profile, terminal.say).id}
        except QueueFullError as error:
            terminal.say(str(error))
            return {}


def _say_how_it_ends(found: dict[str, Any], work: RunPaths, judging: Judging) -> None:
    again = "run the same command again"
    if found["remaining"]:
        terminal.say(
            f"SLURM takes no more of your jobs now: {found['remaining']} shards remain; {again} "
            "when some have ended, or let --wait feed the queue"
        )
    elif job := found.get("then", {}).get("conclude"):
        terminal.say(
            f"job {job} writes the figures when all have ended; see: sdwn status {work.root}"
        )
    else:
        terminal.say(f"when all have ended, {again}: it writes the figures")


def joined(merged: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """Put both results into one; ``images`` stays the release's."""
    return {**evaluated, "evaluated_images": evaluated["images"], **merged}
