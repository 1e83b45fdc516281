"""Scores of images: every column that a measure adds, and one table of all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdwn.errors import IntegrityError
from sdwn.evaluation.record import evaluations, open_evaluation
from sdwn.io import atomic, refuse_links
from sdwn.measures.record import read_records
from sdwn.prediction.table import IMAGE_KEY, SCHEMA, TOP, feature_names, find_by_key
from sdwn.releases.release import Release
from sdwn.storage.columns import read_parquet

log = logging.getLogger(__name__)

FLOAT = pa.float32()


@dataclass(frozen=True, slots=True)
class Score:
    """A score of an image: its column, its words for people, and whether more is better.

    ``made_by`` is the command that computes it; after its name comes the release, then the rest.
    """

    name: str
    label: str
    best: str | None  # high, low, or None where neither is
    made_by: str
    type: Any = FLOAT


# In the order of the table. A new one is a row here.
SCORES = {
    one.name: one
    for one in (
        Score("correct", "classified correctly", "high", "evaluate", pa.bool_()),
        Score("correct_top5", "among the five best classes", "high", "evaluate", pa.bool_()),
        Score("label_probability", "probability of its class", "high", "evaluate"),
        Score("subtree_probability", "probability of its synset or near it", "high", "evaluate"),
        Score("confidence", "probability of the best class", "high", "evaluate"),
        Score("clip_score", "CLIP score", "high", "features --model clip:MODEL"),
        Score("similarity_within", "similarity to its class's other images", "low", "measure"),
        Score(
            "nearest_real",
            "similarity to its class's nearest real image",
            None,
            "measure --reference REAL",
        ),
        Score("duplicate_group", "group of duplicates", None, "duplicates", pa.int32()),
        Score("duplicate_of_better", "a duplicate that can go", "low", "duplicates", pa.bool_()),
        Score(
            "nearest_reference",
            "similarity to the nearest reference image",
            "low",
            "duplicates --against REAL",
        ),
    )
}


def write_scores(path: Path, images: pa.Table, columns: Mapping[str, Any]) -> None:
    """Write scores of images, by name, for the rows of a release's metadata."""
    found = {name: pa.array(values, SCORES[name].type) for name, values in columns.items()}
    table = pa.table({**{name: images[name] for name in IMAGE_KEY}, **found})
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def score_table(
    release: Release, evaluation: str | None = None, predicted: bool = True
) -> pa.Table:
    """Return all scores of a release's images, or of a subset's, a row an image in their order.

    The columns are ``IMAGE_KEY`` and all of ``SCORES``, null where nothing is known. Where several
    commands computed one, the latest counts. A file that is damaged or of another release is named
    in the log and left out. Predictions are the latest evaluation's unless one is named, which must
    be whole; only ``predicted`` reads their scores (:func:`prediction_scores`) at all.
    """
    images = release.metadata.select(IMAGE_KEY)
    columns = {name: pa.nulls(len(images), one.type) for name, one in SCORES.items()}
    for table in _score_tables(release, evaluation, predicted):
        # Equal tables are the rule, and looking for each image takes a third of a second.
        rows = None
        if not table.select(IMAGE_KEY).equals(images):
            found = find_by_key(images, table, IMAGE_KEY)
            rows = pa.array(found, mask=found < 0)
        for name in SCORES.keys() & {*table.column_names}:
            columns[name] = table[name] if rows is None else table[name].take(rows)
    return pa.table({**{name: images[name] for name in IMAGE_KEY}, **columns})


def _score_tables(release: Release, evaluation: str | None, predicted: bool) -> list[pa.Table]:
    """Read each table of scores that a release has, of one command the latest last."""
    found, paths = list[pa.Table](), release.paths
    try:
        if predicted and (evaluation is not None or evaluations(paths)):
            *_, predictions = open_evaluation(release, evaluation)
            found.append(prediction_scores(predictions))
    except IntegrityError as error:
        if evaluation is not None:
            raise
        log.warning("left out: %s", error)
    files = [paths.features(name).features for name in feature_names(paths)]
    files.sort(key=lambda path: path.stat().st_mtime)
    for kind in ("measures", "duplicates"):
        files += [paths.measured(kind, name).scores for name in read_records(release, kind)]
    for path in files:
        try:
            if path.exists():
                found.append(_read_scores(release, path))
        except IntegrityError as error:
            log.warning("left out: %s", error)
    return found


def prediction_scores(predictions: pa.Table) -> pa.Table:
    """Return the scores of a table of predictions, a row an image of it."""
    best = pc.list_element(predictions["top5_probability"], 0)
    rank = predictions["label_rank"]
    derived = {"confidence": best, "correct": pc.equal(rank, 0), "correct_top5": pc.less(rank, TOP)}
    kept = (*IMAGE_KEY, "label_probability", "subtree_probability")
    return pa.table({**{name: predictions[name] for name in kept}, **derived})


def _read_scores(release: Release, path: Path) -> pa.Table:
    """Read the scores in a file of them, or of features, without the vectors."""
    refuse_links(release.paths.evaluations)
    most, names = release.manifest.most_rows, [*IMAGE_KEY, *SCORES]
    table = read_parquet(path, most, columns=names)
    kinds = {name: SCHEMA.field(name).type for name in IMAGE_KEY}
    kinds |= {name: one.type for name, one in SCORES.items() if name in table.column_names}
    if sorted(map(str, table.schema)) != sorted(map(str, pa.schema(kinds))):
        raise IntegrityError(f"{path}: damaged: no table of scores; make it again")
    # Features of an encoder that is no CLIP have the column as well.
    unknown = (name for name in ("clip_score",) if name in kinds)
    return table.drop_columns([x for x in unknown if table[x].null_count == len(table)])
