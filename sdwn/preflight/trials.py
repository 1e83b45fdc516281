"""Trials: pilot, tuning and check of a node as short jobs, what such a job runs, and its answers.

    this machine                                    a task, submitted as any other
    run_pilot          RUN/pilot: plan.json     ->  make_pilot   shards, speed.json
    tune_by_jobs       CACHE/tuning/KEY         ->  tune_task    answer-0.json, answer-1.json …
    check_node_by_job  RUN/probe                ->  report_node  answers.json

A trial that was interrupted before its answers were read is resumed by the same command: its folder
keeps ``question.json`` until then. A task writes what it is at into ``step-0.txt`` …
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import pyarrow.compute as pc
from PIL import Image

from sdwn.batches import NO_OPTIONS, Placement, TaskOptions, next_smaller_batch
from sdwn.config import RunConfig, validated
from sdwn.devices.device import GB, missing_gpu
from sdwn.devices.tuning import (
    MOST_IMAGES,
    RUNS,
    GpuProfile,
    read_profile,
    store_profile,
    tune,
    write_profile,
)
from sdwn.errors import OutOfMemoryError, SdwnError, UsageError, command, counted
from sdwn.generation.batching import ImageSampler, load_sampler
from sdwn.generation.task import make_shards
from sdwn.io import OnMessage, atomic, ignore, now, read_json, writable_cache, write_text
from sdwn.jobs.journal import cancelled_jobs, failure, job_logs, last_jobs, live_jobs, read_journal
from sdwn.jobs.profile import ClusterProfile, group_into_tasks, minutes
from sdwn.jobs.scheduler import Live
from sdwn.jobs.submit import OnLook, follow, recover, submission_lock, submit_tasks
from sdwn.jobs.task import ArrayTask, Stage, read_record, write_note
from sdwn.models import lock
from sdwn.paths import RunPaths, cache_folder
from sdwn.planning.plan import Concept, ImageSpec, Plan, image_seed, read_plan, write_plan
from sdwn.preflight.doctor import NODE_CHECK, Finding, check_model, problems
from sdwn.preflight.estimate import DeviceSpeed, cost
from sdwn.storage.columns import names
from sdwn.storage.images import contact_sheet, decode, encode, pixel_difference
from sdwn.storage.shards import ImageFile

PILOT_IMAGES = 20
# Short enough for the gaps that a scheduler fills.
NODE_CHECK_MINUTES = 10
# As long as the glosses of WordNet are: its length decides nothing, but there must be one.
PROMPT = "a member of the genus Canis that has been domesticated since prehistoric times"


@dataclass(frozen=True, slots=True)
class TrialCallbacks:
    """Functions to call while a trial runs, here or by short jobs.

    ``on_start`` gets the folder of the jobs, ``watch`` the live jobs at every look, and
    ``on_step`` what is under trial, as "batch 20, 3 of 10" or "v100: images, 12 of 20".
    """

    on_start: Callable[[Path], None]
    watch: OnLook
    on_step: OnMessage = ignore


# Tuning


def tune_device(
    config: RunConfig,
    on_step: OnMessage = ignore,
    placement: Placement = "auto",
    most: int = MOST_IMAGES,
) -> GpuProfile:
    """Find this device's batch size for a config's images, up to ``most``, and keep it.

    Raises:
        SdwnError: there is no room for a single image, or no GPU where one was given.
    """
    writable_cache()  # Fail before anything is measured that could not be kept.
    on_step("loading the model")
    specs = [
        ImageSpec(number, Concept("tune"), number, PROMPT, image_seed(0, "tune", number))
        for number in range(most)
    ]
    sampler = load_sampler(config, specs=specs, placement=placement)
    # Plain noise is drawn without torch.
    if sampler.workload.torch and (reason := missing_gpu(sampler.workload.device)):
        raise SdwnError(f"nothing is measured: {reason}")
    best_batch = partial(
        tune,
        lambda size: sampler.time_batch(specs[:size]),
        sampler.device,
        config.images_per_synset,
        most,
        on_step,
    )
    # Where not even a synset has room, images are decoded one by one, as in a task.
    try:
        found = best_batch()
        sliced = found.batch_size < config.images_per_synset and sampler.slice_vae()
    except SdwnError:
        if not (sliced := sampler.slice_vae()):
            raise
    if sliced:
        found = best_batch()
    steps, scheduler = config.generation.num_inference_steps, config.generation.scheduler
    work, sliced = sampler.workload, sampler.vae_slicing
    return store_profile(GpuProfile(work, sliced, found, now(), steps, scheduler))


def tune_task(folder: Path, indices: Iterable[int], options: TaskOptions) -> None:
    """Measure this task's device under the config in question, and write the answer there."""
    question = read_json(RunPaths(folder).question)
    config = validated(RunConfig, question["config"], source=str(folder))
    for index in indices:
        found = tune_device(config, step_note(RunPaths(folder), index), options.placement)
        write_profile(found, folder / f"answer-{index}.json")


