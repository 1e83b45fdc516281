"""A classifier of images: a timm network whose outputs are scored by ImageNet class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from timm.data import infer_imagenet_subset

from sdwn.prediction.network import ImageNetwork, Outputs, Row
from sdwn.prediction.table import IMAGE, SCHEMA, TOP
from sdwn.wordnet.imagenet import class_wnids, classifier_wnids
from sdwn.wordnet.taxonomy import NearestSubtree


class Classifier(ImageNetwork):
    """A timm network that classifies images.

    ``classes`` is the wnid of each output, or its name where the classes are its own. Of a synset
    in ``subtrees``, the probability of its nearest subtree is summed.
    """

    kind = "classifier"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        own = self.record.get("class_names", ())
        self.classes = own or classifier_wnids(int(self.network.num_classes))  # type: ignore[arg-type]
        self.subtrees: Mapping[str, NearestSubtree] = {}
        output_of = {wnid: output for output, wnid in enumerate(self.classes)}
        # The output of each ImageNet-1k class, -1 where the classifier lacks it, or of its own.
        self._outputs = torch.tensor([output_of.get(wnid, -1) for wnid in own or class_wnids()])
        self.record |= {
            "classes": len(self.classes),
            "class_list": infer_imagenet_subset({"num_classes": len(self.classes)}),
            "unknown_imagenet_classes": int((self._outputs < 0).sum()),
        }

    def finish(
        self,
        logits: Outputs,
        labels: Sequence[int | None],
        subtrees: Sequence[tuple[int, ...] | None],
    ) -> dict[str, NDArray[Any]]:
        """Wait for a batch and score it.

        Args:
            logits: as :meth:`start` returned them.
            labels: index of each image's ImageNet-1k class, None without one.
            subtrees: for each image, the classifier's own classes whose probabilities are summed.

        Returns:
            ``top5`` (n, 5) int16, indices of ImageNet-1k classes, best first;
            ``top5_probability`` (n, 5), their softmax over the 1000 classes; ``label_rank`` (n,)
            int16, the label's rank among these, 0 the best, -1 without a label;
            ``label_probability`` (n,), NaN without a label; ``subtree_probability`` (n,), the
            softmax over all classes that the classifier knows, summed over a subtree, NaN without
            one. Of equal classes the lower index is the better, so ``label_rank`` is below 5
            exactly when the label is in ``top5``. A class that the classifier does not know has
            probability 0 and a rank after all others.
        """
        values = self.wait(logits)
        # Sorting logits, not probabilities: those of unlikely classes are all 0.
        known = values[:, self._outputs.clamp(min=0)].masked_fill(self._outputs < 0, -torch.inf)
        ordered, order = known.sort(dim=1, descending=True, stable=True)
        probability = ordered.softmax(dim=1)
        target = torch.tensor([-1 if label is None else label for label in labels])
        rank = (order == target[:, None]).int().argmax(dim=1)
        of_label = probability.gather(1, rank[:, None])[:, 0]
        # Images of one synset follow one another: a sum for each subtree, not for each image.
        every, mass = values.softmax(dim=1), torch.full((len(values),), torch.nan)
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, subtree in enumerate(subtrees):
            if subtree is not None:
                rows.setdefault(subtree, []).append(row)
        for subtree, chosen in rows.items():
            mass[chosen] = every[chosen][:, list(subtree)].sum(dim=1)
        return {
            "top5": order[:, :TOP].short().numpy(),
            "top5_probability": probability[:, :TOP].numpy(),
            "label_rank": rank.masked_fill(target < 0, -1).short().numpy(),
            "label_probability": of_label.masked_fill(target < 0, torch.nan).numpy(),
            "subtree_probability": mass.numpy(),
        }

    def rows(self, records: Sequence[Row], outputs: Outputs) -> pa.Table:
        """Wait for a batch and return its predictions."""
        around = [self.subtrees.get(row["wnid"]) for row in records]
        scores = self.finish(
            outputs,
            [row["imagenet_class"] for row in records],
            [None if subtree is None else subtree.classes for subtree in around],
        )
        columns: dict[str, Any] = {name: [row[name] for row in records] for name in IMAGE}
        for name in ("top5", "top5_probability"):
            columns[name] = pa.array(list(scores[name]), SCHEMA.field(name).type)
        for name in ("label_rank", "label_probability", "subtree_probability"):
            none = (scores[name] < 0) | np.isnan(scores[name])
            columns[name] = pa.array(scores[name], SCHEMA.field(name).type, mask=none)
        return pa.table(columns, schema=SCHEMA)
