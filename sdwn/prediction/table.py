"""Tables of predictions and features: written whole, checked when read, merged from shards."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, SdwnError, UsageError, command, shell, some
from sdwn.io import Format, reading, refuse_links
from sdwn.storage.columns import numbers, read_parquet, write_parquet
from sdwn.wordnet.corpus import CLASSES

if TYPE_CHECKING:
    from sdwn.paths import ReleasePaths, RunPaths
    from sdwn.prediction.plan import ImagePlan
    from sdwn.releases.release import Release

log = logging.getLogger(__name__)


def _with_plain_names(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade the origin of predictions of version 1."""
    names = {"judging": "plan", "judged_on": "predicted_on"}
    return {names.get(name, name): value for name, value in content.items()}


# Of so many classes the best are kept, and a label among them is correct by top-5.
TOP = 5
# What may differ between the tasks of one plan: the rest of a network's record does not.
OF_A_TASK = {"device", "dtype", "versions"}

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        # Null where the concept is no synset.
        "wnid": pa.string(),
        "synset": pa.string(),
        "number": pa.uint32(),
        # Of the image's file. Null throughout in files of version 1: see `keyed`.
        "sha256": pa.string(),
        "status": pa.string(),
        # Null where the concept is of no ImageNet-1k class, and so are the label's two.
        "imagenet_class": pa.int16(),
        # Of ImageNet-1k's 1000 classes, or the classifier's own, best first, with their softmax.
        "top5": pa.list_(pa.int16()),
        "top5_probability": pa.list_(pa.float32()),
        # The label's rank among the 1000, from 0.
        "label_rank": pa.int16(),
        "label_probability": pa.float32(),
        # Of all classes that the classifier knows, those of the nearest subtree; null without.
        "subtree_probability": pa.float32(),
    }
)
# What an image's rows are kept by.
IMAGE_KEY = ("id", "number", "sha256")
IMAGE = ("id", "wnid", "synset", "number", "sha256", "status", "imagenet_class")
KEY = b"sdwn"
VECTOR = "vector"
# Those of features, beside the vector.
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
class ImageTable:
    """A table with a row an image, and its origin."""

    table: pa.Table
    release: str  # its digest
    plan: str  # its digest
    network: Mapping[str, Any]  # what made it: model, weights, preprocessing, versions
    made_on: Sequence[Mapping[str, Any]]  # devices, their precision, batch size, number of images

    FORMAT: ClassVar[Format]
    NAMES: ClassVar[tuple[str, str]]  # what a file calls the network, and the devices

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        values = (self.release, self.plan, self.network, self.made_on)
        origin = dict(zip(("release", "plan", *self.NAMES), values, strict=True))
        table = self.table.replace_schema_metadata({KEY: json.dumps(self.FORMAT.head() | origin)})
        write_parquet(path, table)

    @classmethod
    def read(cls, path: Path, most: int) -> Self:
        """Read a table of at most so many images, and check its columns."""
        table = read_parquet(path, most).combine_chunks()
        with reading(path, cls.FORMAT.remedy):
            content = json.loads((table.schema.metadata or {}).get(KEY, "{}"))
            if "judging" in content:  # version 1 did not name its format
                content |= {**cls.FORMAT.head(), "format_version": 1}
            content = cls.FORMAT.upgraded(content, path)
            origin = [content[name] for name in ("release", "plan", *cls.NAMES)]
            found = cls(table.replace_schema_metadata(None), *origin)
            return replace(found, table=found._checked(path))

    def _checked(self, path: Path) -> pa.Table:
        """Return the table as it was read, in its columns of today; refuse others."""
        raise NotImplementedError

    def keyed(self, path: Path, images: pa.Table) -> Self:
        """Return what was read from ``path``; refuse a table of other rows than a metadata's."""
        # In one piece each, for comparing chunked columns looks at how they are chunked.
        table, images = self.table.combine_chunks(), images.select(IMAGE).combine_chunks()
        if table["sha256"].null_count == len(table) == len(images):  # of version 1
            table = table.set_column(SCHEMA.names.index("sha256"), "sha256", images["sha256"])
        for name in IMAGE:
            if table[name] != images[name]:
                raise IntegrityError(f"{path}: {name}: of other images than the release has")
        return replace(self, table=table)


