"""The probe: a stage that looks at a compute node as a task would, and says what is there."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import socket
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import sdwn
from sdwn.config import EvaluationConfig, RunConfig
from sdwn.devices import memory
from sdwn.errors import IntegrityError, SdwnError
from sdwn.io import read_json, writable_cache, write_text
from sdwn.jobs import scheduler
from sdwn.models import weights
from sdwn.models.lock import locked_weights
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import read_plan

PACKAGES = ("submitit", "h5py", "torch", "diffusers", "transformers", "accelerate")
OFFLINE = "HF_HUB_OFFLINE"
NO_LOCKS = "no locks"
FINE = ""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node says of itself.

    ``token`` is what the login node wrote, as it is read here; ``cache`` the cache's folder, and
    ``cache_seen`` whether the login node's token is in it; ``cache_fault`` is "" where the node
    writes to it. ``hdf5`` is "" where an HDF5 file was
    written and read, ``NO_LOCKS`` where that takes HDF5_USE_FILE_LOCKING=FALSE, else an error.
    ``device`` is torch's, None where torch was not asked; ``gpus`` is nvidia-smi's answer;
    ``weights`` is where they lie, None where they were not found; ``classifier`` is its weights'
    file, "" where it cannot be loaded, None where it was not asked for. ``offline`` tells whether
    HF_HUB_OFFLINE keeps tasks from the hub.
    """

    token: str
    node: str
    python: str
    python_version: str
    sdwn: str
    code: str
    missing: tuple[str, ...]
    cpus: int
    memory_bytes: int
    gpus: tuple[str, ...]
    device: str | None
    weights: str | None
    classifier: str | None
    offline: bool
    cache: str
    cache_seen: bool
    hdf5: str
    cache_fault: str = FINE


def look_around(run: Path, indices: Iterable[int]) -> None:
    """Look at this node, and leave what is found in the run's folder for whoever asked."""
    if not list(indices):
        return  # one process of a task is enough
    paths = RunPaths(run)
    token = read_token(paths.probe.token)
    write_text(paths.probe.answers, json.dumps(asdict(_report(paths, token)), indent=2) + "\n")


def hub_is_off(value: str) -> bool:
    """Read the hub's own variable as its library does."""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def read_token(path: Path) -> str:
    """Read what the login node wrote.

    Raises:
        SdwnError: it is not to be seen from here.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SdwnError(
            f"{_node()} does not see what the login node wrote: {error}; "
            "plan into a folder that compute nodes share"
        ) from None


def read_report(path: Path) -> NodeReport:
    """Read a node's answer.

    Raises:
        IntegrityError: there is none, or it is of another version.
    """
    content = read_json(path)
    try:
        values = {field.name: content[field.name] for field in fields(NodeReport)}
    except KeyError as error:
        raise IntegrityError(
            f"{path}: expected {error}, found nothing: the node has another sdwn"
        ) from None
    listed = {name: tuple(values[name]) for name in ("missing", "gpus")}
    return NodeReport(**{**values, **listed})


def _report(paths: RunPaths, token: str) -> NodeReport:
    config = read_plan(paths).config
    missing = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)
    return NodeReport(
        token=token,
        node=_node(),
        python=sys.executable,
        python_version=platform.python_version(),
        sdwn=sdwn.__version__,
        code=str(Path(sdwn.__file__).parent),
        missing=missing,
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory.usable(),
        gpus=tuple(scheduler.run(["nvidia-smi", "--list-gpus"], 20) or ()),
        device=_device(config) if "torch" not in missing else None,
        weights=_weights(paths, config),
        classifier=None if missing else _classifier(config.evaluation),
        offline=hub_is_off(os.environ.get(OFFLINE, "")),
        cache=str(cache_folder()),
        cache_seen=(cache_folder() / token).is_file(),
        hdf5="h5py is missing" if "h5py" in missing else hdf5_fault(paths.probe.root / "probe.h5"),
        cache_fault=cache_fault(),
    )


def cache_fault() -> str:
    """Return why the cache's folder cannot be written, "" where it can."""
    try:
        writable_cache()
    except SdwnError as error:
        return str(error)
    return FINE


def _node() -> str:
    # A machine may be several nodes.
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _weights(paths: RunPaths, config: RunConfig) -> str | None:
    if config.model.builtin is not None:
        return config.model.name
    try:
        locked = locked_weights(paths, config.model)
        return str(locked.folder if locked else weights.located(config))
    except SdwnError:
        return None


def _classifier(chosen: EvaluationConfig) -> str:
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    try:
        return str(find_classifier(chosen.model, chosen.checkpoint) or "")
    except SdwnError:
        return ""


def _device(config: RunConfig) -> str | None:
    if config.model.builtin == "noise":
        return None  # which needs no torch
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def hdf5_fault(path: Path) -> str:
    """Write and read an HDF5 file; say what is wrong, "" if nothing is."""
    import h5py

    faults = []
    for locking in (None, False):
        try:
            with h5py.File(path, "w", locking=locking) as file:
                file["token"] = 1
            with h5py.File(path, "r", locking=locking) as file:
                whole = file["token"][()] == 1
        except OSError as error:
            faults.append(" ".join(str(error).split()))
            continue
        path.unlink()
        return (NO_LOCKS if faults else FINE) if whole else "what was written is not what is read"
    return faults[0]
