"""Jobs of SLURM, or processes of this machine in their place: start, list and end them.

How many jobs a site takes is not read: sbatch says when the queue is full.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from sdwn.devices.device import local_gpus, only_gpu
from sdwn.errors import NoAnswerError, QueueFullError, SdwnError
from sdwn.io import OnMessage, atomic, open_append, write_text
from sdwn.jobs.profile import ClusterProfile, job_script, minutes, starting_log
from sdwn.jobs.task import ArrayTask

TIMEOUT_S = 60
PARTITIONS = ("sinfo", "--all", "--noheader", "--format=%P|%l")
# SLURM's default.
MAX_ARRAY_SIZE = 1001

RUNNING, PENDING, UNKNOWN = "RUNNING", "PENDING", "UNKNOWN"

# Without --all, squeue leaves out a user's own jobs in hidden partitions.
SQUEUE = ("squeue", "--noheader", "--array", "--all", "--Format")
# Columns of a fixed width: a job's name, which is its user's choice, may hold anything.
COLUMNS, EDGES = "JobArrayID:40,State:24,Name:80,Reason:80", (0, 40, 64, 144, 224)

# Variables that change what SLURM's commands do, or that belong to a job around this process.
# Not those that say where the cluster is and who the user is.
STEERING = re.compile(
    r"(SLURM(?!_CLUSTERS|_CONF|_JWT|_SACK)|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SCANCEL|SINFO|SACCT"
    r"|SCONTROL|SUBMITIT)_|(CUDA|HIP|ROCR)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
)

# A controller that is overloaded or restarts: ten minutes in all.
PAUSES_S = (1, 2, 4, 8, 15, 30, 60, 120, 180, 180)
UNANSWERED = re.compile(
    "communication connection failure|connection (refused|reset|timed out)|not responding|"
    "socket timed out|temporarily una(ble|vailable)|unable to contact slurm controller|"
    "zero bytes were transmitted"
)
# How sbatch says that it took a job; a site's wrapper may print other lines around it.
SUBMITTED = re.compile(r"\bSubmitted batch job (\d+)")

# The variables that were named as not followed, once in a process.
_ignored: list[str] = []


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted array task: its scheduler's id, shards, processes, and its array's name."""

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


# --- SLURM's commands ----------------------------------------------------------------------------
def environment() -> dict[str, str]:
    """Return this process's environment without variables that change SLURM's commands."""
    # What the profile says is what jobs get: a user's defaults (SBATCH_PARTITION) go before it,
    # SQUEUE_STATES filters answers, and a job around this process has options of its own.
    return {name: value for name, value in os.environ.items() if not STEERING.match(name)}


