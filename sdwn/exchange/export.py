"""Export of a release, or of some of its images, in a format of others or as a smaller release."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sdwn.errors import UsageError
from sdwn.exchange.formats import EXPORT_FORMATS, ExportSource, Span
from sdwn.io import PART_BYTES, Advance, canonical, read_list, refuse_links, write_text
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import table_text
from sdwn.releases import writer
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import StagedFolder, build, require_free
from sdwn.releases.writer import Attributes, CardLayout, Origin, cut_parts
from sdwn.storage.codecs import CODECS
from sdwn.storage.shards import join
from sdwn.wordnet.taxonomy import read_taxonomy

# A smaller release keeps parts, tables and record; it shares nothing with the other formats.
FORMATS = (*EXPORT_FORMATS, "release")

# How many of the absent images, and how much of each name, a message shows.
SHOWN_NAMES, SHOWN_CHARACTERS = 3, 40


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The format to export to, one of ``FORMATS``, and how to encode the images.

    ``codec`` is ``stored`` (as in the release), ``png``, ``webp`` or ``jpeg``; ``quality``, from
    1 to 100, is of JPEG (95 unless given) or makes WebP lossy. Files have at least ``part_bytes``.
    """

    format: str
    codec: str = "stored"
    quality: int | None = None
    part_bytes: int | None = None

    def __post_init__(self) -> None:
        form = EXPORT_FORMATS.get(self.format)
        if self.quality is not None and self.codec == "stored":
            raise UsageError("a quality is for images that are encoded anew: name jpeg or webp")
        if self.quality is not None and not CODECS[self.codec].takes_quality:
            raise UsageError(
                f"{self.codec} is lossless and has no quality: leave it out, or name jpeg"
            )
        if self.format == "release" and self.codec != "stored":
            raise UsageError("a release keeps its images as they are: leave out codec and quality")
        if self.part_bytes is not None and form and not form.in_bytes:
            raise UsageError(f"{self.format} has a file for each image; leave out the part size")


def export(
    release: Release, target: Path, options: ExportOptions, advance: Advance = lambda _: None
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
        # Whole synsets each.
        wnids = release.metadata["wnid"].combine_chunks().dictionary_encode().indices.to_numpy()
        starts = np.flatnonzero(np.diff(wnids, prepend=-1, append=-1)).tolist()
        sizes = np.add.reduceat(release.metadata["bytes"].to_numpy(), starts[:-1], dtype="i8")
        parts = cut_parts(sizes.tolist(), options.part_bytes or PART_BYTES)
        spans = [(starts[first], starts[last]) for first, last in parts]
        fill = partial(_write_release, release=release, spans=spans, advance=advance)
    else:
        form = EXPORT_FORMATS[options.format]
        source = ExportSource(release, options.codec, options.quality, advance)
        form.check(source)
        units = source.sizes() if form.in_bytes else [1] * len(source)
        spans = cut_parts(units, options.part_bytes or form.unit)
        fill = partial(_write_units, layout=options.format, source=source, spans=spans)
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


def _write_units(
    staged: StagedFolder, layout: str, source: ExportSource, spans: list[Span]
) -> None:
    """Write the units that are not finished yet, the table of synsets and the card."""
    form, release = EXPORT_FORMATS[layout], source.release
    for index, span in enumerate(spans):
        name = form.name(index, len(spans))
        if name in staged.finished:
            source.advance(source.count_images(span))
        else:
            form.write(staged.root, name, source, span)
            staged.finish(name, {})
    paths, present, columns = ReleasePaths(staged.root), release.present, release.metadata
    write_text(paths.synsets, table_text(tuple(present)))
    described = CardLayout(layout, form.data_files, source.encoding())
    write_text(paths.card, writer.card(release.described, present, columns.column_names, described))


# --- A smaller release -------------------------------------------------------------------------
def _write_release(
    staged: StagedFolder, release: Release, spans: list[Span], advance: Advance
) -> None:
    """Fill a folder with a release of these rows, a part a span, images copied as they are."""

    def rows(path: Path) -> list[list[str]]:
        refuse_links(path)
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))[1:]

    described, paths = release.described, release.paths
    missing = rows(paths.missing) if described.missing else []
    skipped = rows(paths.skipped) if described.skipped else []
    refuse_links(paths.taxonomy)
    origin = Origin(
        **{name: getattr(described, name) for name in writer.RECORDED},
        synsets=tuple(release.synsets.values()),
        missing=tuple(release.synsets[wnid] for wnid, _ in missing),
        missing_shards=described.missing.shards if described.missing else "",
        skipped=tuple((file, reason) for file, reason in skipped),
        taxonomy=read_taxonomy(paths.taxonomy) if paths.taxonomy.exists() else None,
    )
    parts = (
        ({"rows": list(span)}, partial(_write_part, release=release, span=span, advance=advance))
        for span in spans
    )
    writer.write_release(staged, origin, parts, advance)


