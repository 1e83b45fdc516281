"""Damage in a file is told in one sentence that names it, whatever reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sdwn.config import Record
from sdwn.errors import DiskError, IntegrityError, UsageError
from sdwn.io import Format, reading
from sdwn.prediction.table import KEY, FeatureTable, ImageTable, Predictions
from sdwn.storage.columns import read_parquet

FORMAT = Format("sdwn-thing", 2, "make it again", {1: lambda old: {**old, "format_version": 2}})


class Thing(Record):
    format: str
    format_version: int
    images: int


def read(path: Path) -> Thing:
    with FORMAT.reading(path) as content:
        return Thing.model_validate(content)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "damaged: JSONDecodeError: Expecting value"),
        ("[1]", "damaged: TypeError: expected a JSON object, found list"),
        ("[" * 100_000, "damaged: RecursionError"),
        ("{}", "expected sdwn-thing 2, found another file"),
        ('{"format": "sdwn-thing", "format_version": 3}', "expected sdwn-thing 2, found sdwn-th"),
        ('{"format": "sdwn-thing", "format_version": 1}', "damaged: images: Field required"),
        (
            '{"format": "sdwn-thing", "format_version": 2, "images": "3"}',
            "damaged: images: Input should be a valid integer",
        ),
    ],
)
def test_a_damaged_record_is_named_with_what_to_do(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "thing.json"
    path.write_text(text)
    with pytest.raises(IntegrityError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: {expected}")
    assert said.endswith("; make it again")
    assert "\n" not in said


def test_an_old_record_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "thing.json"
    path.write_text('{"format": "sdwn-thing", "format_version": 1, "images": 3}')
    assert read(path) == Thing(format="sdwn-thing", format_version=2, images=3)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.write_bytes(b"PAR1"), "damaged: ArrowInvalid"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged: ArrowInvalid"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.unlink() or os.mkfifo(path), "no plain file"),
    ],
)
def test_a_damaged_table_is_named(
    tmp_path: Path, spoil: Callable[[Path], Any], expected: str
) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"id": ["a", "b"]}), path)
    assert read_parquet(path, 2).num_rows == 2
    with pytest.raises(IntegrityError, match="expected at most 1 rows, it claims 2"):
        read_parquet(path, 1)
    spoil(path)
    with pytest.raises(IntegrityError, match=rf"table\.parquet: {expected}"):
        read_parquet(path, 2)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [(Predictions, "evaluate the release again"), (FeatureTable, "make the features again")],
)
def test_a_parquet_file_of_another_kind_is_named_with_what_to_do(
    tmp_path: Path, kind: type[ImageTable], remedy: str
) -> None:
    path, name, version = tmp_path / "table.parquet", kind.FORMAT.name, kind.FORMAT.version
    table, head = pa.table({"id": ["a", "b"]}), json.dumps(FORMAT.head())
    for written, found in (
        (table, "another file"),
        (table.replace_schema_metadata({KEY: head}), "sdwn-thing 2"),
    ):
        pq.write_table(written, path)
        with pytest.raises(IntegrityError) as caught:
            kind.read(path, 99)
        expected = f"expected {name} {version}, found {found}; {remedy}"
        assert str(caught.value) == f"{path}: {expected}"
    kind(table, "", "", {}, []).write(path)
    with pytest.raises(IntegrityError, match=f"damaged: no table .*; {remedy}$"):
        kind.read(path, 99)


def test_errors_with_a_sentence_of_their_own_pass(tmp_path: Path) -> None:
    for error in (UsageError("--set what"), DiskError("no room")):
        with pytest.raises(type(error)) as caught, reading(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(IntegrityError, match="cannot be read: Is a directory"), reading(tmp_path):
        tmp_path.read_text()
