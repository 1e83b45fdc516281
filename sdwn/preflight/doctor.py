"""The doctor: checks of a run before it is submitted, of its site, and of a compute node.

A check yields findings, or none where it has nothing to say. :data:`CHECKS` are made where the
command runs; :func:`report_node` makes those of a node, by a short job there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.filesize import decimal

import sdwn
from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.config import RunConfig
from sdwn.devices.device import Device
from sdwn.errors import IntegrityError, SdwnError, UsageError, command, counted, duration
from sdwn.io import read_json, writable_cache, write_text
from sdwn.jobs import scheduler
from sdwn.jobs.journal import unfinished_shards
from sdwn.jobs.profile import ClusterProfile, LaterStage, gives_gpu, job_script, minutes
from sdwn.jobs.scheduler import Partition, is_full, read_partitions, site_config, user
from sdwn.jobs.submit import require_fit
from sdwn.jobs.task import Stage
from sdwn.models import weights
from sdwn.models.families import FAMILIES, PipelineInfo, check_settings
from sdwn.models.lock import require_classifier, require_weights
from sdwn.models.pipeline import TEXT_PARTS, fitting_placement, weights_bytes
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import Plan, read_plan
from sdwn.preflight.estimate import Estimate, estimate
from sdwn.wordnet.taxonomy import open_taxonomy

# What keeps a job from starting, a short one too.
STOPPING = ("slurm", "sbatch", "run folder")

FOLDERS = ("SDWN_CACHE", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME")
OFFLINE = "HF_HUB_OFFLINE"
YES = ("1", "ON", "YES", "TRUE")  # to the hub's library

# Folders that every node has one of its own of.
OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")

COMMANDS = ("sbatch", "srun", "squeue", "scancel")
# On a busy controller, finding when a job would start takes its time.
TEST_SECONDS = 30
# What a profile asks sbatch for.
REQUEST = (
    *("account", "partition", "qos", "time", "gres", "gpus_per_node", "cpus_per_task", "mem"),
    *("mem_per_cpu", "mem_per_gpu", "constraint", "nodelist", "exclude", "reservation", "sbatch"),
)
PACKAGES = ("submitit", "h5py", "torch", "diffusers", "transformers", "accelerate")
CODE = str(Path(sdwn.__file__).parent)
SHARE = "put it into a folder that nodes share"
SHARED_WEIGHTS = "put what this machine has where nodes see it too (HF_HOME, TORCH_HOME)"
# An HDF5 file was written and read, but only with HDF5_USE_FILE_LOCKING=FALSE.
NO_LOCKS = "no locks"

CARDS_GB = (16, 24, 40, 80)
# By the ways of placing weights on a card.
PLACED = {
    "gpu": "the denoiser and the VAE fit",
    "offload": "they fit one at a time (placement offload)",
    "layers": "only single layers fit, slowly (placement offload)",
}

Verdict = Literal["ok", "warning", "problem", "unverified"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; a problem stops the run, what is unverified may."""

    subject: str
    verdict: Verdict
    text: str


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that would stop the run."""
    return [finding for finding in findings if finding.verdict == "problem"]


# --- Of the run ----------------------------------------------------------------------------------
def check_run(
    paths: RunPaths,
    plan: Plan,
    profile: ClusterProfile,
    then: Sequence[LaterStage] | None = None,
    takes: Estimate | None = None,
) -> list[Finding]:
    """Check all that can be known from here before a run is submitted under a profile.

    ``then`` are the stages that are submitted behind it, None where that is not known; ``takes``
    is the estimate of what is submitted, if there is one already.
    """
    run = _Run(paths, plan, profile, then, takes)
    return [finding for check in CHECKS for finding in check(run)]


@dataclass(frozen=True)
class _Run:
    paths: RunPaths
    plan: Plan
    profile: ClusterProfile
    then: Sequence[LaterStage] | None
    takes: Estimate | None

    @cached_property
    def weights(self) -> Path | SdwnError:
        """The folder of the weights, or why there is none that the run may use."""
        try:
            return require_weights(self.paths, self.plan.config)
        except SdwnError as error:
            return error

    @property
    def slurm(self) -> bool:
        """True if tasks run on other machines."""
        return self.profile.executor == "slurm"

    def variable(self, name: str) -> str:
        """Return a variable as the tasks have it."""
        return self.profile.environment.get(name, os.environ.get(name, ""))

    @property
    def differing(self) -> list[str]:
        """The variables that decide where files are found, if tasks have other values."""
        return [name for name in FOLDERS if self.variable(name) != os.environ.get(name, "")]


def _shared(run: _Run, subject: str, path: Path, advice: str, name: str = "") -> Finding:
    """Warn of a path that compute nodes most likely do not see."""
    folder = path.expanduser().resolve()
    for own in OWN_FOLDERS if run.slurm else ():
        if folder.is_relative_to(own):
            text = f"{folder} is below {own}: compute nodes probably do not see it; {advice}"
            return Finding(subject, "warning", text)
    return Finding(subject, "ok", str(path) if name in ("", str(path)) else f"{name} in {path}")


def _site(run: _Run) -> Iterator[Finding]:
    try:
        require_fit(run.plan.config, run.profile)
    except UsageError as error:
        yield Finding("fit", "problem", str(error))
    else:
        given = "the profile asks for one" if run.slurm else "this machine has one to use"
        needs = f"a GPU and {given}" if run.plan.config.needs_gpu else "no GPU"
        yield Finding("fit", "ok", f"the plan needs {needs}")
    if run.slurm:
        yield from check_site(read_partitions(), run.profile)


def _run_folder(run: _Run) -> Iterator[Finding]:
    """Find a folder, a disk or a time limit under which nothing would be finished."""
    root = run.paths.root.resolve()
    if not os.access(root, os.W_OK | os.X_OK):
        text = f"{root} cannot be written to; plan into a folder of yours"
        yield Finding("run folder", "problem", text)
    else:
        yield _shared(run, "run folder", root, "plan into a folder that they share")
    todo = unfinished_shards(run.paths, run.plan)
    found = run.takes or estimate(run.paths, run.plan, todo, run.profile)
    stuck = [cost.warning or "" for cost in found.costs if cost.stuck]
    if stuck:
        every = len(stuck) == len(found.costs)
        yield Finding("progress", "problem" if every else "warning", stuck[0])
    need, free = found.bytes, shutil.disk_usage(root).free
    text = f"{found.images:,} images need about {decimal(need)} ({found.bytes_source}); "
    text += f"{decimal(free)} free on the disk, where a quota may allow you less"
    verdict: Verdict = "ok"
    if need > free:
        verdict, text = "problem", f"{text}: free some, or plan into a folder on a larger disk"
    elif 2 * need > free:
        verdict, text = "warning", f"{text}: a release takes as much again, so write it elsewhere"
    yield Finding("space", verdict, text)


def _weights(run: _Run) -> Iterator[Finding]:
    model, found = run.plan.config.model, run.weights
    here = not isinstance(found, SdwnError)
    if model.builtin == "noise" or (model.builtin and here):
        yield Finding("weights", "ok", f"{model.name} is built in")
    elif not isinstance(found, SdwnError):
        yield _shared(run, "weights", found, SHARE, model.name)
    elif run.paths.lock.exists() or isinstance(found, UsageError) or weights.source(model) != "hub":
        yield Finding("weights", "problem", str(found))
    else:
        offline = run.variable(OFFLINE).upper() in YES
        text = f"{found}: every task would ask the hub for it"
        if offline:
            text = f"{found}, and {OFFLINE} keeps tasks from the hub"
        text += f"; get it where there is a network: {command('prefetch', run.paths.root)}"
        verdict: Verdict = "problem" if offline else "warning"
        yield Finding("weights", "unverified" if run.differing else verdict, text)


def _settings(run: _Run) -> Iterator[Finding]:
    """Find what would end every task at its start, after its wait in the queue."""
    if isinstance(run.weights, SdwnError):
        return
    try:
        idle = check_settings(run.plan.config, run.weights, begun=run.paths.begun)
    except SdwnError as error:
        yield Finding("settings", "problem", str(error))
        return
    if idle:
        yield Finding("settings", "warning", f"{idle[0]}; the run goes on as it began")
    else:
        yield Finding("settings", "ok", "the model takes the config's settings of generation")


def _memory(run: _Run) -> Iterator[Finding]:
    """Check on which cards the model fits, before anything is loaded."""
    config, profile = run.plan.config, run.profile
    if isinstance(run.weights, SdwnError) or config.model.builtin is not None:
        return
    sizes = weights_bytes(run.weights, config)
    text = ", ".join(f"{name} {decimal(size)}" for name, size in sizes.items())
    text += f" in {config.generation.precision}"
    if PipelineInfo(run.weights).kind in FAMILIES:
        # Prompts are encoded first, and the text encoders let go.
        sizes = {name: size for name, size in sizes.items() if not name.startswith(TEXT_PARTS)}

    def way(card_gb: int) -> str:
        return PLACED[fitting_placement(sizes.values(), card_gb * 1e9)]

    for words in PLACED.values():
        if cards := [str(gb) for gb in CARDS_GB if way(gb) == words]:
            text += f"; on cards of {', '.join(cards)} GB {words}"
    verdict: Verdict = "ok"
    if card := re.search(r"(\d+)gb?\b", profile.gpu_kind or "", re.IGNORECASE):
        text += f"; on {profile.gpu_kind} {way(int(card[1]))}"
        if profile.placement == "gpu" and way(int(card[1])) != PLACED["gpu"]:
            verdict, text = "problem", f"{text}, and the profile has placement gpu: set auto"
    yield Finding("memory", verdict, text)


def _classifier(run: _Run) -> Iterator[Finding]:
    """Find what would end the evaluation, after all images are made."""
    if run.then is not None and "evaluate" not in run.then:
        return
    from sdwn.evaluation.evaluate import require_evaluable
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    chosen, wnids = run.plan.config.evaluation, run.plan.table["wnid"]
    if wnids.null_count == len(wnids) and ":" not in chosen.model:
        return  # There is nothing to compare predictions with.
    try:
        require_evaluable(chosen, lambda: open_taxonomy(run.paths.taxonomy))
        require_classifier(run.paths, run.plan.config)
        file = find_classifier(chosen.model, chosen.checkpoint)
    except SdwnError as error:
        yield Finding("classifier", "problem", str(error))
        return
    if file is not None:
        yield _shared(run, "classifier", file, SHARE, chosen.model)
        return
    text = f"the weights of {chosen.model}, which evaluates the release, are not on this machine; "
    text += f"get them where there is a network: {command('prefetch', run.paths.root)}"
    # A run may be evaluated elsewhere, or not at all.
    verdict: Verdict = "warning" if run.then is None else "problem"
    yield Finding("classifier", "unverified" if run.differing else verdict, text)


def _nodes(run: _Run) -> Iterator[Finding]:
    """Find what tasks may see otherwise than this command."""
    if run.differing:
        text = f"tasks have another {' and '.join(run.differing)} than this shell, and find other "
        text += "files there than it; export the same here"
        yield Finding("environment", "warning", text)
    if fault := _cache_fault():
        yield Finding("cache", "warning", fault)
    elif run.slurm:
        advice = "set SDWN_CACHE to a folder that they share"
        yield _shared(run, "cache", cache_folder(), advice)
    if run.slurm:
        text = "whether compute nodes see RUN, weights and cache, and what Python, memory, device "
        text += "and file locks they have: ask one with --probe"
        yield Finding("node", "unverified", text)


def _cache_fault() -> str:
    """Return why the cache's folder cannot be written, "" where it can."""
    try:
        writable_cache()
    except SdwnError as error:
        return str(error)
    return ""


