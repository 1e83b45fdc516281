"""Make the miniature, from the table of its classes to a folder that diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from training import assemble
from training.fit_text import fit_text, token_numbers, tokenizer
from training.fit_unet import Bank, fit_unet
from training.fit_vae import Coder, fit_vae, standardised
from training.loop import Schedule
from training.pictures import DRAWN, Pictures
from training.table import Subject, glosses, read_table


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long each part is trained, and on how many pictures.

    ``latents`` is how many pictures of each class the UNet learns from. ``drawn`` leaves out the
    classes that need pictograms, ``most`` all but the first so many.
    """

    text: Schedule
    vae: Schedule
    unet: Schedule
    vae_batch: int = 16
    unet_batch: int = 64
    latents: int = 256
    drawn: bool = False
    most: int | None = None


FULL = Recipe(
    text=Schedule(steps=600, rate=2e-3, rising=50, averaged=0.99),
    vae=Schedule(steps=9_000, rate=1.5e-3),
    unet=Schedule(steps=30_000, rate=1e-3, averaged=0.9995),
)
SHORT = Recipe(
    text=Schedule(steps=20, rate=2e-3, rising=5, averaged=0.9),
    vae=Schedule(steps=4, rate=1e-3, rising=2),
    unet=Schedule(steps=4, rate=1e-3, rising=2),
    vae_batch=4,
    unet_batch=8,
    latents=2,
    drawn=True,
    most=4,
)


def make(recipe: Recipe, folder: Path, packages: Path) -> Path:
    """Train what is not trained yet and give the folder of the pipeline.

    ``folder`` keeps each part's checkpoint: a call that was interrupted goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subjects = chosen(recipe)
    prompts = glosses(subjects)
    words = tokenizer(prompts, folder / "tokenizer")
    reader = fit_text(words, prompts, recipe.text, folder / "text.pt")
    pictures = Pictures(subjects, packages)
    coder = fit_vae(pictures, recipe.vae, recipe.vae_batch, folder / "vae.pt")
    latents = _latents(coder, pictures, recipe.latents, folder / "latents.pt")
    bank = Bank(*latents, _texts(words, reader, prompts))
    unet = fit_unet(bank, recipe.unet, recipe.unet_batch, folder / "unet.pt")
    made = folder / "pipeline"
    assemble.save(assemble.Trained(_finished(coder), words, reader, unet), made)
    return made


def chosen(recipe: Recipe) -> tuple[Subject, ...]:
    """Take a recipe's classes out of the table."""
    subjects = read_table()
    if recipe.drawn:
        subjects = tuple(one for one in subjects if one.pictures[0].startswith(DRAWN))
    return subjects[: recipe.most]


def _finished(coder: Coder) -> AutoencoderKL:
    return standardised(coder).requires_grad_(requires_grad=False).eval()


@torch.inference_mode()
def _texts(words: CLIPTokenizer, reader: CLIPTextModel, prompts: Sequence[str]) -> torch.Tensor:
    numbers = token_numbers(words, [*prompts, ""])
    texts: torch.Tensor = reader(numbers).last_hidden_state.clone()
    return texts


@torch.inference_mode()
def _latents(
    coder: Coder, pictures: Pictures, each: int, path: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw so many pictures of each class and encode them, unless they are there."""
    subjects = torch.arange(len(pictures)).repeat_interleave(each)
    if path.exists():
        return torch.load(path, weights_only=True), subjects
    made = []
    for subject in range(len(pictures)):
        random = np.random.default_rng((9, subject))
        made.append(coder.encode(pictures.batch([subject] * each, random)).half())
    unfinished = path.with_suffix(".unfinished")
    torch.save(torch.cat(made), unfinished)
    unfinished.replace(path)
    return torch.cat(made).clone(), subjects
