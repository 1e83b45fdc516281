"""The command line: one short function a command; stages are imported when they run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdwn import evaluation_steps, steps, terminal
from sdwn.options import (
    AsJson,
    Checkpoint,
    Config,
    DryRun,
    Force,
    Model,
    Override,
    PartSize,
    Profile,
    ReleaseFolder,
    Retries,
    Run,
    Then,
    Wait,
    with_site,
)

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
    chosen = steps.open_profile(profile, {}) if profile else None
    made, paths = steps.plan_run(config, run, set_, slice_)
    from sdwn.estimates import estimate
    from sdwn.plan import summary

    counts = {**summary(made), "run": str(paths.root)}
    takes = estimate(paths, made, [shard.index for shard in made.own_shards], chosen)
    terminal.result(
        {**counts, "estimate": takes.as_dict()}, as_json, text=terminal.plan_text(counts, takes)
    )


@app.command()
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
    found = steps.prefetched(target, set_, folder, classifier)
    terminal.result(found, as_json)
    if found["problems"]:
        raise typer.Exit(1)


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
    settings = steps.open_config(config, set_)
    if profile is None:
        from sdwn.tune import tune_device

        with terminal.working("measuring"):
            found = [tune_device(settings)]
    else:
        found = steps.tune_elsewhere(
            settings, steps.open_profile(profile, site), (gpus or "").split(",")
        )
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

    paths, made = steps.open_run(run)
    chosen = steps.open_profile(profile, site)
    require_fit(made.config, chosen)
    with steps.trial("making the pilot's images") as (told, watch):
        found = run_pilot(paths, made, chosen, told, watch)
    terminal.result(asdict(found), as_json, text=terminal.pilot_text(found))


@app.command()
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
    paths, made = steps.open_run(run)
    found = steps.examined(paths, made, steps.open_profile(profile, site), probe)
    if steps.say_findings(found, as_json):
        raise typer.Exit(1)


@app.command()
@with_site
def submit(
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    dry_run: DryRun = False,
    wait: Wait = False,
    retries: Retries = 2,
    then: Then = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Start array tasks for the unfinished shards, on this machine or under SLURM."""
    from sdwn import submission

    options = steps.submit_options(wait, retries, then, force)
    paths, made = steps.open_run(run)
    chosen = steps.open_profile(profile, site)
    submission.require_fit(made.config, chosen)
    if dry_run:
        steps.show_script(paths, made, steps.unfinished_shards(paths, made), chosen, as_json)
        return
    terminal.result(steps.submit_run(paths, made, chosen, options), as_json)


@app.command()
@with_site
def retry(
    run: Run,
    site: dict[str, str],
    wait: Wait = False,
    retries: Retries = 2,
    then: Then = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Submit what failed or is missing again, under the profile of the last submission."""
    from sdwn import submission

    options = steps.submit_options(wait, retries, then, force)
    paths, made = steps.open_run(run)
    chosen = submission.last_profile(paths, site)
    submission.require_fit(made.config, chosen)
    terminal.result(steps.submit_run(paths, made, chosen, options), as_json)


@app.command()
def cancel(run: Run, as_json: AsJson = False) -> None:
    """End the run's waiting and running tasks; what they have finished stays."""
    from sdwn.files import RunPaths
    from sdwn.submission import cancel as cancel_jobs

    paths = RunPaths(run)
    if not paths.submissions.exists():
        steps.open_run(run)  # no run at all is an error
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

    paths, made = steps.open_dealt(run)
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
    from sdwn.joblogs import shard_logs
    from sdwn.live import failed

    paths, made = steps.open_dealt(run)
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
    part_size: PartSize = 4.0,
    check: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick: structure, counts, every image's checksum; full: decode it too."),
    ] = "quick",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Also of a run that isn't finished.")
    ] = False,
    evaluate_: Annotated[
        bool, typer.Option("--evaluate", help="Go straight on to the classifier.")
    ] = False,
    model: Model = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Check every shard and write the release; goes on where a killed merge stopped."""
    if (model or checkpoint) and not evaluate_:
        raise typer.BadParameter("--model and --checkpoint need --evaluate")
    from sdwn.merge import MergeOptions

    chosen = MergeOptions(int(part_size * 1e9), allow_missing, decode=check == "full")
    found = steps.merge_runs(runs, release, chosen)
    if evaluate_:
        _, made = steps.open_run(runs[0])
        found = evaluation_steps.joined(
            found,
            evaluation_steps.evaluate_release(
                release, evaluation_steps.classifier(made.config.evaluation, model, checkpoint)
            ),
        )
    terminal.result(found, as_json)


@app.command()
def verify(
    release: ReleaseFolder,
    check: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick: tables, structure, sizes; full: every byte and image."),
    ] = "full",
    as_json: AsJson = False,
) -> None:
    """Check a release against its own record, and name what is damaged, missing or extra."""
    found = steps.verify_release(release, quick=check == "quick")
    terminal.result(found, as_json)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def regenerate(
    release: ReleaseFolder,
    synset: Annotated[str, typer.Argument(metavar="SYNSET", help="By name, wnid or lemma.")],
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="Which image, from 0.")],
    model: Annotated[
        str | None, typer.Option(help="Where the model lies now; default: where it was.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, max=255, help="Root mean square still the same, in 8-bit steps."),
    ] = 4.0,
    save: Annotated[Path | None, typer.Option(help="Write the new image as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an image's batch again from its record, and say whether it came out the same."""
    from sdwn.regenerate import Wanted

    found = steps.regenerated(release, Wanted(synset, number, model, tolerance), save)
    terminal.result(found.as_dict(), as_json)
    if not found.same:
        raise typer.Exit(1)


