"""Export of a release, or a subset of one, in a format that other libraries read.

::

    release --> ExportSource --> spans of synsets --> a file, or some folders, a span
               (sorted, encoded)      (units)          (one module a format)

A new format is one module with an :class:`ExportFormat`, a line in ``EXPORT_FORMATS``, and a
template of the same name for its card.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdwn.errors import UsageError
from sdwn.exchange.export_source import Encoding, ExportFormat, ExportSource
from sdwn.exchange.folders import FOLDERS, IMAGEFOLDER
from sdwn.exchange.parquet import PARQUET
from sdwn.exchange.subset import row_spans, write_subset
from sdwn.exchange.webdataset import WEBDATASET
from sdwn.io import PART_BYTES, Advance, write_text
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import table_text
from sdwn.releases.card import CardLayout, card
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import StagedFolder, build, require_free
from sdwn.releases.writer import cut

EXPORT_FORMATS: Mapping[str, ExportFormat] = {
    "folders": FOLDERS,
    "imagefolder": IMAGEFOLDER,
    "webdataset": WEBDATASET,
    "parquet": PARQUET,
}
# A smaller release keeps parts, tables and record; it shares nothing with the other formats.
FORMATS = (*EXPORT_FORMATS, "release")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The format to export to, one of ``FORMATS``, and how to encode the images.

    ``codec`` is ``stored``, ``png``, ``webp`` or ``jpeg``; ``quality``, from 1 to 100, is of
    JPEG (95 unless given) or makes WebP lossy. Files have at least ``part_bytes``.

    Raises:
        UsageError: the format, the codec and the others do not go together.
    """

    format: str
    codec: str = "stored"
    quality: int | None = None
    part_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format: expected {', '.join(FORMATS)}, found {self.format!r}")
        Encoding(self.codec, self.quality)
        if self.format == "release" and self.codec != "stored":
            raise UsageError("a release keeps its images as they are: leave out codec and quality")
        if self.part_bytes is None:
            return
        if self.format in EXPORT_FORMATS and not EXPORT_FORMATS[self.format].in_bytes:
            raise UsageError(f"{self.format} has a file for each image; leave out the part size")
        if self.part_bytes < 1:
            raise UsageError(f"part size: expected at least 1 byte, found {self.part_bytes}")


def export(
    release: Release,
    target: Path,
    options: ExportOptions,
    advance: Advance = lambda _: None,
) -> dict[str, Any]:
    """Write the images into a new folder, and count what is in it.

    Run again after a kill, it resumes. ``advance`` is called with how many more images are done.

    Raises:
        UsageError: there is no image, or ``target`` is taken or inside the release.
        IntegrityError: an image is damaged.
    """
    if not len(release):
        raise UsageError(f"{release.paths.root}: no image to export; choose a larger subset")
    if release.paths.root.resolve() in target.resolve().parents:
        raise UsageError(f"{target} lies inside the release; export into a folder outside of it")
    require_free(target)
    if options.format == "release":
        spans = row_spans(release, options.part_bytes or PART_BYTES)

        def fill(staged: StagedFolder) -> None:
            write_subset(staged, release, spans, advance)

    else:
        form = EXPORT_FORMATS[options.format]
        source = ExportSource(release, Encoding(options.codec, options.quality), advance)
        form.check(source)
        sizes = source.sizes() if form.in_bytes else [1] * len(source)
        spans = cut(sizes, options.part_bytes or form.unit)

        def fill(staged: StagedFolder) -> None:
            for index, span in enumerate(spans):
                name = form.name(index, len(spans))
                if name in staged.finished:
                    advance(source.count_images(span))
                else:
                    form.write(staged.root, name, source, span)
                    staged.finish(name, {})
            _describe(staged.root, options.format, source)

    # Not by the SHA-256 of images alone: black images have one and the same.
    names = [release.metadata[name].to_pylist() for name in ("wnid", "number", "sha256")]
    images = hashlib.sha256(json.dumps([release.digest, *names]).encode()).hexdigest()
    if not build(target, {**asdict(options), "images": images, "spans": spans}, fill):
        raise UsageError(f"{target}: another process has just written it; see what it holds")
    files = (path for path in target.rglob("*") if path.is_file())
    return {
        "format": options.format,
        "images": len(release),
        "synsets": len(release.present),
        "bytes": sum(file.stat().st_size for file in files),
        "path": str(target),
    }


def _describe(root: Path, format: str, source: ExportSource) -> None:
    """Write the table of synsets and the card."""
    release, paths = source.release, ReleasePaths(root)
    write_text(paths.synsets, table_text(tuple(release.present)))
    encoding = source.encoding.describe(set(release.metadata["codec"].to_pylist()))
    layout = CardLayout(format, EXPORT_FORMATS[format].data_files, encoding)
    columns = release.metadata.column_names
    write_text(paths.card, card(release.described, release.present, columns, layout))
