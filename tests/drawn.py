"""Predictions drawn by chance instead of by a classifier: what figures and pages are tested on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sdwn.config import EvaluationConfig
from sdwn.evaluation.evaluate import conclude
from sdwn.files import EvaluationPaths
from sdwn.imagenet import CLASSES
from sdwn.judging.predictions import SCHEMA, Predictions, Source, write_predictions
from sdwn.release import Release

CLASSIFIER = {"model": "drawn", "weights": "none", "checkpoint_sha256": None}

# The chance of each class, by wnid, to be recognised.
Rate = Callable[[str], float]


def predictions(release: Release, rate: Rate, seed: int = 0, every: bool = False) -> pa.Table:
    """Draw predictions for the images of ImageNet classes, or for every image."""
    rows = release.metadata.select(["wnid", "synset", "number", "status", "imagenet_class"])
    if not every:
        rows = rows.filter(pc.is_valid(rows["imagenet_class"]))
    random = np.random.default_rng(seed)
    drawn = [_row(row, rate, random) for row in rows.to_pylist()]
    return pa.Table.from_pylist(drawn, SCHEMA)


def _row(row: Mapping[str, Any], rate: Rate, random: np.random.Generator) -> dict[str, Any]:
    label = row["imagenet_class"]
    # What is wrong is taken for a neighbour in the list, which is often a relative.
    near = ((label or 0) + random.permutation(np.r_[-9:0, 1:10])) % CLASSES
    rank = 0 if random.random() < rate(row["wnid"]) else int(random.choice([1, 2, 4, 40, 400]))
    top5 = near[:5].tolist()
    if label is not None and rank < 5:
        top5.insert(rank, label)
    shares = np.sort(random.dirichlet(np.full(6, 0.5)))[::-1].astype(np.float32)
    known = label is not None
    return {
        **row,
        "top5": top5[:5],
        "top5_probability": shares[:5],
        "label_rank": rank if known else None,
        "label_probability": (float(shares[rank]) if rank < 5 else 0.0) if known else None,
        "subtree_probability": float(random.beta(1 + 9 * rate(row["wnid"]), 3)),
    }


def evaluation(
    release: Release, table: pa.Table, name: str = "drawn", model: str = "drawn"
) -> EvaluationPaths:
    """Make an evaluation of predictions, as if a classifier of this name had made them."""
    paths = release.paths.evaluation(name)
    record = {**CLASSIFIER, "model": model}
    source = Source(release.digest, "drawn", 0, table.num_rows, record, ())
    write_predictions(paths.predictions, Predictions(table, source))
    conclude(release, paths, table, record, EvaluationConfig(model=model))
    return paths
