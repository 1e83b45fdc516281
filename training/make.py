"""Make the miniature, from the table of its classes to a folder that diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from training import assemble
from training.choosing import latents
from training.fit_text import fit_text, token_numbers, tokenizer
from training.fit_unet import Bank, fit_unet
from training.fit_vae import Coder, fit_vae, standardised
from training.loop import Schedule
from training.pictures import DRAWN, Pictures
from training.table import Subject, glosses, read_table


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long each part is trained, and on how many pictures.

    The UNet learns from ``latents`` of ``pictures`` drawn of each class. ``drawn`` leaves out the
    classes that need pictograms, ``most`` all but the first so many.
    """

    text: Schedule
    vae: Schedule
    unet: Schedule
    vae_batch: int = 16
    unet_batch: int = 32
    pictures: int = 64
    latents: int = 16
    drawn: bool = False
    most: int | None = None


FULL = Recipe(
    text=Schedule(steps=600, rate=2e-3, rising=50, averaged=0.99),
    vae=Schedule(steps=4_000, rate=1.5e-3),
    unet=Schedule(steps=7_000, rate=1e-3),
)
SHORT = Recipe(
    text=Schedule(steps=20, rate=2e-3, rising=5, averaged=0.9),
    vae=Schedule(steps=4, rate=1e-3, rising=2),
    unet=Schedule(steps=4, rate=1e-3, rising=2),
    vae_batch=4,
    unet_batch=8,
    pictures=4,
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
    learnt = _bank(recipe, coder, pictures, subjects, folder / "latents.pt")
    places = torch.arange(len(subjects)).repeat_interleave(recipe.latents)
    bank = Bank(learnt, places, _texts(words, reader, prompts))
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


def _bank(
    recipe: Recipe, coder: Coder, pictures: Pictures, subjects: tuple[Subject, ...], path: Path
) -> torch.Tensor:
    if path.exists():
        found: torch.Tensor = torch.load(path, weights_only=True)
        return found
    found = latents(coder, pictures, subjects, recipe.pictures, recipe.latents)
    unfinished = path.with_suffix(".unfinished")
    torch.save(found, unfinished)
    unfinished.replace(path)
    return found
