"""The processes of one array task: which work and which GPU is whose, and who outlives whom.

They are independent: each has a share of the task's pieces of work and one device, and one
that dies leaves the others alone. The first one waits for the rest, for it alone asks SLURM
to start the task again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdwn.devices.device import given_gpus, only_gpu
from sdwn.io import open_append, private_folder

POLL_SECONDS = 0.2
# srun starts all processes at once; one that has not begun by then never will.
START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Process:
    """One of ``count`` processes of the array task ``job``; ``start`` counts its requeues."""

    job: str
    rank: int = 0
    count: int = 1
    start: int = 0

    def share(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Pick this process's pieces of work.

        >>> Process("7", rank=1, count=2).share(range(5))
        (1, 3)
        """
        return shares(tuple(indices), self.count)[self.rank]


def shares(indices: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Deal a task's pieces of work to its processes; some may get nothing.

    >>> shares(range(5), 3)
    [(0, 3), (1, 4), (2,)]
    """
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


def see_one_device(process: Process) -> None:
    """Hide the other processes' GPUs, before torch looks for a device."""
    gpus = given_gpus(os.environ) or []
    if process.count > 1 and len(gpus) > 1:
        os.environ.update(only_gpu(gpus[process.rank % len(gpus)]))


@contextlib.contextmanager
def together(process: Process) -> Iterator[None]:
    """Be seen by the other processes while the block runs; the first one leaves it last."""
    if process.count == 1:
        yield
        return
    path = _lock_path(process, process.rank)
    with open_append(path) as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if process.rank == 0:
                _outlive(process)


def _outlive(process: Process) -> None:
    end = time.monotonic() + START_SECONDS
    for rank in range(1, process.count):
        path = _lock_path(process, rank)
        while not path.exists() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        while _held(path):
            time.sleep(POLL_SECONDS)
    for rank in range(process.count):
        _lock_path(process, rank).unlink(missing_ok=True)


def _held(path: Path) -> bool:
    # The kernel lets go of a dead process's lock, however it died.
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _lock_path(process: Process, rank: int) -> Path:
    # On the node's own disk: all processes of a task are on one node.
    folder = private_folder(Path(tempfile.gettempdir()))
    return folder / f"{process.job}-{process.start}-{rank}.lock"
