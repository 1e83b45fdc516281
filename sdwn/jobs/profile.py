"""A site's profile: where tasks run, in SLURM's own words, and the script that it gives a job.

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
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sdwn import batches
from sdwn.config import Positive, RunConfig, Section, read_yaml, validated
from sdwn.devices.device import local_gpus
from sdwn.errors import UsageError
from sdwn.paths import STAGE_VARIABLE, shipped_file

Task = TypeVar("Task")

# Sites accept different ones; two of them in one request contradict each other.
GPU_OPTIONS = ("gres", "gpus_per_node")
MEMORY_OPTIONS = ("mem", "mem_per_cpu", "mem_per_gpu")

# What follows the arrays: submit --then. Classifying images takes a GPU, the others none.
LaterStage = Literal["merge", "evaluate", "report"]

# The fields that are sbatch's own options.
SBATCH_FIELDS = (
    *("account", "constraint", "cpus_per_task", "exclude", "gpus_per_node", "gres", "mem"),
    *("mem_per_cpu", "mem_per_gpu", "nodelist", "nodes", "partition", "qos", "reservation"),
    "wckey",
)
# What sdwn writes into every script, other words for a task's GPUs, and what would hide the id of a
# job of this cluster.
OWN_OPTIONS = (
    *("array", "error", "job-name", "kill-on-bad-exit", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "requeue", "signal", "gpus", "gpus-per-socket", "gpus-per-task"),
    *("clusters", "parsable", "quiet", "test-only", "wait", "wrap"),
)

# How a job's script ends where a line of the profile's setup fails.
SETUP_FAILED = "setup failed with exit code"
# Of a setup line that fails the text is printed, below its own words; a line may be a function of
# the shell, as module is. What fails within a sourced file is that file's own concern.
SETUP = f"""\
sdwn_fail() {{
  trap - EXIT; echo "{SETUP_FAILED} $1: ${{2:-$(sed -n "$3p" "$0")}}" >&2; exit "$1"
}}
trap 'sdwn_fail $? "$BASH_COMMAND"' EXIT
trap 'sdwn_code=$?; [ ${{#BASH_SOURCE[@]}} -gt 1 ] || sdwn_fail $sdwn_code "" $LINENO' ERR"""

# Variables that hold a secret, by their names; HF_TOKEN_PATH only names a file of one.
_SECRET_NAME = re.compile(r"(?i)(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|(API)?KEY|KEY_ID)$")
# As hubs write their tokens, and an address with a password in it, as a proxy's.
_SECRET_VALUE = re.compile(r"\b(hf|gh[a-z]|github_pat|glpat|sk)[_-][\w-]{16,}|://[^/@\s]+:[^/@]+@")
# A value that is the shell's own when a run is submitted.
_REFERENCE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable is to stand in no file; ``$NAME`` is the shell's own."""
    named = _SECRET_NAME.search(name) or _SECRET_VALUE.search(value)
    return _REFERENCE.fullmatch(value) is not None or named is not None


