"""Pipelines of transformers with language models for encoders, and of few steps, at toy size.

As in :mod:`families`: each function saves one to a folder in diffusers format.
"""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

from families import (
    NOISE_SCHEDULE,
    QWEN_CHAT,
    bpe_tokenizer,
    pixart_pipeline,
    qwen,
    save,
    second,
    t5,
    t5_tokenizer,
    vae,
    xl,
)

GEMMA_VOCABULARY = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n"),
    *string.punctuation,
    *string.digits,
    *string.ascii_letters,
    # One merge: a prompt's first letter joins the blank before it.
    "▁a",
)
WIDTH = 32


def pixart_alpha(folder: Path) -> None:
    """PixArt-alpha: as Sigma, but four channels, and 120 tokens of a prompt."""
    save(pixart_pipeline(PixArtAlphaPipeline, channels=4), folder, seed=21)


def sana(folder: Path) -> None:
    """SANA: a language model reads the prompt below an instruction; 32 pixels make one latent."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = SanaPipeline(gemma_tokenizer(), gemma(), deep_vae(), sana_transformer(), scheduler)
    save(pipeline, folder, seed=34)


def sana_sprint(folder: Path) -> None:
    """SANA-Sprint: SANA in two steps; guidance is an input of the transformer."""
    network = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    pipeline = SanaSprintPipeline(gemma_tokenizer(), gemma(), deep_vae(), network, SCMScheduler())
    save(pipeline, folder, seed=32)


def z_image(folder: Path) -> None:
    """Z-Image: a language model reads the prompt as a chat; embeddings as long as their text."""
    tokenizer = bpe_tokenizer(QWEN_CHAT, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=Qwen3Model(
            Qwen3Config(**qwen(tokenizer, WIDTH), num_hidden_layers=2, head_dim=16)
        ),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=WIDTH,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 32, 32],
        ),
    )
    save(pipeline, folder, seed=24)


def lumina_2(folder: Path) -> None:
    """Lumina 2: a language model reads the prompt below a system prompt."""
    pipeline = Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=48,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 32, 32),
            cap_feat_dim=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(shift_factor=0.1),
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
    )
    save(pipeline, folder, seed=30)


def latent_consistency(folder: Path) -> None:
    """LCM: version 1 in a few steps, which add noise; guidance is an input of the UNet."""
    parts = second(LCMScheduler(**NOISE_SCHEDULE), time_cond_proj_dim=16).components
    pipeline = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    save(pipeline, folder, seed=26)


def xl_consistency(folder: Path) -> None:
    """LCM of Stable Diffusion XL: in XL's own pipeline, guidance as an input of the UNet."""
    save(xl(LCMScheduler(**NOISE_SCHEDULE), time_cond_proj_dim=16), folder, seed=29)


def few_steps(folder: Path) -> None:
    """Version 2 as LCM distils it: its scheduler adds noise in its steps."""
    save(second(LCMScheduler(**NOISE_SCHEDULE)), folder, seed=28)


def prx(folder: Path) -> None:
    """PRX: of no family here; left alone, it samples one of its favourite sizes."""
    pipeline = PRXPipeline(
        transformer=PRXTransformer2DModel(
            in_channels=4,
            context_in_dim=WIDTH,
            hidden_size=WIDTH,
            num_heads=2,
            depth=1,
            axes_dim=[8, 8],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=t5(WIDTH),
        tokenizer=t5_tokenizer(),
        vae=vae(shift_factor=0.1),
        default_sample_size=512,
    )
    save(pipeline, folder, seed=27)


def gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(GEMMA_VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def sana_transformer(**options: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        # Resolution binning, on by default, takes it for the model of 1024 pixels.
        sample_size=32,
        **options,
    )


def deep_vae() -> AutoencoderDC:
    widths = (8, 8, 16, 16, 16, 16)
    plain: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_out_channels", widths),
            ("layers_per_block", (1,) * len(widths)),
            ("qkv_multiscales", ((),) * len(widths)),
        )
    }
    return AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.4, **plain)


def gemma_tokenizer() -> GemmaTokenizerFast:
    numbers = {piece: number for number, piece in enumerate(GEMMA_VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(numbers, [("▁", "a")], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", numbers["<bos>"])]
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        return GemmaTokenizerFast.from_pretrained(folder, padding_side="left")
