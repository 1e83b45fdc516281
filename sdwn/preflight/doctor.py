"""Examining a run before it is submitted: profile, site, disk, weights, and where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.filesize import decimal

from sdwn.errors import SdwnError, UsageError, command
from sdwn.jobs.cluster import cut
from sdwn.jobs.live import missing
from sdwn.jobs.profile import ClusterProfile, LaterStage
from sdwn.jobs.site import look
from sdwn.jobs.submit import require_fit
from sdwn.models import weights
from sdwn.models.builtin import IN_PACKAGE
from sdwn.models.lock import locked_weights, require_classifier
from sdwn.models.pipelines import check_settings
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import Plan
from sdwn.preflight.estimate import estimate, stored_bytes
from sdwn.preflight.findings import Finding, ok, problem, problems, unverified, warning
from sdwn.preflight.places import Place, free, place
from sdwn.preflight.probe import OFFLINE, cache_fault, hub_is_off
from sdwn.preflight.site_checks import check_site
from sdwn.wordnet import corpus
from sdwn.wordnet.taxonomy import open_taxonomy

__all__ = ["Finding", "can_start", "examine", "problems"]

# What a task leaves beside its shards: a folder and a pickle; and each of its processes: two
# logs, a result and a record.
TASK_FILES = 2
PROCESS_FILES = 4

# What keeps a job from starting, a short one too.
STOPPING = ("slurm", "partition", "account", "qos", "jobs", "gpu", "cpus", "memory", "run folder")

HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE")
LOCKING = "HDF5_USE_FILE_LOCKING"


def examine(
    paths: RunPaths,
    plan: Plan,
    profile: ClusterProfile,
    then: Sequence[LaterStage] | None = None,
) -> list[Finding]:
    """Look at all that can be known from here before a run is submitted under a profile.

    ``then`` are the stages that are submitted behind it, None where that is not known.
    """
    run = _Run(paths, plan, profile, then)
    return [finding for check in CHECKS for finding in check(run)]


def can_start(findings: Iterable[Finding]) -> bool:
    """Tell whether a short job, such as a probe, could start in spite of what was found."""
    return not any(finding.subject in STOPPING for finding in problems(findings))


@dataclass(frozen=True)
class _Run:
    paths: RunPaths
    plan: Plan
    profile: ClusterProfile
    then: Sequence[LaterStage] | None

    @cached_property
    def todo(self) -> list[int]:
        """Give the shards that are not finished."""
        return missing(self.paths, self.plan)

    @cached_property
    def weights(self) -> Path:
        """Return the folder of the weights.

        Raises:
            SdwnError: they are not here, not whole, or not those that the run is locked to.
        """
        config = self.plan.config
        if (locked := locked_weights(self.paths, config.model)) is None:
            return weights.located(config)
        weights.require_whole(locked.folder, config)
        return locked.folder

    @cached_property
    def tasks(self) -> Sequence[tuple[int, ...]]:
        """Give the tasks that would be submitted."""
        return cut(self.todo, self.profile)

    @cached_property
    def place(self) -> Place:
        """Say where the run lies."""
        return place(self.paths.root)

    @property
    def slurm(self) -> bool:
        """Whether tasks run on other machines."""
        return self.profile.executor == "slurm"

    def variable(self, name: str) -> str:
        """Give a variable as the tasks have it."""
        return self.profile.environment.get(name, os.environ.get(name, ""))


def _fit(run: _Run) -> Iterator[Finding]:
    try:
        require_fit(run.plan.config, run.profile)
    except UsageError as error:
        yield problem("fit", str(error))
        return
    gives = "the profile asks for one" if run.slurm else "this machine has one to use"
    needs = run.plan.config.needs_gpu
    yield ok("fit", f"the plan needs a GPU and {gives}" if needs else "the plan needs no GPU")


def _site(run: _Run) -> Iterator[Finding]:
    if run.slurm:
        yield from check_site(look(), run.profile, len(run.tasks))


def _progress(run: _Run) -> Iterator[Finding]:
    """Find a time limit under which tasks would start again and again in vain."""
    costs = estimate(run.paths, run.plan, run.todo, run.profile).costs
    stuck = [cost.warning or "" for cost in costs if cost.stuck]
    if stuck:
        yield (problem if len(stuck) == len(costs) else warning)("progress", stuck[0])


def _folder(run: _Run) -> Iterator[Finding]:
    folder = run.place.folder
    if not os.access(folder, os.W_OK | os.X_OK):
        yield problem("run folder", f"{folder} cannot be written to; plan into a folder of yours")
    elif run.slurm and run.place.own:
        text = f"{folder} is {_own(run.place)}: compute nodes probably do not see it"
        yield warning("run folder", f"{text}; plan into a folder that they share")
    else:
        yield ok("run folder", f"{folder}, on {run.place.type or 'a file system of no known type'}")


def _own(place: Place) -> str:
    return f"below {place.own}" if place.own.startswith("/") else f"on {place.own}"


def _space(run: _Run) -> Iterator[Finding]:
    try:
        left = free(run.paths.root)
    except OSError as error:
        yield unverified("space", f"the file system does not tell what is free: {error}")
        return
    images = sum(run.plan.shard_images(run.plan.shards[index]) for index in run.todo)
    need, source = stored_bytes(run.paths, run.plan, images)
    text = f"{images:,} images need about {decimal(need)} ({source}); {decimal(left.bytes)} free"
    if need > left.bytes:
        yield problem("space", f"{text}: free some, or plan into a folder on a larger disk")
    elif 2 * need > left.bytes:
        yield warning("space", f"{text}: a release takes as much again, so write it elsewhere")
    else:
        yield ok("space", text)
    yield from _files(run, left.files)
    if run.place.network:
        yield unverified(
            "quota",
            "your quota may be less than what is free; your site says how to see it "
            "(quota -s, lfs quota, mmlsquota)",
        )


def _files(run: _Run, left: int | None) -> Iterator[Finding]:
    if left is None:
        return
    processes = run.profile.processes
    each = TASK_FILES + PROCESS_FILES * processes
    lasting = len(run.todo) + each * len(run.tasks)
    need = lasting + _pieces(run)
    text = f"about {lasting:,} files, up to {need:,} while tasks run; {left:,} more may be made"
    if need > left:
        advice = "plan larger shards, give a task more of them (shards_per_task), or free some"
        yield (problem if lasting > left else warning)("files", f"{text}: {advice}")
    else:
        yield ok("files", text)


def _pieces(run: _Run) -> int:
    """Say how many pieces of shards there may be at once: one a synset of those in work."""
    if not run.todo:
        return 0
    shards = min(len(run.todo), run.profile.array_parallelism * run.profile.processes)
    return shards * max(shard.stop - shard.start for shard in run.plan.shards)


def _weights(run: _Run) -> Iterator[Finding]:
    config, name = run.plan.config, run.plan.config.model.name
    if config.model.builtin not in (None, *IN_PACKAGE):
        yield ok("weights", f"{name} is built in")
        return
    try:
        found = run.weights
    except SdwnError as error:
        yield _no_weights(run, error)
        return
    if config.model.builtin is not None:
        yield ok("weights", f"{name} is built in, and whole")
    else:
        yield _found(run, "weights", name, found)


def _found(run: _Run, subject: str, name: str, path: Path) -> Finding:
    own = place(path)
    if run.slurm and own.own:
        text = f"{path} is {_own(own)}: compute nodes probably do not see it"
        return warning(subject, f"{text}; put it into a folder that nodes share")
    return ok(subject, f"{name} in {path}")


def _settings(run: _Run) -> Iterator[Finding]:
    """Find what would end every task at its start, after its wait in the queue."""
    try:
        folder = run.weights
    except SdwnError:
        return  # Told with the weights.
    try:
        known = check_settings(run.plan.config, folder)
    except SdwnError as error:
        yield problem("settings", str(error))
        return
    if known:
        yield ok("settings", "the model takes the config's scheduler and safety checker")
    else:
        yield unverified("settings", "only loading the model tells whether it takes the scheduler")


def _differs(run: _Run, name: str) -> bool:
    return run.variable(name) != os.environ.get(name, "")


def _no_weights(run: _Run, error: SdwnError) -> Finding:
    model, text = run.plan.config.model, str(error)
    if run.paths.lock.exists() or isinstance(error, UsageError) or weights.source(model) != "hub":
        return problem("weights", text)
    if elsewhere := [name for name in HUB_VARIABLES if _differs(run, name)]:
        text = f"{text}; tasks have another {elsewhere[0]} than this shell"
        return unverified("weights", f"{text}: export the same here")
    advice = f"get it where there is a network: {command('prefetch', run.paths.root)}"
    if hub_is_off(run.variable(OFFLINE)):
        return problem("weights", f"{text}, and {OFFLINE} keeps tasks from the hub; {advice}")
    return warning("weights", f"{text}: every task would ask the hub for it; {advice}")


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
        yield problem("classifier", str(error))
        return
    if file is not None:
        yield _found(run, "classifier", chosen.model, file)
        return
    text = f"the weights of {chosen.model}, which evaluates the release, are not on this machine"
    if elsewhere := [name for name in (*HUB_VARIABLES, "TORCH_HOME") if _differs(run, name)]:
        text = f"{text}, and tasks have another {elsewhere[0]}"
        yield unverified("classifier", f"{text}; export the same here")
        return
    # A run may be evaluated elsewhere, or not at all.
    verdict = warning if run.then is None else problem
    advice = f"get them where there is a network: {command('prefetch', run.paths.root)}"
    yield verdict("classifier", f"{text}; {advice}")


def _wordnet(_: _Run) -> Iterator[Finding]:
    found, passed = corpus.look()
    over = "".join(f"; {reason}" for reason in passed)
    if found is not None:
        yield ok("wordnet", f"WordNet {corpus.VERSION} in {found}{over}")
        return
    text = f"no WordNet {corpus.VERSION} on this machine: planning and evaluation need it"
    yield warning("wordnet", f"{text}{over}; get it: python -m nltk.downloader wordnet")


def _locks(run: _Run) -> Iterator[Finding]:
    value = run.variable(LOCKING)
    if run.slurm and run.place.network and not value:
        text = f"shared file systems such as {run.place.type} may have no file locks"
        yield warning("locks", f'{text}; set {LOCKING}: "FALSE" in the profile\'s environment')
    elif run.slurm:
        yield ok("locks", f"{LOCKING} is {value or 'not set, and no network file system is seen'}")


def _cache(run: _Run) -> Iterator[Finding]:
    if fault := cache_fault():
        yield warning("cache", fault)
        return
    if not run.slurm:
        return
    if _differs(run, "SDWN_CACHE"):
        text = "tasks have another SDWN_CACHE than this shell, so that what is tuned or prefetched"
        yield warning("cache", f"{text} here is not found there; export the same here")
        return
    own = place(cache_folder())
    if own.own:
        text = f"{own.folder} is {_own(own)}: compute nodes have another"
        yield warning("cache", f"{text}; set SDWN_CACHE to a folder that they share")
    else:
        yield ok("cache", str(own.folder))


def _node(run: _Run) -> Iterator[Finding]:
    if run.slurm:
        yield unverified(
            "node",
            "whether compute nodes see RUN, weights and cache, and what Python, memory, device and "
            "file locks they have: ask one with --probe",
        )


CHECKS = (
    _fit,
    _site,
    _progress,
    _folder,
    _space,
    _weights,
    _settings,
    _classifier,
    _wordnet,
    _locks,
    _cache,
    _node,
)
