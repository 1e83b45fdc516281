"""What a classifier said of images, as a Parquet table: written whole, checked when it is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdwn.errors import IntegrityError
from sdwn.io import atomic
from sdwn.storage.columns import numbers, read_parquet
from sdwn.wordnet.imagenet import CLASSES

# Of so many classes the best are kept, and a label among them is right by top-5.
TOP = 5
# Added up in single precision, shares of one may be a little more than one.
ROUNDING = 1e-4
NAMED = 3

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
        # The label's place among the 1000, from 0.
        "label_rank": pa.int16(),
        "label_probability": pa.float32(),
        # Of all classes that the classifier knows, those of the synset's scope; null without.
        "subtree_probability": pa.float32(),
    }
)
IMAGE = ("wnid", "synset", "number", "status", "imagenet_class")
# Null without a class, or without a scope.
NULLABLE = ("imagenet_class", "label_rank", "label_probability", "subtree_probability")
KEY = b"sdwn"


@dataclass(frozen=True, slots=True)
class Source:
    """Where predictions are from: the digests of release and judging, rows, classifier.

    They are of the rows ``start`` up to ``stop`` of the judged images. ``judged_on`` lists
    devices: each with its precision, batch size and number of images.
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


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions, whole or not at all."""
    content = json.dumps(asdict(predictions.source))
    table = predictions.table.cast(SCHEMA).replace_schema_metadata({KEY: content})
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def judging_of(path: Path) -> str | None:
    """Read which judging a file of predictions is of; None if there is none that can be read."""
    try:
        return _source(path, pq.read_schema(path)).judging if path.is_file() else None
    except (OSError, pa.ArrowException, IntegrityError):
        return None


def read_predictions(path: Path, most: int) -> Predictions:
    """Read predictions of at most so many images, each value checked.

    Raises:
        IntegrityError: the file is missing, damaged, or says what no classifier says.
    """
    table = read_parquet(path, most).combine_chunks()
    source = _source(path, table.schema)
    if len(table) != source.stop - source.start:
        expected = source.stop - source.start
        raise IntegrityError(f"{path}: expected {expected} rows, found {len(table)}")
    _check_schema(path, table)
    for what, wrong in _wrong_rows(table):
        if wrong.any():
            row = int(wrong.argmax())
            image = f"{table['wnid'][row].as_py()} {table['number'][row].as_py()}"
            raise IntegrityError(f"{path}: row {row} ({image}): {what}")
    return Predictions(table.replace_schema_metadata(None), source)


def top1(table: pa.Table) -> NDArray[np.int64]:
    """Give the best class of each image."""
    best: NDArray[np.int64] = pc.list_element(table["top5"], 0).to_numpy()
    return best.astype(np.int64)


def _source(path: Path, schema: pa.Schema) -> Source:
    try:
        content = json.loads((schema.metadata or {})[KEY])
        return Source(**{field.name: content[field.name] for field in fields(Source)})
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(
            f"{path}: expected predictions of sdwn evaluate, found a table that does not say what "
            "it is of"
        ) from None


def _check_schema(path: Path, table: pa.Table) -> None:
    found = {field.name: field.type for field in table.schema}
    for field in SCHEMA:
        if found.get(field.name) != field.type:
            raise IntegrityError(
                f"{path}: {field.name}: expected {field.type}, found "
                f"{found.get(field.name, 'no such column')}"
            )
        if field.name not in NULLABLE and table[field.name].null_count:
            raise IntegrityError(f"{path}: {field.name}: expected a value for each image")
    if extra := found.keys() - set(SCHEMA.names):
        raise IntegrityError(f"{path}: {min(extra)}: no column of predictions")


def _wrong_rows(table: pa.Table) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Name what may be wrong, with a mask of the rows that are; each relies on those before."""
    for name in ("top5", "top5_probability"):
        column = table[name].combine_chunks()
        yield f"{name}: expected {TOP} values", numbers(pc.list_value_length(column)) != TOP
        yield f"{name}: expected {TOP} values", _has_null(column)
    labelled = numbers(pc.is_valid(table["imagenet_class"]))
    for name in ("label_rank", "label_probability"):
        valid = numbers(pc.is_valid(table[name]))
        yield f"{name}: expected with an imagenet_class, and only with one", valid != labelled
    top5, probability = _matrix(table["top5"]), _matrix(table["top5_probability"])
    yield f"top5: expected classes 0 to {CLASSES - 1}", _any((top5 < 0) | (top5 >= CLASSES))
    yield "top5: a class twice", _any(np.diff(np.sort(top5, axis=1)) == 0)
    yield "top5_probability: expected 0 to 1", _any(_no_share(probability))
    rising = np.diff(probability, axis=1) > ROUNDING
    yield "top5_probability: expected the best first", _any(rising)
    yield (
        "subtree_probability: expected 0 to 1",
        _no_share(numbers(table["subtree_probability"], 0)),
    )
    label, rank = (numbers(table[name], -1) for name in ("imagenet_class", "label_rank"))
    outside = ((rank < 0) | (rank >= CLASSES)) & labelled
    yield f"label_rank: expected 0 to {CLASSES - 1}", outside
    share = numbers(table["label_probability"], 0)
    yield "label_probability: expected 0 to 1", _no_share(share)
    yield (
        "label_rank and top5 disagree",
        labelled & _any((top5 == label[:, None]) != (np.arange(TOP) == rank[:, None])),
    )


