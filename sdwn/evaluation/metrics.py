"""Metrics of an evaluation: of all classes, of groups of them, and of every synset of WordNet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.config import read_yaml
from sdwn.errors import UsageError
from sdwn.paths import shipped_file
from sdwn.prediction.table import TOP, top1, unique_names
from sdwn.storage.columns import BLACK, STATUSES, numbers
from sdwn.wordnet.corpus import CLASSES, class_wnids
from sdwn.wordnet.taxonomy import Taxonomy, nearest_subtrees

Floats = NDArray[np.float64]
# What metrics are computed of: arrays over classes by name, or their means over resampled classes.
Columns = Mapping[str, NDArray[Any]]


# --- The table: a new metric is a row of METRICS, and its name in SHOWN -------------------------
@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of an evaluation: its names, how it is computed, and how it is written.

    ``name`` is its key in files, ``label`` stands on pages, ``column`` where there is little room.
    ``compute`` takes the columns of `columns_of`; ``resample`` their means, one value a resample,
    for the 95 % interval; None for a count. Files have the value, people see ``scale`` times as
    much, with ``digits`` after the point and the ``unit`` behind it.
    """

    name: str
    label: str
    compute: Callable[[Columns], float]
    resample: Callable[[Columns], Floats] | None = None
    unit: str = ""
    scale: float = 1
    digits: int = 0
    column: str = ""

    def scaled(self, value: float) -> str:
        """Write a value as people see it, without its unit."""
        return f"{self.scale * value:,.{self.digits}f}"

    def number(self, figures: Mapping[str, Any]) -> str:
        """Write the value without its unit; a dash where there is none."""
        value = figures.get(self.name)
        return "\u2013" if value is None else self.scaled(value)

    def interval(self, figures: Mapping[str, Any]) -> str:
        """Write the value's 95 % interval; nothing where there is none."""
        ends = (figures.get("intervals") or {}).get(self.name)
        return " to ".join(map(self.scaled, ends or ()))

    def text(self, figures: Mapping[str, Any]) -> str:
        """Write the value with its unit, as ``4.16 of 10``."""
        return f"{self.number(figures)} {self.unit.format(**figures)}".rstrip()

    def heading(self, figures: Mapping[str, Any], short: bool = False) -> str:
        """Return the name and the unit, for the head of a row or a column."""
        unit = self.unit.format(**figures)
        name = self.column if short and self.column else self.label
        return f"{name}, {unit}" if unit else name


def _accuracy(name: str, label: str, counted: str) -> Metric:
    return Metric(
        name,
        label,
        lambda of: 100 * int(of[counted].sum()) / int(of["images"].sum()),
        lambda means: 100 * means[counted] / means["images"],
        unit="%",
        digits=2,
    )


def _share(which: str, label: str, resample: Callable[[Columns], Floats] | None = None) -> Metric:
    return Metric(
        f"{which}_correct",
        label,
        lambda of: float(of[which].mean()),
        resample or itemgetter(which),
        unit="%",
        scale=100,
        digits=1,
        column=which,
    )


