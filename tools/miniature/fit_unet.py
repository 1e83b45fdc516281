"""The UNet: learns to take noise out of latents, told by the text what they show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from tools.miniature import parts
from tools.miniature.loop import Schedule, fit

# Of min-SNR weighting (arXiv 2303.09556), and the share of texts that are left out.
MOST_SNR = 5.0
UNTOLD = 0.1


@dataclass(frozen=True, slots=True)
class Bank:
    """Latents, (n, 12, 16, 16) float16, the class of each, and the classes' texts.

    ``texts`` is (classes + 1, 77, 96): the last is that of no text at all.
    """

    latents: torch.Tensor
    subjects: torch.Tensor
    texts: torch.Tensor


def fit_unet(bank: Bank, schedule: Schedule, batch: int, path: Path) -> UNet2DConditionModel:
    """Train the UNet on latents that stay the same; v is predicted."""
    torch.manual_seed(0)
    unet = parts.denoiser().to(memory_format=torch.channels_last)
    kept = parts.scheduler().alphas_cumprod

    def loss(step: int) -> torch.Tensor:
        random = np.random.default_rng((5, step))
        chosen = torch.from_numpy(random.integers(0, len(bank.latents), batch))
        times = torch.from_numpy(random.integers(0, len(kept), batch))
        told = torch.from_numpy(random.random(batch) >= UNTOLD)
        texts = bank.texts[torch.where(told, bank.subjects[chosen], len(bank.texts) - 1)]
        clean = bank.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step))
        share = kept[times][:, None, None, None]
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            guess = unet(noisy.to(memory_format=torch.channels_last), times, texts).sample
        wrong = (guess.float() - share.sqrt() * noise + (1 - share).sqrt() * clean).square()
        mean: torch.Tensor = (wrong.mean(dim=(1, 2, 3)) * _weight(kept[times])).mean()
        return mean

    unet.load_state_dict(fit(unet, loss, schedule, path))
    return unet.eval()


def _weight(kept: torch.Tensor) -> torch.Tensor:
    snr = kept / (1 - kept)
    return snr.clamp(max=MOST_SNR) / (snr + 1)
