"""A release becomes predictions, and predictions an evaluation."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdwn.config import PAPER_CATALOG, EvaluationConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation import metrics
from sdwn.files import Advance, EvaluationPaths, atomic, file_sha256, now, read_json, write_text
from sdwn.release import Release

FORMAT = "sdwn-evaluation"
FORMAT_VERSION = 1
BATCH = 32

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


def evaluate(
    release: Release, chosen: EvaluationConfig, advance: Advance = lambda _: None
) -> dict[str, Any]:
    """Classify the ImageNet classes of a release and write the figures; return the main ones.

    An evaluation of this release by the same model and weights is kept.

    Raises:
        SdwnError: the release holds no ImageNet class, or the model cannot be had.
    """
    images = imagenet_images(release)
    if not images.num_rows:
        raise SdwnError(
            f"{release.paths.root}: none of its synsets is an ImageNet-1k class, so there is "
            "nothing to classify; plan a catalog such as sdwn-26204 or imagenet-1k"
        )
    name = evaluation_name(chosen)
    paths = release.paths.evaluation(name)
    if _same(paths, release):
        advance(images.num_rows)
    else:
        from sdwn.evaluation.classify import (
            load_classifier,  # torch and timm: only where a model runs
        )

        classifier = load_classifier(chosen.model, chosen.checkpoint)
        predictions = pa.concat_tables(_predictions(release, images, classifier, advance))
        _write(release, paths, predictions, classifier.record)
    figures = read_evaluation(paths)["figures"]
    return {
        **{key: figures[key] for key in KEYS},
        "evaluation": name,
        "path": str(paths.evaluation),
    }


def imagenet_images(release: Release) -> pa.Table:
    """Select the rows of the metadata whose synset is an ImageNet-1k class."""
    return release.metadata.filter(pc.is_valid(release.metadata["imagenet_class"]))


def images_to_classify(release: Release) -> int:
    """Count the images of ImageNet-1k classes."""
    return int(imagenet_images(release).num_rows)


def evaluation_name(chosen: EvaluationConfig) -> str:
    """Name an evaluation's folder after the model, and the weights if they are the user's own.

    >>> evaluation_name(EvaluationConfig(model="hf_hub:timm/vit_base"))
    'hf_hub-timm-vit_base'
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", chosen.model).strip(".")
    if chosen.checkpoint is None:
        return name
    if not chosen.checkpoint.is_file():
        raise UsageError(f"{chosen.checkpoint}: no such checkpoint file")
    return f"{name}-{file_sha256(chosen.checkpoint)[:8]}"


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


def _same(paths: EvaluationPaths, release: Release) -> bool:
    if not paths.evaluation.exists():
        return False
    return bool(read_evaluation(paths).get("release") == release.digest)


def _predictions(
    release: Release, images: pa.Table, classifier: Any, advance: Advance
) -> Iterator[pa.Table]:
    for batch in images.to_batches(max_chunksize=BATCH):
        rows = batch.to_pylist()
        pictures = [release.image(row) for row in rows]
        scores = classifier.predict(pictures, [row["imagenet_class"] for row in rows])
        kept = pa.Table.from_batches([batch]).select(
            ["wnid", "synset", "number", "status", "imagenet_class"]
        )
        for name, values in _columns(scores).items():
            kept = kept.append_column(name, values)
        yield kept
        advance(len(rows))


def _columns(scores: Any) -> dict[str, pa.Array]:
    """Turn a batch's scores into Arrow columns, top-5 as lists."""
    return {
        "top5": pa.array(list(scores.top5), pa.list_(pa.int16())),
        "top5_probability": pa.array(list(scores.top5_probability), pa.list_(pa.float32())),
        "label_rank": pa.array(scores.label_rank, pa.int16()),
        "label_probability": pa.array(scores.label_probability, pa.float32()),
    }


def _write(
    release: Release, paths: EvaluationPaths, predictions: pa.Table, record: dict[str, Any]
) -> None:
    found = metrics.evaluate(
        predictions["wnid"].to_pylist(),
        predictions["number"].to_numpy(),
        predictions["status"].to_pylist(),
        predictions["label_rank"].to_numpy(),
    )
    with atomic(paths.predictions) as temporary:
        pq.write_table(predictions, temporary, compression="zstd")
    write_text(paths.classes, _class_table(release, found))
    # Last, for it is what says that an evaluation is there.
    write_text(
        paths.evaluation, json.dumps(evaluation_record(release, found, record), indent=2) + "\n"
    )


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
