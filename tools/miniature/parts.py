"""The parts of the miniature: Stable Diffusion's own classes, under a hundredth of its size."""

from __future__ import annotations

from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tools import tiny
from tools.miniature.backgrounds import SIDE

LATENT_CHANNELS = 12
LATENT_SIDE = 16
TEXT_WIDTH = 96
TOKENS = 77


def autoencoder() -> AutoencoderKL:
    """Build the VAE: 64 x 64 x 3 to 16 x 16 x 12, latents of variance one once trained."""
    channels = (32, 64, 96)
    return AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def text_encoder(words: int, start: int, end: int) -> CLIPTextModel:
    """Build the text encoder for a vocabulary of so many words, and the numbers of two of them."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def denoiser() -> UNet2DConditionModel:
    """Build the UNet: 16 x 16, then 8 x 8, where the text comes in by cross-attention."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> PNDMScheduler:
    """Build Stable Diffusion 1.4's scheduler, but that v is predicted."""
    return tiny.scheduler("v_prediction")
