"""Concepts as Arrow tables: columns, digests and files; tables that users bring; and prompts.

A row is a concept: the columns of :data:`SCHEMA`, then the user's own, of truth values, numbers,
texts, or lists of these. The Parquet file of a plan or release has a row group for each
``BLOCK_ROWS``, so that a task reads those of its shard alone; ``plan.json`` has a digest for each.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from sdwn.config import MOST_IMAGES
from sdwn.errors import IntegrityError, UsageError, counted, first_line, some
from sdwn.io import SEPARATORS, OnMessage, open_plain, read_text, reading
from sdwn.planning.plan import BLOCK_ROWS, Concept, ConceptRows, PlanCounts
from sdwn.storage.columns import COLUMNS, numbers, read_parquet, write_parquet
from sdwn.wordnet import corpus
from sdwn.wordnet.corpus import Synset, class_index, classes_by_name

# Of each kind of fault, a message names so many.
SHOWN = 5
_TEXT = pa.string()
# Of the columns that are no text.
_TYPES = {"imagenet_class": pa.int16(), "prompts": pa.list_(_TEXT), "seed": pa.uint64()}
_TYPES |= dict.fromkeys(("first_image", "images"), pa.uint32())
SCHEMA = pa.schema([(name, _TYPES.get(name, _TEXT)) for name in Concept.__slots__])
# What a concept has in place of a null; in other columns it may be one.
_DEFAULTS = {"label": "", "lemmas": "", "definition": "", "first_image": 0}


def concept_table(columns: Mapping[str, Any]) -> pa.Table:
    """Build a table of concepts from columns, Arrow's or lists; the user's own come last."""
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
    # The name that files give a list's values differs.
    kinds = [
        f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)
        for kind in block.schema.types
    ]
    columns = list(zip(block.schema.names, kinds, strict=True))
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


def write_concepts(path: Path, table: pa.Table) -> None:
    """Write a table of concepts; equal texts take no room twice."""
    write_parquet(path, table, write_statistics=False, row_group_size=BLOCK_ROWS)


def read_block(path: Path, digests: Sequence[str], number: int) -> pa.Table:
    """Read a block of a plan's file; an IntegrityError if its rows are not those of the plan."""
    with (
        reading(path),
        os.fdopen(open_plain(path), "rb") as content,
        pq.ParquetFile(content, page_checksum_verification=True) as file,
    ):
        block = file.read_row_group(number, use_threads=False)
    if _digest(block) != digests[number]:
        raise IntegrityError(
            f"{path} was changed after planning: rows from {number * BLOCK_ROWS:,} on are others; "
            "restore the file, or plan into a new folder"
        )
    return block


# --- Prompts of synsets ---------------------------------------------------------------------------
# Vowels by sound: an hour (but a houri), letters that are spelled out: an X-ray, an LP, an mRNA.
# Of capitals that could be a word (RAM), it is one.
_AN = re.compile(
    r"(?i:[aeiou]|heir|honest|honou?r|hour(?!i)|[fhlmnrsx](?![a-z']))"
    r"|[FHLMNRSXfhlmnrsx](?=[B-DF-HJ-NP-TV-Z])"
)
# But consonants by sound: a eucalyptus, a one-way street, a Ouija, a unicorn (an unillustrated), a
# uakari, a Ukrainian, a user (an usher), a U-boat, a UFO.
_A = re.compile(
    r"(?i:e[uw]|on(?:e(?![a-z])|ce)|oui|u(?:[aeio]|ni(?!dent|ll|mp|n)|kr|[bcfghjkqrstv][aeiou])"
    r"|u(?![a-z]))|U[A-Z]"
)


def with_article(noun: str) -> str:
    """Return a noun with its article, a or an."""
    return f"{'an' if _AN.match(noun) and not _A.match(noun) else 'a'} {noun}"