CHECKS = (_site, _run_folder, _weights, _settings, _memory, _classifier, _nodes)


# --- Of the site ---------------------------------------------------------------------------------
def check_site(partitions: Mapping[str, Partition], profile: ClusterProfile) -> Iterator[Finding]:
    """Compare a profile with a site, and have sbatch say whether it would take a task."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        text = f"expected a SLURM cluster, found no {', '.join(absent)} on this machine; run it on"
        yield Finding("slurm", "problem", f"{text} a login node, or use --profile local")
        return
    if not partitions and scheduler.squeue() is None:
        text = "the SLURM controller does not answer; try again later, or ask your site"
        yield Finding("slurm", "problem", text)
        return
    yield Finding("slurm", "ok", f"version {site_config().get('SLURM_VERSION', 'unknown')}")
    names = (profile.partition or "").replace(" ", "").split(",")
    chosen = [
        one
        for one in partitions.values()
        if (one.name in names if profile.partition else one.default)
    ]
    # sbatch takes a time beyond the partition's, and the task waits for ever.
    wanted = minutes(profile.time)
    limits = {one.name: one.time_min for one in chosen if one.time_min}
    short = {name: most for name, most in limits.items() if most < wanted}
    text = f"a task asks for {duration(60 * wanted)}"
    if short:
        name, most = max(short.items(), key=lambda one: one[1])
        text += f" and may take {duration(60 * most)}, the MaxTime of partition {name}: it would "
        text += "wait for ever; lower time"
        # Another partition may take it, and a QOS may go beyond the partition's.
        certain = len(short) == len(chosen) and profile.qos is None
        yield Finding("time", "problem" if certain else "warning", text)
    else:
        each = [f"{duration(60 * most)} is the MaxTime of {name}" for name, most in limits.items()]
        yield Finding("time", "ok", f"{text}; {', '.join(each) or 'no limit is known'}")
    # Beside a refusal stands what the site has: without the partition, all of it.
    shown = chosen or list(partitions.values())
    have = "; ".join(map(_partition_nodes, shown)) or "sinfo lists no nodes"
    refusal = sbatch_refusal(profile)
    if refusal is None:
        yield Finding("sbatch", "unverified", f"sbatch --test-only does not answer; {have}")
    elif not refusal:
        yield Finding("sbatch", "ok", f"sbatch takes a task; {have}")
    else:
        fields = profile.record().items()
        asks = ", ".join(f"{name} {value}" for name, value in fields if name in REQUEST)
        text = f"sbatch takes no such task: {refusal}; the profile asks for "
        text += f"{asks or 'no resources'}; {have}; see your accounts with: "
        text += f"sacctmgr show associations user={user()} format=account,partition,qos"
        # In the same words SLURM refuses what no node has and what only drained nodes have.
        down = any(kind.usable < kind.nodes for partition in shown for kind in partition.nodes)
        drained = down and "node" in refusal.lower()
        yield Finding("sbatch", "warning" if drained else "problem", text)


def sbatch_refusal(profile: ClusterProfile) -> str | None:
    """Return why sbatch would take no task under a profile, "" if it would, None if unknown."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.sh"
        path.write_text(job_script(1, Path(folder), profile), encoding="utf-8")
        try:
            done = scheduler.call(["sbatch", "--test-only", str(path)], TEST_SECONDS)
        except (OSError, subprocess.SubprocessError):
            return None
    # A queue that is full now says nothing of the profile.
    if not done.returncode or is_full(done.stderr):
        return ""
    reasons = re.findall(r"(?:error|failure): (.*)", done.stderr)
    return "; ".join(dict.fromkeys(reasons)) or None


