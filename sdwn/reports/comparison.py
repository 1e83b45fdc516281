"""Evaluations side by side: the same classes under several conditions, paired with the first.

`open_sides` opens the evaluations that a user names, `compare_evaluations` makes the
record, and `write_comparison` the page, tables and figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn import __version__
from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.groups import is_line
from sdwn.evaluation.metrics import measure, metrics_shown
from sdwn.evaluation.record import evaluations, read_evaluation
from sdwn.evaluation.verify import prediction_problems
from sdwn.io import Format, csv_text, now, write_text
from sdwn.paths import ComparisonPaths
from sdwn.planning.plan import flat_settings
from sdwn.prediction.table import read_predictions
from sdwn.releases.release import Release
from sdwn.reports.chart_data import side_bars
from sdwn.reports.charts import comparison_charts
from sdwn.reports.figures import write_comparison_figures
from sdwn.reports.images import Album
from sdwn.reports.page import render
from sdwn.reports.statistics import Difference, difference, holm, images_differ, rates_differ

FORMAT = Format("sdwn-comparison", 1, "compare the releases again")
# A class whose adjusted p is at most this is said to differ.
LEVEL = 0.05
# What identifies a classifier; the rest of its record says where and with what it ran.
CLASSIFIER = ("model", "checkpoint_sha256", "weights", "input_size", "crop_pct", "interpolation")
GALLERY_CLASSES, GALLERY_IMAGES = 8, 10
# What is compared over classes or synsets: the label, and the key in a pair's record.
MEASURES = (
    ("share of correct images, mean over classes", "rate"),
    ("the same by top-5", "rate_top5"),
    ("probability on the synset's subtree, mean over synsets", "subtree_probability"),
)

Counts = NDArray[np.int64]


# --- What is compared --------------------------------------------------------------------------


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

    @cached_property
    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Images, and those correct by top-1 and top-5, of each ImageNet class by wnid."""
        return {
            row["wnid"]: (row["images"], row["correct"], row["correct_top5"])
            for row in self.record["classes"]
        }

    def counts_of(self, wnids: Sequence[str]) -> tuple[Counts, Counts, Counts]:
        """Return images, correct by top-1 and by top-5, in the order of these classes."""
        rows = np.array([self.counts[wnid] for wnid in wnids], dtype=np.int64)
        return rows[:, 0], rows[:, 1], rows[:, 2]

    @cached_property
    def subtree_probability(self) -> dict[str, float]:
        """The mean probability inside each synset's nearest ImageNet subtree, by wnid."""
        means = self.predictions.group_by("wnid").aggregate([("subtree_probability", "mean")])
        values = means["subtree_probability_mean"].to_pylist()
        return dict(zip(means["wnid"].to_pylist(), values, strict=True))


def open_sides(arguments: Sequence[str], evaluation: str | None = None) -> list[Side]:
    """Open what is to be compared.

    Args:
        arguments: releases, or folders of evaluations in them, each with a name of its own
            where wanted: ``guided=RELEASE``, ``vit=RELEASE/evaluations/NAME``.
        evaluation: which of a release's evaluations; by default the latest of the first
            release that all of them have.

    Raises:
        SdwnError: there is no such release or evaluation.
    """
    names, folders = list[str](), list[Path]()
    for argument in arguments:
        name, equals, path = argument.partition("=")
        # A folder's own name may hold the sign.
        if not equals or not name or Path(argument).exists():
            name, path = _name_of(Path(argument)), argument
        elif not is_line(name):
            raise UsageError(f"{argument!r}: expected a line of text before =, found {name!r}")
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
        folders.append(Path(path))
    evaluation = evaluation or _common_evaluation(folders)
    return [_open_side(*named, evaluation) for named in zip(names, folders, strict=True)]


def _name_of(folder: Path) -> str:
    whole = folder.resolve()
    if _is_evaluation(folder):
        return f"{_name_of(whole.parent.parent)} by {folder.name}"
    # The release of a run lies in a folder of that name in the run's.
    return whole.parent.name if whole.name == "release" else whole.name


def _is_evaluation(folder: Path) -> bool:
    return folder.resolve().parent.name == "evaluations"


def _common_evaluation(folders: Sequence[Path]) -> str | None:
    """Choose the evaluation that all releases have; None where each is named already."""
    releases = [Release(folder) for folder in folders if not _is_evaluation(folder)]
    if not releases:
        return None
    each = [evaluations(release.paths) for release in releases]
    common = set.intersection(*map(set, each))
    if not common:
        had = "; ".join(
            f"{release}: {', '.join(found) or 'none'}"
            for release, found in zip(releases, each, strict=True)
        )
        raise UsageError(
            f"no evaluation that all of them have ({had}); evaluate them by the same model, "
            "with: sdwn evaluate RELEASE --model MODEL"
        )
    return max(common, key=lambda name: each[0][name])


