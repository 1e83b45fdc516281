"""The commands that make a run's images, or those of all cells of a sweep."""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live as Redrawn
from rich.table import Table
from rich.text import Text
from typer import Option

from sdwn.cli import console, options
from sdwn.cli.console import Result
from sdwn.cli.release import merge_runs
from sdwn.cli.results import compare_sweep
from sdwn.errors import SdwnError, UsageError, command, counted, duration, plain_message
from sdwn.paths import RunPaths, shipped_file

if TYPE_CHECKING:
    from sdwn.jobs.journal import Journal
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.planning.plan import Plan
    from sdwn.workflow.status import RunStatus
    from sdwn.workflow.submitting import SubmitOptions

# Each look asks the scheduler, which all users share.
WATCH_SECONDS = 10
# Whoever waits for the shards submits the next stage by then.
PATIENCE_SECONDS = 60
# A sweep's next command is that of the cell that is least far.
STEPS = "prefetch pilot submit logs retry status merge evaluate compare".split()


def submit_command(
    run: options.Run,
    site: dict[str, str],
    profile: options.Profile = "local",
    wait: options.Wait = False,
    then: options.Then = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the script, submit nothing.")] = False,
    retries: options.Retries = 2,
    force: options.Force = False,
) -> Result:
    """Start array tasks for the unfinished shards.

    On this machine or under SLURM, as the profile says.
    """
    from sdwn.workflow.submitting import SubmitOptions, parse_stages

    how = SubmitOptions(wait, retries, parse_stages(then), force, resume=wait and then is None)
    paths, plan = options.open_run(run)
    chosen = options.open_profile(profile, site, plan.config)
    return _script(paths, plan, chosen) if dry_run else _submit(paths, plan, chosen, how)


def retry_command(
    run: options.Run,
    site: dict[str, str],
    wait: options.Wait = False,
    then: options.Then = None,
    retries: options.Retries = 2,
    force: options.Force = False,
) -> Result:
    """Submit failed and missing shards again.

    Under the profile of the last submission. Stages that were queued behind the shards and did
    not succeed are queued again too.
    """
    from sdwn.jobs.journal import last_profile
    from sdwn.workflow.submitting import SubmitOptions, parse_stages

    how = SubmitOptions(wait, retries, parse_stages(then), force, resume=then is None)
    paths, plan = options.open_run(run)
    profile = last_profile(paths, site)
    profile.require_fit(plan.config)
    return _submit(paths, plan, profile, how)


def _submit(paths: RunPaths, plan: Plan, profile: ClusterProfile, how: SubmitOptions) -> Result:
    from sdwn.workflow.status import next_command, run_status
    from sdwn.workflow.submitting import submit_run

    found, lines = submit_run(paths, plan, profile, how, console), []
    if how.wait:
        images = counted(plan.assigned_images, "image")
        lines.append(f"finished: {counted(len(plan.assigned_shards), 'shard')}, {images}")
    elif found["job_ids"]:
        tasks, shards = counted(found["submitted"], "task"), counted(found["shards"], "shard")
        lines.append(f"submitted {tasks} for {shards}: {console.job_names(found['job_ids'])}")
    for stage, job in found.get("then", {}).items():
        lines.append(f"{stage}: {'done' if how.wait else 'queued'} as job {job}")
    return Result(found, *lines, next_=next_command(paths, plan, run_status(paths, plan)))


def _script(paths: RunPaths, plan: Plan, profile: ClusterProfile) -> Result:
    """Return the script that would be submitted; print on stderr what it would take."""
    from sdwn.jobs.journal import open_journal
    from sdwn.jobs.profile import group_into_tasks, job_script, split_into_arrays
    from sdwn.jobs.scheduler import max_array_size
    from sdwn.preflight.estimate import estimate, estimate_rows
    from sdwn.workflow.submitting import shards_to_submit

    todo = shards_to_submit(paths, plan, open_journal(paths), console.say)
    tasks: Sequence[tuple[int, ...]] = group_into_tasks(todo, profile)
    arrays, script = [(tasks, len(tasks))], ""
    if profile.executor == "slurm":
        now = tasks[: profile.max_submit_jobs]
        arrays = split_into_arrays(now, max_array_size(), profile.array_parallelism)
    takes = estimate(paths, plan, todo, profile)
    if todo:
        first, at_once = arrays[0]
        own = profile.model_copy(update={"array_parallelism": at_once})
        script = job_script(len(first), paths.jobs, own)
        console.show(console.columns(estimate_rows(takes).items()), console.stderr)
        if len(first) < len(tasks):
            each = [f"{len(part):,} tasks, {at_once:,} at once" for part, at_once in arrays]
            later = len(tasks) - sum(len(part) for part, _ in arrays)
            each += [f"{later:,} later"] * (later > 0)
            console.say(f"arrays, the script is of the first: {'; '.join(each)}")
    found = {"submitted": 0, "shards": len(todo), "job_ids": [], "script": script}
    found |= {"arrays": [len(part) for part, _ in arrays], "estimate": takes.as_dict()}
    return Result(found, script or "# nothing to submit")


