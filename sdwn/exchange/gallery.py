"""What is exported: a release's images synset by synset, made ready in threads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, command
from sdwn.exchange.encoding import EXTENSIONS, Encoding
from sdwn.io import Advance, in_threads
from sdwn.planning.plan import PlannedSynset
from sdwn.releases.release import Release
from sdwn.storage.images import open_image

# More than processors: some wait for the disk.
THREADS = 16
# Records that are Python's objects at once.
ROWS = 1000
# How many images tell how much smaller or larger a codec makes them.
TRIALS = 16

# What a reader looks for first, and what says something only inside a release.
_FIRST = (
    *("wnid", "synset", "number", "status", "imagenet_class", "prompt", "seed"),
    *("width", "height", "sha256"),
)
_INNER = {"part", "row", "offset", "bytes", "codec", "session"}

Span = tuple[int, int]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Exhibit:
    """An image to write: its record, its bytes, and the extension of a file that holds them."""

    row: dict[str, Any]
    payload: bytes
    extension: str


class Gallery:
    """The images to export, sorted by synset and number; ``advance`` is told of each one.

    Raises:
        IntegrityError: the release's tables do not fit one another.
    """

    def __init__(self, release: Release, encoding: Encoding, advance: Advance) -> None:
        self.release, self._encoding, self._advance = release, encoding, advance
        ranks, numbers = _ranks(release), release.metadata["number"].to_numpy()
        order = np.lexsort((numbers, ranks))
        self._table = release.metadata.take(pa.array(order)).combine_chunks()
        self._starts = np.flatnonzero(np.diff(ranks[order], prepend=-1, append=-1))
        kept = [name for name in self._table.column_names if name not in _INNER]
        first = [name for name in _FIRST if name in kept]
        self._columns = [*first, *(name for name in kept if name not in first)]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def schema(self) -> pa.Schema:
        """The columns of an exhibit's record."""
        return self._table.select(self._columns).schema

    @property
    def codec(self) -> str | None:
        """How the images are encoded, in words; None if as in the release."""
        return self._encoding.text(set(pc.unique(self._table["codec"]).to_pylist()))

    @property
    def labelled(self) -> bool:
        """Whether every image is of an ImageNet class."""
        return not self._table["imagenet_class"].null_count

    def images(self, span: Span) -> int:
        """Count the images of a span of synsets."""
        return int(self._starts[span[1]] - self._starts[span[0]])

    def synsets(self, span: Span) -> list[PlannedSynset]:
        """Give the synsets of a span."""
        wnids = self._table["wnid"].take(pa.array(self._starts[slice(*span)])).to_pylist()
        return [self.release.synsets[wnid] for wnid in wnids]

    def sizes(self) -> list[float]:
        """Estimate how many bytes the images of each synset take, once they are encoded."""
        stored = np.add.reduceat(self._table["bytes"].to_numpy(), self._starts[:-1], dtype="i8")
        sizes: list[float] = (stored * self._ratio()).tolist()
        return sizes

    def each(self, span: Span, use: Callable[[Exhibit], Result]) -> Iterator[Result]:
        """Encode the images of a span of synsets and use them, in threads; results in order."""
        results = in_threads(
            lambda row: use(self._exhibit(row)), self._rows(span), THREADS, 2 * THREADS
        )
        # An error below must not leave threads that go on writing.
        with closing(results):
            for result in results:
                yield result
                self._advance(1)

    def skip(self, span: Span) -> None:
        """Count the images of a span as done."""
        self._advance(self.images(span))

    def _rows(self, span: Span) -> Iterator[dict[str, Any]]:
        rows = self._table.slice(self._starts[span[0]], self.images(span))
        for batch in rows.to_batches(max_chunksize=ROWS):
            yield from batch.to_pylist()

    def _exhibit(self, row: dict[str, Any]) -> Exhibit:
        payload, codec = self._encoding.encoded(self.release, row)
        record = {name: row[name] for name in self._columns}
        record["sha256"] = hashlib.sha256(payload).hexdigest()
        if record["sha256"] != row["sha256"]:
            # Earlier imports recorded the size before it was turned as EXIF says.
            record["width"], record["height"] = open_image(payload, codec).size
        return Exhibit(record, payload, EXTENSIONS[codec])

    def _ratio(self) -> float:
        places = np.unique(np.linspace(0, len(self._table) - 1, TRIALS).astype(int))
        rows = self._table.take(pa.array(places)).to_pylist()
        encoded = sum(len(self._encoding.encoded(self.release, row)[0]) for row in rows)
        return encoded / sum(int(row["bytes"]) for row in rows)


def _ranks(release: Release) -> NDArray[np.int64]:
    """Give each image its synset's place in the table of synsets."""
    found = pc.index_in(release.metadata["wnid"], pa.array(list(release.synsets), pa.string()))
    if found.null_count:
        raise IntegrityError(
            f"{release.paths.metadata} has images of synsets that {release.paths.synsets.name} "
            f"lacks; see what else is wrong: {command('verify', release.paths.root)}"
        )
    ranks: NDArray[np.int64] = found.to_numpy().astype("i8")
    return ranks


def images_digest(release: Release) -> str:
    """Hash which images of a release, or of a subset, these are."""
    # Not their SHA-256: black images have one and the same.
    names = [release.metadata[name].to_pylist() for name in ("wnid", "number", "sha256")]
    return hashlib.sha256(json.dumps([release.digest, *names]).encode()).hexdigest()
