"""Tasks become submitit arrays under a site's profile."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import submitit
from submitit.core.utils import (
    DelayedSubmission,
    JobPaths,
    environment_variables,
)
from submitit.slurm.slurm import _make_sbatch_string

from sdwn import batches
from sdwn.devices.device import local_gpus, only_gpu
from sdwn.errors import NoAnswerError, QueueFullError, SdwnError, UsageError
from sdwn.io import atomic, open_append, write_text
from sdwn.jobs import scheduler
from sdwn.jobs.processes import shares
from sdwn.jobs.profile import ClusterProfile, is_secret, minutes
from sdwn.jobs.scheduler import JobState
from sdwn.jobs.task import ArrayTask
from sdwn.paths import STAGE_VARIABLE

JOB_NAME = "sdwn"

# A controller that is overloaded or restarts: ten minutes in all.
PAUSES_S = (1, 2, 4, 8, 15, 30, 60, 120, 180, 180)
NO_ANSWER = (
    "communication connection failure",
    "connection refused",
    "connection reset",
    "connection timed out",
    "not responding",
    "socket timed out",
    "temporarily unable",
    "temporarily unavailable",
    "unable to contact slurm controller",
    "zero bytes were transmitted",
)
Task = TypeVar("Task")

# How sbatch says that it took a job; a site's wrapper may print other lines around it.
SUBMITTED = re.compile(r"\bSubmitted batch job (\d+)")

# The variables that were named as not followed.
_ignored: list[str] = []

# Ctrl-C, Ctrl-\, Ctrl-Z, and the end of the terminal or the connection.
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP)

Tell = Callable[[str], None]


def quietly(_: str) -> None:
    """Tell nobody."""


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
    """A submitted array task: its scheduler's id, the pieces it works on, its processes.

    ``array`` is the name under which it was submitted, with the tasks beside it.
    """

    id: str
    indices: tuple[int, ...]
    processes: int = 1
    array: str = ""

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


def arrays(tasks: Sequence[Task], limit: int, at_once: int) -> list[tuple[Sequence[Task], int]]:
    """Cut tasks into arrays of at most ``limit``; return how many of each may run at once, too.

    An array is as long as its share of ``at_once`` is large: all of them end together, so that
    no share is left unused. SLURM runs one task of each at least.

    >>> arrays("abcdefghij", limit=4, at_once=5)
    [('abcd', 2), ('efgh', 2), ('ij', 1)]
    """
    if not tasks:
        return []
    count = len(tasks)
    at_once = max(1, min(at_once, count), math.ceil(count / limit))
    # The largest share whose tasks fit into an array.
    most = limit * at_once // count
    ends = [min(at_once, end) for end in range(0, at_once + most, most)]
    return [
        (tasks[count * start // at_once : count * stop // at_once], stop - start)
        for start, stop in pairwise(ends)
    ]


def job_ids(known: str, tasks: int) -> tuple[str, ...]:
    """Name the jobs of an array by its id, or by one of theirs; an array of one is none.

    >>> job_ids("7_1", 2), job_ids("7", 1)
    (('7_0', '7_1'), ('7',))
    """
    array = known.partition("_")[0]
    return tuple(f"{array}_{number}" for number in range(tasks)) if tasks > 1 else (array,)


def submit(
    tasks: Sequence[ArrayTask], jobs: Path, profile: ClusterProfile, name: str, tell: Tell
) -> tuple[str, ...]:
    """Submit tasks as one array of this name, or as processes of this machine; give their ids.

    A controller that does not answer is asked again, for ten minutes; what it took without
    saying so is found by its name. ``tell`` is told of each wait. What a user's ``SBATCH_``
    variables ask for is left out, and said: a job gets what its profile says.

    Raises:
        QueueFullError: there is no room for so many jobs now.
        NoAnswerError: the controller did not answer.
        SdwnError: the scheduler refused, or there is none.
    """
    if profile.executor == "local":
        return _start(tasks, jobs, profile, name)
    _require_slurm()
    _say_ignored(tell)
    path, patience = jobs / f"{name}.sh", Patience(tell)
    jobs.mkdir(parents=True, exist_ok=True)
    write_text(path, script(len(tasks), jobs, profile, name))
    while True:
        done = _sbatch(path, tell)
        said = done.stdout + done.stderr
        if answer := SUBMITTED.search(said):
            known = answer[1]
            break
        silent = done.returncode and any(words in said.casefold() for words in NO_ANSWER)
        silent = silent and not is_full(said)
        # What was not understood may have been taken; only a controller that answers knows.
        unclear = silent or not done.returncode
        queue = await_answer(tell, name) if unclear else scheduler.squeue([name], ended=True)
        if queue:
            known = next(iter(queue))
            break
        if not silent:
            path.unlink()
            raise _refusal(done)
        patience.wait(scheduler.last_line(said))
    ids = job_ids(known, len(tasks))
    hand_over(tasks, ids, jobs, profile)
    return ids


def _sbatch(path: Path, tell: Tell) -> subprocess.CompletedProcess[str]:
    """Run sbatch; where the queue is full, end it before it waits for room, for minutes."""
    command, said = ["sbatch", str(path)], ""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        encoding="utf-8",
        errors="replace",
        env=scheduler.environment(),
    ) as process:
        for line in process.stderr or ():
            said += line
            if is_full(line):
                process.terminate()
            elif "retrying" in line:
                tell(line.strip())
        answer = process.stdout.read() if process.stdout else ""
    return subprocess.CompletedProcess(command, process.returncode, answer, said)


def _say_ignored(tell: Tell) -> None:
    """Name the variables of the user that jobs do not follow, once in a process."""
    names = sorted(name for name in os.environ if name.startswith("SBATCH_"))
    if names and names != _ignored:
        _ignored[:] = names
        tell(f"{', '.join(names)}: not followed; jobs get what the profile says")


def _refusal(done: subprocess.CompletedProcess[str]) -> SdwnError:
    """Return what sbatch's answer means, where it took nothing."""
    if not done.returncode:
        return SdwnError(
            "submission refused: expected 'Submitted batch job' and a number from sbatch, found "
            f"{scheduler.last_line(done.stdout + done.stderr)!r}, and no such job in the queue"
        )
    reason = scheduler.last_line(done.stderr or done.stdout)
    if is_full(done.stderr + done.stdout):
        return QueueFullError(f"SLURM takes no more jobs: {reason}")
    return SdwnError(f"submission refused: {reason}")


