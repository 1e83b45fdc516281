"""Write a release, or a subset of one, in a layout that other libraries read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdwn.errors import UsageError
from sdwn.exchange.encoding import Encoding
from sdwn.exchange.folders import FOLDERS, IMAGEFOLDER
from sdwn.exchange.gallery import Gallery, Span, images_digest
from sdwn.exchange.layout import Layout
from sdwn.exchange.parquet import PARQUET
from sdwn.exchange.smaller import row_spans, write_smaller
from sdwn.exchange.webdataset import WEBDATASET
from sdwn.io import PART_BYTES, Advance, write_text
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import table_text
from sdwn.releases.card import Form, card
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import Building, build, require_free

LAYOUTS: Mapping[str, Layout] = {
    "folders": FOLDERS,
    "imagefolder": IMAGEFOLDER,
    "webdataset": WEBDATASET,
    "parquet": PARQUET,
}
FORMATS = (*LAYOUTS, "release")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export to, one of ``FORMATS``, and how to encode the images.

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
        if self.format in LAYOUTS and not LAYOUTS[self.format].in_bytes:
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

    An export that a kill left unfinished is gone on with. ``advance`` is told how many images
    are done.

    Raises:
        UsageError: there is no image, or ``target`` is taken or inside the release.
        IntegrityError: an image is damaged.
    """
    if not len(release):
        raise UsageError(f"{release.paths.root}: no image to export; choose a larger subset")
    if release.paths.root.resolve() in target.resolve().parents:
        raise UsageError(f"{target} lies inside the release; export into a folder outside of it")
    require_free(target)
    spans, fill = _prepared(release, options, advance)
    recipe = {**asdict(options), "images": images_digest(release), "spans": spans}
    if not build(target, recipe, fill):
        raise UsageError(f"{target}: another process has just written it; see what it holds")
    files = (path for path in target.rglob("*") if path.is_file())
    return {
        "format": options.format,
        "images": len(release),
        "synsets": len(release.present),
        "bytes": sum(file.stat().st_size for file in files),
        "path": str(target),
    }


def _prepared(
    release: Release, options: ExportOptions, advance: Advance
) -> tuple[list[Span], Callable[[Building], None]]:
    """Cut the images into units, and give what writes these."""
    if options.format == "release":
        rows = row_spans(release, options.part_bytes or PART_BYTES)
        return rows, lambda building: write_smaller(building, release, rows, advance)
    layout = LAYOUTS[options.format]
    gallery = Gallery(release, Encoding(options.codec, options.quality), advance)
    layout.check(gallery)
    spans = layout.spans(gallery, options.part_bytes)
    form = Form(options.format, layout.data_files, gallery.codec)
    return spans, lambda building: _fill(building, gallery, spans, form)


def _fill(building: Building, gallery: Gallery, spans: list[Span], form: Form) -> None:
    layout, release = LAYOUTS[form.name], gallery.release
    for index, span in enumerate(spans):
        name = layout.name(index, len(spans))
        if name in building.finished:
            gallery.skip(span)
        else:
            layout.write(building.root, name, gallery, span)
            building.finish(name, {})
    paths = ReleasePaths(building.root)
    write_text(paths.synsets, table_text(tuple(release.present)))
    columns = release.metadata.column_names
    write_text(paths.card, card(release.described, release.present, columns, form))
