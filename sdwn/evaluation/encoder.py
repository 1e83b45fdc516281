"""A generation model's own text encoder, to place names as the model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.config import ModelConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.models.weights import snapshot, source

BATCH = 64
PARTS = ("tokenizer", "text_encoder")


class NoEncoderError(SdwnError):
    """A model without a text encoder that can be used here; the message says why."""


def encoder_folder(model: ModelConfig, revision: str | None = None) -> Path:
    """Find the folder of a model that has a text encoder, without the network.

    Raises:
        NoEncoderError: there is none.
    """
    if model.builtin == "noise":
        raise NoEncoderError(f"{model.name} has no text encoder")
    folder = _folder(model, revision)
    if folder is None:
        raise NoEncoderError(f"the weights of {model.name} are not on this machine")
    if not all((folder / part).is_dir() for part in PARTS):
        raise NoEncoderError(f"{model.name} has no text encoder")
    return folder


def _folder(model: ModelConfig, revision: str | None) -> Path | None:
    if model.builtin is not None:
        from sdwn.models.builtin import builtin_folder  # torch and diffusers

        try:
            return builtin_folder(model.builtin)
        except IntegrityError as error:
            raise NoEncoderError(str(error)) from None
    try:
        kind = source(model)
    except UsageError:
        return None
    if kind == "folder":
        return Path(model.name).expanduser()
    return snapshot(model.name, revision or model.revision)


def encode(folder: Path, variant: str | None, names: Sequence[str]) -> NDArray[np.float32]:
    """Give the pooled output for each name, on the CPU and in float32.

    Raises:
        NoEncoderError: it is no CLIP text model, or cannot be loaded.
    """
    import torch

    try:
        tokenizer, model = _loaded(folder, variant)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NoEncoderError(f"the text encoder in {folder} cannot be loaded: {reason}") from None
    pooled: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for start in range(0, len(names), BATCH):
            batch = list(names[start : start + BATCH])
            tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            found = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            pooled.append(found.pooler_output.numpy())
    return np.concatenate(pooled)


def _loaded(folder: Path, variant: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = AutoConfig.from_pretrained(folder, subfolder="text_encoder").model_type
    if not kind.startswith("clip"):
        raise ValueError(f"expected CLIP's, found {kind}")
    # Not every part of a pipeline has to have the variant.
    has_variant = (folder / "text_encoder" / f"model.{variant}.safetensors").is_file()
    options = {"variant": variant if has_variant else None, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    model = CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.float32, **options
    )
    return tokenizer, model.eval()
