"""Arguments and options that several commands have; the folders, configs and profiles they name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer import Argument, Option

from sdwn.errors import UsageError, command

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Plan
    from sdwn.planning.work import ShardedWork

Kind = Literal["run", "release", "evaluation", "work"]
# Commands that take the work of an evaluation as they take a run.
FOLLOWING = ("status", "logs", "cancel")


# Folders: a command refuses one of another kind, and names the command that takes it


def kind_of(folder: Path) -> Kind | None:
    """Return a folder's kind, by its files: a run, a release, an evaluation of one, or its work."""
    from sdwn.paths import EvaluationPaths, ReleasePaths, RunPaths
    from sdwn.prediction.plan import is_prediction_work

    if ReleasePaths(folder).manifest.exists():
        return "release"
    if RunPaths(folder).plan.exists():
        return "work" if is_prediction_work(folder) else "run"
    evaluation = EvaluationPaths(folder)
    return "evaluation" if evaluation.evaluation.exists() or evaluation.work.plan.exists() else None


def _expect(wanted: Literal["run", "release"]) -> Callable[[typer.Context, Any], Any]:
    """Return a check of an argument: folders of another kind are refused."""

    def check(context: typer.Context, value: Any) -> Any:
        name = str(context.info_name)
        for folder in value if isinstance(value, list) else [value]:
            kind = kind_of(folder)
            if kind in (None, wanted) or (kind == "work" and wanted == "run" and name in FOLLOWING):
                continue
            what = {"work": "the work of an evaluation", "evaluation": "an evaluation"}
            raise UsageError(
                f"{folder} is {what.get(str(kind), f'a {kind}')}, and sdwn {name} takes a "
                f"{wanted}; use: {_command_for(kind, wanted, name, folder)}"
            )
        return value

    return check


def _command_for(kind: Kind | None, wanted: str, name: str, folder: Path) -> str:
    """Return the command for this kind of folder that does what the user meant."""
    from sdwn.paths import RunPaths

    if kind == "run":
        release = RunPaths(folder).release
        merged = kind_of(release) == "release"
        return command(name, release) if merged else command("merge", folder, "--release", release)
    if kind == "release":
        # A run was meant: the one that the release lies in.
        if name in ("plan", "run"):
            return "a folder of its own"
        run = folder.absolute().parent
        if name != "merge" and kind_of(run) == "run":
            return command(name, run)
        return f"{command('verify', folder)}, or {command('browse', folder)}"
    evaluation = folder.absolute().parent if kind == "work" else folder.absolute()
    if name in FOLLOWING and kind_of(evaluation / "work") == "work":
        return command(name, evaluation / "work")
    one = ["--evaluation", evaluation.name] * (name in ("report", "browse", "show"))
    release = evaluation.parent.parent
    return command(name if wanted == "release" else "evaluate", release, *one)


def open_run(run: Path) -> tuple[RunPaths, Plan]:
    """Read a run's plan."""
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def open_sharded(folder: Path) -> tuple[RunPaths, ShardedWork]:
    """Read what a folder's tasks work on: a run's plan, or the plan of an evaluation's work."""
    from sdwn.paths import work_paths
    from sdwn.prediction.plan import is_prediction_work, read_prediction_plan

    if not is_prediction_work(folder):
        return open_run(folder)
    paths = work_paths(folder)
    return paths, read_prediction_plan(paths)


def require_savable(save: Path, release: Path, endings: tuple[str, ...]) -> None:
    """Check the path of ``--save``.

    Raises:
        UsageError: it names no file, a file in the release, or another format.
    """
    reason = None
    if save.suffix.lower() not in endings:
        reason = f"expected a file name that ends in {' or '.join(endings)}"
    elif not save.parent.is_dir():
        reason = "expected a file in a folder that exists"
    elif save.is_symlink() or (save.exists() and not save.is_file()):
        reason = "expected a file or nothing there"
    elif release.resolve() in save.resolve().parents:
        reason = "it lies in the release; choose another path"
    if reason:
        raise UsageError(f"--save {save}: {reason}")


# Arguments and options

Config = Annotated[str, Argument(metavar="CONFIG", help="A config file, or a shipped one's name.")]
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
    Option("--set", metavar="KEY=VALUE", help="Change a setting, as generation.batch_size=20."),
]
Profile = Annotated[
    str, Option(metavar="PROFILE", help="Where tasks run: a file, or a shipped profile's name.")
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
Wait = Annotated[bool, Option("--wait", help="Follow the tasks to the end.")]
Then = Annotated[
    str | None,
    Option(metavar="STAGES", help="Queue behind the tasks: some of merge,evaluate,report."),
]
Force = Annotated[bool, Option("--force", help="Submit even where sdwn doctor finds a problem.")]
Retries = Annotated[int, Option(min=0, help="With --wait: how often failed tasks start again.")]
Model = Annotated[
    str | None,
    Option(help="Classifier: paper (ViT-H/14), efficientnet-lite0, any timm model."),
]
Checkpoint = Annotated[
    Path | None, Option(help="The classifier's weights: safetensors or a torch state dict.")
]
PartSize = Annotated[
    float, Option(metavar="GB", min=1e-6, max=1e6, help="Minimum size of a part, in GB.")
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
    "max_submit_jobs": "Jobs that may be in the queue at once.",
    "shards_per_task": "Shards that each GPU of a task makes in turn.",
    "batch_size": "Images a batch, whatever a GPU profile says.",
    "stage_weights": "Folder of a node's own disk for weights.",
}
PANEL = "Instead of what the profile says"


def open_config(config: str, overrides: list[str] | None) -> RunConfig:
    """Read a config file, or a shipped one, with overrides."""
    from sdwn.config import load_config
    from sdwn.paths import shipped_file

    return load_config(shipped_file("config", config), tuple(overrides or ()))


def open_profile(name: str, site: dict[str, str]) -> ClusterProfile:
    """Read a site's profile, or a shipped one, with its fields replaced by flags."""
    from sdwn.jobs.profile import load_profile

    return load_profile(name, site)


def with_site(function: Callable[..., None]) -> Callable[..., None]:
    """Add a flag to a command for each field of a profile; they are passed on as ``site``."""
    hints = get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in SITE}
        site = {name: value for name, value in given.items() if value is not None}
        function(**arguments, site=site)

    # typer reads the signature: the command's own parameters, then a flag for each field.
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "site"
    ]
    for name, text in SITE.items():
        flag = Annotated[str | None, Option(metavar="VALUE", help=text, rich_help_panel=PANEL)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)
        )
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
    return wrapped
