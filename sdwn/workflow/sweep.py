"""Planning of a sweep's cells, each as a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdwn.config import RunConfig
from sdwn.errors import UsageError
from sdwn.io import write_text
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.sweep import Cell, Sweep, cell_name, read_sweep, read_sweep_file
from sdwn.workflow.submitting import Display, plan_run


def plan_sweep(path: Path, folder: Path, overrides: tuple[str, ...], display: Display) -> Sweep:
    """Plan a sweep's cells; those that are there keep their names, whatever the file adds.

    Raises:
        UsageError: the file is refused, the folder is something else, or its base was another.
    """
    paths = RunPaths(folder)
    if paths.plan.exists() or ReleasePaths(folder).manifest.exists():
        raise UsageError(f"{folder} is no sweep; plan the sweep into a folder of its own")
    wanted, config_of = read_sweep_file(path, overrides)
    known = read_sweep(folder).cells if paths.sweep.exists() else []
    # They come first: a changed base is refused before anything is written.
    settings_of = {cell.name: cell.settings for cell in known if (folder / cell.name).exists()}
    configs = {name: config_of(settings) for name, settings in settings_of.items()}
    names = {_images(config): name for name, config in configs.items()}
    named = set[str]()
    for settings in wanted:
        name, config = cell_name(settings), config_of(settings)
        if twin := names.get(_images(config)):
            if twin in named:
                raise UsageError(f"{path}: {name} and {twin} are the same cell; leave one out")
            name = twin
        else:
            # Macs take folders that differ in case for one.
            while name.lower() in map(str.lower, configs):
                name += "-2"
            settings_of[name], configs[name], names[_images(config)] = settings, config, name
        named.add(name)
    cells, locks = [], dict[str, Path]()
    for name, config in configs.items():
        run = RunPaths(folder / name)
        weights = f"{config.model} {config.generation.safety_checker}"
        if weights in locks and not run.lock.exists():
            # A cell that is added later takes the weights of those before it.
            run.root.mkdir(exist_ok=True)
            shutil.copyfile(locks[weights], run.lock)
        plan, _ = plan_run(config, run.root, display)
        if run.lock.exists():
            locks.setdefault(weights, run.lock)
        cells.append(Cell(name=name, settings=settings_of[name], digest=plan.digest))
    sweep = Sweep(cells=cells)
    write_text(paths.sweep, sweep.model_dump_json(indent=2) + "\n")
    return sweep


def _images(config: RunConfig) -> str:
    return config.model_dump_json(exclude={"evaluation"})
