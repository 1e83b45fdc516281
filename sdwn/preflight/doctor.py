"""The doctor: checks of a run before it is submitted, of its site, and of a compute node.

:data:`CHECKS` are made where the command runs, :data:`NODE_CHECKS` by a short job on a node. A
check returns its verdict and text, None where it has nothing to say, or raises the problem.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.filesize import decimal

import sdwn
from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.devices.device import Device
from sdwn.errors import SdwnError, UsageError, command, duration, shell
from sdwn.io import read_json, writable_cache, write_text
from sdwn.jobs import scheduler
from sdwn.jobs.journal import unfinished_shards
from sdwn.jobs.profile import SBATCH_FIELDS, ClusterProfile, LaterStage, job_script, minutes
from sdwn.jobs.scheduler import Partition, is_full, read_partitions, site_config, user
from sdwn.jobs.task import Stage
from sdwn.models import weights
from sdwn.models.families import FAMILIES, PipelineInfo, check_settings
from sdwn.models.lock import locked_weights, require_classifier
from sdwn.models.pipeline import TEXT_PARTS, fitting_placement, weights_bytes
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, read_plan
from sdwn.preflight.estimate import Estimate, estimate
from sdwn.wordnet.taxonomy import open_taxonomy

FOLDERS = ("SDWN_CACHE", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME")
OFFLINE = "HF_HUB_OFFLINE"
YES = ("1", "ON", "YES", "TRUE")  # to the hub's library

# Folders that every node has one of its own of.
OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")

COMMANDS = ("sbatch", "srun", "squeue", "scancel")
# On a busy controller, finding when a job would start takes its time.
TEST_SECONDS = 30
OUT_OF_USE = ("sinfo", "--noheader", "--states=down,drain,fail,unknown", "--format=%N")
SHARE = "put it into a folder that nodes share"
CARDS_GB = (16, 24, 40, 80)
Verdict = Literal["ok", "warning", "problem", "unverified"]
Said = tuple[Verdict, str]
Check = Callable[["_Run"], Said | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; a problem stops the run, what is unverified may."""

    subject: str
    verdict: Verdict
    text: str


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that would stop the run."""
    return [finding for finding in findings if finding.verdict == "problem"]


def check_run(
    paths: RunPaths, plan: Plan, profile: ClusterProfile, then: Sequence[LaterStage] | None = None
) -> list[Finding]:
    """Check all that can be known from here before a run is submitted under a profile.

    ``then`` are the stages that are submitted behind it, None where that is not known.
    """
    return _make(CHECKS, _Run(paths, plan, profile, then))


def check_model(paths: RunPaths, plan: Plan, profile: ClusterProfile) -> list[Finding]:
    """Check the model alone: its weights, its settings, and the cards that it fits on."""
    return _make((_weights, _settings, _memory), _Run(paths, plan, profile))


@dataclass(frozen=True)
class _Run:
    """A run that is checked, and the facts that a job takes to its node."""

    paths: RunPaths
    plan: Plan
    profile: ClusterProfile
    then: Sequence[LaterStage] | None = None
    question: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Path | SdwnError:
        """The folder that tasks load on this machine, or why there is none that they may."""
        try:
            locked = locked_weights(self.paths, self.plan.config.model)
            return (locked or weights.found_weights(self.plan.config)).folder
        except SdwnError as error:
            return error

    @cached_property
    def takes(self) -> Estimate:
        """The estimate of what is still to be made."""
        todo = unfinished_shards(self.paths, self.plan)
        return estimate(self.paths, self.plan, todo, self.profile)

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """The site's partitions; none of this machine alone."""
        return read_partitions() if self.slurm else {}

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

    def shared(self, path: Path, advice: str, name: str = "") -> Said:
        """Warn of a path that compute nodes most likely do not see."""
        folder = path.expanduser().resolve()
        for own in OWN_FOLDERS if self.slurm else ():
            if folder.is_relative_to(own):
                text = f"{folder} is below {own}: compute nodes probably do not see it; {advice}"
                return "warning", text
        return "ok", str(path) if name in ("", str(path)) else f"{name} in {path}"