class Predictions(ImageTable):
    """Predictions of a classifier. Of version 1, they have no SHA-256 of images: see `keyed`."""

    __slots__ = ()
    FORMAT = Format("sdwn-predictions", 2, "evaluate the release again", {1: _with_plain_names})
    NAMES = "classifier", "predicted_on"

    def _checked(self, path: Path) -> pa.Table:
        table, classes = self.table, len(self.network.get("class_names", ())) or CLASSES
        if table.column_names == [name for name in SCHEMA.names if name not in ("id", "sha256")]:
            unknown = pa.nulls(len(table), pa.string())
            table = table.append_column("id", table["wnid"]).append_column("sha256", unknown)
            table = table.select(SCHEMA.names)
        if table.schema == SCHEMA:
            # Readers take the columns of classes as indices.
            lists = table["top5"], table["top5_probability"]
            sizes = {n for one in lists for n in pc.list_value_length(one).unique().to_pylist()}
            columns = pc.list_flatten(lists[0]), table["imagenet_class"], table["label_rank"]
            values = np.concatenate([numbers(column, 0) for column in columns])
            if sizes <= {min(TOP, classes)} and ((values >= 0) & (values < classes)).all():
                return table
        raise IntegrityError(f"{path}: damaged: no table of predictions; {self.FORMAT.remedy}")


class FeatureTable(ImageTable):
    """Features as files have them: the columns ``COLUMNS``, and the vectors as one more."""

    __slots__ = ()
    FORMAT = Format("sdwn-features", 1, "make the features again")
    NAMES = "encoder", "encoded_on"

    def _checked(self, path: Path) -> pa.Table:
        kind = self.table.schema.types[-1]
        expected = COLUMNS.append(pa.field(VECTOR, kind))
        if not pa.types.is_fixed_size_binary(kind) or self.table.schema != expected:
            raise IntegrityError(f"{path}: damaged: no table of features; {self.FORMAT.remedy}")
        return self.table


TABLES: dict[str, type[ImageTable]] = {"predictions": Predictions, "features": FeatureTable}


def with_vectors(table: pa.Table, vectors: NDArray[np.float16]) -> pa.Table:
    """Return the columns of features as files have them, with vectors (images, dimensions)."""
    # As bytes, for Parquet takes ten times as long to read lists, and four times the memory.
    rows, kind = np.ascontiguousarray(vectors, "<f2"), pa.binary(2 * vectors.shape[1])
    column = pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])
    return table.cast(COLUMNS).append_column(VECTOR, column)


def vectors_of(table: pa.Table) -> NDArray[np.float16]:
    """Return the vectors of a table of :func:`with_vectors`."""
    column = table[VECTOR].combine_chunks()
    size = column.type.byte_width // 2
    values = np.frombuffer(column.buffers()[1] or b"", "<f2")[column.offset * size :]
    return values[: len(column) * size].reshape(len(column), size)


def plan_digest_of(path: Path) -> str | None:
    """Read the plan's digest from a table; None if it cannot be read."""
    try:
        content = json.loads((pq.read_schema(path).metadata or {})[KEY])
        return str(content.get("plan") or content["judging"])  # as version 1 called it
    except (OSError, AttributeError, KeyError, ValueError, pa.ArrowException):
        return None


def top1(table: pa.Table) -> NDArray[np.int64]:
    """Return the best class of each image."""
    return numbers(pc.list_element(table["top5"], 0)).astype(np.int64)


