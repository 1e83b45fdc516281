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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from sdwn.config import StorageConfig
from sdwn.errors import IntegrityError
from sdwn.generation.batching import Sample
from sdwn.io import atomic
from sdwn.jobs.task import RunDisk
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan
from sdwn.planning.work import Shard
from sdwn.storage.columns import to_columns
from sdwn.storage.images import encode
from sdwn.storage.shards import Contents, Expected, ImageFile, join, write_images

log = logging.getLogger(__name__)

# Batches that may wait while another is encoded: more would only take memory.
MOST_QUEUED = 2
# How long a signal's handler waits for finished images to reach the disk; SLURM gives 30 s.
FLUSH_TIMEOUT_S = 20.0
POLL_SECONDS = 0.02


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

    def whole_partial_shards(self) -> list[PartialShard]:
        """List the partial shards that are whole and of this plan, and remove others.

        Raises:
            DiskError: they cannot be read for now, and may be whole.
        """
        paths, index, whole = self.disk.paths, self.shard.index, []
        for start, stop in paths.piece_ranges(index):
            try:
                whole.append(self.disk.retry(partial(self._checked, start, stop)))
            except IntegrityError as error:
                log.warning("its images are sampled again: %s", error)
                paths.piece(index, start, stop).unlink(missing_ok=True)
        return whole

    def _checked(self, start: int, stop: int) -> PartialShard:
        found, file = _open_partial_shard(self.disk.paths, self.plan, self.shard, start, stop)
        with file:
            file.check()
        return found


@dataclass(frozen=True, slots=True)
class PartialShard:
    """Finished images of a shard on disk, ``start`` up to ``stop``, all of one attempt."""

    path: Path
    start: int
    stop: int
    attempt: int


def _open_partial_shard(
    paths: RunPaths, plan: Plan, shard: Shard, start: int, stop: int
) -> tuple[PartialShard, ImageFile]:
    path = paths.piece(shard.index, start, stop)
    file = ImageFile(path, Expected(plan.digest, shard.index, stop - start))
    return PartialShard(path, start, stop, int(file.attributes.get("attempt", 1))), file


def covered(batch: range, partial_shards: Iterable[PartialShard]) -> bool:
    """Return whether every image of a batch is in some partial shard."""
    return set(batch) <= {i for found in partial_shards for i in range(found.start, found.stop)}