def _open_side(name: str, folder: Path, evaluation: str | None) -> Side:
    if _is_evaluation(folder):
        folder, evaluation = folder.resolve().parent.parent, folder.resolve().name
    release = Release(folder)
    assert evaluation is not None
    paths = release.paths.evaluation(evaluation)
    if not paths.evaluation.is_file():
        had = ", ".join(evaluations(release.paths)) or "none"
        raise UsageError(f"{release}: no evaluation {evaluation!r}; there is {had}")
    record = read_evaluation(paths)
    for problem in prediction_problems(release, paths, record):
        raise IntegrityError(problem)
    found = read_predictions(paths.predictions, release.manifest.most_rows)
    return Side(name, release, record, found.table)


# --- The record --------------------------------------------------------------------------------


def compare_evaluations(sides: Sequence[Side]) -> dict[str, Any]:
    """Compare each evaluation with the first, over the classes that all of them have.

    Raises:
        UsageError: fewer than two, other images with another classifier, or no class in common.
    """
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
    wnids = sorted(set.intersection(*(set(side.counts) for side in sides)))
    if not wnids:
        names = " and ".join(side.name for side in sides)
        raise UsageError(f"{names} have no ImageNet-1k class in common")
    return {
        **FORMAT.head(),
        "created": now(),
        "sdwn": __version__,
        "sides": [_side_record(side, wnids) for side in sides],
        "settings": differing_settings([side.release.manifest.settings for side in sides]),
        "classes_in_common": len(wnids),
        "pairs": [_pair_record(first, other, wnids) for other in others],
        "classes": _class_records(sides, wnids),
    }


def _side_record(side: Side, wnids: Sequence[str]) -> dict[str, Any]:
    manifest = side.release.manifest
    inside = pc.is_in(side.predictions["wnid"], pa.array(wnids, pa.string()))
    return {
        "name": side.name,
        "release": side.release.digest,
        "catalog": manifest.name,
        "images": manifest.images,
        "synthetic": manifest.settings is not None,
        "classes_left_out": len(side.counts) - len(wnids),
        "classifier": side.record["classifier"],
        # Over the classes in common alone.
        "figures": measure(side.predictions.filter(inside)).figures,
    }


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


def _pair_record(first: Side, other: Side, wnids: Sequence[str]) -> dict[str, Any]:
    images, correct, correct5 = first.counts_of(wnids)
    other_images, other_correct, other_correct5 = other.counts_of(wnids)
    before, after = correct / images, other_correct / other_images
    adjusted = rates_differ(correct, images, other_correct, other_images)
    return {
        "first": first.name,
        "second": other.name,
        "rate": asdict(difference(before, after)),
        "rate_top5": asdict(difference(correct5 / images, other_correct5 / other_images)),
        "subtree_probability": _subtree_difference(first, other),
        "same_images": _image_difference(first, other),
        "classes_better": int(((adjusted <= LEVEL) & (after > before)).sum()),
        "classes_worse": int(((adjusted <= LEVEL) & (after < before)).sum()),
        "groups": _group_records(first, wnids, before, after),
    }


def _subtree_difference(first: Side, other: Side) -> dict[str, Any] | None:
    """Compare all synsets that both have images of, ImageNet classes or not.

    None for classifiers with other lists of classes: a synset's subtree is not the same for
    them, nor its share by chance.
    """
    if first.record["classifier"].get("classes") != other.record["classifier"].get("classes"):
        return None
    before, after = first.subtree_probability, other.subtree_probability
    wnids = sorted(before.keys() & after.keys())
    return asdict(difference([before[wnid] for wnid in wnids], [after[wnid] for wnid in wnids]))


def _image_difference(first: Side, other: Side) -> dict[str, float] | None:
    """Compare two classifiers image by image; None where the images are not the same."""
    if first.release.digest != other.release.digest:
        return None
    columns = ["wnid", "number", "label_rank"]
    labelled = first.predictions.select(columns).filter(pc.field("label_rank").is_valid())
    both = labelled.join(
        other.predictions.select(columns),
        keys=["wnid", "number"],
        join_type="inner",
        right_suffix="_other",
    )
    ranks = (both[name].to_numpy() for name in ("label_rank", "label_rank_other"))
    one, two = (rank == 0 for rank in ranks)
    return images_differ(one, two)


