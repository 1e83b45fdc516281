"""Features of a release's images: one vector an image from a frozen encoder, kept by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.io import refuse_links
from sdwn.paths import ReleasePaths
from sdwn.prediction.table import (
    COLUMNS,
    IMAGE_KEY,
    VECTOR,
    FeatureTable,
    find_by_key,
    vectors_of,
)
from sdwn.releases.release import Release


@dataclass(frozen=True, slots=True)
class Features:
    """Features of images, a row an image.

    ``table`` has the columns ``COLUMNS``; ``vectors`` is float16 (images, dimensions), as the
    encoder gives them; ``encoder`` is its record (model, weights, preprocessing, versions).
    """

    name: str
    table: pa.Table
    vectors: NDArray[np.float16]
    encoder: Mapping[str, Any]


def with_vectors(table: pa.Table, vectors: NDArray[np.float16]) -> pa.Table:
    """Return the columns of features as files have them, with vectors (images, dimensions)."""
    # As bytes, for Parquet takes ten times as long to read lists, and four times the memory.
    rows, kind = np.ascontiguousarray(vectors, "<f2"), pa.binary(2 * vectors.shape[1])
    column = pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])
    return table.cast(COLUMNS).append_column(VECTOR, column)


def feature_names(paths: ReleasePaths) -> list[str]:
    """List the names of the features that a release has."""
    found = paths.evaluations.glob("features/*/features.parquet")
    return sorted(path.parent.name for path in found)


def open_features(release: Release, name: str | None = None) -> Features:
    """Read the features of a release's images, or of a subset's, in their order.

    Args:
        release: a release or a subset of one.
        name: of the features; None where there is only one.

    Raises:
        SdwnError: there are none of this name, or not of all these images.
    """
    names = feature_names(release.paths)
    if name is None and len(names) > 1:
        raise UsageError(
            f"{release.paths.root}: has features of {', '.join(names)}; choose with --features"
        )
    name = name or (names[0] if names else None)
    if name not in names:
        there = f"has features of {', '.join(names)}, not of {name}" if names else "has no features"
        again = command("features", release.paths.root, *(["--model", name] if name else []))
        raise SdwnError(f"{release.paths.root}: {there}; make them with: {again}")
    path = release.paths.features(str(name)).features
    refuse_links(release.paths.evaluations)
    found = FeatureTable.read(path, release.manifest.most_rows)
    rows = find_by_key(release.metadata, found.table, IMAGE_KEY)
    if (rows < 0).any():
        again = command("features", release.paths.root, "--model", found.network["model"])
        raise IntegrityError(
            f"{path}: has no features of {(rows < 0).sum():,} images; make them with: {again}"
        )
    table, vectors = found.table.drop_columns([VECTOR]), vectors_of(found.table)
    if not np.array_equal(rows, np.arange(len(table))):
        table, vectors = table.take(pa.array(rows)), vectors[rows]
    return Features(path.parent.name, table, vectors, found.network)
