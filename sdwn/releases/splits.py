"""Splits of a release's images for training: the same ones in every format."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import UsageError
from sdwn.releases.release import Release


def split_images(release: Release, shares: Mapping[str, float]) -> NDArray[np.int64]:
    """Return the split of each image, as its index in ``shares``.

    Of a concept's n images, n times its share are in a split, rounded up or down, and of a class
    of several concepts alike. Which ones follows from the class's name, the concept's position in
    it, the images' numbers and the splits before: they are the same ones in a subset and in a
    release that has grown. The largest split gets the rest. Shares are 1 together, and each split
    must get an image.
    """
    largest = max(shares, key=lambda name: shares[name])
    found = np.full(len(release), list(shares).index(largest))
    # The class of each concept, and which of its concepts it is.
    classes, counted = dict[str, tuple[str, int]](), Counter[str]()
    for one in release.concepts.values():
        name = one.wnid or one.label or one.id
        classes[one.id] = name, counted[name]
        counted[name] += 1
    ids = release.metadata["id"].combine_chunks().dictionary_encode()
    known = [classes[id_] for id_ in ids.dictionary.to_pylist()]
    # The number of each image among those of its concept that no split has taken yet.
    number, left = release.metadata["number"].to_numpy().astype("f8"), np.ones(len(found), bool)
    remaining = 1.0
    for index, name in enumerate(shares):
        if name == largest:
            continue
        part = shares[name] / remaining
        hashes = (hashlib.sha256(f"{name}/{one}".encode()).digest() for one, _ in known)
        fractions = np.array([int.from_bytes(one[:8]) / 2**64 for one in hashes])
        starts = (fractions + part * np.array([position for _, position in known])) % 1
        start = starts[ids.indices.to_numpy()]
        before = np.floor(number * part + start)
        taken = left & (np.floor((number + 1) * part + start) > before)
        found[taken] = index
        left &= ~taken
        number -= before
        remaining -= shares[name]
    if empty := [name for index, name in enumerate(shares) if index not in found]:
        count = f"{len(found):,} images"
        raise UsageError(f"split {empty[0]} gets none of {count}; give it a larger share, or more")
    return found
