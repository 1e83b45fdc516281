"""Export format ``parquet``: images inside the tables, as Hugging Face datasets reads them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdwn.exchange.export_source import ExportFormat, ExportImage, ExportSource, Span, path_name
from sdwn.io import atomic

# Readers show a page of rows by reading whole groups of them.
GROUP_ROWS = 100


def _write(root: Path, name: str, source: ExportSource, span: Span) -> None:
    names = source.schema.names
    image = pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    # All features by the names that the datasets library has for them.
    values = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in source.schema}
    features = {"image": {"_type": "Image"}, **values}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([image, *source.schema], metadata=metadata)
    # Encoded images become no smaller, and two are never the same.
    packed = {"image.bytes": "none", "image.path": "zstd", **dict.fromkeys(names, "zstd")}
    with (
        atomic(root / name) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression=packed, use_dictionary=names, write_statistics=names
        ) as writer,
    ):
        records = source.map(span, _record)
        while group := list(islice(records, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _record(image: ExportImage) -> dict[str, Any]:
    path = f"{path_name(image.row['wnid'])}_{image.row['number']:04d}.{image.extension}"
    return {"image": {"bytes": image.payload, "path": path}, **image.row}


PARQUET = ExportFormat(
    name=lambda index, count: f"data/train-{index:05d}-of-{count:05d}.parquet",
    write=_write,
    unit=500_000_000,
    data_files="data/train-*.parquet",
)
