"""Submitting what is unfinished, journaling it, and following it to the end."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sdwn import cluster, limits, scheduler
from sdwn.batches import off_grid
from sdwn.cluster import Job
from sdwn.config import RunConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.files import RunPaths, now, plain_disk_errors
from sdwn.plan import Plan
from sdwn.profiles import ClusterProfile, overridden
from sdwn.scheduler import UNKNOWN, JobState
from sdwn.task import ArrayTask

POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Submission:
    """One line of the journal: what was submitted, when, from where, to whom, and how."""

    time: str
    host: str
    executor: Literal["local", "slurm"]
    stage: str
    profile: dict[str, Any]
    jobs: tuple[Job, ...]


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


def unfinished(paths: RunPaths, plan: Plan) -> list[int]:
    """List the shards that are neither finished nor in the hands of a live job."""
    live = live_jobs(paths)  # before the files: a shard may be finished in between
    busy = {index for job in live for index in job.indices}
    return [index for index in missing(paths, plan) if index not in busy]


def missing(paths: RunPaths, plan: Plan) -> list[int]:
    """List the shards that are not finished."""
    done = paths.done_shards()
    return [shard.index for shard in plan.shards if shard.index not in done]


def failed(paths: RunPaths, plan: Plan) -> list[int]:
    """List the shards that were submitted, whose jobs have ended, and that are not finished."""
    submitted = last_jobs(paths)
    return [index for index in unfinished(paths, plan) if index in submitted]


def live_jobs(paths: RunPaths) -> dict[Job, JobState]:
    """Give the jobs of the journal that still wait or run, or may do so."""
    jobs: dict[tuple[Literal["local", "slurm"], str], list[Job]] = {}
    for submission in journal(paths):
        jobs.setdefault((submission.executor, submission.host), []).extend(submission.jobs)
    live: dict[Job, JobState] = {}
    for (executor, host), asked in jobs.items():
        states = scheduler.ask(executor, host, [job.id for job in asked])
        live |= {job: states[job.id] for job in asked if job.id in states}
    return live


def submit_shards(paths: RunPaths, indices: list[int], profile: ClusterProfile) -> list[Job]:
    """Submit shards, dealt to tasks as the profile says."""
    root = str(paths.root.absolute())
    tasks = [ArrayTask("generate", root, part) for part in cluster.cut(indices, profile)]
    return submit_tasks(paths, tasks, profile)


def submit_tasks(paths: RunPaths, tasks: Sequence[ArrayTask], profile: ClusterProfile) -> list[Job]:
    """Submit tasks as one array, or several where MaxArraySize asks for it; write each down."""
    slurm = profile.executor == "slurm"
    limit = limits.ask(profile).max_array_size if slurm else max(1, len(tasks))
    groups = cluster.arrays(tasks, limit)
    # Together they keep to what one array may run at once.
    share = max(1, profile.array_parallelism // max(1, len(groups)))
    jobs: list[Job] = []
    for group in groups:
        part = profile.model_copy(update={"array_parallelism": share})
        with plain_disk_errors(paths.jobs):
            made = cluster.submit(group, paths.jobs, part)
        _record(paths, tasks[0].stage, profile, made)
        jobs += made
    return jobs


def _record(paths: RunPaths, stage: str, profile: ClusterProfile, jobs: list[Job]) -> None:
    submission = Submission(
        time=now(),
        host=socket.gethostname(),
        executor=profile.executor,
        stage=stage,
        profile=profile.model_dump(mode="json", exclude_defaults=True),
        jobs=tuple(jobs),
    )
    # A line that a crash cut short must not swallow this one.
    torn = paths.submissions.exists() and not paths.submissions.read_bytes().endswith(b"\n")
    with paths.submissions.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(asdict(submission)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def journal(paths: RunPaths) -> list[Submission]:
    """Read all submissions of a run; lines that a crash cut short are left out."""
    if not paths.submissions.exists():
        return []
    lines = paths.submissions.read_text(encoding="utf-8", errors="replace").splitlines()
    records = (_parsed(line) for line in lines)
    return [record for record in records if record is not None]


def _parsed(line: str) -> Submission | None:
    try:
        content: dict[str, Any] = json.loads(line)
        jobs = tuple(
            Job(str(job["id"]), tuple(int(i) for i in job["indices"]), int(job.get("processes", 1)))
            for job in content.pop("jobs")
        )
        return Submission(**content, jobs=jobs)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def last_profile(paths: RunPaths, overrides: dict[str, str]) -> ClusterProfile:
    """Give the profile of the last submission, with overrides.

    Raises:
        SdwnError: nothing was submitted yet.
    """
    submissions = journal(paths)
    if not submissions:
        raise SdwnError(f"{paths.root}: nothing was submitted yet; use: sdwn submit {paths.root}")
    return overridden(submissions[-1].profile, overrides, source="the last submission's profile")


Watch = Callable[[dict[Job, JobState]], None]


def follow(paths: RunPaths, watch: Watch) -> None:
    """Wait until no job of the run is left, telling ``watch`` about once a second."""
    while live := live_jobs(paths):
        watch(live)
        time.sleep(POLL_SECONDS)
    watch({})


def complete(
    paths: RunPaths, plan: Plan, profile: ClusterProfile, watch: Watch, retries: int
) -> list[Job]:
    """Submit and follow until every shard is finished, trying what failed again.

    Raises:
        SdwnError: shards are still missing; the last line of a log says why.
    """
    jobs: list[Job] = []
    for _ in range(1 + retries):
        jobs += submit_shards(paths, unfinished(paths, plan), profile)
        follow(paths, watch)
        if not missing(paths, plan):
            return jobs
    left = missing(paths, plan)
    raise SdwnError(
        f"{len(left)} of {len(plan.shards)} shards failed; shard {left[0]}: "
        f"{failure(paths, left[0])}; finished images are kept, "
        f"submit the rest again with: sdwn submit {paths.root} --wait"
    )


def last_jobs(paths: RunPaths) -> dict[int, Job]:
    """Give the last job of each shard that was ever submitted."""
    return {
        index: job
        for submission in journal(paths)
        for job in submission.jobs
        for index in job.indices
    }


def failure(paths: RunPaths, index: int) -> str:
    """Say why a shard's last job failed: the last line of its log."""
    job = last_jobs(paths).get(index)
    if job is None:
        return "never submitted"
    log = paths.jobs / job.id / f"{job.id}_{job.rank(index)}_log.err"
    return f"{last_line(log)} ({log})" if log.exists() else f"job {job.id} wrote no log"


def job_logs(paths: RunPaths, job: Job) -> list[Path]:
    """List a job's logs; several processes a task write several."""
    return sorted((paths.jobs / job.id).glob(f"{job.id}_*_log.*"))


def shard_logs(paths: RunPaths, indices: list[int], lines: int) -> dict[str, str]:
    """Give the last lines of the logs of the jobs that had these shards last, by path."""
    last = last_jobs(paths)
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


def cancel(paths: RunPaths) -> list[Job]:
    """End all live jobs of a run; what they have finished stays."""
    cancelled = []
    live = live_jobs(paths)
    for submission in journal(paths):
        jobs = [job for job in submission.jobs if job in live]
        if jobs:
            scheduler.cancel(submission.executor, [job.id for job in jobs])
            cancelled += jobs
    return cancelled


def unreachable(live: dict[Job, JobState]) -> bool:
    """Tell whether the scheduler does not answer."""
    return any(state.state == UNKNOWN for state in live.values())
