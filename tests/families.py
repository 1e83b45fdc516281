"""Pipelines of other families than the built-in one, at toy size and with random weights.

Each function saves one to a folder in diffusers format, within a second and a few megabytes. Its
weights are the same whenever it is called, and its pictures differ by prompt and by seed. All
are made for 32 to 64 pixels.
"""

from __future__ import annotations

import json
import math
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet())
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCABULARY = (*SYMBOLS, *(symbol + "</w>" for symbol in SYMBOLS), START, END)
T5_VOCABULARY = (
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    *string.punctuation,
    *string.digits,
    *string.ascii_letters,
)
NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
# Without this gain all prompts give much the same picture.
CROSS_ATTENTION_GAIN = 3.0


def stable_diffusion_2(folder: Path) -> None:
    """Stable Diffusion 2.1: predicts velocities; wider text, linear projections, no checker."""
    scheduler = DDIMScheduler(
        **NOISE_SCHEDULE,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    save(second(scheduler), folder, seed=1)


def sd_turbo(folder: Path) -> None:
    """SD-Turbo: version 2, meant for one step without guidance."""
    scheduler = EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing")
    save(second(scheduler), folder, seed=2)


def stable_diffusion_xl(folder: Path) -> None:
    """Stable Diffusion XL: two text encoders, pooled text and sizes as further conditions."""
    scheduler = EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading")
    save(xl(scheduler), folder, seed=3)


def sdxl_turbo(folder: Path) -> None:
    """SDXL-Turbo: XL, meant for one step without guidance."""
    scheduler = EulerAncestralDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing")
    save(xl(scheduler), folder, seed=6)


def pixart(folder: Path) -> None:
    """PixArt-Sigma: a transformer instead of a UNet, T5 with attention masks instead of CLIP.

    Its latents have eight channels, where those of the other families have four.
    """
    width, channels = 32, 8
    pipeline = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=T5EncoderModel(
            T5Config(
                vocab_size=len(T5_VOCABULARY),
                d_model=width,
                d_kv=8,
                d_ff=2 * width,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
        vae=vae(latent_channels=channels),
        transformer=PixArtTransformer2DModel(
            # Resolution binning, on by default, knows no smaller one.
            sample_size=32,
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=width,
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=2,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02),
    )
    save(pipeline, folder, seed=5)


def one_block(folder: Path) -> None:
    """Version 2 with a single transformer block, which compiles in half the time."""
    pipeline = second(EulerDiscreteScheduler(**NOISE_SCHEDULE))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        attention_head_dim=4,
        use_linear_projection=True,
        cross_attention_dim=pipeline.unet.config.cross_attention_dim,
        norm_num_groups=8,
    )
    pipeline.register_modules(unet=unet)
    save(pipeline, folder, seed=4)


def second(scheduler: Any) -> StableDiffusionPipeline:
    width = 48
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(width, hidden_act="gelu")),
        # Not the end, as in version 1.
        tokenizer=clip_tokenizer(pad="!"),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=width,
            norm_num_groups=8,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl(scheduler: Any) -> StableDiffusionXLPipeline:
    width, width_2, time_width = 32, 48, 8
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=CLIPTextModel(clip_config(width)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(width_2, hidden_act="gelu")),
        tokenizer=clip_tokenizer(pad=END),
        tokenizer_2=clip_tokenizer(pad="!"),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=width + width_2,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            # Six numbers: the original size, the crop and the size wanted.
            projection_class_embeddings_input_dim=6 * time_width + width_2,
            norm_num_groups=8,
        ),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def vae(latent_channels: int = 4, force_upcast: bool = False) -> AutoencoderKL:
    channels = (8, 16, 16, 16)
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        norm_num_groups=8,
        scaling_factor=0.13025,
        force_upcast=force_upcast,
    )


def clip_config(width: int, hidden_act: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(CLIP_VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=hidden_act,
        bos_token_id=CLIP_VOCABULARY.index(START),
        eos_token_id=CLIP_VOCABULARY.index(END),
        pad_token_id=CLIP_VOCABULARY.index(END),
    )


# Tokenizers come from files, since their constructors are not the same in every transformers.


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {symbol: number for number, symbol in enumerate(CLIP_VOCABULARY)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad)


def t5_tokenizer() -> T5TokenizerFast:
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0) for piece in T5_VOCABULARY], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", T5_VOCABULARY.index("</s>"))]
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=512)


def save(pipeline: DiffusionPipeline, folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            fill(component, generator)
    pipeline.save_pretrained(folder)


@torch.no_grad()
def fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 1:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        weight.normal_(generator=generator)
        if name.endswith(("embedding.weight", "shared.weight")):
            continue
        weight.div_(math.sqrt(math.prod(weight.shape[1:])))
        if ".attn2.to_v" in name or ".attn2.to_out" in name:
            weight.mul_(CROSS_ATTENTION_GAIN)
        if name.startswith("decoder.") and weight.ndim == 4:
            # Kernels that are flat in space make blobs of the noise.
            weight.copy_(weight.mean(dim=(2, 3), keepdim=True))
