"""The command line: one short function a command; stages are imported when they run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdwn import terminal
from sdwn.options import (
    AsJson,
    Checkpoint,
    Config,
    DryRun,
    Model,
    Override,
    Profile,
    ReleaseFolder,
    Retries,
    Run,
    Wait,
    with_site,
)

if TYPE_CHECKING:
    from sdwn.cluster import Job
    from sdwn.config import EvaluationConfig, RunConfig
    from sdwn.files import RunPaths
    from sdwn.gpus import GpuProfile
    from sdwn.plan import Plan
    from sdwn.profiles import ClusterProfile
    from sdwn.scheduler import JobState
    from sdwn.submission import Watch

# Each look asks the scheduler, which all users share.
WATCH_SECONDS = 10

app = typer.Typer(
    name="sdwn",
    help="Large synthetic image datasets out of Stable Diffusion and WordNet, on a SLURM cluster.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Plan, generate, merge, evaluate."""
    terminal.debug = debug
    if version:
        from sdwn import __version__

        typer.echo(f"sdwn {__version__}")
        raise typer.Exit


@app.command()
def plan(config: Config, run: Run, set_: Override = None, as_json: AsJson = False) -> None:
    """Read WordNet and write the plan into the folder RUN."""
    made, paths = _make_plan(config, run, set_)
    from sdwn.plan import summary

    terminal.result({**summary(made), "run": str(paths.root)}, as_json)


@app.command()
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
    settings = _config(config, set_)
    if profile is None:
        from sdwn.tune import tune_device

        with terminal.working("measuring"):
            found = [tune_device(settings)]
    else:
        found = _tune_elsewhere(settings, _profile(profile, site), (gpus or "").split(","))
    terminal.result(
        {"profiles": [one.as_dict() for one in found]},
        as_json,
        text="\n".join(map(terminal.tuning_text, found)),
    )


@app.command()
@with_site
def pilot(
    run: Run, site: dict[str, str], profile: Profile = "local", as_json: AsJson = False
) -> None:
    """Make 20 images of the plan on the real target, and say what the whole run will take."""
    from dataclasses import asdict

    from sdwn.submission import require_fit
    from sdwn.trials import run_pilot

    paths, made = _open_run(run)
    chosen = _profile(profile, site)
    require_fit(made.config, chosen)
    with _trial("making the pilot's images") as (told, watch):
        found = run_pilot(paths, made, chosen, told, watch)
    terminal.result(asdict(found), as_json, text=terminal.pilot_text(found))


@app.command()
@with_site
def submit(
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    dry_run: DryRun = False,
    wait: Wait = False,
    retries: Retries = 2,
    as_json: AsJson = False,
) -> None:
    """Start array tasks for the unfinished shards, on this machine or under SLURM."""
    from sdwn import submission

    paths, made = _open_run(run)
    chosen = _profile(profile, site)
    submission.require_fit(made.config, chosen)
    todo = submission.unfinished(paths, made)
    if dry_run:
        _show_script(paths, todo, chosen, as_json)
        return
    jobs = _start(paths, made, todo, chosen, retries if wait else None)
    _say_submitted(jobs, todo, as_json)


@app.command()
@with_site
def retry(
    run: Run,
    site: dict[str, str],
    wait: Wait = False,
    retries: Retries = 2,
    as_json: AsJson = False,
) -> None:
    """Submit what failed or is missing again, under the profile of the last submission."""
    from sdwn import submission

    paths, made = _open_run(run)
    chosen = submission.last_profile(paths, site)
    submission.require_fit(made.config, chosen)
    todo = submission.unfinished(paths, made)
    jobs = _start(paths, made, todo, chosen, retries if wait else None)
    _say_submitted(jobs, todo, as_json)


@app.command()
def cancel(run: Run, as_json: AsJson = False) -> None:
    """End the run's waiting and running tasks; what they have finished stays."""
    from sdwn.files import RunPaths
    from sdwn.submission import cancel as cancel_jobs

    paths = RunPaths(run)
    if not paths.submissions.exists():
        _open_run(run)  # no run at all is an error
    ids = [job.id for job in cancel_jobs(paths)]
    terminal.result({"cancelled": len(ids), "job_ids": ids}, as_json)