TUNE = Stage("tune", tune_task)


def tune_by_jobs(
    config: RunConfig,
    profile: ClusterProfile,
    kinds: Sequence[str],
    callbacks: TrialCallbacks,
) -> list[GpuProfile]:
    """Measure by a short job on each kind of GPU, or where the profile's tasks run.

    Raises:
        SdwnError: a job failed; what the others measured is kept.
    """
    if kinds and config.model.builtin == "noise":
        raise UsageError(f"--gpus: {config.model.name} is drawn on the CPU; leave out --gpus")
    targets = [profile.on_gpu(kind) for kind in kinds] or [profile]
    settings, records = config.model_dump(mode="json"), [one.record() for one in targets]
    question = {"config": settings, "profiles": records}
    key = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:8]
    trial = RunPaths(writable_cache() / "tuning" / key)
    run_trial(trial, TUNE, targets, question, callbacks)
    found, reason = [], None
    for index, target in enumerate(targets):
        answer = trial.root / f"answer-{index}.json"
        one = read_profile(answer) if answer.exists() else None
        without = one and _no_gpu(one.workload.device, config, target)
        if one and not without:
            found.append(store_profile(one))  # a job may have had a cache of its own
        else:
            reason = reason or without or failure(trial, index)
    if reason:
        raise SdwnError(f"tuning failed: {reason}")
    return found


def _no_gpu(device: str, config: RunConfig, profile: ClusterProfile) -> str | None:
    """Return a warning if a short job ran on the CPU instead of the requested GPU, else None."""
    if device != "cpu" or config.model.builtin == "noise" or not profile.gives_gpu:
        return None
    text = f"a {profile.gpu_kind or 'GPU'} was requested, but the task ran on the CPU, because "
    text += "torch finds none there; see what such a node has with: "
    return f"{text}{command('doctor', 'RUN', '--profile', 'PROFILE', '--probe')}"


# Short jobs


def run_trial(  # noqa: PLR0913, PLR0917
    trial: RunPaths,
    stage: Stage,
    profiles: Sequence[ClusterProfile],
    question: dict[str, Any],
    callbacks: TrialCallbacks,
    prepare: Callable[[], None] = lambda: None,
    images: int = 0,
) -> None:
    """Submit a task under each profile and follow them, or those that were left, to their end.

    ``prepare`` writes what they need into the folder; the only task first makes ``images``. Raises
    a SdwnError while a trial with another question still runs there.
    """
    trial.root.parent.mkdir(exist_ok=True)
    # The same command beside this one joins its jobs.
    with submission_lock(RunPaths(trial.root.parent), callbacks.on_step):
        if not (trial.question.exists() and read_json(trial.question) == question):
            if live_jobs(trial):
                end = command("cancel", trial.root)
                raise SdwnError(f"{trial.root}: a {stage.name} is running; end it with: {end}")
            if trial.root.exists():
                shutil.rmtree(trial.root)
            prepare()
            write_text(trial.question, json.dumps(question) + "\n")
        callbacks.on_start(trial.root)
        recover(trial, {stage.name: stage}, profiles[0])
        submissions = read_journal(trial)
        submitted, cancelled = last_jobs(submissions), cancelled_jobs(submissions)
        for index, profile in enumerate(profiles):
            if index not in submitted or submitted[index] in cancelled:
                task = ArrayTask(stage, str(trial.root.absolute()), (index,))
                submit_tasks(trial, [task], profile)

    def look(live: Live) -> None:
        callbacks.watch(live)
        steps = []
        for index, profile in enumerate(profiles):
            label = f"{profile.gpu_kind}: " if len(profiles) > 1 else ""
            if (note := trial.root / f"step-{index}.txt").exists():
                steps.append(label + note.read_text(encoding="utf-8").strip())
            elif made := sum(stop - start for start, stop in trial.piece_ranges(index)):
                steps.append(f"{label}images, {made:,} of {images:,}")
        if steps and live:
            callbacks.on_step("; ".join(steps))

    follow(trial, look)
    trial.question.unlink(missing_ok=True)


def step_note(trial: RunPaths, index: int) -> OnMessage:
    """Return what writes down the step that a trial's task is at."""
    return lambda step: write_note(trial, trial.root / f"step-{index}.txt", step)


# Pilot


