"""Submission of a run: checks, shards, the stages behind them, and waiting for all.

::

    unfinished shards ─▶ checks (stages possible, weights locked, doctor) ─▶ arrays
                                                                               │
                     merge, evaluate, report: each behind the one before ◀─────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdwn.errors import QueueFullError, SdwnError, UsageError, command
from sdwn.io import OnMessage
from sdwn.jobs.journal import Journal, live_jobs, note_later, open_journal, unheld_shards
from sdwn.jobs.profile import ClusterProfile, LaterStage
from sdwn.jobs.scheduler import Job
from sdwn.jobs.submit import (
    WorkOrder,
    changed_code,
    follow,
    replaced_plan,
    require_visible,
    submission_lock,
    submit_once,
)
from sdwn.models.lock import ensure_lock
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan
from sdwn.preflight.doctor import check_run
from sdwn.preflight.estimate import estimate, submitting_lines
from sdwn.preflight.findings import Finding
from sdwn.preflight.prefetch import lock_found_classifier
from sdwn.workflow import later_stages
from sdwn.workflow.following import (
    Display,
    SubmitOptions,
    follow_to_end,
    leaving_advice,
    queue_watch,
    report_damage,
)
from sdwn.workflow.status import waiting_stages


def submit_run(
    paths: RunPaths,
    plan: Plan,
    profile: ClusterProfile,
    options: SubmitOptions,
    display: Display,
) -> dict[str, Any]:
    """Submit what is unfinished, and the stages behind it; follow all to the end if wanted.

    Returns:
        Counts and ids of what was submitted, as ``--json`` prints them.

    Raises:
        UsageError: a stage behind the shards lacks what it works on.
        SdwnError: something would stop the run, or shards or a stage failed.
    """
    say = display.say
    journal = open_journal(paths)
    todo = shards_to_submit(paths, plan, journal, say)
    if options.resume:
        then = _stages_to_resume(paths, profile, bool(todo), options.wait, say)
        options = replace(options, then=then)
    if options.then:
        later_stages.require_chain(paths, plan, options.then, profile, options.wait)
        note_later(paths, options.then)
    if todo:
        ensure_lock(paths, plan)
    evaluated = "evaluate" in options.then
    if not options.force:
        require_visible(paths, journal.submissions, todo)
        findings = check_run(paths, plan, profile, options.then) if todo or evaluated else []
        # Where nothing is left to make, only what would stop the evaluation counts.
        _refuse_problems([one for one in findings if todo or one.subject == "classifier"], say)
    if evaluated:
        lock_found_classifier(paths, plan.config)
    if todo:
        say("\n".join(submitting_lines(estimate(paths, plan, todo, profile))))
    elif not (options.then or options.command):
        say(_nothing_to_submit(paths, plan))
    order, remaining = WorkOrder(paths, plan, later_stages.RUN_STAGES, profile), 0
    if options.wait:
        jobs = follow_to_end(order, options, display)
    else:
        jobs, remaining = submit_once(order, say)
    found: dict[str, Any] = {
        "submitted": len(jobs),
        "shards": len({index for job in jobs for index in job.indices}),
        "remaining": remaining,
        "job_ids": [job.id for job in jobs],
    }
    if options.then and remaining:
        say(f"{', '.join(options.then)} would start too early and is not submitted")
    elif options.then:
        found["then"] = _submit_stages(paths, plan, profile, options, display)
    elif jobs and not (remaining or options.wait) and (early := waiting_stages(paths)):
        named = ", ".join(f"{stage} (job {job.id})" for stage, job in early.items())
        again = command("retry", paths.root, "--then", ",".join(early))
        say(f"{named} will start too early, without these tasks; to change that: {again}")
    return found


def shards_to_submit(paths: RunPaths, plan: Plan, journal: Journal, say: OnMessage) -> list[int]:
    """List the shards to submit; report other code than at the last submission, and lost lines.

    Raises:
        UsageError: jobs of this folder were submitted for another plan.
    """
    if replaced := replaced_plan(paths, journal.submissions, plan):
        raise UsageError(replaced)
    if changed := changed_code(journal.submissions):
        say(changed)
    report_damage(paths, journal, say)
    return unheld_shards(paths, plan, live_jobs(paths, journal.submissions))


def _stages_to_resume(
    paths: RunPaths, profile: ClusterProfile, anew: bool, wait: bool, say: OnMessage
) -> tuple[LaterStage, ...]:
    """List the later stages to submit again; say so, or what is needed for it."""
    stages = later_stages.unfinished_stages(paths, anew)
    if stages and profile.executor == "local" and not wait:
        retry = command("retry", paths.root, "--wait")
        say(f"not done yet: {', '.join(stages)}; resume with: {retry}")
        return ()
    if stages:
        say(f"queued again behind the shards: {', '.join(stages)}")
    return stages


def _refuse_problems(findings: Sequence[Finding], say: OnMessage) -> None:
    """Report the doctor's warnings, and refuse a run that something would stop.

    Raises:
        SdwnError: with every problem, a line each.
    """
    for finding in findings:
        if finding.verdict == "warning":
            say(f"warning: {finding.subject}: {finding.text}")
    # A controller that does not answer is waited for.
    stopping = [one for one in findings if one.verdict == "problem" and one.subject != "slurm"]
    if stopping:
        lines = [f"{finding.subject}: {finding.text}" for finding in stopping]
        raise SdwnError("\n".join([*lines, "submit all the same with: --force"]))


def _nothing_to_submit(paths: RunPaths, plan: Plan) -> str:
    """Return why nothing is submitted: all shards are finished, or jobs are making the rest."""
    if left := {shard.index for shard in plan.assigned_shards} - plan.done(paths):
        why = f"jobs that wait or run are making the last {len(left):,} shards"
        return f"nothing to submit: {why}; see: {command('status', paths.root)}"
    merge = command("merge", paths.root, "--release", "RELEASE")
    why = f"all {len(plan.assigned_shards):,} shards are finished"
    return f"nothing to submit: {why}; merge them with: {merge}"


def _submit_stages(
    paths: RunPaths,
    plan: Plan,
    profile: ClusterProfile,
    options: SubmitOptions,
    display: Display,
) -> dict[str, str]:
    """Submit the later stages, follow them to the end if wanted; return their job ids."""
    stages, jobs = options.then, dict[str, Job]()
    # One process of this machine does not wait for another.
    parts = [stages] if profile.executor == "slurm" else [(stage,) for stage in stages]
    try:
        with display.working(", ".join(stages) if options.wait else "submitting"):
            for part in parts:
                with submission_lock(paths, display.say):
                    jobs |= later_stages.submit_chain(paths, plan, part, profile, display.say)
                if options.wait:
                    while left := later_stages.followed(paths, part):
                        follow(paths, queue_watch(display.say), left)
                    later_stages.require_done(paths, part)
    except QueueFullError as error:
        again = options.resume_command(paths)
        display.say(f"{error}; queue the later stages when there is room, with: {again}")
    except KeyboardInterrupt:
        rest = f"queue the rest with: {options.resume_command(paths)}"
        advice = leaving_advice(paths)
        display.say(f"{advice}; {rest}" if advice else rest)
        raise
    return {stage: job.id for stage, job in jobs.items()}
