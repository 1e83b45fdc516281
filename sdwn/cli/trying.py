"""The commands that try before a run: tune, pilot, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from sdwn.cli import steps_trying as trying
from sdwn.cli import terminal, texts
from sdwn.cli.options import AsJson, Config, Override, Profile, Run, with_site
from sdwn.cli.steps_opening import open_config, open_profile, open_run

commands = typer.Typer()


@commands.command()
@with_site
def tune(
    config: Config,
    site: dict[str, str],
    profile: Annotated[
        str | None, typer.Option(help="Measure by a job under this profile; default: here.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="By a job on each of these, as v100,a100.")
    ] = None,
    set_: Override = None,
    as_json: AsJson = False,
) -> None:
    """Find the best batch size of a GPU; every later task there takes it."""
    if profile is None and (gpus or site):
        raise typer.BadParameter("--gpus and the profile's options need --profile")
    from sdwn.models.settings import require_usable

    settings = open_config(config, set_)
    require_usable(settings)
    if profile is None:
        from sdwn.preflight.tune import tune_device

        with terminal.working("measuring"):
            found = [tune_device(settings)]
    else:
        found = trying.tune_elsewhere(
            settings, open_profile(profile, site), (gpus or "").split(",")
        )
    terminal.result(
        {"profiles": [one.as_dict() for one in found]},
        as_json,
        text="\n".join(map(texts.tuning_text, found)),
    )


@commands.command()
@with_site
def pilot(
    run: Run, site: dict[str, str], profile: Profile = "local", as_json: AsJson = False
) -> None:
    """Make 20 images of the plan on the real target, and say what the whole run will take."""
    from dataclasses import asdict

    from sdwn.jobs.submit import require_fit
    from sdwn.models.settings import require_usable
    from sdwn.preflight.short_jobs import run_pilot

    paths, made = open_run(run)
    chosen = open_profile(profile, site)
    require_fit(made.config, chosen)
    require_usable(made.config)
    with trying.trial("making the pilot's images", trying.AGAIN) as (told, watch):
        found = run_pilot(paths, made, chosen, told, watch)
    terminal.result(asdict(found), as_json, text=texts.pilot_text(found))


@commands.command()
@with_site
def doctor(
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    probe: Annotated[
        bool, typer.Option("--probe", help="Ask a compute node too, by a short job.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what would stop the run or slow it down: profile, site, disk, weights."""
    paths, made = open_run(run)
    found = trying.examined(paths, made, open_profile(profile, site), probe)
    if trying.say_findings(found, as_json):
        raise typer.Exit(1)
