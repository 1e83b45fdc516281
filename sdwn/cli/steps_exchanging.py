"""Giving releases to other tools, and taking pictures from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.cli import terminal
from sdwn.errors import UsageError

if TYPE_CHECKING:
    from sdwn.exchange.export import ExportOptions
    from sdwn.exchange.import_images import ImportOptions
    from sdwn.releases.release import Release

# Files left out of an import that are named on the terminal; all stand in the release.
TOLD = 20


def share(text: str) -> float:
    """Read a share, in percent or as a fraction; a bare 1 may have been meant as either.

    >>> share("1%"), share("0.25")
    (0.01, 0.25)
    """
    number, percent, _ = text.partition("%")
    try:
        value = float(number) / 100 if percent else float(number)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1 or (value == 1 and not percent):
        raise UsageError(f"--sample {text}: expected a share such as 1% or 0.01, up to 100%")
    return value


def opened(root: Path, only: Path | None) -> Release:
    """Open a release, or only the images of it that a CSV file lists."""
    from sdwn.exchange.csv_selection import select_listed
    from sdwn.releases.release import Release

    release = Release(root)
    return release if only is None else select_listed(release, only)


def chosen(
    release: Release, sample: str | None, below: str | None, imagenet: bool, status: str | None
) -> Release:
    """Take the images of a release that the options ask for; without any, all of it."""
    if below is not None or imagenet or status is not None:
        release = release.subset(below=below, imagenet=imagenet, status=status)
    return release if sample is None else release.sample(share(sample))


def export_release(release: Release, dest: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a release's images in another format."""
    from sdwn.exchange.export import export

    with terminal.progress("export", len(release), unit="images") as advance:
        found = export(release, dest, options, advance)
    kinds = sorted(set(release.metadata["codec"].to_pylist()))
    if options.format == "webdataset" and options.codec == "stored" and len(kinds) > 1:
        terminal.say(
            f"the tars hold images of several kinds ({', '.join(kinds)}): the webdataset library "
            "reads them, Hugging Face datasets takes only tars of one kind; for it export with: "
            "--codec png, or --codec jpeg"
        )
    return found


def import_release(source: Path, release: Path, options: ImportOptions) -> dict[str, Any]:
    """Make a release of pictures, and name those that were left out."""
    from sdwn.exchange.import_images import count_files, import_images
    from sdwn.paths import ReleasePaths

    with terminal.working("looking for pictures"):
        count = count_files(source, options.follow_links)
    with terminal.progress("import", count, unit="files") as advance:
        found = import_images(source, ReleasePaths(release), options, advance)
    for name, reason in found.skipped[:TOLD]:
        terminal.say(f"left out: {name}: {reason}")
    if len(found.skipped) > TOLD:
        more = len(found.skipped) - TOLD
        terminal.say(f"left out: {more} more, see {found.release.paths.skipped}")
    manifest = found.release.manifest
    counts = manifest.model_dump(include={"images", "synsets", "imagenet_classes", "bytes"})
    left_out = {"skipped": len(found.skipped), "ignored_folders": found.ignored}
    return {**counts, **left_out, "release": str(release)}
