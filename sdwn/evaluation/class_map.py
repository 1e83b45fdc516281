"""The class map: positions of classes by the meaning of their names, circles and labels."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, combinations, product, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import SdwnError, UsageError, first_line
from sdwn.models.weights import hub_commit, weights_folder
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import class_lemmas, class_name

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

# Okabe and Ito's colours, which most colour-blind readers can distinguish, without black and yellow
# (lost on a dark and on a light ground), and four more; the largest groups get the first ones.
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"),
    *("#8a63c9", "#999933", "#a8506c", "#8b6b4a"),
)
# When the colours are used up they come again as rings, then as rings with a dot.
SHAPES = ("disc", "ring", "target")
NO_GROUP = "no group"
GREY = "#8b949e"
# Of classes recognised best and worst.
LABELS = 16
# In the map's units, of which the whole map has two: a label's height, and its letters' mean width.
LABEL_HEIGHT = 0.052
LETTER_WIDTH = 0.6 * LABEL_HEIGHT

Matrix = NDArray[np.float64]
Vector = NDArray[np.float32]
Row = dict[str, Any]


def build_class_map(
    release: Release, wnids: Sequence[str], word_vectors: Path | None
) -> dict[str, Any]:
    """Compute positions of classes, from -1 to 1, by their names: the map of a record.

    By vectors from the file ``word_vectors``, else the generation model's own text encoder's, else
    by WordNet's path distances.
    """
    from scipy.spatial.distance import squareform
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
        if lost := len(wnids) - len(vectors):
            note = f"{lost} of {len(wnids)} classes are left out: it has no vector of their names"
        wnids = list(vectors)
        matrix = cosine_distances(np.stack(list(vectors.values())).astype(float))
    else:
        try:
            name, encoded = encode_names(release, [lemmas[wnid][0] for wnid in wnids])
            matrix = cosine_distances(encoded.astype(float))
            origin, note = f"text encoder of {name}", _NOTES.get(name, "")
        except SdwnError as reason:
            origin, note = "WordNet path distance", f"No word vectors: {reason}"
            pairs = combinations(wnids, 2)
            matrix = squareform([float(release.taxonomy.distance(*pair)) for pair in pairs])
    method, points = flatten(matrix)
    places = zip(wnids, points.round(4).tolist(), strict=True)
    return {"source": origin, "method": method, "seed": SEED, "note": note, "places": dict(places)}


# --- Vectors of names, by the model's text encoder ---------------------------------------------
def encode_names(release: Release, names: Sequence[str]) -> tuple[str, Vector]:
    """Return the model's name, and its text encoder's pooled output for each name, offline."""
    digest = release.manifest.plan_digest
    if digest is None:
        raise SdwnError("the images were imported, not generated")
    plan = release.plan(digest)
    config = plan.config.model
    if config.builtin == "noise":
        raise SdwnError(f"{config.name} has no text encoder")
    revisions = {str(kind["revision"]) for kind in release.manifest.made_on if kind.get("revision")}
    # Where tasks ran several revisions, none is the release's.
    only = hub_commit(revisions.pop()) if len(revisions) == 1 else None
    folder = weights_folder(plan.config, only)
    # Not every part of a pipeline has to have the variant.
    own = (folder / "text_encoder" / f"model.{config.variant}.safetensors").is_file()
    variant = config.variant if own else None

    import torch
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    local: dict[str, Any] = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    try:
        kind = AutoConfig.from_pretrained(**local, subfolder="text_encoder").model_type
        if not kind.startswith("clip"):
            raise ValueError(f"expected CLIP's, found {kind}")
        tokenizer = AutoTokenizer.from_pretrained(**local, subfolder="tokenizer")
        model = CLIPTextModel.from_pretrained(
            **local, subfolder="text_encoder", dtype=torch.float32, variant=variant
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = first_line(error)
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
    of its words; each also in lower case. Keys without a known lemma are left out.
    """

    def spellings(lemma: str) -> Iterator[list[str]]:
        yield from ([sign.join(lemma.split())] for sign in "_-")
        # The genitive's ending is dropped: carpenter's kit.
        yield [w for part in re.split(r"[\s_-]+", lemma) if (w := part.removesuffix("'s"))]

    every = {key: list(chain.from_iterable(map(spellings, one))) for key, one in names.items()}
    words = set(chain.from_iterable(chain.from_iterable(every.values())))
    known, found = read_vectors(path, words | {word.lower() for word in words}), dict[str, Vector]()
    known |= {word: known[word.lower()] for word in words - known.keys() if word.lower() in known}
    for key, each in every.items():
        for spelling in each:
            if spelling and known.keys() >= set(spelling):
                found[key] = np.stack([known[word] for word in spelling]).mean(axis=0)
                break
    return found