def _has_null(column: pa.ListArray) -> NDArray[np.bool_]:
    null = np.zeros(len(column), dtype=bool)
    if column.flatten().null_count:
        parents = pc.list_parent_indices(column).to_numpy()
        null[parents[pc.is_null(column.flatten()).to_numpy(zero_copy_only=False)]] = True
    return null


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    return numbers(column.combine_chunks().flatten()).reshape(-1, TOP)


def _no_share(values: NDArray[Any]) -> NDArray[np.bool_]:
    # Also what is no number at all.
    wrong: NDArray[np.bool_] = ~((values >= 0) & (values <= 1 + ROUNDING))
    return wrong


def _any(wrong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.logical_or.reduce(wrong, axis=1)
    return found


def disagreements(found: pa.Table, images: pa.Table) -> list[str]:
    """Say how predictions differ from a table of images, of which they have to be row for row."""
    differ = [name for name in IMAGE if not _equal(found[name], images[name])]
    if not differ:
        return []
    predicted, expected = Counter(_keys(found)), Counter(_keys(images))
    foreign = [key for key in predicted if key not in expected]
    double = [key for key in predicted if key in expected and predicted[key] > expected[key]]
    kinds = {
        "missing": list((expected - predicted).keys()),
        "twice": double,
        "foreign": foreign,
    }
    problems = [f"{_named(keys)} {kind}" for kind, keys in kinds.items() if keys]
    return problems or [_first_difference(found, images, differ)]


def _equal(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> bool:
    return bool(len(found) == len(expected) and found.combine_chunks() == expected.combine_chunks())


def _keys(table: pa.Table) -> Iterable[tuple[str, int]]:
    return zip(table["wnid"].to_pylist(), table["number"].to_pylist(), strict=True)


def _named(keys: Sequence[tuple[str, int]]) -> str:
    names = ", ".join(f"{wnid} {number}" for wnid, number in keys[:NAMED])
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{names}{more}"


def _first_difference(found: pa.Table, images: pa.Table, differ: Sequence[str]) -> str:
    """Name the first row that has another image, or says something else of it."""
    for row, (one, other) in enumerate(
        zip(
            found.select(IMAGE).to_pylist(),
            images.select(IMAGE).to_pylist(),
            strict=True,
        )
    ):
        for name in differ:
            if one[name] != other[name]:
                return f"row {row}: {name}: expected {other[name]}, found {one[name]}"
    raise AssertionError("called for tables that differ")
