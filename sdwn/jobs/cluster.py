"""Arrays of tasks: a script for sbatch under a site's profile, or processes of this machine."""

from __future__ import annotations

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
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths, environment_variables
from submitit.slurm.slurm import _make_sbatch_string

from sdwn import batches
from sdwn.devices.device import local_gpus, only_gpu
from sdwn.errors import NoAnswerError, QueueFullError, SdwnError, UsageError
from sdwn.io import OnMessage, atomic, open_append, write_text
from sdwn.jobs import scheduler
from sdwn.jobs.journal import job_ids
from sdwn.jobs.logs import starting_log
from sdwn.jobs.profile import ClusterProfile, is_secret, minutes
from sdwn.jobs.scheduler import JobState
from sdwn.jobs.task import ArrayTask
from sdwn.paths import STAGE_VARIABLE

# A controller that is overloaded or restarts: ten minutes in all.
PAUSES_S = (1, 2, 4, 8, 15, 30, 60, 120, 180, 180)
NO_ANSWER = re.compile(
    "communication connection failure|connection (refused|reset|timed out)|not responding|"
    "socket timed out|temporarily una(ble|vailable)|unable to contact slurm controller|"
    "zero bytes were transmitted"
)
# How sbatch says that it took a job; a site's wrapper may print other lines around it.
SUBMITTED = re.compile(r"\bSubmitted batch job (\d+)")

# The variables that were named as not followed, once in a process.
_ignored: list[str] = []

# Ctrl-C, Ctrl-\, Ctrl-Z, and the end of the terminal or the connection.
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP)

# The options that submitit's own parameters cover; others go as plain sbatch lines.
SUBMITIT_OPTIONS = (
    *("account", "constraint", "cpus_per_task", "exclude", "gpus_per_node", "gres", "mem_per_cpu"),
    *("mem_per_gpu", "nodelist", "nodes", "partition", "qos", "wckey"),
)

Task = TypeVar("Task")


# How work is cut


def group_into_tasks(indices: Sequence[int], profile: ClusterProfile) -> list[tuple[int, ...]]:
    """Group shards into array tasks.

    Under SLURM each GPU of a task takes ``shards_per_task`` of them; the local executor starts
    all its tasks at once, so there are only ``array_parallelism`` of them.
    """
    if profile.executor == "local":
        tasks = min(profile.array_parallelism, len(indices))
        return [tuple(indices[first::tasks]) for first in range(tasks)]
    size = profile.shards_per_task * profile.processes
    return [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]


