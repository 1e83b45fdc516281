"""Scores of images: every column that a measure adds, and one table of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdwn.io import atomic

FLOAT = pa.float32()
# What an image's scores are kept by.
IMAGE_KEY = ("id", "number", "sha256")


@dataclass(frozen=True, slots=True)
class Score:
    """A score of an image: its column, its words for people, and whether more is better."""

    name: str
    label: str
    best: str | None  # high, low, or None where neither is
    type: Any = FLOAT


# In the order of the table. A new one is a row here.
SCORES = {
    one.name: one
    for one in (
        # Of the evaluation.
        Score("correct", "classified correctly", "high", pa.bool_()),
        Score("correct_top5", "among the five best classes", "high", pa.bool_()),
        Score("label_probability", "probability of its class", "high"),
        Score("subtree_probability", "probability of its synset or near it", "high"),
        Score("confidence", "probability of the best class", "high"),
        # Of the features.
        Score("clip_score", "CLIP score", "high"),
        # Of `sdwn measure`.
        Score("similarity_within", "similarity to the concept's other images", "low"),
        Score("nearest_real", "similarity to the nearest real image", None),
        # Of `sdwn duplicates`.
        Score("duplicate_group", "group of duplicates", None, pa.int32()),
        Score("duplicate_of_better", "a duplicate that can go", "low", pa.bool_()),
        Score("nearest_reference", "similarity to the nearest reference image", "low"),
    )
}


def write_scores(path: Path, images: pa.Table, columns: Mapping[str, Any]) -> None:
    """Write scores of images, by name, for the rows of a release's metadata."""
    found = {name: pa.array(values, SCORES[name].type) for name, values in columns.items()}
    table = pa.table({**{name: images[name] for name in IMAGE_KEY}, **found})
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
