"""The commands that say what was drawn right: evaluate, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdwn.cli import steps_evaluating as evaluating
from sdwn.cli import terminal, texts
from sdwn.cli.options import AsJson, Checkpoint, ReleaseFolder, Retries, Wait, with_site
from sdwn.cli.steps_submitting import SubmitOptions

commands = typer.Typer()


@commands.command()
@with_site
def evaluate(
    release: ReleaseFolder,
    site: dict[str, str],
    model: Annotated[
        str | None,
        typer.Option(
            help="paper (ViT-H/14), efficientnet-lite0, or any timm model; default: as the run's "
            "config says, else paper."
        ),
    ] = None,
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
    if profile is None and (site.keys() - {"batch_size"} or wait):
        raise typer.BadParameter("--wait and the profile's options need --profile")
    given = {"images": "all" if all_ else None, "groups": groups, "embedding": embedding}
    chosen = evaluating.settings_of(release, model, checkpoint, given)
    if profile is None:
        found = evaluating.evaluate_release(release, chosen, site.get("batch_size"))
    else:
        options = SubmitOptions(wait, retries)
        sites = evaluating.targets(profile, site)
        found = evaluating.evaluate_by_tasks(release, chosen, sites, options)
    # Tasks may have been submitted only, and of no class there is nothing to tell here.
    told = found.get("mean_correct") is not None
    terminal.result(found, as_json, texts.evaluation_text(found) if told else None)


@commands.command()
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
    found = evaluating.compare_releases(which, evaluation, out)
    terminal.result(found, as_json, text=texts.comparison_text(found))


@commands.command()
def report(
    release: ReleaseFolder,
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, by name; default: the latest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an evaluation's page, one HTML file, and its figures as PNG and SVG."""
    terminal.result({"path": str(evaluating.report_on(release, evaluation))}, as_json)
