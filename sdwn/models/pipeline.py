"""Loading a config's pipeline: its text encoders alone, then the rest, where its sizes fit.

::

    load_text_encoders ──> prompts encoded ──> let go
    load_pipeline      ──────────────────────────────> denoiser, VAE, safety checker: sampling

A pipeline of no known family encodes the texts itself: it is loaded whole.
"""

from __future__ import annotations

from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from sdwn.batches import Placement
from sdwn.config import InversionSettings, LoraSettings, RunConfig
from sdwn.devices.device import HEAD_ROOM, plain_out_of_memory
from sdwn.errors import SdwnError, UsageError, first_line
from sdwn.models.added import inversion_encoders
from sdwn.models.families import FAMILIES, PipelineInfo, denoiser
from sdwn.models.weights import Weights, needed_here, staged_if_wanted, tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from sdwn.devices.device import Device

# What sampling an image takes beside weights, at least.
WORKING_BYTES = 2_000_000_000
# Parts that read prompts; sampling needs none but a processor, which is read for its template.
TEXT_PARTS = ("text_encoder", "tokenizer")
QUANTIZED_PARTS = ("unet", "transformer", "text_encoder")
QUANTIZED_BITS = {"torchao-int8": 8, "bitsandbytes-8bit": 8, "bitsandbytes-4bit": 4}


def quantization(config: RunConfig, parts: Collection[str]) -> Any:
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


def load_pipeline(
    config: RunConfig, weights: Weights, info: PipelineInfo, device: Device, placement: Placement
) -> tuple[Any, str]:
    """Load what samples images of encoded prompts; a pipeline of no known family whole.

    Returns it, and where its weights lie: ``cpu``, ``gpu`` or ``offload``.
    """
    import diffusers
    import torch

    generation, apart = config.generation, info.family.embeddings
    absent = {name for name in info.parts if apart and name.startswith(TEXT_PARTS)}
    pipeline = _load(config, weights, info, absent)
    network = denoiser(pipeline)
    own = pipeline.scheduler
    scheduler = generation.scheduler or type(own).__name__
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    placed = place(pipeline, device, placement)
    if generation.channels_last:
        for part in filter(None, (network, getattr(pipeline, "vae", None))):
            part.to(memory_format=torch.channels_last)
    if generation.attention is not None:
        _set_attention(network, generation.attention)
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

    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    folder = staged_if_wanted(weights.folder)
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    wanted = info.family.precisions(config.generation.precision)
    types = {part: kinds[precision] for part, precision in wanted.items()}
    vae_type = types.get("vae", types["default"])
    # Some come without one of their text encoders; diffusers wants to be told.
    left_out = {name for name, kind in info.index.items() if kind == [None, None]}
    options: dict[str, Any] = dict.fromkeys(absent | left_out)
    if config.generation.quantization:
        options["quantization_config"] = quantization(config, info.parts.keys() - absent)
    if not config.generation.safety_checker:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if config.model.vae and "vae" not in absent:
        own = weights.added[-1]
        with _loading(f"model.{own}: the folder {own.path}"):
            options["vae"] = diffusers.AutoModel.from_pretrained(str(own.path), dtype=vae_type)
    with _loading(f"model {config.model.name}: the folder {folder}"):
        pipeline = _pipeline_loader(info.kind).from_pretrained(
            folder,
            variant=config.model.variant,
            use_safetensors=True,
            dtype=types,
            **options,
        )
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


@contextmanager
def _loading(what: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SdwnError(
            f"{what} cannot be loaded; check that it is whole, with safetensors weights: "
            f"{first_line(error)}"
        ) from error


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


def _pipeline_loader(kind: str) -> Any:
    """Return the class that loads a pipeline: for text to image, or as its index names it."""
    import diffusers

    if kind in FAMILIES:
        return diffusers.DiffusionPipeline  # the other one imports all pipelines, for a second
    from diffusers.pipelines.auto_pipeline import SUPPORTED_TASKS_MAPPINGS

    known = {one.__name__ for task in SUPPORTED_TASKS_MAPPINGS for one in task.values()}
    return diffusers.AutoPipelineForText2Image if kind in known else diffusers.DiffusionPipeline


def _set_attention(network: Any, backend: str) -> None:
    try:
        network.set_attention_backend(backend)
    except Exception as error:  # of many kinds, by what the backend needs
        raise SdwnError(f"generation.attention {backend}: {first_line(error)}") from error
    processors = (getattr(module, "processor", None) for module in network.modules())
    if not any(hasattr(one, "_attention_backend") for one in processors):
        raise UsageError(
            f"generation.attention has no effect on {type(network).__name__}; leave it out"
        )


def change_model(pipeline: Any, config: RunConfig, weights: Weights) -> None:
    """Put LoRAs and textual inversions into those parts of a pipeline that are loaded."""
    for (_, chosen), found in zip(config.model.added, weights.added, strict=True):
        try:
            if isinstance(chosen, LoraSettings):
                _fuse_lora(pipeline, found.path, chosen.scale)
            elif isinstance(chosen, InversionSettings):
                _load_inversion(pipeline, found.path, chosen.token)
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SdwnError(
                f"model.{found} does not fit {type(pipeline).__name__}: {first_line(error)}"
            ) from error


def _fuse_lora(pipeline: Any, file: Path, scale: float) -> None:
    """Add a LoRA to the weights that it changes, so that a step takes no longer than without."""
    import torch

    changed, read = pipeline._lora_loadable_modules, pipeline.lora_state_dict
    loaded = [name for name in changed if isinstance(getattr(pipeline, name), torch.nn.Module)]
    if not loaded:
        return

    def of_loaded_parts(*given: Any, **options: Any) -> tuple[Any, ...]:
        state, *rest = read(*given, **options)
        tops = {name: name.split(".")[0] for name in state}
        if not {*changed}.intersection(tops.values()):
            raise ValueError("it has no weights for any part of this model")
        return {name: state[name] for name, top in tops.items() if top in loaded}, *rest

    # What the pipeline calls for itself, with what is for parts that are not loaded left out.
    pipeline.lora_state_dict = of_loaded_parts
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="added")
    del pipeline.lora_state_dict
    pipeline.fuse_lora(components=loaded, lora_scale=scale, adapter_names=["added"])
    pipeline.unload_lora_weights()


def _load_inversion(pipeline: Any, file: Path, token: str | None) -> None:
    """Add a textual inversion to each tokenizer and text encoder that it is for."""
    from safetensors.torch import load_file

    state = load_file(file)
    for key, number in inversion_encoders(state):
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        if encoder is not None:
            pipeline.load_textual_inversion(
                {token or key: state[key]},
                tokenizer=getattr(pipeline, f"tokenizer{number}"),
                text_encoder=encoder,
            )
