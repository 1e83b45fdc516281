"""An array task that makes images: shard after shard, batch after batch, then on disk.

::

    generate ──> make_shards ──> make_shard, for each shard that is not finished
    which shards?   sampler,        images that an earlier start wrote are kept,
    which weights?  batch size      the others are sampled, a batch at a time
                                        │ out of memory: a smaller batch, the same images
                                        ▼
                 BackgroundWriter ──> ShardWriter ──> pieces/00007/000000-000040.h5
                 a thread: checks,    every 5 s,      pieces/00007/000040-000060.h5
                 encodes, writes      and at the end       │ join
                                                           ▼
                                                      shards/00007.h5

Every file gets its name once it is whole, so a kill costs the batch under way and what was not
written yet. Two tasks may work on the same shard: both make the same images, and the first one
that finishes gives the shard its name.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from itertools import groupby
from math import inf
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

from sdwn.batches import NO_OPTIONS, BatchSize, TaskOptions
from sdwn.devices.device import missing_gpu
from sdwn.errors import IntegrityError, OutOfMemoryError
from sdwn.generation.batching import ImageSampler, Sample, choose_batch, load_sampler, smaller_batch
from sdwn.io import atomic, code_version, now, plain_disk_errors, seconds
from sdwn.jobs.task import Meter, RunDisk, Stage, this_process
from sdwn.models.lock import locked_weights
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan, Shard, read_plan
from sdwn.storage.columns import to_columns
from sdwn.storage.images import encode
from sdwn.storage.shards import Expected, ImageFile, join, write_images

log = logging.getLogger(__name__)

# A kill costs the batch under way and at most this much finished work.
FLUSH_SECONDS = 5.0
# Batches with a NaN image that wait for float32: weights of twice the size are loaded for them.
MOST_WAITING = 8
# How often a task makes a shard whose partial shards were lost meanwhile, before it gives up.
TRIES = 3
# Batches that may wait while another is encoded: more would only take memory.
MOST_QUEUED = 2
# How long a signal's handler waits for finished images to reach the disk; SLURM gives 30 s.
FLUSH_TIMEOUT_S = 20.0
POLL_SECONDS = 0.02
# Columns that are an image's own.
_OF_SPEC = ("number", "seed", "prompt", "prompt_number")
_OF_SAMPLE = ("tokens", "truncated", "status", "vae_slicing", "retried_fp32")


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
    # Their prompts are encoded first.
    specs = (spec for shard in todo for spec in plan.specs(shard))
    sampler = load_sampler(plan.config, weights, specs, options.placement)
    make_shards(paths, plan, todo, sampler, options.batch_size)


GENERATE = Stage("generate", generate)


def make_shards(
    paths: RunPaths,
    plan: Plan,
    shards: Sequence[Shard],
    sampler: ImageSampler,
    batch_size: int | None = None,
) -> BatchSize:
    """Make shards with a sampler that is loaded; sampling and writing overlap.

    ``batch_size`` replaces the config's or a GPU profile's. Returns the one at the end, which is
    smaller where memory ran out.
    """
    sampler.device.forget_peak()
    batch = choose_batch(sampler.config, plan.grid, sampler, batch_size)
    if batch.vae_slicing:
        sampler.slice_vae()
    task_run = {
        **sampler.provenance,
        "sdwn": code_version(),
        "host": socket.gethostname(),
        "job": this_process().job,
        "started": now(),
        "batch": str(batch),
    }
    meter = Meter(
        paths,
        device=sampler.device,
        batch=batch,
        loading_seconds=sampler.loading_seconds,
        total=sum(shard.images for shard in shards),
        started=task_run["started"],
        # Plain noise is drawn without torch, on the CPU.
        no_gpu=missing_gpu(sampler.device.name) if sampler.workload.torch else None,
    )
    # It grows while prompts are encoded.
    meter.record.cut_prompts = sampler.cut_prompts

    flush_seconds, disk = seconds("SDWN_FLUSH_SECONDS", FLUSH_SECONDS), RunDisk(paths)
    todo = [ShardWriter(disk, plan, shard, task_run) for shard in shards]
    try:
        background = BackgroundWriter(sampler, flush_seconds)
        # In this order: signals may also come while the last batches are written.
        with flushed_on_signals(background, disk), background:
            for _ in range(TRIES):
                for writer in todo:
                    batch = make_shard(writer, sampler, batch, meter, background)
                # Their images are sampled again.
                if not (todo := background.lost()):
                    break
                meter.count_done(-sum(writer.shard.images for writer in todo))
            else:
                lost = ", ".join(str(writer.shard.index) for writer in todo)
                raise IntegrityError(
                    f"{paths.pieces}: partial shards were lost or damaged {TRIES} times while this "
                    f"task ran (of shards {lost}); look for what removes them, or a failing disk"
                )
    finally:
        meter.end()
    return batch


def make_shard(
    writer: ShardWriter,
    sampler: ImageSampler,
    batch: BatchSize,
    meter: Meter,
    background: BackgroundWriter,
) -> BatchSize:
    """Keep a shard's images that are on disk, sample the others, queue them for writing.

    Batches with images that came out as NaN in half precision are written once these are sampled
    again, so that a kill makes them anew. Returns the batch size for the next shard.
    """
    kept = writer.begin()
    specs, start, waiting = writer.specs, 0, list[tuple[range, list[Sample]]]()
    generation = writer.plan.config.generation
    # Quantized weights have no float32 to go back to.
    half = generation.precision != "fp32" and generation.quantization is None
    # Batches lie on a grid that the batch size alone fixes: a task that was killed makes the same
    # batches, and so the same bytes, as one that was not.
    while start < len(specs) and not writer.finished:
        positions = range(start, min(start + batch.images, len(specs)))
        if kept.issuperset(positions):
            meter.count_done(len(positions))
        else:
            began, no_room = time.monotonic(), None
            try:
                samples = sampler.sample(specs[start : positions.stop])
            except OutOfMemoryError as error:
                no_room = str(error)
            # Only here is a failed batch's memory free: an exception keeps what its frames hold.
            if no_room is not None:
                sampler.device.release()
                batch = smaller_batch(sampler, batch, writer.plan.grid, no_room)
                meter.note_smaller_batch(batch)
                continue
            meter.count_batch(len(positions), time.monotonic() - began, sampler.device.peak_bytes)
            if half and any(sample.status == "nan" for sample in samples):
                waiting.append((positions, samples))
            else:
                background.write(writer, positions, samples)
        start = positions.stop
        if waiting and (len(waiting) == MOST_WAITING or start == len(specs)):
            retry_nan(sampler, specs, waiting)
            for made in waiting:
                background.write(writer, *made)
            waiting.clear()
    background.finish(writer)
    return batch


def retry_nan(
    sampler: ImageSampler, specs: Sequence[ImageSpec], batches: Sequence[tuple[range, list[Sample]]]
) -> None:
    """Replace, in batches of a shard's images, those that are NaN by ones sampled in float32."""
    places = [
        (samples, i, specs[position])
        for positions, samples in batches
        for i, position in enumerate(positions)
        if samples[i].status == "nan"
    ]
    try:
        retried = sampler.in_float32([spec for *_, spec in places])
    except OutOfMemoryError as error:
        log.warning("%d NaN images, and no room for float32: %s", len(places), error)
        return
    for (samples, i, spec), sample in zip(places, retried, strict=True):
        samples[i] = sample
        log.warning("%s: NaN, sampled again in float32: %s", spec.name, sample.status)


