"""Weights on the node's own disk: copied there once, where that is asked for."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from pathlib import Path

from sdwn.errors import UsageError
from sdwn.io import open_append, private_folder
from sdwn.models.weights import files, size
from sdwn.paths import STAGE_VARIABLE

log = logging.getLogger(__name__)


def staged_if_asked(folder: Path) -> Path:
    """Copy a pipeline's folder where :data:`STAGE_VARIABLE` says; else, or if it fails, keep it."""
    wanted = os.environ.get(STAGE_VARIABLE, "")
    if not wanted:
        return folder
    target = Path(os.path.expandvars(wanted)).expanduser()
    if "$" in str(target) or not target.is_absolute():
        log.warning("weights are not staged: %s is no folder on this node", target)
        return folder
    try:
        return staged(folder, target)
    except (OSError, UsageError) as error:
        # Slower, but no reason to stop.
        log.warning("weights are not staged: %s", error)
        return folder


def staged(folder: Path, target: Path) -> Path:
    """Copy a pipeline's folder below ``target`` unless the same copy is there; return the copy.

    Processes of one node that start together copy once: a lock of the node's own disk. A node's
    disk is everybody's, so the copy lies in a folder that no other user can put weights into.

    Raises:
        UsageError: another user could have filled that folder.
    """
    copy = private_folder(target) / f"{folder.name}-{_state(folder)}"
    with open_append(copy.with_name(f".{copy.name}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever tidies a node's disk may have taken files away.
        if any(size(copy / name) != size(folder / name) for name in files(folder)):
            shutil.rmtree(copy, ignore_errors=True)
            _copy(folder, copy)
    return copy


def _copy(folder: Path, copy: Path) -> None:
    unfinished = copy.with_name(f".{copy.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for name in files(folder):
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, unfinished / name)
        unfinished.rename(copy)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _state(folder: Path) -> str:
    stats = ((name, (folder / name).stat()) for name in files(folder))
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256(os.fsencode("\n".join([str(folder), *lines]))).hexdigest()[:16]
