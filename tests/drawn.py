"""Predictions drawn by chance instead of by a classifier: what figures and pages are tested on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sdwn.config import EvaluationConfig
from sdwn.evaluation.evaluate import make_results, open_image_plan
from sdwn.evaluation.record import build_record
from sdwn.generation.task import generate
from sdwn.measures.record import write_record, write_scores
from sdwn.paths import EvaluationPaths, ReleasePaths, RunPaths
from sdwn.planning.plan import make_plan, write_plan
from sdwn.prediction.table import (
    COLUMNS,
    IMAGE,
    SCHEMA,
    TOP,
    Features,
    FeatureTable,
    Predictions,
    with_vectors,
)
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import CLASSES, WordNet, read_catalog

from conftest import noise_config

CLASSIFIER = {"model": "drawn", "weights": "none", "checkpoint_sha256": None}
# Of this beta distribution the mean of ten is 4.16 and the deviation 3.74, as the paper's.
CHANCES = 0.306, 0.430
# What is wrong is taken for one of a few neighbours in the list, which are often relatives.
NEAR = (-3, -2, -1, 1, 2, 3)

# The chance of each class, by wnid, to be recognised.
Rate = Callable[[str], float]


def noise_release(folder: Path, wordnet: WordNet, wnids: Sequence[str], **changes: Any) -> Release:
    """Make a release of these synsets by plain noise, ten images each."""
    catalog = {"name": "imagenet-1k", "only": list(wnids)}
    storage = {"images_per_shard": 2000}
    config = noise_config(
        **{"catalog": catalog, "images_per_synset": 10, "storage": storage, **changes}
    )
    plan = make_plan(config, read_catalog(config.catalog, wordnet))
    paths = RunPaths(folder)
    write_plan(plan, paths, wordnet=wordnet)
    generate(paths.root, range(len(plan.shards)))
    return merge([paths], ReleasePaths(paths.release), MergeOptions())


def predictions(
    release: Release, rate: Rate | None = None, seed: int = 0, every: bool = False
) -> pa.Table:
    """Draw predictions for the images of ImageNet classes, or for every image.

    Without a rate, of many classes all or none are right, as in the paper.
    """
    rows = release.metadata.select(IMAGE)
    if not every:
        rows = rows.filter(pc.is_valid(rows["imagenet_class"]))
    random = np.random.default_rng(seed)
    wnids = rows["wnid"].unique().to_pylist()
    chance = {wnid: rate(wnid) if rate else random.beta(*CHANCES) for wnid in wnids}
    drawn = [_row(row, chance[row["wnid"]], random) for row in rows.to_pylist()]
    return pa.Table.from_pylist(drawn, SCHEMA)


def _row(row: Mapping[str, Any], chance: float, random: np.random.Generator) -> dict[str, Any]:
    label = row["imagenet_class"]
    known = label is not None
    # A synset that is no class has neighbours as well, and so has what is no synset.
    place = label if known else int((row["wnid"] or "n0")[1:])
    top5 = ((place + random.permutation(NEAR)) % CLASSES).tolist()[:TOP]
    rank = 0 if random.random() < chance else int(random.choice([1, 2, 4, 40, 400]))
    if known and rank < TOP:
        top5.insert(rank, label)
    shares = np.sort(random.dirichlet(np.full(TOP + 1, 0.5)))[::-1].astype(np.float32)
    return {
        **row,
        "top5": top5[:TOP],
        "top5_probability": shares[:TOP],
        "label_rank": rank if known else None,
        "label_probability": (float(shares[rank]) if rank < TOP else 0.0) if known else None,
        "subtree_probability": row["wnid"] and float(random.beta(1 + 9 * chance, 3)),
    }


def evaluation(
    release: Release,
    table: pa.Table,
    name: str = "drawn",
    chosen: EvaluationConfig | None = None,
    **classifier: str,
) -> EvaluationPaths:
    """Make an evaluation of predictions, as if a classifier of this record had made them."""
    paths, record = release.paths.evaluation(name), {**CLASSIFIER, **classifier}
    Predictions(table, release.digest, "drawn", record, ()).write(paths.predictions)
    build_record(release, paths, table, record, chosen or EvaluationConfig())
    return paths


def evaluate(release: Release, chosen: EvaluationConfig | str, **options: Any) -> dict[str, Any]:
    """Classify a release's images in this process, or encode them by the encoder named."""
    work, plan = open_image_plan(release, chosen)
    return make_results(release, work, plan, **options)


def draw_scores(release: Release, **columns: Any) -> None:
    """Lay these scores of its images into a release, as `sdwn duplicates` does."""
    features = Features("drawn", pa.table({}), np.empty((0, 0), "f2"), {})
    paths = write_record("duplicates", release, features, None, {"figures": {}, "settings": {}})
    write_scores(paths.scores, release.metadata, columns)


def draw_features(
    release: Release, vectors: np.ndarray, name: str = "drawn", **columns: Any
) -> Features:
    """Lay these vectors into a release as features, beside ``columns`` such as a ``phash``."""
    rows = len(release)
    every = {one.name: pa.nulls(rows, one.type) for one in COLUMNS}
    every |= {one: release.metadata[one] for one in IMAGE}
    every |= {one: pa.array(np.arange(rows), pa.uint64()) for one in ("pixels_hash", "phash")}
    every |= {one: pa.array(values, COLUMNS.field(one).type) for one, values in columns.items()}
    table = pa.table(every, schema=COLUMNS)
    found = Features(name, table, vectors.astype(np.float16), {"model": name})
    write_features(release, found)
    return found


def write_features(release: Release, found: Features) -> None:
    """Lay features into a release."""
    table = with_vectors(found.table, found.vectors)
    path = release.paths.features(found.name).features
    FeatureTable(table, release.digest, "", found.encoder, ()).write(path)
