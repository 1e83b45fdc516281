"""Memory of a batch of today's models: what is predicted beside what torch reserves on a GPU.

``PYTHONPATH=.:tests python benchmarks/memory.py FOLDER 1024`` writes models with random weights
into FOLDER and prints a row each for images of 1024 pixels. A denoiser and a VAE are as wide as the
published ones. Only XL has all of its blocks: those of transformers follow one another and take the
same memory each. Text encoders are small, for they leave the memory before images are sampled.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from sdwn.devices.device import GB
from sdwn.models.full_size import randomise
from sdwn.preflight.selftest import Bench
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from families import (
    END,
    NOISE_SCHEDULE,
    QWEN_CHAT,
    bpe_tokenizer,
    clip_config,
    clip_tokenizer,
    flow_scheduler,
    qwen,
    t5,
    t5_tokenizer,
    vision,
)

SIZES = (1, 4, 8)


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=1024,
        **options,
    )


def xl(scheduler: Any) -> Any:
    """SDXL base 1.0, whole."""
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(clip_config(768)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(1280, hidden_act="gelu")),
        tokenizer=clip_tokenizer(pad=END),
        tokenizer_2=clip_tokenizer(pad="!"),
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=scheduler,
    )


def stable_diffusion_3(scheduler: Any) -> Any:
    """Stable Diffusion 3.5 Medium, six of its 24 blocks."""
    return StableDiffusion3Pipeline(
        vae=vae(latent_channels=16, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config(768)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(1280, hidden_act="gelu")),
        text_encoder_3=t5(4096),
        tokenizer=clip_tokenizer(pad=END),
        tokenizer_2=clip_tokenizer(pad="!"),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            num_layers=6,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            dual_attention_layers=(0, 1, 2),
        ),
        scheduler=scheduler,
    )


def flux(scheduler: Any) -> Any:
    """FLUX.1-dev, two of its 19 double blocks and four of its 38 single ones."""
    return FluxPipeline(
        vae=vae(latent_channels=16, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(768)),
        tokenizer=clip_tokenizer(pad=END),
        text_encoder_2=t5(4096),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True),
        scheduler=scheduler,
    )


def qwen_image(scheduler: Any) -> Any:
    """Qwen-Image, four of its 60 blocks."""
    tokenizer = bpe_tokenizer(QWEN_CHAT, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    text = qwen(tokenizer, 3584) | {"num_attention_heads": 28, "num_hidden_layers": 1}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision(3584))
    return QwenImagePipeline(
        vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(num_layers=4),
        scheduler=scheduler,
    )


FLOW = flow_scheduler()
# Schedulers are made here, for they cannot be made on a GPU.
MODELS: dict[str, tuple[Callable[[Any], Any], Any, str, str]] = {
    "SDXL base 1.0": (xl, EulerDiscreteScheduler(**NOISE_SCHEDULE), "fp16", "all"),
    "Stable Diffusion 3.5 Medium": (stable_diffusion_3, FLOW, "bf16", "6 of 24"),
    "FLUX.1-dev": (flux, FLOW, "bf16", "6 of 57"),
    "Qwen-Image": (qwen_image, FLOW, "bf16", "4 of 60"),
}


def write(build: Callable[[], Any], folder: Path, device: torch.device) -> None:
    """Save a pipeline with random weights, whose networks this device makes."""
    torch.manual_seed(0)
    with device:
        pipeline = build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part)
    pipeline.save_pretrained(folder)


def measure(folder: Path, precision: str, side: int) -> list[str]:
    """Load a model as a task does, and return what each batch size takes."""
    bench = Bench(folder, str(folder), quick=True, on_step=print)
    bench.settings |= {"width": side, "height": side, "precision": precision}
    sampler, found = bench.sampler(), list[str]()
    for size in SIZES:
        bench.device.forget_peak()
        sampler.time_batch(bench.specs(size))
        told, real = sampler.predicted_bytes(size), bench.device.peak_bytes
        found.append(f"{told / GB:.1f}, {real / GB:.1f} ({told / real - 1:+.0%})")
    bench.let_go()
    return found


def main(folder: str, *sides: str) -> None:
    """Print the page's table."""
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(0))
    images = " | ".join(f"{size} images" for size in SIZES)
    print(f"| model | of its blocks | precision | pixels | {images} |")
    for name, (build, scheduler, precision, blocks) in MODELS.items():
        model = Path(folder) / build.__name__
        write(partial(build, scheduler), model, device)
        torch.cuda.empty_cache()
        for side in map(int, sides):
            row = " | ".join(measure(model, precision, side))
            print(f"| {name} | {blocks} | {precision} | {side} | {row} |", flush=True)
        shutil.rmtree(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
