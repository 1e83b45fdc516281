"""The comparison of a sweep's cells: a table, curves over a numeric setting, images of equal seeds.

`open_cell_results` opens what each cell has, `compare_cells` makes the record, and
`write_sweep_comparison` the page, table and figures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdwn import __version__
from sdwn.errors import IntegrityError, SdwnError, UsageError, counted
from sdwn.evaluation.metrics import metrics_shown
from sdwn.evaluation.record import evaluations
from sdwn.io import Format, csv_text, now, write_text
from sdwn.jobs.task import read_record
from sdwn.paths import TASK_NAME, ComparisonPaths, RunPaths
from sdwn.planning.plan import Plan, image_settings, read_plan
from sdwn.releases.release import Release
from sdwn.reports.comparison import (
    LEVEL,
    Side,
    difference,
    differing_settings,
    holm,
    points,
    setting_words,
)
from sdwn.reports.figures import write_sweep_figures
from sdwn.reports.page import Album, render
from sdwn.reports.report import open_evaluation
from sdwn.wordnet.imagenet import class_name

FORMAT = Format("sdwn-sweep-comparison", 1, "compare the sweep again")
# Of these classes, spread evenly from the best recognised to the worst, each so many images.
CLASSES_SHOWN, IMAGES_SHOWN = 8, 2
# What is measured of each cell, in percent, with its heading; the last two are probabilities.
MEASURES = {
    "top1_percent": "top-1, %",
    "top5_percent": "top-5, %",
    "own": "own subtree, %",
    "nearest": "nearest subtree, %",
}
SECTIONS = {"figures": "Figures", "curves": "Curves", "images": "Images", "cells": "Cells"}


@dataclass(frozen=True, eq=False)
class CellResult:
    """A cell: its plan, its evaluation, or what it lacks to have one; and a process's images/s."""

    name: str
    plan: Plan
    side: Side | None
    lacks: str
    speed: float | None


# --- What each cell has --------------------------------------------------------------------------
def open_cell_results(
    cells: Mapping[str, RunPaths], evaluation: str | None = None
) -> list[CellResult]:
    """Open each cell's evaluation of a name; by default the one that most cells have."""
    releases = {
        name: Release(paths.release)
        for name, paths in cells.items()
        if (paths.release / "manifest.json").exists()
    }
    had = {name: evaluations(release.paths) for name, release in releases.items()}
    if evaluation is None:
        counts = Counter(one for found in had.values() for one in found)
        if not counts:
            raise SdwnError("no cell is evaluated yet; evaluate the sweep first")
        evaluation = counts.most_common(1)[0][0]
    found = list[CellResult]()
    for name, paths in cells.items():
        plan, side, lacks = read_plan(paths), None, ""
        if evaluation in had.get(name, {}):
            side = Side(name, releases[name], *open_evaluation(releases[name], evaluation)[1:])
        elif name in releases:
            lacks = f"not evaluated by {evaluation}"
        else:
            done, shards = len(plan.done(paths)), counted(len(plan.assigned_shards), "shard")
            lacks = f"not merged; {done:,} of {shards} made"
        found.append(CellResult(name, plan, side, lacks, _images_per_second(paths)))
    if len({json.dumps(cell.side.classifier) for cell in found if cell.side}) > 1:
        raise UsageError("the cells were not classified by the same model and weights")
    return found


def _images_per_second(paths: RunPaths) -> float | None:
    """Return how many images one process of a run made a second, while it sampled."""
    images, seconds = 0, 0.0
    for name in filter(TASK_NAME.fullmatch, paths.task_names()):
        try:
            record = read_record(paths.tasks / name)
        except IntegrityError:
            continue  # of another version
        images, seconds = images + record.images, seconds + record.seconds
    return images / seconds if seconds else None


# --- The record ----------------------------------------------------------------------------------
def compare_cells(results: Sequence[CellResult]) -> dict[str, Any]:
    """Measure each cell, and compare it with the best over the classes that all of them have."""
    settings = differing_settings([image_settings(cell.plan.config) for cell in results])
    rows = list[dict[str, Any]]()
    for at, cell in enumerate(results):
        row: dict[str, Any] = {
            "name": cell.name,
            "settings": {one["setting"]: one["values"][at] for one in settings},
            "lacks": cell.lacks or None,
            "images": cell.side.release.manifest.images if cell.side else None,
            "classes": cell.side.record["figures"]["classes"] if cell.side else None,
            "images_per_second": cell.speed,
            "measures": _measures(cell.side) if cell.side else {},
            "difference": None,
        }
        rows.append(row)
    sides = [cell.side for cell in results if cell.side]
    measured = [row for row in rows if "top1_percent" in row["measures"]]
    best = max(measured, key=lambda row: row["measures"]["top1_percent"]["value"], default=None)
    if best is not None:
        rates = {
            side.name: {
                row["wnid"]: row["correct"] / row["images"] for row in side.record["classes"]
            }
            for side in sides
        }
        common = sorted(set.intersection(*(set(rates[row["name"]]) for row in measured)))
        others = [row for row in measured if row is not best] if common else []
        for row in others:
            both = [[rates[name][wnid] for wnid in common] for name in (best["name"], row["name"])]
            row["difference"] = difference(*both)
        adjusted = holm([row["difference"]["p_value"] for row in others])
        for row, p_value in zip(others, adjusted, strict=True):
            row["difference"]["adjusted_p_value"] = p_value
    return {
        **FORMAT.head(),
        "created": now(),
        "sdwn": __version__,
        "classifier": sides[0].record["classifier"],
        "seed": results[0].plan.config.seed,
        "settings": [one["setting"] for one in settings],
        "measures": {
            key: heading
            for key, heading in MEASURES.items()
            if any(key in row["measures"] for row in rows)
        },
        "best": best and best["name"],
        "cells": rows,
    }


