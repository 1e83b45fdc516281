"""Partial shards: a shard's finished images on disk, written beside sampling, then joined.

::

    sampling ──> BackgroundWriter ──> PartialShardWriter ──> pieces/00007/000000-000040.h5
                 a thread: checks,    every 5 s, and when    pieces/00007/000040-000060.h5
                 encodes, writes      the task is ended           │ finish_shard joins them
                                                                  ▼
                                                             shards/00007.h5

Every file gets its name once it is whole, so a kill costs the batch under way and what was not
written yet. Two tasks may work on the same shard: both make the same images, and the first one
that finishes gives the shard its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from types import FrameType, TracebackType
from typing import Any

from sdwn.config import StorageConfig
from sdwn.errors import IntegrityError
from sdwn.generation.batching import Sample
from sdwn.io import atomic, plain_disk_errors
from sdwn.jobs.task import RunDisk
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan, Shard
from sdwn.storage.columns import to_columns
from sdwn.storage.images import encode
from sdwn.storage.shards import Expected, ImageFile, join, write_images

log = logging.getLogger(__name__)

# Batches that may wait while another is encoded: more would only take memory.
MOST_QUEUED = 2
# How long a signal's handler waits for finished images to reach the disk; SLURM gives 30 s.
FLUSH_TIMEOUT_S = 20.0
POLL_SECONDS = 0.02
# Columns that are an image's own.
_OF_SPEC = ("number", "seed", "prompt", "prompt_number")
_OF_SAMPLE = ("tokens", "truncated", "status", "vae_slicing", "retried_fp32")


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard to make: its run folder, its plan, and the record of the task run that makes it."""

    disk: RunDisk
    plan: Plan
    shard: Shard
    task_run: dict[str, Any]

    @property
    def finished(self) -> bool:
        """True once its final file is there, perhaps another task's."""
        try:
            return self.disk.paths.shard(self.shard.index).is_file()
        except OSError:
            return False  # the disk fails, and the writer waits for it

    def kept(self) -> tuple[set[int], int]:
        """Find the images that are on disk, by their positions in the shard, and the last attempt.

        A partial shard that is damaged or of another plan is removed.

        Raises:
            DiskError: they cannot be read for now, and may be whole.
        """
        paths, images, last = self.disk.paths, set[int](), 0

        def check(start: int, stop: int) -> int:
            with open_partial_shard(paths, self.plan, self.shard, start, stop) as file:
                file.check()
                return int(file.attributes.get("attempt", 1))

        for start, stop in paths.piece_ranges(self.shard.index):
            try:
                last = max(last, self.disk.retry(partial(check, start, stop)))
                images.update(range(start, stop))
            except IntegrityError as error:
                log.warning("its images are sampled again: %s", error)
                paths.piece(self.shard.index, start, stop).unlink(missing_ok=True)
        return images, last


def open_partial_shard(
    paths: RunPaths, plan: Plan, shard: Shard, start: int, stop: int
) -> ImageFile:
    """Open the partial shard of these images; see :class:`ImageFile`."""
    path = paths.piece(shard.index, start, stop)
    return ImageFile(path, Expected(plan.digest, shard.index, stop - start))


class PartialShardWriter:
    """Collects finished batches and writes them as partial shards, then joins the shard.

    Batches that are added after another task finished the shard are dropped. Other losses,
    partial shards that are removed or damaged, are noticed when the shard is finished.
    """

    def __init__(self, job: ShardJob, attempt: int) -> None:
        self.job, self._attempt = job, attempt
        self._rows: list[dict[str, Any]] = []
        self._payloads: list[bytes] = []
        self._start = 0
        self.flushed = time.monotonic()

    def add(
        self,
        batch: range,
        specs: Sequence[ImageSpec],
        samples: Sequence[Sample],
        payloads: Sequence[bytes],
    ) -> None:
        """Add a batch, by its positions in the shard."""
        if batch.start != self._start + len(self._rows):
            self.flush()
            self._start = batch.start
        for place, (spec, sample, payload) in enumerate(zip(specs, samples, payloads, strict=True)):
            height, width, _ = sample.pixels.shape
            # An image that was sampled again was alone in its batch.
            alone = sample.retried_fp32
            self._rows.append(
                {name: getattr(spec.concept, name) or "" for name in ("id", "wnid", "synset")}
                | {name: getattr(spec, name) for name in _OF_SPEC}
                | {name: getattr(sample, name) for name in _OF_SAMPLE}
                | {
                    "negative_prompt": spec.negative_prompt or "",
                    "batch": batch[place] if alone else batch.start,
                    "batch_size": 1 if alone else len(batch),
                    "place": 0 if alone else place,
                    "attempt": self._attempt,
                    "task_run": 0,
                    "width": width,
                    "height": height,
                    "codec": self.job.plan.config.storage.codec,
                    "sha256": sha256(payload).digest(),
                }
            )
            self._payloads.append(payload)

    def flush(self) -> None:
        """Write what was collected as one partial shard."""
        plan, shard, stop = self.job.plan, self.job.shard, self._start + len(self._rows)

        def write() -> None:
            sizes = [len(payload) for payload in self._payloads]
            attributes = {**shard_attributes(plan, shard, "piece"), "attempt": self._attempt}
            contents = to_columns(self._rows), sizes, [self.job.task_run]
            paths = self.job.disk.paths
            # A run's folder that leaves at this moment is not made anew.
            with plain_disk_errors(paths.root):
                paths.pieces.mkdir(exist_ok=True)
            piece = paths.piece(shard.index, self._start, stop)
            with atomic(piece, parents=False) as temporary:
                write_images(temporary, attributes, contents, self._payloads)

        if self._rows:
            try:
                self.job.disk.retry(write)
            except FileNotFoundError as error:
                log.warning("removed while it was written: %s", error)
        self._start, self._rows, self._payloads = stop, [], []
        self.flushed = time.monotonic()

    def finish(self) -> bool:
        """Write what is left and join the shard; return False where partial shards are lost."""
        self.flush()
        job, paths = self.job, self.job.disk.paths
        try:
            if not job.finished:
                job.disk.retry(partial(finish_shard, paths, job.plan, job.shard))
        except (FileNotFoundError, IntegrityError) as error:
            # Another task may have finished it, and removed its partial shards.
            if not job.finished:
                log.warning("shard %d: lost images are sampled again: %s", job.shard.index, error)
                return False
        shutil.rmtree(paths.shard_pieces(job.shard.index), ignore_errors=True)
        log.info("shard %d: finished", job.shard.index)
        return True


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