def pilot_plan(plan: Plan) -> Plan:
    """Pick 20 synsets, if there are so many, evenly over the plan: a shard of 20 of its images."""
    each = math.ceil(PILOT_IMAGES / min(len(plan.concepts), PILOT_IMAGES))
    each = min(each, plan.counts.each or pc.min(plan.table["images"]).as_py())
    count = min(len(plan.concepts), math.ceil(PILOT_IMAGES / each))
    rows = [int((number + 0.5) * len(plan.concepts) / count) for number in range(count)]
    sizes = {"images_per_shard": count * each, "shard_hours": None, "images_per_second": None}
    storage = plan.config.storage.model_copy(update=sizes)
    # Its batches are those of the run's config, which may not fit so few images of a synset.
    generation = plan.config.generation.model_copy(update={"batch_size": None})
    parts = {"storage": storage, "generation": generation, "images_per_synset": each}
    config = plan.config.model_copy(update=parts)

    def picked(one: Concept) -> Concept:
        # A row's own seed is that of its only image; here it may be the only one of several.
        alone = one.seed is not None and one.first_image + each == 1
        return replace(one, images=each, seed=one.image_seed(config.seed, 0) if alone else one.seed)

    return Plan(plan.catalog, config, tuple(picked(plan.concepts[row]) for row in rows))


def make_pilot(run: Path, indices: Iterable[int], options: TaskOptions = NO_OPTIONS) -> None:
    """Make the pilot's images as any task would, then time whole batches."""
    paths = RunPaths(run)
    plan = read_plan(paths)
    shards = [plan.shards[index] for index in indices]
    if not shards:
        return  # a process whose GPU is not needed
    # Batches depend on the run's own images a synset. Its lock refuses in the run's name, too.
    whole = RunPaths(run.parent)
    config = read_plan(whole).config
    specs = list(plan.specs(plan.shards[0]))
    weights = lock.locked_weights(whole, config.model)
    sampler = load_sampler(config, weights, specs, options.placement)
    batch = make_shards(paths, plan, shards, sampler, options.batch_size)
    found = time_batches(sampler, specs, batch.images, step_note(paths, 0))
    # Without the options that cost last bits of pixels; a process keeps what it had of attention.
    native = config.generation.attention and "native"
    change = {"compile": False, "channels_last": False, "attention": native}
    plain = config.model_copy(update={"generation": config.generation.model_copy(update=change)})
    if plain != config:
        # Of the two only one has room.
        del sampler
        step_note(paths, 0)("the same images without its speed options")
        sampler = load_sampler(plain, weights, specs, options.placement)
        timed, storage = time_batches(sampler, specs, found["batch_size"]), config.storage
        size, differences = timed["batch_size"], []
        with ImageFile(paths.shard(0)) as file:
            for start in range(0, len(specs), size):
                chosen = specs[start : start + size]
                for spec, sample in zip(chosen, sampler.check(sampler.sample(chosen)), strict=True):
                    height, width, _ = sample.pixels.shape
                    again = encode(sample.pixels, storage.codec, storage.quality)
                    payloads = file.payload(spec.index), again
                    both = (decode(one, storage.codec, width, height) for one in payloads)
                    differences.append(pixel_difference(*both))
        found["plain"] = {
            "plain_images_per_second": timed["images_per_second"],
            "difference_rms": max(rms for rms, _ in differences),
            "difference_largest": max(largest for _, largest in differences),
        }
    write_text(paths.speed, json.dumps(found) + "\n")


PILOT = Stage("pilot", make_pilot)


def time_batches(
    sampler: ImageSampler, specs: Sequence[ImageSpec], size: int, on_step: OnMessage = ignore
) -> dict[str, Any]:
    """Time whole batches of a size, larger than the specs or not; smaller ones where no room is."""
    while True:
        filled, runs = [specs[number % len(specs)] for number in range(size)], []
        try:
            for number in range(RUNS):
                on_step(f"timing batch {size}, {number + 1} of {RUNS}")
                runs.append(size / sampler.time_batch(filled))
            peak = sampler.device.peak_bytes
            return {"batch_size": size, "images_per_second": median(runs), "peak_bytes": peak}
        except OutOfMemoryError:
            smaller = next_smaller_batch(size, sampler.config.images_per_synset)
            if smaller is None:
                raise
        # Outside the handler, whose exception keeps the batch's memory.
        sampler.device.forget_peak()
        size = smaller


