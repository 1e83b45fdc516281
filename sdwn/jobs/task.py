"""An array task: what submitit pickles, and what each process of it does.

A job's script starts one process for each GPU of a task, on one node. Each unpickles the same
:class:`ArrayTask`, takes its share of the task's shards and one GPU, and runs the stage::

    process 0  [ lock 0 held: its shards ............ ][ waits for locks 1, 2 ] ends last
    process 1  [ lock 1 held: its shards .................... ]
    process 2  [ lock 2 held: its shards .... killed              (the kernel frees its lock)

The processes are independent: one that dies leaves the others alone. Process 0 outlives them,
for it alone asks SLURM to start the task again (:meth:`ArrayTask.checkpoint`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdwn import checkout
from sdwn.batches import batch_size_of_task
from sdwn.devices.device import given_gpus, only_gpu
from sdwn.errors import SdwnError, command
from sdwn.io import locked, now, private_folder, read_json, require_home
from sdwn.jobs.task_record import Process, RunDisk, this_process, write_note
from sdwn.paths import CHANGED, RunPaths

log = logging.getLogger(__name__)

# Give up after this many starts in a row that finished nothing new.
IDLE_STARTS = 3
POLL_SECONDS = 0.2
# srun starts all processes at once; one that has not begun by then never will.
START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A kind of work that tasks do; defined beside its function, given by who submits.

    Args:
        name: what journal and logs call it.
        run: takes the folder to work on, the indices of this process's shards, and the batch
            size that the command line or the profile asks for, if any. A pickle names this
            function, and unpickling imports its module: so that module imports no torch and no
            hub at its top.
    """

    name: str
    run: Callable[[Path, Sequence[int], int | None], None]


@dataclass(frozen=True)
class ArrayTask:
    """What submitit pickles: a stage, the folder it works on, and the indices of its shards.

    ``plan`` is the digest of the plan that it was submitted for, ``code`` names the code then.
    ``made`` names what was finished of it when SLURM ended its last start, and ``idle`` counts
    the starts since then that finished nothing new.
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
        require_home()
        see_one_device(process)
        paths = RunPaths(Path(self.path))
        if paths.lock.exists():
            # Its weights are locked: nothing of this process asks the hub for others.
            os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        if process.start and process.rank == 0:
            write_note(paths, paths.note(process.job, 0, f".r{process.start}.started.txt"), now())
        with hold_until_peers_exit(process):
            if self.plan:
                found = RunDisk(paths).retry(partial(read_json, paths.plan)).get("digest")
                if found != self.plan:
                    raise SdwnError(
                        f"{paths.plan}: this task was submitted for plan {self.plan[:12]}, found "
                        f"{str(found)[:12]}: the plan was replaced; restore it, or submit again"
                    )
            if self.code not in ("", here := checkout.code()):
                text = f"the code has changed since this was submitted: {self.code} to {here}"
                log.warning("%s", text)
                write_note(paths, paths.note(process.job, process.rank, CHANGED), text)
            # The batch size is read from the environment here alone: from here on an argument.
            self.stage.run(paths.root, process.share(self.indices), batch_size_of_task())

    def checkpoint(self) -> Any:
        """Return the same task for another start: what is on disk says where to resume.

        Raises:
            SdwnError: start after start ended without anything new.
        """
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


def _refuse_old_pickle(name: str, root: Path, _: Sequence[int], __: int | None) -> None:
    of_release = name in ("judge", "conclude")
    words = ("evaluate", root.parents[2]) if of_release else ("submit", root)
    raise SdwnError(
        f"this task was submitted by an older sdwn and cannot run; submit it again with: "
        f"{command(*words)}"
    )


def see_one_device(process: Process) -> None:
    """Hide the other processes' GPUs, before torch looks for a device."""
    gpus = given_gpus(os.environ) or []
    if process.count > 1 and len(gpus) > 1:
        os.environ.update(only_gpu(gpus[process.rank % len(gpus)]))


@contextmanager
def hold_until_peers_exit(process: Process) -> Iterator[None]:
    """Hold this process's lock while the block runs; process 0 leaves when all locks are free."""
    if process.count == 1:
        yield
        return
    # On the node's own disk: all processes of a task are on one node.
    folder = private_folder(Path(tempfile.gettempdir()))
    locks = [folder / f"{process.job}-{process.start}-{rank}.lock" for rank in range(process.count)]
    with locked(locks[process.rank]):
        try:
            yield
        finally:
            if process.rank == 0:
                end = time.monotonic() + START_SECONDS
                for path in locks[1:]:
                    while not path.exists() and time.monotonic() < end:
                        time.sleep(POLL_SECONDS)
                    while _is_held(path):
                        time.sleep(POLL_SECONDS)
                for path in locks:
                    path.unlink(missing_ok=True)


def _is_held(path: Path) -> bool:
    # The kernel lets go of a dead process's lock, however it died.
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
