"""Prefetching: what a run needs of the network, got on the machine that has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdwn.config import EvaluationConfig, RunConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.models import lock
from sdwn.models.hub import fetch_weights
from sdwn.models.lock import Lock
from sdwn.models.weights import Weights, fingerprint, is_commit, located, source
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan
from sdwn.wordnet.corpus import VERSION, open_wordnet
from sdwn.wordnet.taxonomy import open_taxonomy


def fetch_for_config(config: RunConfig, folder: Path | None = None) -> Weights | None:
    """Get a config's weights, into the hub's cache or a folder; None of a model that has none.

    Raises:
        SdwnError: they cannot be had.
    """
    if config.model.builtin == "noise":
        return None
    if source(config.model) == "hub":
        return fetch_weights(config, None, folder)
    place = _place(config, folder)
    return Weights(place, fingerprint(place))


def fetch_for_run(paths: RunPaths, plan: Plan, folder: Path | None = None) -> Weights | None:
    """Get a run's weights, and lock the run to them; None of a model that has none.

    A lock that stands decides which commit; so do images that were made before there was one.
    The run's tasks find the weights in the folder, if one is given.

    Raises:
        SdwnError: they cannot be had.
        IntegrityError: images were made with other weights, or a model's folder was changed.
    """
    config = plan.config
    if config.model.builtin == "noise":
        return None
    standing = lock.read_lock(paths, config.model)
    if source(config.model) != "hub":
        _place(config, folder)
        lock.ensure(paths, plan)
    elif standing is None:
        _lock_anew(paths, config, folder)
    else:
        _as_locked(paths, config, standing, folder)
    return lock.locked_weights(paths, config.model)


def _lock_anew(paths: RunPaths, config: RunConfig, folder: Path | None) -> None:
    made_with = lock.recorded_revision(paths)
    found = fetch_weights(config, made_with if is_commit(made_with) else None, folder)
    lock.write_lock(paths, _in(lock.lock_on(config, found.folder, found.revision), folder))


def _as_locked(paths: RunPaths, config: RunConfig, standing: Lock, folder: Path | None) -> None:
    wanted = _in(standing, folder)
    if wanted == standing and _has_all(paths, config):
        return
    fetch_weights(
        config, standing.revision, Path(wanted.folder) if wanted.folder is not None else None
    )
    if wanted != standing:
        lock.write_lock(paths, wanted)


def _in(made: Lock, folder: Path | None) -> Lock:
    return made if folder is None else made.model_copy(update={"folder": str(folder)})


def _has_all(paths: RunPaths, config: RunConfig) -> bool:
    try:
        return lock.locked_weights(paths, config.model) is not None
    except SdwnError:
        return False


def _place(config: RunConfig, folder: Path | None) -> Path:
    """Find a model's own folder, or make a built-in one."""
    model = config.model
    if folder is not None:
        raise UsageError(f"--folder is for models of the hub; {model.name} needs no fetching")
    if model.builtin is None:
        return located(config)
    from sdwn.models.builtin import builtin_folder  # torch

    return builtin_folder(model.builtin)


def fetch_extras(classifier: EvaluationConfig | None) -> dict[str, Any]:
    """Get the classifier, if one is wanted, and WordNet; say what could not be had, and why."""
    problems: list[str] = []
    found = {
        "classifier": classifier and _attempt(lambda: fetch_classifier(classifier), problems),
        "wordnet": _attempt(fetch_wordnet, problems),
    }
    return {**found, "problems": problems}


def _attempt(fetch_one: Callable[[], str], problems: list[str]) -> str | None:
    try:
        return fetch_one()
    except SdwnError as error:
        problems.append(str(error))
        return None


def fetch_classifier(chosen: EvaluationConfig) -> str:
    """Get a classifier's weights, unless they are here, and say where they lie.

    Raises:
        SdwnError: they cannot be had.
    """
    from sdwn.prediction.pretrained import fetch_classifier, find_classifier  # torch and timm

    return str(find_classifier(chosen.model, chosen.checkpoint) or fetch_classifier(chosen.model))


def ready_classifier(paths: RunPaths, config: RunConfig) -> None:
    """Get a run's classifier before its images are made, and lock the run to it.

    Raises:
        SdwnError: it cannot be had, or cannot be loaded.
        IntegrityError: it has changed since the run was locked to it.
    """
    from sdwn.evaluation.evaluate import require_evaluable

    require_evaluable(config.evaluation, open_taxonomy(paths.taxonomy))
    lock.require_classifier(paths, config)
    fetch_classifier(config.evaluation)
    lock_classifier(paths, config)


def lock_classifier(paths: RunPaths, config: RunConfig) -> None:
    """Lock a run to the classifier that it has now, if it is on this machine."""
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    chosen = config.evaluation
    file = chosen.checkpoint or find_classifier(chosen.model, None)
    if file is not None and file.is_file():
        lock.lock_to_classifier(paths, config, file)


def fetch_wordnet() -> str:
    """Find WordNet, or have NLTK get it.

    Raises:
        SdwnError: there is none, and NLTK cannot get it.
    """
    open_wordnet()
    return VERSION
