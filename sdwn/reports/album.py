"""The judged pictures of each class, and what the classifier took each of them for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdwn.releases.release import LOCATION, Release
from sdwn.wordnet.imagenet import class_lemmas, class_wnids

# An image that is damaged is told by its synset and number.
_COLUMNS = ["wnid", "synset", "number", "status", *LOCATION]
# So many of a class are looked at: an import may have a thousand.
MOST = 50


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a class: its row in the release, and the wnid that it was taken for."""

    row: dict[str, Any]
    seen: str | None

    @property
    def right(self) -> bool:
        """Whether it was taken for its own class."""
        return self.seen == str(self.row["wnid"])


class Album:
    """The pictures of classes, in the order of their numbers; of large classes the first ones."""

    def __init__(self, release: Release, wnids: Iterable[str], predictions: pa.Table) -> None:
        self.release = release
        self._wnids = list(wnids)
        self._predictions = predictions

    def __getitem__(self, wnid: str) -> list[Picture]:
        return self._pictures[wnid]

    def taken_for(self, wnid: str, other: str) -> Picture | None:
        """Give the first picture of a class that was taken for another one."""
        return next((picture for picture in self[wnid] if picture.seen == other), None)

    def name(self, wnid: str) -> str:
        """Name a class by its first lemma, also one that the release has not."""
        return self._names.get(wnid, wnid)

    @cached_property
    def _pictures(self) -> dict[str, list[Picture]]:
        seen, found = self._seen, {wnid: list[Picture]() for wnid in self._wnids}
        for row in _first(self._of_classes(self.release.metadata.select(_COLUMNS))).to_pylist():
            found[row["wnid"]].append(Picture(row, seen.get((row["wnid"], row["number"]))))
        return found

    def _of_classes(self, table: pa.Table) -> pa.Table:
        return table.filter(pc.is_in(table["wnid"], pa.array(self._wnids, pa.string())))

    @cached_property
    def _seen(self) -> dict[tuple[str, int], str]:
        classes, columns = class_wnids(), ["wnid", "number", "top5"]
        rows = _first(self._of_classes(self._predictions.select(columns))).to_pylist()
        return {(row["wnid"], row["number"]): classes[row["top5"][0]] for row in rows}

    @cached_property
    def _names(self) -> dict[str, str]:
        own = {wnid: row.lemmas.replace("_", " ") for wnid, row in self.release.synsets.items()}
        return {wnid: name.partition(", ")[0] for wnid, name in (class_lemmas() | own).items()}


def _first(table: pa.Table) -> pa.Table:
    """Keep the images of each class with the smallest numbers."""
    ordered = table.sort_by([("wnid", "ascending"), ("number", "ascending")]).combine_chunks()
    classes = ordered["wnid"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    place = np.arange(len(classes)) - starts[np.cumsum(np.diff(classes, prepend=-1) != 0) - 1]
    return ordered.filter(pa.array(place < MOST))
