"""The probe: a compute node's report about itself, compared with what a run needs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.filesize import decimal

import sdwn
from sdwn.config import EvaluationConfig, RunConfig
from sdwn.devices.device import Device
from sdwn.errors import IntegrityError, SdwnError
from sdwn.io import read_json, writable_cache, write_text
from sdwn.jobs import scheduler
from sdwn.jobs.cluster import gives_gpu
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.task import Stage
from sdwn.models import weights
from sdwn.models.lock import require_weights
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import Plan, read_plan
from sdwn.preflight.findings import Finding

PACKAGES = ("submitit", "h5py", "torch", "diffusers", "transformers", "accelerate")
CODE = Path(sdwn.__file__).parent
OFFLINE = "HF_HUB_OFFLINE"
# An HDF5 file was written and read, but only with HDF5_USE_FILE_LOCKING=FALSE.
NO_LOCKS = "no locks"


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node's report about itself."""

    token: str  # what the login node wrote, as it is read here
    node: str
    python: str
    python_version: str
    sdwn: str
    code: str  # where its sdwn lies
    missing: tuple[str, ...]  # of PACKAGES
    cpus: int
    memory_bytes: int  # what a task may use
    gpus: tuple[str, ...]  # as nvidia-smi lists them
    device: str | None  # torch's; None where torch was not asked
    weights: str | None  # where they lie; None where they were not found
    classifier: str | None  # its weights' file, "" if it cannot be loaded, None if not asked for
    offline: bool  # whether HF_HUB_OFFLINE keeps tasks from the hub
    cache: str
    cache_seen: bool  # whether the login node's token is in the cache
    hdf5: str  # "" where an HDF5 file was written and read, NO_LOCKS, or an error
    cache_fault: str = ""  # why the cache cannot be written; "" where it can


def report_node(run: Path, indices: Iterable[int], _: int | None = None) -> None:
    """Write what this node sees into the run's folder: the stage that a probe's job runs.

    Raises:
        SdwnError: the node does not see what the login node wrote.
    """
    if not list(indices):
        return  # one process of a task is enough
    paths = RunPaths(run)
    # A machine may be several nodes.
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        token = paths.probe.token.read_text(encoding="utf-8")
    except OSError as error:
        raise SdwnError(
            f"{node} does not see what the login node wrote: {error}; "
            "plan into a folder that compute nodes share"
        ) from None
    config = read_plan(paths).config
    missing = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)
    # Plain noise is drawn without torch.
    uses_torch = config.model.builtin != "noise" and "torch" not in missing
    report = NodeReport(
        token=token,
        node=node,
        python=sys.executable,
        python_version=platform.python_version(),
        sdwn=sdwn.__version__,
        code=str(CODE),
        missing=missing,
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=Device(gpu=False).usable_bytes,
        gpus=tuple(scheduler.output_lines(["nvidia-smi", "--list-gpus"], 20) or ()),
        device=Device().name if uses_torch else None,
        weights=_find_weights(paths, config),
        classifier=None if missing else _find_classifier(config.evaluation),
        offline=hub_is_off(os.environ.get(OFFLINE, "")),
        cache=str(cache_folder()),
        cache_seen=(cache_folder() / token).is_file(),
        hdf5="h5py is missing" if "h5py" in missing else hdf5_fault(paths.probe.root / "probe.h5"),
        cache_fault=cache_fault(),
    )
    write_text(paths.probe.answers, json.dumps(asdict(report), indent=2) + "\n")


PROBE = Stage("probe", report_node)


def read_report(path: Path) -> NodeReport:
    """Read a node's report.

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


def hub_is_off(value: str) -> bool:
    """Return whether HF_HUB_OFFLINE has a value that its library takes for yes."""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def cache_fault() -> str:
    """Return why the cache's folder cannot be written, "" where it can."""
    try:
        writable_cache()
    except SdwnError as error:
        return str(error)
    return ""


def hdf5_fault(path: Path) -> str:
    """Write and read an HDF5 file; return what is wrong, "" if nothing is."""
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
        return (NO_LOCKS if faults else "") if whole else "what was written is not what is read"
    return faults[0]


