"""WordNet's noun hypernyms between wnids, from ``taxonomy.parquet`` or from the corpus.

A plan reads WordNet once, through NLTK, and writes what all later stages need of it into
``taxonomy.parquet``: the plan's synsets, ImageNet-1k's classes and everything above both. The
file is copied from the run into its release. Synsets that it lacks are looked up in the corpus;
so are all synsets of old runs and releases without this file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.io import atomic, canonical
from sdwn.storage.columns import numbers, read_parquet
from sdwn.wordnet import corpus
from sdwn.wordnet.corpus import Synset, WordNet
from sdwn.wordnet.imagenet import class_wnids

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
SCHEMA = pa.schema(
    {"wnid": _TEXT, "name": _TEXT, "lemmas": _TEXTS, "definition": _TEXT, "parents": _TEXTS}
)
# WordNet 3.0 has so many nouns, the longest in 700 bytes, 18 levels deep, with 86 ways up from one.
MOST_ROWS, ROW_BYTES = 82_115, 4096
MOST_DEPTH, MOST_WAYS = 32, 256
REMEDY = "restore it, or remove it: WordNet's corpus is then read instead"

# NLTK's reader seeks in files that all threads share.
_CORPUS_LOCK = threading.Lock()


def taxonomy_table(wnids: Iterable[str], wordnet: WordNet) -> pa.Table:
    """Collect these synsets, ImageNet-1k's classes, and all that is above, by wnid."""
    found: dict[str, Synset] = {}
    left = [*wnids, *class_wnids()]
    while left:
        if (wnid := left.pop()) not in found:
            found[wnid] = wordnet.synset(wnid)
            left += found[wnid].parents
    rows = [found[wnid] for wnid in sorted(found)]
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)


def join_taxonomies(tables: Iterable[pa.Table]) -> pa.Table:
    """Return the synsets of several tables in one, each once, by wnid."""
    every = pa.concat_tables(tables)
    _, first = np.unique(np.asarray(every["wnid"].to_pylist(), dtype=str), return_index=True)
    return every.take(pa.array(first))


