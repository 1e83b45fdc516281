"""Processes of array tasks, and what each writes about itself: records and notes.

A disk that fails for a moment ends no task: see :class:`RunDisk`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from sdwn.batches import BatchSize
from sdwn.errors import DiskError, IntegrityError, SdwnError
from sdwn.io import now, plain_disk_errors, read_json, seconds, write_text
from sdwn.paths import LOWERED, NO_GPU, WAITED, RunPaths

log = logging.getLogger(__name__)

WAIT_SECONDS = 300.0
RETRY_SECONDS = 5.0
POLL_SECONDS = 0.05

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Process:
    """One of ``count`` processes of the array task ``job``; ``start`` counts its requeues."""

    job: str
    rank: int = 0
    count: int = 1
    start: int = 0

    def share(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Return this process's shards; some processes may get none.

        >>> [Process("7", rank, 3).share(range(5)) for rank in range(3)]
        [(0, 3), (1, 4), (2,)]
        """
        return deal_to_processes(tuple(indices), self.count)[self.rank]


def deal_to_processes(indices: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Deal a task's shards to its processes."""
    return [tuple(indices[rank::count]) for rank in range(count)]


def this_process() -> Process:
    """Read from the environment which process of which job this is."""
    # A shell within an allocation has SLURM's variables too, and may start local tasks.
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return Process(os.environ.get("SUBMITIT_LOCAL_JOB_ID", "none"))
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return Process(
        job=task if array else os.environ.get("SLURM_JOB_ID", "none"),
        rank=int(os.environ.get("SLURM_PROCID", "0")),
        count=int(os.environ.get("SLURM_NTASKS", "1")),
        start=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def write_note(paths: RunPaths, path: Path, text: str) -> None:
    """Write a note or record of a task, if the disk takes it: images matter more."""
    try:
        if paths.root.is_dir():
            write_text(path, text + "\n")
    except (SdwnError, OSError) as error:
        log.warning("not written: %s", error)


class RunDisk:
    """Access of a process to its run's folder, retried while the disk fails.

    ``ending`` is set once the task gets the signal to end: from then on nothing is waited for.
    """

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths
        self.ending = False

    def retry(self, action: Callable[[], T]) -> T:
        """Run an action; while the disk fails, wait and run it again, for some minutes at most.

        Raises:
            DiskError: the disk failed all that time, or until the task got the signal to end.
        """
        began = None
        while True:
            last = self.ending
            try:
                # Or files would be written under the old name of a folder that was renamed, or
                # below the path where a disk was mounted.
                with plain_disk_errors(self.paths.root):
                    there = self.paths.plan.exists()
                if not there:
                    raise DiskError(
                        f"{self.paths.root}: its plan.json is gone: the folder was renamed, "
                        "removed or unmounted while this task ran; bring it back and run the same "
                        "command again"
                    )
                found = action()
            except DiskError as error:
                if began is None:
                    began = time.monotonic()
                    log.warning("waiting up to %.0f min for the disk: %s", WAIT_SECONDS / 60, error)
                    self._note(f"waiting for the disk since {now()}: {error}")
                if last or time.monotonic() - began > WAIT_SECONDS:
                    raise
                end = time.monotonic() + RETRY_SECONDS
                while not self.ending and time.monotonic() < end:
                    time.sleep(POLL_SECONDS)
            else:
                if began is not None:
                    text = f"waited {time.monotonic() - began:.0f} s for the disk, then continued"
                    log.info("%s", text)
                    self._note(text)
                return found

    def _note(self, text: str) -> None:
        process = this_process()
        write_note(self.paths, self.paths.note(process.job, process.rank, WAITED), text)


@dataclass
class TaskRecord:
    """One process's record, written at its start, once a minute, on back-off and at its end.

    ``loading_seconds`` is what it took to load the model. ``first_seconds`` is how long the
    first batch took, warm-up or compiling included; ``images`` and ``seconds`` count what was
    sampled after it, ``busy`` is the share of time that the device was sampling since.
    ``lowered_from`` is the batch size before the card ran out of memory. ``start`` counts the
    task's requeues, ``total`` its images and ``done`` those that are sampled, now or before.
    """

    job: str
    rank: int
    host: str
    device: str
    memory_gb: int
    batch_size: int
    batch_source: str
    vae_slicing: bool
    loading_seconds: float
    started: str
    total: int
    start: int = 0
    done: int = 0
    lowered_from: int | None = None
    first_images: int = 0
    first_seconds: float = 0.0
    images: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    peak_bytes: int = 0
    ended: bool = False

    @property
    def images_per_second(self) -> float | None:
        """Speed of sampling after the first batch; None before the second."""
        return self.images / self.seconds if self.seconds else None

    @property
    def sampled(self) -> int:
        """Images sampled since this start, kept or lost, in whole batches."""
        return self.first_images + self.images


def read_record(path: Path) -> TaskRecord:
    """Read a process's record.

    Raises:
        IntegrityError: it is damaged.
    """
    content = read_json(path)
    try:
        return TaskRecord(**{f.name: content[f.name] for f in fields(TaskRecord)})
    except KeyError as error:
        raise IntegrityError(f"{path}: expected {error}, found nothing there") from None


@dataclass
class Meter:
    """Timer of a process's batches; once a minute it writes the progress to log and record."""

    paths: RunPaths
    record: TaskRecord
    doing: str
    # 0: after every batch.
    report_seconds: float = field(default_factory=lambda: seconds("SDWN_REPORT_SECONDS", 60.0))
    _warm: float | None = None
    _reported: float = field(default_factory=time.monotonic)

    def note_no_gpu(self, reason: str | None) -> None:
        """Note why a process runs on the CPU although it was given a GPU, if so."""
        if reason is not None:
            log.warning("%s", reason)
            self._note(NO_GPU, reason)

    def note_smaller_batch(self, batch: BatchSize) -> None:
        """Note that the card ran out of memory."""
        record = self.record
        record.lowered_from = record.lowered_from or record.batch_size
        record.batch_size, record.vae_slicing = batch.images, batch.vae_slicing
        log.warning("out of memory: continuing with %s", batch)
        self._write()
        self._note(LOWERED, f"{record.device}: {record.lowered_from} to {batch}")

    def count_batch(self, images: int, took: float, peak_bytes: int) -> None:
        """Count a batch that took so many seconds."""
        record, clock = self.record, time.monotonic()
        record.peak_bytes = max(record.peak_bytes, peak_bytes)
        if self._warm is None:
            self._warm = clock
            record.first_images, record.first_seconds = images, took
        else:
            record.images += images
            record.seconds += took
            record.busy = record.seconds / (clock - self._warm)
        self.count_done(images)

    def count_done(self, images: int) -> None:
        """Count images that are done, sampled now or before; negative: they were lost."""
        self.record.done += images
        if time.monotonic() - self._reported >= self.report_seconds:
            self._reported = time.monotonic()
            self._log_progress()
            self._write()

    def end(self) -> None:
        """Write the record's last state."""
        self.record.ended = True
        self._write()
        if self.record.first_images:
            self._log_progress()

    def _log_progress(self) -> None:
        record, rate = self.record, self.record.images_per_second
        text = f"{record.done} of {record.total} images"
        if rate is not None:
            left = (record.total - record.done) / rate / 60
            busy = f"{record.busy:.0%} of the time {self.doing}"
            text += f", {rate:.2f} images/s, {busy}, {left:.0f} min left"
        log.info("%s", text)

    def _note(self, kind: str, text: str) -> None:
        write_note(self.paths, self.paths.note(self.record.job, self.record.rank, kind), text)

    def _write(self) -> None:
        path = self.paths.task(self.record.job, self.record.rank, self.record.start)
        write_note(self.paths, path, json.dumps(asdict(self.record)))


def start_meter(  # noqa: PLR0913
    paths: RunPaths,
    *,
    device: str,
    memory_gb: int,
    batch: BatchSize,
    loading_seconds: float,
    total: int,
    started: str | None = None,
    doing: str = "sampling",
) -> Meter:
    """Write this process's first record: its device, its batches, its number of images."""
    process = this_process()
    record = TaskRecord(
        job=process.job,
        rank=process.rank,
        host=socket.gethostname(),
        device=device,
        memory_gb=memory_gb,
        batch_size=batch.images,
        batch_source=batch.source,
        vae_slicing=batch.vae_slicing,
        loading_seconds=loading_seconds,
        started=started or now(),
        total=total,
        start=process.start,
    )
    meter = Meter(paths, record, doing)
    log.info("%s: %s", device, batch)
    meter._write()
    return meter
