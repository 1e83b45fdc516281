"""The commands before a run: plan, prefetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdwn.cli import terminal, texts
from sdwn.cli.options import AsJson, Config, Override, Run
from sdwn.cli.steps_opening import open_profile
from sdwn.cli.steps_planning import plan_run, prefetched

commands = typer.Typer()


@commands.command()
def plan(
    config: Config,
    run: Run,
    profile: Annotated[
        str | None, typer.Option(help="Estimate for this profile; it is no part of the plan.")
    ] = None,
    set_: Override = None,
    slice_: Annotated[
        str | None,
        typer.Option("--slice", help="Make only this share here, as 2/3; others elsewhere."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read WordNet, write the plan into the folder RUN, and estimate what making it takes."""
    chosen = open_profile(profile, {}) if profile else None
    made, paths = plan_run(config, run, set_, slice_)
    from sdwn.planning.plan import summary
    from sdwn.preflight.estimate import estimate

    counts = {**summary(made), "run": str(paths.root)}
    takes = estimate(paths, made, [shard.index for shard in made.own_shards], chosen)
    terminal.result(
        {**counts, "estimate": takes.as_dict()}, as_json, text=texts.plan_text(counts, takes)
    )


@commands.command()
def prefetch(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN",
            help="A config, as for plan, or the folder of a planned run.",
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(help="Put the weights here, if tasks do not see the hub's cache."),
    ] = None,
    classifier: Annotated[
        bool, typer.Option("--classifier/--no-classifier", help="Get the classifier too.")
    ] = True,
    set_: Override = None,
    as_json: AsJson = False,
) -> None:
    """Get weights, classifier and WordNet where the network is; afterwards none is needed."""
    found = prefetched(target, set_, folder, classifier)
    terminal.result(found, as_json)
    if found["problems"]:
        raise typer.Exit(1)
