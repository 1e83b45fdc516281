"""WordNet's noun hypernyms between wnids, from ``taxonomy.parquet`` or from the corpus.

A plan reads WordNet once and writes what later stages need of it into ``taxonomy.parquet``, which
goes into the release: the plan's synsets, ImageNet-1k's classes and everything above both. Synsets
that it lacks, as all do in old runs and releases without it, are looked up in the corpus.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.io import canonical, reading
from sdwn.storage.columns import read_parquet
from sdwn.wordnet import corpus
from sdwn.wordnet.corpus import Synset, WordNet, class_wnids

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
SCHEMA = pa.schema(
    {"wnid": _TEXT, "name": _TEXT, "lemmas": _TEXTS, "definition": _TEXT, "parents": _TEXTS}
)
# WordNet 3.0 has so many nouns, the longest in 700 bytes.
MOST_ROWS, ROW_BYTES = 82_115, 4096
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


def read_taxonomy(path: Path) -> pa.Table:
    """Read ``taxonomy.parquet``; an IntegrityError if it is damaged or lacks what is above one."""
    try:
        with reading(path):
            table = read_parquet(path, MOST_ROWS, ROW_BYTES).select(SCHEMA.names).cast(SCHEMA)
            columns = [column.combine_chunks() for column in table.columns]
            wnids, _, lemmas, _, parents = columns
            above = pc.index_in(parents.flatten(), wnids)
            if any(column.null_count for column in (*columns, lemmas.flatten(), above)):
                raise ValueError("expected all values of synsets and of all above them")
            return table.combine_chunks()
    except IntegrityError as error:
        raise IntegrityError(f"{error}; {REMEDY}") from None


def open_taxonomy(path: Path) -> Taxonomy:
    """Open a run's or a release's taxonomy; without the file, the corpus is read instead."""
    return Taxonomy(read_taxonomy(path) if path.exists() else None)


class Taxonomy:
    """Noun synsets by wnid: those of a table, and any other from the corpus, which takes seconds.

    Every method with a wnid raises UsageError where WordNet has no such noun, and SdwnError where
    the table lacks it and there is no WordNet on this machine. Threads may share it.
    """

    def __init__(self, table: pa.Table | None = None) -> None:
        wnid, name, lemmas, definition, parents = (table or SCHEMA.empty_table()).columns
        wnids, names, definitions = (one.to_pylist() for one in (wnid, name, definition))
        # As one text, a list is read ten times as fast.
        joined = (pc.binary_join(lists, "\0").to_pylist() for lists in (lemmas, parents))
        words, above = ([tuple(filter(None, text.split("\0"))) for text in one] for one in joined)
        synsets = map(Synset, wnids, names, words, definitions, above)
        self._synsets = {key: one for one in synsets for key in (one.name, one.wnid)}
        self._above: dict[str, dict[str, int]] = {}

    def synset(self, identifier: str) -> Synset:
        """Find a synset by name (``dog.n.01``) or wnid."""
        if found := self._synsets.get(canonical(identifier).lower()):
            return found
        with _CORPUS_LOCK:
            try:
                wordnet = corpus.open_wordnet()
            except SdwnError as error:
                lacking = f"{identifier}: not among the synsets of taxonomy.parquet: "
                raise SdwnError(f"{lacking * bool(self._synsets)}{error}") from None
            return wordnet.synset(identifier)

    def above(self, wnid: str) -> Mapping[str, int]:
        """Map each hypernym, and the synset itself, to the least number of steps up to it."""
        if wnid not in self._above:
            found, queue = {wnid: 0}, [wnid]
            for one in queue:  # it grows meanwhile
                new = [up for up in self.synset(one).parents if up not in found]
                found |= dict.fromkeys(new, found[one] + 1)
                queue += new
            self._above[wnid] = found
        return self._above[wnid]

    def is_below(self, wnid: str, root: str) -> bool:
        """Return whether a synset is another one or anywhere below it."""
        return root in self.above(wnid)

    def distance(self, one: str, other: str) -> int:
        """Count the steps of the shortest path between two synsets over a common hypernym."""
        first, second = self.above(one), self.above(other)
        return min(steps + second[wnid] for wnid, steps in first.items() if wnid in second)


@dataclass(frozen=True, slots=True)
class NearestSubtree:
    """The smallest subtree around a synset that a classifier has classes in."""

    wnid: str  # its top: the synset itself, or else its nearest hypernym that has a class below it
    steps: int  # from the synset up to there
    classes: tuple[int, ...]  # indices into the classifier's list


def nearest_subtrees(
    taxonomy: Taxonomy, wnids: Iterable[str], classes: Sequence[str | None]
) -> dict[str, NearestSubtree]:
    """Find the nearest subtree of each synset, given the wnid of each class.

    Of several nearest hypernyms the one with the fewest classes is taken, then the first by
    wnid. A class without a wnid, or with one that WordNet does not have, is in no subtree.
    """
    below: dict[str, list[int]] = {}
    for index, wnid in enumerate(classes):
        with suppress(UsageError):
            for hypernym in taxonomy.above(wnid) if wnid else ():
                below.setdefault(hypernym, []).append(index)
    found = {}
    for wnid in wnids:
        ways = taxonomy.above(wnid).items()
        steps, _, top = min((steps, len(below[top]), top) for top, steps in ways if top in below)
        found[wnid] = NearestSubtree(top, steps, tuple(below[top]))
    return found