def split_into_arrays(
    tasks: Sequence[Task], limit: int, at_once: int
) -> list[tuple[Sequence[Task], int]]:
    """Split tasks into arrays of at most ``limit``; return how many of each may run at once, too.

    An array's length is in proportion to its share of ``at_once``: all arrays end together, so
    that no share is left unused. SLURM runs one task of each at least.

    >>> split_into_arrays("abcdefghij", limit=4, at_once=5)
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


def gives_gpu(profile: ClusterProfile) -> bool:
    """Return whether a task under a profile is given a GPU."""
    if profile.executor == "slurm":
        return profile.asks_for_gpu
    return bool(local_gpus({**os.environ, **profile.environment}))


# The script of a job


def job_script(tasks: int, jobs: Path, profile: ClusterProfile, name: str = "sdwn") -> str:
    """Write the script that :func:`start_array` hands to sbatch, also where SLURM is not."""
    folder = (jobs / "%j").absolute()
    # With -P, a file in the user's current folder hides no module.
    command = f"{_python(profile)} -P -u -m submitit.core._submit {shlex.quote(str(folder))}"
    if profile.executor == "local":
        note = f"# {tasks} at once on this machine; submitit puts each one's process id for %j"
        return "\n".join(["#!/bin/bash", note, *_setup(profile), command]) + "\n"
    if not str(folder).isprintable() or re.search(r"[%\\]", str(folder.parent)):
        raise UsageError(
            f"{folder.parent}: SLURM reads no path with a line break, a backslash, a % or bytes "
            "that are no UTF-8; rename the folder, or plan into another one"
        )
    # A task may start before sbatch answers. Then its folder and its log are not there yet, and
    # a task whose log cannot be opened dies: the script makes both, and until then SLURM writes
    # into a log of the whole array.
    job = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    own = f'{shlex.quote(str(folder.parent))}/"$sdwn_job"'
    logging = [
        f'sdwn_job={job}; sdwn_job="${{sdwn_job:-$SLURM_JOB_ID}}"',
        f'mkdir -p {own} && exec >>{own}/"$sdwn_job"_0_log.out 2>>{own}/"$sdwn_job"_0_log.err',
    ]
    start_log = str(starting_log(jobs.absolute(), name))
    options: dict[str, Any] = {
        "requeue": True,
        "mem": profile.mem,
        "reservation": profile.reservation,
        **{name.replace("_", "-"): value for name, value in profile.sbatch.items()},
        "output": start_log,
        "error": start_log,
    }
    # Also where the job itself was submitted with --export=NONE, or with a list.
    srun = ["--export=ALL"]
    parameters: dict[str, Any] = {name: getattr(profile, name) for name in SUBMITIT_OPTIONS}
    if profile.cpus_per_task:
        # From SLURM 22.05 on, srun no longer takes it from sbatch.
        srun.append(f"--cpus-per-task={profile.cpus_per_task}")
    if profile.processes > 1:
        parameters["ntasks_per_node"] = profile.processes
        # One that dies leaves the others alone.
        srun.append("--kill-on-bad-exit=0")
    if tasks > 1:
        parameters["map_count"] = tasks
    return str(
        _make_sbatch_string(
            command=command,
            folder=folder,
            job_name=name,
            time=minutes(profile.time),
            signal_delay_s=profile.signal_delay_s,
            array_parallelism=profile.array_parallelism,
            setup=[*logging, *_setup(profile)],
            srun_args=srun,
            additional_parameters={k: v for k, v in options.items() if v not in (None, False)},
            **parameters,
        )
    )


def _python(profile: ClusterProfile) -> str:
    return profile.python or shlex.quote(sys.executable)


def _setup(profile: ClusterProfile, gpu: Mapping[str, str] | None = None) -> list[str]:
    """Write the lines that a task's shell runs first: variables, and the profile's own lines."""
    # The script lies where others may read it, and a shell's command line is everybody's.
    environment = {n: v for n, v in profile.environment.items() if not is_secret(n, v)}
    environment.update(gpu or {})
    if profile.cpus_per_task:
        environment.setdefault("OMP_NUM_THREADS", str(profile.cpus_per_task))
    if profile.batch_size:
        environment[batches.VARIABLE] = str(profile.batch_size)
    if profile.stage_weights:
        environment[STAGE_VARIABLE] = profile.stage_weights
    # python -m sdwn in a clone that is not installed finds sdwn in the current folder, which
    # tasks do not look into: by this PYTHONPATH they import this very code.
    root, given = Path(__file__).resolve().parents[2], os.environ.get("PYTHONPATH", "")
    if root in (Path(entry).resolve() for entry in (sys.path[0], *given.split(os.pathsep))):
        entries = filter(None, [str(root), given])
        environment.setdefault("PYTHONPATH", os.pathsep.join(entries))
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return [*exports, *profile.setup]


# Starting an array


def start_array(
    tasks: Sequence[ArrayTask],
    jobs: Path,
    profile: ClusterProfile,
    name: str,
    on_message: OnMessage,
) -> tuple[str, ...]:
    """Submit tasks as one array of this name, or as processes of this machine; return their ids.

    A controller that does not answer is called again, for ten minutes; a job that it took
    without an answer is found by its name. A user's ``SBATCH_`` variables are ignored, and a
    message names them: a job gets what its profile says. ``jobs`` is the folder for
    scripts, pickles and logs; ``on_message`` is called at each wait.

    Raises:
        QueueFullError: there is no room for so many jobs now.
        NoAnswerError: the controller did not answer.
        SdwnError: the scheduler refused, or there is none.
    """
    if profile.executor == "local":
        return _start_processes(tasks, jobs, profile, name)
    _require_slurm()
    ignored = sorted(variable for variable in os.environ if variable.startswith("SBATCH_"))
    if ignored and ignored != _ignored:
        _ignored[:] = ignored
        on_message(f"{', '.join(ignored)}: not followed; jobs get what the profile says")
    path, wait = jobs / f"{name}.sh", _patience(on_message)
    jobs.mkdir(parents=True, exist_ok=True)
    write_text(path, job_script(len(tasks), jobs, profile, name))
    while True:
        code, printed = _sbatch(path, on_message)
        if answer := SUBMITTED.search(printed):
            known = answer[1]
            break
        full, reason = is_full(printed), scheduler.last_line(printed)
        silent = code and not full and NO_ANSWER.search(printed.casefold())
        # A job without a readable answer may have been taken; only the controller knows.
        if silent or not code:
            queue: Mapping[str, JobState] | None = await_queue(on_message, name)
        else:
            queue = scheduler.squeue([name], ended=True)
        if queue:
            known = next(iter(queue))
            break
        if silent:
            wait(reason)
            continue
        path.unlink()
        if full:
            raise QueueFullError(f"SLURM takes no more jobs: {reason}")
        raise SdwnError(
            f"submission refused: {reason}"
            if code
            else "submission refused: expected 'Submitted batch job' and a number from sbatch, "
            f"found {reason!r}, and no such job in the queue"
        )
    ids = job_ids(known, len(tasks))
    hand_over(tasks, ids, jobs, profile)
    return ids


def _require_slurm() -> None:
    for command in ("sbatch", "squeue", "srun"):
        if shutil.which(command) is None:
            raise SdwnError(
                f"expected a SLURM cluster, found no {command} on this machine; submit from a "
                "login node, or look at the script with --dry-run, or use --profile local"
            )


def _sbatch(path: Path, on_message: OnMessage) -> tuple[int, str]:
    """Run sbatch, and return its status and all that it prints.

    Where the queue is full it is ended, before it waits for room, for minutes.
    """
    errors = ""
    with subprocess.Popen(
        ["sbatch", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=scheduler.environment(),
    ) as process:
        for line in process.stderr or ():
            errors += line
            if is_full(line):
                process.terminate()
            elif "retrying" in line:
                on_message(line.strip())
        printed = process.stdout.read() if process.stdout else ""
    return process.returncode, printed + errors


def is_full(text: str) -> bool:
    r"""Return whether sbatch names a limit on the number of jobs, which passes; others do not.

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


