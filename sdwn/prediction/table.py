"""The table of predictions: written whole, checked when it is read, merged from shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, MisplacedError, shell
from sdwn.io import atomic
from sdwn.planning.work import Shard
from sdwn.storage.columns import numbers, read_parquet
from sdwn.wordnet.imagenet import CLASSES

if TYPE_CHECKING:
    from sdwn.paths import EvaluationPaths, RunPaths
    from sdwn.prediction.plan import PredictionPlan
    from sdwn.releases.release import Release

# Of so many classes the best are kept, and a label among them is correct by top-5.
TOP = 5
# Added up in single precision, shares of one may be a little more than one.
ROUNDING = 1e-4
# So many images, and missing shards, are named in a message.
IMAGES_NAMED, SHARDS_NAMED = 3, 20
# What may differ between the tasks of one plan: the rest of a classifier's record does not.
OF_A_TASK = ("device", "dtype", "versions")

SCHEMA = pa.schema(
    {
        "wnid": pa.string(),
        "synset": pa.string(),
        "number": pa.uint32(),
        "status": pa.string(),
        # Null where the synset is no ImageNet-1k class, and so are the label's two.
        "imagenet_class": pa.int16(),
        # Of the 1000 classes of ImageNet-1k, best first, with their softmax.
        "top5": pa.list_(pa.int16()),
        "top5_probability": pa.list_(pa.float32()),
        # The label's rank among the 1000, from 0.
        "label_rank": pa.int16(),
        "label_probability": pa.float32(),
        # Of all classes that the classifier knows, those of the nearest subtree; null without.
        "subtree_probability": pa.float32(),
    }
)
IMAGE = ("wnid", "synset", "number", "status", "imagenet_class")
# Null without a class, or without a subtree.
NULLABLE = ("imagenet_class", "label_rank", "label_probability", "subtree_probability")
KEY = b"sdwn"


@dataclass(frozen=True, slots=True)
class Source:
    """The origin of predictions: the digests of release and plan, the rows, the classifier.

    They are of the rows ``start`` up to ``stop`` of the classified images. ``judging`` is the
    plan's digest. ``judged_on`` lists devices: each with its precision, batch size and number of
    images. The names are those of the file.
    """

    release: str
    judging: str
    start: int
    stop: int
    classifier: Mapping[str, Any]
    judged_on: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Predictions:
    """A table of predictions, and where it is from."""

    table: pa.Table
    source: Source


def top1(table: pa.Table) -> NDArray[np.int64]:
    """Return the best class of each image."""
    best: NDArray[np.int64] = numbers(pc.list_element(table["top5"], 0)).astype(np.int64)
    return best


def group_by_wnid(table: pa.Table) -> tuple[list[str], NDArray[np.int64]]:
    """Return the wnids of a table of images, each once and sorted, and each image's index there.

    >>> wnids, of_image = group_by_wnid(pa.table({"wnid": ["n02", "n01", "n02"]}))
    >>> wnids, of_image.tolist()
    (['n01', 'n02'], [1, 0, 1])
    """
    every = np.asarray(table["wnid"].to_pylist(), dtype=str)
    wnids, of_image = np.unique(every, return_inverse=True)
    return wnids.tolist(), of_image


# --- One file ----------------------------------------------------------------------------------


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions, whole or not at all."""
    content = json.dumps(asdict(predictions.source))
    table = predictions.table.cast(SCHEMA).replace_schema_metadata({KEY: content})
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def plan_digest_of(path: Path) -> str | None:
    """Read the plan's digest from a file of predictions; None if it cannot be read."""
    try:
        return _source(path, pq.read_schema(path)).judging if path.is_file() else None
    except (OSError, pa.ArrowException, IntegrityError):
        return None


def read_predictions(path: Path, most: int) -> Predictions:
    """Read predictions of at most so many images, each value checked.

    Raises:
        IntegrityError: the file is missing, damaged, or has values that no classifier gives.
    """
    table = read_parquet(path, most).combine_chunks()
    source = _source(path, table.schema)
    if len(table) != (expected := source.stop - source.start):
        raise IntegrityError(f"{path}: expected {expected} rows, found {len(table)}")
    types = {field.name: field.type for field in table.schema}
    for field in SCHEMA:
        if (found := types.get(field.name, "no such column")) != field.type:
            raise IntegrityError(f"{path}: {field.name}: expected {field.type}, found {found}")
        if field.name not in NULLABLE and table[field.name].null_count:
            raise IntegrityError(f"{path}: {field.name}: expected a value for each image")
    if extra := types.keys() - set(SCHEMA.names):
        raise IntegrityError(f"{path}: {min(extra)}: no column of predictions")
    for what, wrong in _wrong_rows(table):
        if wrong.any():
            row = int(wrong.argmax())
            image = f"{table['wnid'][row].as_py()} {table['number'][row].as_py()}"
            raise IntegrityError(f"{path}: row {row} ({image}): {what}")
    return Predictions(table.replace_schema_metadata(None), source)


