"""Evaluations side by side: the same classes under several conditions, paired with the first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sdwn import __version__
from sdwn.errors import SdwnError, UsageError, command
from sdwn.evaluation.metrics import intervals, measure, metrics_shown
from sdwn.evaluation.record import as_recorded, evaluations, open_evaluation
from sdwn.io import Format, csv_text, now, write_text
from sdwn.jobs.task import read_records
from sdwn.measures.record import MEASURES, Figure, Measure, all_records, make_figure
from sdwn.paths import ComparisonPaths, EvaluationPaths, ReleasePaths, RunPaths
from sdwn.planning.plan import flat_settings
from sdwn.prediction.table import find_by_key, settings_of
from sdwn.releases.release import Release
from sdwn.reports.figures import Drawn, side_colour, write_comparison_files
from sdwn.reports.page import Album, render
from sdwn.storage.columns import numbers
from sdwn.wordnet.corpus import class_name

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
# What is compared over classes or synsets, by its key in a pair's record.
PAIRED = {
    "rate": "share of correct images, mean over classes",
    "rate_top5": "the same by top-5",
    "subtree_probability": "probability on the synset's subtree, mean over synsets",
}
SECTIONS = {
    "cells": "Cells",
    "figures": "Figures",
    "measures": "Measures",
    "settings": "Settings that differ",
    "gallery": "What changed most",
    "groups": "Groups",
    "classes": "Classes",
    "provenance": "Provenance",
}
# The figures of a sweep's cell: each one's label, where an evaluation's record has it, times what.
FIGURES = {
    "top1_percent": ("top-1", "figures", "top1_percent", 1),
    "top5_percent": ("top-5", "figures", "top5_percent", 1),
    "own_subtree": ("own subtree", "own", "subtree_probability", 100),
    "nearest_subtree": ("nearest subtree", "nearest", "subtree_probability", 100),
}

Rates = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Side:
    """One evaluation of a comparison, under the name that the comparison calls it."""

    name: str
    paths: EvaluationPaths
    release: Release
    record: Mapping[str, Any]
    predictions: pa.Table


def open_sides(arguments: Sequence[str], evaluation: str | None = None) -> list[Side]:
    """Open releases, or evaluations in them: ``guided=RELEASE``, ``RELEASE/evaluations/NAME``.

    Of a release the named ``evaluation``, by default the latest of the first that all of them have.
    """
    if len(arguments) < 2:
        raise UsageError("nothing to compare: give two releases or evaluations, or more")
    named = list[tuple[str, Release, str | None]]()
    for argument in arguments:
        name, equals, path = argument.partition("=")
        # A folder's own name may hold the sign.
        if not equals or not name or Path(argument).exists():
            name, path = "", argument
        folder, own = Path(path), None
        if folder.resolve().parent.name == "evaluations":
            folder, own = folder.resolve().parents[1], folder.resolve().name
        name = name or ReleasePaths(folder).name + (f" by {own}" if own else "")
        name += f" ({len(named) + 1})" if name in [other for other, *_ in named] else ""
        named.append((name, Release(folder), own))
    each = [(release, evaluations(release.paths)) for _, release, own in named if not own]
    if each and evaluation is None:
        common = set.intersection(*(set(found) for _, found in each))
        if not common:
            had = "; ".join(f"{one}: {', '.join(sorted(found)) or 'none'}" for one, found in each)
            raise UsageError(
                f"no evaluation that all of them have ({had}); evaluate them by the same model, "
                "with: sdwn evaluate RELEASE --model MODEL"
            )
        evaluation = next(name for name in each[0][1] if name in common)
    return [Side(name, *open_evaluation(one, own or evaluation)) for name, one, own in named]


# --- The record --------------------------------------------------------------------------------
def compare_evaluations(sides: Sequence[Side]) -> dict[str, Any]:
    """Compare each evaluation with the first, over the classes that all of them have."""
    with as_recorded(*(side.paths.evaluation for side in sides)):
        first, *others = sides
        for side in others:
            one, other = first.record["classifier"], side.record["classifier"]
            same = all(one.get(key) == other.get(key) for key in CLASSIFIER)
            if same == (side.release.digest == first.release.digest):
                raise UsageError(
                    f"{first.name} was classified by {one['model']} and {side.name} by "
                    f"{other['model']}: expected other images by the same model and weights, or "
                    "the same images by others"
                )
        rows = [{row["wnid"]: row for row in side.record["classes"]} for side in sides]
        wnids = sorted(set.intersection(*map(set, rows)))
        if not wnids:
            raise UsageError(f"{' and '.join(s.name for s in sides)} have no class in common")
        # Each (sides, classes).
        images, correct, correct_top5 = (
            np.array([[of_side[wnid][column] for wnid in wnids] for of_side in rows])
            for column in ("images", "correct", "correct_top5")
        )
        rates, rates_top5 = correct / images, correct_top5 / images
        in_common = pc.field("wnid").isin(pa.array(wnids, pa.string()))
        pairs, p_values = [], list[Rates]()
        for index, other in enumerate(others, start=1):
            p_values.append(rates_differ(correct[0], images[0], correct[index], images[index]))
            differ, change = p_values[-1] <= LEVEL, rates[index] - rates[0]
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
                    "figures": measure(side.predictions.filter(in_common))[0],
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
    """List what all sides have measured by the same features and against the same reference."""
    each = dict[Any, dict[int, Mapping[str, Any]]]()  # by what must be the same, then by side
    for at, side in enumerate(sides):
        for (kind, _), record in all_records(side.release).items():
            features, reference = record["features"], record["reference"] or {}
            same = json.dumps(settings_of(features["encoder"])), reference.get("release")
            each.setdefault((kind, features["name"], same), {})[at] = record
    found = list[dict[str, Any]]()
    for (kind, features, _), records in each.items():
        figures = [one["figures"] for one in records.values()]
        common = [name for name in MEASURES if all(name in one for one in figures)]
        if common and len(records) == len(sides):
            reference = (records[0]["reference"] or {}).get("name")
            found.append({"kind": kind, "features": features, "reference": reference})
            found[-1]["figures"] = {name: [one[name] for one in figures] for name in common}
    return found


def differing_settings(settings: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """List the settings of generation that differ, by dotted name; None for imported images."""
    flat = [None if one is None else dict(flat_settings(one)) for one in settings]
    known = [one for one in flat if one is not None]
    return [
        {"setting": name, "values": [None if one is None else one.get(name) for one in flat]}
        for name in sorted(set(chain.from_iterable(known)))
        if any(one.get(name) != known[0].get(name) for one in known)
    ]


def _subtree_difference(first: Side, other: Side) -> dict[str, Any] | None:
    """Compare all synsets of both; None for classifiers of other classes, and so other subtrees."""
    if first.record["classifier"].get("classes") != other.record["classifier"].get("classes"):
        return None
    means = list[pa.Table]()
    for side in (first, other):
        found = side.predictions.group_by("wnid").aggregate([("subtree_probability", "mean")])
        means.append(found.drop_null().rename_columns(["wnid", f"mean {len(means)}"]))
    both = means[0].join(means[1], "wnid", join_type="inner").sort_by("wnid")
    return difference(both["mean 0"], both["mean 1"]) if len(both) else None


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
        row = {"name": group["name"], "wnid": group["wnid"], "classes": sum(below)}
        row["rates"] = [None, None]
        if any(below):
            row["rates"] = [float(rate[below].mean()) for rate in (before, after)]
            row |= difference(before[below], after[below])
        rows.append(row)
    adjusted = holm([row.get("p_value") for row in rows])
    return [{**row, "adjusted_p_value": p} for row, p in zip(rows, adjusted, strict=True)]


# --- Statistics of paired differences: of the same classes under two conditions ----------------
def difference(first: ArrayLike, second: ArrayLike) -> dict[str, Any]:
    """Compare paired values, such as the rates of the same classes in two releases.

    ``mean`` is of second minus first, ``interval`` its 95 % bootstrap interval over pairs;
    ``p_value``, two-sided, how often the mean would be as far from 0 if each pair's order were
    chance (a permutation test by flipped signs; with 5,000 pairs or more the t test, which agrees
    there). Both are None of a single pair.
    """
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    # Rates are fractions of few images: rounding must not make equal ones differ.
    change = (after - before).round(DIGITS)
    return {
        "pairs": len(change),
        "mean": float(change.mean()),
        "interval": intervals({"change": change}, lambda means: means)["change"],
        "p_value": _p_value(change) if len(change) > 1 else None,
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
        "equal": int((change == 0).sum()),
    }


def _p_value(change: NDArray[np.float64]) -> float:
    # Equal pairs have no sign to flip; without them all ways can be tried more often.
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
    """Adjust p values for multiple tests, by Holm's method; None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        found[index] = least
    return found


