"""A release of some of another one's images."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.exchange.gallery import Span
from sdwn.io import Advance, refuse_links
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import Building
from sdwn.releases.writer import Origin, ReleaseWriter, cut
from sdwn.storage.shards import ImageFile, Selection, join


def row_spans(release: Release, part_bytes: int) -> list[Span]:
    """Cut the rows into parts of at least ``part_bytes``, whole synsets each."""
    wnids = release.metadata["wnid"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(wnids, prepend=-1, append=-1))
    sizes = np.add.reduceat(release.metadata["bytes"].to_numpy(), starts[:-1], dtype="i8")
    ends = starts.tolist()
    return [(ends[first], ends[last]) for first, last in cut(sizes.tolist(), part_bytes)]


def write_smaller(
    building: Building, release: Release, spans: list[Span], advance: Advance
) -> None:
    """Fill a folder with a release of these rows, images copied as they are.

    Raises:
        IntegrityError: an image is damaged.
    """
    with ReleaseWriter(building, _origin(release)) as writer:
        for span in spans:

            def write(path: Path, attributes: Mapping[str, Any], span: Span = span) -> str:
                with ExitStack() as stack:
                    return join(path, attributes, list(_selections(release, span, stack)), advance)

            if not writer.add_part({"rows": list(span)}, write):
                advance(span[1] - span[0])


def _selections(release: Release, span: Span, stack: ExitStack) -> Iterator[Selection]:
    rows = release.metadata.slice(span[0], span[1] - span[0])
    parts, places = rows["part"].to_pylist(), rows["row"].to_numpy().astype("i8")
    files = {
        part: stack.enter_context(ImageFile(release.part(part), most=release.manifest.most_rows))
        for part in dict.fromkeys(parts)
    }
    for start, stop in _consecutive(np.array(parts), places):
        yield Selection(files[parts[start]], int(places[start]), int(places[stop - 1]) + 1)


def _consecutive(parts: NDArray[Any], places: NDArray[np.int64]) -> Iterator[Span]:
    """Cut rows where one does not follow the one before in the same part."""
    follows = (parts[1:] == parts[:-1]) & (np.diff(places) == 1)
    ends = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(parts)]
    yield from pairwise(ends)


def _origin(release: Release) -> Origin:
    found = release.described
    missing = _read_csv(release.paths.missing) if found.missing else []
    skipped = _read_csv(release.paths.skipped) if found.skipped else []
    return Origin(
        kind=found.origin,
        catalog=found.catalog,
        synsets=tuple(release.synsets.values()),
        plan_digest=found.plan_digest,
        settings=found.settings,
        evaluation=found.evaluation,
        source=found.source,
        licence=found.licence,
        selection=found.selection,
        missing=tuple(release.synsets[wnid] for wnid, _ in missing),
        missing_shards=found.missing.shards if found.missing else "",
        skipped=tuple((file, reason) for file, reason in skipped),
    )


def _read_csv(path: Path) -> list[list[str]]:
    refuse_links(path)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]
