"""The loops that sdwn's speed is compared with, as the guides of accelerate and timm have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdwn.config import GenerationConfig
from sdwn.planning.plan import ImageSpec


def accelerate_loop(
    model: Path, generation: GenerationConfig, folder: Path
) -> Callable[[Sequence[ImageSpec], int], None]:
    """Load a pipeline for the loop of accelerate's guide to distributed inference.

    Returns:
        What makes images as PNG files, so many at a time, of the same seeds as a task.
    """
    from accelerate import PartialState
    from diffusers import DiffusionPipeline

    state, half = PartialState(), generation.precision == "fp16"
    pipeline = DiffusionPipeline.from_pretrained(
        model, dtype=torch.float16 if half else torch.float32
    ).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(exist_ok=True)

    def make(specs: Sequence[ImageSpec], size: int) -> None:
        with state.split_between_processes(list(specs)) as own:
            for start in range(0, len(own), size):
                batch = own[start : start + size]
                images = pipeline(
                    [spec.prompt for spec in batch],
                    generator=[torch.Generator().manual_seed(spec.seed) for spec in batch],
                    height=generation.height,
                    width=generation.width,
                    num_inference_steps=generation.num_inference_steps,
                    guidance_scale=generation.guidance_scale,
                ).images
                for spec, image in zip(batch, images, strict=True):
                    image.save(folder / f"{spec.name}.png")

    return make


def timm_loader(folder: Path, preprocessing: Mapping[str, Any], size: int, **options: Any) -> Any:
    """Return timm's loader of a folder of classes of images, as its validate.py makes it."""
    import timm.data

    dataset = timm.data.create_dataset("", root=str(folder))
    return timm.data.create_loader(dataset, batch_size=size, **preprocessing, **options)


@torch.inference_mode()
def timm_validate(network: torch.nn.Module, loader: Any) -> None:
    """Classify all images of a loader, as timm's validate.py does."""
    from timm.utils import accuracy

    loss_of = torch.nn.CrossEntropyLoss()
    for images, target in loader:
        output = network(images.contiguous(memory_format=torch.channels_last))
        loss_of(output, target).item()
        accuracy(output, target, topk=(1, 5))
