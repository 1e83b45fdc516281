"""Trials: short jobs that answer a pilot's, a tuning's or a probe's question, and the answers."""

from __future__ import annotations

import datetime
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from sdwn.config import RunConfig
from sdwn.devices import profiles as gpus
from sdwn.devices.profiles import GB, GpuProfile
from sdwn.errors import SdwnError, UsageError, command
from sdwn.io import read_json, writable_cache, write_text
from sdwn.jobs.cluster import cut, gives_gpu
from sdwn.jobs.journal import cancelled_jobs, last_jobs, read_journal
from sdwn.jobs.live import live_jobs
from sdwn.jobs.logs import failure, job_logs
from sdwn.jobs.profile import ClusterProfile, minutes
from sdwn.jobs.records import read_record
from sdwn.jobs.submit import Watch, follow, recover, submit_tasks
from sdwn.jobs.task import ArrayTask
from sdwn.models import lock
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import Plan, write_plan
from sdwn.preflight.estimate import cost
from sdwn.preflight.known_speeds import DeviceSpeed
from sdwn.preflight.pilot import Speed, pilot_plan
from sdwn.preflight.pilot_sheet import draw_contact_sheet
from sdwn.preflight.probe import NodeReport, read_report
from sdwn.preflight.tune import answer
from sdwn.storage.columns import names
from sdwn.storage.shards import ImageFile

# Short enough for the gaps that a scheduler fills.
PROBE_MINUTES = 10

Told = Callable[[Path], None]


def tune_elsewhere(
    config: RunConfig, profile: ClusterProfile, kinds: Sequence[str], told: Told, watch: Watch
) -> list[GpuProfile]:
    """Measure by a short job on each kind of GPU, or where the profile's tasks run.

    A tuning that was left before its answers were taken is taken up again. ``told`` is given the
    folder of the jobs.

    Raises:
        SdwnError: a job failed; what the others measured is kept.
        UsageError: the model uses no GPU.
    """
    if kinds and config.model.builtin == "noise":
        raise UsageError(f"--gpus: {config.model.name} is drawn on the CPU; leave out --gpus")
    targets = [profile.on_gpu(kind) for kind in kinds] or [profile]
    settings = config.model_dump(mode="json")
    question = {"config": settings, "profiles": [one.record() for one in targets]}
    folder = writable_cache() / "tuning"
    moment = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    left = (paths for paths in map(RunPaths, sorted(folder.glob("*"))) if _asked(paths, question))
    paths = next(left, RunPaths(folder / moment))
    write_text(paths.root / "config.json", json.dumps(settings, indent=2) + "\n")
    write_text(paths.question, json.dumps(question) + "\n")
    told(paths.root)
    _submit_missing(paths, "tune", targets)
    follow(paths, watch)
    paths.question.unlink(missing_ok=True)
    found, reasons = [], []
    for index, target in enumerate(targets):
        path = answer(paths.root, index)
        if not path.exists():
            reasons.append(failure(paths, index))
        elif reason := _no_gpu(gpus.read_profile(path).workload.device, config, target):
            reasons.append(reason)
        else:
            # A job may have had a cache of its own.
            found.append(gpus.store(gpus.read_profile(path)))
    if reasons:
        raise SdwnError(f"tuning failed: {reasons[0]}")
    return found


def _no_gpu(device: str, config: RunConfig, profile: ClusterProfile) -> str | None:
    """Return that a short job worked on the CPU though a GPU was asked for, else None."""
    if device != "cpu" or config.model.builtin == "noise" or not gives_gpu(profile):
        return None
    return (
        f"a {profile.gpu_kind or 'GPU'} was asked for, and the task worked on the CPU because "
        "torch finds no GPU there; see what such a node has with: "
        "sdwn doctor RUN --profile PROFILE --probe"
    )


def _asked(trial: RunPaths, question: dict[str, Any]) -> bool:
    """Return whether a trial was left with this question, its answer not taken."""
    return trial.question.exists() and read_json(trial.question) == question


