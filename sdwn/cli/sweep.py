"""The command that plans a sweep; how the others do all cells of one."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument

from sdwn.cli import console, options
from sdwn.cli.console import Result
from sdwn.errors import SdwnError, UsageError, command
from sdwn.paths import RunPaths, shipped_file

if TYPE_CHECKING:
    from sdwn.workflow.status import RunStatus

# A sweep's next command is that of the cell that is least far.
STEPS = "prefetch pilot submit logs retry status merge evaluate compare".split()


def sweep_command(
    sweep: Annotated[str, Argument(metavar="SWEEP", help="A sweep's file, or a shipped one.")],
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The sweep's folder.")],
    set_: options.Override = None,
) -> Result:
    """Plan runs of one config that differ in some settings.

    Each is a cell, a run in a folder of its own. More values in the file add cells. Commands that
    take a run or its release take the sweep's folder too, and do all cells.
    """
    from sdwn.workflow.plans import plan_sweep

    found = plan_sweep(shipped_file("config", sweep), folder, tuple(set_ or ()), console)
    table, step, _ = look_at_cells(folder)
    values = {"cells": [cell.model_dump() for cell in found.cells]}
    return Result(values, table, next_=step)


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


def names_sweep(given: Any) -> bool:
    """Return whether an argument, of one folder or of several, names a sweep."""
    return options.kind_of(Path(given[0] if isinstance(given, list) else given)) == "sweep"


def do_cells(
    function: Callable[..., Result | None], arguments: dict[str, Any], first: str, as_json: bool
) -> Result:
    """Do all cells of the sweep that the ``first`` argument names, each by a command's function.

    A cell that fails does not stop the others.
    """
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
            assert answer is not None
            error = {"error": "problems were found"} if answer.failed else {}
            if not as_json:
                # Each cell's next step is in the sweep's table.
                console.show(name)
                answer.show()
            # Of what the first pass has submitted the second submits nothing.
            found[name] = {**answer.values, **before, **error}
        except (SdwnError, OSError) as failed:
            found[name] = {**before, "error": str(failed)}
            console.fail(f"{name}: {failed}")
    stopped = any("error" in one for one in found.values())
    if as_json:
        return Result(found, failed=stopped)
    table, step, _ = look_at_cells(folder)
    return Result(found, table, next_=step, failed=stopped)


def _passes(arguments: dict[str, Any], cell: Path) -> list[dict[str, Any]]:
    """Return the changed arguments of each pass over the cells.

    With ``--wait`` under SLURM the tasks of all cells are submitted first; the second pass follows
    them, and what was queued behind them.
    """
    wait, name = arguments.get("wait"), arguments.get("profile", "")
    if wait is None or name is None or arguments.get("dry_run"):
        return [{}]
    from sdwn.jobs.submit import last_profile

    site = arguments["site"]
    profile = options.open_profile(name, site) if name else last_profile(RunPaths(cell), site)
    if profile.executor == "local" and not wait:
        raise UsageError("without --wait all cells would begin at once on this machine; add --wait")
    follow = {"then": None} if "then" in arguments else {}
    return [{"wait": False}, follow] if profile.executor == "slurm" and wait else [{}]
