"""Submit what is unfinished, in waves that the site allows; follow it to the end; cancel it.

The journal is written before and after each array, so that a crash at any moment loses no job
and submits no shard twice::

    submission_lock      one command at a time for a run
        |
    recover              settles what a crashed command left
        |
    intend    ------->   journal: name, stage, tasks
        |                                    <--- crash: squeue knows no job of this name, and
    sbatch    ------->   SLURM: jobs of it        the shards are open again
        |                                    <--- crash: squeue knows jobs of this name, and
    hand_over ------->   pickles, for which       recover hands over and settles
        |                tasks wait a minute
    settle    ------->   journal: name, ids

    sbatch refused:     journal: name, refused; its shards are open again
    sbatch was silent:  nothing is written; the next command recovers it

A job is the run's by its id AND its name: ids begin anew, and clusters count for themselves.
"""

from __future__ import annotations

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
from sdwn.io import OnMessage, ignore, locked, now, plain_disk_errors
from sdwn.jobs import cluster, journal, scheduler
from sdwn.jobs.journal import (
    Submission,
    hidden_owners,
    is_unreachable,
    live_by_submission,
    live_jobs,
    open_journal,
    read_journal,
    unfinished_shards,
    unheld_shards,
    unrecorded_jobs,
)
from sdwn.jobs.logs import failure
from sdwn.jobs.profile import ClusterProfile, overridden
from sdwn.jobs.scheduler import Job, JobState, Live, max_array_size, user
from sdwn.jobs.task import ArrayTask, Stage
from sdwn.paths import RunPaths
from sdwn.planning.work import ShardedWork

POLL_SECONDS = 1.0
# Each look asks a scheduler that all users share: at most so often, and less as time goes by.
LONGEST_POLL_SECONDS = 30.0
# Of what the queue takes, so much has to be free before more is submitted: few long arrays.
WAVE = 0.25
# SLURM's KillWait, by default 30 s, and what a site runs after a job.
ENDING_SECONDS = 90.0