def write_taxonomy(path: Path, table: pa.Table) -> None:
    """Write ``taxonomy.parquet``, whole or not at all."""
    # Arrow takes a path as text, and not every path is.
    with atomic(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_taxonomy(path: Path) -> pa.Table:
    """Read ``taxonomy.parquet``, which may be a stranger's: every value is checked."""
    try:
        table = read_parquet(path, MOST_ROWS, ROW_BYTES)
    except IntegrityError as error:
        raise IntegrityError(f"{str(error).rstrip('.')}; {REMEDY}") from None
    once = [name for name in SCHEMA.names if table.column_names.count(name) == 1]
    table = table.select(once).combine_chunks()
    if table.schema.types != SCHEMA.types:
        raise IntegrityError(
            f"{path}: damaged: expected the columns {', '.join(SCHEMA.names)}; {REMEDY}"
        )
    columns = [column.combine_chunks() for column in table.columns]
    wnids, lemmas, above = columns[0], columns[2].flatten(), columns[4]
    parent = pc.index_in(above.flatten(), wnids)
    if (
        any(column.null_count for column in (*columns, lemmas, parent))
        or not pc.all(pc.match_substring_regex(wnids, r"^n[0-9]{8}$"), min_count=0).as_py()
        or not pc.all(pc.less(wnids[:-1], wnids[1:]), min_count=0).as_py()
    ):
        raise IntegrityError(
            f"{path}: damaged: expected all values of synsets and of all above them, by wnid; "
            f"{REMEDY}"
        )
    # Count the ways up from each synset, a level a round: on a circle they never end, and with
    # too many of them whatever walks up would take for ever.
    parent, child = numbers(parent), numbers(pc.list_parent_indices(above))
    ways: NDArray[np.floating] = np.ones(len(wnids))
    before = ways
    for _ in range(MOST_DEPTH):
        before = ways
        ways = 1.0 + np.bincount(child, weights=ways[parent], minlength=len(wnids))
    if (ways != before).any() or (ways > MOST_WAYS).any():
        raise IntegrityError(
            f"{path}: damaged: a synset is above itself, or has too many above it; {REMEDY}"
        )
    return table


def open_taxonomy(path: Path) -> Taxonomy:
    """Open a run's or a release's taxonomy; without the file, the corpus is read instead."""
    return Taxonomy(read_taxonomy(path) if path.exists() else None)


class Taxonomy:
    """Noun synsets by wnid: those of a table, and any other from the corpus, through NLTK.

    The corpus is opened for the first synset that the table lacks: that takes seconds. Every
    method with a wnid raises UsageError where WordNet has no such noun, and SdwnError where the
    table lacks it and there is no WordNet on this machine. Threads may share it.
    """

    def __init__(self, table: pa.Table | None = None) -> None:
        columns = (SCHEMA.empty_table() if table is None else table).combine_chunks()
        wnid, name, lemmas, definition, parents = columns.columns
        self._wnids, self._names = wnid.to_pylist(), name.to_pylist()
        self._definitions = definition.to_pylist()
        self._lemmas, self._parents = _lists(lemmas), _lists(parents)
        self._rows = {key: i for keys in (self._names, self._wnids) for i, key in enumerate(keys)}
        self._others: dict[str, Synset] = {}
        self._above: dict[str, dict[str, int]] = {}

    def __contains__(self, wnid: str) -> bool:
        """Return whether the table has a synset, or else a WordNet on this machine."""
        try:
            return self.synset(wnid).wnid == wnid
        except SdwnError:
            return False

    def synset(self, identifier: str) -> Synset:
        """Find a synset by name (``dog.n.01``) or wnid."""
        row = self._rows.get(canonical(identifier).lower())
        if row is not None:
            return Synset(
                self._wnids[row],
                self._names[row],
                self._lemmas(row),
                self._definitions[row],
                self._parents(row),
            )
        with _CORPUS_LOCK:
            if identifier not in self._others:
                try:
                    wordnet = corpus.shared_wordnet()
                except SdwnError as error:
                    if not self._rows:
                        raise
                    raise SdwnError(
                        f"{identifier}: not among the synsets of taxonomy.parquet: {error}"
                    ) from None
                self._others[identifier] = wordnet.synset(identifier)
            return self._others[identifier]

    def above(self, wnid: str) -> Mapping[str, int]:
        """Map each hypernym, and the synset itself, to the least number of steps up to it."""
        found = self._above.get(wnid)
        if found is None:
            found = {wnid: 0}
            ring, steps = [wnid], 0
            while ring:
                steps += 1
                ups = (up for one in ring for up in self.synset(one).parents if up not in found)
                ring = list(dict.fromkeys(ups))
                found.update(dict.fromkeys(ring, steps))
            self._above[wnid] = found
        return found

    def is_below(self, wnid: str, root: str) -> bool:
        """Return whether a synset is another one or anywhere below it."""
        return root in self.above(wnid)

    def distance(self, one: str, other: str) -> int:
        """Count the steps of the shortest path between two synsets over a common hypernym.

        All nouns have one: ``entity.n.01``.
        """
        first, second = self.above(one), self.above(other)
        return min(steps + second[wnid] for wnid, steps in first.items() if wnid in second)


def _lists(column: pa.ChunkedArray) -> Callable[[int], tuple[str, ...]]:
    """Return a function that reads a row of a column of lists, ten times as fast as Arrow does."""
    lists = column.combine_chunks()
    values: list[str] = lists.flatten().to_pylist()
    ends = np.concatenate([[0], np.cumsum(numbers(pc.list_value_length(lists)))]).tolist()
    return lambda row: tuple(values[ends[row] : ends[row + 1]])


@dataclass(frozen=True, slots=True)
class NearestSubtree:
    """The smallest subtree around a synset that a classifier has classes in.

    ``wnid`` is its top: the synset itself, with ``steps`` 0, if a class is it or is below it;
    else its nearest hypernym that has one. ``classes`` are indices into the classifier's
    own list, in order.
    """

    wnid: str
    steps: int
    classes: tuple[int, ...]


def nearest_subtrees(
    taxonomy: Taxonomy, wnids: Iterable[str], classes: Sequence[str | None]
) -> dict[str, NearestSubtree]:
    """Find the nearest subtree of each synset, given the wnid of each class.

    Of several nearest hypernyms the one with the fewest classes is taken, then the first by
    wnid. A class without a wnid, or with one that WordNet does not have, is in no subtree.
    """
    below: dict[str, list[int]] = {}
    for index, wnid in enumerate(classes):
        try:
            above: Iterable[str] = taxonomy.above(wnid) if wnid else ()
        except UsageError:
            continue
        for hypernym in above:
            below.setdefault(hypernym, []).append(index)
    found = {}
    for wnid in wnids:
        known = [
            (steps, len(below[top]), top)
            for top, steps in taxonomy.above(wnid).items()
            if top in below
        ]
        steps, _, top = min(known)
        found[wnid] = NearestSubtree(top, steps, tuple(below[top]))
    return found
