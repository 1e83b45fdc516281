"""The commands that start a run's tasks, or end them: submit, retry, cancel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from sdwn.cli import console
from sdwn.cli.folders import open_run
from sdwn.cli.options import (
    AsJson,
    Force,
    Profile,
    Retries,
    Run,
    Then,
    Wait,
    open_profile,
    with_site,
)
from sdwn.errors import counted

if TYPE_CHECKING:
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Plan


@with_site
def submit_command(
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    dry_run: Annotated[bool, Option("--dry-run", help="Print the script, submit nothing.")] = False,
    wait: Wait = False,
    retries: Retries = 2,
    then: Then = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Start array tasks for the unfinished shards.

    On this machine or under SLURM, as the profile says.
    """
    from sdwn.jobs.journal import open_journal
    from sdwn.jobs.submit import require_fit
    from sdwn.workflow.following import SubmitOptions
    from sdwn.workflow.later_stages import parse_stages
    from sdwn.workflow.submitting import shards_to_submit, submit_run

    options = SubmitOptions(wait, retries, parse_stages(then) if then is not None else (), force)
    paths, plan = open_run(run)
    chosen = open_profile(profile, site)
    require_fit(plan.config, chosen)
    if dry_run:
        todo = shards_to_submit(paths, plan, open_journal(paths), console.say)
        show_script(paths, plan, todo, chosen, as_json)
    else:
        console.result(submit_run(paths, plan, chosen, options, console), as_json)


def show_script(
    paths: RunPaths, plan: Plan, todo: list[int], profile: ClusterProfile, as_json: bool
) -> None:
    """Print the script that would be submitted, and on stderr what it would take."""
    from sdwn.jobs import cluster
    from sdwn.jobs.scheduler import max_array_size
    from sdwn.preflight.estimate import arrays_line, estimate, estimate_rows

    tasks: Sequence[tuple[int, ...]] = cluster.group_into_tasks(todo, profile)
    arrays, script = [(tasks, len(tasks))], ""
    if profile.executor == "slurm":
        now = tasks[: profile.max_submit_jobs]
        arrays = cluster.split_into_arrays(now, max_array_size(), profile.array_parallelism)
    if todo:
        first, at_once = arrays[0]
        own = profile.model_copy(update={"array_parallelism": at_once})
        script = cluster.job_script(len(first), paths.jobs, own)
    takes = estimate(paths, plan, todo, profile)
    if todo and not as_json:
        console.say_rows(estimate_rows(takes))
        if len(arrays) > 1 or len(arrays[0][0]) < len(tasks):
            console.say(arrays_line(arrays, len(tasks)))
    found = {"submitted": 0, "shards": len(todo), "job_ids": [], "script": script}
    found["arrays"] = [len(part) for part, _ in arrays]
    found["estimate"] = takes.as_dict()
    console.result(found, as_json, script or "# nothing to submit\n")


@with_site
def retry_command(
    run: Run,
    site: dict[str, str],
    wait: Wait = False,
    retries: Retries = 2,
    then: Then = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Submit failed and missing shards again.

    Under the profile of the last submission. Stages that were queued behind the shards and did
    not succeed are queued again too.
    """
    from sdwn.jobs.submit import last_profile, require_fit
    from sdwn.workflow.following import SubmitOptions
    from sdwn.workflow.later_stages import parse_stages
    from sdwn.workflow.submitting import submit_run

    stages = parse_stages(then) if then is not None else ()
    options = SubmitOptions(wait, retries, stages, force, resume=then is None)
    paths, plan = open_run(run)
    chosen = last_profile(paths, site)
    require_fit(plan.config, chosen)
    console.result(submit_run(paths, plan, chosen, options, console), as_json)


def cancel_command(run: Run, as_json: AsJson = False) -> None:
    """End the run's waiting and running tasks.

    What they have finished stays.
    """
    from sdwn.jobs.submit import cancel_run
    from sdwn.paths import RunPaths

    paths = RunPaths(run)
    if not paths.submissions.exists():
        open_run(run)  # no run at all is an error
    states = {job.id: state.state for job, state in cancel_run(paths, console.say).items()}
    # What was ending anyway is not cancelled.
    ids = [job for job, state in states.items() if state != "COMPLETING"]
    waiting = sum(states[job] == "PENDING" for job in ids)
    counts = {"cancelled": len(ids), "running": len(ids) - waiting, "waiting": waiting}
    text = "nothing to cancel: no task of this run waits or runs"
    if ids:
        ended = counted(len(ids), "task")
        text = f"cancelled {ended}: {counts['running']:,} ran, {waiting:,} waited"
    console.result({**counts, "job_ids": ids}, as_json, f"{text}\n")
