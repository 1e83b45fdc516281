"""Jobs that wait or run: this machine's processes, or SLURM's queue through its commands."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

TIMEOUT_S = 60
RUNNING, PENDING, UNKNOWN = "RUNNING", "PENDING", "UNKNOWN"

# Without --all, squeue leaves out a user's own jobs in hidden partitions.
SQUEUE = ("squeue", "--noheader", "--array", "--all", "--Format")
# Columns of a fixed width: a job's name, which is its user's choice, may hold anything.
COLUMNS, EDGES = "JobArrayID:40,State:24,Name:40,Reason:80", (0, 40, 64, 104, 184)

# Variables that change what SLURM's commands do, or that belong to a job around this process.
STEERING = (
    *("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SINFO_"),
    *("SACCT_", "SCONTROL_", "SUBMITIT_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"),
)
# Those of them that say where the cluster is and who the user is.
FINDING = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JWT", "SLURM_SACK")


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted array task: its scheduler's id, its shards, its processes.

    ``array`` is the name under which it was submitted, with the tasks beside it.
    """

    id: str
    indices: tuple[int, ...]
    processes: int = 1
    array: str = ""

    def rank(self, index: int) -> int:
        """Return which process works on a shard."""
        return self.indices.index(index) % self.processes


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as its scheduler sees it."""

    state: str
    reason: str = ""
    name: str = ""


Live = Mapping[Job, JobState]
NO_ANSWER = JobState(UNKNOWN, "the SLURM controller does not answer")


# SLURM


def environment() -> dict[str, str]:
    """Return this process's environment without variables that change SLURM's commands.

    What the profile says is what jobs get: a user's defaults (``SBATCH_PARTITION``) go before
    it, ``SQUEUE_STATES`` filters answers, and a job around this process has options of its own.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(FINDING) or not name.startswith(STEERING)
    }


def call(
    command: Sequence[str], timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables that would change what it does."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment(),
        timeout=timeout_s,
        check=False,
    )


def output_lines(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[str] | None:
    """Return the lines that a command prints; None if it is not there, fails or hangs."""
    try:
        done = call(command, timeout_s)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if done.returncode else [x for x in done.stdout.splitlines() if x.strip()]


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def squeue(
    names: Iterable[str] = (), everybody: bool = False, ended: bool = False
) -> dict[str, JobState] | None:
    """List jobs that wait or run by their ids; None where no controller answers.

    Args:
        names: only the jobs that have one of these names.
        everybody: also those of other users.
        ended: also those that ended a few minutes ago.
    """
    options = [] if everybody else ["--me"]
    if names := ",".join(names):
        options.append(f"--name={names}")
    lines = output_lines([*SQUEUE, COLUMNS, *options, *["--states=all"] * ended])
    if lines is None:
        return None
    found = dict(one for one in map(read_squeue, lines) if one is not None)
    # What SLURM refuses stays for minutes, as a job that failed.
    refused = "FAILED", "BadConstraints"
    return {job: one for job, one in found.items() if (one.state, one.reason) != refused}


def read_squeue(line: str) -> tuple[str, JobState] | None:
    """Read a line of squeue; None if it is not one, as part of a name with a line break.

    >>> columns = ("7_0", 40), ("RUNNING", 24), ("my job", 40), ("None", 80)
    >>> job, state = read_squeue("".join(text.ljust(width) for text, width in columns))
    >>> job, state.state, state.name
    ('7_0', 'RUNNING', 'my job')
    """
    job, state, name, reason = (line[a:b].strip() for a, b in pairwise(EDGES))
    if not job[:1].isdecimal() or not state.isupper():
        return None
    return job, JobState(state, reason, name)


def end_jobs(
    executor: Literal["local", "slurm"], jobs: Path, name: str, job_ids: Sequence[str]
) -> str | None:
    """End jobs of this name that work in ``jobs``, arrays as a whole; what is finished stays.

    Returns:
        The scheduler's reason why they could not be ended; None if they were.
    """
    if executor == "local":
        try:
            for job in job_ids:
                if _is_job(job, jobs):
                    _kill_tree(int(job))
        except PermissionError as error:
            return str(error)
        return None
    # With a name too, scancel ends no job that has been given one of these ids since.
    arrays = dict.fromkeys(job.partition("_")[0] for job in job_ids)
    done = call(["scancel", f"--name={name}", *arrays])
    return last_line(done.stderr) if done.returncode else None


# This machine


def live_processes(jobs: Path, host: str, job_ids: Sequence[str]) -> dict[str, JobState]:
    """Return which of these jobs of a host still run: processes that work in ``jobs``.

    Those of another host count as ended: making a shard twice costs time, waiting for a dead
    process has no end.
    """
    here = host == socket.gethostname()
    return {job: JobState(RUNNING) for job in job_ids if here and _is_job(job, jobs)}


def _is_job(pid: str, jobs: Path) -> bool:
    """Return whether a process lives and is submitit's for this folder.

    A number may have been given anew, and a journal may name any process.
    """
    try:
        command = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).rstrip("\0").split("\0")
        # With a profile's setup lines it is a shell, and what that runs is its last argument.
        words = shlex.split(command[-1]) if "-c" in command else command
        # submitit's own last argument is the folder, with %j for the job's id.
        mine = "submitit.local._local" in words and Path(words[-1]).parent.samefile(jobs)
        return mine and _is_alive(pid)
    except (OSError, ValueError):
        return False


