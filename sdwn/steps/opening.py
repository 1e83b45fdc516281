"""Opening what the command line names: configs, profiles, runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.files import RunPaths
    from sdwn.jobs.profiles import ClusterProfile
    from sdwn.planning.dealt import Dealt
    from sdwn.planning.plan import Plan


def open_config(config: str, overrides: list[str] | None) -> RunConfig:
    """Read a config file, or a shipped one, with overrides."""
    from sdwn.config import load_config
    from sdwn.shipped import find

    return load_config(find("config", config), tuple(overrides or ()))


def open_profile(name: str, site: dict[str, str]) -> ClusterProfile:
    """Read a site's profile, or a shipped one, with flags in the place of its fields."""
    from sdwn.jobs.profiles import load_profile

    return load_profile(name, site)


def open_run(run: Path) -> tuple[RunPaths, Plan]:
    """Read a run's plan."""
    from sdwn.files import RunPaths
    from sdwn.planning.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def open_dealt(folder: Path) -> tuple[RunPaths, Dealt]:
    """Read what a folder's tasks work on: a run's plan, or the plan of an evaluation's work."""
    from sdwn.files import work_paths
    from sdwn.judging.judging import is_work, read_judging

    if not is_work(folder):
        return open_run(folder)
    paths = work_paths(folder)
    return paths, read_judging(paths)