class Patience:
    """Waits for a controller that does not answer, ever longer, ten minutes in all."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._pauses = tell, iter(PAUSES_S)

    def wait(self, reason: str) -> None:
        """Wait before another try.

        Raises:
            NoAnswerError: it was the last one.
        """
        pause = next(self._pauses, None)
        if pause is None:
            raise NoAnswerError(
                f"SLURM did not answer for {sum(PAUSES_S) // 60} minutes ({reason}); what was "
                "submitted is kept; run the same command again when it does"
            )
        self._tell(f"no answer from SLURM ({reason}); trying again in {pause} s")
        time.sleep(pause)


def await_answer(tell: Tell, *names: str) -> dict[str, JobState]:
    """Give the user's queue, waiting for a controller that does not answer.

    With names, give the jobs that have one of them, also those that ended just now.

    Raises:
        NoAnswerError: it did not for ten minutes.
        SdwnError: there is no SLURM.
    """
    _require_slurm()
    patience = Patience(tell)
    while (queue := scheduler.squeue(names, ended=bool(names))) is None:
        patience.wait("squeue fails")
    return queue


def is_full(text: str) -> bool:
    r"""Tell a limit on the number of jobs, which passes, from other limits, which do not.

    >>> full = "error: QOSMaxSubmitJobPerUserLimit\nviolates policy (job submit limit, ...)"
    >>> is_full(full), is_full(full.replace("SubmitJobPerUser", "WallDurationPerJob"))
    (True, False)
    """
    # SLURM names the limit, and says the same of every kind after that.
    if named := re.findall(r"\b(?:QOS|Assoc)\w*Limit\b", text):
        return any("Submit" in name for name in named)
    # The others are of MaxJobCount, which all users share.
    full = ("submit limit", "temporarily unable to accept job", "job queue full")
    return any(words in text for words in full)


def hand_over(
    tasks: Sequence[ArrayTask], ids: Sequence[str], jobs: Path, profile: ClusterProfile
) -> None:
    """Write the pickles that jobs under SLURM load: a task waits for its own for a minute.

    One that lies there already may be anybody's, where the folder came with a release.
    """
    for one, task in zip(ids, tasks, strict=True):
        delayed = DelayedSubmission(task)
        delayed.set_timeout(minutes(profile.time), profile.max_num_timeout)
        path = JobPaths(jobs / "%j", one).submitted_pickle
        with atomic(path) as temporary:
            delayed.dump(temporary)


def _start(
    tasks: Sequence[ArrayTask], jobs: Path, profile: ClusterProfile, name: str
) -> tuple[str, ...]:
    """Start tasks as processes of this machine."""
    executor: Any = submitit.LocalExecutor(
        jobs / "%j", profile.max_num_timeout, python=f"{_python(profile)} -P"
    )
    executor.update_parameters(
        signal_delay_s=profile.signal_delay_s,
        setup=_setup(profile),
        timeout_min=minutes(profile.time),
    )
    gpus = local_gpus({**os.environ, **profile.environment})
    ids = []
    with _detached(starting_log(jobs, name)):
        for number, task in enumerate(tasks):
            if gpus:
                # Not by submitit, which numbers GPUs from 0 and knows no other names.
                own = only_gpu(gpus[number % len(gpus)])
                executor.update_parameters(setup=_setup(profile, own))
            ids.append(str(executor.submit(task).job_id))
    return tuple(ids)


def starting_log(jobs: Path, name: str) -> Path:
    """Name an array's log of what goes wrong before a task can write its own."""
    return jobs / f"{name}.log"


