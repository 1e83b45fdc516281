"""What is done, running, pending and failed; files are the truth, the scheduler adds what runs."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from sdwn.errors import IntegrityError
from sdwn.jobs.journal import Submission, cancelled_jobs, last_jobs, read_journal
from sdwn.jobs.live import Live, hidden_owners, live_of
from sdwn.jobs.logs import failure
from sdwn.jobs.records import TaskRecord, read_record
from sdwn.jobs.scheduler import PENDING, UNKNOWN
from sdwn.jobs.stuck import cannot_start
from sdwn.paths import CHANGED, LOWERED, NO_GPU, RESTART_NAME, TASK_NAME, WAITED, RunPaths
from sdwn.planning.plan import Plan, Shard
from sdwn.planning.work import Dealt
from sdwn.preflight.estimate import stored_bytes
from sdwn.workflow import later_stages as chain

RATE_WINDOW_S = 600
FAILURES_SHOWN = 5
# How a full disk or quota is told, by Python, HDF5 and sdwn itself.
NO_SPACE = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "no space or quota left")


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """What one kind of device does now: processes that sample, their speed, when they end.

    ``seconds_left`` is until the last of them has made the shards that its task holds.
    """

    processes: int
    images_per_second: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Counts of a run, or of its slice.

    A shard is done, or its live job runs, is pending, or cannot be asked for (``unknown``), or
    it failed (its jobs have ended without it), or was cancelled, or was never submitted
    (``missing``). ``jobs_live`` counts the jobs that wait or run, later stages included,
    ``pending_reasons`` those that wait by SLURM's reason; ``cannot_start`` says which of them
    wait in vain, and what to do.
    ``images_per_second`` is over the last ten minutes at most, 0 when nothing runs;
    ``seconds_left`` follows from it, ``gpus`` from what running tasks say of themselves.
    ``restarts`` counts requeues of tasks that had begun, ``lowered`` names tasks that ran out of
    memory and went on with smaller batches, ``changed_code`` those that other code ran than had
    submitted them, ``without_gpu`` those that were given a GPU and work on the CPU, ``then`` how
    the later stages stand, ``waited`` names tasks that waited for a disk that failed,
    ``submitted_by`` who submitted.
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
    shards_cancelled: int
    jobs_live: int
    restarts: int
    pending_reasons: dict[str, int]
    cannot_start: list[str]
    images_per_second: float
    seconds_left: float | None
    gpus: dict[str, GpuStatus]
    failures: list[str]
    lowered: list[str]
    changed_code: list[str]
    without_gpu: list[str]
    then: dict[str, str]
    waited: list[str]
    submitted_by: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Turn the counts into plain data."""
        return asdict(self)


def run_status(paths: RunPaths, plan: Dealt) -> RunStatus:
    """Look at the names of a run's files and ask the scheduler.

    No shard is opened, and of the tasks' own records only those of running tasks.
    """
    submissions = read_journal(paths)
    live = live_of(paths, submissions)
    files = Files(paths, plan)
    done = files.done
    states = {
        index: state.state
        for job, state in live.items()
        for index in job.indices
        if index not in done
    }
    submitted = last_jobs(submissions)
    ended = [index for index in sorted(submitted) if index not in done and index not in states]
    cancelled = cancelled_jobs(submissions)
    failed = [index for index in ended if submitted[index] not in cancelled]
    pending = sum(state == PENDING for state in states.values())
    unknown = sum(state == UNKNOWN for state in states.values())
    running = len(states) - pending - unknown
    rate = files.images_per_second() if running else 0.0
    names = paths.task_names()
    then, stages = chain.states(paths, submissions, live), chain.last_stages(submissions)
    open_stages = {job for stage, job in stages.items() if then[stage] != chain.DONE}
    total, own = plan.own_images, len(plan.own_shards)
    return RunStatus(
        images_done=files.images,
        images_total=total,
        shards_done=len(done),
        shards_total=own,
        shards_running=running,
        shards_pending=pending,
        shards_unknown=unknown,
        shards_failed=len(failed),
        shards_missing=own - len(done) - len(states) - len(ended),
        shards_cancelled=len(ended) - len(failed),
        jobs_live=sum(
            # Without a controller any job may live; those with nothing left to do do not count.
            state.state != UNKNOWN or not done.issuperset(job.indices) or job in open_stages
            for job, state in live.items()
        ),
        restarts=restarts(names),
        pending_reasons=dict(Counter(s.reason for s in live.values() if s.state == PENDING)),
        cannot_start=list(cannot_start(live).values()),
        images_per_second=rate,
        seconds_left=(total - files.images) / rate if rate else None,
        gpus=by_gpu(running_records(paths, names, live)),
        failures=_failures(paths, plan, failed),
        lowered=_notes(paths, names, LOWERED),
        changed_code=_notes(paths, names, CHANGED),
        without_gpu=_notes(paths, names, NO_GPU),
        then=then,
        waited=_notes(paths, names, WAITED),
        submitted_by=_owners(submissions, failed),
    )


def _owners(submissions: list[Submission], failed: list[int]) -> list[str]:
    """Name the users who submitted; say whose jobs the site hides."""
    hidden = hidden_owners(submissions, failed)
    owners = dict.fromkeys(one.owner for one in submissions if one.owner)
    note = " (this site hides their jobs: their shards that wait or run count as failed)"
    return [f"{owner}{note * (owner in hidden)}" for owner in owners]


def _failures(paths: RunPaths, plan: Dealt, failed: list[int]) -> list[str]:
    """Describe why a few shards failed."""
    said = [f"shard {index}: {failure(paths, index)}" for index in failed[:FAILURES_SHOWN]]
    if said and (short := shortage(paths, plan, said[0])):
        said.append(short)
    return said