def _measures(side: Side) -> dict[str, dict[str, Any]]:
    """Return the measures that an evaluation has, each with its bootstrap interval."""
    figures, found = side.record["figures"], dict[str, dict[str, Any]]()
    for metric in metrics_shown("browser"):
        if figures[metric.name] is not None:
            ends = figures["intervals"][metric.name]
            found[metric.name] = {"value": figures[metric.name], "interval": ends}
    for kind, scores in side.record["wordnet"].items():
        if scores is not None and scores["subtree_probability"] is not None:
            low_high = scores["intervals"]["subtree_probability"]
            found[kind] = {
                "value": 100 * scores["subtree_probability"],
                "interval": low_high and [100 * end for end in low_high],
            }
    return found


def best_in_words(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """Return which cell is best, and how certain that is."""
    rows = {row["name"]: row for row in comparison["cells"]}
    if comparison["best"] is None:
        return "No cell has images of ImageNet-1k classes", "the cells are not ranked"
    best = rows.pop(comparison["best"])["measures"]["top1_percent"]
    others = {name: row for name, row in rows.items() if row["difference"]}
    headline = f"{comparison['best']} has most images correct: {best['value']:.1f} %"
    if not others or best["interval"] is None:
        return headline, "there is nothing to compare it with, or one class only: no statistics"
    low, high = best["interval"]
    ends = {name: row["measures"]["top1_percent"]["interval"] for name, row in others.items()}
    overlap = [name for name, (least, most) in ends.items() if least <= high and low <= most]
    as_good = [
        name for name, row in others.items() if row["difference"]["adjusted_p_value"] > LEVEL
    ]
    detail = f"its 95 % interval, {low:.1f} to {high:.1f} %, overlaps with "
    detail += f"that of {', '.join(overlap)}" if overlap else "no other cell's"
    pairs = "; compared class by class, which is more exact, "
    if as_good:
        pairs += f"it is not clearly better than {', '.join(as_good)}"
    else:
        pairs += "it is better than each of them"
    return headline, f"{detail}{pairs} (p at {LEVEL}, adjusted by Holm's method)"


# --- Page, table, figures ------------------------------------------------------------------------
def write_sweep_comparison(
    comparison: Mapping[str, Any], results: Sequence[CellResult], paths: ComparisonPaths
) -> None:
    """Write a sweep's comparison: its record, table, figures and page."""
    settings, measures = comparison["settings"], comparison["measures"]
    head = ["cell", *settings, "images", "classes", "images_per_second"]
    head += [f"{key}{end}" for key in measures for end in ("", "_low", "_high")]
    head += ["difference", "difference_low", "difference_high", "adjusted_p_value", "lacks"]
    table = []
    for row in comparison["cells"]:
        cells = [row["name"], *map(row["settings"].get, settings)]
        cells += [row["images"], row["classes"], row["images_per_second"]]
        for key in measures:
            found = row["measures"].get(key, {})
            cells += [found.get("value"), *(found.get("interval") or (None, None))]
        apart = row["difference"] or {}
        cells += [apart.get("mean"), *(apart.get("interval") or (None, None))]
        table.append([*cells, apart.get("adjusted_p_value"), row["lacks"]])
    write_text(paths.cells, csv_text(head, table))
    drawn = write_sweep_figures(comparison, paths)
    sides = [cell.side for cell in results if cell.side]
    classes = _classes_shown(sides, comparison["best"])
    albums = [Album(side.release, classes, side.predictions) for side in sides]
    sections = {name: title for name, title in SECTIONS.items() if name != "curves" or drawn}
    page = {
        "sections": sections,
        "comparison": comparison,
        "words": best_in_words(comparison),
        "drawn": drawn,
        "points": points,
        "setting_words": setting_words,
        "notices": {side.release.manifest.notice for side in sides} - {None},
        "sides": sides,
        "images": {
            class_name(wnid): [album.gallery(wnid, IMAGES_SHOWN) for album in albums]
            for wnid in classes
        },
    }
    write_text(paths.page, render("sweep.html", page, ("tables.js",)))
    # Last, for it is what says that the others are there.
    write_text(paths.comparison, json.dumps(comparison, indent=2) + "\n")


def _classes_shown(sides: Sequence[Side], best: str | None) -> list[str]:
    """Return classes that all have, from those that the best cell has most correct to the least."""
    common = set.intersection(*({row["wnid"] for row in side.record["classes"]} for side in sides))
    rows: Any = next((side.record["classes"] for side in sides if side.name == best), [])
    ranked = sorted(
        (row for row in rows if row["wnid"] in common),
        key=lambda row: (-row["correct"] / row["images"], row["wnid"]),
    )
    chosen = np.linspace(0, len(ranked) - 1, min(CLASSES_SHOWN, len(ranked))).astype(int)
    return [ranked[at]["wnid"] for at in chosen]
