"""The parts as a pipeline in diffusers' format."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tools.miniature import parts

# What CLIP's tokenizer is read from before transformers 5, which writes tokenizer.json alone.
WORDS = ("vocab.json", "merges.txt")


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
