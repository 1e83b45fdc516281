"""Metrics of an evaluation: the one table of them, and predictions turned into figures.

Of all classes, of groups of them, and of every synset of WordNet, whether a class or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.config import read_yaml
from sdwn.errors import UsageError
from sdwn.paths import shipped_file
from sdwn.prediction.table import TOP, group_by_wnid, top1
from sdwn.storage.columns import BLACK, STATUSES, numbers
from sdwn.wordnet.imagenet import CLASSES, class_wnids
from sdwn.wordnet.taxonomy import Taxonomy, nearest_subtrees

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Interval = list[float]


@dataclass(frozen=True)
class Tally:
    """Counts per class, each an array over classes; ``most`` is the scale's N.

    That is the most images that a class of the release has, black ones included.
    """

    most: int
    images: Counts
    correct: Counts
    correct_top5: Counts
    black: Counts

    @property
    def scaled(self) -> Floats:
        """Correct images from 0 to N: a class with fewer images counts N times its share."""
        return self.most * self.correct / self.images


# --- The table: a new metric is a row here, and its name in SHOWN ------------------------------
@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of an evaluation: its names, how it is computed, and how it is written.

    ``name`` is its key in files, ``label`` stands on pages, ``column`` where there is little room.
    ``resample`` takes means over resampled classes (of the columns in `intervals_of`), one value a
    resample, and gives what the 95 % interval is taken of: None for a count. Files have the value,
    people see ``scale`` times as much, with ``digits`` after the point and the ``unit`` behind it.
    """

    name: str
    label: str
    compute: Callable[[Tally], float]
    resample: Callable[[Mapping[str, Floats]], Floats] | None = None
    unit: str = ""
    scale: float = 1
    digits: int = 0
    column: str = ""

    @property
    def form(self) -> str:
        """The format of a scaled value, for :meth:`str.format`."""
        return f"{{:,.{self.digits}f}}"

    def number(self, figures: Mapping[str, Any]) -> str:
        """Write the value without its unit; a dash where there is none."""
        value = figures.get(self.name)
        return "\u2013" if value is None else self.form.format(self.scale * value)

    def unit_of(self, figures: Mapping[str, Any]) -> str:
        """Return the unit, the number of images per class filled in."""
        return self.unit.format(**figures)

    def text(self, figures: Mapping[str, Any]) -> str:
        """Write the value of these figures with its unit.

        >>> MEAN_CORRECT.text({"mean_correct": 4.1631, "images_per_class": 10})
        '4.16 of 10'
        """
        return f"{self.number(figures)} {self.unit_of(figures)}".rstrip()

    def heading(self, figures: Mapping[str, Any], short: bool = False) -> str:
        """Return the name and the unit, for the head of a row or a column."""
        unit = self.unit_of(figures)
        return (self.column if short else self.label) + (f", {unit}" if unit else "")


# What the paper reports first.
MEAN_CORRECT = Metric(
    "mean_correct",
    "correct images per class, mean",
    lambda tally: float(tally.scaled.mean()),
    lambda means: means["scaled"],
    unit="of {images_per_class}",
    digits=2,
    column="correct",
)


def _accuracy(name: str, label: str, counted: str) -> Metric:
    return Metric(
        name,
        label,
        lambda tally: 100 * int(getattr(tally, counted).sum()) / int(tally.images.sum()),
        lambda means: 100 * means[counted] / means["images"],
        unit="%",
        digits=2,
        column=label,
    )


def _share(
    which: str,
    images: str,
    chosen: Callable[[Tally], NDArray[np.bool_]],
    resample: Callable[[Mapping[str, Floats]], Floats] | None = None,
) -> Metric:
    return Metric(
        f"{which}_correct",
        f"classes with {images} correct",
        lambda tally: float(chosen(tally).mean()),
        resample or itemgetter(which),
        unit="%",
        scale=100,
        digits=1,
        column=which,
    )


