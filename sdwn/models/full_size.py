"""Stable Diffusion 1.4's architecture at its full size, with random weights in half precision.

Speed and memory do not depend on weights. What it draws is noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)
from transformers.utils.logging import disable_progress_bar

from sdwn.models.tiny import scheduler
from sdwn.models.weights import INDEX

VOCABULARY = 49_408
START, END = "<|startoftext|>", "<|endoftext|>"
# Near the published ones. Embeddings of this width that are random are never that much alike.
_CONCEPT_THRESHOLD = 0.2


NETWORKS: dict[str, Callable[[], Any]] = {
    # diffusers' defaults are Stable Diffusion 1's, but for the width of the text's embedding.
    "unet": lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
    "vae": lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    ),
    # The special tokens' ids are the published config's, though the tokenizer has others.
    "text_encoder": lambda: CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_attention_heads=12,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
    ),
    "safety_checker": lambda: StableDiffusionSafetyChecker(
        CLIPConfig(
            text_config={},
            vision_config={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "projection_dim": 768,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
            },
            projection_dim=768,
        )
    ),
}


def empty_part(component: str) -> Any:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return NETWORKS[component]().half().eval()


@torch.no_grad()
def _filled(component: str, device: torch.device) -> Any:
    network = empty_part(component).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weights in network.named_parameters():
        if name.endswith("embeds_weights"):
            weights.fill_(_CONCEPT_THRESHOLD)
        elif weights.dim() == 1:
            weights.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            # Sums keep the size of what they add, so that nothing grows out of fp16.
            deviation = 1 / math.sqrt(math.prod(weights.shape[1:]))
            weights.normal_(0.0, deviation, generator=generator)
    for name, buffer in network.named_buffers():
        assert name.endswith("position_ids"), f"{component}: no values for the buffer {name}"
        buffer.copy_(torch.arange(buffer.numel(), device=device).view_as(buffer))
    return network


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of CLIP's structure; pairs of bytes stand for its merges."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(ByteLevel.alphabet())
    singles = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    pairs = list(islice(product(symbols, singles), VOCABULARY - len(singles) - 2))
    words = [*singles, *map("".join, pairs), START, END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges = ["#version: 0.2", *map(" ".join, pairs)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)


def save_full_size(folder: Path, device: torch.device) -> bool:
    """Write the pipeline in diffusers format unless it is there; return whether it was written.

    On a device the weights are the same every time; they are drawn there, which takes seconds.
    """
    if (folder / INDEX).exists():
        return False
    disable_progress_bar()
    save_tokenizer(folder / "tokenizer")
    # Its index comes last: a folder that has it is whole.
    StableDiffusionPipeline(
        **{component: _filled(component, device) for component in NETWORKS},
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=scheduler(),
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder)
    return True
