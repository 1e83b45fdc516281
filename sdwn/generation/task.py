"""An array task that makes images: shard after shard, batch after batch.

::

    generate ──> make_shards ──> ShardGenerator.make, for each shard that is not finished
    which shards?   sampler,        images that an earlier start wrote are kept,
    which weights?  batch size      the others are sampled, a batch at a time
                                        │ out of memory: a smaller batch, the same images
                                        ▼
                                    BackgroundWriter: see partial_shards.py
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdwn import checkout
from sdwn.batches import BatchSize
from sdwn.devices.device import missing_gpu
from sdwn.errors import IntegrityError, OutOfMemoryError, SdwnError
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
    covered,
    flushed_on_signals,
)
from sdwn.io import now, seconds
from sdwn.jobs.task import Meter, RunDisk, Stage, this_process
from sdwn.models.lock import locked_weights
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan, read_plan
from sdwn.planning.work import Shard

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
    names = {index: paths.shard(index) for index in indices}
    if odd := [path for path in names.values() if path.exists() and not path.is_file()]:
        raise SdwnError(f"{odd[0]}: expected a shard or nothing, found a folder; move it away")
    todo = [plan.shards[index] for index, path in names.items() if not path.exists()]
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
    task_run = describe_task_run(sampler, batch)
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

    generator = ShardGenerator(
        sampler, meter, batch, flush_seconds=seconds("SDWN_FLUSH_SECONDS", FLUSH_SECONDS)
    )
    disk = RunDisk(paths)
    todo = [ShardJob(disk, plan, shard, task_run) for shard in shards]
    try:
        background = BackgroundWriter(plan.config.storage, sampler.check)
        # In this order: signals may also come while the last batches are written.
        with flushed_on_signals(background, disk), background:
            for _ in range(TRIES):
                for job in todo:
                    generator.make(job, background)
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
    return generator.batch


def describe_task_run(sampler: ImageSampler, batch: BatchSize) -> dict[str, Any]:
    """Record what makes images now: model, device, versions, host, job, start, batch."""
    here = {"host": socket.gethostname(), "job": this_process().job, "started": now()}
    return {**sampler.provenance, "sdwn": checkout.code(), **here, "batch": str(batch)}


class ShardGenerator:
    """Samples shards one after another, with smaller batches once memory ran out."""

    def __init__(
        self, sampler: ImageSampler, meter: Meter, batch: BatchSize, flush_seconds: float
    ) -> None:
        self._sampler, self._meter, self._flush_seconds = sampler, meter, flush_seconds
        self.batch = batch
        if batch.vae_slicing:
            sampler.slice_vae()

    def make(self, job: ShardJob, background: BackgroundWriter) -> None:
        """Keep whole partial shards, sample the missing images, queue them for writing."""
        specs = list(job.plan.specs(job.shard))
        kept = job.whole_partial_shards()
        attempt = 1 + max((found.attempt for found in kept), default=0)
        writer = PartialShardWriter(job, attempt, self._flush_seconds)
        done = 0
        # Batches lie on a grid that the batch size alone fixes: a task that was killed makes the
        # same batches, and so the same bytes, as one that was not.
        while done < len(specs) and not job.finished:
            batch = range(done, min(done + self.batch.images, len(specs)))
            if covered(batch, kept):
                self._meter.count_done(len(batch))
            else:
                chosen = [specs[index] for index in batch]
                samples = self._sample(chosen, job.plan.config.images_per_synset)
                if samples is None:
                    continue  # with a smaller batch
                background.write(writer, batch, chosen, samples)
            done = batch.stop
        background.finish(writer)

    def _sample(self, specs: list[ImageSpec], images_per_synset: int) -> list[Sample] | None:
        """Sample a batch; None if there was no room, and batches are smaller from now on."""
        began = time.monotonic()
        try:
            samples = self._sampler.sample(specs)
        except OutOfMemoryError as error:
            reason = str(error)
        else:
            self._meter.count_batch(
                len(specs), time.monotonic() - began, self._sampler.device.peak_bytes
            )
            return samples
        # Only here is the failed batch's memory free: an exception keeps what its frames hold.
        self._sampler.device.release()
        self.batch = smaller_batch(self._sampler, self.batch, images_per_synset, reason)
        self._meter.note_smaller_batch(self.batch)
        return None
