"""Status of a run: files are the truth, the scheduler adds what waits and runs."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.filesize import decimal

from sdwn.errors import command, first_lines, shell
from sdwn.jobs import journal
from sdwn.jobs.journal import Journal, end_reason, is_success, job_logs, shard_failure
from sdwn.jobs.profile import SETUP_FAILED, LaterStage
from sdwn.jobs.scheduler import PENDING, UNKNOWN, Job, Live, cannot_start
from sdwn.jobs.task import TaskRecord, read_records
from sdwn.models.weights import is_prefetched
from sdwn.paths import NOTES, RESTART_NAME, TASK_NAME, ReleasePaths, RunPaths
from sdwn.planning.plan import WHOLE, Plan, ShardedWork
from sdwn.prediction.plan import ImagePlan
from sdwn.preflight.estimate import stored_bytes

RATE_WINDOW_S = 600
FAILURES_SHOWN = 5
# How a full disk or quota is named, by Python, HDF5 and sdwn itself.
NO_SPACE = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "no space or quota left")

# The stages behind a run's shards, and what follows an evaluation's; how one stands begins so.
LATER = (*get_args(LaterStage), "conclude")
DONE, FAILED, WAITING, NOT_YET = "done", "failed: ", "pending ", "not submitted yet"


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """State of one kind of device: processes that sample, their speed, when the last one ends."""

    processes: int
    images_per_second: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Counts of a run, or of its slice; a shard is counted in one of its states.

    ``failed``: its jobs have ended without it; ``missing``: it was never submitted; ``unknown``:
    the scheduler does not answer. ``images_per_second`` is over the last ten minutes at most.
    ``lowered``, ``changed_code``, ``without_gpu`` and ``waited`` are notes of tasks.
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


def run_status(paths: RunPaths, work: ShardedWork, record: Journal | None = None) -> RunStatus:
    """Look at the names of a run's files and ask the scheduler; open no shard.

    ``record`` is one that was read just now.
    """
    record = journal.open_journal(paths) if record is None else record
    submissions = record.submissions
    live = journal.live_jobs(paths, submissions)
    done, pieces = _finished(paths, work)
    images = _count_images(work, done, pieces)
    held = {index: state.state for job, state in live.items() for index in job.indices}
    states = Counter(state for index, state in held.items() if index not in done)
    pending, unknown = states[PENDING], states[UNKNOWN]
    running = states.total() - pending - unknown
    submitted, cancelled = journal.last_jobs(submissions), journal.cancelled_jobs(submissions)
    ended = sorted(submitted.keys() - done - held.keys())
    failed = [index for index in ended if submitted[index] not in cancelled]
    rate = _images_per_second(paths, work, done, pieces) if running else 0.0
    names = paths.task_names()
    stages = stage_states(paths, record, live)
    open_stages = {one.job for one in stages.values() if one.text != DONE}
    # The queue forgets a job when it ends, and a count of its requeues would fall.
    starts = filter(None, map(RESTART_NAME.fullmatch, names))
    last_starts = dict(sorted((match["job"], int(match["start"])) for match in starts))
    shown = [(index, submitted[index]) for index in failed[:FAILURES_SHOWN]]
    failures = [f"shard {index}: {shard_failure(paths, index, job)}" for index, job in shown]
    if failures and (short := shortage(paths, work, failures[0])):
        failures.append(short)
    hidden = journal.hidden_owners(submissions, set(failed))
    unseen = " (this site hides their jobs: their shards that wait or run count as failed)"
    owners = dict.fromkeys(one.owner for one in submissions if one.owner)
    total, own = work.assigned_images, len(work.assigned_shards)
    return RunStatus(
        images_done=images,
        images_total=total,
        shards_done=len(done),
        shards_total=own,
        shards_running=running,
        shards_pending=pending,
        shards_unknown=unknown,
        shards_failed=len(failed),
        shards_missing=own - len(done) - states.total() - len(ended),
        shards_cancelled=len(ended) - len(failed),
        jobs_live=sum(
            # Without a controller any job may live; those with nothing left to do do not count.
            state.state != UNKNOWN or not done.issuperset(job.indices) or job in open_stages
            for job, state in live.items()
        ),
        restarts=sum(last_starts.values()),
        pending_reasons=dict(Counter(s.reason for s in live.values() if s.state == PENDING)),
        cannot_start=list(cannot_start(live).values()),
        images_per_second=rate,
        seconds_left=(total - images) / rate if rate else None,
        gpus=_by_gpu(paths, names, live),
        failures=failures,
        then={stage: one.text for stage, one in stages.items()},
        submitted_by=[f"{owner}{unseen * (owner in hidden)}" for owner in owners],
        **{field: _notes(paths, names, kind) for field, kind in NOTES.items()},
    )


def shard_states(found: RunStatus) -> str:
    """Count the shards in each state, but for the finished ones, in words."""
    states = {
        "running": found.shards_running,
        "waiting in the queue": found.shards_pending,
        "unknown, for SLURM does not answer": found.shards_unknown,
        "failed": found.shards_failed,
        "cancelled": found.shards_cancelled,
        "not submitted": found.shards_missing,
    }
    return ", ".join(f"{count:,} {state}" for state, count in states.items() if count)


# --- The next command ----------------------------------------------------------------------------
def next_command(
    paths: RunPaths, work: ShardedWork, found: RunStatus, profile: str | None = None
) -> str:
    """Return the command that takes a run, or an evaluation's work, on from where it stands."""
    run = paths.root
    site = ["--profile", profile or "PROFILE"]
    failed = found.shards_failed or any(text.startswith(FAILED) for text in found.then.values())
    if found.jobs_live:
        step = command("status", run, "--watch")
    elif any(SETUP_FAILED in reason for reason in found.failures):
        # Not retry, which takes the profile as it was: its setup is to be corrected first.
        again = command("submit", run) if isinstance(work, Plan) else retry_step(paths, work)
        step = f"{again} {shell(*site)}"
    elif failed:
        step = command("logs", run)  # which names the command to try again
    elif isinstance(work, Plan) and found.shards_done == found.shards_total:
        step = command("merge", run, "--release", paths.release)
        if work.slice != WHOLE:
            step = "sdwn merge RUN RUN ... --release RELEASE"
        elif ReleasePaths(paths.release).manifest.exists():
            step = next_for_release(paths.release)
    elif not isinstance(work, Plan) or paths.submissions.exists():
        step = retry_step(paths, work)
    elif is_prefetched(work.config.model) and not paths.lock.exists():
        step = command("prefetch", run)
    elif paths.pilot.answers.exists() or profile:
        step = command("submit", run, *site, "--wait")
    elif work.config.needs_gpu:
        step = command("pilot", run, *site)
    else:
        step = command("submit", run, "--wait")
    return step


