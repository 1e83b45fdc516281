"""Make builtin:tiny, a complete Stable Diffusion pipeline at toy size, with fixed random weights.

It is no model of anything: its images are coloured blobs. It has every part of the real pipeline,
so that a whole run can be tried and tested without a download and without a GPU. ``sdwn/tiny`` is
what this writes::

    python -m tools.tiny FOLDER && cd FOLDER && sha256sum model_index.json */* > SHA256SUMS
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

# Of a dozen tried, one whose pictures differ clearly by prompt and by seed.
_SEED = "tiny-7"
_SYMBOLS = sorted(ByteLevel.alphabet())
_VOCABULARY = (*_SYMBOLS, *(f"{one}</w>" for one in _SYMBOLS), "<|startoftext|>", "<|endoftext|>")
_START, _END = len(_VOCABULARY) - 2, len(_VOCABULARY) - 1
_TEXT_WIDTH = 32
_NORM_GROUPS = 8
# Without this gain all prompts give much the same picture.
_CROSS_ATTENTION_GAIN = 2.0
_CONTRAST = 1.3
# Both by measurement: with these about one image in twenty is flagged, at 16 to 64 pixels alike.
_CONCEPTS = 156
_CONCEPT_THRESHOLD = 0.65


def save_tiny(folder: Path) -> None:
    """Write the pipeline into a folder, in diffusers format."""
    # The tokenizer from files, for its constructor's arguments differ between transformers.
    files = folder / "tokenizer"
    files.mkdir(parents=True)
    vocabulary = {symbol: number for number, symbol in enumerate(_VOCABULARY)}
    (files / "vocab.json").write_text(json.dumps(vocabulary))
    (files / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(files, model_max_length=77)
    build_pipeline(tokenizer).save_pretrained(folder)
    # safetensors writes for the owner alone.
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def build_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Build the pipeline around a tokenizer, which is read from files."""
    text_encoder = CLIPTextConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=_START,
        eos_token_id=_END,
        pad_token_id=_END,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=_NORM_GROUPS,
    )
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=_NORM_GROUPS,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    checker = CLIPConfig(text_config={}, vision_config=vision, projection_dim=16)
    return StableDiffusionPipeline(
        vae=_filled("vae", vae),
        text_encoder=_filled("text_encoder", CLIPTextModel(text_encoder)),
        tokenizer=tokenizer,
        unet=_filled("unet", unet),
        scheduler=scheduler(),
        safety_checker=_filled("safety_checker", StableDiffusionSafetyChecker(checker)),
        # Black is zero, so its embedding is zero too: what NaN turned black is never flagged.
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_mean=[0.0, 0.0, 0.0],
            image_std=[0.25, 0.25, 0.25],
        ),
    )


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
def _filled(component: str, model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        # Some releases of transformers have these levels, some do not.
        plain = name.replace("text_model.", "").replace("vision_model.", "")
        values = _weights(f"{component}.{plain}", tuple(parameter.shape))
        parameter.copy_(torch.from_numpy(values))
    return model.eval()


def _weights(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if len(shape) == 1:
        plain = 1.0 if name.endswith("weight") else 0.0
        return np.full(shape, _CONCEPT_THRESHOLD if name.endswith("embeds_weights") else plain)
    checker = name.startswith("safety_checker.")
    if checker and name.endswith(("position_embedding.weight", "fc2.weight")):
        # Without these an embedding is an odd function of the image, so that embeddings lie
        # evenly around zero and one threshold flags about as many images at every size.
        return np.zeros(shape)
    if checker and name.endswith("_embeds"):
        return _uniform(f"{name}/{_CONCEPTS}", shape)
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        return _uniform(name, shape)
    if name.startswith("vae.decoder.") and len(shape) == 4:
        # Kernels that are flat in space make blobs of the noise; one of zero mean over its
        # inputs, all of them activations above zero, leaves no colour cast.
        flat = _uniform(name, (*shape[:2], 1, 1)) / math.sqrt(shape[1])
        if name == "vae.decoder.conv_out.weight":
            flat -= flat.mean(axis=1, keepdims=True)
            flat *= _CONTRAST
        return np.broadcast_to(flat / math.prod(shape[2:]), shape).copy()
    gain = _CROSS_ATTENTION_GAIN if ".attn2.to_v" in name or ".attn2.to_out" in name else 1.0
    values = gain * _uniform(name, shape) / math.sqrt(math.prod(shape[1:]))
    if checker and len(shape) == 4:
        values -= values.mean(axis=(2, 3), keepdims=True)
    return values


def _uniform(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    # RandomState's streams are frozen for good, and uniform numbers need no libm: the same
    # weights under every NumPy, torch and diffusers, on every machine. Of variance one.
    stream = np.random.RandomState(zlib.crc32(f"{_SEED}/{name}".encode()))
    return math.sqrt(3.0) * (2.0 * stream.random_sample(shape) - 1.0)


if __name__ == "__main__":
    save_tiny(Path(sys.argv[1]))
