"""The journal of a run, its jobs that still wait or run, and why others ended.

A journal is ``submissions.jsonl``: what was handed to a scheduler, written down before and after
it was. A line is one of::

    {"name", "stage", "tasks", ...}        about to be submitted
    {"name", "ids", "of": {...}}           the scheduler took it; all of it again
    {"name", "refused"}                    it did not
    {"cancelled", "jobs"}                  jobs that sdwn cancel ended
    {"then"}                               the stages that are to follow the shards

A task writes ``JOB_RANK_log.err`` for each of its processes. SLURM and the script write into that
of the first one, for all of them; before that, into the log of the array.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import model_validator

from sdwn.config import Positive, Section, validated
from sdwn.errors import SdwnError, command
from sdwn.io import JSON_BYTES, OnMessage, append_json, code_version, now, read_whole
from sdwn.jobs import scheduler
from sdwn.jobs.profile import SETUP_FAILED, ClusterProfile, overridden, starting_log
from sdwn.jobs.scheduler import Job, JobState, Live
from sdwn.jobs.task import ArrayTask
from sdwn.paths import RunPaths, release_above
from sdwn.planning.plan import ShardedWork

_ID = re.compile(r"[0-9]+(_[0-9]+)?")
# RUN-STAGE-1a2b3c4d; in older journals sdwn-0badcafe-1a2b3c4d.
_NAME = re.compile(r"(sdwn|[A-Za-z0-9][A-Za-z0-9_.-]{0,39}-[a-z]+)(-[0-9a-f]{8}){1,2}")
# What a job's name calls them.
_STAGE_WORDS = {"judge": "classify", "conclude": "figures"}

# How submitit ends the log of a job that raised nothing.
SUCCESS = ("completed successfully", "after successful completion")
# How it ends where it put the job back into the queue.
REQUEUED = ("Requeued job", "Exiting gracefully after preemption/timeout")
# A line of Python's logging, as tasks and submitit write it.
LOGGED = re.compile(r"\d{4}-\d\d-\d\d |submitit [A-Z]+ \(")
TRACEBACK = "Traceback (most recent call last):"
OF_SLURM = re.compile(r"(srun|slurmstepd\S*|slurmd\S*|\S*slurm_script): ")
OF_RANKS = re.compile(r"srun: error: \S+ tasks? (?P<ranks>[0-9,-]+): ")
TIME_LIMIT = "ended by its time limit"
# The first that SLURM's lines hold is the cause: a step that is cancelled is killed as well.
CAUSES = (
    (r"oom.?kill|out of memory|memory limit", "killed: it used more memory than it asked for"),
    (r"due to time limit", TIME_LIMIT),
    (r"due to preemption", "preempted by another job"),
    (r"node fail", "ended because its node failed"),
    (r"due to job requeue", "put back into the queue, and not started again"),
    (r"cancelled at", "cancelled by scancel, or by the site"),
    (r"\bkilled\b|exit code 137", "killed (SIGKILL), perhaps because the node's memory was full"),
    (r"segmentation fault|bus error|illegal instruction|aborted", "crashed in a library or driver"),
)
SILENT = "killed without a word (SIGKILL, a full memory), or its machine went down"


class Submission(Section):
    """An array that was to be submitted: its tasks, time, host, profile, plan and code.

    ``name`` is the job's own, by which the scheduler finds it. ``tasks`` holds the indices of each
    task's shards, ``ids`` the scheduler's ids, one a task: None if it was ``refused``, or while it
    isn't known whether the scheduler took it. ``cancelled`` are those that ``sdwn cancel`` ended.
    ``owner`` is who submitted it; None in older journals.
    """

    name: str
    time: str
    host: str
    executor: Literal["local", "slurm"]
    stage: str
    profile: dict[str, Any]
    processes: Positive
    plan: str
    code: str
    tasks: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...] | None = None
    refused: str | None = None
    cancelled: frozenset[str] = frozenset()
    owner: str | None = None

    @model_validator(mode="after")
    def _names_jobs(self) -> Submission:
        # They name folders, and are handed to scancel: of no other jobs of this user. Anybody may
        # have written a line of a journal.
        if not all(map(_ID.fullmatch, self.ids or ())) or not _NAME.fullmatch(self.name):
            raise ValueError(f"expected name and ids of jobs, found {self.name}, {self.ids}")
        return self

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Its jobs that are known."""
        return self.jobs_as(self.ids or ())

    def jobs_as(self, ids: Sequence[str]) -> tuple[Job, ...]:
        """Return its jobs under these ids."""
        pairs = zip(ids, self.tasks, strict=False)
        return tuple(Job(one, indices, self.processes, self.name) for one, indices in pairs)

    @property
    def site(self) -> ClusterProfile:
        """The profile that it was submitted under."""
        return validated(ClusterProfile, self.profile, source="the journal's profile")

    @property
    def unsettled(self) -> bool:
        """True if it is not known whether the scheduler took it: a crash came between."""
        return self.ids is None and self.refused is None


