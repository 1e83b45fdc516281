"""An array task: what submitit pickles, what each process of it does and writes about itself.

A job's script starts one process for each GPU of a task, on one node. Each takes its share of the
task's shards and one GPU, and runs the stage::

    process 0  [ shared lock: its shards ............ ][ waits for the lock alone ] ends last
    process 1  [ shared lock: its shards .................... ]
    process 2  [ shared lock: its shards .... killed              (the kernel frees its lock)

One that dies leaves the others alone. Process 0 outlives them, for it alone asks SLURM to start
the task again (:meth:`ArrayTask.checkpoint`).
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field

from sdwn import io
from sdwn.batches import BatchSize, TaskOptions, options_of_task
from sdwn.config import Record
from sdwn.devices.device import GB, Device, given_gpus, only_gpu
from sdwn.errors import DiskError, IntegrityError, SdwnError, command
from sdwn.io import code_version
from sdwn.paths import CHANGED, LOWERED, NO_GPU, TASK_NAME, WAITED, RunPaths

log = logging.getLogger(__name__)

# Give up after this many starts in a row that finished nothing new.
IDLE_STARTS = 3
POLL_SECONDS = 0.1
# srun starts all processes at once; one that has not begun by then never will.
START_SECONDS = 120.0
# How long a disk that fails is waited for, and how often it is tried.
WAIT_SECONDS = 300.0
RETRY_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stage:
    """A kind of work that tasks do, by the name that the journal has for it.

    ``run`` takes the folder to work on, the indices of this process's shards, and what was asked
    for. Unpickling imports its module, which so imports no torch and no hub at its top.
    """

    name: str
    run: Callable[[Path, Sequence[int], TaskOptions], None]


@dataclass(frozen=True)
class ArrayTask:
    """The callable that submitit pickles: a stage, the folder it works on, its shards' indices.

    ``plan`` and ``code`` are those of its submission. ``made`` names what was finished of it when
    SLURM ended its last start, ``idle`` counts the starts since that finished nothing new.
    """

    stage: Stage
    path: str
    indices: tuple[int, ...]
    plan: str = ""
    code: str = ""
    made: frozenset[str] = frozenset()
    idle: int = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        # sdwn 0.1.0 pickled the stage's name; such a task may still wait in a queue.
        if isinstance(name := state["stage"], str):
            state = {**state, "stage": Stage(name, partial(_refuse_old_pickle, name))}
        self.__dict__.update(state)

    def __call__(self) -> None:
        """Run the stage on this process's share."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        process = this_process()
        io.require_home()
        see_one_device(process)
        paths = RunPaths(Path(self.path))
        if paths.lock.exists():
            # Its weights are locked: nothing of this process asks the hub for others.
            os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        if process.start and process.rank == 0:
            started = paths.note(process.job, 0, f".r{process.start}.started.txt")
            write_note(paths, started, io.now())
        with hold_until_peers_exit(process):
            if self.plan:
                found = RunDisk(paths).retry(partial(io.read_json, paths.plan)).get("digest")
                if found != self.plan:
                    raise SdwnError(
                        f"{paths.plan}: this task was submitted for plan {self.plan[:12]}, found "
                        f"{str(found)[:12]}: the plan was replaced; restore it, or submit again"
                    )
            if self.code not in ("", here := code_version()):
                text = f"the code has changed since this was submitted: {self.code} to {here}"
                _warn(paths, CHANGED, text)
            # The options are read from the environment here alone: from here on an argument.
            own = self.indices[process.rank :: process.count]
            self.stage.run(paths.root, own, options_of_task())

    def checkpoint(self) -> Any:
        """Return the same task for another start, unless start after start made nothing new."""
        from submitit.helpers import DelayedSubmission

        paths = RunPaths(Path(self.path))
        made = frozenset(
            str(path.relative_to(paths.root))
            for index in self.indices
            for path in (
                *paths.shards.glob(f"{paths.shard(index).stem}.*"),
                *paths.shard_pieces(index).glob("[0-9]*"),
            )
        )
        idle = 0 if made != self.made else self.idle + 1
        # A later stage has no shards: its own log shows its progress.
        if idle >= IDLE_STARTS and self.indices:
            text = (
                f"not started again: {idle} starts in a row ended at the time limit, or were "
                "preempted, before anything new was finished; ask for more --time, or for "
                "smaller batches (--batch-size)"
            )
            # Other processes of this task may keep the error from being the log's last word.
            log.error("%s", text)
            raise SdwnError(text)
        return DelayedSubmission(replace(self, made=made, idle=idle))


