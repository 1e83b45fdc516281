"""Arguments and options that several commands have; the folders, configs and profiles they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from sdwn.errors import UsageError, command
from sdwn.paths import (
    EvaluationPaths,
    ReleasePaths,
    RunPaths,
    release_above,
    shipped_file,
    work_paths,
)

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.planning.plan import Plan, ShardedWork
    from sdwn.releases.release import Release

Kind = Literal["run", "release", "evaluation", "work", "sweep"]
# Commands that take the work of an evaluation, or of features, as they take a run.
FOLLOWING = ("status", "logs", "cancel")
# Commands that do each cell of a sweep where it takes the place of a run or a release.
SWEEPING = (
    "prefetch pilot doctor submit retry cancel logs merge verify evaluate features measure "
    "transfer duplicates report"
).split()
# How messages name a folder of a kind, and the commands that take one beside those of its kind.
_NAMED: dict[Kind, tuple[str, Sequence[str]]] = {
    "run": ("a run", ()),
    "release": ("a release", ()),
    "evaluation": ("an evaluation", ()),
    "work": ("the work of an evaluation or of features", FOLLOWING),
    "sweep": ("a sweep", (*SWEEPING, "status", "run")),
}


def kind_of(folder: Path) -> Kind | None:
    """Return a folder's kind, by its files: a run, a release, an evaluation, its work, a sweep."""
    from sdwn.prediction.plan import is_image_work

    if ReleasePaths(folder).manifest.exists():
        return "release"
    if RunPaths(folder).plan.exists():
        return "work" if is_image_work(folder) else "run"
    if RunPaths(folder).sweep.exists():
        return "sweep"
    evaluation = EvaluationPaths(folder)
    return "evaluation" if evaluation.evaluation.exists() or evaluation.work.plan.exists() else None


def _expect(wanted: Literal["run", "release"]) -> Callable[[typer.Context, Any], Any]:
    """Return a check of an argument that refuses folders of another kind."""

    def check(context: typer.Context, value: Any) -> Any:
        name = str(context.info_name)
        for folder in value if isinstance(value, list) else [value]:
            kind = kind_of(folder)
            if kind is None or kind == wanted or name in _NAMED[kind][1]:
                continue
            raise UsageError(
                f"{folder} is {_NAMED[kind][0]}, and sdwn {name} takes a {wanted}; "
                f"use: {_command_for(kind, wanted, name, folder)}"
            )
        return value

    return check


def _command_for(kind: Kind, wanted: str, name: str, folder: Path) -> str:
    """Return the command for this kind of folder that does what the user meant."""
    whole, release = folder.absolute(), RunPaths(folder).release
    if kind == "sweep":
        cell = folder / "CELL" / ("release" if wanted == "release" else "")
        return command(name, cell) if name != "plan" else command("sweep", "SWEEP", folder)
    if kind == "run":
        merged = kind_of(release) == "release"
        return command(name, release) if merged else command("merge", folder, "--release", release)
    if kind == "release":
        if name in ("plan", "run", "extend", "merge"):
            return "a folder of its own" if name != "merge" else "the folders of its runs"
        inside = kind_of(whole.parent) == "run"
        return command(name, whole.parent) if inside else command("browse", folder)
    evaluation = whole.parent if kind == "work" else whole
    if name in FOLLOWING:
        return command(name, evaluation / "work")
    verb = "features" if evaluation.parent.name == "features" else "evaluate"
    one = ["--evaluation", evaluation.name] * (name in ("report", "browse", "show"))
    return command(name if wanted == "release" else verb, release_above(evaluation), *one)


def run_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of a sweep's cells, by their names."""
    from sdwn.planning.sweep import read_sweep

    return {cell.name: folder / cell.name for cell in read_sweep(folder).cells}


def open_run(run: Path) -> tuple[RunPaths, Plan]:
    """Read a run's plan."""
    from sdwn.planning.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def open_release(folder: Path) -> Release:
    """Open a finished release."""
    from sdwn.releases.release import Release

    return Release(folder)


def open_sharded(folder: Path) -> tuple[RunPaths, ShardedWork]:
    """Read what a folder's tasks work on: the plan of a run, of an evaluation, or of features."""
    from sdwn.prediction.plan import is_image_work, read_image_plan

    if not is_image_work(folder):
        return open_run(folder)
    paths = work_paths(folder)
    return paths, read_image_plan(paths)


def require_savable(
    save: Path, release: Path, endings: tuple[str, ...], option: str = "--save"
) -> None:
    """Refuse a file to write that is of another format, or inside the release."""
    if save.suffix.lower() not in endings:
        valid = " or ".join(endings)
        raise UsageError(f"{option} {save}: expected a file name that ends in {valid}")
    if release.resolve() in save.resolve().parents:
        raise UsageError(f"{option} {save}: it lies in the release; choose another path")


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
FeaturesName = Annotated[
    str | None, Option("--features", help="Name of the features; default: those that there are.")
]
Override = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Change a setting, as generation.batch_size=20."),
]
Profile = Annotated[
    str, Option(metavar="PROFILE", help="Where tasks run: a file, or a shipped profile's name.")
]
MaybeProfile = Annotated[
    str | None, Option(metavar="PROFILE", help="Where tasks run; default: no tasks, here.")
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
Wait = Annotated[bool, Option("--wait", help="Follow the tasks to the end.")]
Then = Annotated[
    str | None,
    Option(metavar="STAGES", help="Queue behind the tasks: some of merge,evaluate,report."),
]
Force = Annotated[bool, Option("--force", help="Submit even where sdwn doctor finds a problem.")]
Retries = Annotated[int, Option(min=0, help="With --wait: how often failed tasks start again.")]
Model = Annotated[str | None, Option(help="paper (ViT-H/14), efficientnet-lite0, any timm model.")]
Checkpoint = Annotated[Path | None, Option(help="Its weights: safetensors or a torch state dict.")]
PartSize = Annotated[
    float, Option(metavar="GB", min=0, max=1e6, help="Minimum size of a part, in GB.")
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
    "placement": "Where weights lie: auto, gpu or offload.",
}
PANEL = "Instead of what the profile says"


def open_config(config: str, overrides: list[str] | None) -> RunConfig:
    """Read a config file, or a shipped one, with overrides."""
    from sdwn.config import load_config

    return load_config(shipped_file("config", config), tuple(overrides or ()))


def open_profile(
    name: str, site: dict[str, str], config: RunConfig | None = None
) -> ClusterProfile:
    """Read a profile, its fields replaced by flags; refuse one that a config does not fit."""
    from sdwn.jobs.profile import load_profile

    found = load_profile(name, site)
    if config is not None:
        found.require_fit(config)
    return found