def _submit_missing(trial: RunPaths, stage: str, profiles: Sequence[ClusterProfile]) -> None:
    """Submit a task under each profile; not those that were submitted before, and not cancelled."""
    recover(trial, profiles[0])
    submissions = read_journal(trial)
    submitted, cancelled = last_jobs(submissions), cancelled_jobs(submissions)
    for index, profile in enumerate(profiles):
        if index not in submitted or submitted[index] in cancelled:
            submit_tasks(trial, [ArrayTask(stage, str(trial.root.absolute()), (index,))], profile)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a pilot found, and what follows for the whole run.

    ``nsfw``, ``nan``, ``redone`` and ``truncated`` count the pilot's images. ``hours_per_task``
    is the longest task's, loading included, ``device_hours`` what all tasks hold devices for,
    and ``hours`` the time until the last one ends if all that may run at once do so.
    ``warning`` says what will not work as planned.
    """

    device: str
    batch_size: int
    batch_source: str
    images_per_second: float
    loading_seconds: float
    peak_gb: float
    memory_gb: int
    images: int
    nsfw: int
    nan: int
    redone: int
    truncated: int
    bytes_per_image: int
    run_images: int
    run_tasks: int
    hours_per_task: float
    device_hours: float
    hours: float
    run_bytes: int
    contact_sheet: str
    warning: str | None


def run_pilot(
    run: RunPaths, plan: Plan, profile: ClusterProfile, told: Told, watch: Watch
) -> Answers:
    """Submit a run's pilot as any task is submitted, follow it, and read its answers.

    A pilot under the same profile that was left before its answers were read is taken up again.
    ``told`` is given the folder of the job.

    Raises:
        SdwnError: it failed, or one under another profile still runs.
    """
    pilot, small = run.pilot, pilot_plan(plan)
    lock.ensure(run, plan)
    weights = read_json(run.lock) if run.lock.exists() else None
    question = {"plan": small.digest, "lock": weights, "profile": profile.record()}
    if not _asked(pilot, question):
        _clear(pilot, "pilot")
        write_plan(small, pilot)
        lock.carry(run, pilot)
        write_text(pilot.question, json.dumps(question) + "\n")
    told(pilot.root)
    _submit_missing(pilot, "pilot", [profile])
    follow(pilot, watch)
    pilot.question.unlink(missing_ok=True)
    if not pilot.speed.exists():
        raise SdwnError(f"the pilot failed: {failure(pilot, 0)}")
    draw_contact_sheet(pilot, small)
    found = answers(plan, pilot, profile)
    write_text(pilot.answers, json.dumps(asdict(found), indent=2) + "\n")
    return found


def _clear(trial: RunPaths, what: str) -> None:
    """Remove an earlier trial, unless it still runs."""
    if live_jobs(trial):
        end = command("cancel", trial.root)
        raise SdwnError(f"{trial.root}: a {what} is running; end it with: {end}")
    if trial.root.is_symlink() or trial.root.exists():
        try:
            shutil.rmtree(trial.root)
        except OSError as error:
            raise SdwnError(f"the earlier {what} cannot be removed: {error}") from None


def run_probe(run: RunPaths, profile: ClusterProfile, told: Told, watch: Watch) -> NodeReport:
    """Have a compute node say what it sees of a run, by a short job as any task is submitted.

    ``told`` is given the folder of the job once it is submitted.

    Raises:
        SdwnError: it failed, or an earlier one still runs.
    """
    probe, token = run.probe, f"probe-{uuid4().hex}"
    _clear(probe, "probe")
    shorter = {"time": str(min(PROBE_MINUTES, minutes(profile.time)))}
    with _seen_by_nodes(probe, token):
        task = ArrayTask("probe", str(run.root.absolute()), (0,))
        (job,) = submit_tasks(probe, [task], profile.model_copy(update=shorter))
        told(probe.root)
        follow(probe, watch)
    if not job_logs(probe, job):
        raise SdwnError(
            f"job {job.id} ended and left nothing in {probe.root}: compute nodes most likely do "
            "not see it; plan into a folder that they share"
        )
    if not probe.answers.exists():
        raise SdwnError(f"the probe failed: {failure(probe, 0)}")
    report = read_report(probe.answers)
    if report.token != token:
        raise SdwnError(f"{report.node} sees another {probe.token} than this machine")
    return report


@contextmanager
def _seen_by_nodes(probe: RunPaths, token: str) -> Iterator[None]:
    """Put a token into the probe's folder, and into the cache for as long as the block runs."""
    write_text(probe.token, token)
    cached = cache_folder() / token
    with suppress(OSError):  # Whether this machine writes there is examined beside it.
        write_text(cached, token)
    try:
        yield
    finally:
        with suppress(OSError):
            cached.unlink(missing_ok=True)


def answers(plan: Plan, pilot: RunPaths, profile: ClusterProfile) -> Answers:
    """Read what a pilot made, and work out the whole run under a profile."""
    record = read_record(next(pilot.tasks.glob("*.json")))
    speed = Speed(**read_json(pilot.speed))
    counts = _counts(pilot)
    parts = cut(range(len(plan.shards)), profile)
    each = counts["bytes"] / counts["images"]
    measured = DeviceSpeed(
        record.device, speed.images_per_second, "this pilot", record.loading_seconds
    )
    whole = cost(plan, parts, profile, measured)
    return Answers(
        device=record.device,
        batch_size=speed.batch_size,
        batch_source=record.batch_source,
        images_per_second=speed.images_per_second,
        loading_seconds=record.loading_seconds,
        peak_gb=max(record.peak_bytes, speed.peak_bytes) / GB,
        memory_gb=record.memory_gb,
        images=counts["images"],
        nsfw=counts["nsfw"],
        nan=counts["nan"],
        redone=counts["redone"],
        truncated=counts["truncated"],
        bytes_per_image=round(each),
        run_images=plan.images,
        run_tasks=len(parts),
        hours_per_task=whole.hours_per_task,
        device_hours=whole.device_hours,
        hours=whole.hours,
        run_bytes=round(each * plan.images),
        contact_sheet=str(pilot.contact_sheet),
        warning=_no_gpu(record.device, plan.config, profile) or whole.warning,
    )


def _counts(pilot: RunPaths) -> Counter[str]:
    with ImageFile(pilot.shard(0)) as file:
        rows = file.rows()
        counts = Counter(names(rows["status"], "status"))
        for flag in ("redone", "truncated"):
            counts[flag] = int(rows[flag].sum())
        counts["images"], counts["bytes"] = len(file), int(file.offsets[-1])
    return counts
