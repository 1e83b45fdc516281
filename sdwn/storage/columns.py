"""The columns of a table of images: what is recorded of each, in HDF5, Arrow and NumPy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdwn.errors import IntegrityError
from sdwn.io import atomic, open_plain, read_whole, reading
from sdwn.storage.codecs import CODECS

STATUSES = ("ok", "nsfw", "nan", "unknown", "black")
BLACK = ("nsfw", "nan", "black")  # those of them that are black images
# No row of a table of images or predictions takes as much, however long its prompt.
ROW_BYTES = 1 << 16

Table = dict[str, NDArray[Any]]


class Column(NamedTuple):
    """A column of ``/rows``."""

    name: str
    dtype: str | None  # NumPy's; None is text
    meaning: str
    names: tuple[str, ...] = ()  # of an enumeration, whose values are positions in it
    width: int = 0  # number of values in a row, if not one


COLUMNS = (
    Column("id", None, "of its concept: the wnid of a synset, or the id in a table of prompts"),
    Column("wnid", None, "n and the 8-digit WordNet 3.0 noun offset; empty where there is none"),
    Column("synset", None, "WordNet's name of the synset; empty where there is none"),
    Column("number", "u4", "which of the concept's images, from 0"),
    Column("seed", "u8", "of the CPU generator that drew the noise"),
    Column("prompt", None, "the text that it was made of"),
    Column("prompt_number", "u4", "which of the concept's prompts that is, from 0"),
    Column("negative_prompt", None, "the text that it was guided away from"),
    Column("tokens", "u4", "of the prompt, start and end included"),
    Column("truncated", "?", "the prompt was longer than the text encoder takes"),
    Column(
        "status",
        "u1",
        "ok; nsfw: blackened by the safety checker; nan: black, for the model gave NaN; black: "
        "imported so; unknown: imported",
        names=STATUSES,
    ),
    Column("batch", "u4", "first image of its batch, counted in the shard"),
    Column("batch_size", "u4", "images in its batch"),
    Column("place", "u4", "its place in the batch, from 0"),
    Column("vae_slicing", "?", "its batch was decoded one by one"),
    Column("retried_fp32", "?", "it was NaN, and was sampled again in float32"),
    Column("attempt", "u4", "which run of a task on this shard made it, from 1"),
    Column("task_run", "u4", "row of /task_runs"),
    Column("width", "u4", "pixels"),
    Column("height", "u4", "pixels"),
    Column("codec", "u1", "how the image is encoded; raw is RGB, row by row", names=tuple(CODECS)),
    Column("sha256", "u1", "of the encoded image", width=32),
    Column("file", None, "its name before it was imported"),
)
# The names of version 1; there the wnid was the key.
VERSION_1 = {"id": "wnid", "retried_fp32": "redone", "task_run": "session"}


def to_columns(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Turn rows of plain values, enumerations by name, into columns; absent ones are left out."""
    table = {}
    for column in (column for column in COLUMNS if column.name in rows[0]):
        values = [row[column.name] for row in rows]
        if column.dtype is None:
            table[column.name] = np.array([str(value).encode() for value in values], dtype="S")
        elif column.width:
            flat = np.frombuffer(b"".join(values), dtype=column.dtype)
            table[column.name] = flat.reshape(-1, column.width)
        else:
            if column.names:
                values = [column.names.index(value) for value in values]
            table[column.name] = np.array(values, dtype=column.dtype)
    return table


def texts(values: NDArray[Any]) -> list[str]:
    """Decode a text column."""
    return [value.decode() for value in values.tolist()]


def names(values: NDArray[Any], column: str) -> list[str]:
    """Return an enumeration's values by name."""
    valid = next(c.names for c in COLUMNS if c.name == column)
    return [valid[value] for value in values.tolist()]


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a table, whole or not at all."""
    # Arrow takes a path as text, and not every path is.
    with atomic(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True, **options)


def read_parquet(
    path: Path, most: int, row_bytes: int = ROW_BYTES, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a Parquet file of at most so many rows, each of at most so many bytes on average.

    One that claims more takes no memory. ``columns`` are those to read of a file that may be large.
    """
    most_bytes = (most + 16) * row_bytes  # of an empty table, too, something is written
    # Not a path, which may be no text; not Python's file, which Arrow's threads may still hold when
    # Python ends; not read_table, which loads what reads folders of tables.
    with (
        reading(path),
        pa.BufferReader(read_whole(path, most_bytes))
        if columns is None
        else os.fdopen(open_plain(path), "rb") as content,
    ):
        file = pq.ParquetFile(content, page_checksum_verification=True)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        rows = max(file.metadata.num_rows, sum(group.num_rows for group in groups))
        size = sum(group.total_byte_size for group in groups)
        if rows > most or size > most_bytes:
            claimed = f"it claims {rows:,} of {size:,} bytes"
            raise IntegrityError(f"{path}: expected at most {most:,} rows, {claimed}")
        return file.read(columns, use_threads=columns is None)


def numbers(column: pa.ChunkedArray | pa.Array, null: float | None = None) -> NDArray[Any]:
    """Return an Arrow column of numbers or truth values as an array, ``null`` for what is none.

    Arrow's own way imports pandas where it is installed: half a second.

    >>> numbers(pa.array([1, None, 3], pa.int16()), -1).tolist()
    [1, -1, 3]
    >>> numbers(pa.chunked_array([[True], [False]])).tolist()
    [True, False]
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        array = pc.fill_null(array, pa.scalar(null, array.type))
    if pa.types.is_boolean(array.type):
        # Eight to a byte, which NumPy has not.
        return np.from_dlpack(array.cast(pa.uint8())).view(bool)
    return np.from_dlpack(array)