def _patience(on_message: OnMessage) -> Callable[[str], None]:
    """Return a function that waits for a controller, ever longer, ten minutes in all."""
    pauses = iter(PAUSES_S)

    def wait(reason: str) -> None:
        pause = next(pauses, None)
        if pause is None:
            raise NoAnswerError(
                f"SLURM did not answer for {sum(PAUSES_S) // 60} minutes ({reason}); what was "
                "submitted is kept; run the same command again when it does"
            )
        on_message(f"no answer from SLURM ({reason}); trying again in {pause} s")
        time.sleep(pause)

    return wait


def await_queue(on_message: OnMessage, *names: str) -> dict[str, JobState]:
    """Return the user's queue, waiting for a controller that does not answer.

    With names, return the jobs that have one of them, also those that ended just now.

    Raises:
        NoAnswerError: it did not for ten minutes.
        SdwnError: there is no SLURM.
    """
    _require_slurm()
    wait = _patience(on_message)
    while (queue := scheduler.squeue(names, ended=bool(names))) is None:
        wait("squeue fails")
    return queue


def hand_over(
    tasks: Sequence[ArrayTask], ids: Sequence[str], jobs: Path, profile: ClusterProfile
) -> None:
    """Write the pickles that jobs under SLURM load: a task waits for its own for a minute.

    An existing pickle is replaced: it may be another user's, if the folder came with a release.
    """
    for one, task in zip(ids, tasks, strict=True):
        delayed = DelayedSubmission(task)
        delayed.set_timeout(minutes(profile.time), profile.max_num_timeout)
        path = JobPaths(jobs / "%j", one).submitted_pickle
        with atomic(path) as temporary:
            delayed.dump(temporary)


def _start_processes(
    tasks: Sequence[ArrayTask], jobs: Path, profile: ClusterProfile, name: str
) -> tuple[str, ...]:
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


@contextmanager
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
            for stream, end in enumerate((nothing, file, file)):
                os.dup2(end.fileno(), stream)
            yield
    finally:
        for stream, original in enumerate(kept):
            os.dup2(original, stream)
            os.close(original)
        for one, handler in before.items():
            signal.signal(one, handler)
