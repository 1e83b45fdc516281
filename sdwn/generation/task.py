"""An array task that makes images: shard after shard, batch after batch.

::

    generate ──> make_shards ──> make_shard, for each shard that is not finished
    which shards?   sampler,        images that an earlier start wrote are kept,
    which weights?  batch size      the others are sampled, a batch at a time
                                        │ out of memory: a smaller batch, the same images
                                        ▼
                                    BackgroundWriter: see partial_shards.py
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sdwn.batches import NO_OPTIONS, BatchSize, TaskOptions
from sdwn.devices.device import missing_gpu
from sdwn.errors import IntegrityError, OutOfMemoryError
from sdwn.generation.batching import (
    ImageSampler,
    Sample,
    choose_batch,
    load_sampler,
    smaller_batch,
)
from sdwn.generation.partial_shards import (
    BackgroundWriter,
    PartialShardWriter,
    ShardJob,
    flushed_on_signals,
)
from sdwn.io import code_version, now, seconds
from sdwn.jobs.task import Meter, RunDisk, Stage, this_process
from sdwn.models.lock import locked_weights
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan, Shard, read_plan

log = logging.getLogger(__name__)

# A kill costs the batch under way and at most this much finished work.
FLUSH_SECONDS = 5.0
# Batches with a NaN image that wait for float32: weights of twice the size are loaded for them.
MOST_WAITING = 8
# How often a task makes a shard whose partial shards were lost meanwhile, before it gives up.
TRIES = 3


def generate(run: Path, indices: Iterable[int], options: TaskOptions = NO_OPTIONS) -> None:
    """Make those shards of a run that aren't finished yet."""
    paths = RunPaths(run)
    plan = read_plan(paths)
    # What a task left that was killed between a shard's rename and their removal.
    for index in paths.done_shards().intersection(paths.started_shards()):
        shutil.rmtree(paths.shard_pieces(index), ignore_errors=True)
    todo = [plan.shards[index] for index in indices if not paths.shard(index).is_file()]
    if not todo:
        log.info("all shards of this task are finished already")
        return
    weights = locked_weights(paths, plan.config.model)
    specs = missing_images(paths, plan, todo)
    sampler = load_sampler(plan.config, weights, specs, options.placement)
    make_shards(paths, plan, todo, sampler, options.batch_size)


GENERATE = Stage("generate", generate)


def missing_images(paths: RunPaths, plan: Plan, shards: Sequence[Shard]) -> Iterator[ImageSpec]:
    """Yield the images of shards that no partial shard's name counts."""
    for shard in shards:
        ranges = [range(*there) for there in paths.piece_ranges(shard.index)]
        for spec in plan.specs(shard):
            if not any(spec.index in there for there in ranges):
                yield spec


def make_shards(
    paths: RunPaths,
    plan: Plan,
    shards: Sequence[Shard],
    sampler: ImageSampler,
    batch_size: int | None = None,
) -> BatchSize:
    """Make shards with a sampler that is loaded; sampling and writing overlap.

    Of a shard whose partial shards were lost or damaged meanwhile, these images are sampled again.
    ``batch_size`` replaces the config's or a GPU profile's.
    Returns the batch size at the end: memory may have run out with a larger one.

    Raises:
        IntegrityError: partial shards are lost again and again.
        DiskError: the run's disk failed for minutes.
    """
    sampler.device.forget_peak()
    batch = choose_batch(sampler.config, plan.grid, sampler, batch_size)
    if batch.vae_slicing:
        sampler.slice_vae()
    # Model, device, versions, host, job, start, batch.
    task_run = {
        **sampler.provenance,
        "sdwn": code_version(),
        "host": socket.gethostname(),
        "job": this_process().job,
        "started": now(),
        "batch": str(batch),
    }
    workload = sampler.workload
    meter = Meter(
        paths,
        device=sampler.device,
        batch=batch,
        loading_seconds=sampler.loading_seconds,
        total=sum(shard.images for shard in shards),
        started=task_run["started"],
        # Plain noise is drawn without torch, on the CPU.
        no_gpu=missing_gpu(workload.device) if workload.torch else None,
    )
    # It grows while prompts are encoded.
    meter.record.cut_prompts = sampler.cut_prompts

    flush_seconds = seconds("SDWN_FLUSH_SECONDS", FLUSH_SECONDS)
    disk = RunDisk(paths)
    todo = [ShardJob(disk, plan, shard, task_run) for shard in shards]
    try:
        background = BackgroundWriter(
            plan.config.storage, sampler.check, flush_seconds, check_beside=sampler.device.is_gpu
        )
        # In this order: signals may also come while the last batches are written.
        with flushed_on_signals(background, disk), background:
            for _ in range(TRIES):
                for job in todo:
                    batch = make_shard(job, sampler, batch, meter, background)
                if not (todo := background.lost()):
                    break
                meter.count_done(-sum(job.shard.images for job in todo))
            else:
                lost = ", ".join(str(job.shard.index) for job in todo)
                raise IntegrityError(
                    f"{paths.pieces}: partial shards were lost or damaged {TRIES} times while this "
                    f"task ran (of shards {lost}); look for what removes them, or a failing disk"
                )
    finally:
        meter.end()
    return batch


