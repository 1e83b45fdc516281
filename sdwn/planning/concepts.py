"""Concepts, the rows of a plan: synsets of WordNet, or the rows of a table of prompts."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sdwn.config import Record
from sdwn.io import csv_text

if TYPE_CHECKING:
    import pyarrow as pa

# What names a concept in a list.
LISTED_BY = ("id", "wnid", "synset", "label")
# Rows that are read and checked at a time.
BLOCK_ROWS = 4096
# The columns of ``synsets.csv``, the table of version 1, whose bytes are in its plan's digest.
_COLUMNS = ("wnid", "synset", "shard", "imagenet_class", "lemmas", "definition", "prompt")


@dataclass(frozen=True, slots=True)
class Concept:
    """A subject of images: a synset, or a row of a table of prompts.

    ``id`` is its key: the wnid of a synset, the id of a row. ``label`` names it in words.
    ``imagenet_class`` is an ILSVRC class index. Image n takes prompt n modulo their number; those
    from ``first_image`` on are planned, ``images`` of them. None: the config's negative prompt,
    seeds that :func:`image_seed` derives from the run's.
    """

    id: str
    label: str = ""
    wnid: str | None = None
    synset: str | None = None
    imagenet_class: int | None = None
    lemmas: str = ""
    definition: str = ""
    prompts: tuple[str, ...] = ()
    first_image: int = 0
    images: int = 0
    seed: int | None = None
    negative_prompt: str | None = None

    @property
    def name(self) -> str:
        """Its name for people: the synset's, or else the label, or else the id."""
        return self.synset or self.label or self.id

    @property
    def prompt(self) -> str:
        """The first of its prompts; of imported images there may be none."""
        return self.prompts[0] if self.prompts else ""

    def image_seed(self, run_seed: int, number: int) -> int:
        """Return the seed of an image: a row's own unchanged, where it has a single image."""
        if self.seed is not None and self.first_image + self.images == 1:
            return self.seed
        return image_seed(run_seed if self.seed is None else self.seed, self.id, number)


class PlanCounts(Record):
    """The counts of a plan's rows, in plan.json, so that counting images reads no row.

    ``each`` is the images of every concept. Where they differ it is None: the shards begin at
    the rows ``starts``, and ``images`` are how many each has.
    """

    unit: Literal["synset", "concept"]  # what all rows are
    concepts: int
    each: int | None
    starts: list[int]
    images: list[int]


def image_seed(run_seed: int, id_: str, number: int) -> int:
    """Derive an image's seed: the same in every shard, rank, restart and batch.

    >>> image_seed(0, "n02084071", 0)
    5498818010329907003
    """
    text = f"{run_seed}/{id_}/{number}".encode()
    # 63 bits: a seed then fits a signed integer of Parquet and HDF5.
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class ConceptRows(Sequence[Concept]):
    """Concepts that are rows of an Arrow table, whose blocks are read when they are wanted.

    ``read_block`` returns the rows from ``n * BLOCK_ROWS`` on. A slice is of consecutive rows.
    """

    def __init__(self, rows: int, read_block: Callable[[int], pa.Table]) -> None:
        self._rows = rows
        # A shard's rows may end in the block that the next one's begin in.
        self.block = lru_cache(maxsize=2)(read_block)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, which: Any) -> Any:
        rows, found = range(self._rows)[which], list[Concept]()
        if isinstance(rows, int):
            return self[rows : rows + 1][0]
        while len(found) < len(rows):
            number, skipped = divmod(rows.start + len(found), BLOCK_ROWS)
            block = self.block(number).slice(skipped, len(rows) - len(found))
            columns = {name: block[name].to_pylist() for name in Concept.__slots__}
            columns["prompts"] = map(tuple, columns["prompts"])
            found += map(Concept, *columns.values())
        return tuple(found)

    def __iter__(self) -> Iterator[Concept]:
        for start in range(0, self._rows, BLOCK_ROWS):
            yield from self[start : start + BLOCK_ROWS]


def table_text(concepts: Iterable[Concept], rows_per_shard: int = 0) -> str:
    """Write synsets with one prompt each as the CSV of version 1; its shards are 0 of imports."""
    rows = []
    for row, one in enumerate(concepts):
        shard = row // rows_per_shard if rows_per_shard else 0
        texts = one.imagenet_class, one.lemmas, one.definition, one.prompt
        rows.append((one.wnid, one.synset, shard, *texts))
    # To the letter: it is read back, and its bytes are in the plan's digest.
    return csv_text(_COLUMNS, rows, cell=lambda value: value)


def parse_table(table: str, images: int = 0) -> tuple[Concept, ...]:
    """Read the CSV of version 1, with so many images a synset; a ValueError if it is none."""
    rows = csv.reader(io.StringIO(table))
    if next(rows, None) != list(_COLUMNS):
        raise ValueError(f"expected the columns {', '.join(_COLUMNS)}")
    # By position: thrice as fast as by name, for tables of tens of thousands of rows.
    return tuple(
        Concept(
            id=wnid,
            label=lemmas.partition(", ")[0].replace("_", " "),
            wnid=wnid,
            synset=synset,
            imagenet_class=int(index) if index else None,
            lemmas=lemmas,
            definition=definition,
            prompts=(prompt,) if prompt else (),
            images=images,
        )
        for wnid, synset, _, index, lemmas, definition, prompt in rows
    )
