"""A release's images become predictions, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from sdwn.evaluation.predictions import IMAGE, SCHEMA
from sdwn.evaluation.taxonomy import Scope
from sdwn.release import Release


def judged(
    release: Release, classifier: Any, scopes: Mapping[str, Scope], batch: int, workers: int
) -> Iterator[pa.Table]:
    """Judge."""
    for rows in release.metadata.to_batches(max_chunksize=batch):
        records = rows.to_pylist()
        labels = [row["imagenet_class"] for row in records]
        known = [0 if label is None else label for label in labels]
        scores = classifier.predict([release.image(row) for row in records], known)
        without = [label is None for label in labels]
        columns = {
            "top5": list(scores.top5),
            "top5_probability": list(scores.top5_probability),
            "label_rank": [
                None if w else v for w, v in zip(without, scores.label_rank.tolist(), strict=True)
            ],
            "label_probability": [
                None if w else v for w, v in zip(without, scores.label_probability, strict=True)
            ],
            "subtree_probability": scores.label_probability,
        }
        table = pa.Table.from_batches([rows]).select(IMAGE)
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, SCHEMA.field(name).type))
        yield table
