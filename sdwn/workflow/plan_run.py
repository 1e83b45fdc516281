"""Planning a run: from its config and WordNet to the plan in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdwn.config import RunConfig
from sdwn.errors import command
from sdwn.models.families import require_usable
from sdwn.models.lock import ensure_lock
from sdwn.models.weights import source
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, make_plan, write_plan
from sdwn.planning.work import WHOLE, Slice
from sdwn.wordnet.catalog import read_catalog
from sdwn.wordnet.corpus import shared_wordnet

if TYPE_CHECKING:
    from sdwn.workflow.following import Display


def plan_run(
    config: RunConfig, run: Path, display: Display, share: Slice = WHOLE
) -> tuple[Plan, RunPaths]:
    """Read WordNet and write a run's plan, or a slice of it, unless the same plan is there.

    Raises:
        UsageError: the model or the catalog cannot be used, or another plan is there.
    """
    require_usable(config)
    with display.working("reading WordNet"):
        wordnet = shared_wordnet()
        catalog = read_catalog(config.catalog, wordnet)
    plan, paths = make_plan(config, catalog, share), RunPaths(run)
    new = write_plan(plan, paths, display.say, wordnet)
    display.say(f"{'planned' if new else 'planned already'}: {run}")
    with display.working("looking for the weights"):
        locked = ensure_lock(paths, plan)
    if locked is not None:
        display.say(f"model: {locked.model.name} (revision {locked.revision})")
    elif source(config.model) == "elsewhere":
        display.say(f"model: {config.model.name} (no such folder on this machine)")
    elif source(config.model) == "hub":
        get = command("prefetch", run)
        display.say(f"model: {config.model.name} (not downloaded yet); before submitting: {get}")
    return plan, paths