def _make(checks: Iterable[Check], run: _Run) -> list[Finding]:
    found = []
    for check in checks:
        try:
            said = check(run)
        except SdwnError as error:
            said = "problem", str(error)
        if said is not None:
            found.append(Finding(check.__name__.strip("_").replace("_", " "), *said))
    return found


# --- Of the site ---------------------------------------------------------------------------------
def _fit(run: _Run) -> Said:
    run.profile.require_fit(run.plan.config)
    return "ok", f"the plan needs {'a' if run.plan.config.needs_gpu else 'no'} GPU"


def _slurm(run: _Run) -> Said | None:
    if not run.slurm:
        return None
    if absent := [name for name in COMMANDS if shutil.which(name) is None]:
        text = f"expected a SLURM cluster, found no {', '.join(absent)} on this machine; run it on"
        return "problem", f"{text} a login node, or use --profile local"
    if not run.partitions and scheduler.squeue() is None:
        return "problem", "the SLURM controller does not answer; try again later, or ask your site"
    return "ok", f"version {site_config().get('SLURM_VERSION', 'unknown')}"


def _time(run: _Run) -> Said | None:
    """Compare with MaxTime: sbatch takes a time beyond it, and the task waits for ever."""
    if not run.partitions:
        return None
    profile, names = run.profile, (run.profile.partition or "").replace(" ", "").split(",")
    chosen = [
        one
        for one in run.partitions.values()
        if (one.name in names if profile.partition else one.default)
    ]
    wanted = minutes(profile.time)
    limits = {one.name: one.time_min for one in chosen if one.time_min}
    each = [f"{duration(60 * most)} is the MaxTime of {name}" for name, most in limits.items()]
    text = f"a task asks for {duration(60 * wanted)}; {', '.join(each) or 'no limit is known'}"
    short = [most for most in limits.values() if most < wanted]
    if not short:
        return "ok", text
    # Another partition may take it, and a QOS may go beyond the partition's.
    certain = len(short) == len(chosen) and profile.qos is None
    return "problem" if certain else "warning", f"{text}; it would wait for ever: lower time"


def _sbatch(run: _Run) -> Said | None:
    """Have sbatch say whether it would take a task."""
    if not run.partitions:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.sh"
        path.write_text(job_script(1, Path(folder), run.profile), encoding="utf-8")
        try:
            done = scheduler.call(["sbatch", "--test-only", str(path)], TEST_SECONDS)
        except (OSError, subprocess.SubprocessError):
            return "unverified", "sbatch --test-only does not answer"
    # A queue that is full now says nothing of the profile.
    if not done.returncode or is_full(done.stderr):
        return "ok", "sbatch takes a task"
    if not (reasons := dict.fromkeys(re.findall(r"(?:error|failure): (.*)", done.stderr))):
        return "unverified", "sbatch --test-only does not answer"
    fields = run.profile.record().items()
    asks = ", ".join(f"{name} {value}" for name, value in fields if name in SBATCH_FIELDS)
    text = f"sbatch takes no such task: {'; '.join(reasons)}; "
    nodes, who = shell("sinfo", "--format=%P %D %t %c %m %G"), f"user={user()}"
    accounts = shell("sacctmgr", "show", "associations", who, "format=account,partition,qos")
    text += f"the profile asks for {asks or 'no resources'}; see the site's nodes with: {nodes}; "
    # In the same words SLURM refuses what no node has and what only drained nodes have.
    drained = any("node" in one for one in reasons) and scheduler.output_lines(OUT_OF_USE)
    return "warning" if drained else "problem", f"{text}your accounts with: {accounts}"


# --- Of the run ----------------------------------------------------------------------------------
def _run_folder(run: _Run) -> Said:
    root = run.paths.root.resolve()
    if not os.access(root, os.W_OK | os.X_OK):
        return "problem", f"{root} cannot be written to; plan into a folder of yours"
    return run.shared(root, "plan into a folder that they share")