def make_shard(
    job: ShardJob,
    sampler: ImageSampler,
    batch: BatchSize,
    meter: Meter,
    background: BackgroundWriter,
) -> BatchSize:
    """Keep a shard's images that are on disk, sample the others, queue them for writing.

    Images that came out as NaN in half precision are sampled again at its end, each alone and in
    float32; until then their batches are not written, so that a kill makes them anew.

    Returns:
        The batch size for the next shard: smaller once memory ran out.
    """
    specs = list(job.plan.specs(job.shard))
    kept, attempt = job.kept()
    writer = PartialShardWriter(job, attempt + 1)
    done, waiting = 0, list[_Batch]()
    generation = job.plan.config.generation
    # Quantized weights have no float32 to go back to.
    half = generation.precision != "fp32" and generation.quantization is None
    # Batches lie on a grid that the batch size alone fixes: a task that was killed makes the same
    # batches, and so the same bytes, as one that was not.
    while done < len(specs) and not job.finished:
        positions = range(done, min(done + batch.images, len(specs)))
        if kept.issuperset(positions):
            meter.count_done(len(positions))
        else:
            chosen, began = [specs[index] for index in positions], time.monotonic()
            no_room = None
            try:
                samples = sampler.sample(chosen)
            except OutOfMemoryError as error:
                no_room = str(error)
            # Only here is a failed batch's memory free: an exception keeps what its frames hold.
            if no_room is not None:
                sampler.device.release()
                batch = smaller_batch(sampler, batch, job.plan.grid, no_room)
                meter.note_smaller_batch(batch)
                continue
            meter.count_batch(len(chosen), time.monotonic() - began, sampler.device.peak_bytes)
            if half and any(sample.status == "nan" for sample in samples):
                waiting.append((positions, chosen, samples))
            else:
                background.write(writer, positions, chosen, samples)
        done = positions.stop
        if waiting and (len(waiting) == MOST_WAITING or done == len(specs)):
            retry_nan(sampler, waiting)
            for made in waiting:
                background.write(writer, *made)
            waiting.clear()
    background.finish(writer)
    return batch


# A batch's positions in its shard, its images, and what was sampled.
_Batch = tuple[range, list[ImageSpec], list[Sample]]


def retry_nan(sampler: ImageSampler, batches: Sequence[_Batch]) -> None:
    """Replace, in batches, the images that came out as NaN by those sampled in float32."""
    places = [
        (samples, i, specs[i])
        for _, specs, samples in batches
        for i, sample in enumerate(samples)
        if sample.status == "nan"
    ]
    try:
        retried = sampler.in_float32([spec for *_, spec in places])
    except OutOfMemoryError as error:
        log.warning("%d NaN images, and no room for float32: %s", len(places), error)
        return
    for (samples, i, spec), sample in zip(places, retried, strict=True):
        samples[i] = sample
        outcome = "NaN again" if sample.status == "nan" else "whole"
        log.warning("%s: NaN, sampled again in float32: %s", spec.name, outcome)
