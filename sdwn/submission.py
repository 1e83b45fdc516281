"""Submitting what is unfinished, in waves that the site allows, and following it to the end."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sdwn import checkout, cluster, journal, limits, scheduler
from sdwn.batches import off_grid
from sdwn.cluster import Job, Tell, quietly
from sdwn.config import RunConfig
from sdwn.errors import NoAnswerError, QueueFullError, SdwnError, UsageError
from sdwn.files import RunPaths, plain_disk_errors
from sdwn.joblogs import failure
from sdwn.journal import read_journal
from sdwn.limits import Limits
from sdwn.live import live_each, live_jobs, missing, unfinished, unreachable
from sdwn.plan import Plan
from sdwn.profiles import ClusterProfile, overridden
from sdwn.scheduler import JobState
from sdwn.task import ArrayTask

POLL_SECONDS = 1.0
# Each look asks a scheduler that all users share: at most so often, and less as time goes by.
LONGEST_POLL_SECONDS = 30.0
# Of what a site allows, so much has to be free before more is submitted: few long arrays.
WAVE = 0.25

Watch = Callable[[dict[Job, JobState]], None]


@dataclass(frozen=True, slots=True)
class Onlooker:
    """Who waits: ``watch`` is shown what lives at every look, ``tell`` what gets in the way."""

    watch: Watch
    tell: Tell


def require_fit(config: RunConfig, profile: ClusterProfile) -> None:
    """Refuse a profile that a config cannot run under, before anything is planned or submitted.

    Raises:
        UsageError: fp16 where no GPU will be, or a batch size that does not fit.
    """
    _require_device(config, profile)
    size, pinned = profile.batch_size, config.generation.batch_size
    if size is None:
        return
    if reason := off_grid(size, config.images_per_synset):
        raise UsageError(f"batch_size: {reason}")
    if pinned not in (None, size):
        raise UsageError(f"batch_size {size}: the config pins batches of {pinned} images")


def _require_device(config: RunConfig, profile: ClusterProfile) -> None:
    if not config.needs_gpu:
        return
    if profile.executor == "local" and cluster.local_gpus():
        return
    if profile.executor == "slurm" and profile.asks_for_gpu:
        return
    where = "this machine has none" if profile.executor == "local" else "the profile asks for none"
    raise UsageError(
        f"precision fp16 needs a GPU and {where}; submit with a profile "
        "that asks for one (gres or gpus_per_node), or plan with --set generation.precision=fp32"
    )


def require_same_plan(paths: RunPaths, plan: Plan) -> None:
    """Refuse to go on with a plan that took the place of the one that was submitted.

    Raises:
        UsageError: jobs of this folder were submitted for another plan.
    """
    for submission in read_journal(paths):
        if submission.plan not in ("", plan.digest):
            raise UsageError(
                f"{paths.root}: jobs were submitted here for plan {submission.plan[:12]}, and the "
                f"plan is {plan.digest[:12]} now; restore {paths.plan.name} and "
                f"{paths.synsets.name}, or plan into a new folder"
            )


def changed_code(paths: RunPaths) -> str | None:
    """Say whether this is other code than at the last submission."""
    submissions, here = read_journal(paths), checkout.code()
    if not submissions or submissions[-1].code == here:
        return None
    return f"the code has changed since the last submission: {submissions[-1].code} to {here}"


def submit_shards(
    paths: RunPaths, plan: Plan, indices: Sequence[int], profile: ClusterProfile, tell: Tell
) -> list[Job]:
    """Submit shards, dealt to tasks as the profile says, as many as the site allows now."""
    return submit_tasks(paths, shard_tasks(paths, plan, indices, profile), profile, tell)


def shard_tasks(
    paths: RunPaths, plan: Plan, indices: Sequence[int], profile: ClusterProfile
) -> list[ArrayTask]:
    """Deal shards to tasks."""
    root = str(paths.root.absolute())
    parts = cluster.cut(indices, profile)
    return [ArrayTask("generate", root, part, plan.digest, checkout.code()) for part in parts]


def submit_tasks(
    paths: RunPaths,
    tasks: Sequence[ArrayTask],
    profile: ClusterProfile,
    tell: Tell = quietly,
) -> list[Job]:
    """Submit as many of these tasks as the site allows now, the first ones first.

    They are one array, or several where MaxArraySize asks for it; each is written down before
    it is submitted and after.
    """
    if profile.executor == "local":
        return submit_array(paths, tasks, profile, tell)
    queue = cluster.await_answer(tell)
    site = limits.ask(profile)
    tasks = tasks[: room(site, queue)]
    groups = cluster.arrays(tasks, site.max_array_size)
    # Together they keep to what may run at once.
    share = max(1, profile.array_parallelism // max(1, len(groups)))
    jobs: list[Job] = []
    for group in groups:
        made = _submit_what_fits(paths, group, profile, tell, share)
        jobs += made
        if len(made) < len(group):
            break
    return jobs


def room(site: Limits, queue: Mapping[str, JobState]) -> int | None:
    """Count the jobs that a site would take beside the queue; None where it says no limit."""
    if site.max_submit_jobs is None:
        return None
    return max(0, site.max_submit_jobs - len(queue))


def _submit_what_fits(
    paths: RunPaths, tasks: Sequence[ArrayTask], profile: ClusterProfile, tell: Tell, at_once: int
) -> list[Job]:
    # A limit that no command tells shows when it is met: half of it may fit.
    while tasks:
        try:
            return submit_array(paths, tasks, profile, tell, at_once)
        except QueueFullError:
            tasks = tasks[: len(tasks) // 2]
    return []


def submit_array(
    paths: RunPaths,
    tasks: Sequence[ArrayTask],
    profile: ClusterProfile,
    tell: Tell,
    at_once: int | None = None,
) -> list[Job]:
    """Submit tasks as one array, written down before and after; no tasks are no array.

    ``at_once`` of them may run at a time, by default as many as the profile says.

    Raises:
        SdwnError: they were refused, or the scheduler does not answer.
    """
    if not tasks:
        return []
    own = {"array_parallelism": at_once or profile.array_parallelism}
    with plain_disk_errors(paths.jobs):
        intended = journal.intend(paths, tasks, profile)
        site = profile.model_copy(update=own)
        try:
            ids = cluster.submit(tasks, paths.jobs, site, intended.name, tell)
        except NoAnswerError:
            raise
        except SdwnError as error:
            journal.refuse(paths, intended, str(error))
            raise
        return list(journal.settle(paths, intended, ids).jobs)


@contextmanager
def alone(paths: RunPaths, tell: Tell) -> Iterator[None]:
    """Let one command at a time submit for a run, so that no shard is submitted twice."""
    with paths.submitting.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another command is submitting for {paths.root}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def recover(paths: RunPaths) -> None:
    """Find what the scheduler took before a crash kept it from being written down."""
    for submission, live in live_each(read_journal(paths)):
        if submission.unsettled and live and not unreachable(live):
            tasks = [submission.task(part, str(paths.root.absolute())) for part in submission.tasks]
            first = next(iter(live)).id.partition("_")[0]
            ids = cluster.job_ids(first, len(tasks))
            cluster.hand_over(tasks, ids, paths.jobs, submission.site)
            journal.settle(paths, submission, ids)


def last_profile(paths: RunPaths, overrides: dict[str, str]) -> ClusterProfile:
    """Give the profile of the last submission of shards, with overrides.

    Raises:
        SdwnError: nothing was submitted yet.
    """
    submissions = [one for one in read_journal(paths) if one.stage == "generate"]
    if not submissions:
        raise SdwnError(f"{paths.root}: nothing was submitted yet; use: sdwn submit {paths.root}")
    return overridden(submissions[-1].profile, overrides, source="the last submission's profile")


def follow(paths: RunPaths, watch: Watch) -> None:
    """Wait until no job of the run is left, telling ``watch`` at every look."""
    looks = Looks()
    while live := live_jobs(paths):
        watch(live)
        looks.wait()
    watch({})


class Looks:
    """Waits between looks at a scheduler: seldom, once things take long."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def wait(self) -> None:
        """Wait for a twentieth of the time since the beginning, within bounds."""
        passed = time.monotonic() - self._began
        time.sleep(min(LONGEST_POLL_SECONDS, max(POLL_SECONDS, passed / 20)))


