"""Concepts as an Arrow table: its columns, its digests, and the Parquet file of a plan or release.

A row is a concept: the columns of :data:`SCHEMA`, then the user's own, of truth values, numbers,
texts, or lists of these. The file has a row group for each ``BLOCK_ROWS``, so that a task reads
those of its shard alone; ``plan.json`` has a digest for each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdwn.errors import IntegrityError, first_line
from sdwn.io import atomic, open_plain
from sdwn.planning.concepts import BLOCK_ROWS, Concept, ConceptRows, PlanCounts
from sdwn.storage.columns import numbers
from sdwn.wordnet.corpus import Synset
from sdwn.wordnet.imagenet import class_index

# In the order of a concept's fields.
SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("id", "label", "wnid", "synset")],
        ("imagenet_class", pa.int16()),
        *[(name, pa.string()) for name in ("lemmas", "definition")],
        ("prompts", pa.list_(pa.string())),
        *[(name, pa.uint32()) for name in ("first_image", "images")],
        ("seed", pa.uint64()),
        ("negative_prompt", pa.string()),
    ]
)
# What a concept has in place of a null; in other columns it may be one.
_DEFAULTS = {"label": "", "lemmas": "", "definition": "", "first_image": 0}


def concept_table(columns: Mapping[str, Any]) -> pa.Table:
    """Build a table of concepts from columns, Arrow's or lists; absent ones are empty.

    Columns that no concept has are the user's own, and stay behind the others as they are.
    """
    own = [name for name in columns if name not in SCHEMA.names]
    schema = pa.schema([*SCHEMA, *((name, columns[name].type) for name in own)])
    absent = {field.name: pa.nulls(len(columns["id"]), field.type) for field in SCHEMA}
    table = pa.table({**absent, **columns}, schema=schema)
    for name, value in _DEFAULTS.items():
        at = SCHEMA.get_field_index(name)
        table = table.set_column(at, SCHEMA.field(at), pc.fill_null(table[name], value))
    return table


def synset_columns(synsets: Sequence[Synset]) -> dict[str, Any]:
    """Return the columns of concepts that are synsets, but for id, prompts and images."""
    return {
        "label": [synset.lemmas[0].replace("_", " ") for synset in synsets],
        "wnid": [synset.wnid for synset in synsets],
        "synset": [synset.name for synset in synsets],
        "imagenet_class": [class_index().get(synset.wnid) for synset in synsets],
        "lemmas": [", ".join(synset.lemmas) for synset in synsets],
        "definition": [synset.definition for synset in synsets],
    }


def as_table(concepts: Sequence[Concept]) -> pa.Table:
    """Return concepts as a table; :class:`ConceptRows` are rows of one."""
    if isinstance(concepts, ConceptRows):
        return pa.concat_tables(map(concepts.block, range(-(-len(concepts) // BLOCK_ROWS))))
    return concept_table({name: [getattr(c, name) for c in concepts] for name in SCHEMA.names})


def concept_rows(table: pa.Table) -> ConceptRows:
    """Return the concepts that are a table's rows."""
    return ConceptRows(len(table), lambda block: table.slice(block * BLOCK_ROWS, BLOCK_ROWS))


def count_rows(table: pa.Table, shard_size: float) -> PlanCounts:
    """Count what a plan's rows come to, cut into shards of this many images."""
    images = numbers(table["images"]).astype(np.int64)
    each, starts = int(images[0]), np.empty(0, np.int64)
    if uneven := bool((images != each).any()):
        # A shard begins where the images before a row pass a multiple of its size.
        shards = (np.cumsum(images) - images) // max(1, round(shard_size))
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
    return PlanCounts(
        unit="synset" if table["id"].equals(table["wnid"]) else "concept",
        concepts=len(table),
        each=None if uneven else each,
        starts=starts.tolist(),
        images=np.add.reduceat(images, starts).tolist() if uneven else [],
    )


def block_digests(table: pa.Table) -> list[str]:
    """Compute the SHA-256 of each block: of what its rows hold, whatever file they come from."""
    return [_digest(table.slice(row, BLOCK_ROWS)) for row in range(0, len(table), BLOCK_ROWS)]


def _digest(block: pa.Table) -> str:
    columns = [[field.name, _kind(field.type)] for field in block.schema]
    digest = hashlib.sha256(json.dumps([len(block), columns]).encode())

    def add(array: pa.Array) -> None:
        digest.update(np.packbits(numbers(array.is_valid())).tobytes())
        values = array.drop_null()
        if pa.types.is_list(array.type):
            digest.update(numbers(pc.list_value_length(values)).tobytes())
            add(values.flatten())
        elif pa.types.is_string(array.type):
            digest.update(numbers(pc.binary_length(values)).tobytes())
            digest.update("".join(values.to_pylist()).encode())
        else:
            digest.update(numbers(values).tobytes())

    for column in block.columns:
        add(column.combine_chunks())
    return digest.hexdigest()


def _kind(kind: pa.DataType) -> str:
    # The name that files give a list's values differs.
    return f"list of {_kind(kind.value_type)}" if pa.types.is_list(kind) else str(kind)


def write_concepts(path: Path, table: pa.Table) -> None:
    """Write a table of concepts; equal texts take no room twice."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        pq.write_table(
            table,
            file,
            row_group_size=BLOCK_ROWS,
            compression="zstd",
            write_statistics=False,
            write_page_checksum=True,
        )


def read_block(path: Path, digests: Sequence[str], number: int) -> pa.Table:
    """Read a block of a plan's file; an IntegrityError if its rows are not those of the plan."""
    try:
        with (
            os.fdopen(open_plain(path), "rb") as content,
            pq.ParquetFile(content, page_checksum_verification=True) as file,
        ):
            block = file.read_row_group(number, use_threads=False)
    except (OSError, IndexError, pa.ArrowException) as error:
        raise IntegrityError(f"{path}: cannot be read: {first_line(error)[:200]}") from None
    if _digest(block) != digests[number]:
        raise IntegrityError(
            f"{path} was changed after planning: rows from {number * BLOCK_ROWS:,} on are others; "
            "restore the file, or plan into a new folder"
        )
    return block
