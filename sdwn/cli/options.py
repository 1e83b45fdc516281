"""Arguments and options that several commands have, and the configs and profiles they name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer import Argument, Option

from sdwn.cli.folders import require_kind

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.jobs.profile import ClusterProfile

Config = Annotated[str, Argument(metavar="CONFIG", help="A config file, or a shipped one's name.")]


def _expect(wanted: Literal["run", "release"]) -> Callable[[typer.Context, Any], Any]:
    """Return a check of an argument: folders of another kind are refused."""

    def check(context: typer.Context, value: Any) -> Any:
        for folder in value if isinstance(value, list) else [value]:
            require_kind(wanted, str(context.info_name), folder)
        return value

    return check


Run = Annotated[Path, Argument(metavar="RUN", help="The run's folder.", callback=_expect("run"))]
Runs = Annotated[
    list[Path],
    Argument(metavar="RUN...", help="Run folders of the same plan.", callback=_expect("run")),
]
ReleaseFolder = Annotated[
    Path, Argument(metavar="RELEASE", help="The release's folder.", callback=_expect("release"))
]
EvaluationName = Annotated[str | None, Option(help="An evaluation's name; default: the latest.")]
SynsetName = Annotated[str, Argument(metavar="SYNSET", help="By name, wnid or lemma.")]
Override = Annotated[
    list[str] | None,
    Option("--set", help="Override a setting: key=value, as in generation.batch_size=20."),
]
Profile = Annotated[str, Option(help="A profile file, or the name of a shipped one.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
Wait = Annotated[bool, Option("--wait", help="Follow the tasks to the end.")]
Then = Annotated[
    str | None, Option(help="Stages to queue behind all tasks: some of merge,evaluate,report.")
]
Force = Annotated[bool, Option("--force", help="Submit even where sdwn doctor finds a problem.")]
Retries = Annotated[int, Option(min=0, help="With --wait: how often to submit again what failed.")]
Model = Annotated[
    str | None,
    Option(help="paper (ViT-H/14), efficientnet-lite0, any timm model; default: the config's."),
]
Checkpoint = Annotated[Path | None, Option(help="Weights: safetensors, or a torch state dict.")]

PartSize = Annotated[
    float,
    Option(
        min=1e-6, max=1e6, help="Minimum size of a part, in GB; parts are less than twice as large."
    ),
]

# A profile's fields that SLURM has a flag of the same name for, then sdwn's own.
SITE = {
    "account": "Account to charge.",
    "partition": "Partition, or several joined by commas.",
    "qos": "Quality of service.",
    "time": "Time limit of a task.",
    "nodes": "Nodes of a task: 1.",
    "gres": "Generic resources, as gpu:a100:1.",
    "gpus_per_node": "GPUs, where the site wants this spelling.",
    "constraint": "Features that a node must have.",
    "cpus_per_task": "CPUs of a task.",
    "mem": "Memory of a task, as 32G.",
    "mem_per_cpu": "Memory for each CPU.",
    "mem_per_gpu": "Memory for each GPU.",
    "exclude": "Nodes to avoid.",
    "nodelist": "Nodes to use.",
    "reservation": "Reservation to use.",
    "wckey": "Workload characterization key.",
    "array_parallelism": "Tasks that may run at once.",
    "max_submit_jobs": "Jobs that may be in the queue; default: as many as SLURM takes.",
    "shards_per_task": "Shards that each GPU of a task makes in turn.",
    "batch_size": "Images a batch, whatever a GPU profile says.",
    "stage_weights": "Folder of a node's own disk that weights are copied to once.",
}
PANEL = "Instead of the profile's"


def open_config(config: str, overrides: list[str] | None) -> RunConfig:
    """Read a config file, or a shipped one, with overrides."""
    from sdwn.config import load_config
    from sdwn.paths import shipped_file

    return load_config(shipped_file("config", config), tuple(overrides or ()))


def open_profile(name: str, site: dict[str, str]) -> ClusterProfile:
    """Read a site's profile, or a shipped one, with its fields replaced by flags."""
    from sdwn.jobs.profile import load_profile

    return load_profile(name, site)


def with_site(command: Callable[..., None]) -> Callable[..., None]:
    """Add a flag to a command for each field of a profile; they are passed on as ``site``."""
    hints = get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in SITE}
        site = {name: value for name, value in given.items() if value is not None}
        command(**arguments, site=site)

    # typer reads the signature: the command's own parameters, then a flag for each field.
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "site"
    ]
    for name, text in SITE.items():
        flag = Annotated[str | None, Option(help=text, rich_help_panel=PANEL)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)
        )
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
    return wrapped
