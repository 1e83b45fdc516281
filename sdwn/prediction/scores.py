"""What logits say of images: the best classes, the label's place, the mass of a subtree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sdwn.prediction.predictions import TOP


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """What a classifier says of n images.

    ``top5`` (n, 5) int16, indices of ImageNet-1k classes, best first; ``top5_probability``
    (n, 5) float32, their softmax over the 1000 classes; ``label_rank`` (n,) int16, the label's
    place among these, 0 the best, -1 without a label; ``label_probability`` (n,) float32, NaN
    without a label; ``subtree_probability`` (n,) float32, the softmax over all classes that the
    classifier knows, summed over those asked for, NaN where none were. Of equal classes the
    lower index is the better, so ``label_rank`` is below 5 exactly when the label is in
    ``top5``.
    """

    top5: NDArray[np.int16]
    top5_probability: NDArray[np.float32]
    label_rank: NDArray[np.int16]
    label_probability: NDArray[np.float32]
    subtree_probability: NDArray[np.float32]


def score(
    logits: torch.Tensor,
    columns: torch.Tensor,
    labels: Sequence[int | None],
    subtrees: Sequence[tuple[int, ...] | None],
) -> Scores:
    """Score a batch's logits, float32 of shape (n, classes), on the CPU.

    Args:
        logits: as the classifier gives them.
        columns: the output of each of the 1000 ImageNet-1k classes; -1 for one that the
            classifier does not know, whose probability is 0 and whose place is after all others.
        labels: index of each image's ImageNet-1k class, None without one.
        subtrees: the classifier's own classes whose probabilities are to be summed.
    """
    # Sorting logits, not probabilities: those of unlikely classes are all 0.
    known = logits[:, columns.clamp(min=0)].masked_fill(columns < 0, -torch.inf)
    ordered, order = known.sort(dim=1, descending=True, stable=True)
    probability = ordered.softmax(dim=1)
    target = torch.tensor([-1 if label is None else label for label in labels])
    rank = (order == target[:, None]).int().argmax(dim=1)
    of_label = probability.gather(1, rank[:, None])[:, 0]
    return Scores(
        top5=order[:, :TOP].short().numpy(),
        top5_probability=probability[:, :TOP].numpy(),
        label_rank=rank.masked_fill(target < 0, -1).short().numpy(),
        label_probability=of_label.masked_fill(target < 0, torch.nan).numpy(),
        subtree_probability=_mass(logits, subtrees).numpy(),
    )


def _mass(logits: torch.Tensor, subtrees: Sequence[tuple[int, ...] | None]) -> torch.Tensor:
    probability, mass = logits.softmax(dim=1), torch.full((len(logits),), torch.nan)
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, subtree in enumerate(subtrees):
        if subtree is not None:
            rows.setdefault(subtree, []).append(row)
    for subtree, chosen in rows.items():
        mass[chosen] = probability[chosen][:, list(subtree)].sum(dim=1)
    return mass
