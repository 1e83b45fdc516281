"""A release of some of another one's images, written with export format ``release``."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from sdwn.exchange.export_source import Span
from sdwn.io import Advance, refuse_links
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import StagedFolder
from sdwn.releases.writer import Attributes, Origin, ReleaseWriter, cut_parts
from sdwn.storage.shards import ImageFile, RowRange, join
from sdwn.wordnet.taxonomy import read_taxonomy


def row_spans(release: Release, part_bytes: int) -> list[Span]:
    """Cut the rows into parts of at least ``part_bytes``, whole synsets each."""
    wnids = release.metadata["wnid"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(wnids, prepend=-1, append=-1))
    sizes = np.add.reduceat(release.metadata["bytes"].to_numpy(), starts[:-1], dtype="i8")
    ends = starts.tolist()
    return [(ends[first], ends[last]) for first, last in cut_parts(sizes.tolist(), part_bytes)]


def write_subset(
    staged: StagedFolder, release: Release, spans: list[Span], advance: Advance
) -> None:
    """Fill a folder with a release of these rows, a part a span, images copied as they are.

    Raises:
        IntegrityError: an image is damaged.
    """
    described, paths = release.described, release.paths
    missing = _read_csv(paths.missing) if described.missing else []
    skipped = _read_csv(paths.skipped) if described.skipped else []
    refuse_links(paths.taxonomy)
    origin = Origin(
        kind=described.origin,
        catalog=described.catalog,
        synsets=tuple(release.synsets.values()),
        plan_digest=described.plan_digest,
        settings=described.settings,
        evaluation=described.evaluation,
        source=described.source,
        licence=described.licence,
        selection=described.selection,
        missing=tuple(release.synsets[wnid] for wnid, _ in missing),
        missing_shards=described.missing.shards if described.missing else "",
        skipped=tuple((file, reason) for file, reason in skipped),
        taxonomy=read_taxonomy(paths.taxonomy) if paths.taxonomy.exists() else None,
    )
    with ReleaseWriter(staged, origin) as writer:
        for span in spans:
            write = partial(_write_part, release=release, span=span, advance=advance)
            if kept := writer.add_part({"rows": list(span)}, write):
                advance(kept)


def _write_part(
    path: Path, attributes: Attributes, release: Release, span: Span, advance: Advance
) -> str:
    table = release.metadata.slice(span[0], span[1] - span[0])
    parts, rows = np.array(table["part"].to_pylist()), table["row"].to_numpy().astype("i8")
    # Rows that follow one another in a part are copied as one range.
    follows = (parts[1:] == parts[:-1]) & (np.diff(rows) == 1)
    ends = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(parts)]
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(
                ImageFile(release.part(part), most=release.manifest.most_rows)
            )
            for part in dict.fromkeys(parts.tolist())
        }
        ranges = [
            RowRange(files[str(parts[start])], int(rows[start]), int(rows[stop - 1]) + 1)
            for start, stop in pairwise(ends)
        ]
        return join(path, attributes, ranges, advance)


def _read_csv(path: Path) -> list[list[str]]:
    refuse_links(path)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]
