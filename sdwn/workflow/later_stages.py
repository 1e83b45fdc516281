"""The later stages as tasks of their own: what a run's arrays are followed by."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from sdwn import checkout
from sdwn.errors import SdwnError, UsageError, command
from sdwn.jobs.cluster import Job, Tell, quietly
from sdwn.jobs.journal import Submission, cancelled_jobs, noted_later, read_journal
from sdwn.jobs.live import Live, end, live_each, live_of, missing, unreachable
from sdwn.jobs.logs import job_logs, reason, succeeded
from sdwn.jobs.profile import ClusterProfile, LaterStage, stage_profile
from sdwn.jobs.scheduler import PENDING
from sdwn.jobs.submit import alone, submit_array
from sdwn.jobs.task import ArrayTask
from sdwn.models.lock import require_classifier
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Plan, read_plan
from sdwn.planning.work import Dealt

log = logging.getLogger(__name__)

DONE, FAILED, WAITING, NOT_YET = "done", "failed: ", "pending ", "not submitted yet"

STAGES: tuple[LaterStage, ...] = get_args(LaterStage)
# With what follows a release's judging.
LATER = (*STAGES, "conclude")


def parse_stages(text: str) -> tuple[LaterStage, ...]:
    """Read a list of later stages; they run in their own order, however they are given.

    >>> parse_stages("evaluate, merge")
    ('merge', 'evaluate')

    Raises:
        UsageError: it names something else.
    """
    names = {name.strip() for name in text.split(",")}
    if unknown := names - set(STAGES):
        raise UsageError(
            f"--then {text}: expected some of {', '.join(STAGES)}, found {sorted(unknown)[0]!r}"
        )
    return tuple(stage for stage in STAGES if stage in names)


def require_possible(
    paths: RunPaths,
    plan: Plan,
    stages: Sequence[LaterStage],
    profile: ClusterProfile,
    wait: bool,
) -> None:
    """Refuse a chain that has no beginning, or nobody to link it.

    Raises:
        UsageError: a stage lacks what it works on.
    """
    if "merge" in stages and not plan.slice.whole:
        raise UsageError(
            f"--then merge: {paths.root} has the slice {plan.slice} of its plan; merge all of them "
            "when they are done, with: sdwn merge RUN RUN ... --release RELEASE"
        )
    if profile.executor == "local" and not wait:
        raise UsageError("--then: processes of this machine need --wait, which links them")
    if stages[0] != "merge" and not ReleasePaths(paths.release).manifest.exists():
        raise UsageError(f"--then {stages[0]}: {paths.release} is no release yet; add merge")
    if stages[0] == "report" and not ReleasePaths(paths.release).evaluations.is_dir():
        raise UsageError("--then report: nothing is evaluated yet; add evaluate")


def submit_chain(
    paths: RunPaths,
    plan: Plan,
    stages: Sequence[LaterStage],
    profile: ClusterProfile,
    tell: Tell,
) -> dict[str, Job]:
    """Submit later stages, the first behind all live arrays, each other behind the one before.

    Stages that wait from an earlier submission are taken back: they would start too early. One
    that runs goes on, and the first waits for it.

    Raises:
        SdwnError: SLURM takes no more jobs, or does not answer.
    """
    before = _live_before(paths, plan, tell)
    jobs: dict[str, Job] = {}
    for stage in stages:
        site = _behind(stage_profile(profile, stage), before, "afterok" if jobs else "afterany")
        jobs[stage] = _submit_later(paths, plan, stage, site, tell)
        before = [jobs[stage].id]
    return jobs


def submit_conclusion(paths: RunPaths, judging: Dealt, profile: ClusterProfile, tell: Tell) -> Job:
    """Submit what writes an evaluation's figures, behind all live tasks that judge.

    ``profile`` is what that job asks for.

    Raises:
        SdwnError: SLURM takes no more jobs, or does not answer.
    """
    site = _behind(profile, _live_before(paths, judging, tell), "afterany")
    return _submit_later(paths, judging, "conclude", site, tell)


def _submit_later(
    paths: RunPaths, plan: Dealt, stage: str, site: ClusterProfile, tell: Tell
) -> Job:
    task = ArrayTask(stage, str(paths.root.absolute()), (), plan.digest, checkout.code())
    (job,) = submit_array(paths, [task], site, tell)
    return job


def _behind(profile: ClusterProfile, arrays: Sequence[str], kind: str) -> ClusterProfile:
    if not arrays or profile.executor == "local":
        return profile
    # Without the second option, a stage behind one that failed waits for ever.
    options = {"dependency": f"{kind}:{':'.join(arrays)}", "kill-on-invalid-dep": "yes"}
    return profile.model_copy(update={"sbatch": {**profile.sbatch, **options}})


def _live_before(paths: RunPaths, plan: Dealt, tell: Tell) -> list[str]:
    """Name the arrays and jobs to wait for; stages that wait themselves are taken back.

    Jobs that have nothing left to do are not waited for, as they may be held.
    """
    before: list[str] = []
    left = set(missing(paths, plan))
    for submission, jobs in live_each(paths, read_journal(paths)):
        if not jobs or submission.executor == "local":
            continue
        if unreachable(jobs):
            raise SdwnError("SLURM does not answer; run the same command again when it does")
        job, state = next(iter(jobs.items()))
        if submission.stage in LATER and state.state == PENDING:
            tell(f"{submission.stage}, which waited as job {job.id}, is queued anew")
            if denied := end(paths, submission, jobs):
                raise SdwnError(denied)
        elif submission.stage in LATER or any(left.intersection(job.indices) for job in jobs):
            before.append(job.id.partition("_")[0])
    return before


def states(paths: RunPaths, submissions: Sequence[Submission], live: Live) -> dict[str, str]:
    """Describe how each later stage stands that was submitted or is to be."""
    cancelled, jobs = cancelled_jobs(submissions), last_stages(submissions)
    wanted = noted_later(paths)
    return {
        stage: _state(paths, stage, jobs[stage], live, jobs[stage] in cancelled)
        if stage in jobs
        else NOT_YET
        for stage in LATER
        if stage in jobs or stage in wanted
    }


def last_stages(submissions: Sequence[Submission]) -> dict[str, Job]:
    """Return the last job of each later stage that was submitted."""
    last = {one.stage: one.jobs[0] for one in submissions if one.stage in LATER and one.jobs}
    return {stage: last[stage] for stage in LATER if stage in last}


def unfinished_stages(paths: RunPaths, anew: bool) -> tuple[LaterStage, ...]:
    """List the later stages that were asked for and ended without success, or never began.

    With ``anew``, shards are submitted again: stages that wait now would start too early, and
    belong to them.
    """
    submissions = read_journal(paths)
    live, stages = live_of(paths, submissions), last_stages(submissions)
    found = states(paths, submissions, live)
    failed = {stage for stage in found if found[stage] != DONE and stages.get(stage) not in live}
    if failed or anew:
        failed |= {stage for stage, state in found.items() if state.startswith(WAITING)}
    return tuple(stage for stage in STAGES if stage in failed)


def stages_that(paths: RunPaths, state: str) -> dict[str, Job]:
    """Return the last job of each later stage that is in this state: FAILED, WAITING."""
    stages = last_stages(submissions := read_journal(paths))
    found = states(paths, submissions, live_of(paths, submissions)) if stages else {}
    return {stage: job for stage, job in stages.items() if found[stage].startswith(state)}


def _state(paths: RunPaths, stage: str, job: Job, live: Live, cancelled: bool) -> str:
    said = reason(paths, job) if job_logs(paths, job) else ""
    # What a log says holds without a controller.
    if succeeded(said):
        return DONE
    if job in live:
        state = live[job]
        why = f"({state.reason}) " * (state.reason not in ("", "None"))
        return f"{state.state.lower()} {why}as job {job.id}"
    if cancelled:
        return f"cancelled as job {job.id}"
    if not said:
        return f"never started: job {job.id} was cancelled, or the stage before it failed"
    return DONE if _merged_since(paths, stage, job) else FAILED + said


def _merged_since(paths: RunPaths, stage: str, job: Job) -> bool:
    """Return whether somebody merged the run by hand after the job had failed."""
    manifest = ReleasePaths(paths.release).manifest
    ended = max(log.stat().st_mtime for log in job_logs(paths, job))
    return stage == "merge" and manifest.exists() and manifest.stat().st_mtime > ended


def followed(paths: RunPaths, stages: Sequence[LaterStage]) -> set[Job]:
    """Return the last jobs of stages that wait or run: another command may queue them anew."""
    with alone(paths, quietly):
        last = last_stages(submissions := read_journal(paths))
    return {last[stage] for stage in stages if stage in last} & live_of(paths, submissions).keys()


def require_done(paths: RunPaths, stages: Sequence[LaterStage]) -> None:
    """Fail where a stage that was followed to its end did not succeed.

    Raises:
        SdwnError: with what ended it.
    """
    found = states(paths, read_journal(paths), {})
    for stage in stages:
        if found.get(stage) != DONE:
            again = command("retry", paths.root, "--wait")
            raise SdwnError(f"{stage} {found.get(stage, 'not submitted')}; go on with: {again}")


def merge_run(run: Path, _: Iterable[int]) -> None:
    """Merge a run into its own release."""
    from sdwn.releases.merge import merge, merged_summary

    paths = RunPaths(run)
    _say("merged", merged_summary(merge([paths], ReleasePaths(paths.release))))


def evaluate_run(run: Path, _: Iterable[int]) -> None:
    """Classify a run's own release as its config says."""
    from sdwn.evaluation.evaluate import evaluate
    from sdwn.releases.release import Release

    paths = RunPaths(run)
    config = read_plan(paths).config
    require_classifier(paths, config)
    _say("evaluated", evaluate(Release(paths.release), config.evaluation))


def report_run(run: Path, _: Iterable[int]) -> None:
    """Write the report of a run's own release."""
    from sdwn.releases.release import Release
    from sdwn.reports.report import write_report

    log.info("report: %s", write_report(Release(RunPaths(run).release), None))


def _say(what: str, found: dict[str, Any]) -> None:
    log.info("%s: %s", what, json.dumps(found))
