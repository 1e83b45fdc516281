"""Distances between sets of features, their variety, and nearest neighbours.

The formulas of torch-fidelity and scikit-learn, with pairs of images taken in blocks. Features are
of shape (images, dimensions), float64 where it is not said; ``units`` have length 1.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import import_extra

Floats = NDArray[np.float64]

# Of density and coverage (Naeem 2020): the neighbours within a reference image's radius.
NEIGHBOURS = 5
# Of the kernel distance (Binkowski 2018): random subsets, and the most images of each.
SUBSETS, SUBSET_SIZE = 100, 1000
# Of CMMD (Jayasumana 2024).
SIGMA, SCALE = 10, 1000
# Images that are compared with as many others at once, by a kernel and in a search; and MiB of
# distances.
BLOCK, SEARCH_BLOCK, BLOCK_MIB = 1000, 4096, 64
# A search of more pairs of a query and a vector uses an index.
EXACT_PAIRS = 400_000_000
# Found beyond those asked for: bytes order by rounded similarities.
SPARE = 16
THREADS = len(os.sched_getaffinity(0))


def unit_vectors(vectors: NDArray[Any], dtype: str = "f8") -> NDArray[Any]:
    """Return vectors with length 1, as float64 or another type; zeros stay zeros."""
    found: NDArray[Any] = vectors.astype(dtype)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    np.divide(found, lengths, out=found, where=lengths > 0)
    return found


def frechet_distance(ours: Floats, reference: Floats) -> float:
    """Compute the squared Fréchet distance of two Gaussians, fitted to the features."""
    import torch

    fid = import_extra("torch_fidelity.metric_fid", "measures")
    sides = (fid.fid_features_to_statistics(torch.from_numpy(side)) for side in (ours, reference))
    found: float = fid.fid_statistics_to_metric(*sides, verbose=False)[fid.KEY_METRIC_FID]
    return max(0.0, found)  # of equal sets it is 0 but for rounding


def kernel_distance(ours: Floats, reference: Floats) -> tuple[float, float]:
    """Compute the squared discrepancy by a cubic kernel, unbiased, and its standard error.

    It is the mean over subsets of m of the n images, which overlap: of all n, the error is their
    spread times sqrt(m / (n - m)).
    """
    import torch

    kid = import_extra("torch_fidelity.metric_kid", "measures")
    size = {"kid_subset_size": min(SUBSET_SIZE, len(ours) // 2), "kid_subsets": SUBSETS}
    sides = (torch.from_numpy(side) for side in (ours, reference))
    found = kid.kid_features_to_metric(*sides, **size, verbose=False)
    overlap = size["kid_subset_size"] / (len(ours) - size["kid_subset_size"])
    return found[kid.KEY_METRIC_KID_MEAN], found[kid.KEY_METRIC_KID_STD] * overlap**0.5


def cmmd(ours: NDArray[Any], reference: NDArray[Any], parts: NDArray[np.bool_]) -> Floats:
    """Compute the squared discrepancy of CLIP embeddings by a Gaussian kernel, times 1,000.

    One for each column of ``parts`` (images, parts), the images of both sides that it is of.
    """
    kid = import_extra("torch_fidelity.metric_kid", "measures")
    blocks = [np.s_[start : start + BLOCK] for start in range(0, len(ours), BLOCK)]
    shares, found = parts / parts.sum(axis=0), np.zeros(parts.shape[1])
    for rows in blocks:
        one, real = unit_vectors(ours[rows]), unit_vectors(reference[rows])
        for columns in blocks:
            two, others = unit_vectors(ours[columns]), unit_vectors(reference[columns])
            pairs = (one, two, 1), (real, others, 1), (one, others, -2)
            kernel = sum(
                sign * kid.kernel_rbf(*pair, kid_kernel_rbf_sigma=SIGMA) for *pair, sign in pairs
            )
            found += ((kernel.T @ shares[rows]) * shares[columns]).sum(axis=0)
    return SCALE * found


def density_and_coverage(ours: Floats, reference: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Compute the density of each image, and whether each reference image is covered.

    A reference image's radius is the distance to its fifth neighbour among the others. Density
    counts the radii that an image lies in, by 5; covered is who has an image in its radius.
    """
    from sklearn.metrics import pairwise_distances_chunked

    nearest = (  # the distance to the image itself, 0, is among them
        np.partition(block, NEIGHBOURS, axis=1)[:, NEIGHBOURS].copy()  # not a view of the block
        for block in pairwise_distances_chunked(reference, working_memory=BLOCK_MIB)
    )
    radii = np.concatenate(list(nearest))
    counts, covered = np.zeros(len(ours)), np.empty(0, bool)
    for block in pairwise_distances_chunked(reference, ours, working_memory=BLOCK_MIB):
        inside = block < radii[len(covered) : len(covered) + len(block), None]
        counts += inside.sum(axis=0)
        covered = np.append(covered, inside.any(axis=1))
    return counts / NEIGHBOURS, covered


