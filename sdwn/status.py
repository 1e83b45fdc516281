"""What is done, running, pending and failed; files are the truth, the scheduler adds what runs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdwn import scheduler
from sdwn.cluster import Job
from sdwn.files import LOWERED, RunPaths
from sdwn.plan import Plan, Shard
from sdwn.scheduler import PENDING, UNKNOWN, JobState
from sdwn.submission import failure, journal, last_jobs, live_jobs

RATE_WINDOW_S = 600
FAILURES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Counts of a run.

    A shard is done, or its live job runs, is pending, or cannot be asked for (``unknown``), or
    it failed (its jobs have ended without it), or was never submitted (``missing``).
    ``images_per_second`` is over the last ten minutes at most, 0 when nothing runs;
    ``seconds_left`` follows from it.
    ``restarts`` counts requeues, as far as the queue and accounting know them. ``lowered``
    names the tasks that ran out of memory and went on with smaller batches.
    """

    images_done: int
    images_total: int
    shards_done: int
    shards_total: int
    shards_running: int
    shards_pending: int
    shards_unknown: int
    shards_failed: int
    shards_missing: int
    restarts: int
    images_per_second: float
    seconds_left: float | None
    failures: list[str]
    lowered: list[str]

    @property
    def shards_live(self) -> int:
        """How many shards may still be made without another submission."""
        return self.shards_running + self.shards_pending + self.shards_unknown

    def as_dict(self) -> dict[str, Any]:
        """Turn the counts into plain data."""
        return asdict(self)


def run_status(paths: RunPaths, plan: Plan) -> RunStatus:
    """Look at a run's files and ask the scheduler."""
    live = live_jobs(paths)
    done = planned_done(paths, plan)
    states = {
        index: state.state
        for job, state in live.items()
        for index in job.indices
        if index not in done
    }
    submitted = last_jobs(paths)
    failed = [index for index in sorted(submitted) if index not in done and index not in states]
    pending = sum(state == PENDING for state in states.values())
    unknown = sum(state == UNKNOWN for state in states.values())
    running = len(states) - pending - unknown
    images, rate = images_done(paths, plan), images_per_second(paths, plan) if running else 0.0
    return RunStatus(
        images_done=images,
        images_total=plan.images,
        shards_done=len(done),
        shards_total=len(plan.shards),
        shards_running=running,
        shards_pending=pending,
        shards_unknown=unknown,
        shards_failed=len(failed),
        shards_missing=len(plan.shards) - len(done) - len(states) - len(failed),
        restarts=restarts(paths, live),
        images_per_second=rate,
        seconds_left=(plan.images - images) / rate if rate else None,
        failures=[f"shard {index}: {failure(paths, index)}" for index in failed[:FAILURES_SHOWN]],
        lowered=lowered(paths),
    )


def lowered(paths: RunPaths) -> list[str]:
    """Say which tasks ran out of memory; of many, a few."""
    notes = paths.lowered_notes()
    shown = [
        f"job {note.name.removesuffix(LOWERED)}: {_first_line(note)}"
        for note in notes[:FAILURES_SHOWN]
    ]
    more = len(notes) - len(shown)
    return [*shown, f"and {more} more"] if more else shown


def _first_line(note: Path) -> str:
    with note.open(encoding="utf-8", errors="replace") as file:
        return file.readline(200).strip()


def restarts(paths: RunPaths, live: dict[Job, JobState]) -> int:
    """Count the requeues of a run's jobs: by accounting, or of live jobs by the queue."""
    slurm = [job for s in journal(paths) if s.executor == "slurm" for job in s.jobs]
    ends = scheduler.sacct(job.id for job in slurm)
    known = {job: len(ends[job.id]) - 1 for job in slurm if job.id in ends}
    queued = {job: state.restarts for job, state in live.items()}
    return sum(max(known.get(job, 0), queued.get(job, 0)) for job in slurm)


def planned_done(paths: RunPaths, plan: Plan) -> set[int]:
    """List the finished shards that the plan has; a stray file is none."""
    return paths.done_shards() & set(range(len(plan.shards)))


def planned_started(paths: RunPaths, plan: Plan, done: set[int]) -> list[Shard]:
    """List the unfinished shards of the plan that have pieces."""
    started = set(paths.started_shards()) - done
    return [plan.shards[index] for index in sorted(started) if index < len(plan.shards)]


def images_done(paths: RunPaths, plan: Plan) -> int:
    """Count finished images from file names: whole shards, and the pieces of others."""
    done = planned_done(paths, plan)
    images = sum(plan.shard_images(plan.shards[index]) for index in done)
    for shard in planned_started(paths, plan, done):
        pieces = covered_images(paths.piece_ranges(shard.index))
        images += min(pieces, plan.shard_images(shard))
    return images


def images_per_second(paths: RunPaths, plan: Plan) -> float:
    """Measure a run's speed from when its latest files were written."""
    now = time.time()
    done = planned_done(paths, plan)
    ages = [
        (now - _mtime(paths.shard(index)), plan.shard_images(plan.shards[index])) for index in done
    ]
    for shard in planned_started(paths, plan, done):
        for start, stop in paths.piece_ranges(shard.index):
            written = _mtime(paths.piece(shard.index, start, stop))
            ages.append((now - written, stop - start))
    recent = [(age, images) for age, images in ages if age <= RATE_WINDOW_S]
    if len(recent) < 2:
        return 0.0
    oldest = max(age for age, _ in recent)
    # The oldest file marks when counting starts; its own images were made before.
    made = sum(images for _, images in recent) - next(i for age, i in recent if age == oldest)
    return made / oldest if oldest > 0 else 0.0


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # joined and removed just now


def covered_images(ranges: list[tuple[int, int]]) -> int:
    """Count the images in ranges that may overlap.

    >>> covered_images([(0, 20), (10, 30), (40, 50)])
    40
    """
    total = end = 0
    for start, stop in sorted(ranges):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