@app.command()
def status(
    run: Run,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again while tasks are live.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is done, running, pending and failed."""
    from sdwn.status import run_status

    paths, made = _open_run(run)
    if watch and not as_json:
        with terminal.live() as show:
            while (now := run_status(paths, made)).shards_live:
                show(now.as_dict())
                time.sleep(WATCH_SECONDS)
    terminal.result(run_status(paths, made).as_dict(), as_json)


@app.command()
def logs(
    run: Run,
    shard: Annotated[
        int | None, typer.Option(help="Of this shard; default: of every shard that failed.")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines of each log, from its end.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the end of the logs of the tasks that made, or failed to make, shards."""
    from sdwn.submission import failed, shard_logs

    paths, made = _open_run(run)
    if shard is not None and not 0 <= shard < len(made.shards):
        raise typer.BadParameter(f"no shard {shard}; the plan has 0 to {len(made.shards) - 1}")
    indices = [shard] if shard is not None else failed(paths, made)
    found = shard_logs(paths, indices, lines)
    text = "".join(f"==> {path} <==\n{tail}\n" for path, tail in found.items())
    nothing = "no logs yet\n" if indices else "no shard has failed; see one with --shard N\n"
    terminal.result({"logs": found}, as_json, text=text or nothing)


@app.command()
def merge(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders of the same plan.")
    ],
    release: Annotated[Path, typer.Option(help="The folder to write the release to.")],
    part_size: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Size of a part, in GB.")
    ] = 4.0,
    evaluate_: Annotated[
        bool, typer.Option("--evaluate", help="Go straight on to the classifier.")
    ] = False,
    model: Model = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Check every shard and write the release."""
    if (model or checkpoint) and not evaluate_:
        raise typer.BadParameter("--model and --checkpoint need --evaluate")
    found = _merge(runs, release, int(part_size * 1e9))
    if evaluate_:
        _, made = _open_run(runs[0])
        found = _joined(
            found, _evaluate(release, _classifier(made.config.evaluation, model, checkpoint))
        )
    terminal.result(found, as_json)


@app.command()
def verify(release: ReleaseFolder, as_json: AsJson = False) -> None:
    """Check a release against its own record, and name what is damaged, missing or extra."""
    from sdwn.release import Release
    from sdwn.release import verify as check

    opened = Release(release)
    with terminal.progress("verify", opened.manifest["bytes"], unit="bytes") as advance:
        problems = check(release, advance)
    found = {"images": len(opened), "ok": not problems, "problems": problems}
    terminal.result(found, as_json)
    if problems:
        raise typer.Exit(1)


@app.command()
def evaluate(
    release: ReleaseFolder,
    model: Model = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Classify the ImageNet classes of a release with a timm model."""
    from sdwn.config import EvaluationConfig

    chosen = _classifier(EvaluationConfig(), model, checkpoint)
    terminal.result(_evaluate(release, chosen), as_json)


