"""Evaluations side by side: the same classes under several conditions, paired with the first.

`open_sides` opens the evaluations that a user names, `compare_evaluations` makes the
record, and `write_comparison` the page, tables and figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sdwn import __version__
from sdwn.errors import UsageError
from sdwn.evaluation.metrics import measure, metrics_shown, percentiles, resampled_means
from sdwn.evaluation.record import evaluations, open_evaluation
from sdwn.io import Format, csv_text, now, write_text
from sdwn.measures.record import MEASURES, all_records
from sdwn.paths import ComparisonPaths, ReleasePaths
from sdwn.planning.plan import flat_settings
from sdwn.prediction.table import find_by_key, settings_of
from sdwn.releases.release import Release
from sdwn.reports.figures import Drawn, side_colour, write_comparison_figures
from sdwn.reports.page import Album, render
from sdwn.reports.paper import write_comparison_files
from sdwn.storage.columns import numbers
from sdwn.wordnet.imagenet import class_name

FORMAT = Format("sdwn-comparison", 2, "compare the releases again")
# A class whose adjusted p is at most this is said to differ.
LEVEL = 0.05
SEED = 0
RESAMPLES = 9_999
# From so many pairs on, the mean of randomly flipped signs is normal for all that p tells.
MANY = 5_000
# Of a difference, beyond which there is only rounding.
DIGITS = 12
# Numbers drawn at once, so that memory does not grow with the number of pairs.
DRAWN = 4_000_000
# What identifies a classifier; the rest of its record says where and with what it ran.
CLASSIFIER = ("model", "checkpoint_sha256", "weights", "input_size", "crop_pct", "interpolation")
GALLERY_CLASSES, GALLERY_IMAGES = 8, 10
# What is compared over classes or synsets: the label, and the key in a pair's record.
PAIRED = (
    ("share of correct images, mean over classes", "rate"),
    ("the same by top-5", "rate_top5"),
    ("probability on the synset's subtree, mean over synsets", "subtree_probability"),
)
SECTIONS = {
    "figures": "Figures",
    "measures": "Measures",
    "settings": "Settings that differ",
    "gallery": "What changed most",
    "groups": "Groups",
    "classes": "Classes",
    "provenance": "Provenance",
}

Rates = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Side:
    """One evaluation of a comparison, under the name that the comparison calls it."""

    name: str
    release: Release
    record: Mapping[str, Any]
    predictions: pa.Table

    @property
    def classifier(self) -> dict[str, Any]:
        """The fields of its classifier's record that identify it."""
        return {key: self.record["classifier"].get(key) for key in CLASSIFIER}


def open_sides(arguments: Sequence[str], evaluation: str | None = None) -> list[Side]:
    """Open what is to be compared.

    Args:
        arguments: releases, or folders of evaluations in them, each with a name of its own
            where wanted: ``guided=RELEASE``, ``vit=RELEASE/evaluations/NAME``.
        evaluation: which of a release's evaluations; by default the latest of the first
            release that all of them have.
    """
    named = list[tuple[str, Release, str | None]]()
    for argument in arguments:
        name, equals, path = argument.partition("=")
        # A folder's own name may hold the sign.
        if not equals or not name or Path(argument).exists():
            name, path = "", argument
        release, own, folder = Path(path), None, Path(path).resolve()
        if folder.parent.name == "evaluations":
            release, own, folder = folder.parents[1], folder.name, folder.parents[1]
        if not name:
            name = ReleasePaths(folder).name
            name += f" by {own}" if own else ""
        name += f" ({len(named) + 1})" if name in [other for other, *_ in named] else ""
        named.append((name, Release(release), own))
    each = [(release, evaluations(release.paths)) for _, release, own in named if not own]
    if each and evaluation is None:
        common = set.intersection(*(set(found) for _, found in each))
        if not common:
            had = "; ".join(f"{release}: {', '.join(found) or 'none'}" for release, found in each)
            raise UsageError(
                f"no evaluation that all of them have ({had}); evaluate them by the same model, "
                "with: sdwn evaluate RELEASE --model MODEL"
            )
        evaluation = max(common, key=lambda name: each[0][1][name])
    return [
        Side(name, *open_evaluation(release, own or evaluation)[1:]) for name, release, own in named
    ]


