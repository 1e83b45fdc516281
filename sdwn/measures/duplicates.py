"""Copies among images: of equal pixels, near duplicates, and images near those of a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sdwn.errors import UsageError
from sdwn.io import csv_text, write_text
from sdwn.measures import record
from sdwn.measures.distances import NeighbourIndex, unit_vectors
from sdwn.paths import MeasurePaths
from sdwn.prediction.table import Features, open_features
from sdwn.releases.release import Release
from sdwn.storage.columns import BLACK, numbers

# How similar the features of near images are at least, where at most so many of the 64 bits of
# their perceptual hashes differ.
NEAR = {2: 0.6, 14: 0.945, 64: 0.97}
# For each image so many of the most similar ones are looked at.
NEIGHBOURS = 32

Rows = NDArray[np.int64]


class Duplicates(NamedTuple):
    """Duplicates found.

    A pair has the ``row`` of an image, the better of both, and of the ``other``, there or in the
    reference, and what tells them apart. The most similar pairs of a kind come first.
    """

    paths: MeasurePaths
    features: str  # their name
    content: dict[str, Any]  # of the record
    pairs: pa.Table


def find_duplicates(
    release: Release, reference: Release | None = None, name: str | None = None
) -> Duplicates:
    """Find images that repeat others; write the record, pairs and scores.

    Images that are black by their status are left out: all are equal, and known. A group is what
    pairs connect; its image with the highest probability of its class is kept, or the first.
    """
    features = open_features(release, name)
    ours = _Compared(release, features)
    theirs = _Compared(reference, record.open_reference(features, reference)) if reference else None
    probability = numbers(record.score_table(release)["label_probability"], 0)[ours.rows]
    order = ours.rows[np.argsort(-probability, kind="stable")]
    # Of equal pixels each image makes a pair with the best one, which alone is compared further.
    _, first, which = np.unique(ours.pixels[order], return_index=True, return_inverse=True)
    again, distinct = order[first[which]] != order, order[np.sort(first)]
    exact = order[first[which]][again], order[again], np.ones(again.sum()), np.zeros(again.sum())
    # Near ones are found from both sides, and each finds itself.
    at, to, similarity, bits, _ = _near(ours, distinct, ours, distinct)
    low, high = np.minimum(at, to), np.maximum(at, to)
    _, once = np.unique(low * len(distinct) + high, return_index=True)
    once = once[low[once] < high[once]]
    near = distinct[low[once]], distinct[high[once]], similarity[once], bits[once]
    pairs = _pairs(ours, ours, [*map(np.concatenate, zip(exact, near, strict=True))])

    graph = np.ones(len(pairs)), (numbers(pairs["row"]), numbers(pairs["other"]))
    _, groups = connected_components(coo_array(graph, shape=(len(release),) * 2), directed=False)
    several = np.bincount(groups) > 1
    groups = np.where(several, np.cumsum(several) - 1, -1)[groups]
    extra, grouped = groups >= 0, order[groups[order] >= 0]
    extra[grouped[np.unique(groups[grouped], return_index=True)[1]]] = False
    counts = {"exact_duplicates": again.sum(), "near_duplicates": extra.sum() - again.sum()}
    scores = {
        "duplicate_group": np.ma.masked_array(groups, groups < 0),
        "duplicate_of_better": np.ma.masked_array(extra, ours.black),
    }
    if theirs is not None:
        at, to, similarity, bits, nearest = _near(ours, ours.rows, theirs, theirs.rows)
        # Of each image the most similar one.
        at, once = np.unique(at, return_index=True)
        found = ours.rows[at], theirs.rows[to[once]], similarity[once], bits[once]
        pairs = pa.concat_tables([pairs, _pairs(ours, theirs, found)])
        counts["near_reference"] = len(at)
        scores["nearest_reference"] = np.ma.masked_array(np.zeros(len(release)), ours.black)
        scores["nearest_reference"][ours.rows] = nearest

    figures = {name: record.make_figure(count, None, len(order)) for name, count in counts.items()}
    if theirs is not None:
        figures["near_reference"]["reference_images"] = len(theirs.rows)
    thresholds = {str(bits): similarity for bits, similarity in NEAR.items()}
    content = {
        "figures": figures,
        "settings": {"neighbours": NEIGHBOURS, "similarity_by_bits": thresholds},
        "groups_found": int(several.sum()),
        "black_left_out": int(ours.black.sum()),
    }
    paths = record.write_record("duplicates", release, features, reference, content)
    record.write_scores(paths.scores, release.metadata, scores)
    table = pairs.drop_columns(["row", "other"])
    lines = zip(*table.to_pydict().values(), strict=True)
    write_text(paths.table("pairs"), csv_text(table.column_names, lines))
    return Duplicates(paths, features.name, content, pairs)


class _Compared:
    """Vectors and hashes that images are compared by; ``rows`` are those that are not black."""

    def __init__(self, release: Release, features: Features) -> None:
        self.images, self.vectors = release.metadata, features.vectors
        self.pixels, self.phash = (numbers(features.table[n]) for n in ("pixels_hash", "phash"))
        self.black = numbers(pc.is_in(self.images["status"], pa.array(BLACK, pa.string()))).copy()
        self.rows = np.flatnonzero(~self.black)
        if not len(self.rows):
            raise UsageError(f"{release}: all images are black; there is nothing to compare")


def _near(ours: _Compared, rows: Rows, theirs: _Compared, others: Rows) -> tuple[NDArray[Any], ...]:
    """Return near pairs, as indices in ``rows`` and ``others`` with similarities and bits.

    A row's most similar pair is its first. Last is the similarity of each row's nearest other.
    """
    vectors = theirs.vectors[others]
    # Copied once: of 262,040 images they are half a gigabyte.
    queries = vectors if rows is others else ours.vectors[rows]
    found, similarity = NeighbourIndex(vectors).search(queries, NEIGHBOURS)
    differ = ours.phash[rows][:, None] ^ theirs.phash[others[found]]
    bits = np.unpackbits(differ.view(np.uint8), axis=1).reshape(*differ.shape, 64).sum(2)
    near = np.nonzero(similarity >= np.select([bits <= most for most in NEAR], [*NEAR.values()]))
    # Compression may change features more than the hash: the first other of the same hash, too.
    order = np.argsort(theirs.phash[others], kind="stable")
    place = np.searchsorted(theirs.phash[others[order]], ours.phash[rows])
    same = order[np.minimum(place, len(order) - 1)]
    equal = theirs.phash[others[same]] == ours.phash[rows]
    at = np.flatnonzero(equal & ((rows is not others) | (same != np.arange(len(rows)))))
    pairs = (unit_vectors(one, "f4") for one in (queries[at], vectors[same[at]]))
    alike = np.einsum("ij,ij->i", *pairs)
    at, alike = at[alike >= min(NEAR.values())], alike[alike >= min(NEAR.values())]
    by_features = near[0], found[near], similarity[near], bits[near]
    by_hash = at, same[at], alike, np.zeros_like(at)
    return *map(np.concatenate, zip(by_features, by_hash, strict=True)), similarity[:, 0]


def _pairs(ours: _Compared, theirs: _Compared, found: Sequence[NDArray[Any]]) -> pa.Table:
    row, other, similarity, bits = found
    kinds = ("exact", "near") if ours is theirs else ("exact reference", "near reference")
    one, two = ours.images.take(pa.array(row)), theirs.images.take(pa.array(other))
    columns = {"row": row, "id": one["id"], "number": one["number"]}
    columns |= {"kind": np.where(ours.pixels[row] == theirs.pixels[other], *kinds)}
    columns |= {"other": other, "other_id": two["id"], "other_number": two["number"]}
    columns |= {"similarity": similarity.astype(float).round(4), "bits": bits.astype(int)}
    order = [("kind", "ascending"), ("similarity", "descending"), ("row", "ascending")]
    return pa.table(columns).sort_by(order)
