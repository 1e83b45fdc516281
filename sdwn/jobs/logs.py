"""Logs of jobs, and the reasons why jobs ended.

A task writes ``JOB_RANK_log.err`` for each of its processes. SLURM, and the script that it runs,
write into the log of the first one, for all of them; before that, into the log of the array.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

from sdwn.jobs.journal import Submission, cancelled_jobs, last_jobs, read_journal
from sdwn.jobs.profile import SETUP_FAILED, starting_log
from sdwn.jobs.scheduler import Job
from sdwn.paths import RunPaths

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


def failure(paths: RunPaths, index: int, submissions: Sequence[Submission] | None = None) -> str:
    """Return why a shard is not there, from the journal and the log of its last job."""
    submissions = read_journal(paths) if submissions is None else submissions
    job = last_jobs(submissions).get(index)
    if job is None:
        return "never submitted"
    if job in cancelled_jobs(submissions):
        return f"cancelled as job {job.id}"
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


def tails(paths: RunPaths, jobs: Iterable[Job], lines: int) -> dict[str, str]:
    """Return the last lines of the logs of these jobs, by path."""
    return {
        str(log): "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        for job in dict.fromkeys(jobs)
        for log in job_logs(paths, job)
    }


def _lines(log: Path) -> list[str]:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
