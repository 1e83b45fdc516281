"""A release as a map-style dataset of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from sdwn.errors import UsageError
from sdwn.releases.release import Release
from sdwn.storage.columns import numbers
from sdwn.wordnet.imagenet import class_wnids

LABELS = ("synset", "label", "imagenet", None)


class ReleaseDataset(Dataset[tuple[Any, int]]):
    """Pairs of an image and its label, in the release's order; safe with DataLoader's workers.

    As in torchvision's datasets, ``classes`` has the name of each label, ``class_to_idx`` the
    label of each name, and ``targets`` the label of each image. A name is a wnid, or a text of
    the column ``label``.

    Args:
        release: a release or a subset of one.
        transform: takes a PIL image, RGB; without it the image itself is returned.
        target_transform: takes the label.
        labels: ``synset`` or ``label``, counted from 0 in the order of the wnids or labels in
            ``release``; ``imagenet``, the index of the ImageNet-1k class; every image must have
            one. None for a release without: each label is -1.
    """

    def __init__(
        self,
        release: Release,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        labels: str | None = "synset",
    ) -> None:
        if labels not in LABELS:
            raise UsageError(f"labels: expected one of {LABELS}, found {labels!r}")
        self.release, self.transform, self.target_transform = release, transform, target_transform
        self.classes: list[str] = []
        self.targets = np.full(len(release), -1, dtype=np.int64)
        if labels is not None:
            names = release.metadata["label" if labels == "label" else "wnid"]
            found = {name for name in names.unique().to_pylist() if name}
            self.classes = list(class_wnids()) if labels == "imagenet" else sorted(found)
            targets = pc.index_in(names, pa.array(self.classes, names.type))
            if none := targets.null_count:
                what = "ImageNet-1k class" if labels == "imagenet" else labels
                raise UsageError(
                    f"{none} of {len(release)} images are of no {what}; take those that are, as "
                    "with release.subset(imagenet=True), or other labels"
                )
            self.targets = numbers(targets).astype(np.int64)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.release)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = self.release.image(index)
        label: Any = int(self.targets[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label
