"""A release as a map-style dataset of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset

from sdwn.errors import UsageError
from sdwn.releases.release import Release
from sdwn.wordnet.imagenet import class_wnids

LABELS = ("synset", "imagenet")


class ReleaseDataset(Dataset[tuple[Any, int]]):
    """Pairs of an image and its label, in the release's order; safe with DataLoader's workers.

    As in torchvision's datasets, ``classes`` has the wnid of each label, ``class_to_idx`` the
    label of each wnid, and ``targets`` the label of each image.

    Args:
        release: a release or a subset of one.
        transform: takes a PIL image, RGB; without it the image itself is returned.
        target_transform: takes the label.
        labels: ``synset``, counted from 0 in the order of the wnids in ``release``; or
            ``imagenet``, the index of the ImageNet-1k class, which every image must have.
    """

    def __init__(
        self,
        release: Release,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        labels: str = "synset",
    ) -> None:
        if labels not in LABELS:
            raise UsageError(f"labels: expected {' or '.join(LABELS)}, found {labels!r}")
        self.release, self.transform, self.target_transform = release, transform, target_transform
        wnids = release.metadata["wnid"]
        if labels == "synset":
            self.classes = sorted(pc.unique(wnids).to_pylist())
        elif none := release.metadata["imagenet_class"].null_count:
            raise UsageError(
                f"{none} of {len(release)} images are of no ImageNet-1k class; "
                "take those that are: release.subset(imagenet=True)"
            )
        else:
            self.classes = list(class_wnids())
        self.class_to_idx = {wnid: index for index, wnid in enumerate(self.classes)}
        self.targets = np.array(
            [self.class_to_idx[wnid] for wnid in wnids.to_pylist()], dtype=np.int64
        )

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
