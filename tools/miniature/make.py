"""Make the miniature, from the table of its classes to a folder that diffusers loads."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from sdwn.errors import SdwnError
from sdwn.io import atomic, file_sha256
from transformers import CLIPTextModel, CLIPTokenizer

from tools.miniature import assemble
from tools.miniature.choosing import latents, load_chooser
from tools.miniature.fit_text import fit_text, token_numbers, tokenizer
from tools.miniature.fit_unet import Bank, fit_unet
from tools.miniature.fit_vae import Coder, fit_vae, standardised
from tools.miniature.loop import Schedule
from tools.miniature.pictures import Pictures, is_drawn
from tools.miniature.table import TABLE, Subject, glosses, read_table


@dataclass(frozen=True, slots=True)
class Recipe:
    """The training of each part: how long, and on how many pictures.

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


def make(recipe: Recipe, pictures: Pictures, folder: Path) -> Path:
    """Train what is not trained yet on pictures of a recipe's classes; give the pipeline's folder.

    ``folder`` keeps each part's checkpoint: a call that was interrupted goes on from there.

    Raises:
        SdwnError: the folder is another recipe's or table's, or another process trains there.
    """
    with _kept_to(recipe, folder):
        chooser = load_chooser()
        prompts = glosses(pictures.subjects)
        words = tokenizer(prompts, folder / "tokenizer")
        reader = fit_text(words, prompts, recipe.text, folder / "text.pt")
        coder = fit_vae(pictures, recipe.vae, recipe.vae_batch, folder / "vae.pt")
        path = folder / "latents.pt"
        if not path.exists():
            drawn, kept = recipe.pictures, recipe.latents
            found = latents(coder, pictures, chooser, drawn, kept)
            with atomic(path) as temporary:
                torch.save(found, temporary)
        learnt = torch.load(path, weights_only=True)
        places = torch.arange(len(pictures)).repeat_interleave(recipe.latents)
        bank = Bank(learnt, places, _texts(words, reader, prompts))
        unet = fit_unet(bank, recipe.unet, recipe.unet_batch, folder / "unet.pt")
        made = folder / "pipeline"
        assemble.save(assemble.Trained(_finished(coder), words, reader, unet), made)
        return made


@contextmanager
def _kept_to(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Keep a folder to one process, and to the recipe and the table that it began with."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps({"classes_sha256": file_sha256(TABLE), "recipe": asdict(recipe)}, indent=1)
    with (folder / "made_from.json").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SdwnError(f"{folder}: another process trains there") from None
        file.seek(0)
        if not (found := file.read()):
            file.write(wanted)
            file.flush()
        elif found != wanted:
            raise SdwnError(
                f"{folder}: what is trained there is of another recipe or table of classes "
                f"({file.name}); give a new folder"
            )
        yield


def chosen(recipe: Recipe) -> tuple[Subject, ...]:
    """Pick a recipe's classes from the table."""
    subjects = read_table()
    if recipe.drawn:
        subjects = tuple(one for one in subjects if all(map(is_drawn, one.pictures)))
    return subjects[: recipe.most]


def _finished(coder: Coder) -> AutoencoderKL:
    return standardised(coder).requires_grad_(requires_grad=False).eval()


@torch.inference_mode()
def _texts(words: CLIPTokenizer, reader: CLIPTextModel, prompts: Sequence[str]) -> torch.Tensor:
    numbers = token_numbers(words, [*prompts, ""])
    texts: torch.Tensor = reader(numbers).last_hidden_state.clone()
    return texts
