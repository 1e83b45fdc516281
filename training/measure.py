"""What the judge makes of the pictures that were trained on, and of those that are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sdwn.files import csv_text, write_text
from sdwn.judging.classify import load_classifier

from training.assemble import load, recognised, sample
from training.backgrounds import Pixels
from training.pictures import Pictures
from training.table import Subject, glosses

JUDGE = "efficientnet-lite0"

Drawn = Callable[[int], Pixels]


def measure(
    subjects: Sequence[Subject], folder: Path, packages: Path, images: int, guidance: float
) -> float:
    """Judge so many training pictures and drawn ones of each class; give the drawn ones' share.

    The counts of each class go to ``recognised.csv`` in ``folder``, whose pipeline it is.
    """
    pictures, prompts = Pictures(subjects, packages), glosses(subjects)
    pipeline = load(folder / "pipeline")

    def trained(number: int) -> Pixels:
        places = range(len(subjects))
        return np.stack([pictures.draw(n, np.random.default_rng((13, n, number))) for n in places])

    seen = _counts(subjects, images, trained)
    drawn = _counts(subjects, images, lambda number: sample(pipeline, prompts, number, guidance))
    header = ("wnid", "synset", "images", "training_pictures", "drawn")
    rows = (
        (one.wnid, one.synset, images, *counts)
        for one, *counts in zip(subjects, seen, drawn, strict=True)
    )
    write_text(folder / "recognised.csv", csv_text(header, rows))
    return sum(drawn) / (images * len(subjects))


def _counts(subjects: Sequence[Subject], images: int, draw: Drawn) -> list[int]:
    judge = load_classifier(JUDGE)
    hits = [recognised(judge, subjects, draw(number)) for number in range(images)]
    return [int(count) for count in np.sum(hits, axis=0)]