def shortage(paths: RunPaths, plan: Dealt, said: str) -> str | None:
    """Compare the space that is free with what a run still needs, if space is why it failed."""
    if not isinstance(plan, Plan) or not any(words in said for words in NO_SPACE):
        return None
    needed, _ = stored_bytes(paths, plan, plan.own_images - images_done(paths, plan))
    free = shutil.disk_usage(paths.root).free
    text = f"the rest of the run needs about {decimal(needed)}, {decimal(free)} are free"
    if needed > free:
        return f"{text}: {decimal(needed - free)} are missing"
    return f"{text}: space was freed since, or your quota is used up"


def images_done(paths: RunPaths, plan: Dealt) -> int:
    """Count finished images from file names: whole shards, and the pieces of others."""
    return Files(paths, plan).images


class Files:
    """The finished shards and pieces of a run's slice: their names, and when they were written."""

    def __init__(self, paths: RunPaths, plan: Dealt) -> None:
        self._paths, self._plan = paths, plan
        self._written = dict(_listed(paths.shards))
        own = {shard.index for shard in plan.own_shards}
        # Before the shards: one that is finished in between is counted then, and never dropped.
        started = {index: paths.piece_ranges(index) for index in paths.started_shards()}
        self.done = plan.done(paths) & own
        self._pieces: dict[Shard, list[tuple[int, int]]] = {
            plan.shards[index]: ranges
            for index, ranges in started.items()
            if index in own and index not in self.done
        }

    @property
    def images(self) -> int:
        """Number of finished images."""
        whole = sum(self._plan.shard_images(self._plan.shards[index]) for index in self.done)
        return whole + sum(
            min(covered_images(ranges), self._plan.shard_images(shard))
            for shard, ranges in self._pieces.items()
        )

    def images_per_second(self) -> float:
        """Measure a run's speed from when its latest files were written."""
        now = time.time()
        ages = [(now - written, images) for written, images in self._times()]
        recent = [(age, images) for age, images in ages if age <= RATE_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        oldest = max(age for age, _ in recent)
        # The oldest file marks when counting starts; its own images were made before.
        made = sum(images for _, images in recent) - next(i for age, i in recent if age == oldest)
        return made / oldest if oldest > 0 else 0.0

    def _times(self) -> Iterator[tuple[float, int]]:
        paths, plan = self._paths, self._plan
        for index in self.done:
            # Shards may have been removed, or finished since the folder was listed.
            if (written := self._written.get(paths.shard(index).name)) is not None:
                yield written, plan.shard_images(plan.shards[index])
        for shard, ranges in self._pieces.items():
            for start, stop in ranges:
                yield _mtime(paths.piece(shard.index, start, stop)), stop - start


def _listed(folder: Path) -> Iterator[tuple[str, float]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_file():
                    yield entry.name, entry.stat().st_mtime
            except OSError:
                continue  # a temporary file, gone just now


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # joined and removed just now


def restarts(names: set[str]) -> int:
    """Count requeues of tasks that started again, from what each start left.

    What the queue says is forgotten when a job ends, and the count would fall.
    """
    known: dict[str, int] = {}
    for match in filter(None, map(RESTART_NAME.fullmatch, names)):
        known[match["job"]] = max(known.get(match["job"], 0), int(match["start"]))
    return sum(known.values())


def running_records(paths: RunPaths, names: set[str], live: Live) -> list[TaskRecord]:
    """Read what the running tasks say of themselves, each process's last record."""
    running = {job.id for job, state in live.items() if state.state not in (PENDING, UNKNOWN)}
    latest: dict[tuple[str, str], tuple[int, str]] = {}
    for match in filter(None, map(TASK_NAME.fullmatch, names)):
        if match["job"] in running:
            process = match["job"], match["rank"]
            start = int(match["start"] or 0), match[0]
            latest[process] = max(latest.get(process, start), start)
    found = []
    for _, name in latest.values():
        try:
            found.append(read_record(paths.tasks / name))
        except IntegrityError:
            continue  # of another version
    return found


def by_gpu(records: list[TaskRecord]) -> dict[str, GpuStatus]:
    """Add up the processes that sample now, by the name of their device."""
    kinds: dict[str, list[TaskRecord]] = defaultdict(list)
    for record in records:
        if not record.ended:
            kinds[record.device].append(record)
    return {device: _together(kinds[device]) for device in sorted(kinds)}


def _together(records: list[TaskRecord]) -> GpuStatus:
    rates = [(record, (record.images_per_second or 0) * record.busy) for record in records]
    ends = [(record.total - record.done) / rate for record, rate in rates if rate]
    speed = sum(rate for _, rate in rates)
    return GpuStatus(len(records), speed, max(ends, default=None))


def _notes(paths: RunPaths, names: set[str], kind: str) -> list[str]:
    """Return the first lines of the tasks' notes of a kind, equal ones once; of many, a few."""
    notes = sorted(name for name in names if name.endswith(kind))
    jobs = dict[str, list[str]]()
    for name in notes[:FAILURES_SHOWN]:
        jobs.setdefault(_first_line(paths.tasks / name), []).append(name.removesuffix(kind))
    shown = [f"job{'s' * (len(own) > 1)} {', '.join(own)}: {text}" for text, own in jobs.items()]
    more = len(notes) - FAILURES_SHOWN
    return [*shown, f"and {more} more"] if more > 0 else shown


def _first_line(note: Path) -> str:
    with note.open(encoding="utf-8", errors="replace") as file:
        return file.readline(280).strip()


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