# In the order of the files.
METRICS = (
    Metric("images", "images", lambda of: int(of["images"].sum())),
    Metric("classes", "classes", lambda of: len(of["images"])),
    Metric("images_per_class", "images per class", lambda of: int(of["most"].max())),
    _accuracy("top1_percent", "top-1", "correct"),
    _accuracy("top5_percent", "top-5", "correct_top5"),
    # What the paper reports first.
    Metric(
        "mean_correct",
        "correct images per class, mean",
        lambda of: float(of["scaled"].mean()),
        itemgetter("scaled"),
        unit="of {images_per_class}",
        digits=2,
        column="correct",
    ),
    Metric(
        "std_correct",
        "correct images per class, standard deviation",
        # Of all classes there are, not of a sample: ddof=0.
        lambda of: float(of["scaled"].std()),
        lambda means: np.sqrt(np.maximum(means["squared"] - means["apart"] ** 2, 0)),
        digits=2,
        column="deviation",
    ),
    _share("any", "classes with at least one image correct"),
    _share("all", "classes with all images correct"),
    _share("none", "classes with no image correct", lambda means: 1 - means["any"]),
    # nsfw, nan or black; classified like any other image.
    Metric("black_images", "black images", lambda of: int(of["black"].sum())),
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
# One class: its wnid, and how many of its images are counted by each name in `measure`.
ClassResult = dict[str, Any]


def measure(predictions: pa.Table) -> tuple[dict[str, Any], list[ClassResult]]:
    """Compute all figures of predictions whose images all have a class, and each class's results.

    Figures are as evaluation.json has them: each of `METRICS`, and ``intervals`` of those that are
    no counts, None of a single class; ``histogram``, the classes with 0, 1, ... N correct images,
    not scaled; ``without_black``, the metrics with black images left out, N unchanged, and how many
    classes have no other. Without any class what is no count is None. A negative ``label_rank``, of
    an image that was not classified, is incorrect.
    """
    if not len(predictions):
        empty: dict[str, Any] = {m.name: None if m.resample else 0 for m in METRICS}
        empty |= {"statuses": {}, "intervals": {}, "histogram": [], "without_black": None}
        return empty, []
    wnids, label = unique_names(predictions["wnid"])
    rank, status_of = numbers(predictions["label_rank"]), predictions["status"].to_pylist()
    statuses, black = Counter(status_of), np.isin(status_of, BLACK)
    counted = {
        "images": np.ones_like(black),
        "correct": rank == 0,
        "correct_top5": (rank >= 0) & (rank < TOP),
        "black": black,
    }
    most = int(np.bincount(label).max())

    def results(chosen: NDArray[np.bool_]) -> list[ClassResult]:
        sums = {n: np.bincount(label[chosen & c], minlength=len(wnids)) for n, c in counted.items()}
        rows = pa.table({"wnid": wnids, **sums}).to_pylist()
        return [row for row in rows if row["images"]]

    per_class, bright, without_black = results(counted["images"]), results(~black), None
    if bright:
        without_black = figures_of(columns_of(bright, most))
        without_black["classes_left_out"] = len(wnids) - len(bright)
    every = columns_of(per_class, most)
    figures = {
        **figures_of(every),
        "statuses": {status: statuses[status] for status in STATUSES if status in statuses},
        "intervals": intervals_of(every),
        "histogram": np.bincount(every["correct"], minlength=most + 1).tolist(),
        "without_black": without_black,
    }
    return figures, per_class


def columns_of(rows: Sequence[ClassResult], most: int) -> Columns:
    """Turn the results of at least one class into arrays: all that a metric can be computed of.

    Beside the counts: ``most`` images that a class of the release has, black ones too; ``scaled``,
    the correct ones from 0 to ``most``: a class with fewer images counts N times its share; how far
    ``apart`` that is from its mean, and ``squared``; if ``any``, ``all`` or ``none`` are correct.
    """
    found = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "wnid"}
    images, correct = found["images"], found["correct"]
    scaled = most * correct / images
    # Around the mean, so that equal classes have a spread of exactly 0.
    found |= {"scaled": scaled, "apart": scaled - scaled.mean(), "most": np.full(len(rows), most)}
    found["squared"] = found["apart"] ** 2
    return found | {"any": correct > 0, "all": correct == images, "none": correct == 0}


def figures_of(columns: Columns) -> dict[str, Any]:
    """Compute each metric of at least one class."""
    return {metric.name: metric.compute(columns) for metric in METRICS}


def intervals_of(columns: Columns) -> dict[str, list[float] | None]:
    """Compute the interval of each metric that is no count."""
    resampled = {metric.name: metric.resample for metric in METRICS if metric.resample}
    return intervals(columns, lambda means: {n: figure(means) for n, figure in resampled.items()})


# --- Bootstrap intervals -----------------------------------------------------------------------
RESAMPLES = 2000
SEED = 0
# Draws held at once: memory stays flat in the number of rows.
DRAWS = 2_000_000


def intervals(
    columns: Columns, statistics: Callable[[Columns], Columns]
) -> dict[str, list[float] | None]:
    """Compute the 95 % interval of each figure by the percentile bootstrap.

    Rows, each a class with all its images, are drawn with replacement, always with the same seed.
    ``statistics`` takes the mean of each column, one value a resample, and returns the figures.
    """
    # Not by scipy.stats.bootstrap: it evaluates each figure by itself on every resample, and sums
    # in another order, so that figures of old evaluations would change in their last digits.
    table = np.column_stack([np.asarray(values, dtype=np.float64) for values in columns.values()])
    rows, generator, found = len(table), np.random.default_rng(SEED), list[Floats]()
    step = max(1, DRAWS // rows)
    for start in range(0, RESAMPLES, step):
        times = min(step, RESAMPLES - start)
        drawn = generator.integers(rows, size=(times, rows)) + rows * np.arange(times)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=times * rows).reshape(times, rows)
        found.append(counts @ table / rows)
    means = np.concatenate(found)
    figures = statistics({name: means[:, i] for i, name in enumerate(columns)})
    if rows < 2:
        return dict.fromkeys(figures)
    ends = {name: np.percentile(values, [2.5, 97.5]) for name, values in figures.items()}
    return {name: [float(low), float(high)] for name, (low, high) in ends.items()}


