"""The stage that makes images: shards one after another, what is finished kept at every moment."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdwn import checkout
from sdwn.batches import BatchSize
from sdwn.devices import visible
from sdwn.errors import IntegrityError, OutOfMemoryError, SdwnError
from sdwn.generation.batching import (
    ImageSampler,
    Sample,
    choose_batch_size,
    load_sampler,
    smaller_batch,
)
from sdwn.generation.partial_shards import PieceWriter, Work, covered, sound_pieces
from sdwn.generation.writer import BackgroundWriter, flushed_on_signals
from sdwn.io import now, seconds
from sdwn.jobs.disk import RunDisk
from sdwn.jobs.processes import this_process
from sdwn.jobs.records import Meter, first_record
from sdwn.models.lock import locked_weights
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan, Shard, read_plan

log = logging.getLogger(__name__)

# A kill costs the batch under way and at most this much finished work.
FLUSH_SECONDS = 5.0
# How often a task makes a shard whose pieces were lost meanwhile, before it gives up.
TRIES = 3


def generate(run: Path, indices: Iterable[int], batch_size: int | None = None) -> None:
    """Make those shards of a run that aren't finished yet.

    ``batch_size`` is what the site's profile asks for, in the place of the config's or a GPU
    profile's.
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


def make_shards(
    paths: RunPaths,
    plan: Plan,
    shards: Sequence[Shard],
    sampler: ImageSampler,
    batch_size: int | None = None,
) -> BatchSize:
    """Make shards with a sampler that is loaded; sampling and writing overlap.

    A shard whose pieces were lost or damaged meanwhile is made again of what is left. Returns the
    batch size at the end: memory may have run out with a larger one.

    Raises:
        IntegrityError: pieces are lost again and again.
        DiskError: the run's disk failed for minutes.
    """
    sampler.forget_peak()
    batch = choose_batch_size(plan.config, sampler, batch_size)
    session = task_session(sampler, batch)
    workload = sampler.workload
    record = first_record(
        workload.device, workload.memory_gb, batch, sampler.loading_seconds, session["started"]
    )
    record.total = sum(plan.shard_images(shard) for shard in shards)
    meter = Meter(paths, record)
    meter.begin(batch)
    # Plain noise is drawn without torch, on the CPU.
    meter.without_gpu(visible.missing(workload.device) if workload.torch else None)
    maker = _Maker(sampler, meter, batch, seconds("SDWN_FLUSH_SECONDS", FLUSH_SECONDS))
    disk = RunDisk(paths)
    todo = [Work(disk, plan, shard, session) for shard in shards]
    try:
        background = BackgroundWriter(plan.config.storage, sampler.check)
        # In this order: signals may also come while the last batches are written.
        with flushed_on_signals(background, disk), background:
            for _ in range(TRIES):
                for work in todo:
                    maker.make(work, background)
                if not (todo := background.lost()):
                    break
                meter.passed(-sum(plan.shard_images(work.shard) for work in todo))
            else:
                lost = ", ".join(str(work.shard.index) for work in todo)
                raise IntegrityError(
                    f"{paths.pieces}: partial shards were lost or damaged {TRIES} times while this "
                    f"task ran (of shards {lost}); look for what removes them, or a failing disk"
                )
    finally:
        meter.end()
    return maker.batch


def task_session(sampler: ImageSampler, batch: BatchSize) -> dict[str, Any]:
    """Record who makes images now: model, device, versions, host, job, start, batch."""
    who = {"host": socket.gethostname(), "job": this_process().job, "started": now()}
    return {**sampler.provenance, "sdwn": checkout.code(), **who, "batch": str(batch)}


class _Maker:
    """Samples shards one after another, with smaller batches once memory ran out."""

    def __init__(
        self, sampler: ImageSampler, meter: Meter, batch: BatchSize, flush_seconds: float
    ) -> None:
        self._sampler, self._meter, self.batch = sampler, meter, batch
        self._flush_seconds = flush_seconds
        if batch.vae_slicing:
            sampler.slice_vae()

    def make(self, work: Work, background: BackgroundWriter) -> None:
        """Keep the shard's sound pieces, sample what is missing, have it written."""
        specs = work.specs
        kept = sound_pieces(work)
        attempt = 1 + max((piece.attempt for piece in kept), default=0)
        writer = PieceWriter(work, attempt, self._flush_seconds)
        done = 0
        while done < len(specs) and not work.finished:
            batch = range(done, min(done + self.batch.images, len(specs)))
            if covered(batch, kept):
                self._meter.passed(len(batch))
            else:
                chosen = [specs[index] for index in batch]
                samples = self._sample(chosen, work.plan.config.images_per_synset)
                if samples is None:
                    continue
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
            peak = self._sampler.peak_bytes
            self._meter.sampled(len(specs), time.monotonic() - began, peak)
            return samples
        # Only here is the failed batch's memory free: an exception keeps what its frames hold.
        self._sampler.release()
        self.batch = smaller_batch(self._sampler, self.batch, images_per_synset, reason)
        self._meter.lowered(self.batch)
        return None
