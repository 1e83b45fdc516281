"""A release by synset: what it has of each, and where its images stand in the table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.browser.shot import Shot
from sdwn.errors import IntegrityError
from sdwn.releases.release import Release
from sdwn.storage.columns import BLACK, STATUSES, numbers

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entry:
    """A synset that has images here; ``position`` is its place by name.

    ``prompt`` is what all its images were made of, None where they differ or nobody knows.
    ``lemmas`` have spaces between words.
    """

    position: int
    wnid: str
    synset: str
    lemmas: tuple[str, ...]
    definition: str
    prompt: str | None
    imagenet_class: int | None
    images: int
    black: int

    @property
    def label(self) -> str:
        """What a person calls it: the first lemma."""
        return self.lemmas[0] if self.lemmas else self.synset


class Collection:
    """A release's synsets by name, and its images by synset and number; threads may share it.

    What is kept of images is arrays: ``order`` lists their rows in the release synset by synset,
    by number within; those of the synset at ``position`` are ``starts[position]`` up to
    ``starts[position + 1]`` of it. ``numbers``, ``statuses`` (places in ``STATUSES``) and
    ``positions`` are in the order of the release's rows.

    Raises:
        IntegrityError: the release's table is damaged.
    """

    def __init__(self, release: Release) -> None:
        self.release = release
        table = release.metadata
        if problem := _problem(release, table):
            raise IntegrityError(f"{release.paths.metadata}: {problem}")
        wnids, names, codes = _synsets(table)
        by_name = np.array(sorted(range(len(wnids)), key=lambda i: (names[i], wnids[i])), int)
        self.numbers: NDArray[np.uint32] = numbers(table["number"])
        self.positions: NDArray[np.int32] = np.argsort(by_name).astype(np.int32)[codes]
        self.statuses = _statuses(table)
        self.order: Rows = np.lexsort((self.numbers, self.positions))
        counts = np.bincount(self.positions, minlength=len(wnids))
        self.starts: Rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.black: NDArray[np.bool_] = np.isin(self.statuses, [STATUSES.index(s) for s in BLACK])
        self.synsets = self._entries([(wnids[i], names[i]) for i in by_name.tolist()])
        self._by_wnid = {entry.wnid: entry for entry in self.synsets}

    def __len__(self) -> int:
        return len(self.synsets)

    def entry(self, wnid: str) -> Entry | None:
        """Find a synset that has images here."""
        return self._by_wnid.get(wnid)

    def rows(self, wnid: str) -> Rows:
        """Give the rows of a synset's images in the release, by number; none if it has none."""
        entry = self.entry(wnid)
        return self.rows_at(entry.position) if entry else self.order[:0]

    def rows_at(self, position: int) -> Rows:
        """Give the rows of the images of the synset at a place."""
        return self.order[self.starts[position] : self.starts[position + 1]]

    def row(self, wnid: str, number: int) -> int | None:
        """Find an image's row in the release."""
        rows = self.rows(wnid)
        place = int(np.searchsorted(self.numbers[rows], number))
        found = place < len(rows) and int(self.numbers[rows[place]]) == number
        return int(rows[place]) if found else None

    def images(self, wnid: str) -> list[Shot]:
        """Give a synset's images by number, without what a classifier said of them."""
        return [self.shot(row) for row in self.rows(wnid).tolist()]

    def shot(self, row: int) -> Shot:
        """Describe the image of a row, without what a classifier said of it."""
        entry = self.synsets[self.positions[row]]
        status = STATUSES[self.statuses[row]]
        return Shot(entry.wnid, entry.synset, int(self.numbers[row]), row, status)

    def total(self, chosen: NDArray[np.bool_]) -> Rows:
        """Count, synset by synset, the images of which something holds; it is given row by row."""
        found: Rows = np.bincount(self.positions[chosen], minlength=len(self.starts) - 1)
        return found

    @cached_property
    def in_imagenet(self) -> NDArray[np.bool_]:
        """Tell, by position, which synsets are classes of ImageNet-1k."""
        return np.array([entry.imagenet_class is not None for entry in self.synsets], dtype=bool)

    def _entries(self, synsets: list[tuple[str, str]]) -> tuple[Entry, ...]:
        planned = self.release.synsets
        images, black = np.diff(self.starts).tolist(), self.total(self.black).tolist()
        prompts = self._prompts()
        found = []
        for position, (wnid, name) in enumerate(synsets):
            known = planned.get(wnid)
            found.append(
                Entry(
                    position=position,
                    wnid=wnid,
                    synset=name,
                    lemmas=_lemmas(known.lemmas) if known else (),
                    definition=known.definition if known else "",
                    prompt=prompts[position],
                    imagenet_class=known.imagenet_class if known else None,
                    images=images[position],
                    black=black[position],
                )
            )
        return tuple(found)

    def _prompts(self) -> list[str | None]:
        """Give the prompt of each synset whose images have one and the same."""
        table, count = self.release.metadata, len(self.starts) - 1
        if "prompt" not in table.column_names or not count:
            return [None] * count
        prompts = table["prompt"].combine_chunks().dictionary_encode("encode")
        codes = numbers(prompts.indices)[self.order]
        first, at = codes[self.starts[:-1]], np.repeat(np.arange(count), np.diff(self.starts))
        other = np.bincount(at[codes != first[at]], minlength=count) > 0
        texts = prompts.dictionary.to_pylist()
        return [
            None if differs else texts[code]
            for code, differs in zip(first.tolist(), other.tolist(), strict=True)
        ]


def _synsets(table: pa.Table) -> tuple[list[str], list[str], Rows]:
    """Give wnids and names of the synsets that have images, and which of them each image is of."""
    wnids, names = (table[name].combine_chunks().dictionary_encode() for name in ("wnid", "synset"))
    codes, texts = numbers(wnids.indices), names.dictionary.to_pylist()
    # Coded in the order in which they appear.
    _, first = np.unique(codes, return_index=True)
    called = numbers(names.indices)[first].tolist()
    return wnids.dictionary.to_pylist(), [texts[code] for code in called], codes


def _problem(release: Release, table: pa.Table) -> str | None:
    """Say what a table has that no release has; None if nothing."""
    if table.num_rows != len(release):
        return f"expected {len(release)} images, as in the manifest, found {table.num_rows}"
    named = table["status"].unique().to_pylist()
    if unknown := [status for status in named if status not in STATUSES]:
        return f"status: expected one of {', '.join(STATUSES)}, found {unknown[0][:40]!r}"
    if "prompt" in table.column_names and table["prompt"].type != pa.string():
        return f"prompt: expected {pa.string()}, found {table['prompt'].type}"
    return None


def _statuses(table: pa.Table) -> NDArray[np.uint8]:
    encoded = table["status"].combine_chunks().dictionary_encode()
    known = [STATUSES.index(status) for status in encoded.dictionary.to_pylist()]
    found: NDArray[np.uint8] = np.array(known, np.uint8)[numbers(encoded.indices)]
    return found


def _lemmas(joined: str) -> tuple[str, ...]:
    return tuple(joined.replace("_", " ").split(", ")) if joined else ()
