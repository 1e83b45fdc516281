"""The command that does all of it: run."""

from __future__ import annotations

import typer

from sdwn.cli import steps_evaluating as evaluating
from sdwn.cli import steps_planning as planning
from sdwn.cli import steps_releasing as releasing
from sdwn.cli import steps_submitting as submitting
from sdwn.cli import terminal
from sdwn.cli.options import AsJson, Config, Override, Profile, Retries, Run, with_site
from sdwn.cli.steps_opening import open_config, open_profile

commands = typer.Typer()


@commands.command()
@with_site
def run(
    config: Config,
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    set_: Override = None,
    retries: Retries = 2,
    as_json: AsJson = False,
) -> None:
    """Do all of it in order, the release in RUN's own folder; again, only what is missing."""
    from sdwn.jobs.submit import require_fit

    chosen = open_profile(profile, site)
    require_fit(open_config(config, set_), chosen)
    made, paths = planning.plan_run(config, run, set_)
    # Only this command also merges, evaluates and reports.
    options = submitting.SubmitOptions(wait=True, retries=retries, again="the same command")
    planning.require_evaluable(paths, made)
    submitting.submit_run(paths, made, chosen, options)
    found = releasing.merge_runs([run], paths.release)
    found = evaluating.joined(
        found, evaluating.evaluate_release(paths.release, made.config.evaluation)
    )
    found["report"] = str(evaluating.report_on(paths.release, found["evaluation"]))
    terminal.result(found, as_json)