def _source(path: Path, schema: pa.Schema) -> Source:
    try:
        content = json.loads((schema.metadata or {})[KEY])
        return Source(**{field.name: content[field.name] for field in fields(Source)})
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(
            f"{path}: expected predictions of sdwn evaluate, found a table without "
            "the digests of its release and plan"
        ) from None


def _wrong_rows(table: pa.Table) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each rule with a mask of the rows that break it; later rules rely on earlier ones."""
    for name in ("top5", "top5_probability"):
        column = table[name].combine_chunks()
        values = column.flatten()
        yield f"{name}: expected {TOP} values", numbers(pc.list_value_length(column)) != TOP
        null = np.zeros(len(column), dtype=bool)
        null[numbers(pc.list_parent_indices(column))[numbers(pc.is_null(values))]] = True
        yield f"{name}: expected {TOP} values", null
    labelled = numbers(pc.is_valid(table["imagenet_class"]))
    for name in ("label_rank", "label_probability"):
        valid = numbers(pc.is_valid(table[name]))
        yield f"{name}: expected with an imagenet_class, and only with one", valid != labelled
    top5, probability = (
        numbers(table[name].combine_chunks().flatten()).reshape(-1, TOP)
        for name in ("top5", "top5_probability")
    )

    def no_share(values: NDArray[Any]) -> NDArray[np.bool_]:
        # Also what is no number at all.
        wrong: NDArray[np.bool_] = ~((values >= 0) & (values <= 1 + ROUNDING))
        return wrong

    def in_any(wrong: NDArray[np.bool_]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.logical_or.reduce(wrong, axis=1)
        return found

    yield f"top5: expected classes 0 to {CLASSES - 1}", in_any((top5 < 0) | (top5 >= CLASSES))
    yield "top5: a class twice", in_any(np.diff(np.sort(top5, axis=1)) == 0)
    yield "top5_probability: expected 0 to 1", in_any(no_share(probability))
    rising = np.diff(probability, axis=1) > ROUNDING
    yield "top5_probability: expected the best first", in_any(rising)
    for name in ("subtree_probability", "label_probability"):
        yield f"{name}: expected 0 to 1", no_share(numbers(table[name], 0))
    label, rank = (numbers(table[name], -1) for name in ("imagenet_class", "label_rank"))
    outside = ((rank < 0) | (rank >= CLASSES)) & labelled
    yield f"label_rank: expected 0 to {CLASSES - 1}", outside
    differ = (top5 == label[:, None]) != (np.arange(TOP) == rank[:, None])
    yield "label_rank and top5 disagree", labelled & in_any(differ)


def disagreements(found: pa.Table, images: pa.Table) -> list[str]:
    """List how predictions differ from a table of images, which they have to match row by row."""
    # In one piece each, for comparing chunked columns looks at how they are chunked.
    one, other = (table.select(IMAGE).combine_chunks() for table in (found, images))
    differ = [name for name in IMAGE if len(one) != len(other) or one[name] != other[name]]
    if not differ:
        return []
    predicted, expected = (
        Counter(zip(table["wnid"].to_pylist(), table["number"].to_pylist(), strict=True))
        for table in (found, images)
    )
    kinds = {
        "missing": list(expected - predicted),
        "twice": [key for key in predicted if 0 < expected[key] < predicted[key]],
        "foreign": [key for key in predicted if key not in expected],
    }
    problems = []
    for kind, keys in kinds.items():
        if keys:
            names = ", ".join(f"{wnid} {number}" for wnid, number in keys[:IMAGES_NAMED])
            more = len(keys) - IMAGES_NAMED
            problems.append(f"{names}{f' and {more} more' if more > 0 else ''} {kind}")
    if problems:
        return problems
    rows = zip(found.select(IMAGE).to_pylist(), images.select(IMAGE).to_pylist(), strict=True)
    return next(
        [f"row {row}: {name}: expected {other[name]}, found {one[name]}"]
        for row, (one, other) in enumerate(rows)
        for name in differ
        if one[name] != other[name]
    )


# --- Shards, and the whole ---------------------------------------------------------------------


def read_whole_predictions(
    release: Release, paths: EvaluationPaths, plan: PredictionPlan
) -> Predictions:
    """Read an evaluation's predictions, compared with plan and release.

    Raises:
        IntegrityError: they are missing, damaged, or of something else.
    """
    images = plan.images_of(release).metadata
    return _read_checked(paths.predictions, plan, Shard(0, 0, plan.images), images)


def remove_damaged_shards(release: Release, work: RunPaths, plan: PredictionPlan) -> Iterator[str]:
    """Remove finished shards that are damaged; yield what is wrong with each.

    What is whole and only lies where another belongs is left there.
    """
    images, done = plan.images_of(release).metadata, work.done_shards()
    for shard in plan.shards:
        if shard.index in done:
            try:
                _read_checked(work.shard(shard.index), plan, shard, images)
            except MisplacedError:
                continue
            except IntegrityError as error:
                work.shard(shard.index).unlink(missing_ok=True)
                yield str(error)


def merge_predictions(release: Release, work: RunPaths, plan: PredictionPlan) -> Predictions:
    """Join a plan's finished shards to one table.

    Raises:
        IntegrityError: with every problem, a line each: shards that are missing, damaged or
            foreign; images that are missing, foreign, there twice, or in another order.
    """
    again, done = plan.command(work), work.done_shards()
    problems: list[str] = []
    if absent := [shard.index for shard in plan.shards if shard.index not in done]:
        names = ", ".join(map(str, absent[:SHARDS_NAMED])) + ", ..." * (len(absent) > SHARDS_NAMED)
        problems.append(
            f"{work.root}: {len(absent)} of {len(plan.shards)} shards of predictions missing "
            f"({names}); make them with: {again}"
        )
    for index in sorted(done - {shard.index for shard in plan.shards}):
        problems.append(f"{work.shard(index)}: the plan has no such shard; move it away")
    images, found = plan.images_of(release).metadata, list[Predictions]()
    for shard in plan.shards:
        if shard.index in done:
            path, first = work.shard(shard.index), found[0] if found else None
            try:
                found.append(_read_checked(path, plan, shard, images, first))
            except MisplacedError as error:
                problems.append(f"{error}; move it away, then: {again}")
            except IntegrityError as error:
                problems.append(f"{error}; make it again: {shell('rm', path)} && {again}")
    if problems:
        raise IntegrityError("\n".join(problems))
    devices: dict[tuple[Any, ...], dict[str, Any]] = {}
    for device in (device for shard in found for device in shard.source.judged_on):
        key = device["device"], device["dtype"], device["batch_size"]
        devices.setdefault(key, {**device, "images": 0})["images"] += device["images"]
    classifier = found[0].source.classifier
    whole = Source(plan.release, plan.digest, 0, plan.images, classifier, list(devices.values()))
    return Predictions(pa.concat_tables(one.table for one in found), whole)


def _read_checked(
    path: Path,
    plan: PredictionPlan,
    shard: Shard,
    images: pa.Table,
    first: Predictions | None = None,
) -> Predictions:
    """Read a shard, or all, compared with plan and images, and with the first one's classifier."""
    found = read_predictions(path, plan.images)
    source = found.source
    if source.judging != plan.digest:
        raise MisplacedError(
            f"{path}: foreign: of release {source.release[:12]}, plan {source.judging[:12]}; "
            f"expected {plan.release[:12]}, {plan.digest[:12]}",
            source.judging,
        )
    if (source.start, source.stop) != (shard.start, shard.stop):
        raise MisplacedError(
            f"{path}: expected images {shard.start} to {shard.stop - 1} of this plan, found "
            f"{source.start} to {source.stop - 1}",
            source.judging,
        )
    if problems := disagreements(found.table, images.slice(shard.start, len(found.table))):
        raise IntegrityError(f"{path}: {'; '.join(problems)}")
    expected = first.source.classifier if first else source.classifier
    for name in sorted({*expected, *source.classifier} - set(OF_A_TASK)):
        if expected.get(name) != source.classifier.get(name):
            raise IntegrityError(
                f"{path}: classified with another {name} than the shards before it"
            )
    return found