@app.command()
def report(
    release: ReleaseFolder,
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, by name; default: the latest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write tables and figures as one HTML file."""
    terminal.result({"path": str(_report(release, evaluation))}, as_json)


@app.command()
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
    from sdwn.submission import require_fit

    chosen = _profile(profile, site)
    require_fit(_config(config, set_), chosen)
    made, paths = _make_plan(config, run, set_)
    _complete(paths, made, chosen, retries)
    found = _merge([run], paths.release, part_bytes=None)
    found = _joined(found, _evaluate(paths.release, made.config.evaluation))
    found["report"] = str(_report(paths.release, found["evaluation"]))
    terminal.result(found, as_json)


def _config(config: str, overrides: list[str] | None) -> RunConfig:
    from sdwn.config import load_config
    from sdwn.shipped import find

    return load_config(find("config", config), tuple(overrides or ()))


def _profile(name: str, site: dict[str, str]) -> ClusterProfile:
    from sdwn.profiles import load_profile

    return load_profile(name, site)


def _tune_elsewhere(
    settings: RunConfig, chosen: ClusterProfile, kinds: list[str]
) -> list[GpuProfile]:
    from sdwn.submission import require_fit
    from sdwn.trials import tune_elsewhere

    require_fit(settings, chosen)
    wanted = [kind.strip() for kind in kinds if kind.strip()]
    with _trial("measuring") as (told, watch):
        return tune_elsewhere(settings, chosen, wanted, told, watch)


@contextmanager
def _trial(what: str) -> Iterator[tuple[Callable[[Path], None], Watch]]:
    """Show that short jobs are at work, and tell how to end them when nobody waits any more."""
    folders: list[Path] = []
    try:
        with terminal.working(what):
            yield folders.append, _silence_told()
    except KeyboardInterrupt:
        for folder in folders:
            terminal.say(f"the job goes on without you; end it with: sdwn cancel {folder}")
        raise


def _silence_told() -> Watch:
    """Give a watch that says once when the controller does not answer."""
    from sdwn.submission import unreachable

    silent = False

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal silent
        if unreachable(live) and not silent:
            terminal.say("the SLURM controller does not answer; waiting for it")
        silent = unreachable(live)

    return watch


def _make_plan(config: str, run: Path, overrides: list[str] | None) -> tuple[Plan, RunPaths]:
    from sdwn.catalog import read_catalog
    from sdwn.files import RunPaths
    from sdwn.plan import make_plan, write_plan
    from sdwn.wordnet import open_wordnet

    settings = _config(config, overrides)
    with terminal.working("reading WordNet"):
        catalog = read_catalog(settings.catalog, open_wordnet())
    made, paths = make_plan(settings, catalog), RunPaths(run)
    new = write_plan(made, paths)
    terminal.say(f"{'planned' if new else 'planned already'}: {run}")
    return made, paths


def _open_run(run: Path) -> tuple[RunPaths, Plan]:
    from sdwn.files import RunPaths
    from sdwn.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def _show_script(paths: RunPaths, todo: list[int], chosen: ClusterProfile, as_json: bool) -> None:
    from sdwn import cluster

    script = ""
    if todo:
        script = cluster.script(len(cluster.cut(todo, chosen)), paths.jobs, chosen)
    found = {"submitted": 0, "shards": len(todo), "job_ids": [], "script": script}
    terminal.result(found, as_json, text=script or "# nothing to submit\n")


def _start(
    paths: RunPaths, made: Plan, todo: list[int], chosen: ClusterProfile, retries: int | None
) -> list[Job]:
    """Submit shards; with a number of retries, follow the run to the end."""
    from sdwn.submission import submit_shards

    if retries is None:
        return submit_shards(paths, todo, chosen)
    return _complete(paths, made, chosen, retries)


def _say_submitted(jobs: list[Job], todo: list[int], as_json: bool) -> None:
    ids = [job.id for job in jobs]
    terminal.result({"submitted": len(ids), "shards": len(todo), "job_ids": ids}, as_json)


def _complete(paths: RunPaths, made: Plan, chosen: ClusterProfile, retries: int) -> list[Job]:
    from sdwn.status import images_done
    from sdwn.submission import complete

    start = images_done(paths, made)
    seen, tell_silence = start, _silence_told()

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal seen
        done = images_done(paths, made)
        advance(done - seen)
        seen = done
        tell_silence(live)

    try:
        with terminal.progress("generate", made.images, "images", start) as advance:
            return complete(paths, made, chosen, watch, retries)
    except KeyboardInterrupt:
        terminal.say(
            f"the tasks go on without you; see: sdwn status {paths.root}; follow them again "
            f"with: sdwn submit {paths.root} --wait; end them with: sdwn cancel {paths.root}"
        )
        raise


def _merge(runs: list[Path], release: Path, part_bytes: int | None) -> dict[str, Any]:
    from sdwn.files import ReleasePaths, RunPaths
    from sdwn.merge import PART_BYTES, merge, merged_summary
    from sdwn.plan import read_plan

    paths = [RunPaths(run) for run in runs]
    with terminal.progress("merge", read_plan(paths[0]).images, unit="images") as advance:
        merged = merge(paths, ReleasePaths(release), part_bytes or PART_BYTES, advance)
    return merged_summary(merged)


def _classifier(
    default: EvaluationConfig, model: str | None, checkpoint: Path | None
) -> EvaluationConfig:
    if model or checkpoint:
        return type(default)(model=model or default.model, checkpoint=checkpoint)
    return default


def _evaluate(release: Path, chosen: EvaluationConfig) -> dict[str, Any]:
    from sdwn.evaluate import evaluate, images_to_classify
    from sdwn.release import Release

    opened = Release(release)
    with terminal.progress("evaluate", images_to_classify(opened), unit="images") as advance:
        return evaluate(opened, chosen, advance)


def _joined(merged: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """Put both results into one; ``images`` stays the release's."""
    return {**evaluated, "evaluated_images": evaluated["images"], **merged}


def _report(release: Path, evaluation: str | None) -> Path:
    from sdwn.release import Release
    from sdwn.report import write_report

    with terminal.working("writing the report"):
        return write_report(Release(release), evaluation)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(terminal.guarded(lambda: app(arguments)))
