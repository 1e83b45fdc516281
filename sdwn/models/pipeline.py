"""Loading a config's pipeline: its text encoders alone, then the rest, onto a device.

::

    load_text_encoders ──> prompts encoded ──> let go
    load_pipeline      ──────────────────────────────> denoiser, VAE, safety checker: sampling

A pipeline of no known family encodes the texts itself: it is loaded whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdwn.batches import Placement
from sdwn.config import RunConfig
from sdwn.devices.device import plain_out_of_memory
from sdwn.errors import SdwnError, first_line
from sdwn.models.families import check_settings, denoiser, read_pipeline_info
from sdwn.models.weights import Weights, components, staged_if_wanted

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from sdwn.devices.device import Device

# Parts that encoding needs; sampling needs none but a processor, which is read for its template.
_TEXT_PARTS = ("text_encoder", "tokenizer")
# What sampling an image needs beside weights, at least.
WORKING_BYTES = 2_000_000_000


def dtype(config: RunConfig) -> torch.dtype:
    """Return the type of a config's weights."""
    import torch

    precisions = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return precisions[config.generation.precision]


def load_text_encoders(
    config: RunConfig, weights: Weights, device: Device, placement: Placement
) -> Any:
    """Load a pipeline's text encoders and tokenizers, without any other weights."""
    parts = components(weights.folder)
    absent = {
        name for name in parts if not name.startswith((*_TEXT_PARTS, "processor", "scheduler"))
    }
    pipeline = _load(config, weights, absent)
    place(pipeline, device, placement)
    return pipeline


def load_pipeline(
    config: RunConfig, weights: Weights, device: Device, placement: Placement
) -> tuple[Any, str]:
    """Load what samples images of encoded prompts; a pipeline of no known family whole.

    Returns:
        The pipeline, and where its weights lie: ``cpu``, ``gpu`` or ``offload``.

    Raises:
        UsageError: the config asks for a scheduler or safety checker that this model has not.
        SdwnError: the model cannot be loaded.
    """
    import diffusers
    import torch

    generation, info = config.generation, read_pipeline_info(weights.folder)
    apart = info.family.embeddings
    absent = {name for name in info.parts if apart and name.startswith(_TEXT_PARTS)}
    pipeline = _load(config, weights, absent)
    network = denoiser(pipeline)
    if network is None:
        raise SdwnError(
            f"model {config.model.name}: {type(pipeline).__name__} has neither a UNet nor a "
            "transformer; expected a text-to-image pipeline such as Stable Diffusion 1, 2 or XL"
        )
    own = pipeline.scheduler
    scheduler = generation.scheduler or type(own).__name__
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    placed = place(pipeline, device, placement)
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
    return pipeline, placed


def _load(config: RunConfig, weights: Weights, absent: Collection[str]) -> Any:
    """Load a pipeline without some of its parts, into the CPU's memory."""
    import diffusers
    import transformers
    from safetensors import SafetensorError

    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    check_settings(config, weights.folder)
    folder = staged_if_wanted(weights.folder)
    options: dict[str, Any] = dict.fromkeys(absent)
    if not config.generation.safety_checker:
        options |= {"safety_checker": None, "requires_safety_checker": False}
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
    pipeline.set_progress_bar_config(disable=True)
    if (vae := getattr(pipeline, "vae", None)) is not None:
        # SANA's pipelines catch torch's own error, and fail later for want of an image.
        vae.decode = plain_out_of_memory()(vae.decode)
    return pipeline


def place(pipeline: Any, device: Device, placement: Placement) -> str:
    """Put a pipeline's weights where they lie while it works; return ``cpu``, gpu or offload."""
    import torch

    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    sizes = [sum(one.nbytes for one in (*p.parameters(), *p.buffers())) for p in parts]
    room = device.limit_bytes - WORKING_BYTES
    if not device.is_gpu or placement == "gpu" or (placement == "auto" and sum(sizes) <= room):
        pipeline.to(device.torch)
        return "gpu" if device.is_gpu else "cpu"
    if max(sizes) <= room:
        pipeline.enable_model_cpu_offload(device=device.torch)
    else:
        # Not even the largest part fits: layer by layer.
        pipeline.enable_group_offload(device.torch, offload_type="leaf_level", use_stream=True)
    return "offload"
