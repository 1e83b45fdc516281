"""Measures of a release: how like a reference it is, how varied, how true to its prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import UsageError
from sdwn.io import OnMessage
from sdwn.measures import distances, record
from sdwn.measures.distances import NeighbourIndex, mean_similarities, unit_vectors, vendi_score
from sdwn.measures.record import Figure, make_figure, mean_figure, write_scores
from sdwn.paths import MeasurePaths
from sdwn.prediction.table import open_features
from sdwn.releases.release import Release
from sdwn.storage.columns import numbers

# With fewer images a measure is absent; of a Fréchet distance, with no more than dimensions.
LEAST = {"kernel_distance": 100, "cmmd": 100, "density": 10, "coverage": 10, "vendi": 10}
WITHIN = ("vendi_within", "similarity_within")
NO_CLIP = "needs features of a CLIP: make them with --model clip:MODEL"
SEED = 0
# Random halves of the images: their spread gives an interval where an image that is drawn twice
# would change the figure.
HALVES = 10

Rows = NDArray[np.int64]
Vectors = NDArray[np.float16]


def measure_release(
    release: Release, reference: Release | None, name: str | None, most: int, on_message: OnMessage
) -> tuple[MeasurePaths, dict[str, Any]]:
    """Measure a release by its features; write the record, its tables, and scores of images.

    With a reference, figures are of the classes that both have, and of as many images a class on
    both sides, drawn at random where one has more. Distances, density, coverage and the Vendi score
    are computed of at most ``most`` images.
    """
    features = open_features(release, name)
    vectors, rows = [features.vectors], [_rows_by_class(release)]
    if reference is not None:
        vectors.append(record.open_reference(features, reference).vectors)
        rows.append(_rows_by_class(reference))
    names = sorted(rows[0].keys() & rows[-1].keys())
    if not names:
        raise UsageError(
            f"{release} and {reference} have no class in common; the first are "
            f"{' and '.join(map(min, rows))}; a class is a wnid, without one a label, then an id"
        )
    scores = _scores_of_images(vectors, rows)
    counts = [min(len(side[one]) for side in rows) for one in names]
    drawn = list[Rows]()
    for side in rows:
        # One seed for both: of a release and itself the same images are drawn.
        random = np.random.default_rng(SEED)
        few = [random.permutation(side[one])[:n] for one, n in zip(names, counts, strict=True)]
        drawn.append(np.concatenate(few))
    # Class after class, beside each image one of the reference of the same class.
    sides = [side[chosen] for side, chosen in zip(vectors, drawn, strict=True)]
    classes = np.repeat(np.arange(len(names)), counts)
    clip_scores = numbers(features.table["clip_score"], np.nan)[drawn[0]]
    is_clip = str(features.encoder["model"]).startswith("clip:")

    def figures_of(
        which: Rows, sides: list[Vectors] = sides
    ) -> tuple[dict[str, Figure], dict[str, str]]:
        chosen = np.flatnonzero(np.isin(classes, which))
        few = chosen[np.sort(np.random.default_rng(SEED).permutation(len(chosen))[:most])]
        figures, absent = _figures_of_set([side[few] for side in sides], classes[few], is_clip)
        figures |= _mean_figures(sides[0][chosen], classes[chosen], clip_scores[chosen], most)
        return {one: figures[one] for one in sorted(figures, key=[*record.MEASURES].index)}, absent

    on_message("all images")
    each = np.arange(len(names))
    figures, absent = figures_of(each)
    reasons = dict.fromkeys(WITHIN, "needs two images of a class")
    reasons["clip_score"] = "no image has a prompt" if is_clip else NO_CLIP
    absent |= {one: reason for one, reason in reasons.items() if one not in figures}
    if not figures:
        why = "; ".join(dict.fromkeys(absent.values()))
        raise UsageError(f"{release}: nothing can be measured: {why}")
    content: dict[str, Any] = {"figures": figures, "absent": absent}
    if reference is not None:  # how varied it is itself
        own = figures_of(each, sides[1:])[0]
        content["reference_figures"] = {one: own[one] for one in ("vendi", *WITHIN) if one in own}
    content |= record.figures_of_parts(release, names, lambda one: figures_of(one)[0], on_message)
    beside = zip(("release", "reference"), rows, strict=False)
    content["classes_left_out"] = {one: sorted(side.keys() - {*names}) for one, side in beside}
    content["settings"] = {"images": most, "halves": HALVES, "seed": SEED}
    paths = record.write_record("measures", release, features, reference, content)
    write_scores(paths.scores, release.metadata, scores)
    return paths, content


def _scores_of_images(vectors: list[Vectors], rows: list[dict[str, Rows]]) -> Mapping[str, Any]:
    """Compute the scores of the first side's images by those of their class, on both sides."""
    names = ("similarity_within", "nearest_real")[: len(rows)]
    scores = {name: np.ma.MaskedArray(np.zeros(len(vectors[0])), mask=True) for name in names}
    for one, own in rows[0].items():
        if len(own) > 1:
            scores["similarity_within"][own] = mean_similarities(unit_vectors(vectors[0][own]))
        if one in rows[-1] and len(rows) > 1:
            index = NeighbourIndex(vectors[1][rows[1][one]])
            scores["nearest_real"][own] = index.search(vectors[0][own], 1)[1][:, 0]
    return scores


