"""The command that plans a sweep; how the others take a sweep's folder for all its cells."""

from __future__ import annotations

import functools
import inspect
import io
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument

from sdwn.cli import console, options
from sdwn.errors import SdwnError, UsageError, command
from sdwn.paths import RunPaths, shipped_file

if TYPE_CHECKING:
    from sdwn.cli.options import Cells
    from sdwn.workflow.status import RunStatus

Command = Callable[..., None]
# In the order of a run: the next command of a sweep is that of the cell that is least far.
STEPS = "prefetch pilot submit logs retry status merge evaluate compare".split()


def sweep_command(
    sweep: Annotated[
        str, Argument(metavar="SWEEP", help="A sweep's file, or a shipped one's name.")
    ],
    folder: options.SweepFolder,
    set_: options.Override = None,
    as_json: options.AsJson = False,
) -> None:
    """Plan runs of one config that differ in some settings.

    Each is a cell, a run in a folder of its own. The file with more values adds cells. Commands
    that take a run or its release take the sweep's folder too, and do all cells.
    """
    from sdwn.workflow.sweep import plan_sweep

    found = plan_sweep(shipped_file("sweep", sweep), folder, tuple(set_ or ()), console)
    table, step, statuses = look_at_cells(folder, options.open_cells(folder))
    images = sum(one.images_total for one in statuses.values())
    values = {"cells": [cell.model_dump() for cell in found.cells], "images": images}
    console.result(values, as_json, table, next_=step)


def look_at_cells(folder: Path, cells: Cells) -> tuple[Table, str, dict[str, RunStatus]]:
    """Look at each cell of a sweep.

    Returns:
        A table for people, the sweep's next command, and what was found, by cell.
    """
    from sdwn.workflow.status import next_command, run_status, shard_states

    lines = [[Text(head, "bold") for head in ("cell", "images", "state", "next")]]
    found: dict[str, RunStatus] = {}
    steps: list[list[str]] = []
    for name, (paths, work) in cells.items():
        now = found[name] = run_status(paths, work)
        _, step, _, *words = shlex.split(next_command(paths, work, now))
        step = "compare" if step in ("report", "browse") else step
        # The name of the cell's release is no option of the sweep's.
        steps.append([step, *words * (step not in ("merge", "compare"))])
        shards, stages = shard_states(now), [f"{name}: {text}" for name, text in now.then.items()]
        state = "; ".join([f"shards: {', '.join(shards)}"] * bool(shards) + stages) or "made"
        images = f"{now.images_done:,} of {now.images_total:,}"
        lines.append([Text(name), Text(images), Text(state), Text(step)])
    step, *words = min(steps, key=lambda step: STEPS.index(step[0]))
    return console.columns(lines), command(step, folder, *words), found


def each_cell(follow: Command | None = None) -> Callable[[Command], Command]:
    """Let a command take a sweep where it takes a run or a release: it does all cells in turn.

    A cell that fails does not stop the others. With ``--wait`` under SLURM the tasks of all cells
    are submitted first; then ``follow``, by default the command itself, waits for each.
    """

    def decorate(function: Command) -> Command:
        first = next(iter(inspect.signature(function).parameters))

        @functools.wraps(function)
        def wrapped(**arguments: Any) -> None:
            given = arguments[first]
            folders = given if isinstance(given, list) else [given]
            if "sweep" not in [options.kind_of(folder) for folder in folders]:
                function(**arguments)
                return
            if len(folders) > 1 or (first == "runs" and arguments["release"]):
                raise UsageError("a sweep is merged alone, each cell into a release of its own")
            cells = options.run_folders(folders[0])
            steps = _steps(function, follow, arguments, cells.values())
            found = _do_cells(steps, first, arguments, cells)
            if arguments["as_json"]:
                console.result(found, as_json=True)
            else:
                table, step, _ = look_at_cells(folders[0], options.open_cells(folders[0]))
                console.result({}, False, table, next_=step)
            if any("error" in one for one in found.values()):
                raise typer.Exit(1)

        return wrapped

    return decorate


def _steps(
    function: Command, follow: Command | None, arguments: dict[str, Any], cells: Iterable[Path]
) -> list[Callable[..., None]]:
    """Return what is done with all cells, one after the other."""
    if "wait" not in arguments or arguments.get("dry_run"):
        return [function]
    from sdwn.jobs.submit import last_profile

    # The profile of a retry is that of the submission before it.
    name, wait = arguments.get("profile", ""), arguments["wait"]
    submitted = [cell for cell in map(RunPaths, cells) if cell.submissions.exists()]
    executor = None
    if name:
        executor = options.open_profile(name, arguments["site"]).executor
    elif name == "" and submitted:
        executor = last_profile(submitted[0], arguments["site"]).executor
    if executor == "slurm" and wait:
        return [lambda **given: function(**{**given, "wait": False}), follow or function]
    if executor == "local" and not wait:
        raise UsageError(
            "processes of this machine need --wait, which makes the cells one after another"
        )
    return [function]


def _do_cells(
    steps: Iterable[Command], first: str, arguments: dict[str, Any], cells: dict[str, Path]
) -> dict[str, dict[str, Any]]:
    """Do each step with each cell that did not fail before; return the answers by cell."""
    found = dict[str, dict[str, Any]]()
    for step, (name, cell) in itertools.product(steps, cells.items()):
        if "error" in found.get(name, ()):
            continue
        given: Any = RunPaths(cell).release if first == "release" else cell
        error, printed = None, io.StringIO()
        try:
            with redirect_stdout(printed):
                step(**{**arguments, first: [cell] if first == "runs" else given})
        except (SdwnError, OSError) as failed:
            error = str(failed)
            console.fail(f"{name}: {error}", 1, traceback=False)
        except typer.Exit:
            error = "problems were found"
        answer = {}
        if not arguments["as_json"]:
            console.show(Text(name, "bold"))
            # The sweep's table has the next step of each cell.
            console.show(re.sub(r"(?m)^next: .*\n", "", printed.getvalue()))
        elif printed.getvalue():
            answer = json.loads(printed.getvalue())
        # The second step submits nothing of what the first has submitted.
        kept = {key: value for key, value in found.get(name, {}).items() if not answer.get(key)}
        found[name] = {**answer, **kept, **({"error": error} if error else {})}
    return found
