"""The comparison of a sweep's cells: all of them with the best one, and a table, a row a cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from sdwn.errors import IntegrityError, SdwnError, command
from sdwn.evaluation.record import evaluations
from sdwn.io import csv_text, write_text
from sdwn.jobs.task import TaskRecord, read_record
from sdwn.paths import TASK_NAME, ComparisonPaths, ReleasePaths, RunPaths
from sdwn.reports.comparison import (
    LEVEL,
    Side,
    compare_evaluations,
    holm,
    open_sides,
    write_comparison,
)

# The figures of a cell, each with the ends of its interval; all are shown in percent.
FIGURES = {
    "top1_percent": "top-1",
    "top5_percent": "top-5",
    "own_subtree": "own subtree",
    "nearest_subtree": "nearest subtree",
}


def compare_cells(
    folders: Mapping[str, Path], evaluation: str | None, paths: ComparisonPaths
) -> dict[str, Any]:
    """Compare a sweep's cells with the best one, and write the page, tables and figures.

    By the evaluation of this name, by default the one that most have; returns what a comparison
    records of a sweep.
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
    sides.sort(key=lambda side: -(side.record["figures"]["top1_percent"] or 0))
    compared = compare_evaluations(sides)
    cells = [
        _row(side, folders[side.name], compared["settings"], at) for at, side in enumerate(sides)
    ]
    words = _best_in_words(cells, [pair["rate"]["p_value"] for pair in compared["pairs"]])
    found = {"words": words, "lacking": lacking, "figures": FIGURES, "cells": cells}
    none = dict.fromkeys(cells[0])
    rows = [*cells, *({**none, "cell": name, "lacks": why} for name, why in lacking.items())]
    write_text(paths.cells, csv_text([*cells[0]], (row.values() for row in rows)))
    write_comparison({**compared, "sweep": found}, sides, paths)
    return found


def _row(side: Side, run: Path, settings: list[dict[str, Any]], at: int) -> dict[str, Any]:
    """Return what is known of a cell, which is the side at this place, as columns of a table."""
    figures = side.record["figures"]
    found = {name: (figures[name], figures["intervals"][name]) for name in [*FIGURES][:2]}
    for kind, scores in side.record["wordnet"].items():
        if scores and scores["subtree_probability"] is not None:
            ends = scores["intervals"]["subtree_probability"]
            value = 100 * scores["subtree_probability"]
            found[f"{kind}_subtree"] = value, ends and [100 * end for end in ends]
    row: dict[str, Any] = {"cell": side.name, "lacks": None}
    row |= {setting["setting"]: setting["values"][at] for setting in settings}
    row |= {"images": side.release.manifest.images, "images_per_second": _speed(RunPaths(run))}
    for name in FIGURES:
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


def _best_in_words(cells: list[dict[str, Any]], p_values: list[float | None]) -> str:
    """Return which cell is best, whether its interval overlaps with others, and how sure it is."""
    best, *others = cells
    low, high = best["top1_percent_low"], best["top1_percent_high"]
    words = f"{best['cell']} has most images correct: {best['top1_percent']:.1f} %"
    if low is None:
        return f"{words}; one class only: no statistics"
    overlap = " and ".join(row["cell"] for row in others if row["top1_percent_high"] >= low)
    pairs = zip(others, holm(p_values), strict=True)
    unclear = " and ".join(row["cell"] for row, p in pairs if p is None or p > LEVEL)
    return (
        f"{words} (95 % interval {low:.1f} to {high:.1f}, which overlaps with "
        f"{'that of ' * bool(overlap)}{overlap or 'no other'}). Class by class, which is more "
        f"exact, it is {'not clearly ' * bool(unclear)}better than {unclear or 'each other one'} "
        f"(p at {LEVEL}, adjusted by Holm's method)"
    )