# --- Writing -------------------------------------------------------------------------------------
def array_name(paths: RunPaths, stage: str) -> str:
    """Return a new name for an array's jobs: of run, stage, and eight random letters.

    >>> from pathlib import Path
    >>> array_name(RunPaths(Path("/data/Größe, 7 %/release/evaluations/vit/work")), "judge")[:-8]
    'Gr-e-7-classify-'
    """
    root = paths.root.resolve()
    if root.name == "work" and "evaluations" in [one.name for one in root.parents[1:3]]:
        root = release_above(root)
    if root.name in ("pilot", "probe", "release"):
        root = root.parent
    run = re.sub(r"[^A-Za-z0-9._]+", "-", root.name).strip("-._")[:40] or "sdwn"
    return f"{run}-{_STAGE_WORDS.get(stage, stage)}-{uuid4().hex[:8]}"


def intend(paths: RunPaths, tasks: Sequence[ArrayTask], profile: ClusterProfile) -> Submission:
    """Write down an array that is about to be submitted."""
    submission = Submission(
        name=array_name(paths, tasks[0].stage.name),
        time=now(),
        host=socket.gethostname(),
        executor=profile.executor,
        stage=tasks[0].stage.name,
        profile=profile.record(),
        processes=profile.processes,
        plan=tasks[0].plan,
        code=code_version(),
        tasks=tuple(task.indices for task in tasks),
        owner=scheduler.user(),
    )
    paths.root.mkdir(parents=True, exist_ok=True)
    append_json(paths.submissions, submission.model_dump(exclude_defaults=True))
    return submission


def settle(paths: RunPaths, submission: Submission, ids: Sequence[str]) -> Submission:
    """Write down the scheduler's ids for it, and all of it once more, in case a line is lost."""
    of = submission.model_dump(exclude_defaults=True)
    append_json(paths.submissions, {"name": submission.name, "ids": list(ids), "of": of})
    return submission.model_copy(update={"ids": tuple(ids)})


def refuse(paths: RunPaths, submission: Submission, reason: str) -> None:
    """Write down that the scheduler did not take it."""
    append_json(paths.submissions, {"name": submission.name, "refused": reason})


def note_cancelled(paths: RunPaths, ids: Sequence[str]) -> None:
    """Write down that these jobs were cancelled, for commands that follow them."""
    append_json(paths.submissions, {"cancelled": now(), "jobs": list(ids)})


def note_later(paths: RunPaths, stages: Sequence[str]) -> None:
    """Write down which stages are to follow the shards, for a command that resumes the run."""
    append_json(paths.submissions, {"then": list(stages)})


# --- Reading -------------------------------------------------------------------------------------
@dataclass
class Journal:
    """The content of a journal; ``unreadable`` are the numbers of damaged lines."""

    by_name: dict[str, Submission] = field(default_factory=dict)
    later: tuple[str, ...] = ()
    cancellations: int = 0
    unreadable: list[int] = field(default_factory=list)

    @property
    def submissions(self) -> list[Submission]:
        """All submissions, in order."""
        return list(self.by_name.values())

    def _take(self, record: dict[str, Any]) -> None:
        found = self.by_name
        if "cancelled" in record:
            self.cancellations += 1
            ended = set(map(str, record.get("jobs", ())))
            for name, one in found.items():
                more = ended.intersection(one.ids or ())
                found[name] = one.model_copy(update={"cancelled": one.cancelled | more})
            return
        if "then" in record:
            self.later = tuple(map(str, record["then"]))
            return
        name = str(record["name"])
        if "tasks" in record:
            found[name] = Submission.model_validate(record)
        elif "ids" in record:
            if name not in found:
                self._take(record["of"])
            # In older journals the owner stands beside the ids.
            ids, owner = tuple(map(str, record["ids"])), record.get("owner", found[name].owner)
            known = {**dict(found[name]), "ids": ids, "owner": owner and str(owner)}
            found[name] = Submission.model_validate(known)
        else:
            found[name] = found[name].model_copy(update={"refused": str(record["refused"])})