def minutes(text: str) -> int:
    """Read a SLURM time limit as whole minutes, rounded up.

    >>> [minutes(text) for text in ("90", "1:30", "2:00:00", "1-12", "1-00:30:00")]
    [90, 2, 120, 2160, 1470]
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"expected a SLURM time such as 90, 2:00:00 or 1-12:00:00, found {text!r}")
    days, first, second, third = (int(part or 0) for part in match.groups())
    seconds = first * 60 + second  # of minutes:seconds
    if match[1] or match[4]:  # days-hours:minutes:seconds, hours:minutes:seconds
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    if not 0 < seconds <= 366 * 24 * 3600:
        raise ValueError(f"expected a time limit of up to a year, found {text!r}")
    return math.ceil(seconds / 60)


# --- What fields hold ----------------------------------------------------------------------------

# A request for GPUs: how many, of which kind (also of a kind 4090), or both.
_GPUS = r"((\w[\w.-]*:)?[1-9]\d*|[A-Za-z][\w.-]*)"
_GPU_ENTRY = r"(gres/)?gpu(?=:|,|$)"
_GRES = rf"({_GPU_ENTRY}(:{_GPUS})?|(?!{_GPU_ENTRY})[A-Za-z][\w/-]*(:[^\s:,]+){{0,2}})"


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
            raise ValueError(f"expected {expected}, found {text!r}")
        return text

    return AfterValidator(check)


# In YAML a number needs no quotes.
_Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Time = Annotated[_Text, AfterValidator(lambda text: minutes(text) and text)]
Memory = Annotated[_Text, _matching(r"\d+([KMGT]B?)?", "memory as 16G, 1500M or 16000 (MB)")]
Gpus = Annotated[_Text, _matching(_GPUS, "a number of GPUs as 4, a100 or a100:4")]
Gres = Annotated[str, _matching(rf"{_GRES}(,{_GRES})*", "gpu:4, gpu:a100:4, joined by commas")]
Variable = Annotated[str, _matching(r"[a-z_]\w*", "the name of an environment variable")]
Option = Annotated[str, _matching(r"[a-z][a-z-]*", "a long option of sbatch, as mail-type")]


def _split_gres(gres: str | None) -> tuple[list[str], list[str]]:
    """Split a value of gres into entries that ask for GPUs, and others."""
    entries = [entry for entry in (gres or "").split(",") if entry]
    gpus = [entry for entry in entries if re.match(_GPU_ENTRY, entry)]
    return gpus, [entry for entry in entries if entry not in gpus]


class ClusterProfile(Section):
    """A site: the executor, SLURM's own long option names, and the shell around a task.

    The table in slurm/README.md says what each field means.
    """

    executor: Literal["local", "slurm"] = "slurm"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: Time = "60"
    nodes: Annotated[int, Field(ge=1, le=1)] = 1  # a task uses one node
    gres: Gres | None = None
    gpus_per_node: Gpus | None = None
    constraint: str | None = None
    cpus_per_task: Positive | None = None
    mem: Memory | None = None
    mem_per_cpu: Memory | None = None
    mem_per_gpu: Memory | None = None
    exclude: str | None = None
    nodelist: str | None = None
    reservation: str | None = None
    wckey: str | None = None
    sbatch: dict[Option, str | int | bool] = Field(default_factory=dict)
    array_parallelism: Positive = 256
    max_submit_jobs: Positive | None = None
    shards_per_task: Positive = 1
    batch_size: Positive | None = None
    stage_weights: str | None = None
    placement: batches.Placement = "auto"
    signal_delay_s: Annotated[int, Field(ge=0)] = 90
    max_num_timeout: Annotated[int, Field(ge=0)] = 100
    setup: tuple[str, ...] = ()
    environment: dict[Variable, str] = Field(default_factory=dict)
    python: str | None = None
    stages: dict[LaterStage, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_together(self) -> ClusterProfile:
        for name in self.sbatch:
            if name in OWN_OPTIONS or name.replace("-", "_") in ClusterProfile.model_fields:
                raise ValueError(f"{name!r} is set by sdwn itself or has a field of its own")
        for names in (GPU_OPTIONS, MEMORY_OPTIONS):
            given = [name for name in names if getattr(self, name)]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} ask for the same thing; give one of them")
        for stage, fields in self.stages.items():
            if own := {"executor", "stages"} & fields.keys():
                raise ValueError(f"stages.{stage}: {sorted(own)[0]} is the profile's own")
            try:
                stage_profile(self, stage)
            except UsageError as error:
                raise ValueError(str(error)) from None
        return self

    def record(self) -> dict[str, Any]:
        """Return the fields that are not the default, for a file that others may read.

        A secret stands there as its name, ``$NAME``: whoever submits has the value in their shell.
        """
        fields = self.model_dump(mode="json", exclude_defaults=True)
        for part in (fields, *fields.get("stages", {}).values()):
            for name, value in part.get("environment", {}).items():
                if is_secret(name, str(value)) and not _REFERENCE.fullmatch(str(value)):
                    part["environment"][name] = f"${name}"
        return fields

    @property
    def secrets(self) -> dict[str, str]:
        """The secrets among the task's variables, which jobs get from the submitting process."""
        found = {name: value for name, value in self.environment.items() if is_secret(name, value)}
        for name, value in found.items():
            if reference := _REFERENCE.fullmatch(value):
                own = reference[1] or reference[2]
                if own not in os.environ:
                    raise UsageError(
                        f"environment: the profile has {own} from your shell, where it is not set "
                        f"(a journal keeps no secrets); set it with: export {own}=..."
                    )
                found[name] = os.environ[own]
        return found

    @property
    def gpu_request(self) -> Counter[str]:
        """The GPUs that a task asks for, counted by kind; the kind is "" where any will do."""
        texts = [self.gpus_per_node] if self.gpus_per_node else []
        texts += [entry.partition(":")[2] or "1" for entry in _split_gres(self.gres)[0]]
        request = Counter[str]()
        for text in texts:  # 4, a100 or a100:4
            match = re.fullmatch(r"(?:(.+):)?(\d+)", text)
            kind, count = (match[1] or "", int(match[2])) if match else (text, 1)
            request[kind] += count
        return request

    @property
    def gives_gpu(self) -> bool:
        """True if a task is given a GPU, by SLURM or by this machine."""
        if self.executor == "slurm":
            return bool(self.gpu_request)
        return bool(local_gpus({**os.environ, **self.environment}))

    @property
    def gpu_kind(self) -> str | None:
        """The name of the GPUs in the request, as ``a100``; None where it asks for any."""
        return next((kind for kind in self.gpu_request if kind), None)

    @property
    def processes(self) -> int:
        """The number of processes that SLURM starts for a task: one for each GPU."""
        return max(1, self.gpu_request.total()) if self.executor == "slurm" else 1

    def require_fit(self, config: RunConfig) -> None:
        """Refuse fp16 where no GPU will be, and a batch size that does not fit the config."""
        if config.needs_gpu and not self.gives_gpu:
            raise UsageError(
                f"precision fp16 needs a GPU, and the profile ({self.executor}) gives none; take "
                "one that asks for a GPU (gres or gpus_per_node), or plan with "
                "--set generation.precision=fp32"
            )
        size, pinned = self.batch_size, config.generation.batch_size
        if size is None:
            return
        reason = batches.off_grid(size, config.images_per_synset)
        # The rows of a table may have other numbers of images.
        if reason and not config.catalog.table:
            raise UsageError(f"batch_size: {reason}")
        if pinned not in (None, size):
            raise UsageError(f"batch_size {size}: the config pins batches of {pinned} images")

    def on_gpu(self, kind: str) -> ClusterProfile:
        """Return the profile with one GPU of a kind in place of what it asks for."""
        if self.gpus_per_node:
            return self.model_copy(update={"gpus_per_node": f"{kind}:1"})
        gpus, others = _split_gres(self.gres)
        if not gpus:
            raise UsageError(
                "--gpus needs a profile that asks for a GPU by gres or gpus_per_node; where your "
                "site names its kinds in another way, tune once for each: --constraint, --partition"
            )
        return self.model_copy(update={"gres": ",".join([f"gpu:{kind}:1", *others])})


