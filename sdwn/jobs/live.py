"""What still waits or runs of a run: its journal, held against what the scheduler says."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from sdwn.jobs import scheduler
from sdwn.jobs.cluster import Job, job_ids
from sdwn.jobs.journal import Submission, cancelled_jobs, last_jobs, read_journal, run_name
from sdwn.jobs.scheduler import NO_ANSWER, UNKNOWN, JobState
from sdwn.jobs.site import hides_jobs, user
from sdwn.paths import RunPaths
from sdwn.planning.work import Dealt

Live = Mapping[Job, JobState]


def live_jobs(paths: RunPaths) -> dict[Job, JobState]:
    """Give the jobs of the journal that still wait or run, or may do so."""
    return live_of(paths, read_journal(paths))


def live_of(paths: RunPaths, submissions: Sequence[Submission]) -> dict[Job, JobState]:
    """Give those of these submissions' jobs that still wait or run, or may do so."""
    each = live_each(paths, submissions)
    return {job: state for _, jobs in each for job, state in jobs.items()}


def live_each(
    paths: RunPaths, submissions: Sequence[Submission]
) -> list[tuple[Submission, dict[Job, JobState]]]:
    """Give each submission's jobs that still wait or run, or may do so."""
    asked = [one for one in submissions if one.executor == "slurm" and not one.refused]
    everybody = any(one.owner != user() for one in asked)
    queue = scheduler.squeue((one.name for one in asked), everybody) if asked else {}
    return [(submission, _live(paths, submission, queue)) for submission in submissions]


def _live(
    paths: RunPaths, submission: Submission, queue: Mapping[str, JobState] | None
) -> dict[Job, JobState]:
    if submission.executor == "local":
        processes = scheduler.processes(paths.jobs, submission.host, submission.ids or ())
        return {job: processes[job.id] for job in submission.jobs if job.id in processes}
    if queue is None:
        # Without an id, its name and the task's number stand for it.
        ids = submission.ids or [f"{submission.name}_{n}" for n in range(len(submission.tasks))]
        jobs = () if submission.refused else submission.jobs_as(ids)
        return dict.fromkeys(jobs, NO_ANSWER)
    # An id alone may be another job's by now: they begin anew, and clusters count for themselves.
    own = {job: state for job, state in queue.items() if state.name == submission.name}
    jobs = submission.jobs
    if submission.unsettled and own:
        jobs = submission.jobs_as(job_ids(next(iter(own)), len(submission.tasks)))
    return {job: own[job.id] for job in jobs if job.id in own}


def strays(paths: RunPaths) -> dict[Job, JobState]:
    """Find this user's jobs of a run that its journal does not know: lines of it were lost."""
    known, begin = {one.name for one in read_journal(paths)}, run_name(paths)
    return {
        Job(job, (), array=state.name): state
        for job, state in (scheduler.squeue() or {}).items()
        if state.name.startswith(begin) and state.name not in known
    }


def end(paths: RunPaths, submission: Submission, live: Live) -> str | None:
    """End live jobs of a submission; return what could not be ended and why, if anything."""
    ids = [job.id for job in live]
    reason = scheduler.cancel(submission.executor, paths.jobs, submission.name, ids)
    if reason is None:
        return None
    jobs = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"
    return f"{jobs} of {submission.owner or 'another user'} could not be ended: {reason}"


def hidden_owners(submissions: Sequence[Submission], indices: Container[int]) -> list[str]:
    """Name the other users whose jobs for these shards the site may hide from this user.

    Where SLURM's PrivateData says so, nobody sees whether another's jobs wait, run or have ended.
    """
    others = {
        one.owner
        for one in submissions
        if one.executor == "slurm" and one.owner not in (None, user())
        for job in one.jobs
        if job.id not in one.cancelled and any(index in indices for index in job.indices)
    }
    return sorted(filter(None, others)) if others and hides_jobs() else []


def unreachable(live: Live) -> bool:
    """Tell whether the scheduler does not answer."""
    return any(state.state == UNKNOWN for state in live.values())


def missing(paths: RunPaths, plan: Dealt) -> list[int]:
    """List the shards that this folder is to have and that are not finished."""
    done = plan.done(paths)
    return [shard.index for shard in plan.own_shards if shard.index not in done]


def unfinished(paths: RunPaths, plan: Dealt, live: Live | None = None) -> list[int]:
    """List the shards that are neither finished nor in the hands of a live job."""
    # Asked for before the files: a shard may be finished in between.
    live = live_jobs(paths) if live is None else live
    busy = {index for job in live for index in job.indices}
    return [index for index in missing(paths, plan) if index not in busy]


def failed(paths: RunPaths, plan: Dealt) -> list[int]:
    """List the shards whose jobs have ended without them, and were not cancelled."""
    submissions = read_journal(paths)
    submitted, cancelled = last_jobs(submissions), cancelled_jobs(submissions)
    return [
        index
        for index in unfinished(paths, plan)
        if index in submitted and submitted[index] not in cancelled
    ]
