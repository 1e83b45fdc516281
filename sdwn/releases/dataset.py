"""A release as a map-style dataset of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sdwn.errors import UsageError
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import class_wnids

# Labels that are indices of classes, by the column of their names.
CLASSES = {"synset": "wnid", "label": "label", "imagenet": "wnid"}


class ReleaseDataset(Dataset[tuple[Any, Any]]):
    """Pairs of an image and its label, in the release's order; safe with DataLoader's workers.

    As in torchvision's datasets, ``classes`` has the name of each label, a wnid or a text of the
    column ``label``, ``class_to_idx`` its label, and ``targets`` the label of each image.

    Args:
        transform: takes a PIL image, RGB; without it the image itself is returned.
        labels: ``synset`` or ``label``, counted from 0 in the order of the wnids or labels in
            ``release``; ``imagenet``, the index of the ImageNet-1k class; or any column of the
            metadata, as ``prompt``, for its values. Every image must have one. None: all are -1.
    """

    def __init__(
        self,
        release: Release,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        labels: str | None = "synset",
    ) -> None:
        self.release, self.transform, self.target_transform = release, transform, target_transform
        self.classes: list[str] = []
        self.targets: NDArray[Any] = np.full(len(release), -1, dtype=np.int64)
        if labels is not None:
            valid = [*CLASSES, *release.metadata.column_names]
            if labels not in valid:
                expected = f"one of {', '.join(valid)}, or None"
                raise UsageError(f"labels: expected {expected}, found {labels!r}")
            values = release.metadata[CLASSES.get(labels, labels)]
            if labels in CLASSES:
                found = {name for name in values.unique().to_pylist() if name}
                self.classes = list(class_wnids()) if labels == "imagenet" else sorted(found)
                values = pc.index_in(values, pa.array(self.classes, values.type)).cast(pa.int64())
            if none := values.null_count:
                what = "ImageNet-1k class" if labels == "imagenet" else labels
                advice = "take those that are, as with release.subset(imagenet=True)"
                raise UsageError(f"{none} of {len(release)} images are of no {what}; {advice}")
            # A copy: Arrow's own memory is read-only, and torch wants it writable.
            self.targets = values.to_numpy().copy()
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.release)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = self.release.image(index)
        label: Any = self.targets.item(index)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label
