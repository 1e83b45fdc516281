"""A site's profile: where tasks run, in SLURM's own words."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from sdwn.batches import Placement
from sdwn.config import Positive, Section, read_yaml, validated
from sdwn.errors import UsageError
from sdwn.paths import shipped_file

# Sites accept different ones; two of them in one request contradict each other.
GPU_OPTIONS = ("gres", "gpus_per_node", "gpus", "gpus_per_task")
MEMORY_OPTIONS = ("mem", "mem_per_cpu", "mem_per_gpu")

# What follows the arrays: submit --then. Classifying images takes a GPU, the others none.
LaterStage = Literal["merge", "evaluate", "report"]

# The fields that are sbatch's own options.
SBATCH_FIELDS = (
    *("account", "constraint", "cpus_per_task", "exclude", "gpus_per_node", "gres", "mem"),
    *("mem_per_cpu", "mem_per_gpu", "nodelist", "nodes", "partition", "qos", "reservation"),
    "wckey",
)
# What sdwn writes into every script, and what would hide the id of a job of this cluster.
OWN_OPTIONS = (
    *("array", "error", "job-name", "kill-on-bad-exit", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "requeue", "signal"),
    *("clusters", "parsable", "quiet", "test-only", "wait", "wrap"),
)

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


def minutes(text: str) -> int:
    """Read a SLURM time limit as whole minutes, rounded up.

    >>> [minutes(text) for text in ("90", "1:30", "2:00:00", "1-12", "1-00:30:00")]
    [90, 2, 120, 2160, 1470]
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"expected a SLURM time such as 90, 2:00:00 or 1-12:00:00, found {text!r}")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] or match[4]:  # days-hours:minutes:seconds, hours:minutes:seconds
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    else:  # minutes:seconds
        seconds = first * 60 + second
    if not 0 < seconds <= 366 * 24 * 3600:
        raise ValueError(f"expected a time limit of up to a year, found {text!r}")
    return math.ceil(seconds / 60)


# What fields hold

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


def _check_time(text: str) -> str:
    minutes(text)
    return text


# In YAML a number needs no quotes.
_Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Time = Annotated[_Text, AfterValidator(_check_time)]
Memory = Annotated[_Text, _matching(r"\d+([KMGT]B?)?", "memory as 16G, 1500M or 16000 (MB)")]
Gpus = Annotated[_Text, _matching(_GPUS, "a number of GPUs as 4, a100 or a100:4")]
Gres = Annotated[str, _matching(rf"{_GRES}(,{_GRES})*", "gpu:4, gpu:a100:4, joined by commas")]


def _kind_and_count(request: str) -> tuple[str, int]:
    """Return which kind of GPU a request names, "" for any, and how many; 1 without a number.

    >>> [_kind_and_count(text) for text in ("4", "a100:4", "a100")]
    [('', 4), ('a100', 4), ('a100', 1)]
    """
    first, colon, _ = request.partition(":")
    number = request.rpartition(":")[2]
    count = int(number) if number.isdecimal() else 1
    return ("" if first.isdecimal() and not colon else first), count


def _split_gres(gres: str | None) -> tuple[list[str], list[str]]:
    """Split a value of gres into entries that ask for GPUs, and others."""
    entries = [entry for entry in (gres or "").split(",") if entry]
    gpus = [entry for entry in entries if re.match(_GPU_ENTRY, entry)]
    return gpus, [entry for entry in entries if entry not in gpus]


def _one_gpu(request: str) -> str:
    """Return a request for one GPU in place of several.

    >>> [_one_gpu(text) for text in ("4", "a100:4", "gpu:a100", "gpu:a100:2", "gpu:2")]
    ['1', 'a100:1', 'gpu:a100', 'gpu:a100:1', 'gpu:1']
    """
    return re.sub(r"(^|:)\d+$", r"\g<1>1", request)


