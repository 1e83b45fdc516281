"""Submit what is unfinished, in waves that the site allows; follow it to the end; cancel it.

The journal is written before and after each array, so that a crash at any moment loses no job
and submits no shard twice::

    submission_lock      one command at a time for a run
        |
    recover              settles what a crashed command left
        |
    intend    ------->   journal: name, stage, tasks
        |                                    <--- crash: no job of this name waits or runs, and
    sbatch    ------->   SLURM: jobs of it        the shards are open again
        |                                    <--- crash: jobs of this name wait or run, and
    hand_over ------->   pickles, for which       recover hands over and settles
        |                tasks wait a minute
    settle    ------->   journal: name, ids

    sbatch refused:     journal: name, refused; its shards are open again
    sbatch was silent:  nothing is written; the next command recovers it

Of processes of this machine ids and pickles are there before they start; else all is the same.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sdwn.errors import NoAnswerError, QueueFullError, SdwnError, command, counted
from sdwn.io import OnMessage, code_version, ignore, locked, now, plain_disk_errors
from sdwn.jobs import journal, scheduler
from sdwn.jobs.journal import RunJobs, Submission, failure, find_jobs, is_unreachable, live_jobs
from sdwn.jobs.profile import ClusterProfile, group_into_tasks, minutes, split_into_arrays
from sdwn.jobs.scheduler import Job, JobState, Live
from sdwn.jobs.task import ArrayTask, Stage
from sdwn.paths import RunPaths
from sdwn.planning.plan import ShardedWork

POLL_SECONDS = 1.0
# Each look asks a scheduler that all users share: at most so often, and less as time goes by.
LONGEST_POLL_SECONDS = 30.0
# Of what the queue takes, so much has to be free before more is submitted: few long arrays.
WAVE = 0.25
# SLURM's KillWait, by default 30 s, and what a site runs after a job.
ENDING_SECONDS = 90.0

OnLook = Callable[[Live], None]
# The stages that the tasks of a folder may be of, by their names in its journal.
Stages = Mapping[str, Stage]


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """An order to submit: a folder, its work, the stages of its tasks, and the profile."""

    paths: RunPaths
    work: ShardedWork
    stages: Stages
    profile: ClusterProfile

    def tasks_for(self, indices: Sequence[int]) -> list[ArrayTask]:
        """Group shards into tasks, as the profile says."""
        work, root, code = self.work, str(self.paths.root.absolute()), code_version()
        parts = group_into_tasks(indices, self.profile)
        return [ArrayTask(self.stages[work.stage], root, one, work.digest, code) for one in parts]


# --- Before anything is submitted ----------------------------------------------------------------
def replaced_plan(
    paths: RunPaths, submissions: Sequence[Submission], work: ShardedWork
) -> str | None:
    """Return an error text if jobs of this folder were submitted for another plan, else None."""
    other = next((one.plan for one in submissions if one.plan not in ("", work.digest)), None)
    return other and (
        f"{paths.root}: jobs were submitted here for plan {other[:12]}, and the plan is "
        f"{work.digest[:12]} now; restore {paths.plan.name} and the table beside it, or plan into "
        "a new folder"
    )


def report_changed_code(submissions: Sequence[Submission], say: OnMessage) -> None:
    """Warn if the code has changed since the last submission."""
    here = code_version()
    if submissions and (last := submissions[-1].code) != here:
        say(f"the code has changed since the last submission: {last} to {here}")


def require_visible(paths: RunPaths, submissions: Sequence[Submission], shards: set[int]) -> None:
    """Refuse to submit shards that another user's jobs may be making, hidden by the site."""
    if owners := journal.hidden_owners(submissions, shards):
        names = " and ".join(owners)
        raise SdwnError(
            f"{names} submitted some of these shards, and this site hides their jobs from you "
            f"(PrivateData): they may still be at work; ask {names} for "
            f"{command('status', paths.root)}; submit all the same with: --force"
        )


