"""Tasks become submitit arrays under a site's profile."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from sdwn import batches
from sdwn.errors import SdwnError
from sdwn.files import STAGE_VARIABLE
from sdwn.processes import shares
from sdwn.profiles import ClusterProfile, minutes
from sdwn.task import ArrayTask

JOB_NAME = "sdwn"

# The options that submitit's own parameters cover; others go as plain sbatch lines.
SUBMITIT_OPTIONS = (
    "account",
    "constraint",
    "cpus_per_task",
    "exclude",
    "gpus_per_node",
    "gres",
    "mem_per_cpu",
    "mem_per_gpu",
    "nodelist",
    "nodes",
    "partition",
    "qos",
    "wckey",
)


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted array task: its scheduler's id, the pieces it works on, its processes."""

    id: str
    indices: tuple[int, ...]
    processes: int = 1

    def rank(self, index: int) -> int:
        """Say which process works on a piece."""
        dealt = shares(self.indices, self.processes)
        return next(rank for rank, share in enumerate(dealt) if index in share)


def cut(indices: Sequence[int], profile: ClusterProfile) -> list[tuple[int, ...]]:
    """Deal pieces of work to array tasks.

    Under SLURM each GPU of a task takes ``shards_per_task`` of them; the local executor starts
    all its tasks at once, so there are only ``array_parallelism`` of them.
    """
    if profile.executor == "local":
        tasks = min(profile.array_parallelism, len(indices))
        return [tuple(indices[first::tasks]) for first in range(tasks)]
    size = profile.shards_in_task
    return [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]


def arrays(tasks: Sequence[ArrayTask], limit: int) -> list[Sequence[ArrayTask]]:
    """Cut tasks into arrays of at most ``limit``, each with its indices from 0."""
    return [tasks[start : start + limit] for start in range(0, len(tasks), limit)]


def submit(tasks: Sequence[ArrayTask], jobs: Path, profile: ClusterProfile) -> list[Job]:
    """Submit tasks as one array, or as processes of this machine.

    Raises:
        SdwnError: the scheduler refused, or there is none.
    """
    executor = _executor(jobs, profile)
    executor.update_parameters(**_parameters(profile))
    try:
        with _detached(jobs / "local.log"):
            submitted = _submit_all(executor, tasks, profile)
    except (subprocess.CalledProcessError, FailedJobError, FailedSubmissionError) as error:
        raise SdwnError(f"submission refused: {_last_line(str(error))}") from error
    return [
        Job(job.job_id, task.indices, profile.processes)
        for job, task in zip(submitted, tasks, strict=True)
    ]


def _submit_all(executor: Any, tasks: Sequence[ArrayTask], profile: ClusterProfile) -> list[Any]:
    if profile.executor == "slurm":
        with executor.batch():
            return [executor.submit(task) for task in tasks]
    gpus = local_gpus()
    jobs = []
    for number, task in enumerate(tasks):
        if gpus:
            executor.update_parameters(gpus_per_node=1, visible_gpus=(number % gpus,))
        jobs.append(executor.submit(task))
    return jobs


def script(tasks: int, jobs: Path, profile: ClusterProfile) -> str:
    """Write the script that :func:`submit` would hand to sbatch, also where SLURM is not."""
    folder = (jobs / "%j").absolute()
    python = profile.python or shlex.quote(sys.executable)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    if profile.executor == "local":
        note = f"# {tasks} at once on this machine; submitit puts each one's process id for %j"
        return "\n".join(["#!/bin/bash", note, *_setup(profile), command]) + "\n"
    parameters = _parameters(profile)
    if tasks > 1:
        parameters["map_count"] = tasks
    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def _executor(jobs: Path, profile: ClusterProfile) -> Any:
    folder = jobs / "%j"
    if profile.executor == "local":
        return submitit.LocalExecutor(folder, profile.max_num_timeout, python=profile.python)
    try:
        return submitit.SlurmExecutor(folder, profile.max_num_timeout, python=profile.python)
    except RuntimeError:
        raise SdwnError(
            "expected a SLURM cluster, found no srun on this machine; submit from a login node, "
            "or look at the script with --dry-run, or use --profile local"
        ) from None


def _parameters(profile: ClusterProfile) -> dict[str, Any]:
    common = {"signal_delay_s": profile.signal_delay_s, "setup": _setup(profile)}
    if profile.executor == "local":
        return {**common, "timeout_min": minutes(profile.time)}
    return {**common, **_slurm_parameters(profile), "time": minutes(profile.time)}


def _slurm_parameters(profile: ClusterProfile) -> dict[str, Any]:
    parameters = {name: getattr(profile, name) for name in SUBMITIT_OPTIONS}
    extra: dict[str, Any] = {
        "requeue": True,
        "mem": profile.mem,
        "reservation": profile.reservation,
    }
    extra.update({name.replace("_", "-"): value for name, value in profile.sbatch.items()})
    parameters["additional_parameters"] = {k: v for k, v in extra.items() if v not in (None, False)}
    parameters["job_name"] = JOB_NAME
    parameters["array_parallelism"] = profile.array_parallelism
    parameters["srun_args"] = []
    if profile.cpus_per_task:
        # From SLURM 22.05 on, srun no longer takes it from sbatch.
        parameters["srun_args"].append(f"--cpus-per-task={profile.cpus_per_task}")
    if profile.processes > 1:
        parameters["ntasks_per_node"] = profile.processes
        # One that dies leaves the others alone.
        parameters["srun_args"].append("--kill-on-bad-exit=0")
    return parameters


def _setup(profile: ClusterProfile) -> list[str]:
    environment = dict(profile.environment)
    if profile.cpus_per_task:
        environment.setdefault("OMP_NUM_THREADS", str(profile.cpus_per_task))
    if profile.batch_size:
        environment[batches.VARIABLE] = str(profile.batch_size)
    if profile.stage_weights:
        environment[STAGE_VARIABLE] = profile.stage_weights
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return [*exports, *profile.setup]


def local_gpus() -> int:
    """Count this machine's GPUs without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


@contextlib.contextmanager
def _detached(log: Path) -> Iterator[None]:
    """Start processes that neither a Ctrl-C nor an open pipe ties to this terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = [os.dup(stream) for stream in (0, 1, 2)]
    try:
        with Path(os.devnull).open() as nothing, log.open("a") as file:
            for stream, end in zip((0, 1, 2), (nothing, file, file), strict=True):
                os.dup2(end.fileno(), stream)
            yield
    finally:
        for stream, original in zip((0, 1, 2), kept, strict=True):
            os.dup2(original, stream)
            os.close(original)
        signal.signal(signal.SIGINT, before)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
