"""Planning of a sweep: each cell is a run of its own, and all that takes a run takes a cell."""

from __future__ import annotations

from pathlib import Path

from sdwn.config import RunConfig
from sdwn.errors import UsageError
from sdwn.io import write_text
from sdwn.models.families import require_usable
from sdwn.paths import RunPaths, SweepPaths
from sdwn.planning.plan import flat_settings, read_plan, setting_differences
from sdwn.planning.sweep import Cell, Sweep, free_name, read_sweep, sweep_configs
from sdwn.workflow.submitting import Display, compute_plan, keep_plan


def plan_sweep(path: Path, folder: Path, overrides: tuple[str, ...], display: Display) -> Sweep:
    """Plan the cells of a sweep's file that are not there yet; keep all that are.

    A cell is known by its plan's digest, so that a file with more values, in any order, adds cells.

    Raises:
        UsageError: the file is refused, or the folder holds a run or a sweep of another base.
    """
    if RunPaths(folder).plan.exists():
        raise UsageError(f"{folder} is a run; plan the sweep into a folder of its own")
    paths, configs = SweepPaths(folder), sweep_configs(path, overrides)
    for _, config in configs:
        require_usable(config)
    known = read_sweep(folder).cells if paths.sweep.exists() else []
    known = [cell for cell in known if paths.cell(cell.name).plan.exists()]
    if known:
        settings, config = configs[0]
        before = read_plan(paths.cell(known[0].name)).config
        vary = settings.keys() | known[0].settings.keys()
        if differ := setting_differences(_base(before, vary), _base(config, vary)):
            raise UsageError(
                f"{folder} belongs to a sweep of another base: {'; '.join(differ)}; plan into a "
                "new folder"
            )
    names = {cell.digest: cell.name for cell in known}
    taken = {cell.name: cell.settings for cell in known}
    cells = dict[str, Cell]()
    for settings, config in configs:
        plan, wordnet = compute_plan(config, display)
        name = names.setdefault(plan.digest, free_name(settings, taken))
        keep_plan(plan, paths.cell(name).root, display, wordnet)
        taken.setdefault(name, settings)
        cells[name] = Cell(name=name, settings=taken[name], digest=plan.digest)
    # What the file no longer has stays, as long as its folder does.
    kept = [cell for cell in known if cell.name not in cells]
    sweep = Sweep(cells=[*cells.values(), *kept])
    write_text(paths.sweep, sweep.model_dump_json(indent=2) + "\n")
    return sweep


def _base(config: RunConfig, vary: set[str]) -> dict[str, object]:
    """Return the settings of a cell that do not vary, by dotted name."""
    settings = flat_settings(config.model_dump(mode="json", exclude={"evaluation"}))
    return {name: value for name, value in settings if name not in vary}