# In the order of the files.
METRICS = (
    Metric("images", "images", lambda tally: int(tally.images.sum())),
    Metric("classes", "classes", lambda tally: len(tally.images)),
    Metric("images_per_class", "images per class", lambda tally: tally.most),
    _accuracy("top1_percent", "top-1", "correct"),
    _accuracy("top5_percent", "top-5", "correct_top5"),
    MEAN_CORRECT,
    Metric(
        "std_correct",
        "correct images per class, standard deviation",
        # Of all classes there are, not of a sample: ddof=0.
        lambda tally: float(tally.scaled.std()),
        lambda means: np.sqrt(np.maximum(means["squared"] - means["apart"] ** 2, 0)),
        digits=2,
        column="deviation",
    ),
    _share("any", "at least one image", lambda tally: tally.correct > 0),
    _share("all", "all images", lambda tally: tally.correct == tally.images),
    _share("none", "no image", lambda tally: tally.correct == 0, lambda means: 1 - means["any"]),
    # nsfw, nan or black; classified like any other image.
    Metric("black_images", "black images", lambda tally: int(tally.black.sum())),
)

# Where each is shown, in order. "group" is what the record of a group of classes has.
SHOWN = {
    "headline": "mean_correct any_correct all_correct top1_percent top5_percent",
    "terminal": "mean_correct std_correct any_correct all_correct none_correct top1_percent "
    "top5_percent black_images",
    "report": "images classes top1_percent top5_percent mean_correct std_correct any_correct "
    "all_correct none_correct black_images",
    "comparison": "images mean_correct std_correct any_correct all_correct top1_percent "
    "top5_percent black_images",
    "compared": "mean_correct top1_percent top5_percent",
    "browser": "top1_percent top5_percent",
    "group": "mean_correct std_correct any_correct all_correct top1_percent top5_percent "
    "black_images",
    "group columns": "mean_correct std_correct any_correct all_correct top5_percent",
}


def metrics_shown(where: str) -> list[Metric]:
    """List the metrics that are shown somewhere (`SHOWN`), in order."""
    by_name = {metric.name: metric for metric in METRICS}
    return [by_name[name] for name in SHOWN[where].split()]


# --- From predictions to figures ---------------------------------------------------------------


# One class: its wnid, images, how many are correct by top-1 and top-5, how many are black.
ClassResult = dict[str, Any]
COUNTED = ("images", "correct", "correct_top5", "black")


def measure(predictions: pa.Table) -> tuple[dict[str, Any], list[ClassResult]]:
    """Compute all figures of predictions whose images all have a class, and each class's results.

    Figures are as evaluation.json has them: each of `METRICS`; ``statuses``, the images by
    status; ``intervals``, the 95 % interval of each metric that is no count, None of a single
    class; ``histogram``, the classes with 0, 1, ... N correct images, not scaled;
    ``without_black``, the metrics with black images left out, N unchanged, and
    ``classes_left_out``, the classes without other images; None if every image is black.
    Without any class what is no count is None. Classes are by wnid. A negative ``label_rank``,
    of an image that was not classified, is incorrect.

    >>> images = {"wnid": ["n02123045"] * 2 + ["n02084071"] * 2}
    >>> images |= {"status": ["ok", "ok", "ok", "nsfw"], "label_rank": [0, 0, 3, 999]}
    >>> found, _ = measure(pa.table(images))
    >>> [found[name] for name in ("top1_percent", "mean_correct", "histogram")]
    [50.0, 1.0, [1, 0, 1]]
    >>> found["without_black"]["top5_percent"]
    100.0
    """
    if not len(predictions):
        empty: dict[str, Any] = {m.name: None if m.resample else 0 for m in METRICS}
        empty |= {"statuses": {}, "intervals": {}, "histogram": [], "without_black": None}
        return empty, []
    wnids, label = group_by_wnid(predictions)
    rank, status_of = numbers(predictions["label_rank"]), predictions["status"].to_pylist()
    statuses, black = Counter(status_of), np.isin(status_of, BLACK)
    by_top5 = (rank >= 0) & (rank < TOP)
    most = int(np.bincount(label).max())

    def results(chosen: NDArray[np.bool_]) -> list[ClassResult]:
        counts = (
            np.bincount(label[chosen & which], minlength=len(wnids)).tolist()
            for which in (chosen, rank == 0, by_top5, black)
        )
        rows = zip(wnids, *counts, strict=True)
        return [dict(zip(("wnid", *COUNTED), row, strict=True)) for row in rows]

    per_class = results(np.ones(len(label), dtype=bool))
    bright, without_black = [row for row in results(~black) if row["images"]], None
    if bright:
        without_black = {
            **figures_of(tally_of(bright, most)),
            "classes_left_out": len(wnids) - len(bright),
        }
    every = tally_of(per_class, most)
    figures = {
        **figures_of(every),
        "statuses": {status: statuses[status] for status in STATUSES if status in statuses},
        "intervals": intervals_of(every),
        "histogram": np.bincount(every.correct, minlength=most + 1).tolist(),
        "without_black": without_black,
    }
    return figures, per_class


