"""The lists of classes that ImageNet classifiers know; their length alone tells them apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from timm.data import infer_imagenet_subset

from sdwn.wordnet.imagenet import CLASSES, LARGER, class_wnids, classifier_wnids

SIZES = (CLASSES, *LARGER)
EXPECTED = (
    f"the {CLASSES} ImageNet-1k classes, or one of timm's lists of all ImageNet "
    f"({', '.join(map(str, SIZES[1:-1]))} or {SIZES[-1]} classes)"
)


@dataclass(frozen=True, slots=True)
class ClassList:
    """A list's name in timm, and the wnid of each class, in the order of a model's outputs."""

    name: str
    wnids: tuple[str, ...]

    @property
    def columns(self) -> NDArray[np.int64]:
        """The output of each of the 1000 ImageNet-1k classes, -1 where the list has it not."""
        places = {wnid: place for place, wnid in enumerate(self.wnids)}
        return np.array([places.get(wnid, -1) for wnid in class_wnids()], dtype=np.int64)


def class_list(size: int) -> ClassList | None:
    """Find the list of so many classes; None where there is none.

    >>> class_list(11821).name, class_list(37)
    ('imagenet-12k', None)
    """
    if size not in SIZES:
        return None
    return ClassList(infer_imagenet_subset({"num_classes": size}), classifier_wnids(size))