def script(tasks: int, jobs: Path, profile: ClusterProfile, name: str = JOB_NAME) -> str:
    """Write the script that :func:`submit` hands to sbatch, also where SLURM is not."""
    folder = (jobs / "%j").absolute()
    # With -P, what lies in the folder where somebody typed takes no module's place.
    command = f"{_python(profile)} -P -u -m submitit.core._submit {shlex.quote(str(folder))}"
    if profile.executor == "local":
        note = f"# {tasks} at once on this machine; submitit puts each one's process id for %j"
        return "\n".join(["#!/bin/bash", note, *_setup(profile), command]) + "\n"
    if not str(folder).isprintable() or re.search(r"[%\\]", str(folder.parent)):
        raise UsageError(
            f"{folder.parent}: SLURM reads no path with a line break, a backslash, a % or bytes "
            "that are no UTF-8; rename the folder, or plan into another one"
        )
    setup = [*_logging(folder), *_setup(profile)]
    parameters = {**_slurm_parameters(profile), "job_name": name, "setup": setup}
    log = str(starting_log(jobs.absolute(), name))
    parameters["additional_parameters"] |= {"output": log, "error": log}
    if tasks > 1:
        parameters["map_count"] = tasks
    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def _logging(folder: Path) -> list[str]:
    """Write the lines that make a task's folder and its log: it may start before sbatch answers.

    Then neither is there yet, and a task whose log cannot be opened dies.
    """
    job = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    own = f'{shlex.quote(str(folder.parent))}/"$sdwn_job"'
    return [
        f'sdwn_job={job}; sdwn_job="${{sdwn_job:-$SLURM_JOB_ID}}"',
        f'mkdir -p {own} && exec >>{own}/"$sdwn_job"_0_log.out 2>>{own}/"$sdwn_job"_0_log.err',
    ]


def _python(profile: ClusterProfile) -> str:
    return profile.python or shlex.quote(sys.executable)


