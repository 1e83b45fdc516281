"""The share of pictures that a classifier recognises: of those trained on, and of those drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from sdwn.io import csv_text, write_text
from sdwn.prediction.network import Classifier
from sdwn.wordnet.corpus import class_index

from tools.miniature.backgrounds import SIDE, Pixels
from tools.miniature.choosing import logits
from tools.miniature.pictures import Pictures
from tools.miniature.table import Subject, glosses

JUDGE = "efficientnet-lite0"
STEPS = 20
GUIDANCE = 3.0

Drawn = Callable[[int], Pixels]


def measure(
    judge: Classifier, pictures: Pictures, folder: Path, images: int, guidance: float
) -> float:
    """Judge so many training pictures and drawn ones of each class; give the drawn ones' share.

    The counts of each class go to ``recognised.csv`` in ``folder``, whose pipeline it is.
    """
    subjects, pipeline = pictures.subjects, _load(folder / "pipeline")
    prompts = glosses(subjects)

    def trained(number: int) -> Pixels:
        places = range(len(subjects))
        return np.stack([pictures.draw(n, np.random.default_rng((13, n, number))) for n in places])

    def counts(draw: Drawn) -> list[int]:
        hits = [_recognised(judge, subjects, draw(number)) for number in range(images)]
        return [int(count) for count in np.sum(hits, axis=0)]

    seen = counts(trained)
    drawn = counts(lambda number: _sample(pipeline, prompts, number, guidance))
    header = ("wnid", "synset", "images", "training_pictures", "drawn")
    rows = (
        (one.wnid, one.synset, images, *found)
        for one, *found in zip(subjects, seen, drawn, strict=True)
    )
    write_text(folder / "recognised.csv", csv_text(header, rows))
    return sum(drawn) / (images * len(subjects))


def _load(folder: Path) -> StableDiffusionPipeline:
    """Read a pipeline, for float32."""
    made: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def _sample(
    made: StableDiffusionPipeline, prompts: Sequence[str], number: int, guidance: float
) -> Pixels:
    """Draw image ``number`` of each prompt, (n, 64, 64, 3) uint8; its seed is place and number."""
    seeds = [torch.Generator().manual_seed(1000 * place + number) for place in range(len(prompts))]
    drawn = made(
        list(prompts),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=seeds,
        height=SIDE,
        width=SIDE,
        output_type="np",
    ).images
    pixels: Pixels = (255 * drawn).round().astype(np.uint8)
    return pixels


def _recognised(judge: Classifier, subjects: Sequence[Subject], pixels: Pixels) -> list[bool]:
    """Return of each subject's picture whether the judge classifies it as that class."""
    index, guesses = class_index(), logits(judge, pixels).argmax(dim=1).tolist()
    return [guess == index[one.wnid] for guess, one in zip(guesses, subjects, strict=True)]