def finish_shard(paths: RunPaths, plan: Plan, shard: Shard) -> None:
    """Join a shard's partial shards, check the result, and give it its name.

    Raises:
        IntegrityError: partial shards are missing or damaged.
    """
    folder, images = paths.shard_pieces(shard.index), shard.images
    with ExitStack() as stack:
        found = []
        for start, stop in paths.piece_ranges(shard.index):
            file = stack.enter_context(open_partial_shard(paths, plan, shard, start, stop))
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
            join(temporary, shard_attributes(plan, shard, "shard"), ranges)
            with ImageFile(temporary, Expected(plan.digest, shard.index, images)) as written:
                written.check()


class BackgroundWriter:
    """One thread that checks, encodes and writes batches in order, and a pool that encodes.

    An error there is raised by the next call here. Leaving the block writes all that was
    handed over, also after an error or a signal.
    """

    def __init__(
        self,
        storage: StorageConfig,
        check: Callable[[list[Sample]], list[Sample]],
        flush_seconds: float,
        check_beside: bool = True,
    ) -> None:
        self._storage, self._check, self._flush_seconds = storage, check, flush_seconds
        self._check_beside = check_beside
        # Of all queues this one's put may interrupt itself, as a signal's handler does.
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "encode")
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self._error: BaseException | None = None
        self._current: PartialShardWriter | None = None
        self._lost: list[ShardJob] = []

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        self._pool.shutdown()
        if self._error is not None:
            if error is None:
                raise self._error
            if self._error is not error:
                log.error("while writing: %s", self._error)

    def write(
        self,
        writer: PartialShardWriter,
        batch: range,
        specs: Sequence[ImageSpec],
        samples: list[Sample],
    ) -> None:
        """Queue a batch; wait while :data:`MOST_QUEUED` others are queued."""
        # Two threads that compute on one CPU take turns at all its cores, and wait for each other.
        ready = None if self._check_beside else self._check(samples)

        def step() -> None:
            self._current, codec, quality = writer, self._storage.codec, self._storage.quality
            checked = self._check(samples) if ready is None else ready
            payloads = self._pool.map(lambda made: encode(made.pixels, codec, quality), checked)
            writer.add(batch, specs, checked, list(payloads))
            if time.monotonic() - writer.flushed >= self._flush_seconds:
                writer.flush()

        self._put(step)

    def finish(self, writer: PartialShardWriter) -> None:
        """Queue the end of a shard, behind its batches; see :meth:`lost`."""

        def step() -> None:
            self._current = None
            if not writer.finish():
                self._lost.append(writer.job)

        self._put(step)

    def lost(self) -> list[ShardJob]:
        """Wait for all that was handed over; return the shards whose partial shards were lost."""
        written = threading.Event()
        self._put(written.set)
        while not written.wait(POLL_SECONDS):
            if self._error is not None:
                raise self._error
        lost, self._lost = self._lost, []
        return lost

    def flush(self) -> None:
        """Wait, for 20 s at most, until all that was handed over is on disk.

        Safe in a signal's handler, which may have interrupted a put of its own thread.
        """
        flushed, end = threading.Event(), time.monotonic() + FLUSH_TIMEOUT_S

        def step() -> None:
            if self._current is not None:
                self._current.flush()
            flushed.set()

        self._queue.put(step)
        while not flushed.wait(POLL_SECONDS):
            if not self._thread.is_alive() or time.monotonic() > end:
                return

    def _put(self, step: Callable[[], None]) -> None:
        while self._error is None and self._queue.qsize() >= MOST_QUEUED:
            time.sleep(POLL_SECONDS)
        if self._error is not None:
            raise self._error
        self._queue.put(step)

    def _work(self) -> None:
        try:
            while (step := self._queue.get()) is not None:
                step()
            if self._current is not None:
                self._current.flush()
        except BaseException as error:
            self._error = error


@contextlib.contextmanager
def flushed_on_signals(writer: BackgroundWriter, disk: RunDisk) -> Iterator[None]:
    """Write what is finished when SLURM announces the end, then do what submitit would.

    From then on, no failing disk is waited for. USR2 comes before a time limit or a
    preemption, TERM with them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        disk.ending = True
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
