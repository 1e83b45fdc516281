"""Writing beside sampling: batches are checked, encoded and written while the next is sampled."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType, TracebackType

from sdwn.config import StorageConfig
from sdwn.generation.batching import Sample
from sdwn.generation.partial_shards import PieceWriter, Work
from sdwn.jobs.disk import RunDisk
from sdwn.planning.plan import ImageSpec
from sdwn.storage.images import encode

log = logging.getLogger(__name__)

# Batches that may wait while another is encoded: more would only take memory.
WAITING = 2
# How long a signal's handler waits for finished images to reach the disk; SLURM gives 30 s.
FLUSH_TIMEOUT_S = 20.0
POLL_SECONDS = 0.02

Check = Callable[[list[Sample]], list[Sample]]


class BackgroundWriter:
    """One thread that writes what it is handed, in order, and a pool that encodes for it.

    An error there is raised by the next call here. Leaving the block writes all that was
    handed over, also when an error or a signal is what ends it.
    """

    def __init__(self, storage: StorageConfig, check: Check) -> None:
        self._storage, self._check = storage, check
        # Its put may interrupt itself, as a signal's handler does.
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "encode")
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self._error: BaseException | None = None
        self._current: PieceWriter | None = None
        self._lost: list[Work] = []
        # Plain attributes, no locks: a signal's handler may interrupt its own thread anywhere.
        self._flush_asked = self._flush_done = 0

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
        writer: PieceWriter,
        batch: range,
        specs: Sequence[ImageSpec],
        samples: list[Sample],
    ) -> None:
        """Hand a batch over; waits while :data:`WAITING` others do."""
        self._put(partial(self._encode, writer, batch, specs, samples))

    def finish(self, writer: PieceWriter) -> None:
        """Have a shard finished once its batches are written; :meth:`lost` tells if it was."""
        self._put(partial(self._finish, writer))

    def lost(self) -> list[Work]:
        """Wait for all that was handed over, and give the shards of which pieces were lost."""
        written = threading.Event()
        self._put(written.set)
        while not written.wait(POLL_SECONDS):
            if self._error is not None:
                raise self._error
        lost, self._lost = self._lost, []
        return lost

    def flush(self) -> None:
        """Have all that was handed over on disk, or wait for it in vain for 20 s.

        Safe in a signal's handler.
        """
        self._flush_asked += 1
        asked, end = self._flush_asked, time.monotonic() + FLUSH_TIMEOUT_S
        while self._flush_done < asked and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _put(self, step: Callable[[], None]) -> None:
        while self._error is None and self._queue.qsize() >= WAITING:
            time.sleep(POLL_SECONDS)
        if self._error is not None:
            raise self._error
        self._queue.put(step)

    def _work(self) -> None:
        try:
            while (step := self._next()) is not None:
                step()
            self._flush_current()
        except BaseException as error:
            self._error = error

    def _next(self) -> Callable[[], None] | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=POLL_SECONDS)
            # Only here is nothing handed over that is not collected.
            asked = self._flush_asked
            if asked > self._flush_done:
                self._flush_current()
                self._flush_done = asked

    def _encode(
        self,
        writer: PieceWriter,
        batch: range,
        specs: Sequence[ImageSpec],
        samples: list[Sample],
    ) -> None:
        self._current = writer
        checked = self._check(samples)
        pixels = [sample.pixels for sample in checked]
        storage = self._storage
        encoded = partial(encode, codec=storage.codec, quality=storage.quality)
        payloads = list(self._pool.map(encoded, pixels))
        writer.add(batch, specs, checked, payloads)

    def _finish(self, writer: PieceWriter) -> None:
        self._current = None
        if not writer.finish():
            self._lost.append(writer.work)

    def _flush_current(self) -> None:
        if self._current is not None:
            self._current.flush()


@contextlib.contextmanager
def flushed_on_signals(writer: BackgroundWriter, disk: RunDisk) -> Iterator[None]:
    """Write what is finished when SLURM announces the end, then go on as submitit would.

    A disk that fails is then waited for no longer. USR2 comes before a time limit or a
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
