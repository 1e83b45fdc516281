"""Predictions to figures: how many of each class's images a classifier recognises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from sdwn.errors import SdwnError
from sdwn.evaluation.intervals import Floats, Interval, intervals
from sdwn.prediction.predictions import TOP
from sdwn.storage.columns import BLACK, STATUSES

Counts = NDArray[np.int64]


class Figures(TypedDict):
    """The scalars of an evaluation; `Evaluation` says what each is."""

    images: int
    classes: int
    images_per_class: int
    top1_percent: float
    top5_percent: float
    mean_correct: float
    std_correct: float
    any_correct: float
    all_correct: float
    none_correct: float
    black_images: int


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class: its images, how many are right by top-1 and top-5, how many are black."""

    wnid: str
    images: int
    correct: int
    correct_top5: int
    black: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All figures of one classifier on one release.

    ``images_per_class`` is N, the most images that a class has. ``mean_correct`` and
    ``std_correct`` (population, ``ddof=0``) are over classes, of right images on the scale 0
    to N: a class with fewer than N images counts N times its share of right ones.
    ``any_correct``, ``all_correct`` and ``none_correct`` are shares, 0 to 1, of the classes with
    at least one, with all and with none of their images right. ``histogram[k]`` counts the
    classes with k right images, k from 0 to N, not scaled. A black image (``nsfw``, ``nan``,
    ``black``) is judged like any other. ``statuses`` counts images by status.

    ``intervals`` gives the 95 % interval of each figure that is no count, by bootstrap over
    classes (see :mod:`sdwn.evaluation.intervals`); None of a single class.

    ``without_black`` holds the same scalars with black images left out, N unchanged, and
    ``classes_left_out``, the classes of which nothing remains; None if every image is black.
    ``per_class`` is in the order of wnids. Of no class at all (see `nothing`) what is no count
    is None.
    """

    images: int
    classes: int
    images_per_class: int
    top1_percent: float | None
    top5_percent: float | None
    mean_correct: float | None
    std_correct: float | None
    any_correct: float | None
    all_correct: float | None
    none_correct: float | None
    black_images: int
    statuses: dict[str, int]
    intervals: dict[str, Interval | None]
    histogram: tuple[int, ...]
    without_black: dict[str, Any] | None
    per_class: tuple[ClassResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Give the figures as plain numbers, lists and mappings, as JSON keeps them."""
        plain = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}


@dataclass(frozen=True)
class Tally:
    """Counts per class, each an array over classes."""

    images: Counts
    correct: Counts
    correct_top5: Counts
    black: Counts

    def of(self, chosen: NDArray[np.bool_]) -> Tally:
        """Take some of the classes."""
        columns = (self.images, self.correct, self.correct_top5, self.black)
        return Tally(*(column[chosen] for column in columns))


def tally_of(rows: Sequence[ClassResult]) -> Tally:
    """Put the counts of classes into arrays."""
    names = ("images", "correct", "correct_top5", "black")
    columns = ([getattr(row, name) for row in rows] for name in names)
    return Tally(*(np.array(column, dtype=np.int64) for column in columns))


def evaluate(
    wnid: Sequence[str] | NDArray[Any],
    number: ArrayLike,
    status: Sequence[str] | NDArray[Any],
    label_rank: ArrayLike,
) -> Evaluation:
    """Compute the figures from one row an image.

    Args:
        wnid: the label, a class's wnid.
        number: which of its class's images.
        status: ``ok``, ``nsfw``, ``nan``, ``black`` or ``unknown``.
        label_rank: place of the label among the classifier's classes, 0 the most probable;
            negative if not classified, which is wrong.

    Raises:
        SdwnError: there is no image, or one stands twice.

    >>> cat, dog = ["n02123045"] * 2, ["n02084071"] * 2
    >>> found = evaluate(cat + dog, [0, 1, 0, 1], ["ok", "ok", "ok", "nsfw"], [0, 0, 3, 999])
    >>> found.top1_percent, found.mean_correct, found.any_correct, found.histogram
    (50.0, 1.0, 0.5, (1, 0, 1))
    >>> found.without_black["top5_percent"]
    100.0
    """
    names, label = np.unique(np.asarray(wnid, dtype=str), return_inverse=True)
    rank, black = np.asarray(label_rank), is_black(status)
    _check_rows(names[label], np.asarray(number), black, rank)
    tally = _tally(label, len(names), rank, black)
    bright = _tally(label[~black], len(names), rank[~black], black[~black])
    most = int(tally.images.max())
    counts = (tally.images, tally.correct, tally.correct_top5, tally.black)
    columns = (column.tolist() for column in counts)
    return Evaluation(
        **figures_of(tally, most),
        statuses=_statuses(status),
        intervals=intervals_of(tally, most),
        histogram=histogram(tally.correct, most),
        without_black=_without_black(bright, most),
        per_class=tuple(ClassResult(*row) for row in zip(names.tolist(), *columns, strict=True)),
    )


def evaluate_table(predictions: pa.Table) -> Evaluation:
    """Compute the figures from a table of predictions whose images all have a class.

    Errors as in :func:`evaluate`.
    """
    return evaluate(
        predictions["wnid"].to_pylist(),
        predictions["number"].to_numpy(),
        predictions["status"].to_pylist(),
        predictions["label_rank"].to_numpy(),
    )


