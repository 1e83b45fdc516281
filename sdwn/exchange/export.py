"""Export of a release, or a subset of one, in a format that other libraries read.

::

    release --> ExportSource --> spans of synsets --> a file, or some folders, a span
               (sorted, encoded)      (units)          (one module a format)

A new format is one module with an :class:`ExportFormat`, a line in ``EXPORT_FORMATS``, a template
of the same name for its card, and its name in ``sdwn export --format``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdwn.errors import UsageError
from sdwn.exchange.export_source import ExportFormat, ExportSource
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
from sdwn.releases.writer import cut_parts
from sdwn.storage.codecs import CODECS, EXCHANGED

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

    ``codec`` is ``stored`` (as in the release), ``png``, ``webp`` or ``jpeg``; ``quality``, from
    1 to 100, is of JPEG (95 unless given) or makes WebP lossy. Files have at least ``part_bytes``.

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
        if self.codec not in (valid := ("stored", *EXCHANGED)):
            raise UsageError(f"codec: expected {', '.join(valid)}, found {self.codec!r}")
        if self.quality is not None:
            if self.codec == "stored":
                raise UsageError("a quality is for images that are encoded anew: name jpeg or webp")
            if not CODECS[self.codec].takes_quality:
                raise UsageError(
                    f"{self.codec} is lossless and has no quality: leave it out, or name jpeg"
                )
            if not 1 <= self.quality <= 100:
                raise UsageError(f"quality: expected 1 to 100, found {self.quality}")
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
        source = ExportSource(release, options.codec, options.quality, advance)
        form.check(source)
        sizes = source.sizes() if form.in_bytes else [1] * len(source)
        spans = cut_parts(sizes, options.part_bytes or form.unit)

        def fill(staged: StagedFolder) -> None:
            for index, span in enumerate(spans):
                name = form.name(index, len(spans))
                if name in staged.finished:
                    advance(source.count_images(span))
                else:
                    form.write(staged.root, name, source, span)
                    staged.finish(name, {})
            paths, columns = ReleasePaths(staged.root), release.metadata.column_names
            write_text(paths.synsets, table_text(tuple(release.present)))
            layout = CardLayout(options.format, form.data_files, source.encoding())
            write_text(paths.card, card(release.described, release.present, columns, layout))

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