def _rows_by_class(release: Release) -> dict[str, Rows]:
    names, of_image = record.class_of_images(release.metadata)
    order = np.argsort(of_image, kind="stable")
    starts = np.searchsorted(of_image[order], np.arange(1, len(names)))
    return dict(zip(names, np.split(order, starts), strict=True))


def _figures_of_set(
    sides: list[Vectors], classes: Rows, is_clip: bool
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Compute the figures that depend on the number of images, and the reasons of absent ones."""
    from scipy.stats import t

    n, figures = len(classes), dict[str, Figure]()
    least = {"frechet_distance": sides[0].shape[1] + 1, **LEAST}
    few = {one: count for one, count in least.items() if n < count}
    absent = {one: f"needs {count:,} images, has {n:,}" for one, count in few.items()}
    if len(sides) == 1:
        lonely = "needs images to compare with: add --reference REAL"
        absent |= {one: lonely for one in least if one != "vendi"}
    elif not is_clip:
        absent["cmmd"] = NO_CLIP
    if classes[0] == classes[-1]:
        absent["vendi"] = "one class only: the same as within a class"
    # All images, and halves of them.
    random, parts = np.random.default_rng(SEED), np.ones((n, 1 + HALVES), bool)
    for half in range(1, 1 + HALVES):
        parts[random.permutation(n)[n // 2 :], half] = False
    computed: dict[str, Callable[[], Iterable[float]]] = {
        "frechet_distance": lambda: (
            distances.frechet_distance(*(side[part].astype("f8") for side in sides))
            for part in parts.T
        ),
        "cmmd": lambda: distances.cmmd(sides[0], sides[-1], parts),
        "vendi": lambda: (vendi_score(unit_vectors(sides[0][part])) for part in parts.T),
    }
    for one in computed.keys() - absent.keys():
        value, *parted = map(float, computed[one]())
        # A half that is drawn without replacement is as far from the whole as that is from all
        # images that could be made.
        margin = float(t.ppf(0.975, HALVES - 1) * np.std(parted, ddof=1))
        ends = max(0.0, value - margin), value + margin
        figures[one] = make_figure(value, ends, n, None if one == "vendi" else n)
    if "coverage" not in absent:
        whole = [side.astype("f8") for side in sides]
        density, covered = distances.density_and_coverage(*whole)
        figures["density"] = _mean_figure(density, classes, n, n)
        figures["coverage"] = _mean_figure(covered, classes, n, n)
        if "kernel_distance" not in absent:
            value, error = distances.kernel_distance(*whole)
            ends = value - 1.96 * error, value + 1.96 * error
            figures["kernel_distance"] = make_figure(value, ends, n, n)
    return figures, absent


def _mean_figures(
    vectors: Vectors, classes: Rows, clip_scores: NDArray[Any], most: int
) -> dict[str, Figure]:
    """Compute the figures that are means, over classes or images."""
    within, figures = [], dict[str, Figure]()
    for part in np.split(np.arange(len(classes)), np.flatnonzero(np.diff(classes)) + 1):
        if len(part) > 1:
            own = unit_vectors(vectors[part])
            within.append((len(part), vendi_score(own[:most]), mean_similarities(own).mean()))
    if within:
        sizes, *values = np.array(within).T
        for one, by_class in zip(WITHIN, values, strict=True):
            figures[one] = _mean_figure(by_class, np.arange(len(within)), int(sizes.sum()))
    known = ~np.isnan(clip_scores)
    if known.any():
        count = int(known.sum())
        figures["clip_score"] = _mean_figure(clip_scores[known], classes[known], count)
    return figures


def _mean_figure(
    values: NDArray[Any], classes: Rows, images: int, reference_images: int | None = None
) -> Figure:
    """Compute a mean over images with its bootstrap interval over classes; of one, over images."""
    several = classes[0] != classes[-1]
    row = np.unique(classes, return_inverse=True)[1] if several else np.arange(len(values))
    totals, counts = np.bincount(row, values), np.bincount(row)
    return mean_figure(values.mean(), totals, counts, images, reference_images)
