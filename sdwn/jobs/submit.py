"""Submitting what is unfinished, in waves that the site allows, and following it to the end."""

from __future__ import annotations

import fcntl
import math
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import environment_variables

from sdwn import checkout
from sdwn.batches import off_grid
from sdwn.config import RunConfig
from sdwn.errors import NoAnswerError, QueueFullError, SdwnError, UsageError, command
from sdwn.io import now, open_append, plain_disk_errors
from sdwn.jobs import cluster, journal, scheduler
from sdwn.jobs.cluster import Job, Tell, quietly
from sdwn.jobs.journal import cancellations, read_journal
from sdwn.jobs.live import (
    Live,
    end,
    hidden_owners,
    live_each,
    live_jobs,
    missing,
    strays,
    unfinished,
    unreachable,
)
from sdwn.jobs.logs import failure
from sdwn.jobs.profile import ClusterProfile, overridden
from sdwn.jobs.scheduler import JobState
from sdwn.jobs.site import max_array_size, user
from sdwn.jobs.task import ArrayTask
from sdwn.paths import RunPaths
from sdwn.planning.work import Dealt

POLL_SECONDS = 1.0
# Each look asks a scheduler that all users share: at most so often, and less as time goes by.
LONGEST_POLL_SECONDS = 30.0
# Of what the queue takes, so much has to be free before more is submitted: few long arrays.
WAVE = 0.25
# SLURM's KillWait, by default 30 s, and what a site runs after a job.
ENDING_SECONDS = 90.0

Watch = Callable[[dict[Job, JobState]], None]


@dataclass(frozen=True, slots=True)
class Onlooker:
    """Callbacks: ``watch`` is shown what lives at every look, ``tell`` what gets in the way.

    ``again`` names the command that goes on, under the same profile, after an error.
    """

    watch: Watch
    tell: Tell
    again: str = "the same command"


def require_fit(config: RunConfig, profile: ClusterProfile) -> None:
    """Refuse a profile that a config cannot run under, before anything is planned or submitted.

    Raises:
        UsageError: fp16 where no GPU will be, or a batch size that does not fit.
    """
    if config.needs_gpu and not cluster.gives_gpu(profile):
        local = profile.executor == "local"
        where = "this machine has none" if local else "the profile asks for none"
        raise UsageError(
            f"precision fp16 needs a GPU and {where}; submit with a profile that asks for one "
            "(gres or gpus_per_node), or plan with --set generation.precision=fp32"
        )
    size, pinned = profile.batch_size, config.generation.batch_size
    if size is None:
        return
    if reason := off_grid(size, config.images_per_synset):
        raise UsageError(f"batch_size: {reason}")
    if pinned not in (None, size):
        raise UsageError(f"batch_size {size}: the config pins batches of {pinned} images")


def require_same_plan(paths: RunPaths, plan: Dealt) -> None:
    """Refuse to go on with a plan that took the place of the one that was submitted.

    Raises:
        UsageError: jobs of this folder were submitted for another plan.
    """
    if replaced := replaced_plan(paths, plan):
        raise UsageError(replaced)


def replaced_plan(paths: RunPaths, plan: Dealt) -> str | None:
    """Return which plan jobs of this folder were submitted for, if it was another one."""
    for submission in read_journal(paths):
        if submission.plan not in ("", plan.digest):
            return (
                f"{paths.root}: jobs were submitted here for plan {submission.plan[:12]}, and the "
                f"plan is {plan.digest[:12]} now; restore {paths.plan.name} and "
                f"{paths.synsets.name}, or plan into a new folder"
            )
    return None


def require_visible(paths: RunPaths, indices: Sequence[int]) -> None:
    """Refuse to submit shards that another user's jobs may be making, out of sight.

    Raises:
        SdwnError: the site hides the jobs of a user who submitted some of these shards.
    """
    if owners := hidden_owners(read_journal(paths), indices):
        names = " and ".join(owners)
        raise SdwnError(
            f"{names} submitted some of these shards, and this site hides their jobs from you "
            f"(PrivateData): they may still be at work; ask {names} for "
            f"{command('status', paths.root)}; submit all the same with: --force"
        )


def changed_code(paths: RunPaths) -> str | None:
    """Say whether this is other code than at the last submission."""
    submissions, here = read_journal(paths), checkout.code()
    if not submissions or submissions[-1].code == here:
        return None
    return f"the code has changed since the last submission: {submissions[-1].code} to {here}"


