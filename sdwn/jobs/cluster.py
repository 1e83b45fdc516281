"""Arrays of tasks: their script, and starting it by sbatch or as processes of this machine.

::

    jobs/NAME.sh            makes jobs/JOB, writes its log there
        |                   variables and setup lines of the profile: one that fails ends the task
    submitit.core._submit   loads jobs/JOB/JOB_submitted.pkl, once for each process of the task
        |
    ArrayTask               sdwn/jobs/task.py
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from sdwn import batches
from sdwn.devices.device import local_gpus, only_gpu
from sdwn.errors import NoAnswerError, QueueFullError, SdwnError, UsageError
from sdwn.io import OnMessage, atomic, open_append, write_text
from sdwn.jobs import scheduler
from sdwn.jobs.journal import job_ids, local_ids
from sdwn.jobs.logs import SETUP_FAILED, starting_log
from sdwn.jobs.profile import SBATCH_FIELDS, ClusterProfile, is_secret, minutes
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

Task = TypeVar("Task")


# --- How work is cut -----------------------------------------------------------------------------
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


# --- The script of a job -------------------------------------------------------------------------

# Of a setup line that fails the text is printed, below its own words; a line may be a function of
# the shell, as module is. What fails within a sourced file is that file's own concern.
SETUP = f"""\
sdwn_fail() {{
  trap - EXIT; echo "{SETUP_FAILED} $1: ${{2:-$(sed -n "$3p" "$0")}}" >&2; exit "$1"
}}
trap 'sdwn_fail $? "$BASH_COMMAND"' EXIT
trap 'sdwn_code=$?; [ ${{#BASH_SOURCE[@]}} -gt 1 ] || sdwn_fail $sdwn_code "" $LINENO' ERR"""


def job_script(tasks: int, jobs: Path, profile: ClusterProfile, name: str = "sdwn") -> str:
    """Write the script that :func:`start_array` hands to sbatch, or runs with a job's id."""
    slurm, folder = profile.executor == "slurm", jobs.absolute()
    # With -P, a file in the user's current folder hides no module.
    python = profile.python or shlex.quote(sys.executable)
    start = f'{python} -P -u -m submitit.core._submit "$sdwn_folder"'
    if slurm:
        if not str(folder).isprintable() or re.search(r"[%\\]", str(folder)):
            raise UsageError(
                f"{folder}: SLURM reads no path with a line break, a backslash, a % or bytes "
                "that are no UTF-8; rename the folder, or plan into another one"
            )
        lines = _sbatch_lines(tasks, folder, profile, name)
        lines += [
            'sdwn_job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
            'sdwn_job="${sdwn_job:-$SLURM_JOB_ID}"',
        ]
        job = "%A_%a" if tasks > 1 else "%j"
        log = str(folder / job / f"{job}_%t_log")
        srun = ["srun", "--unbuffered", f"--output={log}.out", f"--error={log}.err"]
        # Also where the job itself was submitted with --export=NONE, or with a list.
        srun.append("--export=ALL")
        if profile.cpus_per_task:
            # From SLURM 22.05 on, srun no longer takes it from sbatch.
            srun.append(f"--cpus-per-task={profile.cpus_per_task}")
        if profile.processes > 1:
            # One that dies leaves the others alone.
            srun.append("--kill-on-bad-exit=0")
        start = f"{shlex.join(srun)} {start}"
    else:
        # Its first argument is the job's id; others are variables, which name its GPU.
        lines = ["#!/bin/bash", 'sdwn_job="$1"; shift', 'export SUBMITIT_LOCAL_JOB_ID="$sdwn_job"']
    lines += [
        # A task may start before sbatch answers. Then its folder and its log are not there yet,
        # and a task whose log cannot be opened dies: so until here SLURM writes into a log of the
        # whole array.
        f'sdwn_folder={shlex.quote(str(folder))}/"$sdwn_job"',
        'sdwn_log="$sdwn_folder/${sdwn_job}_0_log"',
        'mkdir -p "$sdwn_folder" && exec >>"$sdwn_log.out" 2>>"$sdwn_log.err"',
        f"export SUBMITIT_EXECUTOR={profile.executor}",
        *_exports(profile),
    ]
    if not slurm:
        # A SIGTERM is the task's alone, which goes on: without this shell nobody would know it.
        lines += ['[ $# = 0 ] || export "$@"', "trap : TERM"]
    if profile.setup:
        lines += [SETUP, *profile.setup, "trap - EXIT ERR"]
    return "\n".join([*lines, start, ""])


def _sbatch_lines(tasks: int, folder: Path, profile: ClusterProfile, name: str) -> list[str]:
    """Write what sbatch reads; what is None or False is left out."""
    start_log = starting_log(folder, name)
    options: dict[str, Any] = {
        "job-name": name,
        "output": start_log,
        "error": start_log,
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR2@{profile.signal_delay_s}",
        "time": minutes(profile.time),
        "array": f"0-{tasks - 1}%{min(tasks, profile.array_parallelism)}" if tasks > 1 else None,
        "ntasks-per-node": profile.processes if profile.processes > 1 else None,
        **{name: getattr(profile, name) for name in SBATCH_FIELDS},
        **profile.sbatch,
    }
    return [
        "#!/bin/bash",
        *(
            f"#SBATCH --{option.replace('_', '-')}"
            + ("" if value is True else f"={shlex.quote(str(value))}")
            for option, value in options.items()
            if value not in (None, False)
        ),
    ]


