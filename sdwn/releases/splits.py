"""Splits of a release's images for training: the same ones in every format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdwn.errors import UsageError


def split_images(images: pa.Table, shares: Mapping[str, float]) -> NDArray[np.int64]:
    """Return the split of each image, as its index in ``shares``.

    Of a concept's n images, n times its share are in a split, rounded up or down. Which ones
    follows from the concept's id, the images' numbers and the splits before it, so that they are
    the same ones in a subset and in a release that has grown. The largest split gets the rest.

    Args:
        images: rows of a release's metadata.
        shares: the share of each split, together 1; each must get an image.
    """
    largest = max(shares, key=lambda name: shares[name])
    found = np.full(len(images), list(shares).index(largest))
    ids = images["id"].combine_chunks().dictionary_encode()
    # The number of each image among those of its concept that no split has taken yet.
    number, left = images["number"].to_numpy().astype("f8"), np.ones(len(images), dtype=bool)
    remaining = 1.0
    for index, name in enumerate(shares):
        if name == largest:
            continue
        hashes = (hashlib.sha256(f"{name}/{id_}".encode()) for id_ in ids.dictionary.to_pylist())
        starts = np.array([int.from_bytes(one.digest()[:8]) / 2**64 for one in hashes])
        start, part = starts[ids.indices.to_numpy()], shares[name] / remaining
        before = np.floor(number * part + start)
        taken = left & (np.floor((number + 1) * part + start) > before)
        found[taken] = index
        left &= ~taken
        number -= before
        remaining -= shares[name]
    if empty := [name for index, name in enumerate(shares) if index not in found]:
        count = f"{len(images):,} images"
        raise UsageError(f"split {empty[0]} gets none of {count}; give it a larger share, or more")
    return found
