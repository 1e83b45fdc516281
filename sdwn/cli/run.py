"""The command that runs all steps: run."""

from __future__ import annotations

from sdwn.cli import console
from sdwn.cli.evaluate import evaluate_here
from sdwn.cli.options import (
    AsJson,
    Config,
    Override,
    Profile,
    Retries,
    Run,
    open_config,
    open_profile,
    with_site,
)
from sdwn.cli.release import merge_runs, with_evaluation


@with_site
def run_command(
    config: Config,
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    set_: Override = None,
    retries: Retries = 2,
    as_json: AsJson = False,
) -> None:
    """Plan, submit, merge, evaluate and report a run.

    The release lies in the run's folder. The same command resumes: it does only what is missing.
    """
    from sdwn.jobs.submit import require_fit
    from sdwn.preflight.prefetch import prefetch_classifier
    from sdwn.releases.merge import MergeOptions
    from sdwn.releases.release import Release
    from sdwn.reports.report import write_report
    from sdwn.workflow.following import SubmitOptions
    from sdwn.workflow.plan_run import plan_run
    from sdwn.workflow.submitting import submit_run

    chosen, settings = open_profile(profile, site), open_config(config, set_)
    require_fit(settings, chosen)
    plan, paths = plan_run(settings, run, console)
    if len(plan.done(paths)) < len(plan.assigned_shards):
        # An evaluation must not fail at the end for want of its classifier.
        with console.working("looking for the classifier"):
            prefetch_classifier(paths, plan.config)
    # Only this command also merges, evaluates and reports.
    options = SubmitOptions(wait=True, retries=retries, command="the same command")
    submit_run(paths, plan, chosen, options, console)
    found = merge_runs([run], paths.release, MergeOptions())
    found = with_evaluation(found, evaluate_here(paths.release, plan.config.evaluation))
    with console.working("writing the report"):
        found["report"] = str(write_report(Release(paths.release), found["evaluation"]))
    console.result(found, as_json)
