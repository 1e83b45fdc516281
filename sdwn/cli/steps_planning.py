"""Planning a run, and getting what it needs of the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.cli import terminal
from sdwn.cli.steps_opening import open_config, open_run
from sdwn.errors import UsageError, command

if TYPE_CHECKING:
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Plan


def plan_run(
    config: str, run: Path, overrides: list[str] | None, slice_: str | None = None
) -> tuple[Plan, RunPaths]:
    """Read WordNet and write a run's plan, or a slice of it, unless the same stands there."""
    from sdwn.models.lock import ensure
    from sdwn.models.settings import require_usable
    from sdwn.models.weights import is_elsewhere, is_hub_name
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import make_plan, write_plan
    from sdwn.planning.slices import WHOLE, parse_slice
    from sdwn.wordnet.catalog import read_catalog
    from sdwn.wordnet.corpus import shared_wordnet

    share = WHOLE if slice_ is None else parse_slice(slice_)
    settings = open_config(config, overrides)
    require_usable(settings)
    with terminal.working("reading WordNet"):
        catalog = read_catalog(settings.catalog, shared_wordnet())
    made, paths = make_plan(settings, catalog, share), RunPaths(run)
    new = write_plan(made, paths, terminal.say)
    terminal.say(f"{'planned' if new else 'planned already'}: {run}")
    with terminal.working("looking for the weights"):
        locked = ensure(paths, made)
    if locked is not None:
        terminal.say(f"its weights are {locked.model.name} at {locked.revision}")
    elif is_elsewhere(settings.model):
        terminal.say(f"its weights are not here: there is no folder {settings.model.name}")
    elif is_hub_name(settings.model):
        terminal.say(f"its weights are not here yet; before submitting: {command('prefetch', run)}")
    return made, paths


def require_evaluable(paths: RunPaths, made: Plan) -> None:
    """Get the classifier of a run that is not finished: its evaluation must not fail at the end."""
    from sdwn.preflight.prefetch import ready_classifier

    if len(made.done(paths)) < len(made.own_shards):
        with terminal.working("looking for the classifier"):
            ready_classifier(paths, made.config)


def prefetched(
    target: str, overrides: list[str] | None, folder: Path | None, classify: bool
) -> dict[str, Any]:
    """Get what a config, or a run that is planned, needs of the network."""
    from sdwn.paths import RunPaths
    from sdwn.preflight.prefetch import (
        fetch_extras,
        fetch_for_config,
        fetch_for_run,
        lock_classifier,
    )

    paths, folder = RunPaths(Path(target)), folder and folder.absolute()
    if not paths.plan.exists():
        settings = open_config(target, overrides)
        found = fetch_for_config(settings, folder)
        if folder is not None:
            own = command("plan", target, "RUN", "--set", f"model.name={folder}")
            terminal.say(f"plan with it: {own}")
    elif overrides:
        raise UsageError(f"--set changes a config, and {target} is planned already")
    else:
        _, made = open_run(paths.root)
        settings, found = made.config, fetch_for_run(paths, made, folder)
    extras = fetch_extras(settings.evaluation if classify else None)
    if paths.plan.exists() and extras["classifier"]:
        lock_classifier(paths, settings)
    return {
        "model": settings.model.name,
        "revision": found.revision if found else None,
        "folder": str(found.folder) if found else None,
        **({"lock": str(paths.lock)} if paths.lock.exists() else {}),
        **extras,
    }
