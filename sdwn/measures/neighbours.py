"""Nearest neighbours of vectors: every pair compared where there are few, an index where many."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import import_extra
from sdwn.measures.distances import unit_vectors

# A search of more pairs of a query and a vector uses the index.
EXACT_PAIRS = 400_000_000
# Queries and vectors that are compared at once.
BLOCK = 4096
THREADS = len(os.sched_getaffinity(0))


class NeighbourIndex:
    """Vectors (n, d), kept as they are, and a search among them by cosine similarity."""

    def __init__(self, vectors: NDArray[Any]) -> None:
        self.vectors = vectors

    def search(
        self, vectors: NDArray[Any], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the ``k`` most similar vectors of each query (m, d), or all if there are fewer.

        Up to ``EXACT_PAIRS`` pairs of a query and a vector all are compared. More are searched in
        an index, which the first such search builds: it finds 99.9 % of the 17 nearest (measured
        with 60,000 vectors of 1024 dimensions in clusters of ten), with exact similarities.

        Returns:
            Rows of the vectors and their similarities, both (m, k), the most similar first. A
            vector of zeros is similar to none.
        """
        k = min(k, len(self.vectors))
        rows = np.empty((len(vectors), k), np.int64)
        similarities = np.empty((len(vectors), k), np.float32)
        few = len(vectors) * len(self.vectors) <= EXACT_PAIRS
        for start in range(0, len(vectors), BLOCK):
            part = slice(start, start + BLOCK)
            found = (self._compare_all if few else self._look_up)(
                unit_vectors(vectors[part], "f4"), k
            )
            order = np.argsort(-found[1], axis=1, kind="stable")[:, :k]
            rows[part] = np.take_along_axis(found[0], order, axis=1)
            similarities[part] = np.take_along_axis(found[1], order, axis=1).clip(-1, 1)
        return rows, similarities

    def _compare_all(self, queries: NDArray[Any], k: int) -> tuple[NDArray[Any], ...]:
        """Return the nearest of each block of the vectors."""
        rows, similarities = [], []
        for start in range(0, len(self.vectors), BLOCK):
            every = queries @ unit_vectors(self.vectors[start : start + BLOCK], "f4").T
            nearest = np.argpartition(every, max(every.shape[1] - k, 0), axis=1)[:, -k:]
            rows.append(nearest + start)
            similarities.append(np.take_along_axis(every, nearest, axis=1))
        return np.hstack(rows), np.hstack(similarities)

    def _look_up(self, queries: NDArray[Any], k: int) -> tuple[NDArray[Any], ...]:
        """Return those that the index finds, with exact similarities."""
        found = self._index.search(queries, k, threads=THREADS)
        rows = found.keys.reshape(len(queries), k).astype(np.int64)
        similar = [
            np.einsum("ij,ij->i", queries, unit_vectors(self.vectors[one], "f4")) for one in rows.T
        ]
        return rows, np.stack(similar, axis=1)

    @cached_property
    def _index(self) -> Any:
        usearch = import_extra("usearch.index", "measures")
        index = usearch.Index(
            ndim=self.vectors.shape[1], metric="cos", dtype="f16", expansion_search=128
        )
        index.add(np.arange(len(self.vectors)), self.vectors, threads=THREADS)
        return index
