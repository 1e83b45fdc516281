"""The commands that make a run go on, or end it: submit, retry, cancel."""

from __future__ import annotations

import typer

from sdwn.cli import steps_submitting as submitting
from sdwn.cli import terminal
from sdwn.cli.options import (
    AsJson,
    DryRun,
    Force,
    Profile,
    Retries,
    Run,
    Then,
    Wait,
    with_site,
)
from sdwn.cli.steps_opening import open_profile, open_run

commands = typer.Typer()


@commands.command()
@with_site
def submit(
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    dry_run: DryRun = False,
    wait: Wait = False,
    retries: Retries = 2,
    then: Then = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Start array tasks for the unfinished shards, on this machine or under SLURM."""
    from sdwn.jobs import submit as submission

    options = submitting.submit_options(wait, retries, then, force)
    paths, made = open_run(run)
    chosen = open_profile(profile, site)
    submission.require_fit(made.config, chosen)
    if dry_run:
        submitting.show_script(
            paths, made, submitting.unfinished_shards(paths, made), chosen, as_json
        )
        return
    terminal.result(submitting.submit_run(paths, made, chosen, options), as_json)


@commands.command()
@with_site
def retry(
    run: Run,
    site: dict[str, str],
    wait: Wait = False,
    retries: Retries = 2,
    then: Then = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Submit what failed or is missing again, stages behind it too, under the last profile."""
    from sdwn.jobs import submit as submission

    options = submitting.submit_options(wait, retries, then, force, resume=then is None)
    paths, made = open_run(run)
    chosen = submission.last_profile(paths, site)
    submission.require_fit(made.config, chosen)
    terminal.result(submitting.submit_run(paths, made, chosen, options), as_json)


@commands.command()
def cancel(run: Run, as_json: AsJson = False) -> None:
    """End the run's waiting and running tasks; what they have finished stays."""
    from sdwn.jobs.submit import cancel as cancel_jobs
    from sdwn.paths import RunPaths

    paths = RunPaths(run)
    if not paths.submissions.exists():
        open_run(run)  # no run at all is an error
    states = {job.id: state.state for job, state in cancel_jobs(paths, terminal.say).items()}
    # What was ending anyway is not cancelled.
    ids = [job for job, state in states.items() if state != "COMPLETING"]
    waiting = sum(states[job] == "PENDING" for job in ids)
    counts = {"cancelled": len(ids), "running": len(ids) - waiting, "waiting": waiting}
    told = f"cancelled {len(ids):,} tasks: {len(ids) - waiting:,} ran, {waiting:,} waited"
    nothing = "nothing to cancel: no task of this run waits or runs"
    found = {**counts, "job_ids": ids}
    terminal.result(found, as_json, text=f"{told if ids else nothing}\n")