def _partition_nodes(partition: Partition) -> str:
    """Describe a partition's nodes, kind by kind."""
    kinds = []
    for kind in partition.nodes:
        gpus = [f"{count} {name or 'GPU'}" for name, count in sorted(kind.gpus.items())]
        has = ", ".join([f"{kind.cpus:,} CPUs", f"{kind.memory_mb:,} MB", *gpus])
        down = f" ({kind.nodes - kind.usable:,} down or drained)" * (kind.usable < kind.nodes)
        kinds.append(f"{counted(kind.nodes, 'node')} with {has}{down}")
    return f"{partition.name} has {' and '.join(kinds) or 'no nodes'}"


# --- Of a compute node, by a short job -----------------------------------------------------------
def probe_question(token: str, profile: ClusterProfile) -> dict[str, Any]:
    """Return what a node is told of this machine, to compare itself with it."""
    return {"token": token, "gpu": gives_gpu(profile), "sdwn": sdwn.__version__, "code": CODE}


def report_node(folder: Path, indices: Iterable[int], _: TaskOptions = NO_OPTIONS) -> None:
    """Write what this node finds into the probe's folder, which lies in the run's.

    Raises:
        SdwnError: the node does not see what the login node wrote.
    """
    if not list(indices):
        return  # one process of a task is enough
    probe = RunPaths(folder)
    # A machine may be several nodes.
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        question = read_json(probe.question)
    except IntegrityError as error:
        raise SdwnError(
            f"{node} does not see what the login node wrote: {error}; "
            "plan into a folder that compute nodes share"
        ) from None
    found = [asdict(finding) for finding in check_node(RunPaths(folder.parent), node, question)]
    answers = {"token": question["token"], "findings": found}
    write_text(probe.answers, json.dumps(answers, indent=2) + "\n")