def submit_once(
    paths: RunPaths, plan: Plan, profile: ClusterProfile, tell: Tell
) -> tuple[list[Job], int]:
    """Submit what is unfinished, as far as the site allows; say how many shards remain."""
    with alone(paths, tell):
        recover(paths)
        todo = unfinished(paths, plan)
        jobs = submit_shards(paths, plan, todo, profile, tell)
    return jobs, len(todo) - sum(len(job.indices) for job in jobs)


def complete(
    paths: RunPaths, plan: Plan, profile: ClusterProfile, retries: int, onlooker: Onlooker
) -> list[Job]:
    """Submit and follow until every shard is finished, trying what failed again.

    The queue is fed as it empties.

    Raises:
        SdwnError: shards are still missing; the last line of a log says why.
    """
    jobs, tries, looks, told = list[Job](), Counter[int](), Looks(), False
    while True:
        live = live_jobs(paths)
        onlooker.watch(live)
        todo = [index for index in unfinished(paths, plan, live) if tries[index] <= retries]
        if not todo and not live:
            break
        feed = todo and not unreachable(live)
        made = _feed(paths, plan, todo, profile, onlooker.tell) if feed else []
        tries.update(index for job in made for index in job.indices)
        jobs += made
        if todo and not live and not made and not told:
            onlooker.tell("SLURM takes no more of your jobs now; waiting for room")
            told = True
        looks.wait()
    left = missing(paths, plan)
    if not left:
        return jobs
    raise SdwnError(
        f"{len(left)} of {len(plan.own_shards)} shards failed; shard {left[0]}: "
        f"{failure(paths, left[0])}; finished images are kept, "
        f"submit the rest again with: sdwn submit {paths.root} --wait"
    )


