"""A run's lock: exactly which weights make its images, written once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from sdwn.config import ModelConfig, Record, RunConfig
from sdwn.errors import IntegrityError, SdwnError, command, shell
from sdwn.io import Format, now, read_json, reading, write_text
from sdwn.models import weights
from sdwn.models.builtin import builtin_folder
from sdwn.models.weights import FoundWeights, LockedFile, Source, Weights
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, read_plan

# Version 1 knew neither single files nor what changes a model.
FORMAT = Format("sdwn-lock", 2, "if it is newer, upgrade sdwn", {1: dict})


class LockedClassifier(Record):
    """The weights that classify a run's release; of a user's own file, its content counts too."""

    model: str
    weights: LockedFile


class Lock(Record):
    """The weights of a run; ``model`` is as the plan has it, ``revision`` as in `Weights`."""

    format: str = FORMAT.name
    format_version: int = FORMAT.version
    model: ModelConfig
    source: Source
    revision: str
    # Where the hub's weights are, if not in its cache, or what the single file was converted to.
    folder: str | None = None
    written: str
    files: list[LockedFile]
    single_file: LockedFile | None = None
    added: list[FoundWeights] = Field(default_factory=list)
    classifier: LockedClassifier | None = None


def read_lock(paths: RunPaths, model: ModelConfig) -> Lock | None:
    """Read a run's lock; None where there is none. One of another model is an IntegrityError."""
    if not paths.lock.exists():
        return None
    # The images' own records say which weights the new one must name.
    remedy = f"write it anew with: {shell('rm', paths.lock)} && {command('prefetch', paths.root)}"
    with reading(paths.lock, remedy):
        lock = Lock.model_validate(FORMAT.upgraded(read_json(paths.lock, remedy), paths.lock))
        if lock.model == model:
            return lock
    raise IntegrityError(
        f"{paths.lock}: of the model {lock.model.name}, with other settings than the plan's "
        f"{model.name}; {remedy}"
    )


def ensure_lock(paths: RunPaths, plan: Plan) -> Lock | None:
    """Return a run's lock; a missing one is written if the weights are on this machine."""
    if (lock := read_lock(paths, plan.config.model)) is not None:
        return lock
    try:
        found = weights.found_weights(plan.config, weights.hub_commit(recorded_revision(paths)))
    except SdwnError:
        return None
    return write_lock(paths, lock_on(plan.config, found))


def lock_on(config: RunConfig, found: Weights) -> Lock:
    """Lock a config to weights that are on this machine."""
    folder, where = found.folder, weights.source(config.model)
    file = Path(config.model.name).expanduser()
    if where == "hub":
        names = weights.needed_here(folder, config)
        own = [LockedFile(file=name, bytes=(folder / name).stat().st_size) for name in names]
    else:
        own = [LockedFile.of(folder / name, name) for name in weights.files(folder)]
    return Lock(
        model=config.model,
        source=where,
        revision=found.revision,
        folder=str(folder) if where == "file" else None,
        written=now(),
        files=own,
        single_file=LockedFile.of(file, str(file)) if where == "file" else None,
        added=list(found.added),
    )


def write_lock(paths: RunPaths, lock: Lock) -> Lock:
    """Write a run's lock, unless images of this run were made with other weights."""
    made_with = recorded_revision(paths)
    if made_with not in (None, lock.revision):
        raise IntegrityError(
            f"{paths.root}: images of this run were made with {lock.model.name} at {made_with}, "
            f"and what is here now is {lock.revision}; bring the former back, or plan into a new "
            "folder"
        )
    write_text(paths.lock, lock.model_dump_json(indent=1) + "\n")
    return lock


def recorded_revision(paths: RunPaths) -> str | None:
    """Return the revision that a run's images were made with, or the release that it extends."""
    if paths.plan.exists() and (extends := read_plan(paths).extends) is not None:
        return extends.revision
    files = [*paths.shards.glob("[0-9]*.h5"), *paths.pieces.glob("*/[0-9]*.h5")]
    if not files:
        return None
    from sdwn.storage.shards import ImageFile  # half a second, and most plans have no images yet

    for path in sorted(files):
        with suppress(IntegrityError), ImageFile(path) as file:
            for task_run in file.task_runs:
                if revision := task_run.get("revision"):
                    return str(revision)
    return None


def locked_weights(paths: RunPaths, model: ModelConfig) -> Weights | None:
    """Return the weights that a run is locked to, checked against the lock; None without one."""
    if (lock := read_lock(paths, model)) is None:
        return None
    prefetch, own = command("prefetch", paths.root), lock.files
    remedy = "bring it back, or plan into a new folder"
    folder = Path(lock.folder or model.name).expanduser()
    if lock.source == "hub":
        cached = lock.folder or weights.snapshot(model.name, weights.hub_commit(lock.revision))
        folder = Path(cached or "the hub's cache")
        remedy = f"fetch it under the same HF_HOME, where there is a network, with: {prefetch}"
    elif model.builtin is not None:
        folder = builtin_folder(model.builtin)
        remedy = "install the sdwn that it came with, or plan into a new folder"
        # Which is whole; settings beside its weights are written otherwise by each diffusers.
        own = [file for file in own if file.file.endswith(weights.SAFETENSORS)]
    elif lock.single_file is not None:
        remedy = f"convert the file again with: {prefetch}"
        if not folder.is_dir() and (fault := lock.single_file.difference(Path(model.name))):
            remedy = f"bring {model.name} back ({fault})"
    for file in own:
        file.require(folder / file.file, f"{remedy} (model {model.name})")
    for one in lock.added:
        remedy = "bring it back, or plan into a new folder"
        if one.commit:
            remedy = f"fetch it again with: {prefetch}"
        for file in one.files:
            file.require(one.root / file.file, f"{remedy} (model.{one.setting} {one.name})")
    return Weights(folder, lock.revision, tuple(lock.added))


def lock_to_classifier(paths: RunPaths, config: RunConfig, file: Path) -> None:
    """Record in a run's lock, if it has one, the file of weights that its classifier has now."""
    if (lock := read_lock(paths, config.model)) is None:
        return
    if config.evaluation.checkpoint is not None:
        found = LockedFile.of(file, str(file))
    else:
        found = LockedFile(file=str(file), bytes=file.stat().st_size)
    locked = LockedClassifier(model=config.evaluation.model, weights=found)
    write_lock(paths, lock.model_copy(update={"classifier": locked}))


def require_classifier(paths: RunPaths, config: RunConfig) -> None:
    """Refuse a checkpoint that has changed since the run was locked to it."""
    lock, chosen = read_lock(paths, config.model), config.evaluation
    locked = lock.classifier if lock else None
    if locked is None or chosen.checkpoint is None:
        return
    # The evaluation's settings may change: another classifier than the lock's is no fault.
    if (locked.model, locked.weights.file) == (chosen.model, str(chosen.checkpoint)):
        anew = command("prefetch", paths.root)
        remedy = f"bring it back, or use it as it is now with: {anew}"
        locked.weights.require(chosen.checkpoint, remedy)


def copy_lock(paths: RunPaths, other: RunPaths) -> None:
    """Copy a run's lock to another run folder of the same model."""
    if paths.lock.exists():
        write_text(other.lock, paths.lock.read_text(encoding="utf-8"))


def common_revision(runs: Sequence[RunPaths], model: ModelConfig) -> str | None:
    """Return the revision that the first of runs with a lock is locked to; None without one."""
    locks = (read_lock(paths, model) for paths in runs)
    return next((lock.revision for lock in locks if lock is not None), None)