def _progress(run: _Run) -> Said | None:
    """Find a time limit under which no batch would be finished."""
    costs = run.takes.costs
    stuck = [cost.warning or "" for cost in costs if cost.stuck]
    verdict: Verdict = "problem" if len(stuck) == len(costs) else "warning"
    return (verdict, stuck[0]) if stuck else None


def _space(run: _Run) -> Said:
    takes, free = run.takes, shutil.disk_usage(run.paths.root).free
    text = f"{takes.images:,} images need about {decimal(takes.bytes)} ({takes.bytes_source}); "
    text += f"{decimal(free)} free on the disk, where a quota may allow you less"
    if takes.bytes > free:
        return "problem", f"{text}: free some, or plan into a folder on a larger disk"
    if 2 * takes.bytes > free:
        return "warning", f"{text}: a release takes as much again, so write it elsewhere"
    return "ok", text


def _weights(run: _Run) -> Said:
    model, found = run.plan.config.model, run.weights
    if model.builtin and (model.builtin == "noise" or isinstance(found, Path)):
        return "ok", f"{model.name} is built in"
    if isinstance(found, Path):
        return run.shared(found, SHARE, model.name)
    if run.paths.lock.exists() or isinstance(found, UsageError) or weights.source(model) != "hub":
        return "problem", str(found)
    offline = run.variable(OFFLINE).upper() in YES
    then = f", and {OFFLINE} keeps tasks from the hub"
    text = f"{found}{then if offline else ': every task would ask the hub for it'}; get it where "
    text += f"there is a network, for nodes too (HF_HOME): {command('prefetch', run.paths.root)}"
    return "unverified" if run.differing else "problem" if offline else "warning", text


def _settings(run: _Run) -> Said | None:
    """Find what would end every task at its start, after its wait in the queue."""
    if isinstance(run.weights, SdwnError):
        return None
    if idle := check_settings(run.plan.config, run.weights, begun=run.paths.begun):
        return "warning", f"{idle[0]}; the run goes on as it began"
    return "ok", "the model takes the config's settings of generation"


def _memory(run: _Run) -> Said | None:
    """Check on which cards the model fits, before anything is loaded."""
    config, profile = run.plan.config, run.profile
    if isinstance(run.weights, SdwnError) or config.model.builtin is not None:
        return None
    sizes = weights_bytes(run.weights, config)
    text = ", ".join(f"{name} {decimal(size)}" for name, size in sizes.items())
    if PipelineInfo(run.weights).kind in FAMILIES:
        # Prompts are encoded first, and the text encoders let go.
        sizes = {name: size for name, size in sizes.items() if not name.startswith(TEXT_PARTS)}

    def way(card_gb: int) -> str:
        how = fitting_placement(sizes.values(), card_gb * 1e9)
        return "offload, layer by layer" if how == "layers" else how

    cards = (f"{gb} GB {way(gb)}" for gb in CARDS_GB)
    text += f" in {config.generation.precision}; placement by card: {'; '.join(cards)}"
    card = re.search(r"(\d+)gb?\b", profile.gpu_kind or "", re.IGNORECASE)
    if card and profile.placement == "gpu" and way(int(card[1])) != "gpu":
        return "problem", f"{text}; the profile has placement gpu, for {card[0]}: set auto"
    return "ok", text


def _classifier(run: _Run) -> Said | None:
    """Find what would end the evaluation, after all images are made."""
    if run.then is not None and "evaluate" not in run.then:
        return None
    from sdwn.evaluation.evaluate import require_evaluable
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    chosen, wnids = run.plan.config.evaluation, run.plan.table["wnid"]
    if wnids.null_count == len(wnids) and ":" not in chosen.model:
        return None  # There is nothing to compare predictions with.
    require_evaluable(chosen, lambda: open_taxonomy(run.paths.taxonomy))
    require_classifier(run.paths, run.plan.config)
    if (file := find_classifier(chosen.model, chosen.checkpoint)) is not None:
        return run.shared(file, SHARE, chosen.model)
    text = f"the weights of {chosen.model}, which evaluates the release, are not on this machine; "
    text += f"get them where there is a network: {command('prefetch', run.paths.root)}"
    # A run may be evaluated elsewhere, or not at all.
    return "unverified" if run.differing else "problem" if run.then else "warning", text


