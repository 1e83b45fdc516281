"""Prefetching: weights, classifier and WordNet, on a machine with a network."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sdwn.config import RunConfig
from sdwn.errors import SdwnError
from sdwn.models import lock
from sdwn.models.families import check_settings
from sdwn.models.weights import Weights, fetch_weights, hub_commit
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan
from sdwn.prediction.plan import require_labels
from sdwn.wordnet.corpus import VERSION, open_wordnet
from sdwn.wordnet.taxonomy import open_taxonomy


def prefetch(
    config: RunConfig,
    folder: Path | None = None,
    classify: bool = True,
    run: RunPaths | None = None,
) -> dict[str, Any]:
    """Fetch a config's weights, if wanted its classifier's, and WordNet; lock a run to them.

    The weights go into the folder, if one is given, instead of the hub's cache, and the run's
    tasks find them there. A lock that stands decides which commit; so do images that were made
    before there was one.

    Returns:
        What there is now, as ``--json`` prints it; ``problems`` are settings that do not fit the
        model, and why classifier or WordNet could not be had.

    Raises:
        SdwnError: the weights cannot be had, or images were made with others.
    """
    found = None
    if config.model.builtin != "noise":
        fetch = partial(_fetch_and_lock, run) if run else fetch_weights
        found = fetch(config, folder=folder)
    problems, record = list[str](), dict[str, Any](model=config.model.name)
    record["revision"] = found.revision if found else None
    record["folder"] = str(found.folder) if found else None
    if found and found.added:
        record["added"] = [str(one.path) for one in found.added]
    if run is not None and run.lock.exists():
        record["lock"] = str(run.lock)
    record |= {"classifier": None, "wordnet": None, "problems": problems}
    # Images can be made without what follows.
    try:
        begun = run is not None and run.begun
        check_settings(config, found.folder if found else None, begun=begun)
    except SdwnError as error:
        problems.append(str(error))
    try:
        if classify:
            record["classifier"] = _fetch_classifier(config, run)
    except SdwnError as error:
        problems.append(str(error))
    try:
        open_wordnet()
        record["wordnet"] = VERSION
    except SdwnError as error:
        if not config.catalog.table:  # whose rows need none, unless they are of it
            problems.append(str(error))
    return record


def _fetch_and_lock(paths: RunPaths, config: RunConfig, folder: Path | None) -> Weights | None:
    """Fetch what a run is locked to, or lock it to what is fetched."""
    standing = lock.read_lock(paths, config.model)
    here = standing.folder if standing and standing.source == "hub" else None
    moved = folder is not None and str(folder) != here
    if standing and not moved:
        with suppress(SdwnError):
            return lock.locked_weights(paths, config.model)
        folder = Path(here) if here else None
    made_with = standing.revision if standing else lock.recorded_revision(paths)
    found = fetch_weights(
        config,
        hub_commit(made_with),
        [one.commit for one in standing.added] if standing else (),
        folder,
    )
    if moved or standing is None:
        change = {"folder": str(folder), "added": list(found.added)} if moved else {}
        new = standing or lock.lock_on(config, found)
        lock.write_lock(paths, new.model_copy(update=change))
    return lock.locked_weights(paths, config.model)


def _fetch_classifier(config: RunConfig, run: RunPaths | None) -> str:
    """Fetch a classifier's weights, unless they are here; return where they lie, lock the run."""
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    chosen = config.evaluation
    file = find_classifier(chosen.model, chosen.checkpoint, download=True)
    if run is not None:
        lock_found_classifier(run, config)
    return str(file)


def prefetch_classifier(paths: RunPaths, plan: Plan) -> None:
    """Fetch a run's classifier before its images are made, and lock the run to it.

    Raises:
        SdwnError: it cannot be had or loaded, has changed, or there is nothing to evaluate.
    """
    from sdwn.evaluation.evaluate import require_evaluable

    config = plan.config
    require_labels(plan.table, config.evaluation, f"{paths.root}: none of its {plan.unit}s")
    require_evaluable(config.evaluation, lambda: open_taxonomy(paths.taxonomy))
    lock.require_classifier(paths, config)
    _fetch_classifier(config, paths)


def lock_found_classifier(paths: RunPaths, config: RunConfig) -> None:
    """Lock a run to the classifier that it has now, if it is on this machine."""
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    chosen = config.evaluation
    file = chosen.checkpoint or find_classifier(chosen.model, None)
    if file is not None and file.is_file():
        lock.lock_to_classifier(paths, config, file)
