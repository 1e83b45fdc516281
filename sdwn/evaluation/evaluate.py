"""Predictions become an evaluation: its record, and tables beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdwn import __version__
from sdwn.config import PAPER_CATALOG, EvaluationConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.evaluation import metrics, paper
from sdwn.evaluation.confusions import Confusion, confusions
from sdwn.evaluation.groups import Group, group_figures, read_groups, smallest_groups
from sdwn.evaluation.layout import places
from sdwn.evaluation.record import FORMAT, FORMAT_VERSION, read_evaluation, summary
from sdwn.evaluation.synset_scores import SynsetScore, score, summaries
from sdwn.evaluation.tables import write_tables
from sdwn.evaluation.taxonomy import Taxonomy
from sdwn.files import Advance, EvaluationPaths, atomic, file_sha256, now, write_text
from sdwn.imagenet import CLASSES, classifier_wnids
from sdwn.release import Release
from sdwn.wordnet import shared_wordnet

BATCH = 32
# More of them stand in confusions.csv.
MOST_CONFUSIONS = 100


@dataclass(frozen=True)
class _Found:
    """What was found out from predictions, as the parts of the record need it."""

    taxonomy: Taxonomy
    groups: tuple[Group, ...]
    figures: metrics.Evaluation
    confusions: list[Confusion]
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
        SdwnError: no image is of an ImageNet-1k class, or the file of groups is wrong.
    """
    found = _find_out(predictions, classifier_record, chosen)
    record = {
        **_origin(release, paths, predictions),
        "classifier": classifier_record,
        **_results(found),
        **_map(release, found, chosen),
    }
    if release.manifest.name == PAPER_CATALOG:
        record["paper"] = paper.beside(found.figures.per_class, found.taxonomy)
    write_tables(paths, record, _rows(release, record, found))
    # Last, for it is what says that an evaluation is there.
    write_text(paths.evaluation, json.dumps(record, indent=2) + "\n")
    return record


def _find_out(
    predictions: pa.Table, classifier_record: dict[str, Any], chosen: EvaluationConfig
) -> _Found:
    taxonomy = Taxonomy(shared_wordnet())
    labelled = predictions.filter(pc.is_valid(predictions["imagenet_class"]))
    return _Found(
        taxonomy=taxonomy,
        groups=read_groups(chosen.groups, taxonomy.wordnet),
        figures=metrics.evaluate(
            labelled["wnid"].to_pylist(),
            labelled["number"].to_numpy(),
            labelled["status"].to_pylist(),
            labelled["label_rank"].to_numpy(),
        ),
        confusions=confusions(labelled),
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
    figures = found.figures.as_dict()
    del figures["per_class"]
    most, classes = found.figures.images_per_class, found.figures.per_class
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


def _confusion(row: Confusion, taxonomy: Taxonomy) -> dict[str, Any]:
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


def _map(release: Release, found: _Found, chosen: EvaluationConfig) -> dict[str, Any]:
    wnids = [row.wnid for row in found.figures.per_class]
    return {"map": places(release, wnids, chosen.embedding)}


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


# The judging half, one process, image by image.


def evaluate(
    release: Release, chosen: EvaluationConfig, advance: Advance = lambda _: None
) -> dict[str, Any]:
    """Classify the ImageNet classes of a release and write the figures; return the main ones.

    Predictions of this release by the same model and weights are kept.

    Raises:
        SdwnError: the release holds no ImageNet class, or the model cannot be had.
    """
    images = imagenet_images(release)
    if not images.num_rows:
        raise SdwnError(
            f"{release.paths.root}: none of its synsets is an ImageNet-1k class, so there is "
            "nothing to classify; plan a catalog such as sdwn-26204 or imagenet-1k"
        )
    paths = release.paths.evaluation(evaluation_name(chosen))
    record = _kept(paths, release)
    if record is None:
        record = _judge(release, images, paths, chosen, advance)
    else:
        advance(images.num_rows)
    predictions = pq.read_table(paths.predictions)
    return summary(paths, conclude(release, paths, predictions, record, chosen))


def _kept(paths: EvaluationPaths, release: Release) -> dict[str, Any] | None:
    if not paths.evaluation.exists():
        return None
    found = read_evaluation(paths)
    same = found["release"] == release.digest and paths.predictions.exists()
    record: dict[str, Any] = found["classifier"]
    return record if same else None


def _judge(
    release: Release,
    images: pa.Table,
    paths: EvaluationPaths,
    chosen: EvaluationConfig,
    advance: Advance,
) -> dict[str, Any]:
    from sdwn.evaluation.classify import load_classifier  # torch and timm: only here

    classifier = load_classifier(chosen.model, chosen.checkpoint)
    predictions = pa.concat_tables(_predictions(release, images, classifier, advance))
    with atomic(paths.predictions) as temporary:
        pq.write_table(predictions, temporary, compression="zstd")
    return classifier.record


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
        "subtree_probability": pa.nulls(len(scores.label_rank), pa.float32()),
    }
