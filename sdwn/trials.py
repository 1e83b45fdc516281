"""Trials: short jobs that answer a question, a pilot's or a tuning's, and what they answer."""

from __future__ import annotations

import datetime
import heapq
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sdwn import gpus, lock
from sdwn.cluster import cut
from sdwn.columns import names
from sdwn.config import RunConfig
from sdwn.contact_sheet import draw_contact_sheet
from sdwn.errors import SdwnError
from sdwn.files import RunPaths, cache_folder, read_json, write_text
from sdwn.gpus import GB, GpuProfile
from sdwn.pilot import Speed, pilot_plan
from sdwn.plan import Plan, write_plan
from sdwn.profiles import ClusterProfile, minutes
from sdwn.records import read_record
from sdwn.shards import ImageFile
from sdwn.submission import Watch, failure, follow, live_jobs, submit_tasks
from sdwn.task import ArrayTask
from sdwn.tune import answer

Told = Callable[[Path], None]


def tune_elsewhere(
    config: RunConfig, profile: ClusterProfile, kinds: Sequence[str], told: Told, watch: Watch
) -> list[GpuProfile]:
    """Measure by a short job on each kind of GPU, or where the profile's tasks run.

    ``told`` is given the folder of the jobs once they are submitted.

    Raises:
        SdwnError: a job failed; what the others measured is kept.
    """
    moment = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    paths = RunPaths(cache_folder() / "tuning" / moment)
    targets = [profile.on_gpu(kind) for kind in kinds] or [profile]
    write_text(paths.root / "config.json", config.model_dump_json(indent=2) + "\n")
    for index, target in enumerate(targets):
        submit_tasks(paths, [ArrayTask("tune", str(paths.root.absolute()), (index,))], target)
    told(paths.root)
    follow(paths, watch)
    return [_profile(paths, index) for index in range(len(targets))]


def _profile(paths: RunPaths, index: int) -> GpuProfile:
    path = answer(paths.root, index)
    if not path.exists():
        raise SdwnError(f"tuning failed: {failure(paths, index)}")
    # The job may have had a cache of its own.
    return gpus.store(gpus.read_profile(path))


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

    ``told`` is given the folder of the job once it is submitted.

    Raises:
        SdwnError: it failed, or an earlier one still runs.
    """
    pilot, small = run.pilot, pilot_plan(plan)
    if live_jobs(pilot):
        raise SdwnError(f"{pilot.root}: a pilot is running; end it with: sdwn cancel {pilot.root}")
    lock.ensure(run, plan)
    if pilot.root.is_symlink() or pilot.root.exists():
        try:
            shutil.rmtree(pilot.root)
        except OSError as error:
            raise SdwnError(f"the earlier pilot cannot be removed: {error}") from None
    write_plan(small, pilot)
    lock.carry(run, pilot)
    submit_tasks(pilot, [ArrayTask("pilot", str(pilot.root.absolute()), (0,))], profile)
    told(pilot.root)
    follow(pilot, watch)
    if not pilot.speed.exists():
        raise SdwnError(f"the pilot failed: {failure(pilot, 0)}")
    draw_contact_sheet(pilot, small)
    found = answers(plan, pilot, profile)
    write_text(pilot.answers, json.dumps(asdict(found), indent=2) + "\n")
    return found


def answers(plan: Plan, pilot: RunPaths, profile: ClusterProfile) -> Answers:
    """Read what a pilot made, and work out the whole run under a profile."""
    record = read_record(next(pilot.tasks.glob("*.json")))
    speed = Speed(**read_json(pilot.speed))
    counts = _counts(pilot)
    times = [
        _part_seconds(part, plan, profile, speed.images_per_second) + record.loading_seconds
        for part in cut(range(len(plan.shards)), profile)
    ]
    each = counts["bytes"] / counts["images"]
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
        run_tasks=len(times),
        hours_per_task=max(times) / 3600,
        device_hours=sum(times) * profile.processes / 3600,
        hours=_seconds_in_all(times, profile.array_parallelism) / 3600,
        run_bytes=round(each * plan.images),
        contact_sheet=str(pilot.contact_sheet),
        warning=_warning(max(times) / 3600, profile),
    )


def _part_seconds(
    part: tuple[int, ...], plan: Plan, profile: ClusterProfile, images_per_second: float
) -> float:
    """Say how long a task samples: as long as the process with the most images."""
    shares = (part[rank :: profile.processes] for rank in range(profile.processes))
    images = (sum(plan.shard_images(plan.shards[index]) for index in share) for share in shares)
    return max(images) / images_per_second


def _seconds_in_all(times: Sequence[float], at_once: int) -> float:
    """Say when the last task ends if so many run at once, each starting as another ends.

    >>> _seconds_in_all([3, 3, 3, 1], at_once=2)
    6.0
    """
    ends = [0.0] * at_once
    for seconds in times:
        heapq.heappush(ends, heapq.heappop(ends) + seconds)
    return max(ends)


def _warning(hours_per_task: float, profile: ClusterProfile) -> str | None:
    limit = minutes(profile.time) / 60
    if hours_per_task < limit:
        return None
    return (
        f"a task takes {hours_per_task:.1f} h and the time limit is {limit:.1f} h: each will be "
        "requeued; ask for more --time, or plan smaller shards"
    )


def _counts(pilot: RunPaths) -> Counter[str]:
    with ImageFile(pilot.shard(0)) as file:
        rows = file.rows()
        counts = Counter(names(rows["status"], "status"))
        for flag in ("redone", "truncated"):
            counts[flag] = int(rows[flag].sum())
        counts["images"], counts["bytes"] = len(file), int(file.offsets[-1])
    return counts