def rates_differ(
    correct: NDArray[Any], images: NDArray[Any], others: NDArray[Any], other_images: NDArray[Any]
) -> Rates:
    """Test each class by itself: p of Fisher's exact test, adjusted by Benjamini and Hochberg."""
    tables = np.stack([correct, images - correct, others, other_images - others], axis=1)
    p_values = [stats.fisher_exact(table).pvalue for table in tables.reshape(-1, 2, 2)]
    adjusted: Rates = stats.false_discovery_control(p_values)
    return adjusted


def images_differ(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, float]:
    """Test two classifiers on the same images, where one alone is correct: McNemar's exact test."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    apart = only_first + only_second
    p_value = float(stats.binomtest(only_second, apart).pvalue) if apart else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


# --- In words ----------------------------------------------------------------------------------
def pair_in_words(pair: Mapping[str, Any]) -> tuple[str, str]:
    """Return which side of a pair is better; and by how much, and how certain that is."""
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
    """Write a difference of shares in percentage points."""
    # What is rounded to nothing has no sign.
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def setting_words(name: str) -> str:
    """Return a setting's dotted name in words."""
    return name.removeprefix("generation.").replace(".", " ").replace("_", " ")


# --- Page, tables, figures ---------------------------------------------------------------------
def write_comparison(
    comparison: Mapping[str, Any], sides: Sequence[Side], paths: ComparisonPaths
) -> None:
    """Write a comparison's record, tables, figures and page."""
    names = [side["name"] for side in comparison["sides"]]
    named = ["wnid", "synset", "group"]
    head = [*named, *(f"{what} {name}" for what in ("images", "correct") for name in names)]
    head += [f"adjusted p {name}" for name in names[1:]]
    rows = (
        [*map(row.get, named), *row["images"], *row["correct"], *row["adjusted_p_values"]]
        for row in comparison["classes"]
    )
    write_text(paths.table("classes"), csv_text(head, rows))
    columns = "name wnid classes mean p_value adjusted_p_value".split()
    head = ["first", "second", *columns, "rate_first", "rate_second", "low", "high"]
    groups = list[list[Any]]()
    for pair in comparison["pairs"]:
        for row in pair["groups"]:
            ends = row.get("interval") or (None, None)
            cells = [pair["first"], pair["second"], *map(row.get, columns), *row["rates"], *ends]
            groups.append(cells)
    write_text(paths.table("groups"), csv_text(head, groups))
    drawn = write_comparison_files(comparison, [side.release for side in sides], paths)
    write_text(paths.page, _comparison_page(comparison, sides, drawn))
    # Last, for it is what says that the others are there.
    write_text(paths.comparison, json.dumps(comparison, indent=2) + "\n")