class ShardWriter:
    """Collects a shard's finished batches, writes them as partial shards, then joins these."""

    def __init__(self, disk: RunDisk, plan: Plan, shard: Shard, task_run: dict[str, Any]) -> None:
        self.disk, self.plan, self.shard, self._task_run = disk, plan, shard, task_run
        self.specs: list[ImageSpec] = []
        self._attempt = self._start = 0
        self._rows: list[dict[str, Any]] = []
        self._payloads: list[bytes] = []
        self.flushed = 0.0

    @property
    def finished(self) -> bool:
        """True once its final file is there, perhaps another task's."""
        try:
            return self.disk.paths.shard(self.shard.index).is_file()
        except OSError:
            return False  # the disk fails, and the writer waits for it

    def begin(self) -> set[int]:
        """Begin an attempt; return the positions of images on disk, and remove unusable pieces."""
        paths, images, last = self.disk.paths, set[int](), 0

        def attempt(start: int, stop: int) -> int:
            with self._partial_shard(start, stop) as file:
                file.check()
                return int(file.attributes.get("attempt", 1))

        for piece in paths.piece_ranges(self.shard.index):
            try:
                last = max(last, self.disk.retry(partial(attempt, *piece)))
                images.update(range(*piece))
            except IntegrityError as error:
                log.warning("its images are sampled again: %s", error)
                paths.piece(self.shard.index, *piece).unlink(missing_ok=True)
        self.specs, self._attempt = list(self.plan.specs(self.shard)), last + 1
        self.flushed = time.monotonic()
        return images

    def add(self, positions: range, samples: Sequence[Sample], payloads: Sequence[bytes]) -> None:
        """Add a batch, by its positions in the shard."""
        if positions.start != self._start + len(self._rows):
            self.flush()
            self._start = positions.start
        for position, sample, payload in zip(positions, samples, payloads, strict=True):
            spec, (height, width, _) = self.specs[position], sample.pixels.shape
            # An image that was sampled again was alone in its batch.
            alone = sample.retried_fp32
            self._rows.append(
                {name: getattr(spec.concept, name) or "" for name in ("id", "wnid", "synset")}
                | {name: getattr(spec, name) for name in _OF_SPEC}
                | {name: getattr(sample, name) for name in _OF_SAMPLE}
                | {
                    "negative_prompt": spec.negative_prompt or "",
                    "batch": position if alone else positions.start,
                    "batch_size": 1 if alone else len(positions),
                    "place": 0 if alone else position - positions.start,
                    "attempt": self._attempt,
                    "task_run": 0,
                    "width": width,
                    "height": height,
                    "codec": self.plan.config.storage.codec,
                    "sha256": sha256(payload).digest(),
                }
            )
            self._payloads.append(payload)

    def flush(self) -> None:
        """Write what was collected as one partial shard."""
        paths, stop = self.disk.paths, self._start + len(self._rows)

        def write() -> None:
            attributes = shard_attributes(self.plan, self.shard, "piece")
            attributes["attempt"] = self._attempt
            sizes = [len(payload) for payload in self._payloads]
            contents = to_columns(self._rows), sizes, [self._task_run]
            # A run's folder that leaves at this moment is not made anew.
            with plain_disk_errors(paths.root):
                paths.pieces.mkdir(exist_ok=True)
            piece = paths.piece(self.shard.index, self._start, stop)
            with atomic(piece, parents=False) as temporary:
                write_images(temporary, attributes, contents, self._payloads)

        if self._rows:
            try:
                self.disk.retry(write)
            except FileNotFoundError as error:
                log.warning("removed while it was written: %s", error)
        self._start, self._rows, self._payloads = stop, [], []
        self.flushed = time.monotonic()

    def finish(self) -> bool:
        """Write what is left and join the shard; return False where partial shards are lost."""
        self.flush()
        paths, index = self.disk.paths, self.shard.index
        try:
            if not self.finished:
                self.disk.retry(self.join)
        except (FileNotFoundError, IntegrityError) as error:
            # Another task may have finished it, and removed its partial shards.
            if not self.finished:
                log.warning("shard %d: lost images are sampled again: %s", index, error)
                return False
        shutil.rmtree(paths.shard_pieces(index), ignore_errors=True)
        self.specs = []
        log.info("shard %d: finished", index)
        return True

    def join(self) -> None:
        """Join the partial shards, if all are whole, check the result, and give it its name."""
        paths, shard, images = self.disk.paths, self.shard, self.shard.images
        folder = paths.shard_pieces(shard.index)
        with ExitStack() as stack:
            found = []
            for start, stop in paths.piece_ranges(shard.index):
                file = stack.enter_context(self._partial_shard(start, stop))
                found.append((int(file.attributes.get("attempt", 1)), start, stop, file))
            # Of an image that several attempts made, the first one's is taken.
            made: dict[int, tuple[int, ImageFile]] = {}
            for _, start, stop, file in sorted(found, key=itemgetter(0, 1)):
                for image in range(start, stop):
                    made.setdefault(image, (start, file))
            if sorted(made) != list(range(images)):
                raise IntegrityError(f"{folder}: expected {images} images, found {len(made)}")
            ranges = []
            for (start, file), run in groupby(range(images), key=made.__getitem__):
                rows = [image - start for image in run]
                ranges.append((file, rows[0], rows[-1] + 1))
            with atomic(paths.shard(shard.index), folder=folder, parents=False) as temporary:
                join(temporary, shard_attributes(self.plan, shard, "shard"), ranges)
                expected = Expected(self.plan.digest, shard.index, images)
                with ImageFile(temporary, expected) as written:
                    written.check()

    def _partial_shard(self, start: int, stop: int) -> ImageFile:
        expected = Expected(self.plan.digest, self.shard.index, stop - start)
        return ImageFile(self.disk.paths.piece(self.shard.index, start, stop), expected)


