"""The commands that say how a run stands: status, logs."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sdwn.cli import terminal, texts
from sdwn.cli.options import AsJson, Run
from sdwn.cli.steps_opening import open_dealt
from sdwn.cli.steps_submitting import say_unreadable

# Each look asks the scheduler, which all users share.
WATCH_SECONDS = 10
# Whoever waits for the shards submits the next stage by then.
PATIENCE_SECONDS = 60

commands = typer.Typer()


@commands.command()
def status(
    run: Run,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again while tasks are live.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is done, running, pending and failed."""
    from sdwn.jobs.submit import replaced_plan
    from sdwn.workflow.later_stages import DONE, NOT_YET
    from sdwn.workflow.status import run_status

    paths, made = open_dealt(run)
    say_unreadable(paths)
    if replaced := replaced_plan(paths, made):
        terminal.say(f"{replaced}; the shards below may be of the other plan")
    if watch and not as_json:
        with terminal.live() as show:
            idle = 0
            while (now := run_status(paths, made)).jobs_live or (
                now.shards_done == now.shards_total
                and [one for one in now.then.values() if one != DONE][:1] == [NOT_YET]
                and idle < PATIENCE_SECONDS
            ):
                show(texts.status_rows(now))
                time.sleep(WATCH_SECONDS)
                idle = 0 if now.jobs_live else idle + WATCH_SECONDS
    found = run_status(paths, made)
    terminal.result(found.as_dict(), as_json, terminal.values_text(texts.status_rows(found)))


@commands.command()
def logs(
    run: Run,
    shard: Annotated[
        int | None, typer.Option(help="Of this shard; default: of all that failed.")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines of each log, from its end.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the end of the logs of what failed: tasks that made shards, and later stages."""
    from sdwn.jobs.journal import last_jobs, read_journal
    from sdwn.jobs.live import failed
    from sdwn.jobs.logs import tails
    from sdwn.workflow.later_stages import FAILED, stages_that

    paths, made = open_dealt(run)
    if shard is not None and not 0 <= shard < len(made.shards):
        raise typer.BadParameter(f"no shard {shard}; the plan has 0 to {len(made.shards) - 1}")
    indices = [shard] if shard is not None else failed(paths, made)
    last = last_jobs(read_journal(paths))
    jobs = [last[index] for index in indices if index in last]
    if shard is None:
        jobs += stages_that(paths, FAILED).values()
    found = tails(paths, jobs, lines)
    text = "".join(f"==> {path} <==\n{tail}\n" for path, tail in found.items())
    nothing = "no logs yet\n" if jobs else "nothing has failed; see a shard's with --shard N\n"
    terminal.result({"logs": found}, as_json, text=text or nothing)
