"""A release becomes predictions, and predictions an evaluation."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sdwn.config import PAPER_CATALOG, EvaluationConfig
from sdwn.errors import IntegrityError
from sdwn.evaluation import metrics
from sdwn.files import EvaluationPaths, file_sha256, now, read_json, write_text
from sdwn.release import Release

FORMAT = "sdwn-evaluation"
FORMAT_VERSION = 1

PAPER_NOTE = (
    "The paper counts 861 ImageNet classes by name; by wnid the same catalog holds 862, since "
    "Cardigan the dog (n02113186) and cardigan the jacket (n02963159) differ only in case."
)

KEYS = (
    "images",
    "classes",
    "top1_percent",
    "top5_percent",
    "mean_correct",
    "std_correct",
    "any_correct",
    "all_correct",
    "black_images",
)


def imagenet_images(release: Release) -> pa.Table:
    """Select the rows of the metadata whose synset is an ImageNet-1k class."""
    return release.metadata.filter(pc.is_valid(release.metadata["imagenet_class"]))


def read_evaluation(paths: EvaluationPaths) -> dict[str, Any]:
    """Read the figures of an evaluation.

    Raises:
        IntegrityError: the file is damaged or of a later version.
    """
    found = read_json(paths.evaluation)
    version = found.get("format"), found.get("format_version")
    figures, classes = found.get("figures"), found.get("classes")
    whole = isinstance(figures, dict) and all(key in figures for key in (*KEYS, "histogram"))
    if version != (FORMAT, FORMAT_VERSION) or not whole or not isinstance(classes, list):
        raise IntegrityError(
            f"{paths.evaluation}: damaged or not of {FORMAT} {FORMAT_VERSION}; "
            f"remove {paths.root} and evaluate again"
        )
    return found


def conclude(
    release: Release,
    paths: EvaluationPaths,
    predictions: pa.Table,
    classifier: dict[str, Any],
    chosen: EvaluationConfig,
) -> dict[str, Any]:
    """Write the figures of predictions; return them."""
    found = metrics.evaluate(
        predictions["wnid"].to_pylist(),
        predictions["number"].to_numpy(),
        predictions["status"].to_pylist(),
        predictions["label_rank"].to_numpy(),
    )
    write_text(paths.classes, _class_table(release, found))
    content = evaluation_record(release, found, classifier)
    content["selection"] = chosen.images
    content["predictions_sha256"] = file_sha256(paths.predictions)
    # Last, for it is what says that an evaluation is there.
    write_text(paths.evaluation, json.dumps(content, indent=2) + "\n")
    return content


def evaluation_record(
    release: Release, found: metrics.Evaluation, record: dict[str, Any]
) -> dict[str, Any]:
    """Describe an evaluation: figures, classes, classifier, and the paper's own if comparable."""
    figures = found.as_dict()
    per_class = figures.pop("per_class")
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": now(),
        "release": release.digest,
        "plan_digest": release.manifest.plan_digest,
        "catalog": release.manifest.name,
        "classifier": record,
        "figures": figures,
        "classes": [{**row, "synset": release.synsets[row["wnid"]].synset} for row in per_class],
    }
    if release.manifest.name == PAPER_CATALOG:
        content["paper"] = {**metrics.PAPER, "source": metrics.PAPER_SOURCE, "note": PAPER_NOTE}
    return content


def _class_table(release: Release, found: metrics.Evaluation) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["wnid", "synset", "lemmas", "images", "correct", "correct_top5", "black"])
    names = release.synsets
    for row in found.per_class:
        values = asdict(row)
        synset = names[values.pop("wnid")]
        writer.writerow([row.wnid, synset.synset, synset.lemmas, *values.values()])
    return text.getvalue()
