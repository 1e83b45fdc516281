"""Loading a config's pipeline: its text encoders alone, then the rest, where its sizes fit.

A pipeline of no known family encodes the texts itself: it is loaded whole.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from sdwn.batches import Placement
from sdwn.config import RunConfig
from sdwn.devices.device import HEAD_ROOM, Device, plain_out_of_memory
from sdwn.errors import SdwnError, UsageError, first_line
from sdwn.models.added import change_model
from sdwn.models.families import PipelineInfo, denoiser
from sdwn.models.weights import Weights, needed_here, staged_if_wanted, tensor_shapes

# What sampling an image takes beside weights, at least.
WORKING_BYTES = 2_000_000_000
# Parts that read prompts; sampling needs none but a processor, which is read for its template.
TEXT_PARTS = ("text_encoder", "tokenizer")
QUANTIZED_PARTS = ("unet", "transformer", "text_encoder")
QUANTIZED_BITS = {"torchao-int8": 8, "bitsandbytes-8bit": 8, "bitsandbytes-4bit": 4}


def load_text_encoders(
    config: RunConfig, weights: Weights, info: PipelineInfo, device: Device, placement: Placement
) -> Any:
    """Load a pipeline's text encoders and tokenizers, without any other weights."""
    absent = {
        name for name in info.parts if not name.startswith((*TEXT_PARTS, "processor", "scheduler"))
    }
    pipeline = _load(config, weights, info, absent)
    place(pipeline, device, placement)
    return pipeline


@plain_out_of_memory()
def load_pipeline(
    config: RunConfig, weights: Weights, info: PipelineInfo, device: Device, placement: Placement
) -> tuple[Any, str]:
    """Load what samples images of encoded prompts; return also what `place` does."""
    import diffusers
    import torch

    generation, apart = config.generation, info.family.embeddings
    absent = {name for name in info.parts if apart and name.startswith(TEXT_PARTS)}
    pipeline = _load(config, weights, info, absent)
    network, own = denoiser(pipeline), pipeline.scheduler
    scheduler = generation.scheduler or type(own).__name__
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    placed = place(pipeline, device, placement)
    if generation.channels_last:
        for part in filter(None, (network, getattr(pipeline, "vae", None))):
            part.to(memory_format=torch.channels_last)
    if (backend := generation.attention) is not None:
        try:
            network.set_attention_backend(backend)
        except Exception as error:  # of many kinds, by what the backend needs
            raise SdwnError(f"generation.attention {backend}: {first_line(error)}") from error
        processors = (getattr(module, "processor", None) for module in network.modules())
        if not any(hasattr(one, "_attention_backend") for one in processors):
            kind = type(network).__name__
            raise UsageError(f"generation.attention has no effect on {kind}; leave it out")
    if generation.compile:
        # One block is compiled and serves all its likes.
        if generation.compile != "whole" and getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks()
        else:
            network.compile()
    return pipeline, placed


def _load(config: RunConfig, weights: Weights, info: PipelineInfo, absent: set[str]) -> Any:
    """Load a pipeline without some of its parts, into the CPU's memory."""
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    folder = staged_if_wanted(weights.folder)
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    wanted = info.family.precisions(config.generation.precision)
    types = {part: kinds[precision] for part, precision in wanted.items()}
    # Some come without one of their text encoders; diffusers wants to be told.
    left_out = {name for name, kind in info.index.items() if kind == [None, None]}
    options: dict[str, Any] = dict.fromkeys(absent | left_out)
    if config.generation.quantization:
        options["quantization_config"] = _quantization(config, info.parts.keys() - absent)
    if not config.generation.safety_checker:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        if config.model.vae and "vae" not in absent:
            own, kind = weights.added[-1].path, types.get("vae", types["default"])
            options["vae"] = diffusers.AutoModel.from_pretrained(str(own), dtype=kind)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, variant=config.model.variant, use_safetensors=True, dtype=types, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        other = f" with the VAE {config.model.vae}" if config.model.vae else ""
        raise SdwnError(
            f"model {config.model.name}: the folder {folder} cannot be loaded{other}; check that "
            f"all is whole, with safetensors weights: {first_line(error)}"
        ) from error
    name = "unet" if "unet" in info.parts else "transformer"
    if name in absent:
        # Encoding reads its config at most; what a LoRA has for it is left out.
        network = SimpleNamespace(**info.network)
        nothing = SimpleNamespace(config=network, load_lora_adapter=lambda *_, **__: None)
        setattr(pipeline, name, nothing)
    change_model(pipeline, config, weights)
    pipeline.set_progress_bar_config(disable=True)
    if (vae := getattr(pipeline, "vae", None)) is not None:
        # SANA's pipelines catch torch's own error, and fail later for want of an image.
        vae.decode = plain_out_of_memory()(vae.decode)
    return pipeline


def _quantization(config: RunConfig, parts: Collection[str]) -> Any:
    """Return diffusers' settings of quantization for the denoiser and the text encoders."""
    import diffusers
    import transformers

    def settings(library: Any) -> Any:
        if config.generation.quantization == "torchao-int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return library.TorchAoConfig(Int8WeightOnlyConfig())
        four = config.generation.quantization == "bitsandbytes-4bit"
        return library.BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four)

    mapping = {
        name: settings(transformers if name.startswith("text_encoder") else diffusers)
        for name in parts
        if name.startswith(QUANTIZED_PARTS)
    }
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def weights_bytes(folder: Path, config: RunConfig) -> dict[str, int]:
    """Return what each part of a pipeline takes in memory, from its files' heads alone."""
    precisions = PipelineInfo(folder).family.precisions(config.generation.precision)
    bits, sizes = QUANTIZED_BITS.get(config.generation.quantization or ""), dict[str, int]()
    for name in needed_here(folder, config):
        if name.endswith(".safetensors"):
            count = sum(map(prod, tensor_shapes(folder / name).values()))
            part = name.partition("/")[0]
            own = 32 if precisions.get(part, precisions["default"]) == "fp32" else 16
            if bits and part.startswith(QUANTIZED_PARTS):
                own = bits
            sizes[part] = sizes.get(part, 0) + own * count // 8
    return sizes


def loaded_bytes(pipeline: Any) -> dict[str, int]:
    """Return the bytes of each network of a pipeline that is loaded."""
    return {
        name: part.get_memory_footprint()
        for name, part in pipeline.components.items()
        if hasattr(part, "get_memory_footprint")
    }


def fitting_placement(
    sizes: Collection[int], card_bytes: float
) -> Literal["gpu", "offload", "layers"]:
    """Return how parts of these sizes fit a card: all at once, one at a time, or by layers."""
    room = (1 - HEAD_ROOM) * card_bytes - WORKING_BYTES
    return "gpu" if sum(sizes) <= room else "offload" if max(sizes) <= room else "layers"


def place(pipeline: Any, device: Device, placement: Placement) -> str:
    """Put a pipeline's weights where they lie while it works; return ``cpu``, gpu or offload."""
    if not device.is_gpu:
        pipeline.to(device.torch)
        return "cpu"
    fitting = fitting_placement(loaded_bytes(pipeline).values(), device.usable_bytes)
    if placement == "gpu" or (placement == "auto" and fitting == "gpu"):
        pipeline.to(device.torch)
        return "gpu"
    if fitting == "layers":
        pipeline.enable_group_offload(device.torch, offload_type="leaf_level", use_stream=True)
    else:
        pipeline.enable_model_cpu_offload(device=device.torch)
    return "offload"
