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
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdwn import checkout
from sdwn.batches import BatchSize
from sdwn.devices.device import missing_gpu
from sdwn.errors import IntegrityError, OutOfMemoryError
from sdwn.generation.batching import ImageSampler, choose_batch, load_sampler, smaller_batch
from sdwn.generation.partial_shards import (
    BackgroundWriter,
    PartialShardWriter,
    ShardJob,
    flushed_on_signals,
)
from sdwn.io import now, seconds
from sdwn.jobs.task import Meter, RunDisk, Stage, this_process
from sdwn.models.lock import locked_weights
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, Shard, read_plan

log = logging.getLogger(__name__)

# A kill costs the batch under way and at most this much finished work.
FLUSH_SECONDS = 5.0
# How often a task makes a shard whose partial shards were lost meanwhile, before it gives up.
TRIES = 3


def generate(run: Path, indices: Iterable[int], batch_size: int | None = None) -> None:
    """Make those shards of a run that aren't finished yet.

    ``batch_size`` is that of the site's profile; it replaces the config's or a GPU profile's.
    """
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
    make_shards(paths, plan, todo, load_sampler(plan.config, weights), batch_size)


GENERATE = Stage("generate", generate)


def make_shards(
    paths: RunPaths,
    plan: Plan,
    shards: Sequence[Shard],
    sampler: ImageSampler,
    batch_size: int | None = None,
) -> BatchSize:
    """Make shards with a sampler that is loaded; sampling and writing overlap.

    Of a shard whose partial shards were lost or damaged meanwhile, these images are sampled again.
    Returns the batch size at the end: memory may have run out with a larger one.

    Raises:
        IntegrityError: partial shards are lost again and again.
        DiskError: the run's disk failed for minutes.
    """
    sampler.device.forget_peak()
    batch = choose_batch(sampler.config, sampler, batch_size)
    if batch.vae_slicing:
        sampler.slice_vae()
    # Model, device, versions, host, job, start, batch.
    task_run = {
        **sampler.provenance,
        "sdwn": checkout.code(),
        "host": socket.gethostname(),
        "job": this_process().job,
        "started": now(),
        "batch": str(batch),
    }
    workload = sampler.workload
    meter = Meter(
        paths,
        device=workload.device,
        memory_gb=workload.memory_gb,
        batch=batch,
        loading_seconds=sampler.loading_seconds,
        total=sum(plan.shard_images(shard) for shard in shards),
        started=task_run["started"],
        # Plain noise is drawn without torch, on the CPU.
        no_gpu=missing_gpu(workload.device) if workload.torch else None,
    )

    flush_seconds = seconds("SDWN_FLUSH_SECONDS", FLUSH_SECONDS)
    disk = RunDisk(paths)
    todo = [ShardJob(disk, plan, shard, task_run) for shard in shards]
    try:
        background = BackgroundWriter(plan.config.storage, sampler.check, flush_seconds)
        # In this order: signals may also come while the last batches are written.
        with flushed_on_signals(background, disk), background:
            for _ in range(TRIES):
                for job in todo:
                    batch = make_shard(job, sampler, batch, meter, background)
                if not (todo := background.lost()):
                    break
                meter.count_done(-sum(plan.shard_images(job.shard) for job in todo))
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

    Returns:
        The batch size for the next shard: smaller once memory ran out.
    """
    specs = list(job.plan.specs(job.shard))
    kept, attempt = job.kept()
    writer = PartialShardWriter(job, attempt + 1)
    done = 0
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
                batch = smaller_batch(sampler, batch, job.plan.config.images_per_synset, no_room)
                meter.note_smaller_batch(batch)
                continue
            meter.count_batch(len(chosen), time.monotonic() - began, sampler.device.peak_bytes)
            background.write(writer, positions, chosen, samples)
        done = positions.stop
    background.finish(writer)
    return batch