def _environment(run: _Run) -> Said | None:
    if not run.differing:
        return None
    text = f"tasks have another {' and '.join(run.differing)} than this shell, and find other "
    return "warning", f"{text}files there than it; export the same here"


def _cache(run: _Run) -> Said | None:
    try:
        folder = writable_cache()
    except SdwnError as error:
        return "warning", str(error)
    if not run.question:
        advice = "set SDWN_CACHE to a folder that they share"
        return run.shared(folder, advice) if run.slurm else None
    if (folder / run.question["token"]).is_file():
        return "ok", f"sees the other machine's, in {folder}"
    text = f"has another one in {folder}, without what is tuned or prefetched elsewhere; set "
    return "warning", f"{text}SDWN_CACHE to a shared folder, also in the profile's environment"


# --- Of a compute node, by a short job -----------------------------------------------------------
def report_node(folder: Path, indices: Iterable[int], _: TaskOptions = NO_OPTIONS) -> None:
    """Write what this node finds into the folder of its job, which lies in the run's."""
    if not list(indices):
        return  # one process of a task is enough
    job, paths = RunPaths(folder), RunPaths(folder.parent)
    # A machine may be several nodes.
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = [asdict(finding) for finding in check_node(paths, node, read_json(job.question))]
    write_text(job.answers, json.dumps({"findings": found}, indent=2) + "\n")


NODE_CHECK = Stage("probe", report_node)


def check_node(paths: RunPaths, node: str, question: Mapping[str, Any]) -> list[Finding]:
    """Check the node that this runs on.

    The ``question`` tells whether the profile asks for a ``gpu``, and the ``token`` that names a
    file in the other machine's cache.
    """
    here = _Run(paths, read_plan(paths), ClusterProfile(executor="local"), question=question)
    return [replace(one, text=f"{node}: {one.text}") for one in _make(NODE_CHECKS, here)]


def _node(run: _Run) -> Said | None:
    if run.question:
        text = f"Python {platform.python_version()} ({sys.executable}), sdwn {sdwn.__version__}; "
        text += f"{len(os.sched_getaffinity(0))} CPUs, "
        return "ok", f"{text}{decimal(Device(gpu=False).usable_bytes)} of memory free"
    if not run.slurm:
        return None
    text = "whether compute nodes see RUN, weights and cache, and what Python, memory, device and "
    return "unverified", f"{text}file locks they have: ask one with --probe"


def _device(run: _Run) -> Said | None:
    config = run.plan.config
    if config.model.builtin == "noise":
        return None  # drawn without torch
    device = Device().name
    if device != "cpu" or not (config.needs_gpu or run.question["gpu"]):
        return "ok", f"torch has {device}"
    text = "a GPU is asked for and torch sees none: tasks would work on the CPU, many times "
    text += "slower; install a torch built for its CUDA, or load its modules in setup"
    return "problem" if config.needs_gpu else "warning", text


def _locks(run: _Run) -> Said:
    import h5py

    path = run.paths.node_check.root / "locks.h5"
    try:
        with h5py.File(path, "w") as file:
            file["token"] = 1
        with h5py.File(path) as file:
            file["token"][()]
    except OSError as error:
        text = f"cannot write HDF5 files in the run folder: {error}; if its disk has no locks, set "
        return "problem", f'{text}HDF5_USE_FILE_LOCKING: "FALSE" in the profile\'s environment'
    return "ok", "writes and reads HDF5 files in the run folder"


# The name of each is the subject of what it finds.
CHECKS: tuple[Check, ...] = (
    *(_fit, _slurm, _time, _sbatch, _run_folder, _progress, _space, _weights, _settings, _memory),
    *(_classifier, _environment, _cache, _node),
)
NODE_CHECKS = (_node, _device, _run_folder, _weights, _classifier, _locks, _cache)