def submit_shards(
    paths: RunPaths, plan: Dealt, indices: Sequence[int], profile: ClusterProfile, tell: Tell
) -> list[Job]:
    """Submit shards, dealt to tasks as the profile says, as many as the site allows now."""
    return submit_tasks(paths, shard_tasks(paths, plan, indices, profile), profile, tell)


def shard_tasks(
    paths: RunPaths, plan: Dealt, indices: Sequence[int], profile: ClusterProfile
) -> list[ArrayTask]:
    """Deal shards to tasks."""
    root = str(paths.root.absolute())
    parts = cluster.cut(indices, profile)
    return [ArrayTask(plan.stage, root, part, plan.digest, checkout.code()) for part in parts]


def submit_tasks(
    paths: RunPaths,
    tasks: Sequence[ArrayTask],
    profile: ClusterProfile,
    tell: Tell = quietly,
) -> list[Job]:
    """Submit as many of these tasks as the site allows now, the first ones first.

    They are one array, or several where MaxArraySize asks for it; each is written down before
    it is submitted and after. Where the queue is full, half of an array may fit.
    """
    if profile.executor == "local":
        return submit_array(paths, tasks, profile, tell)
    queue = cluster.await_answer(tell)
    if profile.max_submit_jobs is not None:
        tasks = tasks[: max(0, profile.max_submit_jobs - len(queue))]
    size, full = max_array_size(), False
    # With those that live they keep to what may run at once.
    free = profile.array_parallelism - len(live_jobs(paths))
    jobs: list[Job] = []
    while tasks:
        part, share = cluster.arrays(tasks, size, free)[0]
        # What comes after a full queue comes later.
        share = max(1, min(free, len(part))) if full else share
        try:
            made = submit_array(paths, part, profile, tell, share)
        except QueueFullError:
            size, full = len(part) // 2, True
            if size <= WAVE * len(jobs):
                break  # few long arrays
        else:
            jobs += made
            tasks, free = tasks[len(made) :], free - share
    return jobs


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
    with plain_disk_errors(paths.jobs), environment_variables(**profile.secrets):
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
    with open_append(paths.submitting) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (
                paths.submitting.read_text(encoding="utf-8", errors="replace") or "another command"
            )
            tell(f"{paths.root}: waiting for {holder}, which is at work here")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        own = Path(sys.argv[0]).name in ("sdwn", "__main__.py")
        what = command(*sys.argv[1:2]) if own else "a task"
        who = f"process {os.getpid()} of {user()} on {socket.gethostname()}"
        with suppress(OSError):  # on a full disk nobody is told who
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{what} ({who}, since {now()})".encode())
        yield


def recover(paths: RunPaths, profile: ClusterProfile) -> None:
    """Find what the scheduler took before a crash kept it from being written down.

    Raises:
        SdwnError: the queue holds jobs of this run of which nobody knows what they make.
    """
    for submission, live in live_each(paths, read_journal(paths)):
        if submission.unsettled and live and not unreachable(live):
            root, made = str(paths.root.absolute()), (submission.plan, submission.code)
            tasks = [ArrayTask(submission.stage, root, part, *made) for part in submission.tasks]
            ids = cluster.job_ids(next(iter(live)).id, len(tasks))
            cluster.hand_over(tasks, ids, paths.jobs, submission.site)
            journal.settle(paths, submission, ids)
    if profile.executor == "slurm" and (found := strays(paths)):
        raise SdwnError(
            f"{len(found)} jobs of this run are in the queue that {paths.submissions} does not "
            f"know ({', '.join(job.id for job in [*found][:3])}), so that nobody knows what they "
            "make; run the same command again when they have ended, or end them with: "
            f"{command('cancel', paths.root)}"
        )


def last_profile(paths: RunPaths, overrides: dict[str, str]) -> ClusterProfile:
    """Give the profile of the last submission of shards, with overrides.

    Raises:
        SdwnError: nothing was submitted yet.
    """
    submissions = [one for one in read_journal(paths) if one.stage == "generate"]
    if not submissions:
        advice = command("submit", paths.root, "--profile", "PROFILE")
        raise SdwnError(f"{paths.root}: nothing was submitted yet; use: {advice}")
    taken = [one for one in submissions if not one.refused] or submissions
    return overridden(taken[-1].profile, overrides, source="the last submission's profile")