class ClusterProfile(Section):
    """A site: the executor, SLURM's own long option names, and the shell around a task.

    ``time`` is SLURM's: minutes, ``MM:SS``, ``HH:MM:SS`` or ``D-HH[:MM[:SS]]``. ``setup`` lines
    run in the job's shell before the task. ``python`` is the command that starts Python there.
    ``sbatch`` holds any other option by its long name (true for a flag). ``array_parallelism``
    is how many tasks may run at once, ``max_submit_jobs`` how many may be in the queue if
    fewer than SLURM takes, ``shards_per_task`` how many shards each GPU of a task makes in
    turn. ``batch_size`` overrides what each task would take by itself.
    ``stage_weights`` is a folder of a node's own disk that weights are copied to once; variables
    in it are the task's. ``placement`` is where weights lie while images are sampled: on the GPU,
    or each part there only while it works (``offload``); ``auto`` takes what fits.
    ``stages`` holds the fields that differ for ``merge``,
    ``evaluate`` and ``report``.
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
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    array_parallelism: Positive = 256
    max_submit_jobs: Positive | None = None
    shards_per_task: Positive = 1
    batch_size: Positive | None = None
    stage_weights: str | None = None
    placement: Placement = "auto"
    signal_delay_s: Annotated[int, Field(ge=0)] = 90
    max_num_timeout: Annotated[int, Field(ge=0)] = 100
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    stages: dict[LaterStage, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("*")
    @classmethod
    def _check_one_line(cls, value: Any) -> Any:
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
    def _check_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return environment

    @field_validator("sbatch")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise ValueError(f"{name!r} is no long option of sbatch, as mail-type")
            if name.replace("-", "_") in GPU_OPTIONS:
                if not re.fullmatch(_GPUS, str(value), re.ASCII) or value is True:
                    raise ValueError(f"{name}: expected 1, a100 or a100:1, found {value!r}")
                if _kind_and_count(str(value))[1] > 1:
                    raise ValueError(f"{name}: give several GPUs by gpus_per_node or gres")
            if name in OWN_OPTIONS or name.replace("-", "_") in cls.model_fields:
                raise ValueError(f"{name!r} is set by sdwn itself or has a field of its own")
        return options

    @model_validator(mode="after")
    def _check_together(self) -> ClusterProfile:
        for names in (GPU_OPTIONS, MEMORY_OPTIONS):
            given = [name for name in names if getattr(self, name, None)]
            given += [f"sbatch.{name}" for name in self.sbatch if name.replace("-", "_") in names]
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
        """How many GPUs of each kind a task asks for; the kind is "" where any will do."""
        texts = [self.gpus_per_node] if self.gpus_per_node else []
        texts += [str(v) for n, v in self.sbatch.items() if n.replace("-", "_") in GPU_OPTIONS]
        texts += [entry.partition(":")[2] or "1" for entry in _split_gres(self.gres)[0]]
        request = Counter[str]()
        for kind, count in map(_kind_and_count, texts):
            request[kind] += count
        return request

    @property
    def asks_for_gpu(self) -> bool:
        """Whether a task will see a GPU that SLURM gave it."""
        return bool(self.gpu_request)

    @property
    def gpu_kind(self) -> str | None:
        """What the request for GPUs calls them, as ``a100``; None where it asks for any."""
        return next((kind for kind in self.gpu_request if kind), None)

    @property
    def processes(self) -> int:
        """How many processes SLURM starts for a task: one for each GPU."""
        return max(1, self.gpu_request.total()) if self.executor == "slurm" else 1

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
        gres = [*map(_one_gpu, gpus), *gres]
        if "gpus_per_node" in fields:
            fields["gpus_per_node"] = _one_gpu(fields["gpus_per_node"])
    else:
        fields.pop("gpus_per_node", None)
        options = fields.get("sbatch", {}).items()
        fields["sbatch"] = {n: v for n, v in options if n.replace("-", "_") not in GPU_OPTIONS}
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
    """Replace fields of a profile.

    An override of one spelling of a GPU or memory request replaces the profile's other one.
    """
    fields = dict(content)
    for options in (GPU_OPTIONS, MEMORY_OPTIONS):
        if any(name in overrides for name in options):
            fields = {name: value for name, value in fields.items() if name not in options}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in overrides.items())
    where = f"{source} with {flags}" if flags else source
    given = {name: value for name, value in {**fields, **overrides}.items() if value is not None}
    return validated(ClusterProfile, given, source=where)
