"""The class map: a point in the plane for each class, near those with names of like meaning."""

from __future__ import annotations

import codecs
import gzip
import itertools
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import SdwnError, UsageError
from sdwn.models.weights import own_revision, weights_folder
from sdwn.releases.release import Release
from sdwn.wordnet.imagenet import class_lemmas

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
Vector = NDArray[np.float32]


def build_class_map(
    release: Release, wnids: Sequence[str], word_vectors: Path | None
) -> dict[str, Any]:
    """Compute positions of classes in the plane, by their names: the map of an evaluation's record.

    The names' vectors are those of the file ``word_vectors``, else the generation model's own
    text encoder's; without either, WordNet's path distances stand in for them. Coordinates are
    within -1 and 1.
    """
    from sklearn.metrics.pairwise import cosine_distances

    wnids, note = sorted(wnids), ""
    lemmas = {wnid: class_lemmas(wnid) for wnid in wnids}
    if word_vectors is not None:
        origin, vectors = word_vectors.name, find_vectors(word_vectors, lemmas)
        if not vectors:
            raise UsageError(
                f"{word_vectors}: expected vectors of English words, found none of the "
                f"{len(wnids)} classes' names"
            )
        without, every = len(wnids) - len(vectors), len(wnids)
        if without:
            note = f"{without} of {every} classes are left out: it has no vector of their names"
        wnids = list(vectors)
        matrix = cosine_distances(np.stack(list(vectors.values())).astype(float))
    else:
        try:
            name, encoded = encode_names(release, [lemmas[wnid][0] for wnid in wnids])
            matrix = cosine_distances(encoded.astype(float))
            origin, note = f"text encoder of {name}", _NOTES.get(name, "")
        except SdwnError as reason:
            origin, note = "WordNet path distance", f"No word vectors: {reason}"
            matrix = np.zeros((len(wnids), len(wnids)))
            for row, one in enumerate(wnids):
                for column, other in enumerate(wnids[:row]):
                    distance = release.taxonomy.distance(one, other)
                    matrix[row, column] = matrix[column, row] = distance
    method, points = flatten(matrix)
    return {
        "source": origin,
        "method": method,
        "seed": SEED,
        "note": note,
        "places": {
            wnid: [round(float(x), 4), round(float(y), 4)]
            for wnid, (x, y) in zip(wnids, points, strict=True)
        },
    }


