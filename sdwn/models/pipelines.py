"""Loading: a config's model as a diffusers pipeline, placed and prepared."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from safetensors import SafetensorError

from sdwn.config import ModelConfig, RunConfig
from sdwn.devices.device import Device
from sdwn.errors import SdwnError, UsageError, first_line
from sdwn.models.builtin import builtin_folder
from sdwn.models.hub import fetch_weights
from sdwn.models.settings import require_safety_checker, require_scheduler
from sdwn.models.staging import staged_if_asked
from sdwn.models.weights import Weights, find_weights, fingerprint, is_commit, located, source

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def obtained(config: RunConfig) -> Weights:
    """Find a config's weights, or get them: a built-in model is made, the hub is asked.

    It is not asked for a commit that its cache has.

    Raises:
        UsageError: the model's name is no folder, and no name that the hub could know.
        IntegrityError: a part of the model is missing in its folder.
        SdwnError: the hub does not give it.
    """
    model = config.model
    if (kind := source(model)) != "hub":
        folder = builtin_folder(str(model.builtin)) if kind == "builtin" else located(config)
        return Weights(folder, fingerprint(folder))
    found = find_weights(config) if is_commit(model.revision) else None
    return found or fetch_weights(config)


def load(config: RunConfig, weights: Weights, device: Device) -> Any:
    """Load a config's pipeline onto a device.

    Raises:
        UsageError: the config asks for a scheduler or safety checker that this model has not.
        SdwnError: the model cannot be loaded.
    """
    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipeline = _from_config(config, staged_if_asked(weights.folder))
    own = pipeline.scheduler
    name = config.generation.scheduler or type(own).__name__
    require_scheduler(name, own, type(pipeline).__name__)
    pipeline.scheduler = getattr(diffusers, name).from_config(own.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device.torch)
    if config.generation.channels_last:
        for part in (denoiser(pipeline), getattr(pipeline, "vae", None)):
            if part is not None:
                part.to(memory_format=torch.channels_last)
    if config.generation.compile:
        network = denoiser(pipeline)
        # One block is compiled and serves all its likes.
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks()
        else:
            network.compile()
    return pipeline


def require_device(config: RunConfig, device_type: str) -> None:
    """Refuse a config whose precision a device cannot run.

    ``device_type`` is torch's, as ``cuda`` or ``cpu``. Built-in models are small enough for
    half precision on a CPU.

    Raises:
        UsageError: half precision without a GPU.
    """
    if config.needs_gpu and device_type == "cpu":
        raise UsageError(
            "precision fp16 needs a GPU and none was found; "
            "plan with --set generation.precision=fp32 to run on the CPU"
        )


def denoiser(pipeline: Any) -> Any:
    """Give the network that takes the steps: a UNet or a transformer."""
    return getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)


def _from_config(config: RunConfig, folder: Path) -> Any:
    wanted = config.generation.safety_checker
    without: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    dtype = DTYPES[config.generation.precision]
    options = {"dtype": dtype, **({} if wanted else without)}
    pipeline = _from_pretrained(config.model, folder, **options)
    if denoiser(pipeline) is None:
        raise SdwnError(
            f"model {config.model.name}: {type(pipeline).__name__} has neither a UNet nor a "
            "transformer; expected a text-to-image pipeline such as Stable Diffusion 1, 2 or XL"
        )
    require_safety_checker(config, there=getattr(pipeline, "safety_checker", None) is not None)
    return pipeline


def _from_pretrained(model: ModelConfig, folder: Path, **options: Any) -> Any:
    try:
        return diffusers.AutoPipelineForText2Image.from_pretrained(
            folder, variant=model.variant, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SdwnError(
            f"model {model.name}: the folder {folder} cannot be loaded; check that it is whole, "
            f"with safetensors weights: {first_line(error)}"
        ) from error


def provenance(
    config: RunConfig, weights: Weights, pipeline: Any, device: Device
) -> dict[str, Any]:
    """Say what samples: model and revision, scheduler, precision, device, versions."""
    return {
        "model": config.model.name,
        "revision": weights.revision,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": config.generation.precision,
        "device": device.name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