def call(command: Sequence[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables that would change what it does."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment(),
        timeout=timeout,
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
    """Return the last line that is not empty, or that no reason is given."""
    return next(filter(None, map(str.strip, reversed(text.splitlines()))), "no reason given")


def user() -> str:
    """Return the user's name as the system has it; $USER may be another's after su or sudo."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or str(os.getuid())


def squeue(
    names: Iterable[str] = (), everybody: bool = False, ended: bool = False
) -> dict[str, JobState] | None:
    """List jobs that wait or run by their ids; None where no controller answers.

    With ``names`` only jobs of these names, with ``ended`` also those that ended minutes ago.
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
    """Read a line of squeue; None if it is not one, as part of a name with a line break."""
    job, state, name, reason = (line[a:b].strip() for a, b in pairwise(EDGES))
    if not job[:1].isdecimal() or not state.isupper():
        return None
    return job, JobState(state, reason, name)


def _pause(pauses: Iterator[int], reason: str, say: OnMessage) -> None:
    """Wait for a controller, ever longer, ten minutes in all."""
    pause = next(pauses, None)
    if pause is None:
        raise NoAnswerError(
            f"SLURM did not answer for {sum(PAUSES_S) // 60} minutes ({reason}); what was "
            "submitted is kept; run the same command again when it does"
        )
    say(f"no answer from SLURM ({reason}); trying again in {pause} s")
    time.sleep(pause)


# --- Starting an array ---------------------------------------------------------------------------
def job_ids(known: str, tasks: int) -> tuple[str, ...]:
    """Return the ids of an array's jobs from its own id, or one of theirs; one task is no array.

    >>> job_ids("7_1", 2), job_ids("7", 1)
    (('7_0', '7_1'), ('7',))
    """
    array = known.partition("_")[0]
    return tuple(f"{array}_{number}" for number in range(tasks)) if tasks > 1 else (array,)


def start_array(
    tasks: Sequence[ArrayTask], jobs: Path, profile: ClusterProfile, name: str, say: OnMessage
) -> tuple[str, ...]:
    """Submit tasks as one array of this name, or as processes of this machine; return their ids.

    Raises:
        QueueFullError: there is no room for so many jobs now.
        NoAnswerError: the controller did not answer.
        SdwnError: the scheduler refused, or there is none.
    """
    if profile.executor == "slurm":
        for command in ("sbatch", "squeue", "srun"):
            if shutil.which(command) is None:
                raise SdwnError(
                    f"expected a SLURM cluster, found no {command} on this machine; submit from a "
                    "login node, or look at the script with --dry-run, or use --profile local"
                )
        # A job gets what its profile says, not what the user's shell does.
        ignored = sorted(variable for variable in os.environ if variable.startswith("SBATCH_"))
        if ignored and ignored != _ignored:
            _ignored[:] = ignored
            say(f"{', '.join(ignored)}: not followed; jobs get what the profile says")
    script = jobs / f"{name}.sh"
    # The names of folders need not be UTF-8.
    write_text(script, job_script(len(tasks), jobs, profile, name), errors="surrogateescape")
    local = profile.executor == "local"
    # Those of processes are known before they start: the name's eight letters are a number.
    ids = job_ids(str(int(name[-8:], 16)) if local else _sbatch(script, say), len(tasks))
    hand_over(tasks, ids, jobs, profile)
    if local:
        _start_processes(script, ids, profile)
    return ids


def _start_processes(script: Path, ids: Sequence[str], profile: ClusterProfile) -> None:
    gpus = local_gpus({**os.environ, **profile.environment})
    with open_append(starting_log(script.parent, script.stem)) as log:
        for number, job in enumerate(ids):
            own = only_gpu(gpus[number % len(gpus)]) if gpus else {}
            words = ["bash", str(script.absolute()), job, *(f"{n}={v}" for n, v in own.items())]
            # In a session of its own no key of this terminal and no hangup reaches it.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            # Its words come after its number; who looks in between takes it for ended.
            while process.poll() is None and not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                time.sleep(0.001)


def _sbatch(script: Path, say: OnMessage) -> str:
    """Submit a script; return the array's id, whatever a site's sbatch answers."""
    pauses = iter(PAUSES_S)
    while True:
        code, printed = _run_sbatch(script, say)
        if answer := SUBMITTED.search(printed):
            return answer[1]
        # A job without a readable answer may have been taken; only the controller knows.
        while (queue := squeue([script.stem], ended=True)) is None:
            _pause(pauses, "squeue fails", say)
        if queue:
            return next(iter(queue))
        reason = last_line(printed)
        if is_full(printed):
            script.unlink()
            raise QueueFullError(f"SLURM takes no more jobs: {reason}")
        if not code or not UNANSWERED.search(printed.casefold()):
            script.unlink()
            raise SdwnError(
                "submission refused: expected 'Submitted batch job' and a number from sbatch, "
                f"found {reason!r}"
            )
        _pause(pauses, reason, say)


def _run_sbatch(script: Path, say: OnMessage) -> tuple[int, str]:
    """Run sbatch; end it where the queue is full, before it waits for room for minutes."""
    printed = ""
    with subprocess.Popen(
        ["sbatch", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment(),
    ) as process:
        for line in process.stdout or ():
            printed += line
            if is_full(line):
                process.terminate()
            elif "retrying" in line:
                say(line.strip())
    return process.returncode, printed


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


def hand_over(
    tasks: Sequence[ArrayTask], ids: Sequence[str], jobs: Path, profile: ClusterProfile
) -> None:
    """Write the pickles that jobs load, in place of any that came with a foreign release."""
    from submitit.core.utils import DelayedSubmission  # 0.2 s, and status needs none of it

    for job, task in zip(ids, tasks, strict=True):
        delayed = DelayedSubmission(task)
        delayed.set_timeout(minutes(profile.time), profile.max_num_timeout)
        with atomic(jobs / job / f"{job}_submitted.pkl") as temporary:
            delayed.dump(temporary)


# --- Ending jobs ---------------------------------------------------------------------------------
def end_jobs(
    executor: Literal["local", "slurm"], jobs: Path, name: str, ids: Sequence[str]
) -> str | None:
    """End jobs of this name that work in ``jobs``, arrays as a whole; return why not, if so."""
    if executor == "local":
        try:
            for job, (pid, array) in processes(jobs).items():
                if job in ids and array == name:
                    _kill(pid)
        except PermissionError as error:
            return str(error)
        return None
    # With a name too, scancel ends no job that has been given one of these ids since.
    arrays = dict.fromkeys(job.partition("_")[0] for job in ids)
    done = call(["scancel", f"--name={name}", *arrays])
    return last_line(done.stderr) if done.returncode else None


def processes(jobs: Path) -> dict[str, tuple[int, str]]:
    """Return this machine's jobs that work in ``jobs``: each one's process, its array's name.

    They are known by the script that they run: a number may be another process's by now.
    """
    found = dict[str, tuple[int, str]]()
    for pid in (int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        try:
            match os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0"):
                case ["bash", script, job, *_] if Path(script).parent.samefile(jobs):
                    # Not the copies that bash makes of itself: they lead no session.
                    if os.getsid(pid) == pid:
                        found[job] = pid, Path(script).stem
        except OSError:
            continue  # it has ended, or is no job
    return found


def _kill(pid: int) -> None:
    """Kill a job's session; on disk is all that counts, so at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        # Until it is gone, or a zombie, which only its parent can bury.
        while Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] != b"Z":
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
    (
        r"Invalid(Account|QOS)|(Account|QOS)NotAllowed|Reservation(Deleted|Invalid)",
        RESUBMIT + " an --account, a --qos and a --reservation that the partition takes",
    ),
    (r"Minutes", "your account's hours are used up; ask your site for more"),
    (r"DependencyNeverSatisfied", "the job before it failed; resume with: sdwn retry"),
    (
        r"BadConstraints|PartitionNodeLimit|PartitionConfig|Max\w*Per(Job|Node)",
        "no node or limit allows what it asks for; " + RESUBMIT + " less, or another --partition",
    ),
)
# The usual reasons that pass.
PASSING = {
    "Resources": "no free nodes",
    "Priority": "others have a higher priority",
    "Dependency": "the jobs before it have not ended",
    "JobArrayTaskLimit": "the array's limit of tasks at once (array_parallelism)",
    "ReqNodeNotAvail": "its nodes are down, reserved or in maintenance",
    "None": "not looked at by SLURM yet",
}


def reason_in_words(reason: str) -> str:
    """Return in words why a job waits; what is rare is SLURM's own code."""
    code = reason.partition(",")[0] or "None"
    return PASSING.get(code, code)


def cannot_start(live: Live) -> dict[str, str]:
    """Describe, by SLURM's reason, the live jobs that can never start, and what to do."""
    # An array's id stands for all its tasks.
    arrays: dict[str, dict[str, None]] = {}
    for job, state in live.items():
        if state.state != RUNNING:
            arrays.setdefault(state.reason, {})[job.id.partition("_")[0]] = None
    found = {}
    for why, ids in arrays.items():
        if remedy := next((remedy for words, remedy in REMEDIES if re.search(words, why)), None):
            jobs = ",".join(ids)
            found[why] = f"job {jobs} cannot start ({why}): {remedy.format(job=jobs)}"
    return found


# --- A site --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Partition:
    """A partition; ``time_min`` is None where it has no limit."""

    name: str
    time_min: int | None
    default: bool


def read_partitions() -> dict[str, Partition]:
    """List the site's partitions by name; none where sinfo does not answer."""
    found = {}
    for line in output_lines(PARTITIONS) or ():
        starred, _, limit = line.partition("|")
        name, longest = starred.rstrip("*"), None
        with contextlib.suppress(ValueError):  # infinite
            longest = minutes(limit)
        found[name] = Partition(name, longest, default=starred != name)
    return found


def site_config() -> dict[str, str]:
    """Return what ``scontrol show config`` says; nothing where it does not answer."""
    lines = output_lines(("scontrol", "show", "config")) or ()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def max_array_size() -> int:
    """Return how many tasks an array may have here; 1 where the site takes no arrays."""
    text = site_config().get("MaxArraySize", "")
    return max(1, int(text)) if text.isdecimal() else MAX_ARRAY_SIZE
