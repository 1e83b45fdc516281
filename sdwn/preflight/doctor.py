"""The doctor: checks of a run before it is submitted, read from top to bottom of the table below.

A check yields findings, or none where it has nothing to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.filesize import decimal

from sdwn.errors import SdwnError, UsageError, command
from sdwn.jobs.cluster import group_into_tasks
from sdwn.jobs.journal import unfinished_shards
from sdwn.jobs.profile import ClusterProfile, LaterStage
from sdwn.jobs.scheduler import read_site
from sdwn.jobs.submit import require_fit
from sdwn.models import weights
from sdwn.models.builtin import IN_PACKAGE
from sdwn.models.families import check_settings
from sdwn.models.lock import require_classifier, require_weights
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import Plan
from sdwn.preflight.estimate import Estimate, estimate
from sdwn.preflight.file_systems import Location, free_space, locate_folder
from sdwn.preflight.findings import Finding, problems
from sdwn.preflight.probe import OFFLINE, cache_fault, hub_is_off
from sdwn.preflight.site_checks import check_site
from sdwn.wordnet import corpus
from sdwn.wordnet.taxonomy import open_taxonomy

# What a task leaves beside its shards: a folder and a pickle; and each of its processes: two
# logs, a result and a record.
TASK_FILES = 2
PROCESS_FILES = 4

# What keeps a job from starting, a short one too.
STOPPING = ("slurm", "partition", "account", "qos", "nodes", "sbatch", "run folder")

HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE")
LOCKING = "HDF5_USE_FILE_LOCKING"


def check_run(
    paths: RunPaths,
    plan: Plan,
    profile: ClusterProfile,
    then: Sequence[LaterStage] | None = None,
) -> list[Finding]:
    """Check all that can be known from here before a run is submitted under a profile.

    ``then`` are the stages that are submitted behind it, None where that is not known.
    """
    run = _Run(paths, plan, profile, then)
    return [finding for check in CHECKS for finding in check(run)]


def can_start(findings: Iterable[Finding]) -> bool:
    """Return whether a short job, such as a probe, could start in spite of what was found."""
    return not any(finding.subject in STOPPING for finding in problems(findings))


def replace_findings(before: Sequence[Finding], new: Sequence[Finding]) -> list[Finding]:
    """Return findings, those on the same subjects replaced, for example by a node's report."""
    answered = {finding.subject for finding in new}
    return [*(finding for finding in before if finding.subject not in answered), *new]


@dataclass(frozen=True)
class _Run:
    paths: RunPaths
    plan: Plan
    profile: ClusterProfile
    then: Sequence[LaterStage] | None

    @cached_property
    def todo(self) -> list[int]:
        """The shards that are not finished."""
        return unfinished_shards(self.paths, self.plan)

    @cached_property
    def tasks(self) -> Sequence[tuple[int, ...]]:
        """The tasks that would be submitted."""
        return group_into_tasks(self.todo, self.profile)

    @cached_property
    def estimate(self) -> Estimate:
        """The estimate of what these tasks take."""
        return estimate(self.paths, self.plan, self.todo, self.profile)

    @cached_property
    def weights(self) -> Path | SdwnError:
        """The folder of the weights, or why there is none that the run may use."""
        try:
            return require_weights(self.paths, self.plan.config)
        except SdwnError as error:
            return error

    @cached_property
    def location(self) -> Location:
        """The run's folder and its file system."""
        return locate_folder(self.paths.root)

    @property
    def slurm(self) -> bool:
        """True if tasks run on other machines."""
        return self.profile.executor == "slurm"

    def variable(self, name: str) -> str:
        """Return a variable as the tasks have it."""
        return self.profile.environment.get(name, os.environ.get(name, ""))

    def differing(self, *names: str) -> str | None:
        """Return the first of these variables that tasks have another value of than this shell."""
        differing = (name for name in names if self.variable(name) != os.environ.get(name, ""))
        return next(differing, None)


def _fit(run: _Run) -> Iterator[Finding]:
    try:
        require_fit(run.plan.config, run.profile)
    except UsageError as error:
        yield Finding("fit", "problem", str(error))
        return
    gives = "the profile asks for one" if run.slurm else "this machine has one to use"
    needs = run.plan.config.needs_gpu
    text = f"the plan needs a GPU and {gives}" if needs else "the plan needs no GPU"
    yield Finding("fit", "ok", text)


