"""What a process of a task says of itself: device, batch size, speed, memory."""

from __future__ import annotations

import json
import logging
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sdwn.batches import BatchSize
from sdwn.errors import IntegrityError
from sdwn.io import read_json, seconds
from sdwn.jobs.disk import write_note
from sdwn.jobs.processes import this_process
from sdwn.paths import LOWERED, NO_GPU, RunPaths

log = logging.getLogger(__name__)

# How often a process takes down how far it is; 0: after every batch.
REPORT_SECONDS = seconds("SDWN_REPORT_SECONDS", 60.0)


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


def first_record(
    device: str, memory_gb: int, batch: BatchSize, loading_seconds: float, started: str
) -> TaskRecord:
    """Begin this process's record; how many images it has is still to be said."""
    process = this_process()
    return TaskRecord(
        job=process.job,
        rank=process.rank,
        host=socket.gethostname(),
        device=device,
        memory_gb=memory_gb,
        batch_size=batch.images,
        batch_source=batch.source,
        vae_slicing=batch.vae_slicing,
        loading_seconds=loading_seconds,
        started=started,
        total=0,
        start=process.start,
    )


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
    """Times a process's batches; says once a minute, in log and record, how far it is."""

    paths: RunPaths
    record: TaskRecord
    doing: str = "sampling"
    _warm: float | None = None
    _told: float = field(default_factory=time.monotonic)

    def begin(self, batch: BatchSize) -> None:
        """Say with which batches the work begins."""
        log.info("%s: %s", self.record.device, batch)
        self._write()

    def without_gpu(self, reason: str | None) -> None:
        """Note why a process that was given a GPU works without one, if it does."""
        if reason is not None:
            log.warning("%s", reason)
            self._note(NO_GPU, reason)

    def lowered(self, batch: BatchSize) -> None:
        """Take down that the card ran out of memory."""
        record = self.record
        record.lowered_from = record.lowered_from or record.batch_size
        record.batch_size, record.vae_slicing = batch.images, batch.vae_slicing
        log.warning("out of memory: going on with %s", batch)
        self._write()
        text = f"{record.device}: {record.lowered_from} to {batch}"
        self._note(LOWERED, text)

    def sampled(self, images: int, seconds: float, peak_bytes: int) -> None:
        """Count a batch."""
        record, now = self.record, time.monotonic()
        record.peak_bytes = max(record.peak_bytes, peak_bytes)
        if self._warm is None:
            self._warm = now
            record.first_images, record.first_seconds = images, seconds
        else:
            record.images += images
            record.seconds += seconds
            record.busy = record.seconds / (now - self._warm)
        self.passed(images)

    def passed(self, images: int) -> None:
        """Count images that are done, sampled now or before."""
        self.record.done += images
        if time.monotonic() - self._told >= REPORT_SECONDS:
            self._told = time.monotonic()
            log.info("%s", self._progress())
            self._write()

    def end(self) -> None:
        """Write the record's last state."""
        self.record.ended = True
        self._write()
        if self.record.first_images:
            log.info("%s", self._progress())

    def _progress(self) -> str:
        rate = self.record.images_per_second
        text = f"{self.record.done} of {self.record.total} images"
        if rate is None:
            return text
        left = (self.record.total - self.record.done) / rate / 60
        busy = f"{self.record.busy:.0%} of the time {self.doing}"
        return f"{text}, {rate:.2f} images/s, {busy}, {left:.0f} min left"

    def _note(self, kind: str, text: str) -> None:
        write_note(self.paths, self.paths.note(self.record.job, self.record.rank, kind), text)

    def _write(self) -> None:
        path = self.paths.task(self.record.job, self.record.rank, self.record.start)
        write_note(self.paths, path, json.dumps(asdict(self.record)))
