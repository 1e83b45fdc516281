"""Features of a release's images: one vector an image from a frozen encoder, kept by key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.io import Format, atomic, refuse_links
from sdwn.paths import ReleasePaths
from sdwn.prediction.table import IMAGE, KEY, SCHEMA, find_by_key
from sdwn.releases.release import Release
from sdwn.storage.columns import read_parquet

FORMAT = Format("sdwn-features", 1, "make the features again")
# The longest vectors that are read, and the bytes of an image's other columns.
MOST_DIMENSIONS, OTHER_BYTES = 8192, 1024
VECTOR = "vector"
COLUMNS = pa.schema(
    {
        **{name: SCHEMA.field(name).type for name in IMAGE},
        # Of the decoded RGB pixels and their size: equal where the pixels are.
        "pixels_hash": pa.uint64(),
        # The DCT hash of the image made grey and small: near images differ in few bits.
        "phash": pa.uint64(),
        # 100 times the cosine between image and prompt, at least 0; null unless by a CLIP.
        "clip_score": pa.float32(),
    }
)


@dataclass(frozen=True, slots=True)
class Features:
    """Features of images, a row an image.

    ``table`` has the columns ``COLUMNS``; ``vectors`` is float16 (images, dimensions), as the
    encoder gives them; ``encoder`` is its record (model, weights, preprocessing, versions);
    ``release`` and ``plan`` are digests.
    """

    name: str
    table: pa.Table
    vectors: NDArray[np.float16]
    encoder: Mapping[str, Any]
    release: str
    plan: str = ""


def write_features(path: Path, found: Features) -> None:
    """Write features, whole or not at all."""
    flat = pa.array(np.ascontiguousarray(found.vectors, np.float16).reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, found.vectors.shape[1])
    origin = {name: getattr(found, name) for name in ("release", "plan", "encoder")}
    table = found.table.cast(COLUMNS).append_column(VECTOR, vectors)
    table = table.replace_schema_metadata({KEY: json.dumps(FORMAT.head() | origin)})
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_features(path: Path, most: int) -> Features:
    """Read features of at most so many images, their columns and values checked."""
    table = read_parquet(path, most, 2 * MOST_DIMENSIONS + OTHER_BYTES)
    try:
        origin = FORMAT.upgraded(json.loads((table.schema.metadata or {})[KEY]), path)
        vectors = table[VECTOR].combine_chunks()
        size = vectors.type.list_size
        found = Features(
            path.parent.name,
            table.drop_columns([VECTOR]).replace_schema_metadata(None).cast(COLUMNS),
            vectors.flatten().to_numpy().reshape(len(table), size),
            **{name: origin[name] for name in ("encoder", "release", "plan")},
        )
    except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
        raise IntegrityError(f"{path}: damaged: no table of features: {error}") from None
    if not np.isfinite(found.vectors).all():
        raise IntegrityError(f"{path}: damaged: a feature is not finite")
    return found


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
    found = read_features(path, release.manifest.most_rows)
    rows = find_by_key(release.metadata, found.table, ("id", "number", "sha256"))
    if (rows < 0).any():
        again = command("features", release.paths.root, "--model", found.encoder["model"])
        raise IntegrityError(
            f"{path}: has no features of {(rows < 0).sum():,} images; make them with: {again}"
        )
    if not np.array_equal(rows, np.arange(len(found.table))):
        found = replace(found, table=found.table.take(pa.array(rows)), vectors=found.vectors[rows])
    return found