def vendi_score(units: Floats) -> float:
    """Compute the Vendi score (Friedman & Dieng 2023): 1 of equal images, n of n orthogonal."""
    from scipy.linalg import eigvalsh
    from scipy.special import entr

    # Both products have the same eigenvalues other than 0.
    product = units @ units.T if len(units) <= units.shape[1] else units.T @ units
    return float(np.exp(entr(eigvalsh(product / len(units)).clip(min=0)).sum()))


def mean_similarities(units: Floats) -> Floats:
    """Compute the mean cosine of each vector with the others, of which there are some."""
    own = np.einsum("ij,ij->i", units, units)
    found: Floats = (units @ units.sum(axis=0) - own) / (len(units) - 1)
    return found


class NeighbourIndex:
    """Vectors (n, d), kept as they are, and a search among them by cosine similarity."""

    def __init__(self, vectors: NDArray[Any]) -> None:
        self.vectors = vectors

    def search(
        self, vectors: NDArray[Any], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the ``k`` most similar vectors of each query (m, d), or all if there are fewer.

        More than ``EXACT_PAIRS`` pairs are searched in an index of bytes, with exact similarities.
        Of 30,000 vectors in clusters of ten, with 384 dimensions, it found all ten of a cluster,
        and 97 % of the 17 nearest, of which seven are of no cluster. Returned are rows of the
        vectors and their similarities, both (m, k), the most similar first.
        """
        k = min(k, len(self.vectors))
        rows = np.empty((len(vectors), k), np.int64)
        similarities = np.empty((len(vectors), k), np.float32)
        few = len(vectors) * len(self.vectors) <= EXACT_PAIRS
        look = self._compare_all if few else self._look_up
        for start in range(0, len(vectors), SEARCH_BLOCK):
            part = slice(start, start + SEARCH_BLOCK)
            found = look(unit_vectors(vectors[part], "f4"), k)
            order = np.argsort(-found[1], axis=1, kind="stable")[:, :k]
            rows[part] = np.take_along_axis(found[0], order, axis=1)
            similarities[part] = np.take_along_axis(found[1], order, axis=1).clip(-1, 1)
        return rows, similarities

    def _compare_all(self, queries: NDArray[Any], k: int) -> tuple[NDArray[Any], ...]:
        """Return the nearest of each block of the vectors."""
        found = []
        for start in range(0, len(self.vectors), SEARCH_BLOCK):
            every = queries @ unit_vectors(self.vectors[start : start + SEARCH_BLOCK], "f4").T
            nearest = np.argpartition(every, max(every.shape[1] - k, 0), axis=1)[:, -k:]
            found.append((nearest + start, np.take_along_axis(every, nearest, axis=1)))
        return tuple(map(np.hstack, zip(*found, strict=True)))

    def _look_up(self, queries: NDArray[Any], k: int) -> tuple[NDArray[Any], ...]:
        """Return those that the index finds, with exact similarities."""
        most = min(k + SPARE, len(self.vectors))
        found = self._index.search(_as_bytes(queries), most, threads=THREADS)
        rows = found.keys.reshape(len(queries), most)
        nearest = (unit_vectors(self.vectors[one], "f4") for one in rows.T)
        similar = [np.einsum("ij,ij->i", queries, one) for one in nearest]
        return rows, np.stack(similar, axis=1)

    @cached_property
    def _index(self) -> Any:
        usearch = import_extra("usearch.index", "measures")
        size = self.vectors.shape[1]
        index = usearch.Index(ndim=size, metric="cos", dtype="i8", expansion_search=96)
        for start in range(0, len(self.vectors), SEARCH_BLOCK):
            part = _as_bytes(self.vectors[start : start + SEARCH_BLOCK])
            index.add(np.arange(start, start + len(part)), part, threads=THREADS)
        return index


def _as_bytes(vectors: NDArray[Any]) -> NDArray[np.int8]:
    """Round vectors to bytes, each over its own range: a cosine does not depend on lengths."""
    largest = np.abs(vectors).max(axis=1, keepdims=True).astype("f4")
    found: NDArray[np.int8] = np.rint(vectors * (127 / np.maximum(largest, 1e-9))).astype("i1")
    return found