def fill_prompts(templates: Sequence[str], synsets: Sequence[Synset]) -> Iterator[tuple[str, ...]]:
    """Yield the prompts of each synset, one of each template."""
    for template in templates or [""]:
        if "{" not in template.replace("{{", ""):
            raise UsageError(
                f'prompt: "{template}" has no field, so that all synsets would have the same '
                'prompt; write one into it, as in "a photo of a {lemma}, {definition}"'
            )
    above = "{hypernym" in "".join(templates)
    for synset in synsets:
        if above and not synset.parents:
            raise UsageError(
                f"prompt: {synset.name} has no hypernym to fill into the prompt; leave the synset "
                "out of the catalog, or the field out of the prompt"
            )
        parents = map(corpus.open_wordnet().synset, synset.parents) if above else ()
        lemmas, *hypernyms = (
            [lemma.replace("_", " ") for lemma in one.lemmas] for one in (synset, *parents)
        )
        fields = {
            "definition": synset.definition,
            "lemma": lemmas[0],
            "a_lemma": with_article(lemmas[0]),
            "lemmas": ", ".join(lemmas),
            "synset": synset.name,
            "hypernym": hypernyms[0][0] if above else "",
            "hypernyms": ", ".join(words[0] for words in hypernyms),
        }
        yield tuple(template.format(**fields) for template in templates)


def read_prompts(
    path: Path, synsets: Sequence[Synset], on_message: OnMessage
) -> list[tuple[str, ...]]:
    """Read the written prompts of synsets; rows of other synsets are left out, and counted."""
    rows = _Rows(path, ("prompt",))
    prompts, (wnids, _) = rows.prompts(), _synsets(rows)
    nameless = pc.and_(*(pc.is_null(rows.text(name)) for name in ("wnid", "synset")))
    rows.refuse(nameless, "expected a wnid or the name of a synset", wnids)
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


# --- Tables of users ------------------------------------------------------------------------------
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
    synsets |= {wnid: corpus.open_wordnet().synset(wnid) for wnid in of_labels.values()}
    known = concept_table({"id": list(synsets), **synset_columns(list(synsets.values()))})
    known = known.take(pc.index_in(wnids, pa.array(list(synsets), _TEXT)))
    table = concept_table(
        {
            **{name: known[name] for name in ("wnid", "synset", "imagenet_class")},
            **{name: known[name] for name in ("lemmas", "definition")},
            **{name: column for name, column in rows.columns.items() if name not in _INPUTS},
            "id": ids,
            "label": pc.coalesce(labels, known["label"]),
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


class _Rows:
    """The columns of a file, nulls for those of sdwn that it lacks; and what is wrong with them."""

    def __init__(self, path: Path, needed: Sequence[str], keep_own: bool = False) -> None:
        table, self._path, self._faults = _read(path), path, list[str]()
        # A spreadsheet counts the names as row 1.
        self._first = 2 if path.suffix.lower() in _CSV else 1
        self.columns = {name: pa.nulls(len(table), kind) for name, kind in _INPUTS.items()}
        usual = [name.strip().lower() for name in table.column_names]
        for at, (name, key) in enumerate(zip(table.column_names, usual, strict=True)):
            if name in _INPUTS or keep_own:
                self.columns[name] = table.column(at).combine_chunks()
                twice = "expected one column of this name, whatever its case"
                fault = twice if usual.count(key) > 1 else _column_fault(name, self.columns[name])
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
                synset = corpus.open_wordnet().synset(text)
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
        kinds = [_kept_type(kind) or kind for kind in table.schema.types]
        kept = table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))
        # Texts of more than 2 GiB in a column do not become one chunk.
        return kept.combine_chunks()
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
    if content.lstrip().startswith(b"null"):  # Arrow would end the process
        raise pa.ArrowInvalid("expected an object, found null in row 0")
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
    named = zip(table.column_names, table.slice(0, len(table) - 1).columns, strict=True)
    columns = [column if name in _TEXTS else _typed(column) for name, column in named]
    return pa.Table.from_arrays(columns, table.column_names)


def _typed(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Turn text into numbers or truth values if JSON would read all of it as such."""
    types = {_INTEGER: pa.int64(), _NUMBER: pa.float64(), _BOOLEAN: pa.bool_()}
    for pattern, kind in types.items() if pa.types.is_string(column.type) else ():
        if pc.all(pc.match_substring_regex(column, pattern)).as_py():
            with suppress(pa.ArrowInvalid):  # more than 64 bits
                return column.cast(kind)
    return column
