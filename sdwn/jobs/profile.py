"""Where tasks run: a site's profile, in SLURM's own words."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdwn.config import Positive, Section, read_yaml, validated
from sdwn.errors import UsageError
from sdwn.paths import shipped_file

PREEMPTION_SIGNAL_S = 90
YEAR_S = 366 * 24 * 3600

# Sites accept different ones; two of them in one request contradict each other.
GPU_OPTIONS = ("gres", "gpus_per_node", "gpus", "gpus_per_task")
GPU_NAMES = ("gpu", "gres/gpu")
MEMORY_OPTIONS = ("mem", "mem_per_cpu", "mem_per_gpu")
MEMORY_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}

# A request for GPUs: how many, of which kind (also of a kind 4090), or both.
GPU_REQUEST = re.compile(r"(\w[\w.-]*:)?[1-9]\d*|[A-Za-z][\w.-]*", re.ASCII)

# What follows the arrays: submit --then. Classifying images takes a GPU, the others none.
LaterStage = Literal["merge", "evaluate", "report"]

# What submitit or sdwn writes into every script.
OWN_OPTIONS = (
    *("array", "error", "job-name", "kill-on-bad-exit", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "requeue", "signal"),
)

# With these sbatch would not give the id of a job of this cluster.
HIDING_OPTIONS = ("clusters", "parsable", "quiet", "test-only", "wait", "wrap")

# Variables that hold a secret, by their names; HF_TOKEN_PATH only names a file of one.
_SECRET_NAME = re.compile(r"(?i)(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|(API)?KEY|KEY_ID)$")
# As hubs write their tokens, and an address with a password in it, as a proxy's.
_SECRET_VALUE = re.compile(r"\b(hf|gh[a-z]|github_pat|glpat|sk)[_-][\w-]{16,}|://[^/@\s]+:[^/@]+@")
# A value that is the shell's own when a run is submitted.
_REFERENCE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable of a profile is to stand in no file; ``$NAME`` is the shell's own.

    >>> [is_secret(*each) for each in (("HF_TOKEN", "x"), ("HF_TOKEN_PATH", "x"), ("A", "$A"))]
    [True, False, True]
    """
    named = _SECRET_NAME.search(name) or _SECRET_VALUE.search(value)
    return _REFERENCE.fullmatch(value) is not None or named is not None


def _recorded(name: str, value: str) -> str:
    """Return what a file that others may read says of a variable."""
    hidden = is_secret(name, value) and not _REFERENCE.fullmatch(value)
    return f"${name}" if hidden else value