def _comparison_page(comparison: Mapping[str, Any], sides: Sequence[Side], drawn: Drawn) -> str:
    # With the change of the last side; the most improved class first.
    classes = []
    for row in comparison["classes"]:
        rates = [c / n for c, n in zip(row["correct"], row["images"], strict=True)]
        classes.append({**row, "name": class_name(row["wnid"]), "rates": rates})
    classes.sort(key=lambda row: (row["rates"][0] - row["rates"][-1], row["name"]))
    better = [row for row in classes if row["rates"][-1] > row["rates"][0]][:GALLERY_CLASSES]
    worse = [row for row in classes[::-1] if row["rates"][-1] < row["rates"][0]][:GALLERY_CLASSES]
    shown = [row["wnid"] for row in better + worse]
    absent = {name for name in ("settings", "measures") if not comparison[name]}
    absent |= {"cells"} if "sweep" not in comparison else set()
    absent |= {"groups"} - drawn.keys()
    notices: dict[str, list[str]] = {}
    for side in sides:
        if side.release.manifest.notice:
            notices.setdefault(side.release.manifest.notice, []).append(side.name)
    return render(
        "comparison.html",
        {
            "sections": {one: title for one, title in SECTIONS.items() if one not in absent},
            "comparison": comparison,
            "drawn": drawn,
            "sides": [
                {**side, "colour": side_colour(at)} for at, side in enumerate(comparison["sides"])
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
            "albums": [Album(side.release, shown, side.predictions) for side in sides],
            "images_shown": GALLERY_IMAGES,
            "galleries": {
                f"Classes {how} in {sides[-1].name} than in {sides[0].name}": rows
                for how, rows in (("better", better), ("worse", worse))
                if rows
            },
        },
        ("tables.js",),
    )


# --- A sweep ----------------------------------------------------------------------------------
def compare_cells(
    folders: Mapping[str, Path],
    evaluation: str | None,
    paths: ComparisonPaths,
    best_by: str | None = None,
) -> dict[str, Any]:
    """Compare a sweep's cells with the best one, write all files, and return what they tell.

    The evaluation is by default the one that most have; cells are ranked by top-1 or a measure.
    """
    had = {name: evaluations(ReleasePaths(run / "release")) for name, run in folders.items()}
    counts = Counter(chain.from_iterable(had.values()))
    chosen = evaluation or max(counts, key=counts.__getitem__, default="")
    lacking = {n: f"not evaluated by {chosen}" for n, found in had.items() if chosen not in found}
    if len(lacking) == len(folders):
        by, model = (f" by {chosen}", ("--model", chosen)) if chosen else ("", ())
        advice = command("evaluate", next(iter(folders.values())).parent, *model)
        raise SdwnError(f"no cell is evaluated{by} yet; run: {advice}")
    evaluated = [str(run / "release") for name, run in folders.items() if name not in lacking]
    sides, by = open_sides(evaluated, chosen), best_by or "top1_percent"
    with as_recorded(*(side.paths.evaluation for side in sides)):
        columns = _columns(sides)
        known = [name for name, (_, figures) in columns.items() if all(figures)]
        if best_by and by not in known:
            raise UsageError(f"--by {by}: all cells have only {', '.join(known)}")
        measure, figures = columns[by]
        values = [figure["value"] if figure else 0 for figure in figures]
        order = sorted(range(len(sides)), key=values.__getitem__, reverse=measure.best != "low")
        sides = [sides[at] for at in order]
        compared = compare_evaluations(sides)
        cells = list[dict[str, Any]]()
        for at, side in enumerate(sides):
            row: dict[str, Any] = {"cell": side.name, "lacks": None}
            row |= {setting["setting"]: setting["values"][at] for setting in compared["settings"]}
            row["images"] = side.release.manifest.images
            row["images_per_second"] = _speed(RunPaths(folders[side.name]))
            for name, (_, figures) in columns.items():
                figure = figures[order[at]] or dict[str, Any]()
                row[name] = figure.get("value")
                row |= {f"{name}_{end}": figure.get(end) for end in ("low", "high")}
            cells.append(row)
        found: dict[str, Any] = {
            "lacking": lacking,
            "figures": {name: one.heading for name, (one, _) in columns.items()},
            "cells": cells,
            "by": by,
            "digits": {name: one.digits for name, (one, _) in columns.items()},
        }
        found["words"] = _best_in_words(found, compared["pairs"])
        rows = (*cells, *({"cell": name, "lacks": why} for name, why in lacking.items()))
        text = csv_text([*cells[0]], (map(row.get, cells[0]) for row in rows))
        write_text(paths.table("cells"), text)
    write_comparison({**compared, "sweep": found}, sides, paths)
    return found


def _columns(sides: Sequence[Side]) -> dict[str, tuple[Measure, list[Figure | None]]]:
    """Return by column the figures of all sides; columns of one measure name its features."""
    found, measured = dict[str, tuple[Measure, list[Figure | None]]](), common_figures(sides)
    for name, (label, part, key, scale) in FIGURES.items():
        parts = ({**side.record["wordnet"], **side.record}[part] for side in sides)
        figures = [_scaled_figure(one, key, scale) for one in parts]
        found[name] = Measure(name, label, "high", 1, "%"), figures
    times = Counter(name for one in measured for name in one["figures"])
    for one in measured:
        for name, figures in one["figures"].items():
            beside = (one["features"], one["reference"]) if times[name] > 1 else ()
            found[" ".join(filter(None, (name, *beside)))] = MEASURES[name], figures
    return found


def _scaled_figure(part: Mapping[str, Any] | None, name: str, scale: float) -> Figure | None:
    """Return a figure of a part of an evaluation's record; None where it is not known."""
    if not part or part[name] is None:
        return None
    ends = part["intervals"][name]
    return make_figure(scale * part[name], ends and [scale * end for end in ends], part["images"])


def _speed(paths: RunPaths) -> float | None:
    """Return how many images one process of a run made a second, while it sampled."""
    records = list(filter(None, read_records(paths)))
    seconds = sum(one.seconds for one in records)
    return sum(one.images for one in records) / seconds if seconds else None


def _best_in_words(sweep: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> str:
    """Return which cell is best, whether its interval overlaps with others, and how sure it is."""
    by, (best, *others) = sweep["by"], sweep["cells"]
    label, digits = sweep["figures"][by], sweep["digits"][by]
    if all(row[by] == best[by] for row in others):
        return f"all {1 + len(others)} evaluated cells are equal by {label}: {best[by]:,.{digits}f}"
    low, high = best[f"{by}_low"], best[f"{by}_high"]
    words = f"{best['cell']} has most images correct: {best[by]:.1f} %"
    if by != "top1_percent":
        words = f"{best['cell']} is best by {label}: {best[by]:,.{digits}f}"
    if low is None:
        return f"{words}; one class only: no statistics"
    ends = [(row["cell"], row[f"{by}_low"], row[f"{by}_high"]) for row in others]
    overlap = " and ".join(cell for cell, least, most in ends if most >= low and least <= high)
    whom = f"that of {overlap}" if overlap else "no other"
    words += f" (95 % interval {low:,.{digits}f} to {high:,.{digits}f}, which overlaps with {whom})"
    if by != "top1_percent":
        return words
    p_values = zip(others, holm([pair["rate"]["p_value"] for pair in compared]), strict=True)
    unclear = " and ".join(row["cell"] for row, p in p_values if p is None or p > LEVEL)
    clearly = f"not clearly better than {unclear}" if unclear else "better than each other one"
    words += f". Class by class, which is more exact, it is {clearly}"
    return f"{words} (p at {LEVEL}, adjusted by Holm's method)"
