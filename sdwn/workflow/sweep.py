"""Planning of a sweep's cells, each as a run."""

from __future__ import annotations

from pathlib import Path

from sdwn.config import RunConfig
from sdwn.errors import UsageError
from sdwn.io import write_text
from sdwn.paths import ReleasePaths, RunPaths, SweepPaths
from sdwn.planning.sweep import Cell, Settings, Sweep, cell_name, read_sweep, read_sweep_file
from sdwn.workflow.submitting import Display, plan_run


def plan_sweep(path: Path, folder: Path, overrides: tuple[str, ...], display: Display) -> Sweep:
    """Plan a sweep's cells; those that are there keep their names, whatever the file adds.

    Raises:
        UsageError: the file is refused, the folder is something else, or its base was another.
    """
    paths = SweepPaths(folder)
    if RunPaths(folder).plan.exists() or ReleasePaths(folder).manifest.exists():
        raise UsageError(f"{folder} is no sweep; plan the sweep into a folder of its own")
    wanted, config_of = read_sweep_file(path, overrides)
    known = read_sweep(folder).cells if paths.sweep.exists() else []
    # They come first: a changed base is refused before anything is written.
    cells: dict[str, tuple[Settings, RunConfig]] = {
        cell.name: (cell.settings, config_of(cell.settings))
        for cell in known
        if (folder / cell.name).exists()
    }
    named = set[str]()
    for settings in wanted:
        name, config = cell_name(settings), config_of(settings)
        twins = (old for old, (_, other) in cells.items() if _same_images(config, other))
        if twin := next(twins, None):
            if twin in named:
                raise UsageError(f"{path}: {name} and {twin} are the same cell; leave one out")
            name = twin
        while twin is None and name in cells:
            name += "-2"
        named.add(name)
        cells.setdefault(name, (settings, config))
    found = []
    for name, (settings, config) in cells.items():
        plan, _ = plan_run(config, folder / name, display)
        found.append(Cell(name=name, settings=settings, digest=plan.digest))
    sweep = Sweep(cells=found)
    write_text(paths.sweep, sweep.model_dump_json(indent=2) + "\n")
    return sweep


def _same_images(one: RunConfig, other: RunConfig) -> bool:
    return one.model_copy(update={"evaluation": other.evaluation}) == other
