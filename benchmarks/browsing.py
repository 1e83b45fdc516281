"""Measurements of browsing for `make bench`: a release as large as the published one, tiny images.

``python benchmarks/browsing.py make FOLDER`` writes it with predictions of all images, drawn by
chance; ``open``, ``search`` and ``like`` measure and print what they found.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
from sdwn.browser.collection import Collection, SearchIndex
from sdwn.config import EvaluationConfig, RunConfig, StorageConfig
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.releases.release import Release
from shared import write_shard

TYPED = ("zebra", "golden retriever", "goldne retreiver", "large bird of prey")

PICTURES = 64
SIDE = 8
SHARD = 20_000
# Of this beta distribution the mean of ten is 4.16 and the deviation 3.74, as the paper's.
CHANCES = 0.306, 0.430


def plan_run(folder: Path) -> tuple[RunPaths, Any]:
    from sdwn.planning.plan import make_plan, write_plan
    from sdwn.wordnet.corpus import open_wordnet, read_catalog

    config = RunConfig.model_validate(
        {
            "catalog": {"name": "sdwn-26204"},
            "model": {"name": "builtin:noise"},
            "generation": {"height": SIDE, "width": SIDE},
            "storage": {"images_per_shard": SHARD},
        }
    )
    plan = make_plan(config, read_catalog(config.catalog, open_wordnet()))
    paths = RunPaths(folder)
    write_plan(plan, paths, wordnet=open_wordnet())
    paths.shards.mkdir()
    return paths, plan


def pictures(storage: StorageConfig) -> list[bytes]:
    from sdwn.storage.images import encode

    random = np.random.default_rng(0)
    drawn = random.integers(0, 256, (PICTURES, SIDE, SIDE, 3), dtype=np.uint8)
    return [encode(pixels, storage.codec, storage.quality) for pixels in drawn]


def write_shards(paths: RunPaths, plan: Any) -> None:
    payloads = pictures(plan.config.storage)
    digests = [hashlib.sha256(payload).digest() for payload in payloads]
    for shard in plan.shards:
        specs = list(plan.specs(shard))
        chosen = [spec.seed % PICTURES for spec in specs]
        statuses = ["nsfw" if spec.seed % 100 == 0 else "ok" for spec in specs]
        write_shard(
            *(paths, plan, shard),
            [payloads[which] for which in chosen],
            [digests[which] for which in chosen],
            statuses,
            width=SIDE,
            height=SIDE,
            codec=plan.config.storage.codec,
        )


def drawn_predictions(images: pa.Table) -> pa.Table:
    """Draw predictions for every image: of most classes all are right or none."""
    from sdwn.prediction.table import IMAGE, SCHEMA, TOP
    from sdwn.wordnet.corpus import CLASSES

    random, count = np.random.default_rng(0), images.num_rows
    label = images["imagenet_class"].to_pandas().to_numpy()
    known = ~np.isnan(label)
    place = np.where(known, label, random.integers(0, CLASSES, count)).astype(np.int64)
    chance = random.beta(*CHANCES, CLASSES)[place]
    rank = np.where(random.random(count) < chance, 0, random.choice([1, 2, 4, 40], count))
    top5 = (place[:, None] + np.arange(1, TOP + 1)) % CLASSES
    listed = np.flatnonzero(rank < TOP)
    top5[listed, rank[listed]] = place[listed]
    shares = np.sort(random.dirichlet(np.full(TOP + 1, 0.5), count))[:, ::-1].astype(np.float32)
    missing = ~known
    columns = {
        **{name: images[name] for name in IMAGE},
        "top5": pa.array(top5.astype(np.int16).tolist(), SCHEMA.field("top5").type),
        "top5_probability": pa.array(
            shares[:, :TOP].tolist(), SCHEMA.field("top5_probability").type
        ),
        "label_rank": pa.array(rank.astype(np.int16), mask=missing),
        "label_probability": pa.array(
            np.where(rank < TOP, shares[np.arange(count), np.minimum(rank, TOP)], 0).astype("f4"),
            mask=missing,
        ),
        "subtree_probability": pa.array(random.beta(1 + 9 * chance, 3).astype(np.float32)),
    }
    return pa.table(columns).cast(SCHEMA)


def evaluate(release: Any) -> None:
    from sdwn.evaluation.record import build_record
    from sdwn.prediction.table import IMAGE, Predictions

    table = drawn_predictions(release.metadata.select(IMAGE))
    record = {"model": "drawn", "weights": "none", "checkpoint_sha256": None}
    paths = release.paths.evaluation("drawn")
    Predictions(table, release.digest, "drawn", record, ()).write(paths.predictions)
    build_record(release, paths, table, record, EvaluationConfig(images="all"))


def make(folder: Path) -> None:
    from sdwn.releases.merge import merge

    paths, plan = plan_run(folder / "run")
    write_shards(paths, plan)
    evaluate(merge([paths], ReleasePaths(folder / "release")))


def typed() -> list[str]:
    """List what stands in the box after each letter."""
    return [text[:end] for text in TYPED for end in range(1, len(text) + 1)]


def opening(folder: Path) -> dict[str, float]:
    """Time a server from the start of its process to its first page."""
    with served(folder) as (_, seconds):
        return {"seconds": seconds}


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, float]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sdwn", "browse", folder / "release", "--port", port]
    began = time.perf_counter()
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{address}/"):
            assert server.poll() is None, "sdwn browse has ended"
            time.sleep(0.005)
        yield address, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()


def answers(address: str) -> bool:
    try:
        fetch(address)
    except URLError:
        return False
    return True


def fetch(address: str) -> bytes:
    with urlopen(address) as answer:
        return bytes(answer.read())


def timed(action: Callable[[], object]) -> float:
    """Time an action in milliseconds."""
    began = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began)


def search(folder: Path) -> dict[str, float]:
    index = SearchIndex(Collection(Release(folder / "release")))
    index.search("zebre")  # imports what mends
    return {"ms": statistics.mean(timed(partial(index.search, q)) for q in typed())}


def like(folder: Path) -> dict[str, float]:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE texts (position INTEGER PRIMARY KEY, text TEXT)")
    rows = (
        (entry.position, " ".join((*entry.lemmas, entry.concept.definition, entry.prompt or "")))
        for entry in Collection(Release(folder / "release")).entries
    )
    database.executemany("INSERT INTO texts VALUES (?, ?)", rows)
    find = "SELECT position FROM texts WHERE text LIKE '%' || ? || '%'"

    def ask(text: str) -> None:
        database.execute(find, (text,)).fetchall()

    return {"ms": statistics.mean(timed(partial(ask, q)) for q in typed())}


def main(name: str, folder: str) -> None:
    if name == "make":
        make(Path(folder))
    else:
        measures = {"open": opening, "search": search, "like": like}
        print(json.dumps(measures[name](Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
