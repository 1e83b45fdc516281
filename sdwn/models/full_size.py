"""Stable Diffusion 1.4's architecture at its full size, with random weights in half precision.

Speed and memory do not depend on weights. What it draws is noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
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

from sdwn.models.weights import INDEX

VOCABULARY = 49_408
# The special tokens' ids are the published config's, though the tokenizer has others.
_TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 768, "intermediate_size": 3072}
_TEXT |= {"num_attention_heads": 12, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_VISION |= {"num_attention_heads": 16, "patch_size": 14}
# Where nothing stands here, a library's default is Stable Diffusion 1's.
NETWORKS: dict[str, Callable[[], Any]] = {
    "unet": lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
    "vae": lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    ),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_TEXT)),
    "safety_checker": lambda: StableDiffusionSafetyChecker(
        CLIPConfig(text_config={}, vision_config=_VISION, projection_dim=768)
    ),
}


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a tokenizer of CLIP's structure; pairs of bytes stand for its merges."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(ByteLevel.alphabet())
    singles = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    pairs = list(islice(product(symbols, singles), VOCABULARY - len(singles) - 2))
    words = [*singles, *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges = ["#version: 0.2", *map(" ".join, pairs)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def scheduler(prediction_type: str = "epsilon") -> PNDMScheduler:
    """Build the scheduler of CompVis/stable-diffusion-v1-4; a model may predict something else."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )


@torch.no_grad()
def save_full_size(folder: Path, device: torch.device) -> bool:
    """Write the pipeline in diffusers format unless it is there; return whether it was written.

    On a device the weights are the same every time; they are drawn there, which takes seconds.
    """
    if (folder / INDEX).exists():
        return False
    disable_progress_bar()
    parts: dict[str, Any] = {"tokenizer": save_tokenizer(folder / "tokenizer")}
    torch.manual_seed(0)
    for name, build in NETWORKS.items():
        with device:
            parts[name] = build().eval()
        for weights in parts[name].parameters():
            if weights.dim() > 1:
                # Sums keep the size of what they add: in fp16 nothing overflows or fades.
                weights.normal_(0.0, weights[0].numel() ** -0.5)
        parts[name].half()
    # Its index is written last: a folder that has one is whole.
    StableDiffusionPipeline(
        **parts, scheduler=scheduler(), feature_extractor=CLIPImageProcessor()
    ).save_pretrained(folder)
    return True
