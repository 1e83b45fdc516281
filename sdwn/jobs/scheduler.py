"""Jobs that wait or run, and a site, as SLURM's commands or this machine's processes show them.

How many jobs a site takes is not read: sbatch says when the queue is full.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from sdwn.jobs.profile import minutes

TIMEOUT_S = 60
# Of the commands that describe a site.
SITE_TIMEOUT_S = 20
PARTITIONS = ("sinfo", "--all", "--exact", "--noheader", "--format=%P|%l|%t|%D|%c|%m|%G")
# SLURM's default.
MAX_ARRAY_SIZE = 1001
# How sinfo's short states of nodes begin that take no jobs.
OUT_OF_USE = ("down", "drain", "drng", "fail", "inval", "unk")

RUNNING, PENDING, UNKNOWN = "RUNNING", "PENDING", "UNKNOWN"

# Without --all, squeue leaves out a user's own jobs in hidden partitions.
SQUEUE = ("squeue", "--noheader", "--array", "--all", "--Format")
# Columns of a fixed width: a job's name, which is its user's choice, may hold anything.
COLUMNS, EDGES = "JobArrayID:40,State:24,Name:80,Reason:80", (0, 40, 64, 144, 224)

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


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as its scheduler sees it."""

    state: str
    reason: str = ""
    name: str = ""


Live = Mapping[Job, JobState]
NO_ANSWER = JobState(UNKNOWN, "the SLURM controller does not answer")


# --- SLURM ---------------------------------------------------------------------------------------
def environment() -> dict[str, str]:
    """Return this process's environment without variables that change SLURM's commands."""
    # What the profile says is what jobs get: a user's defaults (SBATCH_PARTITION) go before it,
    # SQUEUE_STATES filters answers, and a job around this process has options of its own.
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

    With ``names`` only jobs of these names, with ``everybody`` also other users', and with
    ``ended`` also those that ended a few minutes ago.
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

    >>> columns = ("7_0", 40), ("RUNNING", 24), ("my job", 80), ("None", 80)
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
    """End jobs of this name that work in ``jobs``, arrays as a whole; return why not, if so."""
    if executor == "local":
        try:
            for job, (pid, array) in processes(jobs).items():
                if job in job_ids and array in ("", name):
                    _kill_tree(pid)
        except PermissionError as error:
            return str(error)
        return None
    # With a name too, scancel ends no job that has been given one of these ids since.
    arrays = dict.fromkeys(job.partition("_")[0] for job in job_ids)
    done = call(["scancel", f"--name={name}", *arrays])
    return last_line(done.stderr) if done.returncode else None


# --- This machine --------------------------------------------------------------------------------
def processes(jobs: Path) -> dict[str, tuple[int, str]]:
    """Return this machine's jobs that work in ``jobs``: each one's process, its array's name.

    A number in a journal may be another process's by now, and a journal may name any: a process
    is a job if it runs an array's script in this folder, or submitit's controller for it: so an
    older sdwn started jobs, with the process's number as id, and under no name.
    """
    found = dict[str, tuple[int, str]]()
    for pid in sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        entry = Path(f"/proc/{pid}/cmdline")
        try:
            words = os.fsdecode(entry.read_bytes()).rstrip("\0").split("\0")
            # An older one with setup lines is a shell, and what that runs is its last word.
            match shlex.split(words[-1]) if "-c" in words else words:
                case ["bash", script, job, *_] if Path(script).parent.samefile(jobs):
                    # Not the copies that bash makes of itself, which come after it.
                    found.setdefault(job, (pid, Path(script).stem))
                case [*_, "submitit.local._local", folder] if Path(folder).parent.samefile(jobs):
                    found[str(pid)] = pid, ""
        except (OSError, ValueError):
            continue  # it has ended, or is no job
    return found