def _site(run: _Run) -> Iterator[Finding]:
    if run.slurm:
        yield from check_site(read_site(), run.profile, len(run.tasks))


def _progress(run: _Run) -> Iterator[Finding]:
    """Find a time limit under which tasks would start again and again in vain."""
    costs = run.estimate.costs
    stuck = [cost.warning or "" for cost in costs if cost.stuck]
    if stuck:
        yield Finding("progress", "problem" if len(stuck) == len(costs) else "warning", stuck[0])


def _run_folder(run: _Run) -> Iterator[Finding]:
    folder, own = run.location.folder, run.location.own
    if not os.access(folder, os.W_OK | os.X_OK):
        text = f"{folder} cannot be written to; plan into a folder of yours"
        yield Finding("run folder", "problem", text)
    elif run.slurm and own:
        text = f"{folder} is {own}: compute nodes probably do not see it"
        yield Finding("run folder", "warning", f"{text}; plan into a folder that they share")
    else:
        kind = run.location.type or "a file system of no known type"
        yield Finding("run folder", "ok", f"{folder}, on {kind}")


def _space(run: _Run) -> Iterator[Finding]:
    try:
        free_bytes, free_files = free_space(run.paths.root)
    except OSError as error:
        text = f"the file system does not say what is free: {error}"
        yield Finding("space", "unverified", text)
        return
    plan, processes, found = run.plan, run.profile.processes, run.estimate
    need, free = found.bytes, decimal(free_bytes)
    text = f"{found.images:,} images need about {decimal(need)} ({found.bytes_source}); {free} free"
    if need > free_bytes:
        text += ": free some, or plan into a folder on a larger disk"
        yield Finding("space", "problem", text)
    elif 2 * need > free_bytes:
        text += ": a release takes as much again, so write it elsewhere"
        yield Finding("space", "warning", text)
    else:
        yield Finding("space", "ok", text)
    if free_files is not None:
        lasting = len(run.todo) + (TASK_FILES + PROCESS_FILES * processes) * len(run.tasks)
        # Of a shard in work there may be one partial shard a synset.
        at_once = min(len(run.todo), run.profile.array_parallelism * processes)
        files = lasting + at_once * max(shard.stop - shard.start for shard in plan.shards)
        text = f"about {lasting:,} files, up to {files:,} while tasks run; {free_files:,} more may "
        text += "be made"
        if files > free_files:
            text += ": plan larger shards, give a task more of them (shards_per_task), or free some"
            yield Finding("files", "problem" if lasting > free_files else "warning", text)
        else:
            yield Finding("files", "ok", text)
    if run.location.network:
        text = "your quota may be less than what is free; your site says how to see it "
        yield Finding("quota", "unverified", f"{text}(quota -s, lfs quota, mmlsquota)")


def _weights(run: _Run) -> Iterator[Finding]:
    model = run.plan.config.model
    if model.builtin not in (None, *IN_PACKAGE):
        yield Finding("weights", "ok", f"{model.name} is built in")
    elif not isinstance(run.weights, SdwnError):
        if model.builtin is not None:
            yield Finding("weights", "ok", f"{model.name} is built in, and whole")
        else:
            yield _found(run, "weights", model.name, run.weights)
    elif (
        run.paths.lock.exists()
        or isinstance(run.weights, UsageError)
        or weights.source(model) != "hub"
    ):
        yield Finding("weights", "problem", str(run.weights))
    elif name := run.differing(*HUB_VARIABLES):
        text = f"{run.weights}; tasks have another {name} than this shell: export the same here"
        yield Finding("weights", "unverified", text)
    else:
        advice = f"get it where there is a network: {command('prefetch', run.paths.root)}"
        if hub_is_off(run.variable(OFFLINE)):
            text = f"{run.weights}, and {OFFLINE} keeps tasks from the hub; {advice}"
            yield Finding("weights", "problem", text)
        else:
            text = f"{run.weights}: every task would ask the hub for it; {advice}"
            yield Finding("weights", "warning", text)