def unique_names(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names in a column, each once and sorted, and each row's index there."""
    names, of_image = np.unique(np.asarray(column.to_pylist(), str), return_inverse=True)
    return names.tolist(), of_image


# --- Rows by key: what is kept of an earlier release ------------------------------------------
def find_by_key(images: pa.Table, kept: pa.Table, key: Sequence[str] = IMAGE) -> NDArray[np.int64]:
    """Find the row of ``kept`` that has each image's values in the columns ``key``; -1 if none."""
    how = {"null_handling": "replace", "null_replacement": ""}

    def keys(table: pa.Table) -> pa.Array:
        columns = (table[name].combine_chunks().cast(pa.string()) for name in key)
        return pc.binary_join_element_wise(*columns, "\0", **how)

    return numbers(pc.index_in(keys(images), keys(kept)), -1).astype(np.int64)


def read_earlier(
    kind: type[ImageTable], path: Path, most: int, network: Mapping[str, Any]
) -> pa.Table:
    """Read what the same weights made of an earlier release's images; else return no rows."""
    try:
        if path.exists():
            found = kind.read(path, most)
            if settings_of(found.network) == settings_of(network):
                return found.table
            raise IntegrityError(f"{path}: of other weights or settings")
    except IntegrityError as error:
        log.warning("earlier rows are not used: %s", error)
    return SCHEMA.empty_table()


def settings_of(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a network's record decides its outputs: not where, and with what, it ran."""
    return {name: value for name, value in network.items() if name not in OF_A_TASK}


# --- Shards, and the whole ---------------------------------------------------------------------
def read_whole_table(release: Release, work: RunPaths, plan: ImagePlan) -> ImageTable:
    """Read the table of a plan, compared with plan and release."""
    return _read_checked(plan.table_file(work), plan, plan.images_of(release).metadata)


def merge_shards(release: Release, work: RunPaths, plan: ImagePlan) -> ImageTable:
    """Join a plan's shards to one table; an IntegrityError names all that cannot be joined."""
    again, done, images = plan.command(work), work.done_shards(), plan.images_of(release).metadata
    problems, tables = list[str](), list[ImageTable]()
    if absent := [str(shard.index) for shard in plan.shards if shard.index not in done]:
        problems.append(
            f"{work.root}: {len(absent)} of {len(plan.shards)} shards of {plan.table_name} "
            f"missing ({some(absent, 20)}); make them with: {again}"
        )
    for shard in (shard for shard in plan.shards if shard.index in done):
        path = work.shard(shard.index)
        try:
            found = _read_checked(path, plan, images[shard.start : shard.stop])
            tables.append(found)
            if settings_of(found.network) != settings_of(tables[0].network):
                raise IntegrityError(f"{path}: of other weights or settings")
        except IntegrityError as error:
            problems.append(f"{error}; make it again: {shell('rm', path)} && {again}")
    if problems:
        raise IntegrityError("\n".join(problems))
    devices: dict[tuple[Any, ...], dict[str, Any]] = {}
    for device in (device for one in tables for device in one.made_on):
        key = tuple(value for name, value in device.items() if name != "images")
        devices.setdefault(key, {**device, "images": 0})["images"] += device["images"]
    table = pa.concat_tables(one.table for one in tables)
    return replace(tables[0], table=table, made_on=list(devices.values()))


def _read_checked(path: Path, plan: ImagePlan, images: pa.Table) -> ImageTable:
    """Read a shard, or all, compared with plan and images."""
    found = TABLES[plan.table_name].read(path, plan.images)
    if found.plan != plan.digest:
        raise IntegrityError(
            f"{path}: foreign: of release {found.release[:12]}, plan {found.plan[:12]}; expected "
            f"{plan.release[:12]}, {plan.digest[:12]}"
        )
    return found.keyed(path, images)


# --- Features of a release ----------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Features:
    """Features of images, a row an image."""

    name: str
    table: pa.Table  # with the columns ``COLUMNS``
    vectors: NDArray[np.float16]  # (images, dimensions)
    encoder: Mapping[str, Any]  # its record: model, weights, preprocessing, versions


def feature_names(paths: ReleasePaths) -> list[str]:
    """List the names of the features that a release has."""
    return sorted(x.parent.name for x in paths.evaluations.glob("features/*/features.parquet"))


def open_features(release: Release, name: str | None = None) -> Features:
    """Read the features of a release's images, or of a subset's, in their order.

    Without a name, those of the only encoder; an SdwnError where there are not those of all.
    """
    names = feature_names(release.paths)
    if name is None and len(names) > 1:
        several = f"has features of {', '.join(names)}; choose with --features"
        raise UsageError(f"{release.paths.root}: {several}")
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
        missing = f"has no features of {(rows < 0).sum():,} images"
        raise IntegrityError(f"{path}: {missing}; make them with: {again}")
    table, vectors = found.table.drop_columns([VECTOR]), vectors_of(found.table)
    if not np.array_equal(rows, np.arange(len(table))):
        table, vectors = table.take(pa.array(rows)), vectors[rows]
    return Features(path.parent.name, table, vectors, found.network)
