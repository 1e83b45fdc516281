"""What a classifier takes a class's images for, where it is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sdwn.prediction.predictions import top1
from sdwn.wordnet.imagenet import class_wnids


@dataclass(frozen=True, slots=True)
class Confusion:
    """A class and another that is seen in ``times`` of its ``images``."""

    wnid: str
    predicted_wnid: str
    times: int
    images: int


def confusions(predictions: pa.Table) -> list[Confusion]:
    """Count the wrong top-1 classes of labelled images: most frequent first, then by wnids."""
    wnids = np.array(class_wnids())
    label = predictions["imagenet_class"].to_numpy()
    seen = top1(predictions)
    images = np.bincount(label, minlength=len(wnids))
    wrong = label != seen
    pairs, times = np.unique(
        np.stack([label[wrong], seen[wrong]]).astype(np.int64), axis=1, return_counts=True
    )
    found = [
        Confusion(str(wnids[one]), str(wnids[other]), int(count), int(images[one]))
        for (one, other), count in zip(pairs.T, times, strict=True)
    ]
    return sorted(found, key=lambda row: (-row.times, row.wnid, row.predicted_wnid))