# --- Vectors of names, by the model's text encoder ---------------------------------------------
def encode_names(release: Release, names: Sequence[str]) -> tuple[str, Vector]:
    """Compute the pooled output of a release's text encoder for each name, without the network.

    Returns:
        The model's name, and the vectors; an SdwnError says why there are none.
    """
    digest = release.manifest.plan_digest
    if digest is None:
        raise SdwnError("the images were imported, not generated")
    plan = release.plan(digest)
    config = plan.config.model
    if config.builtin == "noise":
        raise SdwnError(f"{config.name} has no text encoder")
    revisions = {str(kind["revision"]) for kind in release.manifest.made_on if kind.get("revision")}
    # Where tasks ran several revisions, none is the release's.
    only = own_revision(revisions.pop()) if len(revisions) == 1 else None
    folder = weights_folder(plan.config, only)
    if not all((folder / part).is_dir() for part in ("tokenizer", "text_encoder")):
        raise SdwnError(f"{config.name} has no text encoder")

    import torch
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Not every part of a pipeline has to have the variant.
    has_variant = (folder / "text_encoder" / f"model.{config.variant}.safetensors").is_file()
    local: dict[str, Any] = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    try:
        kind = AutoConfig.from_pretrained(**local, subfolder="text_encoder").model_type
        if not kind.startswith("clip"):
            raise ValueError(f"expected CLIP's, found {kind}")
        tokenizer = AutoTokenizer.from_pretrained(**local, subfolder="tokenizer")
        model = CLIPTextModel.from_pretrained(
            **local,
            subfolder="text_encoder",
            dtype=torch.float32,
            variant=config.variant if has_variant else None,
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SdwnError(f"the text encoder in {folder} cannot be loaded: {reason}") from None
    pooled: list[Vector] = []
    with torch.inference_mode():
        for start in range(0, len(names), BATCH):
            batch = list(names[start : start + BATCH])
            tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            found = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            pooled.append(found.pooler_output.numpy())
    return config.name, np.concatenate(pooled)


# --- Vectors of names, from a text file in the format of GloVe or word2vec ---------------------
def find_vectors(path: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Vector]:
    """Find a vector for each key of ``names``, given its lemmas, the best first.

    A lemma of several words is looked up as one, joined by ``_`` or ``-``, else it is the mean
    of its words; a spelling that is not there is looked up in lower case. Keys without a
    known lemma are left out.
    """

    def words(lemma: str) -> list[str]:
        # The genitive's ending is dropped: carpenter's kit.
        return [w for part in re.split(r"[\s_-]+", lemma) if (w := part.removesuffix("'s"))]

    def joined(lemma: str) -> list[str]:
        return [sign.join(lemma.split()) for sign in "_-"]

    known = read_vectors(
        path,
        {
            case
            for lemma in itertools.chain(*names.values())
            for spelling in (*joined(lemma), *words(lemma))
            for case in (spelling, spelling.lower())
        },
    )

    def look_up(spelling: str) -> Vector | None:
        return known.get(spelling, known.get(spelling.lower()))

    found: dict[str, Vector] = {}
    for key, lemmas in names.items():
        for lemma in lemmas:
            vector = next((v for word in joined(lemma) if (v := look_up(word)) is not None), None)
            if vector is None:
                parts = [look_up(word) for word in words(lemma)]
                whole = [part for part in parts if part is not None]
                if not whole or len(whole) < len(parts):
                    continue
                vector = np.mean(whole, axis=0, dtype=np.float32)
            found[key] = vector
            break
    return found


def read_vectors(path: Path, wanted: Collection[str]) -> dict[str, Vector]:
    """Read the vectors of these words from a file, which may be gzipped; no others are kept.

    A first line of two numbers, as word2vec writes it, is skipped; a word that stands twice counts
    once, and a vector of zeros is none.
    """
    found: dict[str, Vector] = {}
    keys = {word.encode() for word in wanted}
    number, length, line = 0, 0, b""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                # No copy of the numbers unless they are wanted: there are gigabytes of them.
                word = text[: text.find(b" ")]
                if length and word not in keys:
                    continue
                fields = text.split()[1:]
                if number == 1 and len(fields) == 1 and word.isdigit():
                    continue
                vector = np.array([float(field) for field in fields], np.float32)
                length = length or len(vector)
                if len(fields) > length:
                    # GloVe has words with spaces; they are not the ones looked for.
                    continue
                if len(vector) != length or length < 2 or not np.isfinite(vector).all():
                    raise ValueError
                if word in keys:
                    found[word.decode()] = vector
                    keys.discard(word)
        if not length:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{path}: line {number}: expected a word and its numbers, as many in each line, as "
            f"GloVe and word2vec write them as text; found {line[:40].decode(errors='replace')!r}"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: word vectors cannot be read: {reason}") from None
    return {word: vector for word, vector in found.items() if vector.any()}


# --- Points in the plane -----------------------------------------------------------------------
def flatten(matrix: Matrix) -> tuple[str, Matrix]:
    """Find points in the plane for these distances; return the method and (n, 2) coordinates.

    t-SNE, for the map shall show which names are neighbours: it keeps neighbourhoods, where
    principal components and multidimensional scaling draw most classes in one cloud. It starts
    from principal coordinates, so that also the large shape has a meaning.
    """
    from sklearn.decomposition import KernelPCA
    from sklearn.manifold import TSNE

    # Of squared distances, kernel components are the principal coordinates.
    found = KernelPCA(n_components=2, kernel="precomputed").fit_transform(-0.5 * matrix**2)
    start = np.zeros((len(matrix), 2))
    start[:, : found.shape[1]] = found / (found[:, 0].std() or 1)
    if len(matrix) < FEWEST:
        return "principal coordinates", spread(_fitted(start))
    # sklearn's own start is as small.
    tsne = TSNE(
        metric="precomputed",
        init=(1e-4 * start).astype(np.float32),
        perplexity=min(PERPLEXITY, (len(matrix) - 1) / 3),
        random_state=SEED,
    )
    points = _fitted(tsne.fit_transform(matrix))
    return f"t-SNE (perplexity {tsne.perplexity:.3g}), circles moved apart", _fitted(spread(points))


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