def _is_alive(pid: str) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rsplit(b")", 1)[1].split()[0] != b"Z"


def _kill_tree(pid: int) -> None:
    """Kill a process and its children; on disk is all that counts, so at once."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        for child in children.read_text(encoding="utf-8").split():
            _kill_tree(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while _is_alive(str(pid)):
        time.sleep(0.01)


# Jobs that can never start

RESUBMIT = "cancel the run's jobs (sdwn cancel) and submit with"
# Of the reason codes at https://slurm.schedmd.com/job_reason_codes.html, and of what slurmctld
# writes in their place. Limits on what runs at once pass; limits on each job do not.
REMEDIES = (
    (r"JobHeldUser", "held by its user; release it with: scontrol release {job}"),
    (r"JobHeldAdmin", "held by the site; only its administrators can release it"),
    (
        r"requeued.(in.)?held|JobHoldMaxRequeue|JobLaunchFailure",
        "put back into the queue and held, perhaps because its node could not start it; release "
        "it with: scontrol release {job}",
    ),
    (r"PartitionTimeLimit|PerJob.*Wall|WallDuration", RESUBMIT + " a shorter --time"),
    (
        r"PartitionDown|PartitionInactive",
        f"the partition is closed; wait, or {RESUBMIT} another --partition",
    ),
    (r"InvalidAccount|AccountNotAllowed", RESUBMIT + " an --account that the partition takes"),
    (r"InvalidQOS|QOSNotAllowed", RESUBMIT + " a --qos that the partition takes"),
    (r"ReservationDeleted|ReservationInvalid", RESUBMIT + " another --reservation, or none"),
    (r"Minutes", "your account's hours are used up; ask your site for more"),
    (r"DependencyNeverSatisfied", "the job before it failed; resume with: sdwn retry"),
    (
        r"BadConstraints|PartitionNodeLimit|PartitionConfig|Max\w*Per(Job|Node)",
        "no node or limit allows what it asks for; " + RESUBMIT + " less, or another --partition",
    ),
)


def cannot_start(live: Live) -> dict[str, str]:
    """Describe, by SLURM's reason, the live jobs that can never start, and what to do.

    >>> cannot_start({Job("7_0", (0,)): JobState("PENDING", "Resources")})
    {}
    >>> cannot_start({Job("7_0", (0,)): JobState("PENDING", "JobHeldAdmin")})["JobHeldAdmin"]
    'job 7_0 cannot start (JobHeldAdmin): held by the site; only its administrators can release it'
    """
    jobs: dict[str, list[str]] = {}
    for job, state in live.items():
        if state.state != RUNNING:
            jobs.setdefault(state.reason, []).append(job.id)
    found = {}
    for why, ids in jobs.items():
        remedy = next((remedy for words, remedy in REMEDIES if re.search(words, why)), None)
        if remedy is not None:
            which = f"job {ids[0]}" + f" and {len(ids) - 1:,} more" * (len(ids) > 1)
            # An array's id stands for all its tasks.
            arrays = dict.fromkeys(one.partition("_")[0] for one in ids)
            named = ids[0] if len(ids) == 1 else ",".join(arrays)
            found[why] = f"{which} cannot start ({why}): {remedy.format(job=named)}"
    return found