def tally_of(rows: Sequence[ClassResult], most: int) -> Tally:
    """Turn the results of at least one class into arrays."""
    return Tally(most, *(np.array([row[name] for row in rows]) for name in COUNTED))


def figures_of(tally: Tally) -> dict[str, Any]:
    """Compute each metric of at least one class."""
    return {metric.name: metric.compute(tally) for metric in METRICS}


def intervals_of(tally: Tally) -> dict[str, Interval | None]:
    """Compute the interval of each metric that is no count."""
    # Around the mean, so that equal classes have a spread of exactly 0.
    apart = tally.scaled - tally.scaled.mean()
    columns = {
        "images": tally.images,
        "correct": tally.correct,
        "correct_top5": tally.correct_top5,
        "scaled": tally.scaled,
        "apart": apart,
        "squared": apart**2,
        "any": tally.correct > 0,
        "all": tally.correct == tally.images,
    }
    resampled = {metric.name: metric.resample for metric in METRICS if metric.resample}
    return intervals(
        columns, lambda means: {name: resample(means) for name, resample in resampled.items()}
    )


# --- Bootstrap intervals -----------------------------------------------------------------------

RESAMPLES = 2000
SEED = 0
# Draws held at once: memory stays flat in the number of rows.
DRAWS = 2_000_000


def intervals(
    columns: Mapping[str, NDArray[Any]],
    statistics: Callable[[Mapping[str, Floats]], Mapping[str, Floats]],
) -> dict[str, Interval | None]:
    """Compute the 95 % interval of each figure by the percentile bootstrap.

    A row, which is a class with all its images, is drawn as a whole, with replacement, as many
    rows as there are; 2,000 times, always with the same seed. ``statistics`` is given the mean
    of each column, one value a resample, and returns the figures that depend on them. A single row
    has no intervals, only None.

    >>> right = {"right": np.array([10, 0, 10, 10])}
    >>> intervals(right, lambda means: {"mean": means["right"]})
    {'mean': [2.5, 10.0]}
    """
    table = np.column_stack([np.asarray(values, dtype=np.float64) for values in columns.values()])
    means = resampled_means(table)
    figures = statistics({name: means[:, i] for i, name in enumerate(columns)})
    if len(table) < 2:
        return dict.fromkeys(figures)
    return {name: percentiles(values) for name, values in figures.items()}


def resampled_means(table: Floats, draws: int = DRAWS) -> Floats:
    """Return the columns' means, (resamples, columns), over rows drawn with replacement."""
    # Not by scipy.stats.bootstrap: it evaluates each figure by itself on every resample, and sums
    # in another order, so that figures of old evaluations would change in their last digits.
    rows = len(table)
    generator = np.random.default_rng(SEED)
    step = max(1, draws // rows)
    found = []
    for start in range(0, RESAMPLES, step):
        times = min(step, RESAMPLES - start)
        drawn = generator.integers(rows, size=(times, rows)) + rows * np.arange(times)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=times * rows).reshape(times, rows)
        found.append(counts @ table / rows)
    return np.concatenate(found)


def percentiles(values: Floats) -> Interval:
    """Return the ends of the interval that holds the middle 95 % of resamples."""
    return [float(end) for end in np.percentile(values, [2.5, 97.5])]


