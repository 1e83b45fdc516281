"""The commands that write releases in other formats, and read them: export, import."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from sdwn.cli import console
from sdwn.cli.options import AsJson, PartSize, ReleaseFolder
from sdwn.errors import UsageError

# Files left out of an import that are named on the terminal; the release names all.
SKIPPED_SHOWN = 20


def export_command(
    release: ReleaseFolder,
    dest: Annotated[Path, Argument(metavar="DEST", help="The folder to write.")],
    format_: Annotated[
        Literal["folders", "imagefolder", "webdataset", "parquet", "release"],
        Option("--format", help="release: a smaller one, of the chosen images."),
    ],
    codec: Annotated[
        Literal["stored", "png", "webp", "jpeg"] | None,
        Option(help="stored: the bytes as they are; png, webp: lossless; jpeg: smaller."),
    ] = None,
    quality: Annotated[
        int | None,
        Option(min=1, max=100, help="Of jpeg, default 95; of webp, which is lossy then."),
    ] = None,
    part_size: Annotated[
        float | None,
        Option(
            min=1e-6,
            max=1e6,
            help="Minimum size of a file, in GB; default: webdataset 1, parquet 0.5, release 4.",
        ),
    ] = None,
    sample: Annotated[
        str | None, Option(help="Only this share of the synsets, as 1%; always the same.")
    ] = None,
    below: Annotated[str | None, Option(help="Only this synset or wnid, and those below.")] = None,
    imagenet: Annotated[bool, Option("--imagenet", help="Only ImageNet-1k classes.")] = False,
    status: Annotated[
        str | None, Option(help="Only images of this status: ok leaves out black ones.")
    ] = None,
    only: Annotated[
        Path | None,
        Option(help="Only images in this table, columns wnid and number, or list of synsets."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a release in another format.

    All of it, or the images that the options choose. The same command resumes after a kill.
    """
    from sdwn.exchange.csv_selection import select_listed
    from sdwn.exchange.export import ExportOptions, export
    from sdwn.releases.release import Release

    opened = Release(release)
    if only is not None:
        opened = select_listed(opened, only)
    if below is not None or imagenet or status is not None:
        opened = opened.subset(below=below, imagenet=imagenet, status=status)
    if sample is not None:
        opened = opened.sample(parse_share(sample))
    codec = codec or ("jpeg" if quality else "stored")
    part_bytes = None if part_size is None else int(part_size * 1e9)
    options = ExportOptions(format_, codec, quality, part_bytes)
    with console.progress("export", len(opened), unit="images") as advance:
        found = export(opened, dest, options, advance)
    kinds = sorted(set(opened.metadata["codec"].to_pylist()))
    if format_ == "webdataset" and codec == "stored" and len(kinds) > 1:
        console.say(
            f"the tars hold images of several kinds ({', '.join(kinds)}): the webdataset library "
            "reads them, Hugging Face datasets takes only tars of one kind; for it export with: "
            "--codec png, or --codec jpeg"
        )
    console.result(found, as_json)


def parse_share(text: str) -> float:
    """Read a share, in percent or as a fraction; a bare 1 may have been meant as either.

    >>> parse_share("1%"), parse_share("0.25")
    (0.01, 0.25)

    Raises:
        UsageError: it is none.
    """
    number, percent, _ = text.partition("%")
    try:
        value = float(number) / 100 if percent else float(number)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1 or (value == 1 and not percent):
        raise UsageError(f"--sample {text}: expected a share such as 1% or 0.01, up to 100%")
    return value


def import_command(
    source: Annotated[Path, Argument(metavar="SOURCE", help="The folder of images.")],
    release: Annotated[Path, Argument(metavar="RELEASE", help="The folder of the new release.")],
    format_: Annotated[
        Literal["folders", "imagefolder"],
        Option(
            "--format",
            help="folders: with a text file of prompt, synset and wnid; imagefolder: by wnid.",
        ),
    ],
    origin: Annotated[str | None, Option(help="For the card: where the images are from.")] = None,
    licence: Annotated[str | None, Option(help="For the card: the licence, as cc-by-4.0.")] = None,
    follow_links: Annotated[bool, Option("--follow-links", help="Also out of SOURCE.")] = False,
    part_size: PartSize = 4.0,
    as_json: AsJson = False,
) -> None:
    """Make a release of image files as they are.

    Files that are no readable image are left out and named.
    """
    from sdwn.exchange.import_images import ImportOptions, count_files, import_images
    from sdwn.paths import ReleasePaths

    options = ImportOptions(format_, int(part_size * 1e9), origin, licence, follow_links)
    with console.working("looking for images"):
        count = count_files(source, follow_links)
    with console.progress("import", count, unit="files") as advance:
        found = import_images(source, ReleasePaths(release), options, advance)
    for name, reason in found.skipped[:SKIPPED_SHOWN]:
        console.say(f"left out: {name}: {reason}")
    if (more := len(found.skipped) - SKIPPED_SHOWN) > 0:
        console.say(f"left out: {more:,} more, see {found.release.paths.skipped}")
    counts = found.release.manifest.model_dump(
        include={"images", "synsets", "imagenet_classes", "bytes"}
    )
    left_out = {"skipped": len(found.skipped), "ignored_folders": found.ignored}
    console.result({**counts, **left_out, "release": str(release)}, as_json)
