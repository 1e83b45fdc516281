"""Folders on the command line: their kinds, and the command for each kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdwn.errors import UsageError, command

if TYPE_CHECKING:
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Plan
    from sdwn.planning.work import ShardedWork

Kind = Literal["run", "release", "evaluation", "work"]
# Commands that take the work of an evaluation as they take a run.
FOLLOWING = ("status", "logs", "cancel")


def open_run(run: Path) -> tuple[RunPaths, Plan]:
    """Read a run's plan."""
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def open_sharded(folder: Path) -> tuple[RunPaths, ShardedWork]:
    """Read what a folder's tasks work on: a run's plan, or the plan of an evaluation's work."""
    from sdwn.paths import work_paths
    from sdwn.prediction.plan import is_prediction_work, read_prediction_plan

    if not is_prediction_work(folder):
        return open_run(folder)
    paths = work_paths(folder)
    return paths, read_prediction_plan(paths)


def kind_of(folder: Path) -> Kind | None:
    """Return a folder's kind, by its files: a run, a release, an evaluation of one, or its work."""
    from sdwn.paths import EvaluationPaths, ReleasePaths, RunPaths
    from sdwn.prediction.plan import is_prediction_work

    if ReleasePaths(folder).manifest.exists():
        return "release"
    if RunPaths(folder).plan.exists():
        return "work" if is_prediction_work(folder) else "run"
    evaluation = EvaluationPaths(folder)
    return "evaluation" if evaluation.evaluation.exists() or evaluation.work.plan.exists() else None


def require_kind(wanted: Literal["run", "release"], name: str, folder: Path) -> None:
    """Refuse a folder of another kind, and name the command for what was given.

    Args:
        wanted: what the command takes.
        name: the command.
        folder: what was given.

    Raises:
        UsageError: a run was given to a command that takes a release, for example.
    """
    given = kind_of(folder)
    if given in (None, wanted) or (given == "work" and wanted == "run" and name in FOLLOWING):
        return
    what = {"work": "the work of an evaluation", "evaluation": "an evaluation"}
    raise UsageError(
        f"{folder} is {what.get(str(given), f'a {given}')}, and sdwn {name} takes a {wanted}; "
        f"use: {_command_for(given, wanted, name, folder)}"
    )


def _command_for(given: Kind | None, wanted: str, name: str, folder: Path) -> str:
    """Return the command for this kind of folder that does what the user meant."""
    from sdwn.paths import RunPaths
    from sdwn.prediction.plan import read_prediction_plan

    if given == "run":
        inside = RunPaths(folder).release
        merged = kind_of(inside) == "release"
        return command(name, inside) if merged else command("merge", folder, "--release", inside)
    if given == "release":
        # A run was meant: the one that the release lies in, or the work of its last evaluation.
        if name in ("plan", "run"):
            return "a folder of its own"
        parent = folder.absolute().parent
        if name == "merge" or kind_of(parent) != "run":
            works = sorted(folder.glob("evaluations/*/work/plan.json"))
            if not works or name not in FOLLOWING:
                return f"{command('verify', folder)}, or {command('browse', folder)}"
            parent = works[-1].parent
        return command(name, parent)
    work = folder.absolute() if given == "work" else folder.absolute() / "work"
    release, evaluation = work.parent.parent.parent, work.parent.name
    if wanted == "run" and kind_of(work) == "work":
        paths = RunPaths(work)
        return (
            command(name, work) if name in FOLLOWING else read_prediction_plan(paths).command(paths)
        )
    one = ["--evaluation", evaluation] * (name in ("report", "browse", "show"))
    return command(name if wanted == "release" else "report", release, *one)


def require_savable(save: Path, release: Path, endings: tuple[str, ...]) -> None:
    """Check the path of ``--save``.

    Raises:
        UsageError: it names no file, a file in the release, or another format.
    """
    if save.suffix.lower() not in endings:
        valid = " or ".join(endings)
        raise UsageError(f"--save {save}: expected a file name that ends in {valid}")
    if not save.parent.is_dir():
        raise UsageError(f"--save {save}: expected a file in a folder that exists")
    if save.is_symlink() or (save.exists() and not save.is_file()):
        raise UsageError(f"--save {save}: expected a file or nothing there")
    if release.resolve() in save.resolve().parents:
        raise UsageError(f"--save {save}: it lies in the release; choose another path")
