"""Measurements of features and what is made of them for `make bench`.

``python benchmarks/measuring.py make FOLDER`` writes two releases with features; with another word
in place of ``make`` it prints a figure. ``features`` and ``timms``: images a second through
EfficientNet-Lite0 without its classifier, of what ``reading.py make FOLDER`` wrote. ``neighbours``
and ``brute``: the seconds that the ten nearest of each of 262,040 vectors take. ``measure`` and
``arrays``: the peak in MB of `sdwn measure` on the two releases, and of their features alone as
float32.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from input import BATCH, PASSES, WORKERS
from shared import output_of, peak_mb, write_shard

VECTORS, DIMENSIONS, NEAREST = 262_040, 384, 10
# Every so many queries of brute force are run, and the time is counted so often.
SHARE = 32
MEASURED, MEASURED_DIMENSIONS = 20_000, 1024

PEAK_OF_ARRAYS = """
import sys
from pathlib import Path
import numpy as np
import sdwn
sides = [sdwn.Release(root).features("made").vectors.astype("f4") for root in sys.argv[1:]]
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def features(folder: Path) -> float:
    import sdwn
    from sdwn.batches import BatchSize
    from sdwn.prediction.network import run_batches
    from sdwn.prediction.pretrained import load_encoder

    release, encoder = sdwn.Release(folder / "release"), load_encoder("efficientnet-lite0")

    encoder.batch = BatchSize(BATCH, "as timm's")
    return rate(lambda: sum(map(len, run_batches(encoder, release))))


def timms(folder: Path) -> float:
    import torch
    from sdwn.prediction.pretrained import PRESETS, load_encoder
    from sdwn.preflight.peers import timm_loader

    network = load_encoder("efficientnet-lite0").network
    options = {"num_workers": WORKERS, "device": torch.device("cpu")}
    preprocessing = PRESETS["efficientnet-lite0"].preprocessing
    loader = timm_loader(folder / "png", preprocessing, BATCH, **options)

    @torch.inference_mode()
    def images() -> int:
        made = (network(batch.contiguous(memory_format=torch.channels_last)) for batch, _ in loader)
        return sum(len(vectors.numpy()) for vectors in made)

    return rate(images)


def rate(images: Callable[[], int]) -> float:
    images()
    began = time.perf_counter()
    return sum(images() for _ in range(PASSES)) / (time.perf_counter() - began)


def clustered(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Draw vectors in clusters of ten, as images of one synset are, float16."""
    random = np.random.default_rng(seed)
    found = np.repeat(random.normal(size=(count // 10, dimensions)).astype("f4"), 10, axis=0)
    for start in range(0, count, 10_000):
        part = found[start : start + 10_000]
        part += 0.6 * random.normal(size=part.shape).astype("f4")
    return found.astype("f2")


def neighbours(_: Path) -> float:
    from sdwn.measures.distances import NeighbourIndex

    vectors = clustered(VECTORS, DIMENSIONS)
    began = time.perf_counter()
    NeighbourIndex(vectors).search(vectors, NEAREST + 1)
    return time.perf_counter() - began


def brute(_: Path) -> float:
    """Compare some of the vectors with all by scikit-learn; the time of all of them."""
    from sklearn.neighbors import NearestNeighbors

    vectors = clustered(VECTORS, DIMENSIONS).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    began = time.perf_counter()
    every = NearestNeighbors(n_neighbors=NEAREST + 1, algorithm="brute").fit(vectors)
    every.kneighbors(vectors[::SHARE])
    return SHARE * (time.perf_counter() - began)


def make_measured(folder: Path) -> None:
    """Write two releases of images of a byte, with features."""
    import pyarrow as pa
    from sdwn.config import RunConfig
    from sdwn.paths import ReleasePaths, RunPaths
    from sdwn.planning.plan import make_plan, write_plan
    from sdwn.prediction.table import COLUMNS, IMAGE, FeatureTable, with_vectors
    from sdwn.releases.merge import merge
    from sdwn.wordnet.corpus import open_wordnet, read_catalog

    wordnet = open_wordnet()
    settings = {
        "catalog": {"name": "imagenet-1k"},
        "model": {"name": "builtin:noise"},
        "images_per_synset": MEASURED // 1000,
    }
    config = RunConfig.model_validate(settings)
    plan = make_plan(config, read_catalog(config.catalog, wordnet))
    for side in (0, 1):
        with tempfile.TemporaryDirectory() as run:
            write_plan(plan, paths := RunPaths(Path(run)), wordnet=wordnet)
            paths.shards.mkdir()
            payloads = [str(index).encode() for index in range(MEASURED)]
            digests = [hashlib.sha256(one).digest() for one in payloads]
            for shard in plan.shards:
                first = next(iter(plan.specs(shard))).index
                part = slice(first, first + shard.images)
                write_shard(paths, plan, shard, payloads[part], digests[part])
            release = merge([paths], ReleasePaths(folder / f"measured-{side}"))
        columns = {one.name: pa.nulls(MEASURED, one.type) for one in COLUMNS}
        columns |= {name: release.metadata[name] for name in IMAGE}
        table = pa.table(columns, schema=COLUMNS)
        vectors = clustered(MEASURED, MEASURED_DIMENSIONS, side)
        found = FeatureTable(
            with_vectors(table, vectors), release.digest, "", {"model": "made"}, ()
        )
        found.write(release.paths.features("made").features)


def measure(folder: Path) -> float:
    return peak_mb("measure", folder / "measured-0", "--reference", folder / "measured-1")


def arrays(folder: Path) -> float:
    sides = [folder / "measured-0", folder / "measured-1"]
    return int(output_of(sys.executable, "-c", PEAK_OF_ARRAYS, *sides)) / 1000


def main(what: str, folder: str) -> None:
    if what == "make":
        make_measured(Path(folder))
    else:
        print(json.dumps({"figure": globals()[what](Path(folder))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
