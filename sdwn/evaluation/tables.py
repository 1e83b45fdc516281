"""An evaluation's figures as CSV files, for a spreadsheet or a paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sdwn.io import csv_text, write_text
from sdwn.paths import EvaluationPaths

CLASSES = (
    "wnid synset lemmas group images correct correct_top5 black subtree_probability distance "
    "miss_distance"
).split()
GROUPS = (
    "name wnid synset classes images mean_correct mean_correct_low mean_correct_high std_correct "
    "any_correct all_correct none_correct_classes all_correct_classes top1_percent top5_percent "
    "black_images"
).split()
CONFUSIONS = "wnid synset predicted_wnid predicted_synset times images".split()
# What was judged, and what of WordNet the classifier knows around it.
SYNSETS = (
    "wnid synset images scope_wnid scope_synset scope_steps scope_classes chance "
    "subtree_probability inside distance miss_distance least_distance"
).split()
# The first is the figure's place in evaluation.json.
FIGURES = "figure value low high without_black paper".split()

Row = Mapping[str, Any]


def write_tables(paths: EvaluationPaths, record: Row, rows: Mapping[str, Iterable[Row]]) -> None:
    """Write all tables: figures, histogram and groups of the record, the others from ``rows``."""
    heads = {"classes": CLASSES, "confusions": CONFUSIONS, "synsets": SYNSETS}
    tables = {
        "figures": csv_text(FIGURES, _figures(record)),
        "histogram": csv_text(("correct", "classes"), enumerate(record["figures"]["histogram"])),
        "groups": _text(GROUPS, map(_group, record["groups"])),
        **{name: _text(head, rows[name]) for name, head in heads.items()},
    }
    for name, text in tables.items():
        write_text(paths.table(name), text)


def _text(head: Sequence[str], rows: Iterable[Row]) -> str:
    return csv_text(head, ([row[name] for name in head] for row in rows))


def _group(row: Row) -> Row:
    low, high = row["intervals"]["mean_correct"] or (None, None)
    return {**row, "mean_correct_low": low, "mean_correct_high": high}


def _figures(record: Row) -> Iterator[Sequence[Any]]:
    figures = record["figures"]
    without, paper = figures["without_black"] or {}, record.get("paper") or {}
    for name, value, low, high in _scalars(figures):
        yield f"figures.{name}", value, low, high, without.get(name), paper.get(name)
    for status, count in figures["statuses"].items():
        yield f"figures.statuses.{status}", count, None, None, None, None
    for kind, summary in record["wordnet"].items():
        for name, value, low, high in _scalars(summary or {}):
            yield f"wordnet.{kind}.{name}", value, low, high, None, None


def _scalars(figures: Row) -> Iterator[tuple[str, Any, Any, Any]]:
    for name, value in figures.items():
        if isinstance(value, int | float):
            low, high = figures["intervals"].get(name) or (None, None)
            yield name, value, low, high
