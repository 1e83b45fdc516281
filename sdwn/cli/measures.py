"""The commands that measure a release's images by their features, and ask what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from typer import Argument, Option

from sdwn.cli import console, options
from sdwn.cli.release import evaluate_or_submit
from sdwn.cli.sweep import each_cell
from sdwn.errors import command, some
from sdwn.io import csv_text

# Classes that a message names of those that are left out.
NAMED = 3


@options.with_site
@each_cell
def features_command(
    release: options.ReleaseFolder,
    site: dict[str, str],
    model: Annotated[
        str,
        Option(help="dinov2, efficientnet-lite0, any timm model, clip:FOLDER or clip:ORG/NAME."),
    ] = "dinov2",
    profile: options.MaybeProfile = None,
    wait: options.Wait = False,
    retries: options.Retries = 2,
    as_json: options.AsJson = False,
) -> None:
    """Encode a release's images, for all measures of them.

    One vector an image, kept with the release. The same command resumes after a kill; what is
    encoded stays, also in a release that grows out of this one.
    """
    if found := evaluate_or_submit(release, model, profile, site, wait, retries, as_json):
        rows = {
            "features": found["path"],
            "images": f"{found['images']:,}, {found['dimensions']:,} numbers each",
            "size": decimal(found["bytes"]),
        }
        step = command("measure", release, "--features", found["features"])
        console.result(found, as_json, rows, next_=step)


@each_cell
def measure_command(
    release: options.ReleaseFolder,
    reference: Annotated[Path | None, Option(help="A release of real images.")] = None,
    features: options.FeaturesName = None,
    images: Annotated[int, Option(min=10, help="Most images that are compared.")] = 10_000,
    as_json: options.AsJson = False,
) -> None:
    """Measure likeness, variety and truth to the prompts.

    By features that sdwn features made. With --reference, figures are of the classes that both
    releases have, and of as many images a class.
    """
    from sdwn.measures.measure import measure_release

    opened = options.open_release(release)
    other = options.open_release(reference) if reference else None
    with console.progress("measuring") as bar:
        paths, found = measure_release(opened, other, features, images, bar.note)
    show_measured(found, paths.record, as_json, release)


def show_measured(found: dict[str, Any], path: Path, as_json: bool, release: Path) -> None:
    """Print what a command measured and recorded; the classes stand in their table alone."""
    from sdwn.measures.record import figure_rows
    from sdwn.workflow.status import next_for_release

    left_out = found["classes_left_out"].items()
    more = (f"{len(names):,} of {side}: {some(names, NAMED)}" for side, names in left_out if names)
    rows: dict[str, Any] = {**figure_rows(found), "classes": len(found["classes"])}
    rows |= {"left out": "; ".join(more) or None, "record": str(path)}
    values = {name: value for name, value in found.items() if name != "classes"}
    console.result({**values, "path": str(path)}, as_json, rows, next_=next_for_release(release))


@each_cell
def transfer_command(
    release: options.ReleaseFolder,
    test: Annotated[Path, Option(metavar="REAL", help="A release of real images to test on.")],
    train: Annotated[
        Path | None, Option(metavar="REAL", help="Real images to train on, for comparison.")
    ] = None,
    features: options.FeaturesName = None,
    seed: Annotated[int, Option(min=0, help="Which images are drawn for the curve.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Train on a release, test on real images.

    A linear probe on features learns from 1, 2, 5 ... images a class. Make the features of all
    releases first, with sdwn features.
    """
    from sdwn.measures.transfer import measure_transfer

    named = {"synthetic": release, "real": train, "test": test}
    releases = {which: options.open_release(one) for which, one in named.items() if one}
    with console.progress("training probes") as bar:
        paths, found = measure_transfer(releases, features, seed, bar.note)
    show_measured(found, paths.record, as_json, release)


def query_command(
    release: options.ReleaseFolder,
    sql: Annotated[str, Argument(metavar="SELECT", help="The question, as one argument.")],
    evaluation: options.EvaluationName = None,
    as_csv: Annotated[bool, Option("--csv", help="Print all rows as CSV.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Ask in SQL what is known of a release's images.

    Tables: images, predictions, scores (a row an image each), synsets. SQL is DuckDB's;
    DESCRIBE images lists its columns. Nothing is written, and no other file can be read.
    """
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json: choose one")
    from sdwn.measures.query import open_database

    with console.progress("reading the tables"):
        database = open_database(options.open_release(release), sql, evaluation)
    if not (as_csv or as_json):
        wide = console.stdout.width if console.stdout.is_terminal else console.LONGEST_LINE
        console.show(database.draw(sql, wide))
        return
    columns, rows = database.answer(sql)
    if as_json:
        console.result({"columns": columns, "rows": list(rows)}, as_json)
    else:
        cells = (
            [json.dumps(x) if isinstance(x, list | dict) else x for x in row.values()]
            for row in rows
        )
        console.show(csv_text(columns, cells))


@each_cell
def duplicates_command(
    release: options.ReleaseFolder,
    against: Annotated[
        Path | None, Option(metavar="REAL", help="Also find copies of this release's images.")
    ] = None,
    features: options.FeaturesName = None,
    as_json: options.AsJson = False,
) -> None:
    """Find copies among the images, exact and near.

    Images with equal pixels are exact duplicates. Near ones have features of a similarity of at
    least 0.97; 0.945 where their perceptual hashes differ in at most 14 of 64 bits, 0.6 where in at
    most 2. Black images are left out. Writes a page of pairs, pairs.csv, and scores of each image.
    """
    from sdwn.measures.duplicates import find_duplicates
    from sdwn.measures.record import figure_rows
    from sdwn.reports.duplicates import write_duplicates_page

    opened = options.open_release(release)
    reference = options.open_release(against) if against else None
    with console.progress("looking for duplicates"):
        found = find_duplicates(opened, reference, features)
        write_duplicates_page(opened, reference, found)
    rows: dict[str, Any] = figure_rows(found.content)
    rows["black, not compared"] = found.content["black_left_out"] or None
    rows["page"] = str(found.paths.page)
    where = ("--format", "release", "--where", "NOT duplicate_of_better")
    step = command("export", release, "DEST", *where) if found.content["groups_found"] else None
    console.result({**found.content, "path": rows["page"]}, as_json, rows, next_=step)