def _kill_tree(pid: int) -> None:
    """Kill a process and its children; on disk is all that counts, so at once."""
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        # A shell that is stopped starts nothing between the look at its children and its end.
        os.kill(pid, signal.SIGSTOP)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        for child in children.split():
            _kill_tree(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        # Until it is gone, or a zombie, which only its parent can bury.
        while stat.read_bytes().rsplit(b")", 1)[1].split()[0] != b"Z":
            time.sleep(0.01)


# --- Jobs that can never start -------------------------------------------------------------------

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


# The reasons that pass, by how they begin.
PASSING = {
    "Resources": "no free nodes",
    "Priority": "others have a higher priority",
    "Dependency": "the jobs before it have not ended",
    "JobArrayTaskLimit": "the array's limit of tasks at once (array_parallelism)",
    "BeginTime": "not before its start time",
    "ReqNodeNotAvail": "its nodes are down, reserved or in maintenance",
    "Reservation": "its reservation has not begun",
    "Licenses": "no free licence",
    "None": "not looked at by SLURM yet",
    "QOS": "a limit of its QOS",
    "Assoc": "a limit of your account",
}


def reason_in_words(reason: str) -> str:
    """Return in words why a job waits; what is rare has its code behind it.

    >>> [reason_in_words(code) for code in ("Priority", "QOSMaxJobsPerUserLimit", "JobHeldUser")]
    ['others have a higher priority', 'a limit of its QOS (QOSMaxJobsPerUserLimit)', \
'cannot start (JobHeldUser)']
    """
    if any(re.search(words, reason) for words, _ in REMEDIES):
        return f"cannot start ({reason})"
    code = reason.partition(",")[0] or "None"
    found = next((words for begin, words in PASSING.items() if code.startswith(begin)), None)
    return found if found and code in PASSING else f"{found} ({code})" if found else code


def cannot_start(live: Live) -> dict[str, str]:
    """Describe, by SLURM's reason, the live jobs that can never start, and what to do.

    >>> cannot_start({Job("7_0", (0,)): JobState("PENDING", "JobHeldAdmin")})["JobHeldAdmin"]
    'job 7_0 cannot start (JobHeldAdmin): held by the site; only its administrators can release it'
    """
    jobs: dict[str, list[str]] = {}
    for job, state in live.items():
        if state.state != RUNNING:
            jobs.setdefault(state.reason, []).append(job.id)
    found = {}
    for why, ids in jobs.items():
        if remedy := next((remedy for words, remedy in REMEDIES if re.search(words, why)), None):
            which = f"job {ids[0]}" + f" and {len(ids) - 1:,} more" * (len(ids) > 1)
            # An array's id stands for all its tasks.
            named = ",".join(dict.fromkeys(one.partition("_")[0] for one in ids))
            text = remedy.format(job=ids[0] if len(ids) == 1 else named)
            found[why] = f"{which} cannot start ({why}): {text}"
    return found


# --- A site --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class NodeKind:
    """Nodes of a partition that are alike; ``gpus`` counts a node's by kind, "" for no kind.

    ``usable`` are those that are neither down nor drained.
    """

    nodes: int
    usable: int
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition and its kinds of nodes; ``time_min`` is None where it has no limit."""

    name: str
    time_min: int | None = None
    default: bool = False
    nodes: tuple[NodeKind, ...] = ()


def read_partitions() -> dict[str, Partition]:
    """List the site's partitions by name; none where sinfo does not answer."""
    return parse_partitions(output_lines(PARTITIONS, SITE_TIMEOUT_S) or ())


def parse_partitions(lines: Iterable[str]) -> dict[str, Partition]:
    """Parse sinfo's lines, one for each kind and state of nodes; a star marks the default.

    >>> (main,) = parse_partitions(["main*|2:00:00|drain*|1|8|64000+|gpu:a100:4(S:0-1)"]).values()
    >>> main.time_min, main.default, main.nodes[0].gpus
    (120, True, Counter({'a100': 4}))
    """
    found: dict[str, Partition] = {}
    for fields in (line.split("|") for line in lines):
        if len(fields) != 7:
            continue
        starred, limit, state, *numbers, gres = fields
        # sinfo writes 64000+ where nodes of a row differ.
        texts = (text.strip().rstrip("+") for text in numbers)
        nodes, cpus, memory = (int(text) if text.isdecimal() else 0 for text in texts)
        gpus = Counter[str]()
        for kind, count in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)(?=\(|,|$)", gres):
            gpus[kind] += int(count)
        usable = 0 if state.startswith(OUT_OF_USE) else nodes
        kinds = (NodeKind(nodes, usable, cpus, memory, gpus),) if nodes else ()
        name, longest = starred.rstrip("*"), None
        with contextlib.suppress(ValueError):  # infinite
            longest = minutes(limit)
        before = found.get(name, Partition(name, longest, starred != name))
        found[name] = replace(before, nodes=before.nodes + kinds)
    return found


def site_config() -> dict[str, str]:
    """Return what ``scontrol show config`` says; nothing where it does not answer."""
    lines = output_lines(("scontrol", "show", "config"), SITE_TIMEOUT_S) or ()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def max_array_size() -> int:
    """Return how many tasks an array may have here; SLURM's default where it does not say.

    An array of one task is submitted as a plain job, which a site without arrays (0) takes too.
    """
    config = site_config()
    text = config.get("MaxArraySize", "")
    # The highest index is one less.
    size = int(text) if text.isdecimal() else MAX_ARRAY_SIZE
    tasks = re.search(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    return max(1, min(size, int(tasks[1]) if tasks else size))


def user() -> str:
    """Return the user's name as the system has it; $USER may be another's after su or sudo."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or str(os.getuid())
