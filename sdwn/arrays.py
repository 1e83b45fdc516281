"""Arrow's columns as NumPy arrays; Arrow's own way imports pandas where it is: half a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


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
