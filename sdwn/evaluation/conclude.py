"""Predictions become an evaluation: its record, and tables beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sdwn import __version__
from sdwn.config import PAPER_CATALOG, EvaluationConfig
from sdwn.evaluation import paper
from sdwn.evaluation.groups import Group, group_figures, read_groups, smallest_groups
from sdwn.evaluation.layout import places
from sdwn.evaluation.metrics import (
    ConfusionPair,
    Measured,
    confusion_pairs,
    measure_predictions,
)
from sdwn.evaluation.record import FORMAT, FORMAT_VERSION, digest
from sdwn.evaluation.synset_scores import SynsetScore, score, summaries
from sdwn.evaluation.tables import write_tables
from sdwn.io import file_sha256, now, write_text
from sdwn.paths import EvaluationPaths
from sdwn.releases.release import Release
from sdwn.wordnet.imagenet import CLASSES, classifier_wnids
from sdwn.wordnet.taxonomy import Taxonomy

# More of them stand in confusions.csv.
MOST_CONFUSIONS = 100


@dataclass(frozen=True)
class _Found:
    """What was found out from predictions, as the parts of the record need it."""

    taxonomy: Taxonomy
    groups: tuple[Group, ...]
    figures: Measured
    confusions: list[ConfusionPair]
    scores: list[SynsetScore]


def conclude(
    release: Release,
    paths: EvaluationPaths,
    predictions: pa.Table,
    classifier_record: dict[str, Any],
    chosen: EvaluationConfig,
) -> dict[str, Any]:
    """Turn the predictions that stand in ``paths.predictions`` into a record, and give it.

    All of it is computed and written anew: that takes seconds, and the groups may have changed.

    Raises:
        SdwnError: the file of groups is wrong.
    """
    found = _find_out(release, predictions, classifier_record, chosen)
    wnids = [row.wnid for row in found.figures.per_class]
    record = {
        **_origin(release, paths, predictions),
        "classifier": classifier_record,
        **_results(found),
        "map": places(release, wnids, chosen.embedding) if wnids else None,
    }
    if not wnids:
        record["map_missing"] = "no synset here is a class of ImageNet-1k"
    if release.manifest.name == PAPER_CATALOG:
        record["paper"] = paper.beside(found.figures.per_class, found.taxonomy)
    write_tables(paths, record, _rows(release, record, found))
    # The page reads it.
    record["synsets_sha256"] = file_sha256(paths.table("synsets"))
    record["digest"] = digest(record)
    # Last, for it is what says that an evaluation is there.
    write_text(paths.evaluation, json.dumps(record, indent=2) + "\n")
    return record


def _find_out(
    release: Release,
    predictions: pa.Table,
    classifier_record: dict[str, Any],
    chosen: EvaluationConfig,
) -> _Found:
    taxonomy = release.taxonomy
    labelled = predictions.filter(pc.is_valid(predictions["imagenet_class"]))
    return _Found(
        taxonomy=taxonomy,
        groups=read_groups(chosen.groups, taxonomy),
        figures=measure_predictions(labelled),
        confusions=confusion_pairs(labelled),
        scores=score(
            predictions, taxonomy, classifier_wnids(classifier_record.get("classes", CLASSES))
        ),
    )


def _origin(release: Release, paths: EvaluationPaths, predictions: pa.Table) -> dict[str, Any]:
    whole = predictions["imagenet_class"].null_count > 0
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": now(),
        "sdwn": __version__,
        "release": release.digest,
        "plan_digest": release.manifest.plan_digest,
        "catalog": release.manifest.name,
        "selection": "all" if whole else "imagenet",
        "images_judged": predictions.num_rows,
        "predictions_sha256": file_sha256(paths.predictions),
    }


def _results(found: _Found) -> dict[str, Any]:
    figures, classes = found.figures.figures, found.figures.per_class
    most = figures["images_per_class"]
    shown = found.confusions[:MOST_CONFUSIONS]
    return {
        "figures": figures,
        "groups": group_figures(found.groups, classes, most, found.taxonomy),
        "classes": _classes(found),
        "confusions": [_confusion(row, found.taxonomy) for row in shown],
        "wordnet": summaries(found.scores),
    }


def _classes(found: _Found) -> list[dict[str, Any]]:
    classes = found.figures.per_class
    scored = {row.wnid: row for row in found.scores}
    colours = smallest_groups(found.groups, [row.wnid for row in classes], found.taxonomy)
    return [
        {
            "wnid": row.wnid,
            "synset": found.taxonomy.name(row.wnid),
            "images": row.images,
            "correct": row.correct,
            "correct_top5": row.correct_top5,
            "black": row.black,
            "group": colours[row.wnid],
            "subtree_probability": scored[row.wnid].subtree_probability,
            "distance": scored[row.wnid].distance,
            "miss_distance": scored[row.wnid].miss_distance,
        }
        for row in classes
    ]


def _confusion(row: ConfusionPair, taxonomy: Taxonomy) -> dict[str, Any]:
    return {
        "wnid": row.wnid,
        "synset": taxonomy.name(row.wnid),
        "predicted_wnid": row.predicted_wnid,
        "predicted_synset": taxonomy.name(row.predicted_wnid),
        "times": row.times,
        "images": row.images,
    }


def _synset(row: SynsetScore, taxonomy: Taxonomy) -> dict[str, Any]:
    scope = row.scope
    return {
        "wnid": row.wnid,
        "synset": taxonomy.name(row.wnid),
        "images": row.images,
        "scope_wnid": scope.wnid,
        "scope_synset": taxonomy.name(scope.wnid),
        "scope_steps": scope.steps,
        "scope_classes": len(scope.classes),
        "chance": row.chance,
        "subtree_probability": row.subtree_probability,
        "inside": row.inside,
        "distance": row.distance,
        "miss_distance": row.miss_distance,
        "least_distance": row.least_distance,
    }


def _rows(
    release: Release, record: dict[str, Any], found: _Found
) -> dict[str, Iterator[dict[str, Any]]]:
    """Give the rows of the tables that hold more than the record."""
    names, taxonomy = release.synsets, found.taxonomy
    return {
        "classes": ({**row, "lemmas": names[row["wnid"]].lemmas} for row in record["classes"]),
        "confusions": (_confusion(row, taxonomy) for row in found.confusions),
        "synsets": (_synset(row, taxonomy) for row in found.scores),
    }