def follow(paths: RunPaths, watch: Watch, only: Collection[Job] | None = None) -> None:
    """Wait until none of these jobs, or no job of the run, is left; ``watch`` sees every look."""
    looks = Looks()
    while live := {j: s for j, s in live_jobs(paths).items() if only is None or j in only}:
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
    paths: RunPaths, plan: Dealt, profile: ClusterProfile, tell: Tell
) -> tuple[list[Job], int]:
    """Submit what is unfinished, as far as the site allows; say how many shards remain."""
    if not missing(paths, plan):
        return [], 0
    with alone(paths, tell):
        recover(paths, profile)
        todo = unfinished(paths, plan)
        jobs = submit_shards(paths, plan, todo, profile, tell)
    if remaining := len(todo) - sum(len(job.indices) for job in jobs):
        tell(
            f"SLURM takes no more of your jobs now: {remaining:,} shards remain; run the same "
            "command again when some have ended, or let --wait feed the queue"
        )
    return jobs, remaining


def complete(
    paths: RunPaths, plan: Dealt, profile: ClusterProfile, retries: int, onlooker: Onlooker
) -> list[Job]:
    """Submit and follow until every shard is finished, trying what failed again.

    The queue is fed as it empties. What is still in it once nothing is missing is told.

    Raises:
        SdwnError: shards are still missing; the last line of a log says why.
    """
    jobs, tries, looks, told = list[Job](), Counter[int](), Looks(), False
    waves, cancelled = Waves(profile), cancellations(paths)
    while True:
        live = live_jobs(paths)
        onlooker.watch(live)
        waves.balance(live)
        todo = [index for index in unfinished(paths, plan, live) if tries[index] <= retries]
        # Later stages, which hold no shard, make none of what is missing.
        if not missing(paths, plan) or not (todo or any(job.indices for job in live)):
            break
        if cancellations(paths) > cancelled:
            # A cancel that came while sbatch was asked did not see what sbatch then took.
            for submission, own in live_each(paths, read_journal(paths)):
                if not own.keys().isdisjoint(jobs):
                    journal.note_cancelled(paths, [job.id for job in own])
                    end(paths, submission, own)
            raise SdwnError(
                f"cancelled by: {command('cancel', paths.root)}; finished images are kept, "
                f"go on with: {onlooker.again}"
            )
        feed = todo and not unreachable(live)
        waves.idle = not live
        made = _feed(paths, plan, todo, waves, onlooker.tell) if feed else []
        tries.update(index for job in made for index in job.indices)
        jobs += made
        if todo and not live and not made and not told:
            onlooker.tell("SLURM takes no more of your jobs now; waiting for room")
            told = True
        looks.wait()
    left = missing(paths, plan)
    if not left:
        # They have only their own records left to write.
        ending = [job for job, state in live.items() if state.state == scheduler.RUNNING]
        _await_end(paths, [job for job in ending if job.indices], quietly)
        waiting = (job for job, state in live.items() if state.state == scheduler.PENDING)
        if idle := [job.id for job in waiting if job.indices]:
            onlooker.tell(
                f"every shard is finished; {len(idle)} tasks still wait in the queue with nothing "
                f"left to do ({idle[0]} first); end them with: {command('cancel', paths.root)}"
            )
        return jobs
    raise SdwnError(
        f"{len(left)} of {len(plan.own_shards)} shards failed; shard {left[0]}: "
        f"{failure(paths, left[0])}; finished images are kept, "
        f"submit the rest again with: {onlooker.again}"
    )


def _feed(paths: RunPaths, plan: Dealt, todo: list[int], waves: Waves, tell: Tell) -> list[Job]:
    """Submit of these shards what fits now, if it is worth an array."""
    profile = waves.profile
    with alone(paths, tell):
        recover(paths, profile)
        free = set(unfinished(paths, plan))
        tasks = shard_tasks(paths, plan, [index for index in todo if index in free], profile)
        if not tasks or not (fitting := waves.fitting(tasks)):
            return []
        try:
            made = submit_tasks(paths, fitting, profile, tell)
        except NoAnswerError as error:
            tell(str(error))
            return []
        waves.learn(len(made), len(fitting))
        return made


