"""Parquet files read as Arrow tables, and Arrow's columns as NumPy arrays.

Arrow's own way to an array imports pandas where it is: half a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, first_line
from sdwn.io import read_whole

# No row of a table of images or predictions takes as much, however long its prompt.
ROW_BYTES = 1 << 16


def read_parquet(path: Path, most: int) -> pa.Table:
    """Read a table of at most so many rows.

    Raises:
        IntegrityError: it is missing, damaged, or claims more; that takes no memory.
    """
    # Of an empty table, too, something is written.
    most_bytes = (most + 16) * ROW_BYTES
    try:
        # Not a path, which may be no text; not Python's file, which Arrow's threads may still
        # hold when Python ends; not read_table, which loads what reads folders of tables.
        content = pa.BufferReader(read_whole(path, most_bytes))
        file = pq.ParquetFile(content, page_checksum_verification=True)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        rows = max(file.metadata.num_rows, sum(group.num_rows for group in groups))
        if rows > most:
            raise IntegrityError(f"{path}: expected at most {most:,} rows, it claims {rows:,}")
        if sum(group.total_byte_size for group in groups) > most_bytes:
            raise IntegrityError(f"{path}: damaged: it claims more bytes than {rows:,} rows have")
        return file.read()
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path}: cannot be read: {first_line(error)[:200]}") from None


def numbers(column: pa.ChunkedArray | pa.Array, null: float | None = None) -> NDArray[Any]:
    """Give a column of numbers or truth values, with ``null`` in the place of what is none.

    >>> numbers(pa.array([1, None, 3], pa.int16()), -1).tolist()
    [1, -1, 3]
    >>> numbers(pa.chunked_array([[True], [False]])).tolist()
    [True, False]

    Raises:
        ValueError: a value is null, and nothing was given for that.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        return _filled(array, null)
    if pa.types.is_boolean(array.type):
        # Eight to a byte, which NumPy has not.
        return np.from_dlpack(array.cast(pa.uint8())).view(bool)
    return np.from_dlpack(array)


def _filled(array: pa.Array, null: float | None) -> NDArray[Any]:
    if null is None:
        raise ValueError(f"{array.null_count} of {len(array)} values are null")
    bare = pa.Array.from_buffers(
        array.type, len(array), [None, array.buffers()[1]], offset=array.offset
    )
    values = numbers(bare)
    return np.where(numbers(pc.is_valid(array)), values, values.dtype.type(null))