def _exports(profile: ClusterProfile) -> list[str]:
    """Write a task's variables; $NAME within a value of the profile is the task's variable."""
    own = {"OMP_NUM_THREADS": str(profile.cpus_per_task)} if profile.cpus_per_task else {}
    # python -m sdwn in a clone that is not installed finds sdwn in the current folder, which
    # tasks do not look into: by this PYTHONPATH they import this very code.
    root, path = Path(__file__).resolve().parents[2], os.environ.get("PYTHONPATH", "")
    if root in (Path(entry).resolve() for entry in (sys.path[0], *path.split(os.pathsep))):
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), path]))
    values = {name: shlex.quote(value) for name, value in own.items()}
    for name, value in profile.environment.items():
        # The script lies where others may read it, and a shell's command line is everybody's.
        if not is_secret(name, value):
            parts = re.split(r"(\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})", value)
            parts[::2] = [shlex.quote(part) if part else "" for part in parts[::2]]
            parts[1::2] = [f'"{part}"' for part in parts[1::2]]
            values[name] = "".join(parts)
    if profile.batch_size:
        values[batches.VARIABLE] = str(profile.batch_size)
    if profile.placement != "auto":
        values[batches.PLACEMENT_VARIABLE] = profile.placement
    if profile.stage_weights:
        values[STAGE_VARIABLE] = shlex.quote(profile.stage_weights)
    return [f"export {name}={value}" for name, value in values.items()]


# --- Starting an array ---------------------------------------------------------------------------
def start_array(
    tasks: Sequence[ArrayTask],
    jobs: Path,
    profile: ClusterProfile,
    name: str,
    on_message: OnMessage,
) -> tuple[str, ...]:
    """Submit tasks as one array of this name, or as processes of this machine; return their ids.

    ``jobs`` is the folder for scripts, pickles and logs; ``on_message`` is called at each wait.

    Raises:
        QueueFullError: there is no room for so many jobs now.
        NoAnswerError: the controller did not answer.
        SdwnError: the scheduler refused, or there is none.
    """
    # The names of its folders need not be UTF-8.
    path, script = jobs / f"{name}.sh", job_script(len(tasks), jobs, profile, name)
    if profile.executor == "local":
        ids = local_ids(name, len(tasks))
        hand_over(tasks, ids, jobs, profile)
        write_text(path, script, errors="surrogateescape")
        gpus = local_gpus({**os.environ, **profile.environment})
        with open_append(starting_log(jobs, name)) as log:
            streams: list[Any] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            streams += [(os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)]
            for number, job in enumerate(ids):
                own = only_gpu(gpus[number % len(gpus)]) if gpus else {}
                words = ["bash", str(path.absolute()), job, *(f"{n}={v}" for n, v in own.items())]
                # In a session of its own no key of this terminal and no hangup reaches it.
                os.posix_spawnp("bash", words, os.environ, file_actions=streams, setsid=True)
        return ids
    _require_slurm()
    # A job gets what its profile says, not what the user's shell does.
    ignored = sorted(variable for variable in os.environ if variable.startswith("SBATCH_"))
    if ignored and ignored != _ignored:
        _ignored[:] = ignored
        on_message(f"{', '.join(ignored)}: not followed; jobs get what the profile says")
    write_text(path, script, errors="surrogateescape")
    pauses = iter(PAUSES_S)
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
            _pause(pauses, reason, on_message)
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


def _pause(pauses: Iterator[int], reason: str, on_message: OnMessage) -> None:
    """Wait for a controller, ever longer, ten minutes in all."""
    pause = next(pauses, None)
    if pause is None:
        raise NoAnswerError(
            f"SLURM did not answer for {sum(PAUSES_S) // 60} minutes ({reason}); what was "
            "submitted is kept; run the same command again when it does"
        )
    on_message(f"no answer from SLURM ({reason}); trying again in {pause} s")
    time.sleep(pause)


def await_queue(on_message: OnMessage, *names: str) -> dict[str, JobState]:
    """Return the user's queue, waiting for a controller that does not answer.

    With names, return the jobs that have one of them, also those that ended just now.
    """
    _require_slurm()
    pauses = iter(PAUSES_S)
    while (queue := scheduler.squeue(names, ended=bool(names))) is None:
        _pause(pauses, "squeue fails", on_message)
    return queue


def hand_over(
    tasks: Sequence[ArrayTask], ids: Sequence[str], jobs: Path, profile: ClusterProfile
) -> None:
    """Write the pickles that jobs load: a task waits for its own for a minute.

    An existing pickle is replaced: it may be another user's, if the folder came with a release.
    """
    from submitit.core.utils import DelayedSubmission  # 0.2 s, and status needs none of it

    for job, task in zip(ids, tasks, strict=True):
        delayed = DelayedSubmission(task)
        delayed.set_timeout(minutes(profile.time), profile.max_num_timeout)
        with atomic(jobs / job / f"{job}_submitted.pkl") as temporary:
            delayed.dump(temporary)