def _write_part(
    path: Path, attributes: Attributes, release: Release, span: Span, advance: Advance
) -> str:
    table = release.metadata.slice(span[0], span[1] - span[0])
    parts, rows = np.array(table["part"].to_pylist()), table["row"].to_numpy().astype("i8")
    # Rows that follow one another in a part are copied as one range.
    follows = (parts[1:] == parts[:-1]) & (np.diff(rows) == 1)
    ends = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(parts)]
    with ExitStack() as stack:
        names = dict.fromkeys(parts.tolist())
        files = {name: stack.enter_context(release.open_part(name)) for name in names}
        ranges = [
            (files[str(parts[start])], int(rows[start]), int(rows[stop - 1]) + 1)
            for start, stop in pairwise(ends)
        ]
        return join(path, attributes, ranges, advance)


# --- Images that a file lists ------------------------------------------------------------------
def select_listed(release: Release, path: Path) -> Release:
    """Select the images that a file lists, in the release's order, each once.

    A table's columns ``wnid`` and ``number`` count. Without ``number``, and in a list of one
    synset a line, whole synsets are taken.
    """
    by_name = {canonical(row.synset): wnid for wnid, row in release.synsets.items()}
    # An image's wnid and number; without a number, all of the synset. In the file's order.
    chosen = dict[tuple[str, int | None], None]()
    for line in read_list(path):
        name = canonical(line.name)
        # Python reads 1_0 as 10, which is another image.
        if line.number is not None and not re.fullmatch("[0-9]{1,10}", line.number):
            raise UsageError(
                f"{line.where}: number: expected a whole number from 0, found {line.number!r:.40}"
            )
        number = None if line.number is None else int(line.number)
        chosen[by_name.get(name, name), number] = None
    if not chosen:
        raise UsageError(f"{path}: lists no image; expected a line for each, below the header")
    wnids = [canonical(wnid) for wnid in release.metadata["wnid"].to_pylist()]
    numbers: list[int | None] = [None] * len(wnids)
    if next(iter(chosen))[1] is not None:
        numbers = release.metadata["number"].to_pylist()
    here = list(zip(wnids, numbers, strict=True))
    present = set(here)
    if absent := [key for key in chosen if key not in present]:
        # A cell may hold anything: as repr() writes it, a name stays one line.
        shown = [
            f"{wnid[:SHOWN_CHARACTERS]!r}" + ("" if number is None else f" {number}")
            for wnid, number in absent[:SHOWN_NAMES]
        ]
        more = f" and {len(absent) - SHOWN_NAMES} more" if len(absent) > SHOWN_NAMES else ""
        raise UsageError(
            f"{path}: {release.paths.root} has no {', '.join(shown)}{more}; take what it lacks "
            "off the list, which has the columns wnid and number, or one synset a line"
        )
    return release.subset(rows=np.array([key in chosen for key in here], dtype=bool))