# --- The record --------------------------------------------------------------------------------
def compare_evaluations(sides: Sequence[Side]) -> dict[str, Any]:
    """Compare each evaluation with the first, over the classes that all of them have."""
    if len(sides) < 2:
        raise UsageError("nothing to compare: give two releases or evaluations, or more")
    first, *others = sides
    for side in others:
        same_images = side.release.digest == first.release.digest
        if side.classifier != first.classifier and not same_images:
            one, other = first.classifier["model"], side.classifier["model"]
            raise UsageError(
                f"{first.name} was classified by {one} and {side.name} by {other}: other images "
                "and another classifier cannot be compared; evaluate both by the same model"
                + ("" if one != other else " and weights")
            )
        if same_images and side.classifier == first.classifier:
            raise UsageError(
                f"{first.name} and {side.name} are the same images classified by the same model"
            )
    rows = [{row["wnid"]: row for row in side.record["classes"]} for side in sides]
    wnids = sorted(set.intersection(*map(set, rows)))
    if not wnids:
        names = " and ".join(side.name for side in sides)
        raise UsageError(f"{names} have no class in common")
    # Each (sides, classes).
    images, correct, correct_top5 = (
        np.array([[of_side[wnid][column] for wnid in wnids] for of_side in rows], dtype=np.int64)
        for column in ("images", "correct", "correct_top5")
    )
    rates, rates_top5 = correct / images, correct_top5 / images
    p_values = [
        rates_differ(correct[0], images[0], correct[index], images[index])
        for index in range(1, len(sides))
    ]
    in_common, pairs = pa.array(wnids, pa.string()), []
    for index, (other, p_value) in enumerate(zip(others, p_values, strict=True), start=1):
        differ, change = p_value <= LEVEL, rates[index] - rates[0]
        pairs.append(
            {
                "first": first.name,
                "second": other.name,
                "rates": [float(rates[side].mean()) for side in (0, index)],
                "rate": difference(rates[0], rates[index]),
                "rate_top5": difference(rates_top5[0], rates_top5[index]),
                "subtree_probability": _subtree_difference(first, other),
                "same_images": _image_difference(first, other),
                "classes_better": int((differ & (change > 0)).sum()),
                "classes_worse": int((differ & (change < 0)).sum()),
                "groups": _group_records(first, wnids, rates[0], rates[index]),
            }
        )
    return {
        **FORMAT.head(),
        "created": now(),
        "sdwn": __version__,
        "sides": [
            {
                "name": side.name,
                "release": side.release.digest,
                "catalog": side.release.manifest.name,
                "images": side.release.manifest.images,
                "synthetic": side.release.manifest.settings is not None,
                "classes_left_out": len(side.record["classes"]) - len(wnids),
                "classifier": side.record["classifier"],
                # Over the classes in common alone.
                "figures": measure(
                    side.predictions.filter(pc.is_in(side.predictions["wnid"], in_common))
                )[0],
            }
            for side in sides
        ],
        "settings": differing_settings([side.release.manifest.settings for side in sides]),
        "classes_in_common": len(wnids),
        "measures": common_figures(sides),
        "pairs": pairs,
        "classes": [
            {
                "wnid": wnid,
                "synset": rows[0][wnid]["synset"],
                "group": rows[0][wnid].get("group"),
                "images": images[:, at].tolist(),
                "correct": correct[:, at].tolist(),
                "adjusted_p_values": [float(p_value[at]) for p_value in p_values],
            }
            for at, wnid in enumerate(wnids)
        ],
    }


