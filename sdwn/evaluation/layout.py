"""The map: a place in the plane for each class, near those with names of like meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.config import ModelConfig
from sdwn.errors import UsageError
from sdwn.evaluation import embedding, encoder
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import Taxonomy

SEED = 0
PERPLEXITY = 30.0
# Below this a neighbourhood is everyone, and t-SNE has nothing to tell apart.
FEWEST = 5
# Circles are moved apart until they are this far from one another, or so many times.
GAP, ROUNDS = 0.04, 200
# Names that are spelt the same have one place, but want a circle each.
JITTER = 1e-6

# What a reader should know of a built-in model's own text encoder.
_NOTES = {
    "builtin:tiny": "Its weights are random, so that these places mean nothing",
    "builtin:miniature": "It has read few glosses, and no names, so that these places mean little",
}

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distances:
    """How far apart the names of classes are, what says so, and what a reader should know."""

    wnids: tuple[str, ...]
    matrix: Matrix
    source: str
    note: str


def places(release: Release, wnids: Sequence[str], word_vectors: Path | None) -> dict[str, Any]:
    """Place classes in the plane by their names: the map of an evaluation's record.

    The names' vectors are those of the file ``word_vectors``, else the generation model's own
    text encoder's; without either, WordNet's path distances take their part.
    Coordinates are within -1 and 1.

    Raises:
        UsageError: the file has no vector of any name, or is no such file; or WordNet lacks a
            synset.
    """
    found = _distances(release, sorted(wnids), word_vectors)
    method, points = flatten(found.matrix)
    return {
        "source": found.source,
        "method": method,
        "seed": SEED,
        "note": found.note,
        "places": {
            wnid: [round(float(x), 4), round(float(y), 4)]
            for wnid, (x, y) in zip(found.wnids, points, strict=True)
        },
    }


def _distances(release: Release, wnids: list[str], word_vectors: Path | None) -> Distances:
    if word_vectors is not None:
        return _by_words(release, wnids, word_vectors)
    try:
        return _by_encoder(release, wnids)
    except encoder.NoEncoderError as reason:
        return _by_wordnet(release.taxonomy, wnids, str(reason))


def _by_words(release: Release, wnids: list[str], path: Path) -> Distances:
    found = embedding.vectors(path, {wnid: _lemmas(release, wnid) for wnid in wnids})
    if not found:
        raise UsageError(
            f"{path}: expected vectors of English words, "
            f"found none of the {len(wnids)} classes' names"
        )
    without = len(wnids) - len(found)
    note = f"{without} of {len(wnids)} classes are left out: it has no vector of their names"
    matrix = cosine_distances(np.stack(list(found.values())))
    return Distances(tuple(found), matrix, path.name, note if without else "")


def _by_encoder(release: Release, wnids: list[str]) -> Distances:
    settings = release.manifest.settings
    if settings is None:
        raise encoder.NoEncoderError("the pictures were imported, no model of ours made them")
    model = ModelConfig(**settings["model"])
    revisions = {str(kind["revision"]) for kind in release.manifest.made_on if kind.get("revision")}
    # Where tasks ran several, none is the release's.
    revision = revisions.pop() if len(revisions) == 1 else None
    folder = encoder.encoder_folder(model, revision)
    names = [_lemmas(release, wnid)[0] for wnid in wnids]
    matrix = cosine_distances(encoder.encode(folder, model.variant, names))
    source = f"text encoder of {model.name}"
    return Distances(tuple(wnids), matrix, source, _NOTES.get(model.name, ""))


def _by_wordnet(taxonomy: Taxonomy, wnids: list[str], reason: str) -> Distances:
    matrix = np.zeros((len(wnids), len(wnids)))
    for row, one in enumerate(wnids):
        for column, other in enumerate(wnids[:row]):
            matrix[row, column] = matrix[column, row] = taxonomy.distance(one, other)
    return Distances(tuple(wnids), matrix, "WordNet path distance", f"No word vectors: {reason}")


def _lemmas(release: Release, wnid: str) -> list[str]:
    return [lemma.replace("_", " ") for lemma in release.synsets[wnid].lemmas.split(", ")]


def cosine_distances(vectors: NDArray[Any]) -> Matrix:
    """Give 1 - cosine of each pair of rows; a row of zeros is at right angles to all.

    >>> cosine_distances(np.array([[2, 0], [1, 0], [0, 3]])).tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    rows = vectors.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 0, length, 1)
    distances: Matrix = np.clip(1 - rows @ rows.T, 0, 2)
    np.fill_diagonal(distances, 0)
    return distances