def cancel_command(run: options.Run) -> Result:
    """End the run's waiting and running tasks.

    What they have finished stays.
    """
    from sdwn.jobs.submit import cancel_run
    from sdwn.workflow.status import retry_step

    paths = RunPaths(run)
    if not paths.submissions.exists():
        options.open_run(run)  # no run at all is an error
    states = {job.id: state.state for job, state in cancel_run(paths, console.say).items()}
    # What was ending anyway is not cancelled.
    ids = [job for job, state in states.items() if state != "COMPLETING"]
    waiting = sum(states[job] == "PENDING" for job in ids)
    running = len(ids) - waiting
    values = {"cancelled": len(ids), "running": running, "waiting": waiting, "job_ids": ids}
    if not ids:
        return Result(values, "nothing to cancel: no task of this run waits or runs")
    text = f"cancelled {counted(len(ids), 'task')}: {running:,} ran, {waiting:,} waited"
    step = retry_step(*options.open_sharded(run)) if paths.plan.exists() else None
    return Result(values, text, next_=step)


def status_command(
    run: options.Run,
    watch: Annotated[bool, Option("--watch", help="Redraw until the last stage ends.")] = False,
    as_json: options.AsJson = False,
) -> Result:
    """Show how a run stands, and the next command."""
    from sdwn.jobs.journal import open_journal, report_damage
    from sdwn.jobs.submit import replaced_plan
    from sdwn.workflow.status import next_command, run_status

    sweep, journal = options.kind_of(run) == "sweep", None
    if not sweep:
        paths, work = options.open_sharded(run)
        journal = open_journal(paths)
        report_damage(paths, journal, console.say)
        if replaced := replaced_plan(paths, journal.submissions, work):
            console.say(f"{replaced}; the shards below may be of the other plan")

    def look(journal: Journal | None = None) -> tuple[Table, str, dict[str, RunStatus]]:
        if sweep:
            return look_at_cells(run)
        now = run_status(paths, work, journal)
        return status_table(now), next_command(paths, work, now), {"": now}

    table, step, found = look(journal)
    if watch and not as_json:
        idle, printed = 0.0, -float(console.REPORT_SECONDS)
        with Redrawn(console=console.stdout, transient=True, auto_refresh=False) as view:
            while any(_goes_on(now, idle) for now in found.values()):
                if console.stdout.is_terminal:
                    view.update(table, refresh=True)
                elif time.monotonic() - printed >= console.REPORT_SECONDS:
                    console.show(headline(found.values()))
                    sys.stdout.flush()
                    printed = time.monotonic()
                time.sleep(WATCH_SECONDS)
                live = any(now.jobs_live for now in found.values())
                idle = 0 if live else idle + WATCH_SECONDS
                table, step, found = look()
    shown = {name: asdict(now) for name, now in found.items()}
    return Result(shown if sweep else shown[""], table, next_=step)


def _goes_on(now: RunStatus, idle: float) -> bool:
    """Return whether jobs live, or whoever waits for the shards is about to submit a stage."""
    from sdwn.workflow.status import DONE, NOT_YET

    waits = [one for one in now.then.values() if one != DONE][:1] == [NOT_YET]
    made = now.shards_done == now.shards_total
    return bool(now.jobs_live) or (made and waits and idle < PATIENCE_SECONDS)


def headline(found: Collection[RunStatus]) -> str:
    """Return the status of a run, or of all cells of a sweep, in one line."""
    done, total = sum(now.images_done for now in found), sum(now.images_total for now in found)
    speed = sum(now.images_per_second for now in found)
    left = (total - done) / speed if speed and any(now.shards_running for now in found) else None
    return console.progress_text(done, total, "images", speed, left)