def shard_attributes(plan: Plan, shard: Shard, kind: str) -> dict[str, Any]:
    """Return a file's attributes: its plan and shard, and the settings of its images."""
    return {
        "kind": kind,
        "plan_digest": plan.digest,
        "shard": shard.index,
        "model": plan.config.model.name,
        "revision": plan.config.model.revision or "",
        "settings": plan.config.model_dump_json(exclude={"evaluation"}),
    }


class BackgroundWriter:
    """One thread that checks, encodes and writes batches in order, and a pool that encodes.

    An error there is raised by the next call here. Leaving the block writes all that was handed
    over, also after an error or a signal.
    """

    def __init__(self, sampler: ImageSampler, flush_seconds: float) -> None:
        self._sampler, self._flush_seconds = sampler, flush_seconds
        # Of all queues this one's put may interrupt itself, as a signal's handler does.
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "encode")
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self._error: BaseException | None = None
        self._current: ShardWriter | None = None
        self._lost: list[ShardWriter] = []

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self._pool.shutdown()
        if self._error is not None:
            if error is None:
                raise self._error
            if self._error is not error:
                log.error("while writing: %s", self._error)

    def write(self, writer: ShardWriter, positions: range, samples: list[Sample]) -> None:
        """Queue a batch; wait while :data:`MOST_QUEUED` others are queued."""
        sampler, storage = self._sampler, writer.plan.config.storage

        def encoded() -> tuple[list[Sample], list[bytes]]:
            checked = sampler.check(samples)
            one = partial(encode, codec=storage.codec, quality=storage.quality)
            return checked, list(self._pool.map(one, (sample.pixels for sample in checked)))

        # On a CPU it would take cores from torch, whose threads wait for each other.
        on_cpu = sampler.workload.torch and not sampler.device.is_gpu
        ready = encoded() if on_cpu else None

        def step() -> None:
            self._current = writer
            writer.add(positions, *(ready or encoded()))
            if time.monotonic() - writer.flushed >= self._flush_seconds:
                writer.flush()

        self._put(step)

    def finish(self, writer: ShardWriter) -> None:
        """Queue the end of a shard, behind its batches."""

        def step() -> None:
            self._current = None
            if not writer.finish():
                self._lost.append(writer)

        self._put(step)

    def lost(self) -> list[ShardWriter]:
        """Wait for all that was handed over; return the shards whose partial shards were lost."""
        self.flush(inf)
        if self._error is not None:
            raise self._error
        lost, self._lost = self._lost, []
        return lost

    def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> None:
        """Wait, for so many seconds at most, until all that was handed over is on disk.

        Safe in a signal's handler, which may have interrupted a put of its own thread.
        """
        done, end = threading.Event(), time.monotonic() + timeout
        self._queue.put(self._flush_current)
        self._queue.put(done.set)
        while not done.wait(POLL_SECONDS):
            if not self._thread.is_alive() or time.monotonic() > end:
                return

    def _put(self, step: Callable[[], None]) -> None:
        while self._error is None and self._queue.qsize() >= MOST_QUEUED:
            time.sleep(POLL_SECONDS)
        if self._error is not None:
            raise self._error
        self._queue.put(step)

    def _flush_current(self) -> None:
        if self._current is not None:
            self._current.flush()

    def _work(self) -> None:
        try:
            while (step := self._queue.get()) is not None:
                step()
            self._flush_current()
        except BaseException as error:
            self._error = error


@contextmanager
def flushed_on_signals(writer: BackgroundWriter, disk: RunDisk) -> Iterator[None]:
    """Write what is finished when SLURM announces the end; then do what submitit would."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # USR2 comes before a time limit or a preemption, TERM with them.
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        disk.ending = True  # no failing disk is waited for
        writer.flush()
        following = before[signal.Signals(number)]
        if callable(following):
            following(number, frame)
        elif following == signal.SIG_DFL:
            raise SystemExit(128 + number)

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
