"""Distances between two sets of features, and the variety of one.

The formulas of torch-fidelity and scikit-learn, with pairs of images taken in blocks. Features are
float64 of shape (images, dimensions); ``units`` have length 1.
"""

from __future__ import annotations

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
# Images that are compared with all others at once, and MiB of such distances.
BLOCK, BLOCK_MIB = 1000, 256


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


def cmmd(units: Floats, reference: Floats) -> float:
    """Compute the squared discrepancy of CLIP embeddings by a Gaussian kernel, times 1,000."""
    kid = import_extra("torch_fidelity.metric_kid", "measures")

    def mean_kernel(one: Floats, other: Floats) -> float:
        blocks = (one[start : start + BLOCK] for start in range(0, len(one), BLOCK))
        sums = (kid.kernel_rbf(block, other, kid_kernel_rbf_sigma=SIGMA).sum() for block in blocks)
        return float(sum(sums)) / (len(one) * len(other))

    within = mean_kernel(units, units) + mean_kernel(reference, reference)
    return SCALE * (within - 2 * mean_kernel(units, reference))


def density_and_coverage(ours: Floats, reference: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Compute the density of each image, and whether each reference image is covered.

    A reference image's radius is the distance to its fifth neighbour among the others. Density
    counts the radii that an image lies in, by 5; covered is who has an image in its radius.
    """
    from sklearn.metrics import pairwise_distances_chunked

    nearest = (  # the distance to the image itself, 0, is among them
        np.partition(block, NEIGHBOURS, axis=1)[:, NEIGHBOURS]
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
