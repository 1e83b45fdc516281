"""Opening what the command line names: configs, profiles, runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdwn.errors import UsageError, command

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Plan
    from sdwn.planning.work import Dealt


def open_config(config: str, overrides: list[str] | None) -> RunConfig:
    """Read a config file, or a shipped one, with overrides."""
    from sdwn.config import load_config
    from sdwn.paths import shipped_file

    return load_config(shipped_file("config", config), tuple(overrides or ()))


def open_profile(name: str, site: dict[str, str]) -> ClusterProfile:
    """Read a site's profile, or a shipped one, with flags in the place of its fields."""
    from sdwn.jobs.profile import load_profile

    return load_profile(name, site)


def open_run(run: Path) -> tuple[RunPaths, Plan]:
    """Read a run's plan."""
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def open_dealt(folder: Path) -> tuple[RunPaths, Dealt]:
    """Read what a folder's tasks work on: a run's plan, or the plan of an evaluation's work."""
    from sdwn.paths import work_paths
    from sdwn.prediction.plan import is_prediction_work, read_prediction_plan

    if not is_prediction_work(folder):
        return open_run(folder)
    paths = work_paths(folder)
    return paths, read_prediction_plan(paths)


Kind = Literal["run", "release", "evaluation", "work"]
# Commands that take the work of an evaluation as they take a run.
FOLLOWING = ("status", "logs", "cancel")


def kind_of(folder: Path) -> Kind | None:
    """Return what a folder is by its files: a run, a release, an evaluation of one, or its work."""
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
    from sdwn.paths import RunPaths
    from sdwn.prediction.plan import read_prediction_plan

    if given == "run":
        inside = RunPaths(folder).release
        merged = kind_of(inside) == "release"
        return command(name, inside) if merged else command("merge", folder, "--release", inside)
    if given == "release":
        return _command_for_release(name, folder)
    work = folder.absolute() if given == "work" else folder.absolute() / "work"
    release, which = work.parent.parent.parent, work.parent.name
    if wanted == "run" and kind_of(work) == "work":
        paths = RunPaths(work)
        followed = name in FOLLOWING
        return command(name, work) if followed else read_prediction_plan(paths).command(paths)
    one = ["--evaluation", which] * (name in ("report", "browse", "show"))
    return command(name if wanted == "release" else "report", release, *one)


def _command_for_release(name: str, folder: Path) -> str:
    """Name what takes a release, or its run, in the place of a command that takes a run."""
    if name in ("plan", "run"):
        return "a folder of its own"
    parent = folder.absolute().parent
    if name != "merge" and kind_of(parent) == "run":
        return command(name, parent)
    works = sorted(folder.glob("evaluations/*/work/plan.json"))
    if works and name in FOLLOWING:
        return command(name, works[-1].parent)
    return f"{command('verify', folder)}, or {command('browse', folder)}"
