"""Families of pipelines: what each takes, and the settings that fit a model.

Any text-to-image pipeline of diffusers works, from plain texts. One whose class stands in
:data:`FAMILIES` is given each prompt's embedding, encoded once and alone, and each image's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdwn.config import RunConfig
from sdwn.errors import UsageError
from sdwn.io import read_json
from sdwn.models.weights import (
    INDEX,
    components,
    find_folder,
    source,
    weights_folder,
)


def denoiser(pipeline: Any) -> Any:
    """Return the network that takes the steps: a UNet or a transformer."""
    return getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)


def plain_latents(pipeline: Any, height: int, width: int) -> tuple[int, ...]:
    """Return (1, channels, height, width) of the noise of an image of so many pixels."""
    factor = pipeline.vae_scale_factor
    return 1, denoiser(pipeline).config.in_channels, height // factor, width // factor


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of pipeline, as far as sampling depends on it.

    Args:
        embeddings: what its ``encode_prompt`` returns, in order, by the names of its call's
            arguments; none: it encodes the texts itself, in every call.
        encoders: the tokenizer of each text encoder, and how many tokens this takes of a prompt;
            None: as many as the tokenizer says.
        latents: the shape of an image's noise, of a pipeline, a height and a width; None: it
            draws the noise itself.
        settings: those of ``generation`` that its call takes.
        encode_options: arguments of ``encode_prompt`` beside the prompts.
        call_options: arguments of its call beside all these.
        empty_negative: the negative prompt that stands for none.
    """

    embeddings: tuple[str, ...] = ()
    encoders: Mapping[str, int | None] = field(default_factory=lambda: {"tokenizer": None})
    latents: Callable[[Any, int, int], tuple[int, ...]] | None = plain_latents
    settings: tuple[str, ...] = ("num_inference_steps", "guidance_scale")
    encode_options: Mapping[str, Any] = field(default_factory=dict)
    call_options: Mapping[str, Any] = field(default_factory=dict)
    empty_negative: str | None = None

    def longest_reader(self, tokenizers: Mapping[str, Any]) -> tuple[Any, int]:
        """Return the tokenizer of the encoder that takes most of a prompt, and how many tokens."""
        limits = {
            name: limit or int(tokenizers[name].model_max_length)
            for name, limit in self.encoders.items()
        }
        name = max(limits, key=limits.__getitem__)
        return tokenizers[name], limits[name]


_PIXART = Family(
    embeddings=(
        *("prompt_embeds", "prompt_attention_mask"),
        *("negative_prompt_embeds", "negative_prompt_attention_mask"),
    ),
    encode_options={"clean_caption": True},
    # Left alone, it would sample one of its favourite sizes and shrink the image.
    call_options={"negative_prompt": None, "use_resolution_binning": False},
    empty_negative="",
)
# A pipeline of no family here.
FROM_TEXTS = Family(latents=None)
# By the pipeline's class. To add a family: a row here, and a small model of it in
# tests/families.py.
FAMILIES = {
    "StableDiffusionPipeline": Family(embeddings=("prompt_embeds", "negative_prompt_embeds")),
    "StableDiffusionXLPipeline": Family(
        embeddings=(
            *("prompt_embeds", "negative_prompt_embeds"),
            *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        ),
        encoders={"tokenizer": None, "tokenizer_2": None},
    ),
    # The limits are those of encode_prompt, below the tokenizer's own.
    "PixArtAlphaPipeline": replace(_PIXART, encoders={"tokenizer": 120}),
    "PixArtSigmaPipeline": replace(_PIXART, encoders={"tokenizer": 300}),
}

# Each of these can replace any other, which is known without diffusers' import of seconds.
INTERCHANGEABLE = {
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LMSDiscrete", "PNDM", "UniPCMultistep"),
    )
}
# Its steps draw noise for the batch as a whole, out of no image's generator.
_UNREPEATABLE = "DPMSolverSDEScheduler"
# Prompts whose tokens are counted before a run.
_MOST_COUNTED = 10_000


def require_usable(config: RunConfig) -> None:
    """Refuse a model that no task could load, and settings that do not fit it.

    Weights that are not on this machine are no reason, for they may be fetched later.
    """
    here = source(config.model) == "folder"
    check_settings(config, weights_folder(config) if here else find_folder(config))


def check_settings(config: RunConfig, folder: Path | None) -> None:
    """Refuse settings that the model in a folder does not take.

    Without a folder, only a scheduler that diffusers does not have is refused.
    """
    wanted, own, pipeline = config.generation.scheduler, None, ""
    if folder is not None:
        parts, pipeline = components(folder), str(read_json(folder / INDEX).get("_class_name"))
        if config.generation.safety_checker and "safety_checker" not in parts:
            raise UsageError(
                f"generation.safety_checker is true, but model {config.model.name} has none; "
                "plan with --set generation.safety_checker=false"
            )
        own = parts.get("scheduler")
    name = wanted or own
    if name == own and name != _UNREPEATABLE:
        return
    if name in INTERCHANGEABLE and own in (None, *INTERCHANGEABLE):
        return
    import diffusers  # takes seconds

    valid = {kind for kind in dir(diffusers) if kind.endswith("Scheduler")}
    if folder is not None and own in valid:
        scheduler = getattr(diffusers, own).from_pretrained(folder, subfolder="scheduler")
        valid = {kind.__name__ for kind in scheduler.compatibles} | {own}
    if name not in valid or name == _UNREPEATABLE:
        fault = f"{name} does not fit {pipeline}" if folder else f"diffusers has no {name}"
        fitting = ", ".join(sorted(valid - {_UNREPEATABLE}))
        raise UsageError(f"generation.scheduler: {fault}; valid: {fitting}")


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Numbers of prompts: ``counted``, and those ``cut`` at the encoder's ``limit`` of tokens."""

    counted: int
    cut: int
    limit: int

    def __str__(self) -> str:
        return f"{self.cut:,} of {self.counted:,} are longer than {self.limit} tokens"


def prompt_lengths(folder: Path | None, prompts: Iterable[str]) -> PromptLengths | None:
    """Count the tokens of at most 10,000 distinct prompts, spread evenly over all.

    Args:
        folder: a pipeline in diffusers format, None where its weights are not on this machine.
        prompts: also equal ones.

    Returns:
        None without a folder, or of a model without a tokenizer.
    """
    if folder is None or "tokenizer" not in (kinds := components(folder)):
        return None
    import transformers  # a second; its tokenizers come without torch

    family = FAMILIES.get(str(read_json(folder / INDEX).get("_class_name")), FROM_TEXTS)
    tokenizers = {
        name: getattr(transformers, kinds[name]).from_pretrained(folder / name)
        for name in family.encoders
    }
    tokenizer, limit = family.longest_reader(tokenizers)
    distinct = list(dict.fromkeys(prompts))
    chosen = distinct[:: -(-len(distinct) // _MOST_COUNTED)]
    encoded = tokenizer(chosen, truncation=False, verbose=False).input_ids
    return PromptLengths(len(chosen), sum(len(ids) > limit for ids in encoded), limit)
