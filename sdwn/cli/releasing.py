"""The commands on a release as a whole and on its images: merge, verify, regenerate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdwn.cli import steps_evaluating as evaluating
from sdwn.cli import steps_releasing as releasing
from sdwn.cli import terminal
from sdwn.cli.options import AsJson, Checkpoint, Model, PartSize, ReleaseFolder, Runs
from sdwn.cli.steps_opening import open_run

commands = typer.Typer()


@commands.command()
def merge(
    runs: Runs,
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
    from sdwn.releases.merge import MergeOptions

    chosen = MergeOptions(int(part_size * 1e9), allow_missing, decode=check == "full")
    found = releasing.merge_runs(runs, release, chosen)
    if evaluate_:
        _, made = open_run(runs[0])
        found = evaluating.joined(
            found,
            evaluating.evaluate_release(
                release, evaluating.classifier(made.config.evaluation, model, checkpoint)
            ),
        )
    terminal.result(found, as_json)


@commands.command()
def verify(
    release: ReleaseFolder,
    check: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick: tables, structure, sizes; full: every byte and image."),
    ] = "full",
    as_json: AsJson = False,
) -> None:
    """Check a release against its own record, and name what is damaged, missing or extra."""
    found = releasing.verify_release(release, quick=check == "quick")
    terminal.result(found, as_json)
    if found["problems"]:
        raise typer.Exit(1)


@commands.command()
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
    from sdwn.generation.regenerate import Wanted

    found = releasing.regenerated(release, Wanted(synset, number, model, tolerance), save)
    terminal.result(found.as_dict(), as_json)
    if not found.same:
        raise typer.Exit(1)
