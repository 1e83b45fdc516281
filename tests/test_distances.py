"""Distances, variety and neighbours: equal to the libraries' and to closed forms."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc
from sdwn.errors import UsageError
from sdwn.measures import distances
from sdwn.measures.distances import (
    NeighbourIndex,
    cmmd,
    density_and_coverage,
    frechet_distance,
    kernel_distance,
    mean_similarities,
    unit_vectors,
    vendi_score,
)
from sklearn.metrics.pairwise import cosine_similarity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_rbf, kid_features_to_metric, mmd2
from vendi_score.vendi import score_dual, score_X

DIMENSIONS = 12


def normal(images: int, seed: int, shift: float = 0) -> np.ndarray:
    """Draw features around one point; float16, as they are kept, then as they are measured."""
    drawn = np.random.default_rng(seed).normal(shift, 1, (images, DIMENSIONS))
    return drawn.astype(np.float16).astype(np.float64)


def test_a_set_has_no_distance_from_itself() -> None:
    one = normal(400, 0)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert cmmd(one, one, np.ones((400, 1), bool)) == pytest.approx([0], abs=1e-9)
    # Unbiased for images that are others: the same ones twice are nearer than any two sets.
    assert kernel_distance(one, one)[0] <= 0
    density, covered = density_and_coverage(one, one)
    assert covered.all()
    # In each image's radius: its four nearest and itself.
    assert density.mean() == 1


def test_halves_of_one_set_are_at_distance_0_within_the_error() -> None:
    one = normal(1200, 0)
    value, error = kernel_distance(one[::2], one[1::2])
    assert abs(value) <= 2 * error
    far, _ = kernel_distance(normal(600, 0), normal(600, 1, shift=0.5))
    assert far > 10 * error


def test_the_error_of_a_kernel_distance_is_how_far_other_images_are_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distances, "SUBSETS", 20)
    found = [
        kernel_distance(normal(100, 2 * one), normal(100, 2 * one + 1, shift=0.4))
        for one in range(60)
    ]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.3)


def test_gaussians_have_the_distance_of_the_closed_form() -> None:
    one = normal(500, 0)
    shift = np.linspace(0, 2, DIMENSIONS)
    assert frechet_distance(one + shift, one) == pytest.approx(float(shift @ shift), rel=1e-9)
    # Of the same centre, and twice as wide: the trace of the covariance.
    centred = one - one.mean(axis=0)
    wide = float(np.trace(np.cov(centred, rowvar=False)))
    assert frechet_distance(2 * centred, centred) == pytest.approx(wide, rel=1e-9)


def test_distances_are_those_of_torch_fidelity() -> None:
    one, other = normal(300, 0), normal(300, 1, shift=0.2)
    sides = [fid_features_to_statistics(torch.from_numpy(side)) for side in (one, other)]
    (expected,) = fid_statistics_to_metric(*sides, verbose=False).values()
    assert frechet_distance(one, other) == pytest.approx(expected, abs=1e-6)
    mean, _ = kid_features_to_metric(
        torch.from_numpy(one), torch.from_numpy(other), kid_subset_size=150, verbose=False
    ).values()
    assert kernel_distance(one, other)[0] == pytest.approx(mean, abs=1e-6)


def test_cmmd_of_parts_in_blocks_is_that_of_all_their_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distances, "BLOCK", 17)
    one, other = unit_vectors(normal(60, 0)), unit_vectors(normal(60, 1, shift=0.5))
    parts = np.stack([np.ones(60, bool), np.arange(60) % 2 == 0, np.arange(60) < 20], axis=1)
    expected = [1000 * discrepancy(one[part], other[part]) for part in parts.T]
    assert cmmd(3 * one, other, parts) == pytest.approx(expected, abs=1e-9)


def discrepancy(one: np.ndarray, other: np.ndarray) -> float:
    pairs = (one, one), (one, other), (other, other)
    kernels = [kernel_rbf(*pair, kid_kernel_rbf_sigma=10) for pair in pairs]
    return float(mmd2(*kernels, mmd_est="biased"))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), ours=st.integers(10, 60), shift=st.floats(0, 1))
def test_density_and_coverage_are_those_of_prdc(seed: int, ours: int, shift: float) -> None:
    one, other = normal(ours, seed, shift), normal(40, seed + 1)
    expected = compute_prdc(other, one, nearest_k=distances.NEIGHBOURS)
    density, covered = density_and_coverage(one, other)
    assert density.mean() == pytest.approx(expected["density"], abs=1e-12)
    assert covered.mean() == pytest.approx(expected["coverage"], abs=1e-12)


def test_blocks_of_pairs_change_no_density(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = normal(3000, 0), normal(3000, 1)
    expected = density_and_coverage(one, other)
    monkeypatch.setattr(distances, "BLOCK_MIB", 4)
    for found, whole in zip(density_and_coverage(one, other), expected, strict=True):
        assert np.array_equal(found, whole)


def test_one_image_repeated_has_no_variety() -> None:
    real = normal(200, 0)
    same = np.tile(real[:1], (200, 1))
    assert vendi_score(unit_vectors(same)) == pytest.approx(1, abs=1e-9)
    assert mean_similarities(unit_vectors(same)) == pytest.approx(np.ones(200))
    _, covered = density_and_coverage(same, real)
    assert covered.mean() < 0.1


def test_orthogonal_features_count_each() -> None:
    images = 9
    assert vendi_score(np.eye(images)) == pytest.approx(images)
    # By both products of features: more images than dimensions, and fewer.
    assert vendi_score(np.tile(np.eye(images), (3, 1))) == pytest.approx(images)
    assert mean_similarities(np.eye(images)) == pytest.approx(np.zeros(images))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), images=st.integers(2, 40), scale=st.floats(0.01, 100))
def test_variety_depends_on_directions_alone(seed: int, images: int, scale: float) -> None:
    vectors = normal(images, seed, shift=0.5)
    units = unit_vectors(vectors)
    order = np.random.default_rng(seed).permutation(images)
    found = vendi_score(units)
    assert found == pytest.approx(score_X(vectors), rel=1e-9)
    assert 1 - 1e-9 <= found <= images + 1e-9
    assert vendi_score(unit_vectors(scale * vectors)[order]) == pytest.approx(found, rel=1e-9)
    pairs = (units @ units.T)[~np.eye(images, dtype=bool)].reshape(images, -1)
    assert mean_similarities(units[order]) == pytest.approx(pairs.mean(axis=1)[order], abs=1e-9)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0]))
def test_order_changes_no_distance_and_scale_does_as_it_must(seed: int, scale: float) -> None:
    one, other = normal(80, seed), normal(80, seed + 1, shift=0.3)
    found = frechet_distance(one, other)
    assert frechet_distance(one[::-1].copy(), other) == pytest.approx(found, rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(found, rel=1e-6)
    expected = scale**2 * found
    assert frechet_distance(scale * one, scale * other) == pytest.approx(expected, rel=1e-6)
    density, covered = density_and_coverage(one, other)
    again, still = density_and_coverage(scale * one[::-1], scale * other)
    assert np.array_equal(again, density[::-1])
    assert np.array_equal(still, covered)


def test_a_vector_of_zeros_is_similar_to_none() -> None:
    units = unit_vectors(np.array([[0, 0], [3, 4]], np.float16))
    assert mean_similarities(units).tolist() == [0, 0]
    assert not math.isnan(vendi_score(units))


@pytest.mark.long
def test_ten_thousand_images_have_the_figures_of_the_libraries() -> None:
    one, other = (
        np.random.default_rng(seed).normal(0.1 * seed, 1, (10_000, 256)) for seed in range(2)
    )
    assert frechet_distance(one + 0.1, one) == pytest.approx(256 * 0.1**2, rel=1e-6)
    value, error = kernel_distance(one, other)
    assert value > 5 * error
    expected = compute_prdc(other, one, nearest_k=distances.NEIGHBOURS)
    density, covered = density_and_coverage(one, other)
    assert density.mean() == pytest.approx(expected["density"], abs=1e-12)
    assert covered.mean() == pytest.approx(expected["coverage"], abs=1e-12)
    assert vendi_score(unit_vectors(one)) == pytest.approx(score_dual(one), rel=1e-9)
    found = cmmd(one[:3000], other[:3000], np.ones((3000, 1), bool))
    expected = 1000 * discrepancy(unit_vectors(one[:3000]), unit_vectors(other[:3000]))
    assert found == pytest.approx([expected], abs=1e-6)


# Neighbours


def clustered(clusters: int, each: int, dimensions: int) -> np.ndarray:
    """Draw vectors around centres, as those of many images of few classes."""
    random = np.random.default_rng(0)
    centres = np.repeat(random.normal(size=(clusters, dimensions)), each, axis=0)
    return (centres + 0.7 * random.normal(size=centres.shape)).astype(np.float16)


def test_all_pairs_are_compared_where_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of one block less than the neighbours asked for.
    monkeypatch.setattr(distances, "SEARCH_BLOCK", 7)
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
    monkeypatch.setattr(distances, "EXACT_PAIRS", 0)
    rows, similarities = NeighbourIndex(vectors).search(vectors, 10)
    found = [len({*one} & {*other}) for one, other in zip(rows, expected, strict=True)]
    assert sum(found) >= 0.99 * rows.size
    # Where it finds the same, the similarity is the same.
    same = rows == expected
    assert np.allclose(similarities[same], exact[same], atol=1e-6)


@pytest.mark.parametrize("pairs", [0, distances.EXACT_PAIRS])
def test_equal_vectors_and_vectors_of_zeros_have_neighbours(
    monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    monkeypatch.setattr(distances, "EXACT_PAIRS", pairs)
    rows, similarities = NeighbourIndex(np.ones((2000, 8), np.float16)).search(np.ones((3, 8)), 5)
    assert all(len({*row}) == 5 for row in rows)
    assert np.allclose(similarities, 1, atol=1e-6)
    assert similarities.max() <= 1
    _, similarities = NeighbourIndex(np.zeros((2, 8), np.float16)).search(np.zeros((1, 8)), 5)
    assert similarities.tolist() == [[0, 0]]


def test_an_index_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "EXACT_PAIRS", 0)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(UsageError, match=r"usearch is not installed; .*pip install 'sdwn\[mea"):
        NeighbourIndex(np.eye(2)).search(np.eye(2), 1)
