"""A classifier judges the images of a release, in batches as large as memory has room for."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sdwn.batches import BatchSize
from sdwn.devices.device import Device, out_of_memory_told
from sdwn.errors import OutOfMemoryError, SdwnError
from sdwn.prediction.classify import Classifier, Logits
from sdwn.prediction.loading import COLUMNS, Row, prepared
from sdwn.prediction.predictions import SCHEMA
from sdwn.prediction.scores import Scores
from sdwn.releases.release import Release
from sdwn.storage.images import Pixels
from sdwn.wordnet.taxonomy import Scope

log = logging.getLogger(__name__)


def judged(
    release: Release,
    classifier: Classifier,
    scopes: Mapping[str, Scope],
    batch: BatchSize | int,
    workers: int,
) -> Iterator[pa.Table]:
    """Judge all images of a release, or of a subset of one; a table a batch, in their order.

    The next images are read by ``workers`` threads, and started, before a batch is waited for.
    Once memory runs out batches are halved, also those of later calls: ``classifier.most`` says
    how far. An image whose synset has no scope has no ``subtree_probability``.

    Raises:
        IntegrityError: an image is damaged; the message names it.
        SdwnError: memory has no room for a single image, or the model gives NaN.
    """
    size = batch if isinstance(batch, int) else batch.images
    log.info("%s", batch if isinstance(batch, BatchSize) else BatchSize(batch, "as asked"))
    ready = prepared(release, classifier.prepare, workers, ahead=2 * size)
    before: _Started | None = None
    for started in _started(classifier, _chunks(classifier, ready, size)):
        if before is not None:
            yield _table(classifier, before, scopes)
        before = started
    if before is not None:
        yield _table(classifier, before, scopes)


@dataclass(frozen=True, eq=False, slots=True)
class _Started:
    rows: Sequence[Row]
    logits: Logits


_Chunk = Sequence[tuple[Row, Pixels]]


def _chunks(
    classifier: Classifier, ready: Iterator[tuple[Row, Pixels]], size: int
) -> Iterator[_Chunk]:
    while chunk := list(itertools.islice(ready, min(size, classifier.most or size))):
        yield chunk


def _started(classifier: Classifier, chunks: Iterator[_Chunk]) -> Iterator[_Started]:
    for chunk in chunks:
        done = 0
        while done < len(chunk):
            part = chunk[done:][: classifier.most]
            logits = _start(classifier, [pixels for _, pixels in part])
            if logits is not None:
                done += len(part)
                yield _Started([row for row, _ in part], logits)


def _start(classifier: Classifier, pixels: list[Pixels]) -> Logits | None:
    """Start a batch; None if there was no room, and batches are smaller from now on."""
    try:
        with out_of_memory_told():
            return classifier.start(np.stack(pixels))
    except OutOfMemoryError as error:
        reason = str(error)
    # Only here is the failed batch's memory free: an exception keeps what its frames hold.
    Device().release()
    if len(pixels) == 1:
        raise SdwnError(
            f"{classifier.name}: no room for a single image: {reason}; "
            "take a larger card or a smaller model"
        )
    classifier.most = len(pixels) // 2
    log.warning("%s; %d images a batch from now on", reason, classifier.most)
    return None


def _table(classifier: Classifier, started: _Started, scopes: Mapping[str, Scope]) -> pa.Table:
    found = [scopes.get(row["wnid"]) for row in started.rows]
    scores = classifier.finish(
        started.logits,
        [row["imagenet_class"] for row in started.rows],
        [None if scope is None else scope.classes for scope in found],
    )
    identity = {name: [row[name] for row in started.rows] for name in COLUMNS}
    return pa.table({**identity, **_columns(scores)}, schema=SCHEMA)


def _columns(scores: Scores) -> dict[str, pa.Array]:
    """Turn a batch's scores into Arrow columns, what there is not into null."""
    none = scores.label_rank < 0
    subtree = scores.subtree_probability
    return {
        "top5": pa.array(list(scores.top5), pa.list_(pa.int16())),
        "top5_probability": pa.array(list(scores.top5_probability), pa.list_(pa.float32())),
        "label_rank": pa.array(scores.label_rank, pa.int16(), mask=none),
        "label_probability": pa.array(scores.label_probability, pa.float32(), mask=none),
        "subtree_probability": pa.array(subtree, pa.float32(), mask=np.isnan(subtree)),
    }