def common_figures(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """List what all sides have measured by the same features and against the same reference.

    Returns:
        For each such record ``kind``, names of ``features`` and ``reference``, and ``figures``: for
        each measure the figures of the sides, in their order.
    """
    each = list[dict[Any, Mapping[str, Any]]]()
    for side in sides:
        each.append({})
        for (kind, _), record in all_records(side.release).items():
            reference = record["reference"] or {}
            same = json.dumps(settings_of(record["features"]["encoder"]))
            name = record["features"]["name"]
            each[-1][kind, name, same, reference.get("release")] = record
    found = list[dict[str, Any]]()
    for key, first in each[0].items():
        if all(key in records for records in each):
            figures = [records[key]["figures"] for records in each]
            common = [name for name in MEASURES if all(name in one for one in figures)]
            reference = (first["reference"] or {}).get("name")
            found.append({"kind": key[0], "features": key[1], "reference": reference})
            found[-1]["figures"] = {name: [one[name] for one in figures] for name in common}
    return [one for one in found if one["figures"]]


def differing_settings(settings: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """List the settings of generation that are not the same everywhere, by dotted name.

    Imported images have no settings: None stands for each of theirs.

    >>> plain, guided = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}
    >>> differing_settings([plain, None, guided])
    [{'setting': 'a.c', 'values': [2, None, 3]}]
    """
    flat = [None if one is None else dict(flat_settings(one)) for one in settings]
    known = [one for one in flat if one is not None]
    names = sorted({name for one in known for name in one})
    differ = [name for name in names if any(one.get(name) != known[0].get(name) for one in known)]
    return [
        {"setting": name, "values": [None if one is None else one.get(name) for one in flat]}
        for name in differ
    ]


def _subtree_difference(first: Side, other: Side) -> dict[str, Any] | None:
    """Compare all synsets that both have images of, ImageNet classes or not.

    None for classifiers with other lists of classes: a synset's subtree is not the same for
    them, nor its share by chance.
    """
    if first.record["classifier"].get("classes") != other.record["classifier"].get("classes"):
        return None
    both = list[dict[str, float]]()
    for side in (first, other):
        known = side.predictions.filter(pc.field("subtree_probability").is_valid())
        means = known.group_by("wnid").aggregate([("subtree_probability", "mean")])
        columns = (means[name].to_pylist() for name in ("wnid", "subtree_probability_mean"))
        both.append(dict(zip(*columns, strict=True)))
    wnids = sorted(both[0].keys() & both[1].keys())
    return difference(*([means[wnid] for wnid in wnids] for means in both)) if wnids else None


def _image_difference(first: Side, other: Side) -> dict[str, float] | None:
    """Compare two classifiers image by image; None where the images are not the same."""
    if first.release.digest != other.release.digest:
        return None
    labelled = first.predictions.filter(pc.field("label_rank").is_valid())
    rows = find_by_key(labelled, other.predictions, ("id", "number"))
    before, after = (numbers(one["label_rank"], -1) for one in (labelled, other.predictions))
    return images_differ(before[rows >= 0] == 0, after[rows[rows >= 0]] == 0)


def _group_records(
    first: Side, wnids: Sequence[str], before: Rates, after: Rates
) -> list[dict[str, Any]]:
    """Compare within each group of the first evaluation; p is adjusted over the groups."""
    rows = list[dict[str, Any]]()
    for group in first.record["groups"]:
        below = [first.release.taxonomy.is_below(wnid, group["wnid"]) for wnid in wnids]
        inside = np.array(below)
        row = {"name": group["name"], "wnid": group["wnid"], "classes": int(inside.sum())}
        rows.append({**row, "rates": [None, None]})
        if inside.any():
            values = before[inside], after[inside]
            rows[-1]["rates"] = [float(rate.mean()) for rate in values]
            rows[-1] |= difference(*values)
    adjusted = holm([row.get("p_value") for row in rows])
    return [{**row, "adjusted_p_value": p} for row, p in zip(rows, adjusted, strict=True)]


# --- Statistics of paired differences: of the same classes under two conditions ----------------
def difference(first: ArrayLike, second: ArrayLike) -> dict[str, Any]:
    """Compare paired values, such as the rates of the same classes in two releases.

    Returns:
        ``mean``, of second minus first; ``interval``, its 95 % bootstrap interval over pairs;
        ``p_value``, two-sided: how often the mean would be as far from 0 if each pair's order
        were chance (a permutation test by flipped signs; with 5,000 pairs or more the t test,
        which agrees there). Both are None of a single pair. ``pairs``, and of them how many are
        ``better``, ``worse`` and ``equal``.

    Raises:
        ValueError: there are no pairs, or not as many of one as of the other.

    >>> found = difference([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    >>> round(found["mean"], 3), found["better"], found["p_value"]  # 2 of the 64 ways to flip signs
    (0.1, 6, 0.03125)
    """
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if not before.size or before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"expected pairs, found values of shape {before.shape} and {after.shape}")
    # Rates are fractions of few images: rounding must not make equal ones differ.
    change = (after - before).round(DIGITS)
    several = len(change) > 1
    return {
        "pairs": len(change),
        "mean": float(change.mean()),
        "interval": percentiles(resampled_means(change[:, None])[:, 0]) if several else None,
        "p_value": _p_value(change) if several else None,
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
        "equal": int((change == 0).sum()),
    }


def _p_value(change: NDArray[np.float64]) -> float:
    # Equal pairs have no sign to flip; without them few enough are left to try all ways more often.
    moved = change[change != 0]
    if len(moved) < 2:
        return 1.0
    if len(moved) >= MANY:
        return float(stats.ttest_1samp(change, 0).pvalue)
    found = stats.permutation_test(
        (moved,),
        # 0.1 + 0.3 - 0.4 is not 0, and what is as far from 0 would not be counted as such.
        lambda values, axis: values.sum(axis=axis).round(DIGITS),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN // len(moved)),
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values for multiple tests, by Holm's method; None stays None.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        found[index] = least
    return found


def rates_differ(
    correct: NDArray[np.int64],
    images: NDArray[np.int64],
    other_correct: NDArray[np.int64],
    other_images: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Test each class by itself: p of Fisher's exact test, adjusted over all classes.

    The adjustment is Benjamini and Hochberg's: of the classes at 0.05 and below, one in twenty
    is expected to be chance.
    """
    fisher = cache(lambda table: stats.fisher_exact(np.reshape(table, (2, 2))).pvalue)
    tables = np.stack([correct, images - correct, other_correct, other_images - other_correct], 1)
    p_values = np.array([fisher(tuple(table)) for table in tables.tolist()], dtype=float)
    adjusted: NDArray[np.float64] = stats.false_discovery_control(p_values)
    return adjusted


def images_differ(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, float]:
    """Test two classifiers on the same images, by McNemar's exact test.

    Returns ``p_value``, and on how many images ``only_first`` or ``only_second`` is correct.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    apart = only_first + only_second
    p_value = float(stats.binomtest(only_second, apart).pvalue) if apart else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


# --- In words ----------------------------------------------------------------------------------
def pair_in_words(pair: Mapping[str, Any]) -> tuple[str, str]:
    """Return which side of a pair is better; and by how much, and how certain that is.

    >>> rate = {"mean": 0.1, "interval": (0.05, 0.15), "p_value": 0.0002, "pairs": 9}
    >>> pair = {"first": "plain", "second": "guided", "rate": rate, "rates": (0.4, 0.5)}
    >>> for text in pair_in_words(pair):  # doctest: +ELLIPSIS
    ...     print(text)
    guided is better than plain
    on average 50.0 % of a class's images are correct instead of 40.0 %, +10.0 percentage points...
    """
    rate, first, second = pair["rate"], pair["first"], pair["second"]
    before, after = (f"{100 * share:.1f} %" for share in pair["rates"])
    figures = (
        f"on average {after} of a class's images are correct instead of {before}, "
        f"{points(rate['mean'])} percentage points"
    )
    if rate["interval"] is None:
        return f"{second} and {first} have one class in common", f"{figures}; no statistics"
    low, high = map(points, rate["interval"])
    chance = f"p = {rate['p_value']:.3f}" if rate["p_value"] >= 0.001 else "p < 0.001"
    ends = f"(95 % interval {low} to {high}, {chance})"
    if rate["p_value"] > LEVEL:
        return f"{second} and {first} do not clearly differ", f"{figures}; maybe by chance {ends}"
    how = "better" if rate["mean"] > 0 else "worse"
    return f"{second} is {how} than {first}", f"{figures}; not by chance {ends}"


def points(share: float) -> str:
    """Write a difference of shares in percentage points.

    >>> points(0.1), points(-0.0001)
    ('+10.0', '+0.0')
    """
    # What is rounded to nothing has no sign.
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def setting_words(name: str) -> str:
    """Return a setting's dotted name in words.

    >>> setting_words("generation.guidance_scale"), setting_words("model.name")
    ('guidance scale', 'model name')
    """
    return name.removeprefix("generation.").replace(".", " ").replace("_", " ")


# --- Page, tables, figures ---------------------------------------------------------------------
def write_comparison(
    comparison: Mapping[str, Any], sides: Sequence[Side], paths: ComparisonPaths
) -> None:
    """Write a comparison's record, tables, figures and page."""
    names = [side["name"] for side in comparison["sides"]]
    head = ["wnid", "synset", "group"]
    head += [f"{what} {name}" for what in ("images", "correct") for name in names]
    head += [f"adjusted p {name}" for name in names[1:]]
    rows = (
        [row["wnid"], row["synset"], row["group"], *row["images"], *row["correct"]]
        + row["adjusted_p_values"]
        for row in comparison["classes"]
    )
    write_text(paths.table("classes"), csv_text(head, rows))
    columns = "name wnid classes mean p_value adjusted_p_value".split()
    ends = ("rate_first", "rate_second", "low", "high")
    groups = (
        (
            *(pair["first"], pair["second"], *map(row.get, columns)),
            *(*row["rates"], *(row.get("interval") or (None, None))),
        )
        for pair in comparison["pairs"]
        for row in pair["groups"]
    )
    write_text(paths.table("groups"), csv_text(("first", "second", *columns, *ends), groups))
    drawn = write_comparison_figures(comparison, paths)
    write_comparison_files(comparison, {side.name: side.release for side in sides}, paths)
    write_text(paths.page, _comparison_page(comparison, sides, drawn))
    # Last, for it is what says that the others are there.
    write_text(paths.comparison, json.dumps(comparison, indent=2) + "\n")


def _comparison_page(comparison: Mapping[str, Any], sides: Sequence[Side], drawn: Drawn) -> str:
    # With the change of the last side; the most improved class first.
    classes = [
        {
            **row,
            "name": class_name(row["wnid"]),
            "rates": [c / n for c, n in zip(row["correct"], row["images"], strict=True)],
        }
        for row in comparison["classes"]
    ]
    classes.sort(key=lambda row: (row["rates"][0] - row["rates"][-1], row["name"]))
    galleries = {
        "better": [row for row in classes if row["rates"][-1] > row["rates"][0]],
        "worse": [row for row in classes[::-1] if row["rates"][-1] < row["rates"][0]],
    }
    shown = [row["wnid"] for rows in galleries.values() for row in rows[:GALLERY_CLASSES]]
    albums = [Album(side.release, shown, side.predictions) for side in sides]
    sections = {"cells": "Cells"} | SECTIONS if "sweep" in comparison else dict(SECTIONS)
    for name in ("settings", "measures"):
        if not comparison[name]:
            del sections[name]
    if "groups" not in drawn:
        del sections["groups"]
    notices: dict[str, list[str]] = {}
    for side in sides:
        if side.release.manifest.notice:
            notices.setdefault(side.release.manifest.notice, []).append(side.name)
    return render(
        "comparison.html",
        {
            "sections": sections,
            "comparison": comparison,
            "drawn": drawn,
            "sides": [
                {**side, "colour": side_colour(index)}
                for index, side in enumerate(comparison["sides"])
            ],
            "own": "class_names" in comparison["sides"][0]["classifier"],
            "models": dict.fromkeys(side["classifier"]["model"] for side in comparison["sides"]),
            "verdicts": [pair_in_words(pair) for pair in comparison["pairs"]],
            "metrics": metrics_shown("comparison"),
            "paired": PAIRED,
            "all_measures": MEASURES,
            "level": LEVEL,
            "points": points,
            "setting_words": setting_words,
            "notices": notices,
            "classes": classes,
            "galleries": {
                f"Classes {how} in {sides[-1].name} than in {sides[0].name}": [
                    {
                        **row,
                        "sides": [
                            {
                                "prompt": album.prompt(row["wnid"]),
                                "gallery": album.gallery(row["wnid"], GALLERY_IMAGES),
                            }
                            for album in albums
                        ],
                    }
                    for row in rows[:GALLERY_CLASSES]
                ]
                for how, rows in galleries.items()
                if rows
            },
        },
        ("tables.js",),
    )