def run_pilot(
    run: RunPaths, plan: Plan, profile: ClusterProfile, callbacks: TrialCallbacks
) -> dict[str, Any]:
    """Submit a run's pilot, follow it, and return what it found, as ``--json`` prints it.

    Raises:
        SdwnError: the model cannot be loaded, it failed, or one under another profile still runs.
    """
    pilot, small = run.pilot, pilot_plan(plan)
    lock.ensure_lock(run, plan)
    for one in problems(check_model(run, plan, profile)):
        raise SdwnError(f"{one.subject}: {one.text}")
    weights = read_json(run.lock) if run.lock.exists() else None
    question = {"plan": small.digest, "lock": weights, "profile": profile.record()}

    def prepare() -> None:
        write_plan(small, pilot)
        lock.copy_lock(run, pilot)

    run_trial(pilot, PILOT, [profile], question, callbacks, prepare, small.images)
    if not pilot.speed.exists():
        raise SdwnError(f"the pilot failed: {failure(pilot, 0)}")
    record = read_record(next(pilot.tasks.glob("*.json")))
    speed = read_json(pilot.speed)
    with ImageFile(pilot.shard(0)) as file:
        rows, images = file.rows(), len(file)
        statuses = Counter(names(rows["status"], "status"))
        each = int(file.offsets[-1]) / images
        sheet = _contact_sheet(file, small)
    with atomic(pilot.contact_sheet) as temporary:
        sheet.save(temporary, "PNG")
    tasks = group_into_tasks(range(len(plan.shards)), profile)
    loading = record.loading_seconds
    measured = DeviceSpeed(record.device, speed["images_per_second"], "this pilot", loading)
    whole = cost(plan, tasks, profile, measured)
    found = {
        "device": record.device,
        "batch_size": speed["batch_size"],
        "batch_source": record.batch_source,
        "images_per_second": speed["images_per_second"],
        **speed.get("plain", {}),
        "loading_seconds": loading,
        "peak_gb": max(record.peak_bytes, speed["peak_bytes"]) / GB,
        "memory_gb": record.memory_gb,
        "images": images,
        "synsets": len(small.concepts),
        **{status: statuses[status] for status in ("nsfw", "nan")},
        "redone": int(rows["retried_fp32"].sum()),
        "truncated": int(rows["truncated"].sum()),
        "bytes_per_image": round(each),
        "run_images": plan.images,
        "run_tasks": len(tasks),
        **{name: getattr(whole, name) for name in ("hours_per_task", "device_hours", "hours")},
        "run_bytes": round(each * plan.images),
        "contact_sheet": str(pilot.contact_sheet),
        "warning": _no_gpu(record.device, plan.config, profile) or whole.warning,
    }
    write_text(pilot.answers, json.dumps(found, indent=2) + "\n")
    return found


def _contact_sheet(file: ImageFile, plan: Plan) -> Image.Image:
    """Lay out the pilot's images, each with its synset's name, and with what became of it."""
    size, statuses = plan.config.generation, names(file.rows()["status"], "status")
    cells = list[tuple[Image.Image, str]]()
    for spec in plan.specs(plan.shards[0]):
        payload, status = file.payload(spec.index), statuses[spec.index]
        image = decode(payload, plan.config.storage.codec, size.width, size.height)
        name = spec.name if plan.images > len(plan.concepts) else spec.concept.name
        caption = f"{status}: " * (status != "ok") + name
        # As many letters as stand below an image.
        cells.append((image, caption if len(caption) <= 20 else f"{caption[:19]}…"))
    synsets = counted(len(plan.concepts), "synset")
    title = f"{plan.images} images of {synsets}, by {plan.config.model.name}"
    return contact_sheet(title, plan.images, cells)


# The check of a compute node


def check_node_by_job(
    run: RunPaths, profile: ClusterProfile, found: Sequence[Finding], callbacks: TrialCallbacks
) -> list[Finding]:
    """Replace what was ``found`` by what a compute node answers, if a short job can start there."""
    if any(finding.subject in ("slurm", "sbatch", "run folder") for finding in problems(found)):
        return [*found, Finding("node", "unverified", "not checked, because no job could start")]
    trial, token = run.node_check, f"node-check-{uuid4().hex}"
    shorter = {"time": str(min(NODE_CHECK_MINUTES, minutes(profile.time)))}
    sites, prepare = [profile.model_copy(update=shorter)], partial(lock.copy_lock, run, trial)
    # In the cache as long as the job runs: does the node see the same one?
    cached = cache_folder() / token
    with suppress(OSError):  # Whether this machine writes there is checked beside it.
        write_text(cached, token)
    try:
        question = {"token": token, "gpu": profile.gives_gpu}
        run_trial(trial, NODE_CHECK, sites, question, callbacks, prepare)
        job = last_jobs(read_journal(trial))[0]
        if not job_logs(trial, job):
            raise SdwnError(
                f"job {job.id} ended and left nothing in {trial.root}: compute nodes most likely "
                "do not see it; plan into a folder that they share"
            )
        if not trial.answers.exists():
            raise SdwnError(f"the check of a node failed: {failure(trial, 0)}")
        node = [Finding(**finding) for finding in read_json(trial.answers)["findings"]]
    except SdwnError as error:
        node = [Finding("node", "problem", str(error))]
    finally:
        with suppress(OSError):
            cached.unlink(missing_ok=True)
    answered = {finding.subject for finding in node}
    return [*(finding for finding in found if finding.subject not in answered), *node]
