"""A pilot: a few images of a plan on the real target, and what they say of the whole run."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from sdwn.config import RunConfig
from sdwn.errors import SdwnError
from sdwn.files import RunPaths, atomic, read_json, write_text
from sdwn.generate import make_shards
from sdwn.images import decode
from sdwn.plan import ImageSpec, Plan, read_plan, write_plan
from sdwn.profiles import ClusterProfile
from sdwn.records import read_record
from sdwn.samplers import choose_batch, load_timed
from sdwn.shards import ImageFile, names, texts
from sdwn.submission import Watch, failure, follow, live_jobs, submit_tasks
from sdwn.task import ArrayTask

IMAGES = 20
GB = 1e9
THUMBNAIL = 160
COLUMNS = 10
CAPTION = 14


def pilot_plan(plan: Plan) -> Plan:
    """Pick whole synsets, evenly over the plan: about :data:`IMAGES` images, one shard.

    An image of the pilot is the image that the whole run makes.
    """
    count = min(len(plan.synsets), math.ceil(IMAGES / plan.config.images_per_synset))
    rows = [int((number + 0.5) * len(plan.synsets) / count) for number in range(count)]
    images = count * plan.config.images_per_synset
    sizes = {"images_per_shard": images, "shard_hours": None, "images_per_second": None}
    storage = plan.config.storage.model_copy(update=sizes)
    config = plan.config.model_copy(update={"storage": storage})
    return Plan(plan.catalog, config, tuple(replace(plan.synsets[row], shard=0) for row in rows))


def run_pilot(run: RunPaths, plan: Plan, profile: ClusterProfile, watch: Watch) -> Answers:
    """Submit a run's pilot as any task is submitted, follow it, and read its answers.

    Raises:
        SdwnError: it failed, or an earlier one still runs.
    """
    pilot = run.pilot
    if live_jobs(pilot):
        raise SdwnError(
            f"{pilot.root}: a pilot is running; wait for it, or: sdwn cancel {pilot.root}"
        )
    shutil.rmtree(pilot.root, ignore_errors=True)
    small = pilot_plan(plan)
    write_plan(small, pilot)
    submit_tasks(pilot, [ArrayTask("pilot", str(pilot.root.absolute()), (0,))], profile)
    follow(pilot, watch)
    if not pilot.speed.exists():
        raise SdwnError(f"the pilot failed: {failure(pilot, 0)}")
    draw_contact_sheet(pilot, small.config)
    return answers(plan, pilot, profile)


@dataclass(frozen=True, slots=True)
class Speed:
    """A device's speed once it is warm, at the batch size that the run's tasks would take."""

    batch_size: int
    images_per_second: float


def make_pilot(run: Path, indices: Iterable[int]) -> None:
    """Make the pilot's images as any task would, then time whole batches."""
    paths = RunPaths(run)
    plan = read_plan(paths)
    shards = [plan.shards[index] for index in indices]
    if not shards:
        return  # a process whose GPU is not needed
    sampler, loading = load_timed(plan.config)
    make_shards(paths, plan, shards, sampler, loading)
    # Warm by now. At 20 images a batch may be smaller than those of the run, so it is repeated.
    batch = choose_batch(plan.config, sampler)
    specs = _filled(list(plan.specs(plan.shards[0])), batch.images)
    seconds = min(sampler.seconds(specs) for _ in range(2))
    speed = Speed(batch.images, batch.images / seconds)
    write_text(paths.speed, json.dumps(asdict(speed)) + "\n")


def _filled(specs: list[ImageSpec], size: int) -> list[ImageSpec]:
    return [specs[number % len(specs)] for number in range(size)]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a pilot found, and what follows for the whole run.

    ``nsfw``, ``nan``, ``redone`` and ``truncated`` count the pilot's images. ``gpu_hours`` adds
    each task's loading to the sampling of all images; ``hours`` is the time with all tasks
    that may run at once doing so.
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
    gpu_hours: float
    hours: float
    run_bytes: int
    contact_sheet: str


def answers(plan: Plan, pilot: RunPaths, profile: ClusterProfile) -> Answers:
    """Read what the pilot made, and work out the whole run under a profile."""
    record = read_record(only_record(pilot))
    speed = Speed(**read_json(pilot.speed))
    counts = _counts(pilot)
    tasks = math.ceil(len(plan.shards) / profile.shards_in_task)
    loading = record.loading_seconds * tasks * profile.processes
    seconds = plan.images / speed.images_per_second + loading
    at_once = min(tasks, profile.array_parallelism) * profile.processes
    each = counts["bytes"] / counts["images"]
    found = Answers(
        device=record.device,
        batch_size=record.batch_size,
        batch_source=record.batch_source,
        images_per_second=speed.images_per_second,
        loading_seconds=record.loading_seconds,
        peak_gb=record.peak_bytes / GB,
        memory_gb=record.memory_gb,
        images=counts["images"],
        nsfw=counts["nsfw"],
        nan=counts["nan"],
        redone=counts["redone"],
        truncated=counts["truncated"],
        bytes_per_image=round(each),
        run_images=plan.images,
        run_tasks=tasks,
        hours_per_task=seconds / 3600 / (tasks * profile.processes),
        gpu_hours=seconds / 3600,
        hours=seconds / 3600 / at_once,
        run_bytes=round(each * plan.images),
        contact_sheet=str(pilot.contact_sheet),
    )
    write_text(pilot.answers, json.dumps(asdict(found), indent=2) + "\n")
    return found


def only_record(pilot: RunPaths) -> Path:
    """Find the record of the process that made the pilot.

    Raises:
        SdwnError: there is none.
    """
    records = sorted(pilot.tasks.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not records:
        raise SdwnError(f"{pilot.root}: the pilot left no record")
    return records[-1]


def _counts(pilot: RunPaths) -> Counter[str]:
    with ImageFile(pilot.shard(0)) as file:
        rows = file.rows()
        counts = Counter(names(rows["status"], "status"))
        for flag in ("redone", "truncated"):
            counts[flag] = int(rows[flag].sum())
        counts["images"], counts["bytes"] = len(file), int(file.offsets[-1])
    return counts


def draw_contact_sheet(pilot: RunPaths, config: RunConfig) -> None:
    """Draw the pilot's images side by side, each with its synset, number and status."""
    with ImageFile(pilot.shard(0)) as file:
        rows = file.rows()
        labels = zip(
            texts(rows["synset"]), rows["number"], names(rows["status"], "status"), strict=True
        )
        columns = min(COLUMNS, config.images_per_synset)
        height = THUMBNAIL + CAPTION
        sheet = Image.new(
            "RGB", (columns * THUMBNAIL, math.ceil(len(file) / columns) * height), "white"
        )
        pen = ImageDraw.Draw(sheet)
        for index, (synset, number, status) in enumerate(labels):
            left, top = index % columns * THUMBNAIL, index // columns * height
            size = int(rows["width"][index]), int(rows["height"][index])
            picture = decode(file.payload(index), config.storage.codec, *size)
            picture.thumbnail((THUMBNAIL - 2, THUMBNAIL - 2))
            sheet.paste(picture, (left, top))
            note = "" if status == "ok" else f" {status}"
            pen.text((left + 1, top + THUMBNAIL), f"{synset} {number}{note}"[:26], fill="black")
    with atomic(pilot.contact_sheet) as temporary:
        sheet.save(temporary, "PNG")