@app.command()
def export(
    release: ReleaseFolder,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to write.")],
    format_: Annotated[
        Literal["folders", "imagefolder", "webdataset", "parquet", "release"],
        typer.Option(
            "--format", help="release: a smaller one of the images chosen by the options below."
        ),
    ],
    codec: Annotated[
        Literal["stored", "png", "webp", "jpeg"] | None,
        typer.Option(help="stored: the bytes as they are; png, webp: lossless; jpeg: smaller."),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Of jpeg, 95 unless given; of webp, which loses then."),
    ] = None,
    part_size: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            max=1e6,
            help="Least size of a file, in GB; default: webdataset 1, parquet 0.5, release 4.",
        ),
    ] = None,
    sample: Annotated[
        str | None, typer.Option(help="Only this share of the synsets, as 1%; always the same.")
    ] = None,
    below: Annotated[
        str | None, typer.Option(help="Only this synset (name or wnid) and those below it.")
    ] = None,
    imagenet: Annotated[bool, typer.Option("--imagenet", help="Only ImageNet-1k classes.")] = False,
    status: Annotated[
        str | None, typer.Option(help="Only images of this status: ok leaves out black ones.")
    ] = None,
    only: Annotated[
        Path | None,
        typer.Option(help="Only images in this CSV file: columns wnid and number, or wnid alone."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a release, or some of it, as other tools read it; goes on after a kill."""
    from sdwn.exchange.export import ExportOptions

    opened = steps.opened(release, only)
    chosen = steps.chosen(opened, sample, below, imagenet, status)
    part_bytes = None if part_size is None else int(part_size * 1e9)
    codec = codec or ("jpeg" if quality else "stored")
    options = ExportOptions(format_, codec, quality, part_bytes)
    terminal.result(steps.export_release(chosen, dest, options), as_json)


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder of pictures.")],
    release: Annotated[
        Path, typer.Argument(metavar="RELEASE", help="The folder to write the release to.")
    ],
    format_: Annotated[
        Literal["folders", "imagefolder"],
        typer.Option(
            "--format",
            help="folders: with a text file of prompt, synset and wnid; imagefolder: by wnid.",
        ),
    ],
    origin: Annotated[
        str | None, typer.Option(help="For the card: where the pictures are from.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="For the card: their licence, as cc-by-4.0.")
    ] = None,
    part_size: PartSize = 4.0,
    as_json: AsJson = False,
) -> None:
    """Make a release of pictures as they are; what is no sound picture is named and left out."""
    from sdwn.exchange.intake import ImportOptions

    options = ImportOptions(format_, int(part_size * 1e9), origin, licence)
    terminal.result(steps.import_release(source, release, options), as_json)


@app.command()
@with_site
def evaluate(
    release: ReleaseFolder,
    site: dict[str, str],
    model: Annotated[
        str, typer.Option(help="paper (ViT-H/14), efficientnet-lite0, or any timm model.")
    ] = "paper",
    checkpoint: Checkpoint = None,
    all_: Annotated[
        bool,
        typer.Option("--all", help="Also what is no ImageNet class, by the classes around it."),
    ] = False,
    groups: Annotated[
        str | None,
        typer.Option(help="YAML file, NAME: SYNSET a line, or a shipped one's name."),
    ] = None,
    embedding: Annotated[
        Path | None,
        typer.Option(help="Text file of word vectors that place the map's classes, as GloVe's."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Judge by array tasks under this profile; default: here.")
    ] = None,
    wait: Wait = False,
    retries: Retries = 2,
    as_json: AsJson = False,
) -> None:
    """Judge a release's images by a timm model; write figures and tables. Goes on after a kill."""
    from sdwn.config import EvaluationConfig

    if profile is None and (site.keys() - {"batch_size"} or wait):
        raise typer.BadParameter("--wait and the profile's options need --profile")
    images: Literal["imagenet", "all"] = "all" if all_ else "imagenet"
    default = EvaluationConfig(images=images, groups=groups, embedding=embedding)
    chosen = evaluation_steps.classifier(default, model, checkpoint)
    if profile is None:
        found = evaluation_steps.evaluate_release(release, chosen, site.get("batch_size"))
    else:
        options = steps.SubmitOptions(wait, retries)
        sites = evaluation_steps.targets(profile, site)
        found = evaluation_steps.evaluate_by_tasks(release, chosen, sites, options)
    # Tasks may have been submitted only, and of no class there is nothing to tell here.
    told = found.get("mean_correct") is not None
    terminal.result(found, as_json, terminal.evaluation_text(found) if told else None)


@app.command()
def compare(
    which: Annotated[
        list[str],
        typer.Argument(
            metavar="RELEASE...",
            help="Evaluated releases, or RELEASE/evaluations/NAME; LABEL=... calls one so.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write the page and tables to.")],
    evaluation: Annotated[
        str | None,
        typer.Option(help="Which evaluation, by name; default: the latest that all have."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold evaluated releases, or models, against the first: by class and group, in pairs."""
    found = evaluation_steps.compare_releases(which, evaluation, out)
    terminal.result(found, as_json, text=terminal.comparison_text(found))


@app.command()
def report(
    release: ReleaseFolder,
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, by name; default: the latest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an evaluation's page, one HTML file, and its figures as PNG and SVG."""
    terminal.result({"path": str(steps.report_on(release, evaluation))}, as_json)


@app.command()
def show(
    release: ReleaseFolder,
    synset: Annotated[str, typer.Argument(metavar="SYNSET", help="By name, wnid or lemma.")],
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, by name; default: the latest.")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Open its sheet in the browser, without a server.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write its sheet, one HTML file with the pictures.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a synset: what it is, each image with its seed, and what the classifier saw in it."""
    from sdwn.sheet_steps import show

    found = show(release, synset, evaluation, save, open_)
    terminal.result(found, as_json, text=terminal.sheet_text(found))


@app.command()
def browse(
    release: ReleaseFolder,
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="Another release of the same synsets, beside it."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Listen here, 0 for any; default: 8642, or the next free one."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Listen at this address; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, by name; default: the latest.")
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Let in only who has the address with its token.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look through a release in the browser: search, WordNet's tree, each image; end by Ctrl-C."""
    from sdwn.browsing_steps import Where, browse

    browse(release, other, evaluation, Where(host, port, token), as_json)


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

    chosen = steps.open_profile(profile, site)
    require_fit(steps.open_config(config, set_), chosen)
    made, paths = steps.plan_run(config, run, set_)
    steps.submit_run(paths, made, chosen, steps.SubmitOptions(wait=True, retries=retries))
    found = steps.merge_runs([run], paths.release)
    found = evaluation_steps.joined(
        found, evaluation_steps.evaluate_release(paths.release, made.config.evaluation)
    )
    found["report"] = str(steps.report_on(paths.release, found["evaluation"]))
    terminal.result(found, as_json)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(terminal.guarded(lambda: app(arguments)))