# --- Submitting once -----------------------------------------------------------------------------
def submit_once(order: WorkOrder, say: OnMessage) -> tuple[list[Job], int]:
    """Submit what is unfinished, as far as the site allows; return how many shards remain, too."""
    if not journal.unfinished_shards(order.paths, order.work):
        return [], 0
    jobs, left, _ = _submit_unheld(order, say)
    if remaining := sum(len(task.indices) for task in left):
        say(
            f"SLURM takes no more of your jobs now, and {counted(remaining, 'shard')} of this run "
            "must wait; run the same command again when some jobs have ended, or let --wait feed "
            "the queue"
        )
    return jobs, remaining


def _submit_unheld(
    order: WorkOrder, say: OnMessage, wanted: set[int] | None = None, room: int | None = None
) -> tuple[list[Job], list[ArrayTask], int | None]:
    """Submit shards that nobody holds, if there is room; return jobs, tasks left, and the room.

    ``wanted`` None is all of them, ``room`` None no known limit of jobs.
    """
    paths, work, profile = order.paths, order.work, order.profile
    with submission_lock(paths, say):
        live = recover(paths, order.stages, profile).live
        todo = journal.unheld_shards(paths, work, live)
        tasks = order.tasks_for([one for one in todo if wanted is None or one in wanted])
        chosen = tasks
        if room is not None:
            free = room - len(live)
            wave = WAVE * room if live else 0
            chosen = tasks[: max(1, free)] if free >= min(len(tasks), wave) else []
        if not chosen:
            return [], tasks, room
        made = submit_tasks(paths, chosen, profile, say, len(live))
    # Where all were taken, more is tried next.
    return made, tasks[len(made) :], len(live) + len(made) if len(made) < len(chosen) else None


@contextmanager
def submission_lock(paths: RunPaths, say: OnMessage) -> Iterator[None]:
    """Lock a run for one submitting command at a time, so that no shard is submitted twice."""

    def waiting() -> None:
        holder = "another command"
        with suppress(FileNotFoundError):  # an evaluation that has ended takes its folder along
            holder = paths.submitting.read_text(encoding="utf-8", errors="replace") or holder
        say(f"{paths.root}: waiting for {holder}, which is at work here")

    paths.root.mkdir(parents=True, exist_ok=True)
    with locked(paths.submitting, waiting) as lock:
        own = Path(sys.argv[0]).name in ("sdwn", "__main__.py")
        what = command(*sys.argv[1:2]) if own else "a task"
        who = f"process {os.getpid()} of {scheduler.user()} on {socket.gethostname()}"
        with suppress(OSError):  # on a full disk others read no holder
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{what} ({who}, since {now()})".encode())
        yield


def recover(paths: RunPaths, stages: Stages, profile: ClusterProfile) -> RunJobs:
    """Record the jobs that a command submitted before it crashed; return all that wait or run."""
    found = find_jobs(paths, journal.read_journal(paths), profile.executor == "slurm")
    for one, live in found.by_submission:
        if one.unsettled and one.stage in stages and not is_unreachable(live):
            stage, root = stages[one.stage], str(paths.root.absolute())
            tasks = [ArrayTask(stage, root, indices, one.plan, one.code) for indices in one.tasks]
            ids = scheduler.job_ids(next(iter(live)).id, len(tasks))
            scheduler.hand_over(tasks, ids, paths.jobs, one.site)
            journal.settle(paths, one, ids)
    if profile.executor == "slurm" and (lost := [job.id for job in found.unrecorded]):
        raise SdwnError(
            f"the queue holds {_unrecorded(paths, lost)}; which shards they make is unknown: run "
            "the same command again when they have ended, or end them with: "
            f"{command('cancel', paths.root)}"
        )
    return found


def _unrecorded(paths: RunPaths, ids: Sequence[str]) -> str:
    few = ", ".join(ids[:3])
    return f"{counted(len(ids), 'job')} of this run that {paths.submissions} does not know ({few})"


