"""The class map: a point in the plane for each class, near those with names of like meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.config import ModelConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation.word_vectors import find_vectors
from sdwn.models.builtin import builtin_folder
from sdwn.models.weights import snapshot, source
from sdwn.releases.release import Release

SEED = 0
PERPLEXITY = 30.0
# With fewer classes all are neighbours, and t-SNE has nothing to separate.
FEWEST = 5
# Circles are moved apart until they are this far from one another, or so many times.
GAP, ROUNDS = 0.04, 200
# Names that are spelt the same have one point, but want a circle each.
JITTER = 1e-6
# Names that the text encoder takes at once.
BATCH = 64

# What a reader should know of a built-in model's own text encoder.
_NOTES = {
    "builtin:tiny": "Its weights are random, so that these positions mean nothing",
    "builtin:miniature": "It was trained on few glosses and no names: these positions mean little",
}

Matrix = NDArray[np.float64]


class NoEncoderError(SdwnError):
    """A model without a text encoder that can be used here; the message says why."""


@dataclass(frozen=True, slots=True)
class Distances:
    """Distances between the names of classes, their source, and a note for readers."""

    wnids: tuple[str, ...]
    matrix: Matrix
    source: str
    note: str


def build_class_map(
    release: Release, wnids: Sequence[str], word_vectors: Path | None
) -> dict[str, Any]:
    """Compute positions of classes in the plane, by their names: the map of an evaluation's record.

    The names' vectors are those of the file ``word_vectors``, else the generation model's own
    text encoder's; without either, WordNet's path distances stand in for them. Coordinates are
    within -1 and 1.

    Raises:
        UsageError: the file has no vector of any name, or is no such file; or WordNet lacks a
            synset.
    """
    wnids = sorted(wnids)
    if word_vectors is not None:
        found = _by_word_vectors(release, wnids, word_vectors)
    else:
        try:
            found = _by_encoder(release, wnids)
        except NoEncoderError as reason:
            found = _by_wordnet(release, wnids, str(reason))
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


# --- Distances between names -------------------------------------------------------------------


def _lemmas(release: Release, wnid: str) -> list[str]:
    return [lemma.replace("_", " ") for lemma in release.synsets[wnid].lemmas.split(", ")]


def _by_word_vectors(release: Release, wnids: Sequence[str], path: Path) -> Distances:
    found = find_vectors(path, {wnid: _lemmas(release, wnid) for wnid in wnids})
    if not found:
        raise UsageError(
            f"{path}: expected vectors of English words, "
            f"found none of the {len(wnids)} classes' names"
        )
    without = len(wnids) - len(found)
    note = f"{without} of {len(wnids)} classes are left out: it has no vector of their names"
    matrix = cosine_distances(np.stack(list(found.values())))
    return Distances(tuple(found), matrix, path.name, note if without else "")


def _by_wordnet(release: Release, wnids: Sequence[str], reason: str) -> Distances:
    matrix = np.zeros((len(wnids), len(wnids)))
    for row, one in enumerate(wnids):
        for column, other in enumerate(wnids[:row]):
            matrix[row, column] = matrix[column, row] = release.taxonomy.distance(one, other)
    return Distances(tuple(wnids), matrix, "WordNet path distance", f"No word vectors: {reason}")


def _by_encoder(release: Release, wnids: Sequence[str]) -> Distances:
    settings = release.manifest.settings
    if settings is None:
        raise NoEncoderError("the images were imported, not generated")
    model = ModelConfig(**settings["model"])
    revisions = {str(kind["revision"]) for kind in release.manifest.made_on if kind.get("revision")}
    # Where tasks ran several, none is the release's.
    revision = revisions.pop() if len(revisions) == 1 else None
    names = [_lemmas(release, wnid)[0] for wnid in wnids]
    matrix = cosine_distances(encode_names(encoder_folder(model, revision), model.variant, names))
    note = _NOTES.get(model.name, "")
    return Distances(tuple(wnids), matrix, f"text encoder of {model.name}", note)


def encoder_folder(model: ModelConfig, revision: str | None = None) -> Path:
    """Find the folder of a model that has a text encoder, without the network.

    Raises:
        NoEncoderError: there is none.
    """
    if model.builtin == "noise":
        raise NoEncoderError(f"{model.name} has no text encoder")
    folder: Path | None = None
    try:
        if model.builtin is not None:
            folder = builtin_folder(model.builtin)
        elif source(model) == "folder":
            folder = Path(model.name).expanduser()
        else:
            folder = snapshot(model.name, revision or model.revision)
    except UsageError:
        pass  # neither a folder nor a name on the hub
    except IntegrityError as error:
        raise NoEncoderError(str(error)) from None
    if folder is None:
        raise NoEncoderError(f"the weights of {model.name} are not on this machine")
    if not all((folder / part).is_dir() for part in ("tokenizer", "text_encoder")):
        raise NoEncoderError(f"{model.name} has no text encoder")
    return folder


def encode_names(folder: Path, variant: str | None, names: Sequence[str]) -> NDArray[np.float32]:
    """Compute the text encoder's pooled output for each name, on the CPU and in float32.

    Raises:
        NoEncoderError: it is no CLIP text model, or cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(folder, subfolder="text_encoder").model_type
        if not kind.startswith("clip"):
            raise ValueError(f"expected CLIP's, found {kind}")
        # Not every part of a pipeline has to have the variant.
        has_variant = (folder / "text_encoder" / f"model.{variant}.safetensors").is_file()
        tokenizer = AutoTokenizer.from_pretrained(
            folder, subfolder="tokenizer", local_files_only=True
        )
        model = CLIPTextModel.from_pretrained(
            folder,
            subfolder="text_encoder",
            dtype=torch.float32,
            variant=variant if has_variant else None,
            local_files_only=True,
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NoEncoderError(f"the text encoder in {folder} cannot be loaded: {reason}") from None
    pooled: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for start in range(0, len(names), BATCH):
            batch = list(names[start : start + BATCH])
            tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            found = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            pooled.append(found.pooler_output.numpy())
    return np.concatenate(pooled)


def cosine_distances(vectors: NDArray[Any]) -> Matrix:
    """Compute 1 - cosine of each pair of rows; a row of zeros is at right angles to all.

    >>> cosine_distances(np.array([[2, 0], [1, 0], [0, 3]])).tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    rows = vectors.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 0, length, 1)
    distances: Matrix = np.clip(1 - rows @ rows.T, 0, 2)
    np.fill_diagonal(distances, 0)
    return distances


# --- Distances to points -----------------------------------------------------------------------


def flatten(matrix: Matrix) -> tuple[str, Matrix]:
    """Find points in the plane for these distances; return the method and (n, 2) coordinates.

    t-SNE, for the map shall show which names are neighbours: it keeps neighbourhoods, where
    principal components and multidimensional scaling draw most classes in one cloud, and it
    takes seconds for a thousand. It starts from principal coordinates, so that also the large
    shape has a meaning, and of a fixed seed. Fewer than five are placed by principal
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