def _group_records(
    first: Side, wnids: Sequence[str], before: NDArray[np.float64], after: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Compare within each group of the first evaluation; p is adjusted over the groups."""
    rows, found = list[dict[str, Any]](), list[Difference | None]()
    for group in first.record["groups"]:
        below = [first.release.taxonomy.is_below(wnid, group["wnid"]) for wnid in wnids]
        inside = np.array(below)
        values = [before[inside], after[inside]]
        rates = [float(rate.mean()) if inside.any() else None for rate in values]
        row = {"name": group["name"], "wnid": group["wnid"], "classes": int(inside.sum())}
        rows.append({**row, "rates": rates})
        found.append(difference(*values) if inside.any() else None)
    adjusted = holm([one.p_value if one else None for one in found])
    return [
        {**row, **(asdict(one) if one else {}), "adjusted_p_value": p}
        for row, one, p in zip(rows, found, adjusted, strict=True)
    ]


def _class_records(sides: Sequence[Side], wnids: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a class: images and correct ones of each side, and p against the first."""
    counts = [side.counts_of(wnids) for side in sides]
    images, correct, _ = counts[0]
    adjusted = [rates_differ(correct, images, other[1], other[0]) for other in counts[1:]]
    groups = {row["wnid"]: row.get("group") for row in sides[0].record["classes"]}
    return [
        {
            "wnid": wnid,
            "synset": sides[0].release.synsets[wnid].synset,
            "group": groups.get(wnid),
            "images": [int(count[0][row]) for count in counts],
            "correct": [int(count[1][row]) for count in counts],
            "adjusted_p_values": [float(p[row]) for p in adjusted],
        }
        for row, wnid in enumerate(wnids)
    ]


def summary_sentence(pair: Mapping[str, Any]) -> str:
    """Return a sentence on the result of a pair.

    >>> rate = {"mean": 0.1, "interval": (0.05, 0.15), "p_value": 0.0002, "pairs": 9}
    >>> summary_sentence({"first": "a", "second": "b", "rate": rate})
    'b is recognised more often than a: +10.0 percentage points (+5.0 to +15.0, p < 0.001)'
    """
    rate, first, second = pair["rate"], pair["first"], pair["second"]
    if rate["interval"] is None:
        return f"{first} and {second} have one class in common: no statistics"
    change, low, high = (points(end) for end in (rate["mean"], *rate["interval"]))
    chance = f"p = {rate['p_value']:.3f}" if rate["p_value"] >= 0.001 else "p < 0.001"
    numbers = f"{change} percentage points ({low} to {high}, {chance})"
    if rate["p_value"] > LEVEL:
        return f"{first} and {second} show no clear difference in recognition: {numbers}"
    how = "more" if rate["mean"] > 0 else "less"
    return f"{second} is recognised {how} often than {first}: {numbers}"


def points(share: float) -> str:
    """Write a difference of shares in percentage points.

    >>> points(0.1), points(-0.0001)
    ('+10.0', '+0.0')
    """
    # What is rounded to nothing has no sign.
    return f"{round(100 * share, 1) + 0.0:+.1f}"


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
    write_text(paths.classes, csv_text(head, rows))
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
    write_text(paths.groups, csv_text(("first", "second", *columns, *ends), groups))
    write_comparison_figures(comparison, paths)
    write_text(paths.page, _comparison_page(comparison, sides))
    # Last, for it is what says that the others are there.
    write_text(paths.comparison, json.dumps(comparison, indent=2) + "\n")


def _comparison_page(comparison: Mapping[str, Any], sides: Sequence[Side]) -> str:
    charts = comparison_charts(comparison)
    colours = [bars.colour for bars in side_bars(comparison)]
    return render(
        "comparison.html",
        {
            "comparison": comparison,
            "sides": [
                {**side, "colour": colour}
                for side, colour in zip(comparison["sides"], colours, strict=True)
            ],
            "models": dict.fromkeys(side["classifier"]["model"] for side in comparison["sides"]),
            "verdicts": [summary_sentence(pair) for pair in comparison["pairs"]],
            "metrics": metrics_shown("comparison"),
            "measures": MEASURES,
            "level": LEVEL,
            "points": points,
            "notices": [
                (side.name, notice) for side in sides if (notice := side.release.manifest.notice)
            ],
            "galleries": list(_galleries(comparison, sides)),
            "data": {"charts": charts, "classes": {}, "sheets": {}, "colours": {}},
        },
        scripts=("card.js", "charts.js", "tables.js"),
    )


def _galleries(
    comparison: Mapping[str, Any], sides: Sequence[Side]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the classes that differ most, of the last side from the first, with their images."""
    rows = {row["wnid"]: row for row in comparison["classes"]}
    change = {
        wnid: row["correct"][-1] / row["images"][-1] - row["correct"][0] / row["images"][0]
        for wnid, row in rows.items()
    }
    order = sorted(change, key=lambda wnid: (change[wnid], wnid))
    worse = [wnid for wnid in order if change[wnid] < 0][:GALLERY_CLASSES]
    better = [wnid for wnid in reversed(order) if change[wnid] > 0][:GALLERY_CLASSES]
    albums = [Album(side.release, [*worse, *better], side.predictions) for side in sides]
    for how, wnids in (("better", better), ("worse", worse)):
        shown = [
            {
                **rows[wnid],
                "name": albums[0].name(wnid),
                "sides": [
                    {
                        "correct": rows[wnid]["correct"][index],
                        "images": rows[wnid]["images"][index],
                        "prompt": side.release.synsets[wnid].prompt,
                        "gallery": album.gallery(wnid, GALLERY_IMAGES),
                    }
                    for index, (side, album) in enumerate(zip(sides, albums, strict=True))
                ],
            }
            for wnid in wnids
        ]
        yield f"{sides[-1].name} is {how} than {sides[0].name}", shown