def _found(run: _Run, subject: str, name: str, path: Path) -> Finding:
    own = locate_folder(path).own
    if run.slurm and own:
        text = f"{path} is {own}: compute nodes probably do not see it"
        return Finding(subject, "warning", f"{text}; put it into a folder that nodes share")
    return Finding(subject, "ok", f"{name} in {path}")


def _settings(run: _Run) -> Iterator[Finding]:
    """Find what would end every task at its start, after its wait in the queue."""
    if isinstance(run.weights, SdwnError):
        return
    try:
        check_settings(run.plan.config, run.weights)
    except SdwnError as error:
        yield Finding("settings", "problem", str(error))
        return
    text = "the model takes the config's scheduler and safety checker"
    yield Finding("settings", "ok", text)


def _classifier(run: _Run) -> Iterator[Finding]:
    """Find what would end the evaluation, after all images are made."""
    if run.then is not None and "evaluate" not in run.then:
        return
    from sdwn.evaluation.evaluate import require_evaluable
    from sdwn.prediction.pretrained import find_classifier  # torch and timm

    chosen = run.plan.config.evaluation
    try:
        require_evaluable(chosen, open_taxonomy(run.paths.taxonomy))
        require_classifier(run.paths, run.plan.config)
        file = find_classifier(chosen.model, chosen.checkpoint)
    except SdwnError as error:
        yield Finding("classifier", "problem", str(error))
        return
    text = f"the weights of {chosen.model}, which evaluates the release, are not on this machine"
    if file is not None:
        yield _found(run, "classifier", chosen.model, file)
    elif name := run.differing(*HUB_VARIABLES, "TORCH_HOME"):
        text += f", and tasks have another {name}; export the same here"
        yield Finding("classifier", "unverified", text)
    else:
        text += f"; get them where there is a network: {command('prefetch', run.paths.root)}"
        # A run may be evaluated elsewhere, or not at all.
        yield Finding("classifier", "warning" if run.then is None else "problem", text)


def _wordnet(run: _Run) -> Iterator[Finding]:
    found, passed = corpus.look_for_corpus()
    over = "".join(f"; {reason}" for reason in passed)
    if found is not None:
        yield Finding("wordnet", "ok", f"WordNet {corpus.VERSION} in {found}{over}")
    elif run.paths.taxonomy.exists():
        text = f"{run.paths.taxonomy.name} has what this run needs of WordNet"
        yield Finding("wordnet", "ok", text)
    else:
        text = f"no WordNet {corpus.VERSION} on this machine, and the run has no "
        text += f"{run.paths.taxonomy.name}: its evaluation needs one of them{over}; get it: "
        text += "python -m nltk.downloader wordnet"
        yield Finding("wordnet", "warning", text)


def _locks(run: _Run) -> Iterator[Finding]:
    value = run.variable(LOCKING)
    if run.slurm and run.location.network and not value:
        text = f"shared file systems such as {run.location.type} may have no file locks; "
        text += f'set {LOCKING}: "FALSE" in the profile\'s environment'
        yield Finding("locks", "warning", text)
    elif run.slurm:
        text = f"{LOCKING} is {value or 'not set, and no network file system is seen'}"
        yield Finding("locks", "ok", text)


def _cache(run: _Run) -> Iterator[Finding]:
    location = locate_folder(cache_folder())
    if fault := cache_fault():
        yield Finding("cache", "warning", fault)
    elif not run.slurm:
        return
    elif run.differing("SDWN_CACHE"):
        text = "tasks have another SDWN_CACHE than this shell, so that what is tuned or prefetched "
        text += "here is not found there; export the same here"
        yield Finding("cache", "warning", text)
    elif location.own:
        text = f"{location.folder} is {location.own}: compute nodes have another; "
        text += "set SDWN_CACHE to a folder that they share"
        yield Finding("cache", "warning", text)
    else:
        yield Finding("cache", "ok", str(location.folder))


def _node(run: _Run) -> Iterator[Finding]:
    if run.slurm:
        text = "whether compute nodes see RUN, weights and cache, and what Python, memory, device "
        text += "and file locks they have: ask one with --probe"
        yield Finding("node", "unverified", text)


CHECKS = (
    _fit,
    _site,
    _progress,
    _run_folder,
    _space,
    _weights,
    _settings,
    _classifier,
    _wordnet,
    _locks,
    _cache,
    _node,
)
