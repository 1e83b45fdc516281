"""What jobs said: the logs of the tasks that made, or failed to make, shards."""

from __future__ import annotations

from pathlib import Path

from sdwn.files import RunPaths
from sdwn.jobs.cluster import Job
from sdwn.jobs.journal import last_jobs, read_journal


def failure(paths: RunPaths, index: int) -> str:
    """Say why a shard's last job failed: the last line of its log."""
    job = last_jobs(read_journal(paths)).get(index)
    return "never submitted" if job is None else reason(paths, job, job.rank(index))


def reason(paths: RunPaths, job: Job, rank: int = 0) -> str:
    """Give the last line of what a process of a job said, and where it stands."""
    log = paths.jobs / job.id / f"{job.id}_{rank}_log.err"
    return f"{last_line(log)} ({log})" if log.exists() else f"job {job.id} wrote no log"


def job_logs(paths: RunPaths, job: Job) -> list[Path]:
    """List a job's logs; several processes a task write several."""
    return sorted((paths.jobs / job.id).glob(f"{job.id}_*_log.*"))


def shard_logs(paths: RunPaths, indices: list[int], lines: int) -> dict[str, str]:
    """Give the last lines of the logs of the jobs that had these shards last, by path."""
    last = last_jobs(read_journal(paths))
    jobs = dict.fromkeys(last[index] for index in indices if index in last)
    return {
        str(log): "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        for job in jobs
        for log in job_logs(paths, job)
    }


def last_line(log: Path) -> str:
    """Give the last line of a log that says something: not srun's word that a task ended."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no log"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("srun: ")]
    return (telling or lines or ["an empty log"])[-1]
