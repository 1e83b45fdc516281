"""The columns of a record: what is known of each image, and how it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sdwn.storage.images import CODECS

STATUSES = ("ok", "nsfw", "nan", "unknown", "black")
# Those of them that are black images.
BLACK = ("nsfw", "nan", "black")
SHA256_BYTES = 32

Table = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of ``/rows``: its type (None is text), its names if an enumeration, its meaning.

    ``of_run``: every image that a run makes has it; the others are for imported images.
    """

    name: str
    dtype: str | None
    meaning: str
    names: tuple[str, ...] = ()
    required: bool = True
    width: int = 0
    of_run: bool = True

    def h5_type(self, values: NDArray[Any]) -> Any:
        """Choose the HDF5 type that holds these values."""
        if self.dtype is None:
            return h5py.string_dtype("utf-8", max(1, values.dtype.itemsize))
        if self.names:
            return h5py.enum_dtype({name: i for i, name in enumerate(self.names)}, self.dtype)
        return np.dtype(self.dtype)


COLUMNS = (
    Column("wnid", None, "n and the 8-digit WordNet 3.0 noun offset"),
    Column("synset", None, "WordNet's name of the synset"),
    Column("number", "u4", "which of the synset's images, from 0"),
    Column("seed", "u8", "of the CPU generator that drew the noise", required=False),
    Column("prompt", None, "the text that it was made of", required=False),
    Column("tokens", "u4", "of the prompt, start and end included", required=False),
    Column("truncated", "?", "the prompt was longer than the text encoder takes", required=False),
    Column(
        "status",
        "u1",
        "ok; nsfw: blackened by the safety checker; nan: black, for the model gave NaN; black: "
        "imported so; unknown: imported",
        names=STATUSES,
    ),
    Column("batch", "u4", "first image of its batch, counted in the shard", required=False),
    Column("batch_size", "u4", "images in its batch", required=False),
    Column("place", "u4", "its place in the batch, from 0", required=False),
    Column("vae_slicing", "?", "its batch was decoded one by one", required=False),
    Column("redone", "?", "it was NaN, and was sampled again in float32", required=False),
    Column("attempt", "u4", "which run of a task on this shard made it, from 1", required=False),
    Column("session", "u4", "row of /sessions", required=False),
    Column("width", "u4", "pixels"),
    Column("height", "u4", "pixels"),
    Column("codec", "u1", "how the image is encoded; raw is RGB, row by row", names=CODECS),
    Column("sha256", "u1", "of the encoded image", width=SHA256_BYTES),
    Column("file", None, "its name before it was imported", required=False, of_run=False),
)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Turn rows of plain values into columns; a column that no row has is left out.

    Enumerations are given by name, ``sha256`` as 32 bytes.
    """
    present = [column for column in COLUMNS if column.name in rows[0]]
    return {column.name: _column([row[column.name] for row in rows], column) for column in present}


def _column(values: list[Any], column: Column) -> NDArray[Any]:
    if column.dtype is None:
        return np.array([str(value).encode() for value in values], dtype="S")
    if column.names:
        return np.array([column.names.index(value) for value in values], dtype=column.dtype)
    if column.width:
        return np.frombuffer(b"".join(values), dtype=column.dtype).reshape(-1, column.width)
    return np.array(values, dtype=column.dtype)


def concatenate(tables: Sequence[Table]) -> Table:
    """Put tables of the same columns below one another."""
    return {name: np.concatenate([part[name] for part in tables]) for name in tables[0]}


def texts(values: NDArray[Any]) -> list[str]:
    """Decode a text column."""
    return [value.decode() for value in values.tolist()]


def names(values: NDArray[Any], column: str) -> list[str]:
    """Give an enumeration's values by name."""
    valid = next(c.names for c in COLUMNS if c.name == column)
    return [valid[value] for value in values.tolist()]


def check_column(column: Column, values: NDArray[Any], sessions: int) -> None:
    """Hold values that were read against what the column may have.

    Raises:
        ValueError: they are of another kind, no text, or a name or session that is none.
    """
    kind = "S" if column.dtype is None else np.dtype(column.dtype).kind
    if values.dtype.kind != kind:
        raise ValueError(f"{column.name}: expected values of kind {kind}, found {values.dtype}")
    if kind == "S":
        texts(values)
    valid = len(column.names) or (sessions if column.name == "session" else None)
    if valid is not None and len(values) and int(values.max()) >= valid:
        raise ValueError(f"{column.name}: expected values below {valid}, found {values.max()}")