class ClusterProfile(Section):
    """A site: the executor, SLURM's own long option names, and the shell around a task.

    ``time`` is SLURM's: minutes, ``MM:SS``, ``HH:MM:SS`` or ``D-HH[:MM[:SS]]``. ``setup`` lines
    run in the job's shell before the task. ``python`` is the command that starts Python there.
    ``sbatch`` holds any other option by its long name (true for a flag). ``array_parallelism``
    is how many tasks may run at once, ``max_submit_jobs`` how many may be in the queue if
    fewer than SLURM takes, ``shards_per_task`` how many shards each GPU of a task makes in
    turn. ``batch_size`` overrides what each task would take by itself.
    ``stage_weights`` is a folder of a node's own disk that weights are copied to once; variables
    in it are the task's. ``stages`` holds what is asked for otherwise for ``merge``,
    ``evaluate`` and ``report``.
    """

    executor: Literal["local", "slurm"] = "slurm"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str = "60"
    nodes: Annotated[int, Field(ge=1, le=1)] = 1  # a task uses one node
    gres: str | None = None
    gpus_per_node: str | None = None
    constraint: str | None = None
    cpus_per_task: Positive | None = None
    mem: str | None = None
    mem_per_cpu: str | None = None
    mem_per_gpu: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    reservation: str | None = None
    wckey: str | None = None
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    array_parallelism: Positive = 256
    max_submit_jobs: Positive | None = None
    shards_per_task: Positive = 1
    batch_size: Positive | None = None
    stage_weights: str | None = None
    signal_delay_s: Annotated[int, Field(ge=0)] = PREEMPTION_SIGNAL_S
    max_num_timeout: Annotated[int, Field(ge=0)] = 100
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    stages: dict[LaterStage, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("time", "gpus_per_node", "mem", "mem_per_cpu", "mem_per_gpu", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("time", *MEMORY_OPTIONS)
    @classmethod
    def _known_amount(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None:
            (minutes if info.field_name == "time" else megabytes)(text)
        return text

    @field_validator("*")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        # A line break in a value would become a line of the script.
        texts = [value] if isinstance(value, str) else []
        texts += [str(v) for v in value.values()] if isinstance(value, dict) else []
        texts += value if isinstance(value, tuple) else []
        for text in texts:
            if not text.isprintable():
                raise ValueError(f"expected one line of text, found {text!r}")
        return value

    @field_validator("environment")
    @classmethod
    def _variable_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return environment

    @field_validator("sbatch")
    @classmethod
    def _other_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise ValueError(f"{name!r} is no long option of sbatch, as mail-type")
            if name.replace("-", "_") in GPU_OPTIONS:
                if not GPU_REQUEST.fullmatch(str(value)) or value is True:
                    raise ValueError(f"{name}: expected 1, a100 or a100:1, found {value!r}")
                if _kind_and_count(str(value))[1] > 1:
                    raise ValueError(f"{name}: give several GPUs by gpus_per_node or gres")
            if name in HIDING_OPTIONS:
                raise ValueError(f"{name!r} would hide the job's id from sdwn; leave it out")
            if name in OWN_OPTIONS or name.replace("-", "_") in cls.model_fields:
                raise ValueError(f"{name!r} is set by sdwn itself or has a field of its own")
        return options

    @field_validator("gpus_per_node")
    @classmethod
    def _some_gpus(cls, request: str | None) -> str | None:
        if request is not None and not GPU_REQUEST.fullmatch(request):
            raise ValueError(f"expected a number of GPUs as 4, a100 or a100:4, found {request!r}")
        return request

    @field_validator("gres")
    @classmethod
    def _some_gres(cls, request: str | None) -> str | None:
        for entry in [] if request is None else request.split(","):
            sound = re.fullmatch(r"[A-Za-z][\w/-]*(:[^\s:]+){0,2}", entry)
            number = entry.partition(":")[2] or "1"
            if not sound or (_is_gpu(entry) and not GPU_REQUEST.fullmatch(number)):
                raise ValueError(f"expected gpu:4, gpu:a100:4, joined by commas, found {entry!r}")
        return request

    @model_validator(mode="after")
    def _one_spelling(self) -> ClusterProfile:
        for names in (GPU_OPTIONS, MEMORY_OPTIONS):
            given = [name for name in names if getattr(self, name, None)]
            given += [f"sbatch.{name}" for name in self.sbatch if name.replace("-", "_") in names]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} ask for the same thing; give one of them")
        return self

    @model_validator(mode="after")
    def _sound_stages(self) -> ClusterProfile:
        for stage, fields in self.stages.items():
            if own := {"executor", "stages"} & fields.keys():
                raise ValueError(f"stages.{stage}: {sorted(own)[0]} is the profile's own")
            try:
                stage_profile(self, stage)
            except UsageError as error:
                raise ValueError(str(error)) from None
        return self

    def record(self) -> dict[str, Any]:
        """Return what is not as by default, for a file that others may read.

        Of a secret that is its name, as ``$NAME``: whoever submits has the value in their shell.
        """
        fields = self.model_dump(mode="json", exclude_defaults=True)
        for part in (fields, *fields.get("stages", {}).values()):
            if variables := part.get("environment"):
                part["environment"] = {n: _recorded(n, str(v)) for n, v in variables.items()}
        return fields

    @property
    def secrets(self) -> dict[str, str]:
        """The secrets among the task's variables, which jobs get from the submitting process.

        Raises:
            UsageError: one is the shell's own, and not set there.
        """
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
    def processes(self) -> int:
        """How many processes SLURM starts for a task: one for each GPU."""
        return max(1, sum(self.gpu_request.values())) if self.executor == "slurm" else 1

    @property
    def shards_in_task(self) -> int:
        """How many shards all processes of a task make together."""
        return self.shards_per_task * self.processes

    @property
    def gpu_kind(self) -> str | None:
        """What the request for GPUs calls them, as ``a100``; None where it asks for any."""
        return next((kind for kind in self.gpu_request if kind), None)

    @property
    def gpu_request(self) -> dict[str, int]:
        """How many GPUs of each kind a task asks for; the kind is "" where any will do."""
        texts = [self.gpus_per_node] if self.gpus_per_node else []
        texts += [str(v) for n, v in self.sbatch.items() if n.replace("-", "_") in GPU_OPTIONS]
        gres = (self.gres or "").split(",")
        texts += [entry.partition(":")[2] or "1" for entry in gres if _is_gpu(entry)]
        request: dict[str, int] = {}
        for kind, count in map(_kind_and_count, texts):
            request[kind] = request.get(kind, 0) + count
        return request

    def on_gpu(self, kind: str) -> ClusterProfile:
        """Ask for one GPU of a kind in the place of what is asked for.

        Raises:
            UsageError: the profile asks for no GPU that a kind could be given of.
        """
        if self.gpus_per_node:
            return self.model_copy(update={"gpus_per_node": f"{kind}:1"})
        entries = (self.gres or "").split(",")
        if not any(map(_is_gpu, entries)):
            raise UsageError(
                "--gpus needs a profile that asks for a GPU by gres or gpus_per_node; where your "
                "site tells them apart otherwise, tune once for each: --constraint, --partition"
            )
        others = [entry for entry in entries if not _is_gpu(entry)]
        return self.model_copy(update={"gres": ",".join([f"gpu:{kind}:1", *others])})

    @property
    def asks_for_gpu(self) -> bool:
        """Whether a task will see a GPU that SLURM gave it."""
        return bool(self.gpu_request)


# A profile's own words on making images.
_OF_GENERATION = {"stages", "batch_size", "shards_per_task"}


def stage_profile(profile: ClusterProfile, stage: LaterStage) -> ClusterProfile:
    """Give what a later stage asks for: no GPU, or one to evaluate, and what ``stages`` says.

    How making images is batched and dealt out says nothing of it. Null in ``stages`` leaves out
    what the profile asks for.

    Raises:
        UsageError: ``stages`` asks for something impossible.
    """
    fields = profile.model_dump(mode="json", exclude_defaults=True, exclude=_OF_GENERATION)
    fields = _with_gpus(fields, 1 if stage == "evaluate" else 0)
    own = profile.stages.get(stage, {})
    return overridden(fields, own, source=f"stages.{stage}")


def _with_gpus(fields: dict[str, Any], count: int) -> dict[str, Any]:
    """Lower what is asked for to one GPU of the same kind, or to none."""
    fields = {**fields, "sbatch": dict(fields.get("sbatch", {}))}
    entries = [entry for entry in fields.pop("gres", "").split(",") if entry]
    asked = str(fields.pop("gpus_per_node", ""))
    if count:
        entries = [_single(entry) if _is_gpu(entry) else entry for entry in entries]
        fields |= {"gpus_per_node": _single(asked)} if asked else {}
    else:
        entries = [entry for entry in entries if not _is_gpu(entry)]
        others = fields["sbatch"].items()
        fields["sbatch"] = {k: v for k, v in others if k.replace("-", "_") not in GPU_OPTIONS}
        if by_gpu := fields.pop("mem_per_gpu", None):
            fields["mem"] = by_gpu
    return fields | ({"gres": ",".join(entries)} if entries else {})


def _single(request: str) -> str:
    """Ask for one GPU instead of several.

    >>> [_single(text) for text in ("4", "a100:4", "gpu:a100", "gpu:a100:2", "gpu:2")]
    ['1', 'a100:1', 'gpu:a100', 'gpu:a100:1', 'gpu:1']
    """
    kind, colon, number = request.rpartition(":")
    return f"{kind}{colon}1" if number.isdecimal() else request


def _is_gpu(entry: str) -> bool:
    return entry.partition(":")[0].strip() in GPU_NAMES


def _kind_and_count(request: str) -> tuple[str, int]:
    """Read of what kind of GPU, if it says, and how many SLURM is asked for; 1 without a number.

    >>> [_kind_and_count(text) for text in ("4", "a100:4", "a100")]
    [('', 4), ('a100', 4), ('a100', 1)]
    """
    first, colon, _ = request.partition(":")
    number = request.rpartition(":")[2]
    count = int(number) if number.isdecimal() else 1
    return ("" if first.isdecimal() and not colon else first), count


def megabytes(text: str) -> float:
    """Read an amount of memory as SLURM does: MB without a unit; 0 is all that a node has.

    >>> [megabytes(text) for text in ("2G", "500", "1tb", "2048K", "0")]
    [2048.0, 500.0, 1048576.0, 2.0, 0.0]

    Raises:
        ValueError: sbatch would refuse it.
    """
    match = re.fullmatch(r"(\d+)(?:([KMGT])B?)?", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError(f"expected memory as 16G, 1500M or 16000 (MB), found {text!r}")
    return float(match[1]) * MEMORY_UNITS[(match[2] or "M").upper()]


def minutes(text: str) -> int:
    """Read a SLURM time limit as whole minutes, rounded up.

    >>> [minutes(text) for text in ("90", "1:30", "2:00:00", "1-12", "1-00:30:00")]
    [90, 2, 120, 2160, 1470]
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"expected a SLURM time such as 90, 2:00:00 or 1-12:00:00, found {text!r}")
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None:
        seconds = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        seconds = (first or 0) * 60 + (second or 0)
    if not 0 < seconds <= YEAR_S:
        raise ValueError(f"expected a time limit of up to a year, found {text!r}")
    return math.ceil(seconds / 60)


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> ClusterProfile:
    """Read a profile by path or shipped name; overrides replace its fields."""
    path = shipped_file("profile", name)
    return overridden(read_yaml(path), overrides or {}, source=str(path))


def overridden(
    content: Mapping[str, Any], overrides: Mapping[str, Any], source: str
) -> ClusterProfile:
    """Replace fields of a profile.

    An override of one spelling of a GPU or memory request replaces the profile's other one.
    """
    fields = dict(content)
    for options in (GPU_OPTIONS, MEMORY_OPTIONS):
        if any(name in overrides for name in options):
            fields = {name: value for name, value in fields.items() if name not in options}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in overrides.items())
    where = f"{source} with {flags}" if flags else source
    merged = {**fields, **overrides}
    given = {name: value for name, value in merged.items() if value is not None}
    return validated(ClusterProfile, given, source=where)