def retry_step(paths: RunPaths, work: ShardedWork) -> str:
    """Return the command that submits again what is missing."""
    if isinstance(work, ImagePlan):
        return work.command(paths)
    return command("retry", paths.root)


def next_for_release(release: Path) -> str:
    """Return the command that a release lacks: evaluate, report, or browse when all is there."""
    paths = ReleasePaths(release)
    if paths.concepts(0).exists() and not paths.taxonomy.exists():
        return command("browse", release)  # Without a synset there is nothing to evaluate.
    found = paths.evaluations.glob("*/evaluation.json")
    latest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if latest is None:
        return command("evaluate", release)
    # A report is to show what was measured, too.
    report, shown = latest.with_name("report.html"), paths.evaluations.glob("*/*/record.json")
    written = report.stat().st_mtime if report.exists() else 0.0
    reported = written and all(one.stat().st_mtime <= written for one in shown)
    return command("browse" if reported else "report", release)


# --- Finished images -----------------------------------------------------------------------------
# The image ranges that unfinished shards have.
Pieces = dict[int, list[tuple[int, int]]]


def images_done(paths: RunPaths, work: ShardedWork) -> int:
    """Count finished images from file names: whole shards, and the pieces of others."""
    return _count_images(work, *_finished(paths, work))


def _finished(paths: RunPaths, work: ShardedWork) -> tuple[set[int], Pieces]:
    """List this folder's finished shards, and the image ranges that others have."""
    own = {shard.index for shard in work.assigned_shards}
    # Before the shards: one that is finished in between is counted then, and never dropped.
    started = {index: paths.piece_ranges(index) for index in paths.started_shards()}
    done = work.done(paths) & own
    return done, {index: started[index] for index in started.keys() & own - done}


def _count_images(work: ShardedWork, done: set[int], pieces: Pieces) -> int:
    images = sum(work.shards[index].images for index in done)
    for index, ranges in pieces.items():
        # Ranges may overlap.
        covered = {image for start, stop in ranges for image in range(start, stop)}
        images += min(len(covered), work.shards[index].images)
    return images


