"""The parts as a pipeline in diffusers' format, and what a judge makes of its pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from sdwn.judging.classify import Classifier
from sdwn.synsets.imagenet import class_index
from transformers import CLIPTextModel, CLIPTokenizer

from training import parts
from training.backgrounds import Pixels
from training.table import Subject

# What CLIP's tokenizer is read from before transformers 5, which writes tokenizer.json alone.
WORDS = ("vocab.json", "merges.txt")
STEPS = 20
GUIDANCE = 3.0


@dataclass(frozen=True, slots=True)
class Trained:
    """The trained parts of a pipeline."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel


def pipeline(trained: Trained) -> StableDiffusionPipeline:
    """Put the parts together."""
    made = StableDiffusionPipeline(
        vae=trained.vae,
        text_encoder=trained.text_encoder,
        tokenizer=trained.tokenizer,
        unet=trained.unet,
        scheduler=parts.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def save(trained: Trained, folder: Path) -> None:
    """Write the pipeline in half precision, for earlier releases of its libraries too."""
    pipeline(trained).to(torch.float16).save_pretrained(folder)
    for name in WORDS:
        shutil.copy(Path(trained.tokenizer.name_or_path) / name, folder / "tokenizer" / name)
    _name_as_clip(folder / "text_encoder" / "model.safetensors")
    for path in folder.rglob("*.safetensors"):
        # safetensors writes for the owner alone, but an installation is everybody's.
        shutil.copymode(folder / "model_index.json", path)


def _name_as_clip(path: Path) -> None:
    """Name weights as CLIP's are: transformers before 5 knows no others, 5 knows both."""
    named = {
        f"text_model.{key.removeprefix('text_model.')}": v for key, v in load_file(path).items()
    }
    save_file(named, path, {"format": "pt"})


def load(folder: Path) -> StableDiffusionPipeline:
    """Read a pipeline, for float32."""
    made: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def sample(
    made: StableDiffusionPipeline, prompts: Sequence[str], number: int, guidance: float = GUIDANCE
) -> Pixels:
    """Draw image ``number`` of each prompt, (n, 64, 64, 3) uint8; its seed is place and number."""
    seeds = [torch.Generator().manual_seed(1000 * place + number) for place in range(len(prompts))]
    drawn = made(
        list(prompts),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=seeds,
        height=parts.SIDE,
        width=parts.SIDE,
        output_type="np",
    ).images
    pixels: Pixels = (255 * drawn).round().astype(np.uint8)
    return pixels


def recognised(judge: Classifier, subjects: Sequence[Subject], pixels: Pixels) -> list[bool]:
    """Tell of each subject's picture whether the judge takes it for that class."""
    index = class_index()
    hits = []
    for start in range(0, len(pixels), 32):
        some = np.stack([judge.prepare(Image.fromarray(one)) for one in pixels[start : start + 32]])
        guesses = judge.start(some).values.argmax(dim=1).tolist()
        wanted = [index[one.wnid] for one in subjects[start : start + 32]]
        hits += [guess == right for guess, right in zip(guesses, wanted, strict=True)]
    return hits