def stage_profile(profile: ClusterProfile, stage: LaterStage) -> ClusterProfile:
    """Return a later stage's profile: no GPU, or one to evaluate, and the fields of ``stages``.

    Null in ``stages`` leaves out what the profile asks for.
    """
    # How making images is batched and grouped says nothing about a later stage.
    of_generation = {"stages", "batch_size", "shards_per_task", "placement"}
    fields = profile.model_dump(mode="json", exclude_defaults=True, exclude=of_generation)
    gpus, gres = _split_gres(fields.pop("gres", None))
    if stage == "evaluate":
        # One in place of several, as gpu:a100:1 of gpu:a100:4.
        several, one = re.compile(r"(^|:)\d+$"), r"\g<1>1"
        gres = [*(several.sub(one, entry) for entry in gpus), *gres]
        if "gpus_per_node" in fields:
            fields["gpus_per_node"] = several.sub(one, fields["gpus_per_node"])
    else:
        fields.pop("gpus_per_node", None)
        if by_gpu := fields.pop("mem_per_gpu", None):
            fields["mem"] = by_gpu
    if gres:
        fields["gres"] = ",".join(gres)
    return overridden(fields, profile.stages.get(stage, {}), source=f"stages.{stage}")


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> ClusterProfile:
    """Read a profile by path or shipped name; overrides replace its fields."""
    path = shipped_file("profile", name)
    return overridden(read_yaml(path), overrides or {}, source=str(path))


def overridden(
    content: Mapping[str, Any], overrides: Mapping[str, Any], source: str
) -> ClusterProfile:
    """Replace fields of a profile; of a GPU or memory request, its other spelling, too."""
    fields = dict(content)
    for options in (GPU_OPTIONS, MEMORY_OPTIONS):
        if any(name in overrides for name in options):
            fields = {name: value for name, value in fields.items() if name not in options}
    given = {name: value for name, value in {**fields, **overrides}.items() if value is not None}
    return validated(ClusterProfile, given, source)


# --- How work is cut -----------------------------------------------------------------------------
def group_into_tasks(indices: Sequence[int], profile: ClusterProfile) -> list[tuple[int, ...]]:
    """Group shards into tasks; those of this machine start all at once, so they are few."""
    if profile.executor == "local":
        tasks = min(profile.array_parallelism, len(indices))
        return [tuple(indices[first::tasks]) for first in range(tasks)]
    size = profile.shards_per_task * profile.processes
    return [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]


def split_into_arrays(
    tasks: Sequence[Task], limit: int, at_once: int
) -> list[tuple[Sequence[Task], int]]:
    """Split tasks into arrays of at most ``limit``; return how many of each may run at once, too.

    All arrays end together, so that no share of ``at_once`` is left unused.
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


# --- The script of a job -------------------------------------------------------------------------
def starting_log(jobs: Path, array: str) -> Path:
    """Return the path of an array's log of what goes wrong before a task can write its own."""
    return jobs / f"{array}.log"


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
        # --export also where the job itself was submitted with --export=NONE, or with a list.
        srun = ["srun", "--unbuffered", f"--output={log}.out", f"--error={log}.err", "--export=ALL"]
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
    lines = ["#!/bin/bash"]
    for option, value in options.items():
        if value not in (None, False):
            given = "" if value is True else f"={shlex.quote(str(value))}"
            lines.append(f"#SBATCH --{option.replace('_', '-')}{given}")
    return lines


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
    fields = {
        batches.VARIABLE: profile.batch_size,
        batches.PLACEMENT_VARIABLE: None if profile.placement == "auto" else profile.placement,
        STAGE_VARIABLE: profile.stage_weights,
    }
    values |= {name: shlex.quote(str(value)) for name, value in fields.items() if value}
    return [f"export {name}={value}" for name, value in values.items()]