def _find_weights(paths: RunPaths, config: RunConfig) -> str | None:
    if config.model.builtin is not None:
        return config.model.name
    try:
        return str(require_weights(paths, config))
    except SdwnError:
        return None


def _find_classifier(chosen: EvaluationConfig) -> str:
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    try:
        return str(find_classifier(chosen.model, chosen.checkpoint) or "")
    except SdwnError:
        return ""


def check_node(report: NodeReport, plan: Plan, profile: ClusterProfile) -> list[Finding]:
    """Compare a node's report with what a run needs there."""
    return [
        _node_python(report),
        *_node_device(report, plan, profile),
        Finding("run folder", "ok", f"{report.node} sees it, writes to it and renames there"),
        *_node_weights(report, plan.config),
        _node_locks(report),
        _node_cache(report),
    ]


def _node_python(report: NodeReport) -> Finding:
    text = f"{report.node}: Python {report.python_version} ({report.python}), sdwn {report.sdwn}"
    memory = f"{report.cpus} CPUs, {decimal(report.memory_bytes)} of memory free"
    if report.missing:
        text += f", but no {', '.join(report.missing)}; install them there, or set python, setup"
        return Finding("node", "problem", text)
    if (report.sdwn, Path(report.code)) != (sdwn.__version__, CODE):
        text += f" in {report.code}; here it is {sdwn.__version__} in {CODE}; {memory}"
        return Finding("node", "warning", text)
    return Finding("node", "ok", f"{text}; {memory}")


def _node_device(report: NodeReport, plan: Plan, profile: ClusterProfile) -> Iterator[Finding]:
    needed, device = plan.config.needs_gpu, report.device
    if device == "cpu" and (needed or gives_gpu(profile)):
        seen = f"though nvidia-smi lists {report.gpus[0]}" if report.gpus else "nor does nvidia-smi"
        text = (
            f"a GPU is asked for and torch on {report.node} sees none, {seen}: tasks would work "
            "on the CPU, many times slower; install a torch built for its CUDA, or load its "
            "modules in setup"
        )
        yield Finding("device", "problem" if needed else "warning", text)
    elif device is not None:
        yield Finding("device", "ok", f"torch on {report.node} has {device}")


def _node_weights(report: NodeReport, config: RunConfig) -> Iterator[Finding]:
    node, chosen = report.node, config.evaluation
    if report.weights is not None:
        yield Finding("weights", "ok", f"{node} finds {report.weights}")
    else:
        lost = report.offline or weights.source(config.model) != "hub"
        text = f"{node} does not find {config.model.name}; put it into a folder or a cache that "
        text += "nodes share (HF_HOME): sdwn prefetch CONFIG"
        yield Finding("weights", "problem" if lost else "warning", text)
    if report.classifier:
        yield Finding("classifier", "ok", f"{node} finds {report.classifier}")
    elif report.classifier is not None:
        put = "its weights into a cache that nodes share (HF_HOME, TORCH_HOME): sdwn prefetch RUN"
        if chosen.checkpoint:
            put = f"{chosen.checkpoint} into a folder that nodes share"
        text = f"{node} cannot load {chosen.model}, which evaluates the release; put {put}"
        yield Finding("classifier", "warning", text)


def _node_locks(report: NodeReport) -> Finding:
    if not report.hdf5:
        text = f"{report.node} writes and reads HDF5 files in the run folder"
        return Finding("locks", "ok", text)
    text = f"{report.node} cannot write HDF5 files there: {report.hdf5}"
    if report.hdf5 == NO_LOCKS:
        text = f"{report.node} opens HDF5 files only without locks; set "
        text += 'HDF5_USE_FILE_LOCKING: "FALSE" in the profile\'s environment'
    return Finding("locks", "problem", text)


def _node_cache(report: NodeReport) -> Finding:
    if report.cache_fault:
        return Finding("cache", "warning", f"{report.node}: {report.cache_fault}")
    if report.cache_seen:
        return Finding("cache", "ok", f"{report.node} sees this machine's, in {report.cache}")
    text = f"{report.node} has another one in {report.cache}, without what is tuned or prefetched "
    text += "here; set SDWN_CACHE to a shared folder, here and in the profile's environment"
    return Finding("cache", "warning", text)