OnLook = Callable[[dict[Job, JobState]], None]
# The stages that the tasks of a folder may be of, by their names in its journal.
Stages = Mapping[str, Stage]


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """An order to submit: a folder, its work, the stages of its tasks, and the profile."""

    paths: RunPaths
    work: ShardedWork
    stages: Stages
    profile: ClusterProfile


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions that following calls, and the command that resumes it.

    ``on_look`` gets the live jobs at every look, ``on_message`` what gets in the way;
    ``resume_command`` names the command that resumes after an error, under the same profile.
    """

    on_look: OnLook
    on_message: OnMessage
    resume_command: str = "the same command"


# Before anything is submitted


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


def replaced_plan(
    paths: RunPaths, submissions: Sequence[Submission], work: ShardedWork
) -> str | None:
    """Return an error text if jobs of this folder were submitted for another plan, else None."""
    for submission in submissions:
        if submission.plan not in ("", work.digest):
            return (
                f"{paths.root}: jobs were submitted here for plan {submission.plan[:12]}, and the "
                f"plan is {work.digest[:12]} now; restore {paths.plan.name} and "
                f"{paths.synsets.name}, or plan into a new folder"
            )
    return None


def changed_code(submissions: Sequence[Submission]) -> str | None:
    """Return a warning if the code has changed since the last submission, else None."""
    here = checkout.code()
    if not submissions or submissions[-1].code == here:
        return None
    return f"the code has changed since the last submission: {submissions[-1].code} to {here}"


def require_visible(
    paths: RunPaths, submissions: Sequence[Submission], indices: Sequence[int]
) -> None:
    """Refuse to submit shards that another user's jobs may be making, out of sight.

    Raises:
        SdwnError: the site hides the jobs of a user who submitted some of these shards.
    """
    if owners := hidden_owners(submissions, indices):
        names = " and ".join(owners)
        raise SdwnError(
            f"{names} submitted some of these shards, and this site hides their jobs from you "
            f"(PrivateData): they may still be at work; ask {names} for "
            f"{command('status', paths.root)}; submit all the same with: --force"
        )


def last_profile(paths: RunPaths, overrides: dict[str, str]) -> ClusterProfile:
    """Return the profile of the last submission of shards, with overrides.

    Raises:
        SdwnError: nothing was submitted yet.
    """
    submissions = [one for one in read_journal(paths) if one.stage == "generate"]
    if not submissions:
        advice = command("submit", paths.root, "--profile", "PROFILE")
        raise SdwnError(f"{paths.root}: nothing was submitted yet; use: {advice}")
    taken = [one for one in submissions if not one.refused] or submissions
    return overridden(taken[-1].profile, overrides, source="the last submission's profile")


# Submitting once


def tasks_for_shards(
    paths: RunPaths,
    work: ShardedWork,
    stage: Stage,
    indices: Sequence[int],
    profile: ClusterProfile,
) -> list[ArrayTask]:
    """Group shards into tasks of a stage, as the profile says."""
    root = str(paths.root.absolute())
    parts = cluster.group_into_tasks(indices, profile)
    return [ArrayTask(stage, root, part, work.digest, checkout.code()) for part in parts]


def submit_once(order: WorkOrder, on_message: OnMessage) -> tuple[list[Job], int]:
    """Submit what is unfinished, as far as the site allows; return how many shards remain, too."""
    paths, work, profile = order.paths, order.work, order.profile
    if not unfinished_shards(paths, work):
        return [], 0
    with submission_lock(paths, on_message):
        recover(paths, order.stages, profile)
        live = live_jobs(paths)
        todo = unheld_shards(paths, work, live)
        tasks = tasks_for_shards(paths, work, order.stages[work.stage], todo, profile)
        jobs = submit_tasks(paths, tasks, profile, on_message, live)
    if remaining := len(todo) - sum(len(job.indices) for job in jobs):
        on_message(
            f"SLURM takes no more of your jobs now: {remaining:,} shards remain; run the same "
            "command again when some have ended, or let --wait feed the queue"
        )
    return jobs, remaining


@contextmanager
def submission_lock(paths: RunPaths, on_message: OnMessage) -> Iterator[None]:
    """Lock a run for one submitting command at a time, so that no shard is submitted twice."""

    def waiting() -> None:
        holder = paths.submitting.read_text(encoding="utf-8", errors="replace")
        on_message(
            f"{paths.root}: waiting for {holder or 'another command'}, which is at work here"
        )

    with locked(paths.submitting, waiting) as lock:
        own = Path(sys.argv[0]).name in ("sdwn", "__main__.py")
        what = command(*sys.argv[1:2]) if own else "a task"
        who = f"process {os.getpid()} of {user()} on {socket.gethostname()}"
        with suppress(OSError):  # on a full disk others read no holder
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{what} ({who}, since {now()})".encode())
        yield


def recover(paths: RunPaths, stages: Stages, profile: ClusterProfile) -> None:
    """Record the jobs that the scheduler took before a crash of the command that submitted them.

    Raises:
        SdwnError: the queue holds jobs of this run whose shards are unknown.
    """
    submissions = read_journal(paths)
    for submission, live in live_by_submission(paths, submissions):
        known = submission.unsettled and submission.stage in stages
        if known and live and not is_unreachable(live):
            stage, root = stages[submission.stage], str(paths.root.absolute())
            tasks = [
                ArrayTask(stage, root, indices, submission.plan, submission.code)
                for indices in submission.tasks
            ]
            ids = journal.job_ids(next(iter(live)).id, len(tasks))
            cluster.hand_over(tasks, ids, paths.jobs, submission.site)
            journal.settle(paths, submission, ids)
    if profile.executor == "slurm" and (found := unrecorded_jobs(paths, submissions)):
        raise SdwnError(
            f"{len(found)} jobs of this run are in the queue that {paths.submissions} does not "
            f"know ({', '.join(job.id for job in [*found][:3])}); which shards they make is "
            "unknown: run the same command again when they have ended, or end them with: "
            f"{command('cancel', paths.root)}"
        )


def submit_tasks(
    paths: RunPaths,
    tasks: Sequence[ArrayTask],
    profile: ClusterProfile,
    on_message: OnMessage = ignore,
    live: Collection[Job] = (),
) -> list[Job]:
    """Submit as many of these tasks as the site allows now, the first ones first.

    They are one array, or several where MaxArraySize asks for it. Where the queue is full, half
    of an array may fit. With the jobs that are ``live`` they keep to what may run at once.
    """
    if profile.executor == "local":
        return submit_array(paths, tasks, profile, on_message)
    queue = cluster.await_queue(on_message)
    if profile.max_submit_jobs is not None:
        tasks = tasks[: max(0, profile.max_submit_jobs - len(queue))]
    size, full = max_array_size(), False
    free = profile.array_parallelism - len(live)
    jobs: list[Job] = []
    while tasks:
        part, share = cluster.split_into_arrays(tasks, size, free)[0]
        # What comes after a full queue comes later.
        share = max(1, min(free, len(part))) if full else share
        try:
            made = submit_array(paths, part, profile, on_message, share)
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
    on_message: OnMessage,
    at_once: int | None = None,
) -> list[Job]:
    """Submit tasks as one array, written down before and after; no tasks are no array.

    ``at_once`` of them may run at a time, by default as many as the profile says.

    Raises:
        SdwnError: they were refused, or the scheduler does not answer.
    """
    if not tasks:
        return []
    site = profile.model_copy(update={"array_parallelism": at_once or profile.array_parallelism})
    with plain_disk_errors(paths.jobs), environment_variables(**profile.secrets):
        intended = journal.intend(paths, tasks, profile)
        try:
            ids = cluster.start_array(tasks, paths.jobs, site, intended.name, on_message)
        except NoAnswerError:
            raise
        except SdwnError as error:
            journal.refuse(paths, intended, str(error))
            raise
        return list(journal.settle(paths, intended, ids).jobs)


# Following


def follow(paths: RunPaths, on_look: OnLook, only: Collection[Job] | None = None) -> None:
    """Wait until none of these jobs, or no job of the run, is left."""
    began = time.monotonic()
    while live := {j: s for j, s in live_jobs(paths).items() if only is None or j in only}:
        on_look(live)
        _pause(began)
    on_look({})


def _pause(began: float) -> None:
    """Wait for a twentieth of the time since the beginning, within bounds."""
    passed = time.monotonic() - began
    time.sleep(min(LONGEST_POLL_SECONDS, max(POLL_SECONDS, passed / 20)))


def complete(order: WorkOrder, retries: int, callbacks: Callbacks) -> list[Job]:
    """Submit and follow until every shard is finished, retrying what failed.

    The queue is fed as it empties. A message names what is still in it once nothing is missing.

    Raises:
        SdwnError: shards are still missing; the last line of a log says why.
    """
    paths, work = order.paths, order.work
    jobs, tries, began, waited = list[Job](), Counter[int](), time.monotonic(), False
    feeder = _Feeder(order, callbacks.on_message)
    cancellations = open_journal(paths).cancellations
    while True:
        live = live_jobs(paths)
        callbacks.on_look(live)
        feeder.balance(live)
        # Listed after the look at the jobs: a shard may be finished in between.
        left = unfinished_shards(paths, work)
        # Later stages, which hold no shard, make none of what is missing.
        held = {index for job in live for index in job.indices}
        todo = [index for index in left if index not in held and tries[index] <= retries]
        if not left or not (todo or held):
            break
        # Read after the look, for a cancel may have come since.
        found = open_journal(paths)
        if found.cancellations > cancellations:
            # A cancel that came while sbatch ran did not see what sbatch then took.
            for submission, own in live_by_submission(paths, found.submissions):
                if not own.keys().isdisjoint(jobs):
                    journal.note_cancelled(paths, [job.id for job in own])
                    end_live(paths, submission, own)
            raise SdwnError(
                f"cancelled by: {command('cancel', paths.root)}; finished images are kept, "
                f"resume with: {callbacks.resume_command}"
            )
        made = feeder.feed(todo, live) if todo and not is_unreachable(live) else []
        tries.update(index for job in made for index in job.indices)
        jobs += made
        if todo and not live and not made and not waited:
            callbacks.on_message("SLURM takes no more of your jobs now; waiting for room")
            waited = True
        _pause(began)
    if left:
        raise SdwnError(
            f"{len(left)} of {len(work.assigned_shards)} shards failed; shard {left[0]}: "
            f"{failure(paths, left[0])}; finished images are kept, "
            f"submit the rest again with: {callbacks.resume_command}"
        )
    # They have only their own records left to write.
    ending = [job for job, state in live.items() if state.state == scheduler.RUNNING]
    _await_end(paths, [job for job in ending if job.indices], ignore)
    waiting = (job for job, state in live.items() if state.state == scheduler.PENDING)
    if idle := [job.id for job in waiting if job.indices]:
        callbacks.on_message(
            f"every shard is finished; {len(idle)} tasks still wait in the queue with nothing "
            f"left to do ({idle[0]} first); end them with: {command('cancel', paths.root)}"
        )
    return jobs


class _Feeder:
    """Feeds the queue as it empties, and keeps several arrays within the limit of running tasks."""

    def __init__(self, order: WorkOrder, on_message: OnMessage) -> None:
        self._order, self._on_message = order, on_message
        # How many jobs the queue seems to take of this user; None: as many as there are.
        self._room = order.profile.max_submit_jobs
        self._throttles: dict[str, int] = {}

    def balance(self, live: Live) -> None:
        """Share the limit of running tasks again, if there were several arrays."""
        arrays = Counter(job.id.partition("_")[0] for job in live if "_" in job.id)
        if is_unreachable(live) or not (len(arrays) > 1 or self._throttles):
            return
        wanted = throttles(arrays, self._order.profile.array_parallelism)
        for array, tasks in wanted.items():
            if self._throttles.get(array) != tasks:
                update = f"JobId={array}", f"ArrayTaskThrottle={tasks}"
                scheduler.output_lines(["scontrol", "update", *update])
        self._throttles = wanted

    def feed(self, todo: list[int], live: Live) -> list[Job]:
        """Submit as many of these shards as fit now, if they are worth an array."""
        paths, work, profile = self._order.paths, self._order.work, self._order.profile
        with submission_lock(paths, self._on_message):
            recover(paths, self._order.stages, profile)
            now_live = live_jobs(paths)
            unheld = set(unheld_shards(paths, work, now_live))
            own = [index for index in todo if index in unheld]
            tasks = tasks_for_shards(paths, work, self._order.stages[work.stage], own, profile)
            if profile.executor == "slurm" and self._room is not None:
                free = self._room - len(scheduler.squeue() or {})
                least = max(1, round(WAVE * self._room)) if live else 1
                tasks = tasks[:free] if free >= min(len(tasks), least) else []
            if not tasks:
                return []
            try:
                made = submit_tasks(paths, tasks, profile, self._on_message, now_live)
            except NoAnswerError as error:
                self._on_message(str(error))
                return []
            # Not all of it was taken, and the queue is full; else more is tried next.
            full, most = len(made) < len(tasks), profile.max_submit_jobs
            if full or self._room != most:
                queued = max(1, len(scheduler.squeue() or {}))
                room = queued if full else queued + math.ceil(WAVE * queued)
                self._room = room if most is None else min(room, most)
            return made


def throttles(arrays: Mapping[str, int], at_once: int) -> dict[str, int]:
    """Share what may run at once among arrays with so many live tasks: the first ones first.

    Each has one at least, for SLURM takes none for all.

    >>> throttles({"7": 10, "9": 5}, 4), throttles({"7": 2, "9": 5}, 4)
    ({'7': 3, '9': 1}, {'7': 2, '9': 2})
    """
    found: dict[str, int] = {}
    for position, (array, tasks) in enumerate(arrays.items(), start=1):
        left = at_once - sum(found.values()) - (len(arrays) - position)
        found[array] = max(1, min(tasks, left))
    return found


# Cancelling


def cancel_run(paths: RunPaths, on_message: OnMessage = ignore) -> dict[Job, JobState]:
    """End all live jobs of a run and wait for their end; return their states before.

    What they have finished stays.

    Raises:
        SdwnError: the scheduler does not answer, or some of the jobs could not be ended.
    """
    submissions = read_journal(paths)
    found = [(one, live) for one, live in live_by_submission(paths, submissions) if live]
    if any(is_unreachable(live) for _, live in found):
        raise SdwnError("SLURM does not answer; run the same command again when it does")
    denied = []
    for submission, live in found:
        ids, yours = [job.id for job in live], submission.owner in (None, user())
        if yours:
            # First, so that a command that follows the run does not submit it again.
            journal.note_cancelled(paths, ids)
        if reason := end_live(paths, submission, live):
            denied.append(reason)
        elif not yours:
            # Whether another user's may be ended shows when it is tried.
            journal.note_cancelled(paths, ids)
    if denied:
        raise SdwnError("\n".join(denied))
    every = {index for one in submissions for job in one.jobs for index in job.indices}
    if owners := hidden_owners(submissions, every - paths.done_shards()):
        names = " and ".join(owners)
        on_message(f"this site hides from you what {names} submitted here: not cancelled")
    jobs = {job: state for _, live in found for job, state in live.items()}
    if lost := unrecorded_jobs(paths, submissions):
        journal.note_cancelled(paths, [job.id for job in lost])
        for name in {job.array for job in lost}:
            ids = [job.id for job in lost if job.array == name]
            scheduler.end_jobs("slurm", paths.jobs, name, ids)
        jobs |= lost
    _await_end(paths, jobs, on_message)
    return jobs


def end_live(paths: RunPaths, submission: Submission, live: Live) -> str | None:
    """End live jobs of a submission; return what could not be ended and why, if anything."""
    ids = [job.id for job in live]
    reason = scheduler.end_jobs(submission.executor, paths.jobs, submission.name, ids)
    if reason is None:
        return None
    jobs = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"
    return f"{jobs} of {submission.owner or 'another user'} could not be ended: {reason}"


def _await_end(paths: RunPaths, jobs: Collection[Job], on_message: OnMessage) -> None:
    """Wait for some time until ending jobs are gone: SLURM lets cancelled ones end themselves."""
    began, waited = time.monotonic(), False
    while True:
        submissions = read_journal(paths)
        live = {*live_jobs(paths, submissions), *unrecorded_jobs(paths, submissions)}
        if not (left := sorted(job.id for job in live & set(jobs))):
            return
        text = f"{len(left)} cancelled tasks are still ending ({', '.join(left[:3])})"
        if time.monotonic() - began > ENDING_SECONDS:
            on_message(
                f"{text}; retry takes their shards when they are gone; "
                f"see: {command('status', paths.root)}"
            )
            return
        if not waited:
            on_message(f"{text}; waiting for them")
        waited = True
        time.sleep(POLL_SECONDS)
