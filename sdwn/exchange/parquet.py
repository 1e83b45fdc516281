"""Parquet files as the datasets library and dataset hubs read them, images inside."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdwn.exchange.gallery import Exhibit, Gallery, Span
from sdwn.exchange.layout import Layout
from sdwn.exchange.names import file_name
from sdwn.io import atomic

PART_BYTES = 500_000_000
# Readers show a page of rows by reading whole groups of them.
GROUP_ROWS = 100


def _write(root: Path, name: str, gallery: Gallery, span: Span) -> None:
    schema = image_schema(gallery.schema)
    names = gallery.schema.names
    # Encoded images become no smaller, and two are never the same.
    packed = {"image.bytes": "none", "image.path": "zstd", **dict.fromkeys(names, "zstd")}
    with (
        atomic(root / name) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression=packed, use_dictionary=names, write_statistics=names
        ) as writer,
    ):
        records = gallery.each(span, _record)
        while group := list(islice(records, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def image_schema(columns: pa.Schema) -> pa.Schema:
    """Put the column of images before others, and name all features as ``datasets`` does."""
    image = pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    values = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in columns}
    features = {"image": {"_type": "Image"}, **values}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([image, *columns], metadata=metadata)


def _record(exhibit: Exhibit) -> dict[str, Any]:
    row = exhibit.row
    path = f"{file_name(row['wnid'])}_{row['number']:04d}.{exhibit.extension}"
    return {"image": {"bytes": exhibit.payload, "path": path}, **row}


PARQUET = Layout(
    lambda index, count: f"data/train-{index:05d}-of-{count:05d}.parquet",
    _write,
    PART_BYTES,
    data_files="data/train-*.parquet",
)