def _refuse_old_pickle(name: str, root: Path, _: Sequence[int], __: TaskOptions) -> None:
    of_release = name in ("judge", "conclude")
    again = command("evaluate", root.parents[2]) if of_release else command("submit", root)
    raise SdwnError(f"an older sdwn submitted this task; submit it again with: {again}")


# --- Its processes -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """One of ``count`` processes of the array task ``job``; ``start`` counts its requeues."""

    job: str
    rank: int = 0
    count: int = 1
    start: int = 0


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


def see_one_device(process: Process) -> None:
    """Hide the other processes' GPUs, before torch looks for a device."""
    gpus = given_gpus(os.environ) or []
    if process.count > 1 and len(gpus) > 1:
        os.environ.update(only_gpu(gpus[process.rank % len(gpus)]))


@contextmanager
def hold_until_peers_exit(process: Process) -> Iterator[None]:
    """Share a lock with the task's other processes; process 0 leaves when it has it alone."""
    if process.count == 1:
        yield
        return
    # On the node's own disk: all processes of a task are on one node. By the job's name too, which
    # no other submission has: ids may begin anew, and a task that was killed leaves its files.
    folder = io.private_folder(Path(tempfile.gettempdir()))
    name = os.environ.get("SLURM_JOB_NAME", "").replace("/", "-")
    path = folder / f"{name}-{process.job}-{process.start}.lock"
    with io.open_append(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.write(file.fileno(), b".")  # for each process that has begun
        try:
            yield
        finally:
            if process.rank == 0:
                end = time.monotonic() + START_SECONDS
                while path.stat().st_size < process.count and time.monotonic() < end:
                    time.sleep(POLL_SECONDS)
                # The kernel lets go of a dead process's lock, however it died.
                fcntl.flock(file, fcntl.LOCK_EX)
                path.unlink()


# --- What they write beside images ---------------------------------------------------------------
def write_note(paths: RunPaths, path: Path, text: str) -> None:
    """Write a note or record of a task, if the disk takes it: images matter more."""
    try:
        if paths.root.is_dir():
            # The folder may leave at this moment: it is not made anew.
            io.write_text(path, text + "\n", parents=False)
    except (SdwnError, OSError) as error:
        log.warning("not written: %s", error)


def _warn(paths: RunPaths, kind: str, text: str) -> None:
    """Log a warning, and leave it as this process's note of a kind, which status shows."""
    process = this_process()
    log.warning("%s", text)
    write_note(paths, paths.note(process.job, process.rank, kind), text)


@dataclass
class RunDisk:
    """Access to a run's folder, retried while the disk fails, unless the task is ``ending``."""

    paths: RunPaths
    ending: bool = False

    def retry(self, action: Callable[[], T]) -> T:
        """Run an action; while the disk fails, wait and run it again, for some minutes at most."""
        began = None
        while True:
            last = self.ending
            try:
                # Or files would be written under the old name of a folder that was renamed, or
                # below the path where a disk was mounted.
                with io.plain_disk_errors(self.paths.root):
                    there = self.paths.plan.exists()
                if not there:
                    raise DiskError(
                        f"{self.paths.root}: its plan.json is gone: the folder was renamed, "
                        "removed or unmounted; bring it back and run the same command again"
                    )
                found = action()
            except DiskError as error:
                if began is None:
                    began = time.monotonic()
                    _warn(self.paths, WAITED, f"waiting for the disk since {io.now()}: {error}")
                if last or time.monotonic() - began > WAIT_SECONDS:
                    raise
                end = time.monotonic() + RETRY_SECONDS
                while not self.ending and time.monotonic() < end:
                    time.sleep(POLL_SECONDS)
            else:
                if began is not None:
                    text = f"waited {time.monotonic() - began:.0f} s for the disk, then continued"
                    _warn(self.paths, WAITED, text)
                return found


class TaskRecord(Record):
    """One process's record, written at its start, once a minute, on back-off and at its end.

    ``images`` and ``seconds`` count what was sampled after the first batch, ``busy`` is the share
    of time that the device was sampling since. ``start`` counts the task's requeues, ``done`` its
    images that are sampled, now or before. ``energy_joules`` is since the model was loaded.
    """

    model_config = ConfigDict(frozen=False, allow_inf_nan=False)

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
    cut_prompts: dict[str, int] = Field(default_factory=dict)
    energy_joules: float | None = None

    @property
    def images_per_second(self) -> float | None:
        """Speed of sampling after the first batch; None before the second."""
        return self.images / self.seconds if self.seconds else None

    @property
    def device_seconds(self) -> float:
        """The seconds that it held the device: to load, for the first batch, and since then."""
        since = self.seconds / self.busy if self.busy else 0.0
        return self.loading_seconds + self.first_seconds + since


def read_record(path: Path) -> TaskRecord:
    """Read a process's record; an IntegrityError if it is missing or damaged."""
    with io.reading(path):
        return TaskRecord.model_validate_json(io.read_whole(path, io.JSON_BYTES))


def read_records(
    paths: RunPaths, names: Collection[str] | None = None, most: float = math.inf
) -> Iterator[TaskRecord | None]:
    """Yield a run's records, or those of these names; of many, ``most``, spread evenly.

    None stands for one that is damaged, or of another version.
    """
    found = sorted(filter(TASK_NAME.fullmatch, paths.task_names() if names is None else names))
    for name in found[:: math.ceil(len(found) / most) or 1]:
        try:
            yield read_record(paths.tasks / name)
        except IntegrityError:
            yield None


class Meter:
    """Timer of a process's batches; once a minute it writes the progress to log and record.

    ``started`` is when loading began, by default now; ``no_gpu`` why the process runs on the CPU
    although it was given a GPU, if so; ``doing`` what the device does, for the log.
    """

    def __init__(  # noqa: PLR0913
        self,
        paths: RunPaths,
        *,
        device: Device,
        batch: BatchSize,
        loading_seconds: float,
        total: int,
        started: str | None = None,
        no_gpu: str | None = None,
        doing: str = "sampling",
    ) -> None:
        process = this_process()
        self.paths, self.doing = paths, doing
        self._device, self._energy_before = device, device.energy_joules
        self.record = TaskRecord(
            job=process.job,
            rank=process.rank,
            host=socket.gethostname(),
            device=device.name,
            memory_gb=round(device.total_bytes / GB),
            batch_size=batch.images,
            batch_source=batch.source,
            vae_slicing=batch.vae_slicing,
            loading_seconds=loading_seconds,
            started=started or io.now(),
            total=total,
            start=process.start,
        )
        # 0: after every batch.
        self._report_seconds = io.seconds("SDWN_REPORT_SECONDS", 60.0)
        self._warm: float | None = None
        self._reported = time.monotonic()
        log.info("%s: %s", device.name, batch)
        self._write()
        if no_gpu is not None:
            _warn(paths, NO_GPU, no_gpu)

    def note_smaller_batch(self, batch: BatchSize) -> None:
        """Note that the card ran out of memory."""
        record = self.record
        record.lowered_from = record.lowered_from or record.batch_size
        record.batch_size, record.vae_slicing = batch.images, batch.vae_slicing
        self._write()
        log.warning("out of memory: smaller batches from here on")
        _warn(self.paths, LOWERED, f"{record.device}: {record.lowered_from} to {batch}")

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
        if time.monotonic() - self._reported >= self._report_seconds:
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

    def _write(self) -> None:
        record, energy = self.record, self._device.energy_joules
        if energy is not None and self._energy_before is not None:
            record.energy_joules = energy - self._energy_before
        path = self.paths.task(record.job, record.rank, record.start)
        write_note(self.paths, path, record.model_dump_json())