def _feed(
    paths: RunPaths, plan: Plan, todo: list[int], profile: ClusterProfile, tell: Tell
) -> list[Job]:
    """Submit of these shards what fits now, if it is worth an array."""
    with alone(paths, tell):
        recover(paths)
        free = set(unfinished(paths, plan))
        tasks = shard_tasks(paths, plan, [index for index in todo if index in free], profile)
        if not tasks or not _worth_it(len(tasks), profile):
            return []
        try:
            made = submit_tasks(paths, tasks, profile, tell)
        except NoAnswerError as error:
            tell(str(error))
            return []
        if made:
            rebalance(paths, profile)
        return made


def _worth_it(tasks: int, profile: ClusterProfile) -> bool:
    if profile.executor == "local":
        return True
    site = limits.ask(profile)
    free = room(site, scheduler.squeue() or {})
    return free is None or free >= min(tasks, max(1, round(WAVE * (site.max_submit_jobs or 0))))


def rebalance(paths: RunPaths, profile: ClusterProfile) -> None:
    """Share what may run at once among a run's live arrays: the oldest first, each some."""
    arrays = [
        (next(iter(jobs)).id.partition("_")[0], len(jobs))
        for submission, jobs in live_each(read_journal(paths))
        if submission.executor == "slurm" and len(submission.tasks) > 1 and jobs
    ]
    if len(arrays) < 2:
        return
    left = profile.array_parallelism
    for place, (array, tasks) in enumerate(arrays, start=1):
        share = max(1, min(tasks, left - (len(arrays) - place)))
        scheduler.throttle(array, share)
        left -= share


def cancel(paths: RunPaths) -> list[Job]:
    """End all live jobs of a run; what they have finished stays.

    Raises:
        SdwnError: the scheduler does not answer.
    """
    cancelled: list[Job] = []
    for submission, live in live_each(read_journal(paths)):
        if unreachable(live):
            raise SdwnError("SLURM does not answer; run the same command again when it does")
        if live:
            scheduler.cancel(submission.executor, [job.id for job in live])
            cancelled += live
    return cancelled