def read_vectors(path: Path, wanted: Collection[str]) -> dict[str, Vector]:
    """Read the vectors of these words from a file; of a word that stands twice the first."""
    found, keys = dict[str, Vector](), {word.encode() for word in wanted}
    number, length, line = 0, 0, b""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                # No copy of the numbers unless they are wanted: there are gigabytes of them.
                word = line[: line.find(b" ")]
                if length and word not in keys:
                    continue
                fields = line.split()[1:]
                # word2vec begins with two numbers; GloVe has words with spaces, never looked for.
                if (number == 1 and len(fields) == 1) or 0 < length < len(fields):
                    continue
                vector = np.array([float(field) for field in fields], np.float32)
                length = length or len(vector)
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
    except OSError as error:
        raise UsageError(f"{path}: word vectors cannot be read: {error.strerror}") from None
    return {word: vector for word, vector in found.items() if vector.any()}


# --- Points in the plane -----------------------------------------------------------------------
def flatten(matrix: Matrix) -> tuple[str, Matrix]:
    """Find points in the plane for these distances; return the method and (n, 2) coordinates.

    t-SNE keeps neighbourhoods, where principal components and multidimensional scaling draw most
    classes in one cloud. It starts from principal coordinates: also the large shape has a meaning.
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
    """Push points that are too close apart, so that each circle can be seen and pointed at."""
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
    fitted: Matrix = centred / (float(np.abs(centred).max()) or 1)
    return fitted


# --- Groups, circles and labels: the same on pages and in print --------------------------------
def recognition_rank(row: Mapping[str, Any]) -> tuple[float, float, float, str]:
    """Return a class's sort key: the best recognised first, of equal ones by its subtree."""
    images, probability = row["images"], row["subtree_probability"] or 0
    return -row["correct"] / images, -row["correct_top5"] / images, -probability, row["wnid"]


def map_circles(evaluation: Mapping[str, Any]) -> list[tuple[Row, list[Row]]]:
    """Return groups (name, colour, shape, classes) with their circles (wnid, x, y, size).

    The largest group is first, classes without one are last. A size is from 0 to 1, the root of the
    share of correct images; large circles are first, so that small ones are drawn over them.
    """
    positions = evaluation["map"]["places"]
    rows = [row for row in evaluation["classes"] if row["wnid"] in positions]
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (-row["correct"] / row["images"], row["wnid"])):
        (x, y), size = positions[row["wnid"]], (row["correct"] / row["images"]) ** 0.5
        circle = {"wnid": row["wnid"], "x": x, "y": y, "size": size}
        found.setdefault(row["group"] or NO_GROUP, []).append(circle)
    groups = sorted(found.items(), key=lambda one: (one[0] == NO_GROUP, -len(one[1]), one[0]))
    looks = chain(product(SHAPES, COLOURS), repeat(("ring", GREY)))
    drawn = list[tuple[Row, list[Row]]]()
    for name, circles in groups:
        shape, colour = ("disc", GREY) if name == NO_GROUP else next(looks)
        style = {"name": name, "colour": colour, "shape": shape, "classes": len(circles)}
        drawn.append((style, circles))
    return drawn


def map_labels(evaluation: Mapping[str, Any]) -> list[Row]:
    """Return labels (text, x, y, side) of classes recognised best and worst, none over another.

    ``x`` is the left end of one right of its circle, as ``side`` says, or the right end where there
    is no room; a class without room on either side is passed over.
    """
    positions = evaluation["map"]["places"]
    rows = [row for row in evaluation["classes"] if row["wnid"] in positions]
    rows.sort(key=recognition_rank)
    # The best, the worst, the next best, the next worst, and so on.
    extremes = list(chain.from_iterable(zip(rows, rows[::-1], strict=True)))[: len(rows)]
    left, right = min(x for x, _ in positions.values()), max(x for x, _ in positions.values())
    labels, boxes = list[Row](), list[tuple[float, float, float]]()
    for row in extremes:
        text = f"{class_name(row['wnid'])} {row['correct']}/{row['images']}"
        (x, y), width = positions[row["wnid"]], LETTER_WIDTH * len(text)
        gap = 0.02 + 0.02 * (row["correct"] / row["images"]) ** 0.5
        for start, side in ((x + gap, "left"), (x - gap - width, "right")):
            end = start + width
            apart = (
                end < other_start or other_end < start or abs(y - other_y) > LABEL_HEIGHT
                for other_start, other_end, other_y in boxes
            )
            if start >= left - 0.05 and end <= right + 0.05 and all(apart):
                boxes.append((start, end, y))
                at = start if side == "left" else end
                labels.append({"text": text, "x": at, "y": y, "side": side})
                break
    return labels[:LABELS]
