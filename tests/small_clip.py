"""A small CLIP that knows which caption each of the miniature's drawings has.

Both towers are random. Only the two projections are fitted, by ridge regression: images of a class
and its caption go to one code, so that a pair that belongs together has a higher cosine than one
that does not, in drawings that it was fitted on and in others.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sdwn.models.builtin import builtin_folder
from tools.miniature.backgrounds import SIDE
from tools.miniature.pictures import Pictures, is_drawn
from tools.miniature.table import glosses, read_table
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

# The classes whose drawings need no pictogram, by wnid, and their captions.
SUBJECTS = {one.wnid: one for one in read_table() if all(map(is_drawn, one.pictures))}
CAPTIONS = dict(zip(SUBJECTS, glosses(list(SUBJECTS.values())), strict=True))
# A caption that tells nothing: as near to the drawings of one class as to those of another.
EMPTY = "a drawing of something"
# Of each code, what all have in common: an image and another class's caption have this cosine.
SHARED = 0.2
# Drawings of each class that it is fitted on, from seeds of their own.
FITTED, FIRST_SEED = 24, 1000
WIDTH = 256


def drawings(wnids: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """Draw a picture of each of these classes, 64 x 64; another seed, other pictures."""
    places = [list(SUBJECTS).index(wnid) for wnid in wnids]
    streams = (np.random.default_rng((seed, number)) for number in range(len(places)))
    drawn = map(_pictures().draw, places, streams)
    return [Image.fromarray(pixels) for pixels in drawn]


@functools.cache
def _pictures() -> Pictures:
    # Without pictograms it fetches nothing into the folder.
    return Pictures(list(SUBJECTS.values()), Path(tempfile.gettempdir()))


def save_small_clip(folder: Path) -> None:
    """Fit it, and save it with its tokenizer and image processor as ``from_pretrained`` reads."""
    words = CLIPTokenizer.from_pretrained(builtin_folder("miniature") / "tokenizer")
    size = {"height": SIDE, "width": SIDE}
    prepare = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    codes = len(SUBJECTS) + 1
    ends = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos")}
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 4, "projection_dim": codes}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **ends, "vocab_size": len(words)},
            vision_config={**tower, "image_size": SIDE, "patch_size": 16},
            projection_dim=codes,
        )
    ).eval()
    # What the norms give then has a constant sum, for the projections have no bias.
    torch.nn.init.ones_(model.vision_model.post_layernorm.bias)
    torch.nn.init.ones_(model.text_model.final_layer_norm.bias)
    wanted = np.eye(codes)
    wanted[:-1, -1] = np.sqrt(SHARED / (1 - SHARED))
    seeds = range(FIRST_SEED, FIRST_SEED + FITTED)
    pictures = [one for seed in seeds for one in drawings(list(SUBJECTS), seed)]
    texts = words([*CAPTIONS.values(), EMPTY], padding=True, return_tensors="pt")
    with torch.inference_mode():
        seen = model.vision_model(**prepare(pictures, return_tensors="pt")).pooler_output
        read = model.text_model(**texts).pooler_output
        _fit(model.visual_projection, seen, np.tile(wanted[:-1], (FITTED, 1)), 0.3)
        _fit(model.text_projection, read, wanted, 1e-6)
    for part in (model, words, prepare):
        part.save_pretrained(folder)


def _fit(linear: torch.nn.Linear, inputs: torch.Tensor, wanted: np.ndarray, ridge: float) -> None:
    rows = inputs.double().numpy()
    weights = np.linalg.solve(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T @ wanted)
    linear.weight.copy_(torch.from_numpy(weights.T))