def status_table(found: RunStatus) -> Table:
    """Return a run's status: one line, then only what there is."""
    from sdwn.jobs.scheduler import reason_in_words
    from sdwn.workflow.status import shard_states

    done = f"{found.shards_done:,} of {found.shards_total:,} done"
    reasons = found.pending_reasons.items()
    waits = [f"{counted(number, 'job')}: {reason_in_words(reason)}" for reason, number in reasons]
    gpus = [
        f"{counted(one.processes, 'process', 'es')} on {name}: "
        + (f"{one.images_per_second:.3g} images/s" if one.images_per_second else "no batch yet")
        + (f", the last ends in {duration(one.seconds_left)}" if one.seconds_left else "")
        for name, one in found.gpus.items()
    ]
    rows: dict[str, Any] = {
        "shards": ", ".join(filter(None, [done, shard_states(found)])),
        "why jobs wait": [*waits, *found.cannot_start],
        "devices": gpus,
        "failures": found.failures,
        "smaller batches": found.lowered,
        "without gpu": found.without_gpu,
        "waited for a disk": found.waited,
        "code has changed": found.changed_code,
        "restarts": found.restarts and f"{counted(found.restarts, 'task')} were requeued",
        "later stages": [f"{stage}: {state}" for stage, state in found.then.items()],
        # Of interest where somebody else did, or may have.
        "submitted by": found.submitted_by if len(found.submitted_by) > 1 else [],
    }
    table = Table.grid()
    table.add_row(headline([found]))
    table.add_row(console.columns((name, value) for name, value in rows.items() if value))
    return table


def logs_command(
    run: options.Run,
    shard: Annotated[int | None, Option(help="A shard; default: all that failed.")] = None,
    lines: Annotated[int, Option(min=1, help="Lines of each log, from its end.")] = 20,
) -> Result:
    """Show the end of the logs of what failed."""
    from sdwn.jobs import journal
    from sdwn.workflow.status import FAILED, retry_step, stage_states

    paths, work = options.open_sharded(run)
    if shard is not None and not 0 <= shard < len(work.shards):
        raise typer.BadParameter(f"no shard {shard}; the plan has 0 to {len(work.shards) - 1}")
    record = journal.open_journal(paths)
    last = journal.last_jobs(record.submissions)
    if shard is not None:
        jobs = [last[shard]] if shard in last else []
    else:
        live = journal.live_jobs(paths, record.submissions)
        cancelled = journal.cancelled_jobs(record.submissions)
        ended = [last.get(index) for index in journal.unheld_shards(paths, work, live)]
        jobs = [job for job in ended if job and job not in cancelled]
        stages = stage_states(paths, record, live).values()
        jobs += [one.job for one in stages if one.job and one.text.startswith(FAILED)]
    found = {
        str(log): "\n".join(journal.log_lines(log)[-lines:])
        for job in dict.fromkeys(jobs)
        for log in journal.job_logs(paths, job)
    }
    text = "".join(f"==> {path} <==\n{tail}\n" for path, tail in found.items())
    nothing = "no logs yet" if jobs else "nothing has failed; see a shard's with --shard N"
    step = retry_step(paths, work) if jobs and shard is None else None
    return Result({"logs": found}, text or nothing, next_=step)


def run_command(
    config: options.Config,
    run: options.Run,
    site: dict[str, str],
    profile: options.Profile = "local",
    set_: options.Override = None,
    retries: options.Retries = 2,
    as_json: options.AsJson = False,
) -> Result:
    """Plan, submit, merge, evaluate and report a run.

    The release lies in the run's folder. The same command resumes: it does only what is missing.
    A sweep's file in the config's place does so with each cell, and compares them.
    """
    from sdwn.config import read_yaml
    from sdwn.workflow.plans import plan_run, plan_sweep

    file = shipped_file("config", config)
    if "base" not in read_yaml(file):
        if options.kind_of(run) == "sweep":
            raise UsageError(f"{run} is a sweep, and {config} is no sweep's file")
        settings = options.open_config(config, set_)
        options.open_profile(profile, site, settings)
        plan_run(settings, run, console)
        return complete_run(run, site, profile, True, retries)
    plan_sweep(file, run, tuple(set_ or ()), console)
    given = {"run": run, "site": site, "profile": profile, "wait": True, "retries": retries}
    done = do_cells(complete_run, given, "run", as_json)
    if not done.failed:
        found = compare_sweep(run)
        console.say(f"{found['words']}\nthe sweep's page: {found['path']}")
    return done