def _images_per_second(paths: RunPaths, work: ShardedWork, done: set[int], pieces: Pieces) -> float:
    """Measure a run's speed from when its latest files were written."""
    files = [(paths.shard(index), work.shards[index].images) for index in done]
    for index, ranges in pieces.items():
        files += [(paths.piece(index, *both), both[1] - both[0]) for both in ranges]
    now, recent = time.time(), []
    for path, images in files:
        with suppress(OSError):  # moved away, or joined just now
            if (age := now - path.stat().st_mtime) <= RATE_WINDOW_S:
                recent.append((age, images))
    # The oldest file marks when counting starts; its own images were made before.
    oldest, before = max(recent, default=(0.0, 0))
    return (sum(images for _, images in recent) - before) / oldest if oldest > 0 else 0.0


def shortage(paths: RunPaths, work: ShardedWork, why: str) -> str | None:
    """Compare the space that is free with what a run still needs, if space is why it failed."""
    if not isinstance(work, Plan) or not any(words in why for words in NO_SPACE):
        return None
    needed, _ = stored_bytes(paths, work, work.assigned_images - images_done(paths, work))
    free = shutil.disk_usage(paths.root).free
    end = "space was freed since, or your quota is used up"
    if needed > free:
        end = f"{decimal(needed - free)} are missing"
    return f"the rest of the run needs about {decimal(needed)}, {decimal(free)} are free: {end}"


# --- What tasks wrote about themselves -----------------------------------------------------------
def _by_gpu(paths: RunPaths, names: set[str], live: Live) -> dict[str, GpuStatus]:
    """Add up the processes that sample now by the name of their device, from their last records."""
    running = {job.id for job, state in live.items() if state.state not in (PENDING, UNKNOWN)}
    matches = filter(None, map(TASK_NAME.fullmatch, names))
    own = [match for match in matches if match["job"] in running]
    own.sort(key=lambda match: int(match["start"] or 0))
    latest = {(match["job"], match["rank"]): match[0] for match in own}
    kinds: dict[str, list[TaskRecord]] = defaultdict(list)
    for record in read_records(paths, latest.values()):
        if record and not record.ended:
            kinds[record.device].append(record)
    found = {}
    for device, records in sorted(kinds.items()):
        rates = [(record, (record.images_per_second or 0) * record.busy) for record in records]
        ends = [(record.total - record.done) / rate for record, rate in rates if rate]
        speed = sum(rate for _, rate in rates)
        found[device] = GpuStatus(len(records), speed, max(ends, default=None))
    return found


def _notes(paths: RunPaths, names: set[str], kind: str) -> list[str]:
    """Return the first lines of the tasks' notes of a kind, equal ones once; of many, a few."""
    notes = sorted(name for name in names if name.endswith(kind))
    jobs = dict[str, list[str]]()
    for name in notes[:FAILURES_SHOWN]:
        with (paths.tasks / name).open(encoding="utf-8", errors="replace") as file:
            jobs.setdefault(file.readline(280).strip(), []).append(name.removesuffix(kind))
    shown = [f"job{'s' * (len(own) > 1)} {', '.join(own)}: {text}" for text, own in jobs.items()]
    return first_lines(shown, FAILURES_SHOWN, len(notes))


# --- Later stages --------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class StageState:
    """State of a later stage, and its last job; ``text`` may begin with FAILED or WAITING."""

    text: str
    job: Job | None = None
    live: bool = False


def stage_states(paths: RunPaths, record: Journal, live: Live) -> dict[str, StageState]:
    """Describe how each later stage stands that was submitted or is to be, in their order."""
    submissions = record.submissions
    cancelled = journal.cancelled_jobs(submissions)
    last = {one.stage: one.jobs[0] for one in submissions if one.stage in LATER and one.jobs}
    found = {}
    for stage in LATER:
        job = last.get(stage)
        if job is None:
            if stage in record.later:
                found[stage] = StageState(NOT_YET)
            continue
        logs = job_logs(paths, job)
        why = end_reason(paths, job) if logs else ""
        # A log that ends well needs no controller.
        if is_success(why):
            text = DONE
        elif job in live:
            state = live[job]
            waits_for = f"({state.reason}) " * (state.reason not in ("", "None"))
            text = f"{state.state.lower()} {waits_for}as job {job.id}"
        elif job in cancelled:
            text = f"cancelled as job {job.id}"
        elif not logs:
            text = f"never started: job {job.id} was cancelled, or the stage before it failed"
        else:
            text = FAILED + why
        found[stage] = StageState(text, job, job in live)
    return found


def read_stages(paths: RunPaths) -> dict[str, StageState]:
    """Look at how each later stage stands now."""
    record = journal.open_journal(paths)
    return stage_states(paths, record, journal.live_jobs(paths, record.submissions))