def submit_tasks(
    paths: RunPaths,
    tasks: Sequence[ArrayTask],
    profile: ClusterProfile,
    say: OnMessage = ignore,
    live: int = 0,
) -> list[Job]:
    """Submit as many of these tasks as the site allows now, beside the run's ``live`` ones.

    They are one array, or several where MaxArraySize asks for it. Where the queue is full, half of
    an array may fit.
    """
    if profile.executor == "local":
        return submit_array(paths, tasks, profile, say)
    if profile.max_submit_jobs is not None:
        queued = len(scheduler.squeue() or ())
        tasks = tasks[: max(0, profile.max_submit_jobs - queued)]
    size, full, free = scheduler.max_array_size(), False, profile.array_parallelism - live
    jobs: list[Job] = []
    while tasks:
        part, share = split_into_arrays(tasks, size, free)[0]
        # What comes after a full queue comes later.
        share = max(1, min(free, len(part))) if full else share
        try:
            made = submit_array(paths, part, profile, say, share)
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
    say: OnMessage,
    at_once: int | None = None,
) -> list[Job]:
    """Submit tasks as one array, of which ``at_once`` may run."""
    from submitit.core.utils import environment_variables  # 0.2 s, and status needs none of it

    site = profile.model_copy(update={"array_parallelism": at_once or profile.array_parallelism})
    with plain_disk_errors(paths.jobs), environment_variables(**profile.secrets):
        intended = journal.intend(paths, tasks, profile)
        try:
            ids = scheduler.start_array(tasks, paths.jobs, site, intended.name, say)
        except NoAnswerError:
            raise
        except SdwnError as error:
            journal.refuse(paths, intended, str(error))
            raise
        return list(journal.settle(paths, intended, ids).jobs)


# --- Following -----------------------------------------------------------------------------------
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


def complete(
    order: WorkOrder, retries: int, on_look: OnLook, say: OnMessage, resume: str = "sdwn retry"
) -> list[Job]:
    """Submit and follow until every shard is finished, feeding the queue, retrying what failed.

    ``resume`` is the command that resumes after an error, under the same profile.
    """
    paths, work = order.paths, order.work
    jobs, tries, began, waited = list[Job](), Counter[int](), time.monotonic(), False
    # How many of the run's jobs the queue seems to take; None: as many as there are.
    room: int | None = None
    throttled = dict[str, int]()
    cancellations = journal.open_journal(paths).cancellations
    while True:
        live = live_jobs(paths)
        on_look(live)
        if order.profile.executor == "slurm":
            throttled = _balance(live, throttled, order.profile.array_parallelism)
        # Listed after the look at the jobs: a shard may be finished in between.
        left = journal.unfinished_shards(paths, work)
        # Later stages, which hold no shard, make none of what is missing.
        making = {index for job in live for index in job.indices}
        todo = {index for index in left if index not in making and tries[index] <= retries}
        if not left or not (making or todo):
            break
        found = journal.open_journal(paths)
        if found.cancellations > cancellations:
            by = command("cancel", paths.root)
            said = [f"cancelled by: {by}; finished images are kept, resume with: {resume}"]
            # A cancel that came while sbatch ran did not see what sbatch then took.
            for submission, own in find_jobs(paths, found.submissions).by_submission:
                if not own.keys().isdisjoint(jobs):
                    journal.note_cancelled(paths, [job.id for job in own])
                    said += filter(None, [end_live(paths, submission, own)])
            raise SdwnError("\n".join(said))
        made, waiting = list[Job](), list[ArrayTask]()
        if todo and not is_unreachable(live):
            try:
                made, waiting, room = _submit_unheld(order, say, todo, room)
            except NoAnswerError as error:
                say(str(error))
        tries.update(index for job in made for index in job.indices)
        jobs += made
        if waiting and not live and not made and not waited:
            say("SLURM takes no more of your jobs now; waiting for room")
            waited = True
        _pause(began)
    if left:
        why, again = failure(paths, left[0]), resume
        if "time limit" in why:
            again += f" --time {2 * minutes(order.profile.time)}"
        raise SdwnError(
            f"{len(left)} of {len(work.assigned_shards)} shards failed; shard {left[0]}: {why}; "
            f"finished images are kept, submit the rest again with: {again}"
        )
    states = {job: state.state for job, state in live.items() if job.indices}
    # They have only their own records left to write.
    _await_end(paths, {job for job in states if states[job] == scheduler.RUNNING}, ignore)
    if idle := list(states.values()).count(scheduler.PENDING):
        say(
            f"every shard is finished; the queue still holds {counted(idle, 'task')} with nothing "
            f"left to do; end them with: {command('cancel', paths.root)}"
        )
    return jobs