def complete_run(run: Path, site: dict[str, str], profile: str, wait: bool, retries: int) -> Result:
    """Make what a planned run lacks; without ``wait`` its tasks are submitted, and no more."""
    from sdwn.preflight.prefetch import prefetch_classifier
    from sdwn.releases.merge import MergeOptions
    from sdwn.reports.report import write_report
    from sdwn.workflow.submitting import SubmitOptions, submit_run

    paths, plan = options.open_run(run)
    chosen = options.open_profile(profile, site, plan.config)
    if len(plan.done(paths)) < len(plan.assigned_shards):
        # An evaluation must not fail at the end for want of its classifier.
        with console.progress("looking for the classifier"):
            prefetch_classifier(paths, plan)
    # Only this command also merges, evaluates and reports.
    how = SubmitOptions(wait=wait, retries=retries, command="the same command")
    submitted = submit_run(paths, plan, chosen, how, console)
    if not wait:
        return Result(submitted)
    found, rows = merge_runs([run], paths.release, MergeOptions(), plan.config.evaluation)
    with console.progress("writing the report"):
        report = write_report(options.open_release(paths.release), found["evaluation"])
    found["report"] = rows["report"] = str(report)
    return Result(found, rows, next_=command("browse", paths.release))


# --- All cells of a sweep ------------------------------------------------------------------------
def look_at_cells(folder: Path) -> tuple[Table, str, dict[str, RunStatus]]:
    """Return a table of a sweep's cells, the next command of all, and the status of each."""
    from sdwn.workflow.status import next_command, run_status, shard_states

    found: dict[str, RunStatus] = {}
    lines = [[Text(head, "bold") for head in ("cell", "images", "state", "next")]]
    steps: list[list[str]] = []
    for name, cell in options.run_folders(folder).items():
        paths, plan = options.open_run(cell)
        now = found[name] = run_status(paths, plan)
        _, step, _, *words = shlex.split(next_command(paths, plan, now))
        step = "compare" if step in ("report", "browse") else step
        # The name of the cell's release is no option of the sweep's.
        steps.append([step, *words * (step not in ("merge", "compare"))])
        stages = [f"{stage}: {state}" for stage, state in now.then.items()]
        shards = [f"shards: {text}"] if (text := shard_states(now)) else []
        state = "; ".join([*shards, *stages]) or "all images made"
        images = f"{now.images_done:,} of {now.images_total:,}"
        lines.append([Text(name), Text(images), Text(state), Text(step)])
    step, *words = min(steps, key=lambda words: STEPS.index(words[0]))
    return console.columns(lines), command(step, folder, *words), found


def do_cells(
    function: Callable[..., Any], arguments: dict[str, Any], first: str, as_json: bool
) -> Result:
    """Do all cells of the sweep that the ``first`` argument names, each by a command's function."""
    given = arguments[first]
    several = isinstance(given, list)
    if several and (len(given) > 1 or arguments["release"]):
        raise UsageError("a sweep is merged alone, each cell into a release of its own")
    folder = Path(given[0] if several else given)
    cells, found = options.run_folders(folder), dict[str, dict[str, Any]]()
    passes = _passes(arguments, next(iter(cells.values())))
    for changes, (name, cell) in itertools.product(passes, cells.items()):
        before = found.get(name, {})
        if "error" in before:
            continue
        path = cell / "release" if first == "release" else cell
        try:
            answer = function(**{**arguments, **changes, first: [path] if several else path})
            error = {"error": "problems were found"} if answer.failed else {}
            if not as_json:
                # Each cell's next step is in the sweep's table.
                console.show(name)
                answer.show()
            # Of what the first pass has submitted the second submits nothing.
            found[name] = {**answer.values, **before, **error}
        except (SdwnError, OSError) as failed:  # the other cells go on
            found[name] = {**before, "error": plain_message(failed)}
            console.fail(f"{name}: {plain_message(failed)}")
    stopped = any("error" in one for one in found.values())
    if as_json:
        return Result(found, failed=stopped)
    table, step, _ = look_at_cells(folder)
    return Result(found, table, next_=step, failed=stopped)


def _passes(arguments: dict[str, Any], cell: Path) -> list[dict[str, Any]]:
    # With --wait under SLURM the tasks of all cells are submitted first; the second pass follows
    # them, and what was queued behind them.
    wait, name = arguments.get("wait"), arguments.get("profile", "")
    if wait is None or name is None or arguments.get("dry_run"):
        return [{}]
    from sdwn.jobs.journal import last_profile

    site = arguments["site"]
    profile = options.open_profile(name, site) if name else last_profile(RunPaths(cell), site)
    if profile.executor == "local" and not wait:
        raise UsageError("without --wait all cells would begin at once on this machine; add --wait")
    follow = {"then": None} if "then" in arguments else {}
    return [{"wait": False}, follow] if profile.executor == "slurm" and wait else [{}]
