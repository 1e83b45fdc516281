"""Stable Diffusion 1.4's architecture at its full size, with random weights in half precision.

Speed and memory do not depend on weights, nor on the tokenizer, which is builtin:tiny's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel
from transformers.utils.logging import disable_progress_bar

from sdwn.models.builtin import builtin_folder
from sdwn.models.weights import INDEX

# The special tokens' ids are the published config's, though the tokenizer has others.
_TEXT: dict[str, Any] = {"vocab_size": 49_408, "hidden_size": 768, "intermediate_size": 3072}
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


@torch.no_grad()
def save_full_size(folder: Path, device: torch.device) -> bool:
    """Write the pipeline in diffusers format unless it is there; return whether it was written."""
    if (folder / INDEX).exists():
        return False
    disable_progress_bar()
    parts: dict[str, Any] = {"feature_extractor": CLIPImageProcessor()}
    torch.manual_seed(0)
    for name, build in NETWORKS.items():
        with device:
            parts[name] = build().eval()
        randomise(parts[name])
    # Its index is written last: a folder that has one is whole.
    StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"), **parts).save_pretrained(folder)
    return True


@torch.no_grad()
def randomise(network: torch.nn.Module) -> None:
    """Draw a network's weights at random, and turn it into half precision."""
    for weights in network.parameters():
        if weights.dim() > 1:
            # Sums keep the size of what they add: in fp16 nothing overflows or fades.
            weights.normal_(0.0, weights[0].numel() ** -0.5)
    network.half()