def _balance(live: Live, before: dict[str, int], at_once: int) -> dict[str, int]:
    """Share the limit of running tasks among arrays as they empty; return each one's share."""
    arrays = Counter(job.id.partition("_")[0] for job in live if "_" in job.id)
    if is_unreachable(live) or not (len(arrays) > 1 or before):
        return before
    shares: dict[str, int] = {}
    for position, (array, tasks) in enumerate(arrays.items(), start=1):
        left = at_once - sum(shares.values()) - (len(arrays) - position)
        shares[array] = max(1, min(tasks, left))
        if before.get(array) != shares[array]:
            update = f"JobId={array}", f"ArrayTaskThrottle={shares[array]}"
            scheduler.output_lines(["scontrol", "update", *update])
    return shares


# --- Cancelling ----------------------------------------------------------------------------------
def cancel_run(paths: RunPaths, say: OnMessage = ignore) -> dict[Job, JobState]:
    """End all live jobs of a run and wait for their end; return their states before."""
    submissions = journal.read_journal(paths)
    found = find_jobs(paths, submissions, ask_slurm=True)
    if is_unreachable(found.live):
        raise SdwnError("SLURM does not answer; run the same command again when it does")
    denied = list[str]()
    for submission, live in found.by_submission:
        ids, yours = [job.id for job in live], submission.owner in (None, scheduler.user())
        if yours:
            # First, so that a command that follows the run does not submit it again.
            journal.note_cancelled(paths, ids)
        if reason := end_live(paths, submission, live):
            denied.append(reason)
        elif not yours:
            # Whether another user's may be ended shows when it is tried.
            journal.note_cancelled(paths, ids)
    # They are this user's: squeue listed no others of a name that the journal does not have.
    for name in dict.fromkeys(job.array for job in found.unrecorded):
        ids = [job.id for job in found.unrecorded if job.array == name]
        journal.note_cancelled(paths, ids)
        if reason := scheduler.end_jobs("slurm", paths.jobs, name, ids):
            denied.append(f"{_unrecorded(paths, ids)} could not be ended: {reason}")
    left = journal.last_jobs(submissions).keys() - paths.done_shards()
    if owners := journal.hidden_owners(submissions, left):
        names = " and ".join(owners)
        say(f"this site hides from you what {names} submitted here: not cancelled")
    if denied:
        raise SdwnError("\n".join(denied))
    jobs = found.live | found.unrecorded
    _await_end(paths, jobs, say)
    return jobs


def end_live(paths: RunPaths, submission: Submission, live: Live) -> str | None:
    """End live jobs of a submission; return what could not be ended and why, if anything."""
    ids = [job.id for job in live]
    reason = scheduler.end_jobs(submission.executor, paths.jobs, submission.name, ids)
    jobs = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"
    whose = submission.owner or "another user"
    return reason and f"{jobs} of {whose} could not be ended: {reason}"


def _await_end(paths: RunPaths, jobs: Collection[Job], say: OnMessage) -> None:
    """Wait for some time until ending jobs are gone: SLURM lets cancelled ones end themselves."""
    end, waited = time.monotonic() + ENDING_SECONDS, False
    while jobs:
        found = find_jobs(paths, journal.read_journal(paths), ask_slurm=True)
        if not (left := sorted(job.id for job in (found.live | found.unrecorded) if job in jobs)):
            return
        text = f"{len(left)} cancelled tasks are still ending ({', '.join(left[:3])})"
        if time.monotonic() > end:
            see = command("status", paths.root)
            say(f"{text}; retry takes their shards when they are gone; see: {see}")
            return
        if not waited:
            say(f"{text}; waiting for them")
        waited = True
        time.sleep(POLL_SECONDS)