@dataclass
class PartialShardWriter:
    """Collects finished batches and writes them as partial shards, then joins the shard.

    Batches that are added after another task finished the shard are dropped. Other losses,
    partial shards that are removed or damaged, are noticed when the shard is finished.
    """

    job: ShardJob
    attempt: int
    flush_seconds: float
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _payloads: list[bytes] = field(default_factory=list)
    _start: int = 0
    _flushed: float = field(default_factory=time.monotonic)

    def add(
        self,
        batch: range,
        specs: Sequence[ImageSpec],
        samples: Sequence[Sample],
        payloads: Sequence[bytes],
    ) -> None:
        """Add a batch, by its positions in the shard; it may be written now or with later ones."""
        if batch.start != self._start + len(self._rows):
            self.flush()
            self._start = batch.start
        for position, (spec, sample, payload) in enumerate(
            zip(specs, samples, payloads, strict=True)
        ):
            height, width, _ = sample.pixels.shape
            # An image that was sampled again was alone in its batch.
            alone = sample.redone
            self._rows.append(
                {
                    "wnid": spec.wnid,
                    "synset": spec.synset,
                    "number": spec.number,
                    "seed": spec.seed,
                    "prompt": spec.prompt,
                    "tokens": sample.tokens,
                    "truncated": sample.truncated,
                    "status": sample.status,
                    "batch": batch.start + position if alone else batch.start,
                    "batch_size": 1 if alone else len(batch),
                    "place": 0 if alone else position,
                    "vae_slicing": sample.vae_slicing,
                    "redone": sample.redone,
                    "attempt": self.attempt,
                    "session": 0,
                    "width": width,
                    "height": height,
                    "codec": self.job.plan.config.storage.codec,
                    "sha256": sha256(payload).digest(),
                }
            )
            self._payloads.append(payload)
        if time.monotonic() - self._flushed >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one partial shard."""
        if self._rows:
            try:
                self.job.disk.retry(self._write)
            except FileNotFoundError as error:
                log.warning("removed while it was written: %s", error)
        self._start += len(self._rows)
        self._rows, self._payloads = [], []
        self._flushed = time.monotonic()

    def _write(self) -> None:
        plan, shard = self.job.plan, self.job.shard
        stop = self._start + len(self._rows)
        sizes = np.array([len(payload) for payload in self._payloads], dtype="u8")
        attributes = {**shard_attributes(plan, shard, "piece"), "attempt": self.attempt}
        contents = Contents(to_columns(self._rows), sizes, [self.job.task_run])
        with atomic(self.job.disk.paths.piece(shard.index, self._start, stop)) as temporary:
            write_images(temporary, attributes, contents, self._payloads)

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
    folder, images = paths.shard_pieces(shard.index), plan.shard_images(shard)
    with ExitStack() as stack:
        files: dict[PartialShard, ImageFile] = {}
        for start, stop in paths.piece_ranges(shard.index):
            found, file = _open_partial_shard(paths, plan, shard, start, stop)
            files[found] = stack.enter_context(file)
        ranges = [(files[found], start, stop) for found, start, stop in cover(files)]
        total = sum(stop - start for _, start, stop in ranges)
        if total != images:
            raise IntegrityError(f"{folder}: expected {images} images, found {total}")
        with atomic(paths.shard(shard.index), folder=folder) as temporary:
            join(temporary, shard_attributes(plan, shard, "shard"), ranges)
            with ImageFile(temporary, Expected(plan.digest, shard.index, images)) as written:
                written.check()


def cover(partial_shards: Iterable[PartialShard]) -> Iterator[tuple[PartialShard, int, int]]:
    """Choose for each image the attempt that made it first; yield runs of rows, in order.

    >>> found = [PartialShard(Path("a"), 0, 20, 1), PartialShard(Path("b"), 10, 30, 2)]
    >>> [(str(one.path), start, stop) for one, start, stop in cover(found)]
    [('a', 0, 20), ('b', 10, 20)]
    """
    owner: dict[int, PartialShard] = {}
    for found in sorted(partial_shards, key=lambda found: (found.attempt, found.start)):
        for image in range(found.start, found.stop):
            owner.setdefault(image, found)
    for found, images in groupby(sorted(owner), key=owner.__getitem__):
        run = list(images)
        yield found, run[0] - found.start, run[-1] + 1 - found.start


class BackgroundWriter:
    """One thread that checks, encodes and writes batches in order, and a pool that encodes.

    An error there is raised by the next call here. Leaving the block writes all that was
    handed over, also after an error or a signal.
    """

    def __init__(
        self, storage: StorageConfig, check: Callable[[list[Sample]], list[Sample]]
    ) -> None:
        self._storage, self._check = storage, check
        # Its put may interrupt itself, as a signal's handler does.
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "encode")
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self._error: BaseException | None = None
        self._current: PartialShardWriter | None = None
        self._lost: list[ShardJob] = []
        # Plain attributes, no locks: a signal's handler may interrupt its own thread anywhere.
        self._flush_wanted = self._flush_done = 0

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

        def step() -> None:
            self._current = writer
            checked = self._check(samples)
            payloads = self._pool.map(self._encode, checked)
            writer.add(batch, specs, checked, list(payloads))

        self._put(step)

    def _encode(self, sample: Sample) -> bytes:
        return encode(sample.pixels, self._storage.codec, self._storage.quality)

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

        Safe in a signal's handler.
        """
        self._flush_wanted += 1
        wanted, end = self._flush_wanted, time.monotonic() + FLUSH_TIMEOUT_S
        while self._flush_done < wanted and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _put(self, step: Callable[[], None]) -> None:
        while self._error is None and self._queue.qsize() >= MOST_QUEUED:
            time.sleep(POLL_SECONDS)
        if self._error is not None:
            raise self._error
        self._queue.put(step)

    def _work(self) -> None:
        try:
            while (step := self._next()) is not None:
                step()
            if self._current is not None:
                self._current.flush()
        except BaseException as error:
            self._error = error

    def _next(self) -> Callable[[], None] | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=POLL_SECONDS)
            # The queue is empty, so the current writer holds everything handed over.
            wanted = self._flush_wanted
            if wanted > self._flush_done:
                if self._current is not None:
                    self._current.flush()
                self._flush_done = wanted


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
