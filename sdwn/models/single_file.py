"""Converting a single file of weights to a folder in diffusers format."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import snapshot_download
from safetensors import safe_open

from sdwn.config import ModelConfig
from sdwn.errors import SdwnError, first_line
from sdwn.io import read_json
from sdwn.models.weights import INDEX

# Settings and vocabularies, without weights.
_SETTINGS = ("*.json", "*.txt", "*.model")


def convert(model: ModelConfig, folder: Path) -> None:
    """Write a model's single file in diffusers format, its weights in the type that they have.

    Raises:
        SdwnError: its settings cannot be had, or diffusers does not know what it is.
    """
    file = Path(model.name).expanduser()
    settings = _settings_folder(model, file)
    pipeline = str(read_json(settings / INDEX).get("_class_name"))
    with safe_open(file, framework="pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    floats = {kind for kind in kinds if kind in (*halves, "F32")}
    dtype = halves[floats.pop()] if len(floats) == 1 and "F32" not in floats else torch.float32
    diffusers.utils.logging.disable_progress_bar()
    try:
        kind = getattr(diffusers, pipeline)
        loaded = kind.from_single_file(str(file), config=str(settings), dtype=dtype)
    except Exception as error:  # of many kinds, by what is in the file
        raise SdwnError(
            f"model {file}: diffusers cannot convert it as {pipeline}: {first_line(error)}; give "
            "a folder in diffusers format of a model of its kind with model.config"
        ) from error
    loaded.save_pretrained(folder)


def _settings_folder(model: ModelConfig, file: Path) -> Path:
    """Return the folder with a pipeline's settings that fit a file; the hub's are fetched."""
    name = model.config
    if name and Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        if not name:
            checkpoint = load_single_file_checkpoint(str(file))
            name = str(fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"])
        return Path(snapshot_download(name, allow_patterns=list(_SETTINGS)))
    except Exception as error:  # each of the HTTP libraries that hub's has used has its own
        raise SdwnError(
            f"model {file}: its settings could not be downloaded from {name} on the hub: "
            f"{first_line(error)}; run sdwn prefetch where there is a network, or set "
            "model.config to a folder in diffusers format of the same architecture"
        ) from error
