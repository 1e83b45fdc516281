"""The comparison of a sweep's cells: all of them with the best one, and a table, a row a cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.evaluation.record import evaluations
from sdwn.io import csv_text, write_text
from sdwn.jobs.task import TaskRecord, read_record
from sdwn.measures.record import MEASURES, Figure, Measure
from sdwn.paths import TASK_NAME, ComparisonPaths, ReleasePaths, RunPaths
from sdwn.reports.comparison import (
    LEVEL,
    Side,
    common_figures,
    compare_evaluations,
    holm,
    open_sides,
    write_comparison,
)

# The figures of a cell's evaluation, each with the ends of its interval.
FIGURES = {
    "top1_percent": "top-1, %",
    "top5_percent": "top-5, %",
    "own_subtree": "own subtree, %",
    "nearest_subtree": "nearest subtree, %",
}


def compare_cells(
    folders: Mapping[str, Path],
    evaluation: str | None,
    paths: ComparisonPaths,
    best_by: str | None = None,
) -> dict[str, Any]:
    """Compare a sweep's cells with the best one, and write the page, tables and figures.

    By the evaluation of this name, by default the one that most have; the best cell is that with
    the highest top-1, or the best one by a measure that all have. Returns what a comparison records
    of a sweep.
    """
    had = {name: evaluations(ReleasePaths(run / "release")) for name, run in folders.items()}
    counts = Counter(chain.from_iterable(had.values()))
    if not counts:
        sweep = next(iter(folders.values())).parent
        raise SdwnError(f"no cell is evaluated yet; run: {command('evaluate', sweep)}")
    chosen = evaluation or counts.most_common(1)[0][0]
    lacking = {n: f"not evaluated by {chosen}" for n, found in had.items() if chosen not in found}
    evaluated = [str(run / "release") for name, run in folders.items() if name not in lacking]
    sides = open_sides(evaluated, chosen)
    by = best_by or "top1_percent"
    values = {"top1_percent": [side.record["figures"]["top1_percent"] or 0 for side in sides]}
    measured = _columns(common_figures(sides))
    values |= {name: [one["value"] for one in each] for name, (_, each) in measured.items()}
    if by not in values:
        raise UsageError(f"--by {by}: all cells have only {', '.join(values)}")
    lowest = by in measured and measured[by][0].best == "low"
    order = sorted(range(len(sides)), key=lambda at: values[by][at] * (1 if lowest else -1))
    sides = [sides[at] for at in order]
    compared = compare_evaluations(sides)
    measured = _columns(compared["measures"])
    cells = [_row(side, folders[side.name], compared, at) for at, side in enumerate(sides)]
    labels, digits = dict(FIGURES), dict.fromkeys(FIGURES, 1)
    labels |= {name: measure.heading for name, (measure, _) in measured.items()}
    digits |= {name: measure.digits for name, (measure, _) in measured.items()}
    p_values = [pair["rate"]["p_value"] for pair in compared["pairs"]]
    words = _best_in_words(cells, p_values, by, labels[by], digits[by])
    found = {"words": words, "lacking": lacking, "figures": labels, "cells": cells}
    found |= {"by": by, "digits": digits}
    none = dict.fromkeys(cells[0])
    rows = [*cells, *({**none, "cell": name, "lacks": why} for name, why in lacking.items())]
    write_text(paths.table("cells"), csv_text([*cells[0]], (row.values() for row in rows)))
    write_comparison({**compared, "sweep": found}, sides, paths)
    return found


def _columns(every: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Measure, list[Figure]]]:
    """Return what all cells have measured: by column the measure, and the figures of the cells.

    A column has the measure's name, with those of features and reference where there are several.
    """
    times = Counter(name for one in every for name in one["figures"])
    return {
        " ".join(filter(None, (name, one["features"], one["reference"])))
        if times[name] > 1
        else name: (MEASURES[name], figures)
        for one in every
        for name, figures in one["figures"].items()
    }


def _row(side: Side, run: Path, compared: Mapping[str, Any], at: int) -> dict[str, Any]:
    """Return what is known of a cell, which is the side at this place, as columns of a table."""
    figures = side.record["figures"]
    found = {name: (figures[name], figures["intervals"][name]) for name in [*FIGURES][:2]}
    for kind, scores in side.record["wordnet"].items():
        if scores and scores["subtree_probability"] is not None:
            ends = scores["intervals"]["subtree_probability"]
            value = 100 * scores["subtree_probability"]
            found[f"{kind}_subtree"] = value, ends and [100 * end for end in ends]
    for name, (_, each) in _columns(compared["measures"]).items():
        found[name] = each[at]["value"], (each[at]["low"], each[at]["high"])
    row: dict[str, Any] = {"cell": side.name, "lacks": None}
    row |= {setting["setting"]: setting["values"][at] for setting in compared["settings"]}
    row |= {"images": side.release.manifest.images, "images_per_second": _speed(RunPaths(run))}
    for name in dict.fromkeys([*FIGURES, *found]):
        value, ends = found.get(name, (None, None))
        low, high = ends or (None, None)
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def _speed(paths: RunPaths) -> float | None:
    """Return how many images one process of a run made a second, while it sampled."""
    records = list[TaskRecord]()
    for name in filter(TASK_NAME.fullmatch, paths.task_names()):
        with suppress(IntegrityError):  # of another version
            records.append(read_record(paths.tasks / name))
    seconds = sum(one.seconds for one in records)
    return sum(one.images for one in records) / seconds if seconds else None


def _best_in_words(
    cells: list[dict[str, Any]], p_values: list[float | None], by: str, label: str, digits: int
) -> str:
    """Return which cell is best, whether its interval overlaps with others, and how sure it is."""
    best, *others = cells
    low, high = best[f"{by}_low"], best[f"{by}_high"]
    words = f"{best['cell']} has most images correct: {best[by]:.1f} %"
    if by != "top1_percent":
        words = f"{best['cell']} is best by {label}: {best[by]:,.{digits}f}"
    if low is None:
        return f"{words}; one class only: no statistics"
    ends = [(row["cell"], row[f"{by}_low"], row[f"{by}_high"]) for row in others]
    overlap = " and ".join(cell for cell, least, most in ends if most >= low and least <= high)
    words += (
        f" (95 % interval {low:,.{digits}f} to {high:,.{digits}f}, which overlaps with "
        f"{'that of ' * bool(overlap)}{overlap or 'no other'})"
    )
    if by != "top1_percent":
        return words
    pairs = zip(others, holm(p_values), strict=True)
    unclear = " and ".join(row["cell"] for row, p in pairs if p is None or p > LEVEL)
    return (
        f"{words}. Class by class, which is more exact, it is "
        f"{'not clearly ' * bool(unclear)}better than {unclear or 'each other one'} "
        f"(p at {LEVEL}, adjusted by Holm's method)"
    )