def nothing() -> Evaluation:
    """Give the figures of a release without ImageNet-1k classes: WordNet's scores judge it.

    >>> nothing().classes, nothing().top1_percent, nothing().histogram
    (0, None, ())
    """
    return Evaluation(
        images=0,
        classes=0,
        images_per_class=0,
        top1_percent=None,
        top5_percent=None,
        mean_correct=None,
        std_correct=None,
        any_correct=None,
        all_correct=None,
        none_correct=None,
        black_images=0,
        statuses={},
        intervals={},
        histogram=(),
        without_black=None,
        per_class=(),
    )


def is_black(status: Sequence[str] | NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which images are black, blackened by the safety checker or NaN.

    Raises:
        ValueError: a status that has no meaning here, such as a code instead of its name.

    >>> is_black(["ok", "nsfw", "nan", "unknown"]).tolist()
    [False, True, True, False]
    """
    names = np.asarray(status, dtype=str)
    unknown = sorted(set(names.tolist()) - set(STATUSES))
    if unknown:
        raise ValueError(f"status {unknown[0]!r}: expected one of {', '.join(STATUSES)}")
    return np.isin(names, BLACK)


def histogram(correct: ArrayLike, most: int) -> tuple[int, ...]:
    """Count the classes with 0, 1, ... ``most`` right images.

    >>> histogram([0, 3, 3, 1], 3)
    (1, 1, 0, 2)
    """
    return tuple(np.bincount(np.asarray(correct), minlength=most + 1).tolist())


def _check_rows(
    wnid: NDArray[np.str_], number: NDArray[Any], black: NDArray[np.bool_], rank: NDArray[Any]
) -> None:
    if not len(wnid):
        raise SdwnError(
            "nothing to evaluate: expected images of ImageNet-1k classes, found none; "
            "does the release's catalog hold any of the 1000 classes?"
        )
    if not len(wnid) == len(number) == len(black) == len(rank):
        raise ValueError("wnid, number, status and label_rank differ in length")
    rows, times = np.unique(np.rec.fromarrays([wnid, number]), return_counts=True)
    if times.max() > 1:
        twice = rows[times.argmax()]
        raise SdwnError(
            f"image {twice[1]} of {twice[0]}: expected once, found {times.max()} times; "
            "evaluate the release again"
        )


def _tally(
    label: NDArray[np.intp], classes: int, rank: NDArray[Any], black: NDArray[np.bool_]
) -> Tally:
    def count(chosen: NDArray[np.bool_]) -> Counts:
        return np.bincount(label[chosen], minlength=classes).astype(np.int64)

    classified = rank >= 0
    return Tally(
        images=count(np.ones(len(label), dtype=bool)),
        correct=count(rank == 0),
        correct_top5=count(classified & (rank < TOP)),
        black=count(black),
    )


def figures_of(tally: Tally, most: int) -> Figures:
    """Compute the scalars of at least one class; ``most`` is the scale's N."""
    images = int(tally.images.sum())
    scaled = most * tally.correct / tally.images
    return Figures(
        images=images,
        classes=len(tally.images),
        images_per_class=most,
        top1_percent=100 * int(tally.correct.sum()) / images,
        top5_percent=100 * int(tally.correct_top5.sum()) / images,
        mean_correct=float(scaled.mean()),
        std_correct=float(scaled.std()),
        any_correct=float((tally.correct > 0).mean()),
        all_correct=float((tally.correct == tally.images).mean()),
        none_correct=float((tally.correct == 0).mean()),
        black_images=int(tally.black.sum()),
    )


def intervals_of(tally: Tally, most: int) -> dict[str, Interval | None]:
    """Give the interval of each scalar that is no count."""
    scaled = most * tally.correct / tally.images
    # Around the mean, so that equal classes have a spread of exactly 0.
    apart = scaled - scaled.mean()
    columns = {
        "images": tally.images,
        "correct": tally.correct,
        "correct_top5": tally.correct_top5,
        "scaled": scaled,
        "apart": apart,
        "squared": apart**2,
        "any": tally.correct > 0,
        "all": tally.correct == tally.images,
    }
    return intervals(columns, _statistics)


def _statistics(means: Mapping[str, Floats]) -> dict[str, Floats]:
    variance = means["squared"] - means["apart"] ** 2
    return {
        "top1_percent": 100 * means["correct"] / means["images"],
        "top5_percent": 100 * means["correct_top5"] / means["images"],
        "mean_correct": means["scaled"],
        "std_correct": np.sqrt(np.maximum(variance, 0)),
        "any_correct": means["any"],
        "all_correct": means["all"],
        "none_correct": 1 - means["any"],
    }


def _statuses(status: Sequence[str] | NDArray[Any]) -> dict[str, int]:
    names, times = np.unique(np.asarray(status, dtype=str), return_counts=True)
    found = dict(zip(names.tolist(), times.tolist(), strict=True))
    return {name: found[name] for name in STATUSES if name in found}


def _without_black(tally: Tally, most: int) -> dict[str, Any] | None:
    left = tally.images > 0
    if not left.any():
        return None
    return {**figures_of(tally.of(left), most), "classes_left_out": int((~left).sum())}
