"""The VAE: pictures to latents of mean zero and variance one, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import AutoencoderKL
from torch import nn

from tools.miniature import parts
from tools.miniature.loop import Schedule, fit
from tools.miniature.pictures import Pictures

# The UNet's latents are never quite right: the decoder learns to take up to this much.
NOISE = 0.2


class Coder(nn.Module):
    """The VAE with its latents brought to mean zero and variance one, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = parts.autoencoder()
        self.standard = nn.BatchNorm2d(parts.LATENT_CHANNELS, affine=False, momentum=0.02)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Turn pictures, (n, 3, 64, 64) of -1 to 1, into latents, (n, 12, 16, 16)."""
        moments = self.vae.quant_conv(self.vae.encoder(pictures))
        latents: torch.Tensor = self.standard(moments[:, : parts.LATENT_CHANNELS])
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents into pictures."""
        pictures: torch.Tensor = self.vae.decoder(self.vae.post_quant_conv(latents))
        return pictures


def standardised(coder: Coder) -> AutoencoderKL:
    """Return the VAE with what ``standard`` does taken into its own last convolution."""
    vae, standard, channels = coder.vae, coder.standard, parts.LATENT_CHANNELS
    mean, variance = standard.running_mean, standard.running_var
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + standard.eps)
    with torch.no_grad():
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
        weight[:channels] *= scale[:, None, None, None]
        bias[:channels] = (bias[:channels] - mean) * scale
        # A latent's spread, which diffusers' classes want too, is next to nothing.
        weight[channels:] = 0.0
        bias[channels:] = -20.0
    return vae


def difference(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Compare pictures: their pixels, their edges, which makes them sharp, and their colours.

    Without the last, all hues became blue or orange for a long time.
    """
    loss = F.l1_loss(made, wanted) + 2 * F.l1_loss(_hues(made), _hues(wanted))
    for axis in (2, 3):
        loss = loss + F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis))
    return loss


def _hues(pictures: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pictures - pictures.mean(dim=1, keepdim=True), 2)


def fit_vae(pictures: Pictures, schedule: Schedule, batch: int, path: Path) -> Coder:
    """Train the VAE on pictures that are each drawn once; latents get some noise on their way."""
    torch.manual_seed(0)
    coder = Coder().to(memory_format=torch.channels_last)

    def loss(step: int) -> torch.Tensor:
        random = np.random.default_rng((7, step))
        wanted = pictures.batch([int(n) for n in random.integers(0, len(pictures), batch)], random)
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            latents = coder.encode(wanted).float()
            spread = NOISE * torch.rand(batch, 1, 1, 1, generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            made = coder.decode(latents + spread * noise)
        return difference(made.float(), wanted)

    coder.load_state_dict(fit(coder, loss, schedule, path))
    return coder.eval()