def flatten(matrix: Matrix) -> tuple[str, Matrix]:
    """Lay things out in the plane by their distances; return the method and (n, 2) coordinates.

    t-SNE, for the map shall show which names are neighbours: it keeps neighbourhoods, where
    principal components and multidimensional scaling draw most classes in one cloud, and it
    takes seconds for a thousand. It starts from principal coordinates, so that also the large
    shape has a meaning, and of a fixed seed. Fewer than five are laid out by principal
    coordinates alone.
    """
    start = principal_coordinates(matrix)
    if len(matrix) < FEWEST:
        return "principal coordinates", spread(_fitted(start))
    from sklearn.manifold import TSNE

    # sklearn's own start is as small.
    tsne = TSNE(
        metric="precomputed",
        init=(1e-4 * start).astype(np.float32),
        perplexity=min(PERPLEXITY, (len(matrix) - 1) / 3),
        random_state=SEED,
    )
    points = _fitted(tsne.fit_transform(matrix))
    return f"t-SNE (perplexity {tsne.perplexity:.3g}), circles moved apart", _fitted(spread(points))


def principal_coordinates(matrix: Matrix) -> Matrix:
    """Project to the plane that keeps most of the distances; the first axis has deviation 1.

    >>> points = principal_coordinates(np.array([[0.0, 3, 1], [3, 0, 2], [1, 2, 0]]))
    >>> bool(np.allclose(points[:, 1], 0)), np.argsort(points[:, 0]).tolist()
    (True, [0, 2, 1])
    """
    count = len(matrix)
    centred = np.eye(count) - 1 / count
    values, axes = np.linalg.eigh(-0.5 * centred @ (matrix**2) @ centred)
    points = np.zeros((count, 2))
    for column, which in enumerate(np.argsort(values)[::-1][:2]):
        axis = axes[:, which]
        # LAPACK leaves the sign open.
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        points[:, column] = axis * np.sqrt(max(values[which], 0))
    deviation = points[:, 0].std()
    return points / deviation if deviation > 0 else points


def spread(points: Matrix) -> Matrix:
    """Push points that are too close apart, so that each circle can be seen and pointed at.

    >>> moved = spread(np.array([[0.0, 0.0], [0.01, 0.0], [0.5, 0.5]]))
    >>> bool(moved[1, 0] - moved[0, 0] > 0.03), moved[2].round(3).tolist()
    (True, [0.5, 0.5])
    """
    from scipy.spatial import cKDTree

    gap = min(GAP, 1 / np.sqrt(len(points)))
    points = points + JITTER * np.random.default_rng(SEED).standard_normal(points.shape)
    for _ in range(ROUNDS):
        pairs = cKDTree(points).query_pairs(gap, output_type="ndarray")
        if not len(pairs):
            break
        one, other = pairs.T
        apart = points[one] - points[other]
        distance = np.hypot(apart[:, 0], apart[:, 1])
        # Each goes a sixth of what is lacking, so that crowds grow evenly and do not swing.
        push = apart * ((gap - distance) / distance / 6)[:, None]
        np.add.at(points, one, push)
        np.add.at(points, other, -push)
    return points


def _fitted(points: NDArray[Any]) -> Matrix:
    """Move and scale points into the square from -1 to 1, shape kept."""
    centred = points.astype(np.float64) - (points.max(axis=0) + points.min(axis=0)) / 2
    largest = float(np.abs(centred).max())
    fitted: Matrix = centred / largest if largest > 0 else centred
    return fitted
