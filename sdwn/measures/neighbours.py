"""Nearest neighbours of vectors: every pair compared where there are few, an index where many."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import import_extra

# A search of more pairs of a query and a vector uses the index.
EXACT_PAIRS = 400_000_000
# Queries and vectors that are compared at once, as float32.
BLOCK = 4096
# Of the index: neighbours of a vector, and vectors looked at to find them and to search.
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 64, 64

Floats = NDArray[np.float32]


class NeighbourIndex:
    """Vectors (n, d), kept as they are, and a search among them by cosine similarity."""

    def __init__(self, vectors: NDArray[Any]) -> None:
        self.vectors = vectors

    def search(self, vectors: NDArray[Any], k: int) -> tuple[NDArray[np.int64], Floats]:
        """Find the ``k`` most similar vectors of each query, the most similar first.

        Up to ``EXACT_PAIRS`` pairs of a query and a vector all are compared. More are searched in
        an index, which the first such search builds: it finds 99.9 % of the 17 nearest (measured
        with 20,000 vectors of 1024 dimensions in clusters of ten), with exact similarities.

        Args:
            vectors: the queries (m, d).
            k: how many to find; all, where there are fewer.

        Returns:
            Rows of the vectors, and their similarities from -1 to 1; both of shape (m, k). Of
            equal similarities any may come first. A vector of zeros is similar to none.
        """
        k = min(k, len(self.vectors))
        rows = np.empty((len(vectors), k), np.int64)
        similarities = np.empty((len(vectors), k), np.float32)
        few = len(vectors) * len(self.vectors) <= EXACT_PAIRS
        for start in range(0, len(vectors), BLOCK):
            part = slice(start, start + BLOCK)
            nearest, similar = (self._compare_all if few else self._look_up)(vectors[part], k)
            order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
            rows[part] = np.take_along_axis(nearest, order, axis=1)
            similarities[part] = np.take_along_axis(similar, order, axis=1)
        return rows, similarities

    def _compare_all(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.int64], Floats]:
        """Return the nearest of each block of the vectors."""
        rows, similarities, queries = [], [], _unit(queries)
        for start in range(0, len(self.vectors), BLOCK):
            found = queries @ _unit(self.vectors[start : start + BLOCK]).T
            # Partitioned from the end: in place of a negative copy.
            nearest = np.argpartition(found, max(found.shape[1] - k, 0), axis=1)[:, -k:]
            rows.append(nearest + start)
            similarities.append(np.take_along_axis(found, nearest, axis=1))
        return np.hstack(rows), np.hstack(similarities)

    def _look_up(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.int64], Floats]:
        """Return those that the index finds, with exact similarities."""
        found = self._index.search(np.asarray(queries, np.float16), k, threads=_threads())
        rows, queries = found.keys.reshape(len(queries), k).astype(np.int64), _unit(queries)
        columns = [np.einsum("ij,ij->i", queries, _unit(self.vectors[one])) for one in rows.T]
        return rows, np.stack(columns, axis=1)

    @cached_property
    def _index(self) -> Any:
        index = import_extra("usearch.index", "measures").Index(
            ndim=self.vectors.shape[1],
            metric="cos",
            dtype="f16",
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION_SEARCH,
        )
        index.add(np.arange(len(self.vectors)), np.asarray(self.vectors, "f2"), threads=_threads())
        return index


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _unit(vectors: NDArray[Any]) -> Floats:
    """Return vectors as float32 of length 1; zeros stay zeros."""
    found: Floats = vectors.astype(np.float32)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    np.divide(found, lengths, out=found, where=lengths > 0)
    return found