def _require_slurm() -> None:
    for command in ("sbatch", "squeue", "srun"):
        if shutil.which(command) is None:
            raise SdwnError(
                f"expected a SLURM cluster, found no {command} on this machine; submit from a "
                "login node, or look at the script with --dry-run, or use --profile local"
            )


def _slurm_parameters(profile: ClusterProfile) -> dict[str, Any]:
    parameters = {name: getattr(profile, name) for name in SUBMITIT_OPTIONS}
    extra: dict[str, Any] = {
        "requeue": True,
        "mem": profile.mem,
        "reservation": profile.reservation,
    }
    extra.update({name.replace("_", "-"): value for name, value in profile.sbatch.items()})
    parameters["additional_parameters"] = {k: v for k, v in extra.items() if v not in (None, False)}
    parameters["time"] = minutes(profile.time)
    parameters["signal_delay_s"] = profile.signal_delay_s
    parameters["array_parallelism"] = profile.array_parallelism
    # Also where the job itself was submitted with --export=NONE, or with a list.
    parameters["srun_args"] = ["--export=ALL"]
    if profile.cpus_per_task:
        # From SLURM 22.05 on, srun no longer takes it from sbatch.
        parameters["srun_args"].append(f"--cpus-per-task={profile.cpus_per_task}")
    if profile.processes > 1:
        parameters["ntasks_per_node"] = profile.processes
        # One that dies leaves the others alone.
        parameters["srun_args"].append("--kill-on-bad-exit=0")
    return parameters


def _setup(profile: ClusterProfile, gpu: Mapping[str, str] | None = None) -> list[str]:
    # The script lies where others may read it, and a shell's command line is everybody's.
    environment = {n: v for n, v in profile.environment.items() if not is_secret(n, v)}
    environment.update(gpu or {})
    if profile.cpus_per_task:
        environment.setdefault("OMP_NUM_THREADS", str(profile.cpus_per_task))
    if profile.batch_size:
        environment[batches.VARIABLE] = str(profile.batch_size)
    if profile.stage_weights:
        environment[STAGE_VARIABLE] = profile.stage_weights
    if path := _own_path():
        environment.setdefault("PYTHONPATH", path)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return [*exports, *profile.setup]


def _own_path() -> str | None:
    """Return the PYTHONPATH by which tasks import this very code; None where it is installed."""
    root = Path(__file__).resolve().parents[2]
    given = os.environ.get("PYTHONPATH", "")
    # python -m sdwn in a clone finds it in the current folder, which tasks do not look into.
    if root not in (Path(entry).resolve() for entry in (sys.path[0], *given.split(os.pathsep))):
        return None
    return os.pathsep.join(filter(None, [str(root), given]))


def gives_gpu(profile: ClusterProfile) -> bool:
    """Return whether a task under a profile is given a GPU."""
    if profile.executor == "slurm":
        return profile.asks_for_gpu
    return bool(local_gpus({**os.environ, **profile.environment}))


@contextlib.contextmanager
def _detached(log: Path) -> Iterator[None]:
    """Start processes that outlive this terminal: no key or hangup reaches them, no open pipe.

    What submitit starts takes no options of Python: a variable keeps it, too, from importing
    what lies in the current folder.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # What is ignored now stays ignored in the processes that start now.
    before = {one: signal.signal(one, signal.SIG_IGN) for one in TERMINAL_SIGNALS}
    kept = [os.dup(stream) for stream in (0, 1, 2)]
    try:
        with (
            Path(os.devnull).open() as nothing,
            open_append(log) as file,
            environment_variables(PYTHONSAFEPATH="1"),
        ):
            for stream, end in zip((0, 1, 2), (nothing, file, file), strict=True):
                os.dup2(end.fileno(), stream)
            yield
    finally:
        for stream, original in zip((0, 1, 2), kept, strict=True):
            os.dup2(original, stream)
            os.close(original)
        for one, handler in before.items():
            signal.signal(one, handler)
