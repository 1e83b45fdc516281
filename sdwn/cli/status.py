"""The commands that show a run's state: status, logs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from sdwn.cli import console
from sdwn.cli.folders import open_sharded
from sdwn.cli.options import AsJson, Run
from sdwn.errors import counted, duration

if TYPE_CHECKING:
    from sdwn.workflow.status import RunStatus

# Each look asks the scheduler, which all users share.
WATCH_SECONDS = 10
# Whoever waits for the shards submits the next stage by then.
PATIENCE_SECONDS = 60
# Names on screen for keys of ``--json``.
LABELS = {
    "images_per_second": "images/s",
    "jobs_live": "live jobs",
    "lowered": "smaller batches",
    "then": "later stages",
    "waited": "waited for a disk",
}


def status_command(
    run: Run,
    watch: Annotated[bool, Option("--watch", help="Update while tasks are live.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is done, running, pending and failed."""
    from sdwn.jobs.journal import open_journal
    from sdwn.jobs.submit import replaced_plan
    from sdwn.workflow.following import report_damage
    from sdwn.workflow.status import DONE, NOT_YET, run_status

    paths, plan = open_sharded(run)
    journal = open_journal(paths)
    report_damage(paths, journal, console.say)
    if replaced := replaced_plan(paths, journal.submissions, plan):
        console.say(f"{replaced}; the shards below may be of the other plan")
    if watch and not as_json:
        with console.live() as show:
            idle = 0
            while (now := run_status(paths, plan)).jobs_live or (
                now.shards_done == now.shards_total
                and [one for one in now.then.values() if one != DONE][:1] == [NOT_YET]
                and idle < PATIENCE_SECONDS
            ):
                show(status_rows(now))
                time.sleep(WATCH_SECONDS)
                idle = 0 if now.jobs_live else idle + WATCH_SECONDS
    found = run_status(paths, plan, None if watch else journal)
    console.result(found.as_dict(), as_json, console.rows(status_rows(found)))


def status_rows(found: RunStatus) -> dict[str, Any]:
    """Return a run's status as rows, empty ones left out."""
    gpus = [
        f"{counted(one.processes, 'process', 'es')} on {name}: "
        f"{one.images_per_second:.3g} images/s"
        + (f", the last ends in {duration(one.seconds_left)}" if one.seconds_left else "")
        for name, one in found.gpus.items()
    ]
    then = [f"{stage}: {state}" for stage, state in found.then.items()]
    rows = {**found.as_dict(), "gpus": gpus, "then": then}
    left = rows.pop("seconds_left")
    # A terminal of 24 lines shows all of it.
    rows = {LABELS.get(name, name): one for name, one in rows.items() if one not in ([], {})}
    if found.shards_running:
        rows["time_left"] = "not known yet" if left is None else duration(left)
    return rows


def logs_command(
    run: Run,
    shard: Annotated[int | None, Option(help="A shard; default: all that failed.")] = None,
    lines: Annotated[int, Option(min=1, help="Lines of each log, from its end.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the end of the logs of what failed."""
    from sdwn.jobs.journal import failed_shards, last_jobs, live_jobs, open_journal
    from sdwn.jobs.logs import tails
    from sdwn.workflow.status import FAILED, stage_states

    paths, plan = open_sharded(run)
    if shard is not None and not 0 <= shard < len(plan.shards):
        raise typer.BadParameter(f"no shard {shard}; the plan has 0 to {len(plan.shards) - 1}")
    journal = open_journal(paths)
    last = last_jobs(journal.submissions)
    if shard is not None:
        jobs = [last[shard]] if shard in last else []
    else:
        live = live_jobs(paths, journal.submissions)
        failed = failed_shards(paths, plan, journal.submissions, live)
        jobs = [last[index] for index in failed if index in last]
        stages = stage_states(paths, journal, live).values()
        jobs += [one.job for one in stages if one.job and one.text.startswith(FAILED)]
    found = tails(paths, jobs, lines)
    text = "".join(f"==> {path} <==\n{tail}\n" for path, tail in found.items())
    nothing = "no logs yet\n" if jobs else "nothing has failed; see a shard's with --shard N\n"
    console.result({"logs": found}, as_json, text or nothing)