# --- Confusions --------------------------------------------------------------------------------
def confusion_pairs(predictions: pa.Table, wnids: Sequence[str]) -> list[dict[str, Any]]:
    """Count the incorrect top-1 classes of labelled images: most frequent first, then by wnids.

    A row for each pair: ``predicted_wnid`` is predicted for ``times`` of the class's ``images``.
    ``wnids`` are those of the classes, by index.
    """
    label, best = numbers(predictions["imagenet_class"]), top1(predictions)
    images = np.bincount(label, minlength=len(wnids)).tolist()
    wrong = np.stack([label, best]).astype(np.int64)[:, label != best]
    pairs, times = np.unique(wrong, axis=1, return_counts=True)
    rows = zip(*pairs.tolist(), times.tolist(), strict=True)
    found = [
        {"wnid": wnids[a], "predicted_wnid": wnids[b], "times": n, "images": images[a]}
        for a, b, n in rows
    ]
    return sorted(found, key=lambda row: (-row["times"], row["wnid"], row["predicted_wnid"]))


# --- Groups of classes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """The classes that are a synset or lie below it, under a name of the user's."""

    name: str
    wnid: str
    synset: str


def read_groups(name: str | None, taxonomy: Taxonomy) -> tuple[Group, ...]:
    """Read a YAML mapping of names to synsets, from a file or of those shipped."""
    path = shipped_file("groups", name or "default")
    content = read_yaml(path, "group names to synsets")
    if not content:
        raise UsageError(f"{path}: expected at least one group, as in animals: animal.n.01")
    groups = []
    for title, identifier in content.items():
        try:
            found = taxonomy.synset(str(identifier))
        except UsageError as error:
            raise UsageError(f"{path}: {title}: {error}") from None
        groups.append(Group(str(title), found.wnid, found.name))
    return tuple(groups)


def smallest_groups(
    groups: Sequence[Group], wnids: Iterable[str], taxonomy: Taxonomy
) -> dict[str, str | None]:
    """Map each class to the name of the group that holds it and fewest ImageNet-1k classes.

    So a class has the same one in every release. Of equal groups the first is taken; None where
    no group holds the class.
    """
    by_size = sorted(groups, key=lambda g: sum(taxonomy.is_below(c, g.wnid) for c in class_wnids()))
    return {
        wnid: next((g.name for g in by_size if taxonomy.is_below(wnid, g.wnid)), None)
        for wnid in wnids
    }


def group_figures(
    groups: Iterable[Group], classes: Sequence[ClassResult], most: int, taxonomy: Taxonomy
) -> list[dict[str, Any]]:
    """Compute the table of groups, in their order; a class counts in each that holds it."""
    table = []
    for group in groups:
        rows = [row for row in classes if taxonomy.is_below(row["wnid"], group.wnid)]
        tally = tally_of(rows, most) if rows else None
        figures = figures_of(tally) if tally else {}
        table.append(
            {
                **asdict(group),
                "classes": len(rows),
                "images": sum(row["images"] for row in rows),
                **{metric.name: figures.get(metric.name) for metric in metrics_shown("group")},
                "none_correct_classes": sum(row["correct"] == 0 for row in rows),
                "all_correct_classes": sum(row["correct"] == row["images"] for row in rows),
                "intervals": {
                    "mean_correct": intervals_of(tally)["mean_correct"] if tally else None
                },
            }
        )
    return table


