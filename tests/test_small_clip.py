"""The small CLIP that other tests take: what it knows of drawings that it was not fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from small_clip import CAPTIONS, EMPTY, drawings


def test_captions_are_nearer_to_their_own_drawings_than_to_others(small_clip: Path) -> None:
    model = CLIPModel.from_pretrained(small_clip)
    prepare = CLIPImageProcessor.from_pretrained(small_clip)
    words = CLIPTokenizer.from_pretrained(small_clip)
    own = np.tile(np.arange(len(CAPTIONS)), 4)
    pictures = [one for seed in range(4) for one in drawings(list(CAPTIONS), seed)]
    texts = words([*CAPTIONS.values(), EMPTY], padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = model(**prepare(pictures, return_tensors="pt"), **texts)
        cosines = (found.image_embeds @ found.text_embeds.T).numpy()
    matched, empty = cosines[np.arange(len(own)), own], cosines[:, -1]
    others = (cosines[:, :-1].sum(axis=1) - matched) / (len(CAPTIONS) - 1)
    assert matched.mean() > others.mean() + 0.4
    assert (matched > others).mean() > 0.9
    by_class = [empty[own == one].mean() for one in range(len(CAPTIONS))]
    assert np.std(by_class) < 0.15
