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
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
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
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
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
# Chats as the real templates lay them out.
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[SYSTEM]' if message.role == 'system' else '[INST]' }}{{ message.content[0].text }}"
    "{% endfor %}"
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
    save(pixart_pipeline(PixArtSigmaPipeline, channels=8), folder, seed=5)


def stable_diffusion_3(folder: Path) -> None:
    """Stable Diffusion 3.5: two CLIP encoders and T5, whose embeddings follow one another."""
    width, width_2, width_t5 = 32, 48, 96
    pipeline = StableDiffusion3Pipeline(
        vae=vae(latent_channels=8, shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip_config(width)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(width_2, hidden_act="gelu")),
        text_encoder_3=t5(width_t5),
        tokenizer=clip_tokenizer(pad=END),
        tokenizer_2=clip_tokenizer(pad="!"),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width_t5,
            caption_projection_dim=32,
            pooled_projection_dim=width + width_2,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    save(pipeline, folder, seed=7)


def flux_dev(folder: Path) -> None:
    """FLUX.1-dev: packed latents; guidance is an input of the transformer."""
    flux(folder, seed=8, guidance_embeds=True)


def flux_schnell(folder: Path) -> None:
    """FLUX.1-schnell: FLUX.1 without guidance."""
    flux(folder, seed=9, guidance_embeds=False)


def flux(folder: Path, seed: int, guidance_embeds: bool) -> None:
    width, width_t5 = 32, 48
    pipeline = FluxPipeline(
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(clip_config(width)),
        tokenizer=clip_tokenizer(pad=END),
        text_encoder_2=t5(width_t5),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width_t5,
            pooled_projection_dim=width,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=flow_scheduler(),
    )
    save(pipeline, folder, seed)


def chroma(folder: Path) -> None:
    """Chroma: FLUX.1 with classifier-free guidance, and T5 alone."""
    width_t5 = 48
    pipeline = ChromaPipeline(
        vae=vae(shift_factor=0.1),
        text_encoder=t5(width_t5),
        tokenizer=t5_tokenizer(),
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width_t5,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=32,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        scheduler=flow_scheduler(),
    )
    save(pipeline, folder, seed=10)


def flux_2(folder: Path) -> None:
    """FLUX.2-dev: patched latents of 128 channels; three layers of a Mistral as the embedding."""
    width = 32
    tokenizer = bpe_tokenizer(MISTRAL_CHAT, "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(tokenizer),
                "hidden_size": width,
                "intermediate_size": 2 * width,
                # Its pipeline takes the layers 10, 20 and 30.
                "num_hidden_layers": 31,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "head_dim": 16,
                "image_size": 32,
                "patch_size": 16,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        )
    )
    pipeline = Flux2Pipeline(
        vae=flux_2_vae(),
        text_encoder=encoder,
        tokenizer=PixtralProcessor(
            PixtralImageProcessor(), tokenizer, chat_template=tokenizer.chat_template
        ),
        transformer=flux_2_transformer(width, guidance_embeds=True),
        scheduler=flow_scheduler(),
    )
    save(pipeline, folder, seed=11)


def flux_2_klein(folder: Path) -> None:
    """FLUX.2-klein: FLUX.2 with a Qwen 3, distilled to a few steps without guidance."""
    klein(folder, seed=12, is_distilled=True)


def flux_2_klein_base(folder: Path) -> None:
    """FLUX.2-klein-base: klein before its distillation, with classifier-free guidance."""
    klein(folder, seed=13, is_distilled=False)


def klein(folder: Path, seed: int, is_distilled: bool) -> None:
    width = 32
    tokenizer = bpe_tokenizer(QWEN_CHAT, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    pipeline = Flux2KleinPipeline(
        vae=flux_2_vae(),
        text_encoder=Qwen3ForCausalLM(
            # Its pipeline takes the layers 9, 18 and 27.
            Qwen3Config(**qwen(tokenizer, width), num_hidden_layers=28, head_dim=16)
        ),
        tokenizer=tokenizer,
        transformer=flux_2_transformer(width, guidance_embeds=False),
        scheduler=flow_scheduler(),
        is_distilled=is_distilled,
    )
    save(pipeline, folder, seed)


def qwen_image(folder: Path) -> None:
    """Qwen-Image: packed latents with an axis of frames; embeddings as long as their prompts."""
    width = 32
    tokenizer = bpe_tokenizer(QWEN_CHAT, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **qwen(tokenizer, width),
                "num_hidden_layers": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4]},
            },
            vision_config=vision(width),
        )
    )
    pipeline = QwenImagePipeline(
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=flow_scheduler(),
    )
    save(pipeline, folder, seed=14)


def qwen_image_2(folder: Path) -> None:
    """Qwen-Image 2.1: one causal stream of text and image, and transparency."""
    width = 32
    tokenizer = bpe_tokenizer(
        QWEN_CHAT,
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    )
    encoder = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                **qwen(tokenizer, width),
                "num_hidden_layers": 2,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 1,
                "out_hidden_size": width,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        )
    )
    pipeline = QwenImage21Pipeline(
        vae=AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=8,
            dim_mult=[1, 1, 2, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.0] * 8,
            latents_std=[1.0] * 8,
        ),
        text_encoder=encoder,
        processor=Qwen3VLProcessor(
            Qwen2VLImageProcessor(),
            tokenizer,
            Qwen3VLVideoProcessor(),
            chat_template=tokenizer.chat_template,
        ),
        transformer=QwenImage21Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=width,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=flow_scheduler(),
    )
    save(pipeline, folder, seed=15)


def aura_flow(folder: Path) -> None:
    """AuraFlow: of no family here, so that its call encodes the prompts and draws the noise."""
    width = 32
    pipeline = AuraFlowPipeline(
        vae=vae(),
        text_encoder=t5(width),
        tokenizer=t5_tokenizer(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    save(pipeline, folder, seed=16)


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


def second(scheduler: Any, **unet: Any) -> StableDiffusionPipeline:
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
            **unet,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl(scheduler: Any, **unet: Any) -> StableDiffusionXLPipeline:
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
            **unet,
        ),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def pixart_pipeline(kind: type[Any], channels: int) -> DiffusionPipeline:
    width = 32
    pipeline: DiffusionPipeline = kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(width),
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
    return pipeline


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(T5_VOCABULARY),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def qwen(tokenizer: Any, width: int) -> dict[str, Any]:
    """Settings of a Qwen's language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


def vision(width: int) -> dict[str, Any]:
    """Settings of the part of a Qwen that sees, which no text reaches."""
    return {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def flux_2_vae() -> AutoencoderKLFlux2:
    channels = (8, 16, 16, 16)
    return AutoencoderKLFlux2(block_out_channels=channels, latent_channels=4, norm_num_groups=8)


def flux_2_transformer(width: int, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def vae(
    latent_channels: int = 4, force_upcast: bool = False, shift_factor: float | None = None
) -> AutoencoderKL:
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
        shift_factor=shift_factor,
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


def bpe_tokenizer(chat_template: str, *special: str) -> Qwen2Tokenizer:
    """A tokenizer of bytes, the first of its special tokens as the padding."""
    vocabulary = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    tokenizer = Qwen2Tokenizer(
        vocabulary, [], unk_token=None, eos_token=special[0], pad_token=special[0]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = chat_template
    return tokenizer


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