# --- Every synset ------------------------------------------------------------------------------
def score_synsets(
    predictions: pa.Table, taxonomy: Taxonomy, classes: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Score each synset of the predictions, in the order of wnids.

    ``classes`` are the wnids of the classifier's own classes. The ``scope`` is the smallest subtree
    around a synset that has some of them, ``scope_steps`` up; ``chance`` is the share of them that
    lie there, ``subtree_probability`` the mean probability of these together; where ``scope_steps``
    is 0 it is the in-subtree probability of "Hypernymy Understanding Evaluation of Text-to-Image
    Models via WordNet Hierarchy" (arXiv 2310.09247). ``inside`` counts the images whose best
    ImageNet-1k class lies in the subtree; of a classifier that knows more classes than these, many
    subtrees have none of the 1000. ``distance`` is the mean number of steps from the synset to the
    best class, ``miss_distance`` the same of the images whose best class is not the synset itself,
    None if there is none; ``least_distance`` is that of the nearest of the 1000 classes.
    """
    wnids, of_image = group_by_wnid(predictions)
    subtrees = nearest_subtrees(taxonomy, wnids, classes)

    def totals(values: NDArray[Any]) -> Floats:
        found: Floats = np.zeros(len(wnids))
        np.add.at(found, of_image, values)
        return found

    # Each pair of synset and best class once: of ten images many are classified the same.
    pairs, of_pair = np.unique(of_image * CLASSES + top1(predictions), return_inverse=True)
    found = [(wnids[pair // CLASSES], class_wnids()[pair % CLASSES]) for pair in pairs.tolist()]
    inside = np.array([taxonomy.is_below(best, subtrees[wnid].wnid) for wnid, best in found])
    steps = np.array([taxonomy.distance(wnid, best) for wnid, best in found])[of_pair]
    images = np.bincount(of_image, minlength=len(wnids))
    far, missed = totals(steps), totals(steps > 0)
    miss_distance = np.divide(far, missed, out=np.full(len(wnids), np.nan), where=missed > 0)
    # Steps down from each hypernym to the nearest of the 1000 classes below it.
    down: dict[str, int] = {}
    for wnid in class_wnids():
        for hypernym, up in taxonomy.above(wnid).items():
            down[hypernym] = min(up, down.get(hypernym, up))
    columns = {
        "images": images.tolist(),
        "subtree_probability": _plain(
            totals(numbers(predictions["subtree_probability"], np.nan)) / images
        ),
        "inside": totals(inside[of_pair]).astype(np.int64).tolist(),
        "distance": _plain(far / images),
        "miss_distance": _plain(miss_distance),
    }
    rows = []
    for row, wnid in enumerate(wnids):
        subtree, above = subtrees[wnid], taxonomy.above(wnid)
        rows.append(
            {
                "wnid": wnid,
                "synset": taxonomy.synset(wnid).name,
                "scope_wnid": subtree.wnid,
                "scope_synset": taxonomy.synset(subtree.wnid).name,
                "scope_steps": subtree.steps,
                "scope_classes": len(subtree.classes),
                "chance": len(subtree.classes) / len(classes),
                **{name: values[row] for name, values in columns.items()},
                "least_distance": min(up + down[top] for top, up in above.items() if top in down),
            }
        )
    return rows


def summarise_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Sum up the synsets whose subtree is their own, and those with a hypernym's.

    ``inside_percent`` is of images; the other figures are means over synsets. None where there is
    no such synset.
    """
    own = [row for row in scores if row["scope_steps"] == 0]
    return {
        "own": _summary(own),
        "nearest": _summary([row for row in scores if row["scope_steps"]]),
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    # What is not known, None, becomes NaN here.
    columns = {
        name: np.array([row[name] for row in rows], float)
        for name in ("images", "inside", "subtree_probability", "distance")
    }

    def statistics(means: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "subtree_probability": means["subtree_probability"],
            "inside_percent": 100 * means["inside"] / means["images"],
            "distance": means["distance"],
        }

    means = statistics({name: values.mean() for name, values in columns.items()})
    found = {name: _plain(value[None])[0] for name, value in means.items()}
    return {
        "synsets": len(rows),
        "images": int(columns["images"].sum()),
        **found,
        "chance": float(np.mean([row["chance"] for row in rows])),
        "least_distance": float(np.mean([row["least_distance"] for row in rows])),
        "intervals": {
            name: None if found[name] is None else interval
            for name, interval in intervals(columns, statistics).items()
        },
    }


def _plain(values: Floats) -> list[float | None]:
    """Turn numbers into what JSON can hold: NaN, which is not known, into None."""
    return [None if np.isnan(value) else value for value in values.tolist()]
