"""Tables that users bring, as CSV, JSONL or Parquet: concepts, or written prompts of synsets.

Arrow reads them, and every value is checked: an error names all that is wrong, by kind and row.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from sdwn.config import MOST_IMAGES
from sdwn.errors import UsageError, counted, first_line, some
from sdwn.io import SEPARATORS, OnMessage, read_text
from sdwn.planning.concept_table import SCHEMA, concept_table, synset_columns
from sdwn.storage.columns import COLUMNS, numbers, read_parquet
from sdwn.wordnet.corpus import Synset, find_synset
from sdwn.wordnet.imagenet import classes_by_name

# Of each kind of fault, a message names so many.
SHOWN = 5
# A table of more was turned on its side, or is none.
MOST_COLUMNS = 1000

_TEXT = pa.string()
_TEXTS = ("id", "prompt", "label", "wnid", "synset", "negative_prompt")
_INPUTS = dict.fromkeys(_TEXTS, _TEXT) | dict.fromkeys(("images", "seed"), pa.int64())
# Plans, releases and exports have these columns.
_RESERVED = {column.name for column in COLUMNS} | {*SCHEMA.names, *_INPUTS}
_RESERVED |= {"", "plan", "part", "row", "offset", "bytes", "image"}
_CSV = (".csv", ".tsv")
# As JSON writes them.
_INTEGER, _BOOLEAN = r"^(0|-?[1-9][0-9]*)$", r"^(true|false)$"
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$"


def read_table(path: Path, only: Sequence[str], images: int) -> pa.Table:
    """Read a table of prompts: the columns of a plan's concepts, then the user's own.

    Only the ids in ``only`` are kept, if there are some; ``images`` are of each row that does not
    say how many. A row without a synset, whose label is one ImageNet class's, is of this class.
    """
    rows = _Rows(path, ("id", "prompt"), keep_own=True)
    ids, labels, prompts = rows.text("id"), rows.text("label"), rows.prompts()
    rows.refuse(pc.is_null(ids), "expected an id", ids)
    # A file name may have 255 bytes; exports put a number and an extension behind an id.
    unfit = pc.match_substring_regex(ids, r"[\p{Cc}/]|^\.\.?$")
    unfit = pc.or_(unfit, pc.greater(pc.binary_length(ids), 150))
    rows.refuse(unfit, 'expected an id that can name a folder: no "/", at most 150 bytes', ids)
    # Macs and Windows take names that differ in case, or in how an accent is written, for one.
    folded = pc.utf8_lower(pc.utf8_normalize(ids, "NFC"))
    counts = folded.drop_null().value_counts()
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    rows.refuse(pc.is_in(folded, several), "expected ids that differ, and in more than case", ids)
    given_images = rows.whole_numbers("images", 1, MOST_IMAGES)
    seeds = rows.whole_numbers("seed", 0, 2**63 - 1)
    negative = rows.columns["negative_prompt"].cast(_TEXT)
    rows.refuse(pc.match_substring(negative, "\0"), "expected a negative prompt", negative)
    wnids, synsets = _synsets(rows)
    unknown = pc.if_else(pc.is_null(wnids), labels, None)
    classes = {
        label: classes_by_name().get(label.replace("_", " ").lower(), [])
        for label in unknown.unique().drop_null().to_pylist()
    }
    several = {label: f"{label}: {' or '.join(of)}" for label, of in classes.items() if of[1:]}
    unclear = _mapped(unknown, several.get)
    expected = "expected a label of one ImageNet class only; write a wnid into the column wnid"
    rows.refuse(pc.is_valid(unclear), expected, unclear)
    rows.raise_faults()

    of_labels = {label: of[0] for label, of in classes.items() if of}
    wnids = pc.coalesce(wnids, _mapped(unknown, of_labels.get))
    synsets |= {wnid: find_synset(wnid) for wnid in of_labels.values()}
    known = concept_table({"id": list(synsets), **synset_columns(list(synsets.values()))})
    known = known.take(pc.index_in(wnids, pa.array(list(synsets), _TEXT)))
    columns = {name: known[name] for name in ("wnid", "synset", "imagenet_class")}
    columns |= {name: pc.fill_null(known[name], "") for name in ("lemmas", "definition")}
    columns |= {name: column for name, column in rows.columns.items() if name not in _INPUTS}
    table = concept_table(
        {
            **columns,
            "id": ids,
            "label": pc.fill_null(pc.coalesce(labels, known["label"]), ""),
            "prompts": pa.ListArray.from_arrays(np.arange(len(ids) + 1, dtype="i4"), prompts),
            "images": pc.fill_null(given_images.cast(pa.uint32()), images),
            "seed": seeds.cast(pa.uint64()),
            "negative_prompt": negative,
        }
    )
    chosen = pa.array(only, _TEXT)
    if lacking := chosen.filter(pc.invert(pc.is_in(chosen, ids))).to_pylist():
        raise UsageError(f"only: {path} has no row with the id {some(lacking, SHOWN)}")
    return table.filter(pc.is_in(ids, chosen)) if only else table


def read_prompts(
    path: Path, synsets: Sequence[Synset], on_message: OnMessage
) -> list[tuple[str, ...]]:
    """Read the written prompts of synsets, each synset's in the order of the rows.

    Rows of other synsets are left out, and ``on_message`` gets their number.
    """
    rows = _Rows(path, ("prompt",))
    prompts, (wnids, _) = rows.prompts(), _synsets(rows)
    rows.raise_faults()
    rows.refuse(pc.is_null(wnids), "expected a wnid or the name of a synset", wnids)
    rows.raise_faults()
    found = defaultdict[str, list[str]](list)
    for wnid, prompt in zip(wnids.to_pylist(), prompts.to_pylist(), strict=True):
        found[wnid].append(prompt)
    if lacking := [synset.name for synset in synsets if synset.wnid not in found]:
        raise UsageError(
            f"{path}: {len(lacking):,} of {counted(len(synsets), 'synset')} have no prompt: "
            f"{some(lacking, SHOWN)}; write a row for each, or leave them out of the catalog"
        )
    chosen = [tuple(found[synset.wnid]) for synset in synsets]
    if others := len(prompts) - sum(map(len, chosen)):
        on_message(f"{path.name}: left out {counted(others, 'row')} of synsets outside the catalog")
    return chosen


class _Rows:
    """The columns of a file, nulls for those of sdwn that it lacks; and what is wrong with them."""

    def __init__(self, path: Path, needed: Sequence[str], keep_own: bool = False) -> None:
        table, self._path, self._faults = _read(path), path, list[str]()
        # A spreadsheet counts the names as row 1.
        self._first = 2 if path.suffix.lower() in _CSV else 1
        self.columns = {name: pa.nulls(len(table), kind) for name, kind in _INPUTS.items()}
        usual = [name.strip().lower() for name in table.column_names]
        for name, key in zip(table.column_names, usual, strict=True):
            if name in _INPUTS or keep_own:
                self.columns[name] = table.column(usual.index(key)).combine_chunks()
                fault = _column_fault(name, self.columns[name])
                if usual.count(key) > 1:
                    fault = "expected one column of this name, whatever its case"
                self._faults += [f"column {name!r}: {fault}"] if fault else []
        if lacking := [name for name in needed if name not in table.column_names]:
            found = some([repr(name) for name in table.column_names], SHOWN)
            columns = "columns" if len(lacking) > 1 else "column"
            self._faults.append(f"expected the {columns} {' and '.join(lacking)}, found {found}")
        if not len(table):
            self._faults.append("expected rows, found none")
        self.raise_faults()

    def raise_faults(self) -> None:
        if self._faults:
            raise UsageError("\n".join(f"{self._path}: {fault}" for fault in self._faults))

    def refuse(self, bad: pa.Array, expected: str, values: pa.Array) -> None:
        if rows := pc.indices_nonzero(bad).to_pylist():
            shown = ((row + self._first, values[row].as_py()) for row in rows[:SHOWN])
            found = [f"row {row}" + f" ({v!r:.99})" * (v is not None) for row, v in shown]
            self._faults.append(f"{expected}; found {some(found, SHOWN, len(rows))}")

    def text(self, name: str) -> pa.Array:
        column = self.columns[name].cast(_TEXT)
        return pc.if_else(pc.equal(column, ""), None, column)

    def prompts(self) -> pa.Array:
        prompts = self.text("prompt")
        # HDF5 would cut it at a NUL.
        bad = pc.or_kleene(pc.is_null(prompts), pc.match_substring_regex(prompts, r"^\s*$|\x00"))
        self.refuse(bad, "expected a prompt", prompts)
        return prompts

    def whole_numbers(self, name: str, least: int, most: int) -> pa.Array:
        column = _typed(self.columns[name])
        if pa.types.is_string(column.type):
            bad = pc.invert(pc.match_substring_regex(column, _NUMBER))
        else:
            values = numbers(column, least)
            # A larger float may have been another number.
            whole = values.dtype.kind != "f" or ((values % 1 == 0) & (values < 2**53))
            bad = pa.array(~((values >= least) & (values <= most) & whole))
        self.refuse(bad, f"expected as {name} a whole number from {least:,} to {most:,}", column)
        return column


def _column_fault(name: str, column: pa.Array) -> str | None:
    kind = column.type
    if name in _INPUTS:
        numeric = pa.types.is_integer(kind) or (name not in _TEXTS and pa.types.is_floating(kind))
        fits = numeric or pa.types.is_string(kind)
        return None if fits else f"expected text or whole numbers, found {kind}"
    if name.strip().lower() in _RESERVED:
        return "sdwn has a column of this name; rename it"
    if _kept_type(kind) is None:
        found = f"{kind!s:.99}"
        return f"expected text, numbers, truth values, or lists of one of these; found {found}"
    flat = pc.list_flatten(column) if pa.types.is_list(kind) else column
    if pa.types.is_floating(flat.type) and pc.any(pc.invert(pc.is_finite(flat))).as_py():
        return "expected finite numbers, or nothing; found nan or infinity"
    return None


def _synsets(rows: _Rows) -> tuple[pa.Array, dict[str, Synset]]:
    """Return the wnid of each row that names a synset, and these synsets."""
    wnids, synsets = [], dict[str, Synset]()
    for name in ("wnid", "synset"):
        column, found = rows.text(name), dict[str, str]()
        for text in column.unique().drop_null().to_pylist():
            with suppress(UsageError):
                synset = find_synset(text)
                found[text], synsets[synset.wnid] = synset.wnid, synset
        wnids.append(_mapped(column, found.get))
        expected = f"expected as {name} a noun of WordNet 3.0, such as dog.n.01 or n02084071"
        rows.refuse(pc.and_(pc.is_valid(column), pc.is_null(wnids[-1])), expected, column)
    rows.refuse(pc.not_equal(*wnids), "expected wnid and synset to be the same one", wnids[0])
    return pc.coalesce(*wnids), synsets


def _mapped(column: pa.Array, value: Callable[[str], str | None]) -> pa.Array:
    """Map each text of a column, each distinct one once; null stays null."""
    coded = column.dictionary_encode()
    return pa.array(map(value, coded.dictionary.to_pylist()), _TEXT).take(coded.indices)


# --- Files ---------------------------------------------------------------------------------------
def _read(path: Path) -> pa.Table:
    """Read a file; columns come in the types that are kept, or else in their own."""
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            table = read_parquet(path, most=10_000_000)
            table.validate(full=True)
        elif ending in (".jsonl", ".ndjson"):
            table = _read_json(read_text(path).encode())
        elif ending in _CSV:
            table = _read_csv(read_text(path))
        else:
            raise UsageError(f"{path}: expected .csv, .tsv, .jsonl, .ndjson or .parquet")
        if table.num_columns > MOST_COLUMNS:
            found = f"found {table.num_columns:,}; is it turned on its side?"
            raise UsageError(f"{path}: expected at most {MOST_COLUMNS:,} columns, {found}")
        if table.nbytes > 2**31:
            raise UsageError(f"{path}: expected at most 2 GiB of text; make several tables of it")
        if ending in _CSV:
            for at, name in enumerate(table.column_names):
                if name not in _TEXTS:
                    table = table.set_column(at, name, _typed(table.column(at)))
        kinds = [_kept_type(kind) or kind for kind in table.schema.types]
        return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))
    except (pa.ArrowException, csv.Error) as error:
        # Of JSON it counts the rows from 0.
        reason = re.sub(r"(?<=in row )\d+", lambda row: str(int(row[0]) + 1), first_line(error))
        raise UsageError(f"{path}: cannot be read: {reason[:300]}") from None


def _kept_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type in which a plan keeps a column; None if it keeps none of this type."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) in ("null", "large_string", "string_view"):
        return _TEXT
    if re.match(r"(large_|fixed_size_)?list<", str(kind)):
        # A stranger's lists may lie in one another a thousandfold.
        values = None if pa.types.is_nested(kind.value_type) else _kept_type(kind.value_type)
        return values and pa.list_(values)
    return kind if re.fullmatch(r"bool|u?int\d+|halffloat|float|double|string", str(kind)) else None


def _read_json(content: bytes) -> pa.Table:
    # As one block, for Arrow counts rows within a block.
    blocks = pyarrow.json.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1))
    table = pyarrow.json.read_json(pa.BufferReader(content), blocks)
    # Arrow takes texts such as 2026-01-31 for times.
    time = pa.timestamp("s")
    texts = {time: _TEXT, pa.list_(time): pa.list_(_TEXT)}
    if fields := [(one.name, texts[one.type]) for one in table.schema if one.type in texts]:
        parse = pyarrow.json.ParseOptions(explicit_schema=pa.schema(fields))
        again = pyarrow.json.read_json(pa.BufferReader(content), blocks, parse)
        table = again.select(table.column_names)
    return table


def _read_csv(text: str) -> pa.Table:
    # Old Macs end a line with a carriage return alone.
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    delimiter = max(SEPARATORS, key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    # Behind the last row, a row that is not there if a quotation mark is never closed.
    end = delimiter.join(["\x04"] * len(names))
    table = pyarrow.csv.read_csv(
        pa.BufferReader(f"{text}\n{end}\n".encode()),
        pyarrow.csv.ReadOptions(use_threads=False),  # else errors have no row
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, _TEXT),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    if not len(table) or table.column(0)[-1].as_py() != "\x04":
        raise pa.ArrowInvalid("a quotation mark is never closed; close it, or double it")
    return table.slice(0, len(table) - 1)


def _typed(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Turn text into numbers or truth values if JSON would read all of it as such."""
    types = {_INTEGER: pa.int64(), _NUMBER: pa.float64(), _BOOLEAN: pa.bool_()}
    for pattern, kind in types.items() if pa.types.is_string(column.type) else ():
        if pc.all(pc.match_substring_regex(column, pattern)).as_py():
            with suppress(pa.ArrowInvalid):  # more than 64 bits
                return column.cast(kind)
    return column
