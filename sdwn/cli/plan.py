"""The commands before a run: plan, prefetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from sdwn.cli import console
from sdwn.cli.folders import open_run
from sdwn.cli.options import AsJson, Config, Override, Run, open_config, open_profile
from sdwn.errors import UsageError, command


def plan_command(
    config: Config,
    run: Run,
    profile: Annotated[str | None, Option(help="For the estimate; not in the plan.")] = None,
    set_: Override = None,
    slice_: Annotated[
        str | None,
        Option("--slice", help="Only this share of the shards, as 2/3; others elsewhere."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's plan, and estimate what it takes.

    Reads the config and WordNet. A folder that holds the same plan is left as it is.
    """
    chosen = open_profile(profile, {}) if profile else None
    from sdwn.planning.plan import plan_summary
    from sdwn.planning.work import WHOLE, parse_slice
    from sdwn.preflight.estimate import estimate, estimate_rows
    from sdwn.workflow.plan_run import plan_run

    share = WHOLE if slice_ is None else parse_slice(slice_)
    plan, paths = plan_run(open_config(config, set_), run, console, share)
    counts = {**plan_summary(plan), "run": str(paths.root)}
    takes = estimate(paths, plan, [shard.index for shard in plan.assigned_shards], chosen)
    values = {**counts, "estimate": takes.as_dict()}
    console.result(values, as_json, console.rows({**counts, **estimate_rows(takes)}))


def prefetch_command(
    target: Annotated[
        str,
        Argument(
            metavar="CONFIG|RUN", help="A config, as for plan, or the folder of a planned run."
        ),
    ],
    folder: Annotated[
        Path | None, Option(help="Folder for the weights, if tasks do not see the hub's cache.")
    ] = None,
    classifier: Annotated[
        bool, Option("--classifier/--no-classifier", help="Get the classifier too.")
    ] = True,
    set_: Override = None,
    as_json: AsJson = False,
) -> None:
    """Download weights, classifier and WordNet where the network is.

    A planned run is locked to the weights' commit. Afterwards no network is needed.
    """
    from sdwn.paths import RunPaths
    from sdwn.preflight.prefetch import prefetch_config, prefetch_run

    paths, folder = RunPaths(Path(target)), folder and folder.absolute()
    planned = paths.plan.exists()
    if planned and set_:
        raise UsageError(f"--set changes a config, and {target} is planned already")
    if planned:
        _, plan = open_run(paths.root)
        found = prefetch_run(paths, plan, folder, classifier)
    else:
        found = prefetch_config(open_config(target, set_), folder, classifier)
        if folder is not None:
            with_it = command("plan", target, "RUN", "--set", f"model.name={folder}")
            console.say(f"plan with it: {with_it}")
    console.result(found, as_json)
    if found["problems"]:
        raise typer.Exit(1)