def open_journal(paths: RunPaths) -> Journal:
    """Read a run's journal; an empty one where nothing was submitted."""
    journal = Journal()
    there = paths.submissions.exists()
    text = read_whole(paths.submissions, JSON_BYTES).decode(errors="replace") if there else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            journal._take(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            journal.unreadable.append(number)
    return journal


def read_journal(paths: RunPaths) -> list[Submission]:
    """Read all submissions of a run, in order."""
    return open_journal(paths).submissions


def report_damage(paths: RunPaths, journal: Journal, say: OnMessage) -> None:
    """Report the unreadable lines of the journal; the scheduler may still know their jobs."""
    if lines := journal.unreadable:
        numbers = ", ".join(map(str, lines))
        say(f"{paths.submissions}: cannot be read in line {numbers}: cut short or damaged")


def last_jobs(submissions: Sequence[Submission]) -> dict[int, Job]:
    """Return the last job of each shard that was ever submitted."""
    return {index: job for one in submissions for job in one.jobs for index in job.indices}


def cancelled_jobs(submissions: Sequence[Submission]) -> set[Job]:
    """Return the jobs that ``sdwn cancel`` ended."""
    some = (one for one in submissions if one.cancelled)
    return {job for one in some for job in one.jobs if job.id in one.cancelled}


def last_profile(paths: RunPaths, overrides: dict[str, str]) -> ClusterProfile:
    """Return the profile of the last submission of shards, with overrides."""
    submissions = [one for one in read_journal(paths) if one.stage == "generate"]
    if not submissions:
        advice = command("submit", paths.root, "--profile", "PROFILE")
        raise SdwnError(f"{paths.root}: nothing was submitted yet; use: {advice}")
    taken = [one for one in submissions if not one.refused] or submissions
    return overridden(taken[-1].profile, overrides, source="the last submission's profile")


# --- What lives: the journal compared with the scheduler -----------------------------------------
@dataclass(frozen=True, slots=True)
class RunJobs:
    """A run's jobs that wait or run; ``unrecorded`` are those that the journal does not know."""

    by_submission: list[tuple[Submission, dict[Job, JobState]]]  # of each that has some
    unrecorded: dict[Job, JobState]

    @property
    def live(self) -> dict[Job, JobState]:
        """All of them that the journal knows."""
        return {job: state for _, jobs in self.by_submission for job, state in jobs.items()}


def find_jobs(
    paths: RunPaths, submissions: Sequence[Submission], ask_slurm: bool = False
) -> RunJobs:
    """Find the jobs of submissions; SLURM is asked where some went there, or if it is wanted."""
    in_slurm = [one for one in submissions if one.executor == "slurm" and not one.refused]
    queue = own = scheduler.squeue() if in_slurm or ask_slurm else {}
    others = [one.name for one in in_slurm if one.owner != scheduler.user()]
    if own is not None and others:
        seen = scheduler.squeue(others, everybody=True)
        queue = None if seen is None else own | seen
    # Processes of another host count as ended: making a shard twice costs time, waiting for a
    # dead process has no end.
    local = any(one.executor == "local" for one in submissions)
    running = scheduler.processes(paths.jobs) if local else {}
    processes = {job: JobState(scheduler.RUNNING, name=name) for job, (_, name) in running.items()}
    by_submission = []
    for one in submissions:
        jobs, listed = one.jobs, processes if one.executor == "local" else queue
        if listed is None:
            # Without an id, its name and the task's number stand for it.
            if one.unsettled:
                jobs = one.jobs_as([f"{one.name}_{n}" for n in range(len(one.tasks))])
            states = {job.id: scheduler.NO_ANSWER for job in jobs}
        else:
            # An id alone may be another job's by now: they begin anew, and clusters count for
            # themselves.
            states = {job: state for job, state in listed.items() if state.name == one.name}
            if one.unsettled and states:
                jobs = one.jobs_as(scheduler.job_ids(next(iter(states)), len(one.tasks)))
        if live := {job: states[job.id] for job in jobs if job.id in states}:
            by_submission.append((one, live))
    known = {one.name for one in submissions}
    lost = {
        Job(job, (), array=state.name): state
        for job, state in (own or {}).items()
        # An array's script lies in its run's folder.
        if state.name not in known
        and _NAME.fullmatch(state.name)
        and (paths.jobs / f"{state.name}.sh").exists()
    }
    return RunJobs(by_submission, lost)


def live_jobs(paths: RunPaths, submissions: Sequence[Submission] | None = None) -> Live:
    """Return the jobs that still wait or run, or may do so, of these or of all submissions."""
    return find_jobs(paths, read_journal(paths) if submissions is None else submissions).live


def is_unreachable(live: Live) -> bool:
    """Return whether the scheduler does not answer."""
    return any(state.state == scheduler.UNKNOWN for state in live.values())


def hidden_owners(submissions: Sequence[Submission], shards: set[int]) -> list[str]:
    """List the other users whose jobs for these shards the site may hide (PrivateData)."""
    others = {
        one.owner
        for one in submissions
        if one.executor == "slurm" and one.owner not in (None, scheduler.user())
        for job in one.jobs
        if job.id not in one.cancelled and not shards.isdisjoint(job.indices)
    }
    hidden = others and "jobs" in scheduler.site_config().get("PrivateData", "").split(",")
    return sorted(filter(None, others)) if hidden else []


def unfinished_shards(paths: RunPaths, work: ShardedWork) -> list[int]:
    """List the shards that this folder is to have and that are not finished."""
    done = work.done(paths)
    return [shard.index for shard in work.assigned_shards if shard.index not in done]


def unheld_shards(paths: RunPaths, work: ShardedWork, live: Live | None = None) -> list[int]:
    """List the shards that are neither finished nor in the hands of a live job."""
    # Asked for before the files: a shard may be finished in between.
    live = live_jobs(paths) if live is None else live
    busy = {index for job in live for index in job.indices}
    return [index for index in unfinished_shards(paths, work) if index not in busy]


# --- Logs, and why jobs ended --------------------------------------------------------------------
def failure(paths: RunPaths, index: int) -> str:
    """Return why a shard is not there, from the journal and the log of its last job."""
    submissions = read_journal(paths)
    if (job := last_jobs(submissions).get(index)) is None:
        return "never submitted"
    if job in cancelled_jobs(submissions):
        return f"cancelled as job {job.id}"
    return shard_failure(paths, index, job)


def shard_failure(paths: RunPaths, index: int, job: Job) -> str:
    """Return why a shard is not there, from the log of its last job, which was not cancelled."""
    # The process that works on the shard.
    reason = end_reason(paths, job, job.indices.index(index) % job.processes)
    if is_success(reason):
        return f"job {job.id} finished it, but {paths.shard(index)} is gone: deleted or moved"
    return reason


def end_reason(paths: RunPaths, job: Job, rank: int = 0) -> str:
    """Return the reason why a process of a job ended, and the path of its log."""
    start = starting_log(paths.jobs, job.array)
    first, own = (paths.jobs / job.id / f"{job.id}_{number}_log.err" for number in (0, rank))
    # What ends a job before it starts its processes stands in the log of the first.
    log = own if own.exists() else first
    lines, before = _lines(log), _lines(start)
    if before and not lines:
        return f"{before[-1]} ({start})"
    if not log.exists():
        return f"job {job.id} left no log: cancelled before it began, or its node sees another disk"
    if lines and lines[-1].startswith(SETUP_FAILED):
        return f"{': '.join(lines[-2:][::-1])} ({log})"
    return f"{_cause(log, lines, rank)} ({log})"


def is_success(reason: str) -> bool:
    """Return whether a reason is that the job succeeded."""
    return any(words in reason for words in SUCCESS)


def _cause(log: Path, lines: list[str], rank: int) -> str:
    own = [line for line in lines if not OF_SLURM.match(line)]
    last = own[-1] if own else "an empty log"
    # After the traceback of what ended it, nothing more was logged.
    unlogged = takewhile(lambda line: not LOGGED.match(line), reversed(own))
    if TRACEBACK in unlogged or is_success(last):
        return last
    if rank == 0:
        # Earlier ones are of starts before this one.
        of_slurm = list(takewhile(OF_SLURM.match, reversed(lines)))
    else:
        first = log.with_name(log.name.replace(f"_{rank}_log", "_0_log"))
        of_slurm = list(filter(OF_SLURM.match, _lines(first)))
    if text := "\n".join(line for line in of_slurm if _concerns(line, rank)).casefold():
        return next((cause for words, cause in CAUSES if re.search(words, text)), last)
    if any(words in last for words in REQUEUED):
        return f"{TIME_LIMIT} or preempted, and not started again"
    # From there on, submitit writes into the log whatever ends the task, if it can.
    started = any("Loading pickle" in line for line in _lines(log.with_suffix(".out")))
    return SILENT if started else last


def _concerns(line: str, rank: int) -> bool:
    """Return whether a line of SLURM's is about a process, or about the whole job."""
    match = OF_RANKS.match(line)
    if match is None:
        return True
    bounds = (part.split("-") for part in match["ranks"].split(","))
    return any(int(ends[0]) <= rank <= int(ends[-1]) for ends in bounds)


def job_logs(paths: RunPaths, job: Job) -> list[Path]:
    """List a job's logs: several processes a task write several, one that cannot start none."""
    logs = sorted((paths.jobs / job.id).glob(f"{job.id}_*_log.*"))
    start = starting_log(paths.jobs, job.array)
    return logs if any(map(_lines, logs)) or not _lines(start) else [start]


def log_lines(log: Path) -> list[str]:
    """Read a log's lines, of which a task may be writing the last; none where there is no log."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _lines(log: Path) -> list[str]:
    return list(filter(None, map(str.strip, log_lines(log))))