class Waves:
    """Says when more is worth submitting, and keeps several arrays to what may run at once."""

    def __init__(self, profile: ClusterProfile) -> None:
        self.profile = profile
        # How many jobs the queue seems to take of this user; None: as many as there are.
        self._room = profile.max_submit_jobs
        self._shares: dict[str, int] = {}
        self.idle = True

    def balance(self, live: Live) -> None:
        """Share anew what may run at once, once there were several arrays."""
        arrays = Counter(job.id.partition("_")[0] for job in live if "_" in job.id)
        if unreachable(live) or not (len(arrays) > 1 or self._shares):
            return
        wanted = shares(arrays, self.profile.array_parallelism)
        for array, tasks in wanted.items():
            if self._shares.get(array) != tasks:
                scheduler.throttle(array, tasks)
        self._shares = wanted

    def fitting(self, tasks: Sequence[ArrayTask]) -> Sequence[ArrayTask]:
        """Pick the tasks that there is room for: all, or so many that they are a wave, or none."""
        if self.profile.executor == "local" or self._room is None:
            return tasks
        free = self._room - len(scheduler.squeue() or {})
        least = 1 if self.idle else max(1, round(WAVE * self._room))
        return tasks[:free] if free >= min(len(tasks), least) else ()

    def learn(self, made: int, tried: int) -> None:
        """Learn from what was taken: not all of it, and the queue is full; else try more next."""
        most = self.profile.max_submit_jobs
        if made == tried and self._room == most:
            return
        queued = max(1, len(scheduler.squeue() or {}))
        room = queued if made < tried else queued + math.ceil(WAVE * queued)
        self._room = room if most is None else min(room, most)


def shares(arrays: Mapping[str, int], at_once: int) -> dict[str, int]:
    """Share what may run at once among arrays with so many live tasks: the first ones first.

    Each has one at least, for SLURM takes none for all.

    >>> shares({"7": 10, "9": 5}, 4), shares({"7": 2, "9": 5}, 4)
    ({'7': 3, '9': 1}, {'7': 2, '9': 2})
    """
    found: dict[str, int] = {}
    for place, (array, tasks) in enumerate(arrays.items(), start=1):
        left = at_once - sum(found.values()) - (len(arrays) - place)
        found[array] = max(1, min(tasks, left))
    return found


def cancel(paths: RunPaths, tell: Tell = quietly) -> dict[Job, JobState]:
    """End all live jobs of a run, wait for their end, and say how they stood before.

    What they have finished stays.

    Raises:
        SdwnError: the scheduler does not answer, or some of the jobs could not be ended.
    """
    submissions = read_journal(paths)
    found = [(one, live) for one, live in live_each(paths, submissions) if live]
    if any(unreachable(live) for _, live in found):
        raise SdwnError("SLURM does not answer; run the same command again when it does")
    denied = []
    for submission, live in found:
        ids, yours = [job.id for job in live], submission.owner in (None, user())
        if yours:
            # First, so that a command that follows the run does not submit it again.
            journal.note_cancelled(paths, ids)
        if reason := end(paths, submission, live):
            denied.append(reason)
        elif not yours:
            # Whether another user's may be ended shows when it is tried.
            journal.note_cancelled(paths, ids)
    if denied:
        raise SdwnError("\n".join(denied))
    every = {index for one in submissions for job in one.jobs for index in job.indices}
    if owners := hidden_owners(submissions, every - paths.done_shards()):
        tell(f"this site hides from you what {' and '.join(owners)} submitted here: not cancelled")
    jobs = {job: state for _, live in found for job, state in live.items()}
    if lost := strays(paths):
        journal.note_cancelled(paths, [job.id for job in lost])
        for name in {job.array for job in lost}:
            ids = [job.id for job in lost if job.array == name]
            scheduler.cancel("slurm", paths.jobs, name, ids)
        jobs |= lost
    _await_end(paths, jobs, tell)
    return jobs


def _await_end(paths: RunPaths, jobs: Collection[Job], tell: Tell) -> None:
    """Wait for some time until ending jobs are gone: SLURM lets cancelled ones end themselves."""
    began, told = time.monotonic(), False
    while left := sorted(job.id for job in {*live_jobs(paths), *strays(paths)} & set(jobs)):
        text = f"{len(left)} cancelled tasks are still ending ({', '.join(left[:3])})"
        if time.monotonic() - began > ENDING_SECONDS:
            tell(
                f"{text}; retry takes their shards when they are gone; "
                f"see: {command('status', paths.root)}"
            )
            return
        if not told:
            tell(f"{text}; waiting for them")
        told = True
        time.sleep(POLL_SECONDS)
