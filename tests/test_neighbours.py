"""Nearest neighbours: those that scikit-learn finds, exactly or by an index."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sdwn.errors import UsageError
from sdwn.measures import neighbours
from sdwn.measures.neighbours import NeighbourIndex
from sklearn.metrics.pairwise import cosine_similarity


def clustered(clusters: int, each: int, dimensions: int) -> np.ndarray:
    """Draw vectors around centres, as those of many images of few classes."""
    random = np.random.default_rng(0)
    centres = np.repeat(random.normal(size=(clusters, dimensions)), each, axis=0)
    return (centres + 0.7 * random.normal(size=centres.shape)).astype(np.float16)


def test_all_pairs_are_compared_where_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of one block less than the neighbours asked for.
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    vectors = clustered(5, 6, 16)
    queries = vectors[3:20].astype(np.float32) * 3
    expected = cosine_similarity(queries, vectors.astype(np.float32))
    rows, similarities = NeighbourIndex(vectors).search(queries, 8)
    assert np.array_equal(rows, np.argsort(-expected, axis=1)[:, :8])
    assert np.allclose(similarities, -np.sort(-expected, axis=1)[:, :8], atol=1e-6)
    every, _ = NeighbourIndex(vectors).search(queries[:2], 100)
    assert every.shape == (2, 30)
    assert np.array_equal(every[:, 0], [3, 4])


def test_the_index_finds_nearly_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(300, 10, 64)
    expected, exact = NeighbourIndex(vectors).search(vectors, 10)
    monkeypatch.setattr(neighbours, "EXACT_PAIRS", 0)
    rows, similarities = NeighbourIndex(vectors).search(vectors, 10)
    found = [len({*one} & {*other}) for one, other in zip(rows, expected, strict=True)]
    assert sum(found) >= 0.99 * rows.size
    # Where it finds the same, the similarity is the same.
    same = rows == expected
    assert np.allclose(similarities[same], exact[same], atol=1e-6)


@pytest.mark.parametrize("pairs", [0, neighbours.EXACT_PAIRS])
def test_equal_vectors_and_vectors_of_zeros_have_neighbours(
    monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    monkeypatch.setattr(neighbours, "EXACT_PAIRS", pairs)
    rows, similarities = NeighbourIndex(np.ones((2000, 8), np.float16)).search(np.ones((3, 8)), 5)
    assert all(len({*row}) == 5 for row in rows)
    assert np.allclose(similarities, 1, atol=1e-6)
    assert similarities.max() <= 1
    _, similarities = NeighbourIndex(np.zeros((2, 8), np.float16)).search(np.zeros((1, 8)), 5)
    assert similarities.tolist() == [[0, 0]]


def test_an_index_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "EXACT_PAIRS", 0)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(UsageError, match=r"usearch is not installed; .*pip install 'sdwn\[mea"):
        NeighbourIndex(np.eye(2)).search(np.eye(2), 1)