PROBE = Stage("probe", report_node)


def check_node(paths: RunPaths, node: str, question: dict[str, Any]) -> Iterator[Finding]:
    """Check the node that this runs on, given what :func:`probe_question` tells of the other."""
    plan = read_plan(paths)
    config, here = plan.config, _Run(paths, plan, ClusterProfile(executor="local"), None, None)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    memory = decimal(Device(gpu=False).usable_bytes)
    has = f"{len(os.sched_getaffinity(0))} CPUs, {memory} of memory free"
    text = f"{node}: Python {platform.python_version()} ({sys.executable}), sdwn {sdwn.__version__}"
    verdict: Verdict = "ok"
    if missing:
        verdict, has = "problem", "install them there, or set python, setup"
        text += f", but no {', '.join(missing)}"
    elif (question["sdwn"], question["code"]) != (sdwn.__version__, CODE):
        verdict = "warning"
        text += f" in {CODE}; the command's is {question['sdwn']} in {question['code']}"
    yield Finding("node", verdict, f"{text}; {has}")
    # Plain noise is drawn without torch.
    if config.model.builtin != "noise" and "torch" not in missing:
        yield _node_device(node, config, question["gpu"])
    yield Finding("run folder", "ok", f"{node} sees it, writes to it and renames there")
    for one in (*_weights(here), *(() if missing else _classifier(here))):
        share = "" if one.verdict == "ok" else f"; {SHARED_WEIGHTS}"
        yield replace(one, text=f"{node}: {one.text}{share}")
    fault = "h5py is missing" if "h5py" in missing else hdf5_fault(paths.probe.root / "probe.h5")
    text = f"{node} writes and reads HDF5 files in the run folder"
    if fault == NO_LOCKS:
        text = f"{node} opens HDF5 files only without locks; set "
        text += 'HDF5_USE_FILE_LOCKING: "FALSE" in the profile\'s environment'
    elif fault:
        text = f"{node} cannot write HDF5 files there: {fault}"
    yield Finding("locks", "problem" if fault else "ok", text)
    if fault := _cache_fault():
        yield Finding("cache", "warning", f"{node}: {fault}")
    elif (cache_folder() / question["token"]).is_file():
        yield Finding("cache", "ok", f"{node} sees this machine's, in {cache_folder()}")
    else:
        text = f"{node} has another one in {cache_folder()}, without what is tuned or prefetched "
        text += "here; set SDWN_CACHE to a shared folder, here and in the profile's environment"
        yield Finding("cache", "warning", text)


def _node_device(node: str, config: RunConfig, gpu: bool) -> Finding:
    device = Device().name
    if device != "cpu" or not (config.needs_gpu or gpu):
        return Finding("device", "ok", f"torch on {node} has {device}")
    gpus = scheduler.output_lines(["nvidia-smi", "--list-gpus"], 20)
    seen = f"though nvidia-smi lists {gpus[0]}" if gpus else "nor does nvidia-smi"
    text = f"a GPU is asked for and torch on {node} sees none, {seen}: tasks would work on the "
    text += "CPU, many times slower; install a torch built for its CUDA, or load its modules in "
    text += "setup"
    return Finding("device", "problem" if config.needs_gpu else "warning", text)


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
