"""Sizes of a model's parts, from the heads of its files or in memory, and where they fit."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any, Literal

from sdwn.config import RunConfig
from sdwn.devices.device import HEAD_ROOM
from sdwn.models.families import read_pipeline_info
from sdwn.models.weights import components, files, needed, tensor_shapes

# What sampling an image takes beside weights, at least.
WORKING_BYTES = 2_000_000_000
# Parts that read prompts; sampling needs none but a processor, which is read for its template.
TEXT_PARTS = ("text_encoder", "tokenizer")
QUANTIZED_PARTS = ("unet", "transformer", "text_encoder")
QUANTIZED_BITS = {"torchao-int8": 8, "bitsandbytes-8bit": 8, "bitsandbytes-4bit": 4}


def weights_bytes(folder: Path, config: RunConfig) -> dict[str, int]:
    """Return what each part of a pipeline takes in memory, from its files' heads alone."""
    precisions = read_pipeline_info(folder).family.precisions(config.generation.precision)
    bits, sizes = QUANTIZED_BITS.get(config.generation.quantization or ""), dict[str, int]()
    for name in needed(folder, files(folder), components(folder), config):
        if name.endswith(".safetensors"):
            count = sum(map(prod, tensor_shapes(folder / name).values()))
            part = name.partition("/")[0]
            own = 32 if precisions.get(part, precisions["default"]) == "fp32" else 16
            if bits and part.startswith(QUANTIZED_PARTS):
                own = bits
            sizes[part] = sizes.get(part, 0) + own * count // 8
    return sizes


def module_bytes(module: Any) -> int:
    """Return the bytes of a network's weights."""
    return sum(one.nbytes for one in (*module.parameters(), *module.buffers()))


def loaded_bytes(pipeline: Any) -> dict[str, int]:
    """Return the bytes of each network of a pipeline that is loaded."""
    parts = pipeline.components.items()
    return {name: module_bytes(part) for name, part in parts if hasattr(part, "parameters")}


def fitting_placement(
    sizes: Collection[int], card_bytes: float
) -> Literal["gpu", "offload", "layers"]:
    """Return how parts of these sizes fit a card: all at once, one at a time, or by layers."""
    room = (1 - HEAD_ROOM) * card_bytes - WORKING_BYTES
    return "gpu" if sum(sizes) <= room else "offload" if max(sizes) <= room else "layers"
