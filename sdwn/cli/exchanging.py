"""The commands that pass releases on: export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdwn.cli import steps_exchanging as exchanging
from sdwn.cli import terminal
from sdwn.cli.options import AsJson, PartSize, ReleaseFolder

commands = typer.Typer()


@commands.command()
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
        typer.Option(
            help="Only images in this table, columns wnid and number, or list of synsets."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a release, or some of it, as other tools read it; goes on after a kill."""
    from sdwn.exchange.export import ExportOptions

    opened = exchanging.opened(release, only)
    chosen = exchanging.chosen(opened, sample, below, imagenet, status)
    part_bytes = None if part_size is None else int(part_size * 1e9)
    codec = codec or ("jpeg" if quality else "stored")
    options = ExportOptions(format_, codec, quality, part_bytes)
    terminal.result(exchanging.export_release(chosen, dest, options), as_json)


@commands.command(name="import")
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
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Take what links lead to, outside SOURCE too.")
    ] = False,
    part_size: PartSize = 4.0,
    as_json: AsJson = False,
) -> None:
    """Make a release of images as they are; unreadable ones are named and left out."""
    from sdwn.exchange.import_images import ImportOptions

    options = ImportOptions(format_, int(part_size * 1e9), origin, licence, follow_links)
    terminal.result(exchanging.import_release(source, release, options), as_json)