# --- Confusions --------------------------------------------------------------------------------
def confusion_pairs(predictions: pa.Table, wnids: Sequence[str]) -> list[dict[str, Any]]:
    """Count the incorrect top-1 classes of labelled images, the most frequent pair first."""
    labels = predictions["imagenet_class"].to_pylist()
    images, pairs = Counter(labels), Counter(zip(labels, top1(predictions).tolist(), strict=True))
    found = [
        {"wnid": wnids[a], "predicted_wnid": wnids[b], "times": n, "images": images[a]}
        for (a, b), n in pairs.items()
        if a != b
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
    """Map each class to the name of the group that holds it and fewest of all 1000 classes."""
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
        figures, interval = dict[str, Any](), None
        if rows:
            columns = columns_of(rows, most)
            figures, interval = figures_of(columns), intervals_of(columns)["mean_correct"]
        table.append(
            {
                **asdict(group),
                "classes": len(rows),
                "images": sum(row["images"] for row in rows),
                **{metric.name: figures.get(metric.name) for metric in metrics_shown("group")},
                "none_correct_classes": sum(row["correct"] == 0 for row in rows),
                "all_correct_classes": sum(row["correct"] == row["images"] for row in rows),
                "intervals": {"mean_correct": interval},
            }
        )
    return table


# --- Every synset ------------------------------------------------------------------------------
def score_synsets(
    predictions: pa.Table, taxonomy: Taxonomy, classes: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Score each synset of the predictions, in the order of wnids.

    ``classes`` are the wnids of the classifier's own classes. The ``scope`` is the smallest subtree
    around a synset that has some of them, ``scope_steps`` up, and ``chance`` the share of them that
    lie there; ``subtree_probability`` is the mean probability of these together: where
    ``scope_steps`` is 0, the in-subtree probability of arXiv 2310.09247. ``inside`` counts the
    images whose best ImageNet-1k class lies in it. ``distance`` is the mean number of steps to the
    best class, ``miss_distance`` of the images whose best class is not the synset itself,
    ``least_distance`` that of the nearest of the 1000 classes.
    """
    wnids, of_image = unique_names(predictions["wnid"])
    subtrees = nearest_subtrees(taxonomy, wnids, classes)
    totals = partial(np.bincount, of_image, minlength=len(wnids))
    # Each pair of synset and best class once: of ten images many are classified the same.
    pairs, of_pair = np.unique(of_image * CLASSES + top1(predictions), return_inverse=True)
    both = [(wnids[pair // CLASSES], class_wnids()[pair % CLASSES]) for pair in pairs.tolist()]
    inside = np.array([taxonomy.is_below(best, subtrees[wnid].wnid) for wnid, best in both])
    steps = np.array([taxonomy.distance(wnid, best) for wnid, best in both])[of_pair]
    # Steps down from each hypernym to the nearest of the 1000 classes below it.
    down: dict[str, int] = {}
    for wnid in class_wnids():
        for hypernym, up in taxonomy.above(wnid).items():
            down[hypernym] = min(up, down.get(hypernym, up))
    scopes, images, far = [subtrees[wnid] for wnid in wnids], np.bincount(of_image), totals(steps)
    probability = numbers(predictions["subtree_probability"], np.nan)
    with np.errstate(invalid="ignore"):  # nothing missed is no number
        columns: dict[str, Any] = {
            "wnid": wnids,
            "synset": [taxonomy.synset(wnid).name for wnid in wnids],
            "scope_wnid": [one.wnid for one in scopes],
            "scope_synset": [taxonomy.synset(one.wnid).name for one in scopes],
            "scope_steps": [one.steps for one in scopes],
            "scope_classes": [len(one.classes) for one in scopes],
            "chance": [len(one.classes) / len(classes) for one in scopes],
            "images": images,
            "subtree_probability": totals(probability) / images,
            "inside": totals(inside[of_pair]).astype(int),
            "distance": far / images,
            "miss_distance": far / totals(steps > 0),
            "least_distance": [
                min(up + down[top] for top, up in taxonomy.above(wnid).items() if top in down)
                for wnid in wnids
            ],
        }
    # NaN, which is not known, becomes None.
    arrays = {name: pa.array(one, from_pandas=True) for name, one in columns.items()}
    return [*pa.table(arrays).to_pylist()]


def summarise_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Sum up the synsets whose subtree is their own, and those with a hypernym's."""
    return {
        "own": _summary([row for row in scores if not row["scope_steps"]]),
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
    found = {name: None if np.isnan(value) else float(value) for name, value in means.items()}
    ends = intervals(columns, statistics)
    return {
        "synsets": len(rows),
        "images": int(columns["images"].sum()),
        **found,
        "chance": float(np.mean([row["chance"] for row in rows])),
        "least_distance": float(np.mean([row["least_distance"] for row in rows])),
        "intervals": {name: ends[name] if found[name] is not None else None for name in found},
    }
