"""A release of ImageNet classes, and predictions drawn so that figures look like the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sdwn.catalog import read_catalog
from sdwn.files import ReleasePaths, RunPaths
from sdwn.generate import generate
from sdwn.imagenet import class_wnids
from sdwn.judging.predictions import IMAGE, SCHEMA
from sdwn.merge import MergeOptions, merge
from sdwn.plan import make_plan, write_plan
from sdwn.release import Release
from sdwn.wordnet import WordNet

from conftest import noise_config

# Of this beta distribution the mean of ten is 4.16 and the deviation 3.74.
CHANCES = 0.306, 0.430


def noise_release(folder: Path, wordnet: WordNet, wnids: Sequence[str], **changes: Any) -> Release:
    """Make a release of these synsets by plain noise, ten images each."""
    catalog = {"name": "imagenet-1k", "only": list(wnids)}
    storage = {"images_per_shard": 2000}
    config = noise_config(
        **{"catalog": catalog, "images_per_synset": 10, "storage": storage, **changes}
    )
    plan = make_plan(config, read_catalog(config.catalog, wordnet))
    paths = RunPaths(folder)
    write_plan(plan, paths)
    generate(paths.root, range(len(plan.shards)))
    return merge([paths], ReleasePaths(paths.release), MergeOptions())


def predictions(release: Release, seed: int = 0) -> pa.Table:
    """Draw what a classifier might say of each image: of many classes all or none are right."""
    random, images = np.random.default_rng(seed), release.metadata
    chance = {row.wnid: random.beta(*CHANCES) for row in release.present}
    # What a class is taken for is mostly one and the same other class.
    others = {row.wnid: random.integers(0, len(class_wnids()), 3) for row in release.present}
    drawn = [
        _drawn(random, row, chance[row["wnid"]], others[row["wnid"]])
        for row in images.select(["wnid", "imagenet_class"]).to_pylist()
    ]
    kept = images.select(list(IMAGE))
    for name in SCHEMA.names[len(IMAGE) :]:
        kept = kept.append_column(
            name, pa.array([row[name] for row in drawn], SCHEMA.field(name).type)
        )
    return kept


def _drawn(
    random: np.random.Generator, row: dict[str, Any], chance: float, others: Any
) -> dict[str, Any]:
    label = row["imagenet_class"]
    rank = 0 if random.random() < chance else int(random.choice([1, 2, 3, 4, 40, 400]))
    top = [int(c) for c in random.permutation(others) if c != label]
    top += [c for c in range(9) if c != label and c not in top]
    if rank < 5 and label is not None:
        top.insert(rank, label)
    probability = sorted(random.dirichlet(np.ones(6))[:5].tolist(), reverse=True)
    mine = probability[rank] if rank < 5 else 0.001
    return {
        "top5": top[:5],
        "top5_probability": probability,
        "label_rank": None if label is None else rank,
        "label_probability": None if label is None else mine,
        "subtree_probability": min(1.0, mine + 0.05),
    }
