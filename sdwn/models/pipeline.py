"""Loading a config's pipeline onto a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdwn.config import RunConfig
from sdwn.devices.device import plain_out_of_memory
from sdwn.errors import SdwnError, first_line
from sdwn.models.families import check_settings, denoiser
from sdwn.models.weights import Weights, staged_if_wanted

if TYPE_CHECKING:
    import torch

    from sdwn.devices.device import Device


def dtype(config: RunConfig) -> torch.dtype:
    """Return the type of a config's weights."""
    import torch

    precisions = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return precisions[config.generation.precision]


def load_pipeline(config: RunConfig, weights: Weights, device: Device) -> Any:
    """Load a config's pipeline onto a device.

    Raises:
        UsageError: the config asks for a scheduler or safety checker that this model has not.
        SdwnError: the model cannot be loaded.
    """
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    generation = config.generation
    check_settings(config, weights.folder)
    folder = staged_if_wanted(weights.folder)
    without = {"safety_checker": None, "requires_safety_checker": False}
    options: dict[str, Any] = {} if generation.safety_checker else without
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            folder,
            variant=config.model.variant,
            use_safetensors=True,
            dtype=dtype(config),
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SdwnError(
            f"model {config.model.name}: the folder {folder} cannot be loaded; check that it is "
            f"whole, with safetensors weights: {first_line(error)}"
        ) from error
    network = denoiser(pipeline)
    if network is None:
        raise SdwnError(
            f"model {config.model.name}: {type(pipeline).__name__} has neither a UNet nor a "
            "transformer; expected a text-to-image pipeline such as Stable Diffusion 1, 2 or XL"
        )
    own = pipeline.scheduler
    scheduler = generation.scheduler or type(own).__name__
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    pipeline.set_progress_bar_config(disable=True)
    if (vae := getattr(pipeline, "vae", None)) is not None:
        # SANA's pipelines catch torch's own error, and fail later for want of an image.
        vae.decode = plain_out_of_memory()(vae.decode)
    pipeline.to(device.torch)
    if generation.channels_last:
        for part in (network, getattr(pipeline, "vae", None)):
            if part is not None:
                part.to(memory_format=torch.channels_last)
    if generation.compile:
        # One block is compiled and serves all its likes.
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks()
        else:
            network.compile()
    return pipeline
