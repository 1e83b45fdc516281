"""Published speeds of GPUs: Stable Diffusion 1.4, 512x512, 50 steps, fp16, guidance 7.5.

Collected, not measured by this project; benchmarks/gpus.md lays it out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

WIDTH = HEIGHT = 512
STEPS = 50
GUIDED_PASSES = 2
# Work of the VAE, the safety checker and the text encoder, as a share of the UNet's.
VAE_SHARE, SAFETY_SHARE, TEXT_SHARE = 0.03, 0.002, 0.0003
OTHER_SHARE = VAE_SHARE + SAFETY_SHARE + TEXT_SHARE

# Words of a device name that make it another card, or a slice of one.
OTHERS = frozenset({"d", "grid", "laptop", "max", "mig", "ti"})


def unet_calls(steps: int) -> int:
    """Count UNet calls: one more than the steps under PNDM, Stable Diffusion 1.4's scheduler."""
    return steps + 1


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: the words that a device name must have, and images a second by batch size."""

    name: str
    match: tuple[str, ...]
    images_per_second: Mapping[int, float]
    compiled_images_per_second: Mapping[int, float]


def timed(seconds: dict[int, float]) -> dict[int, float]:
    """Turn the published seconds of each batch into images a second."""
    return {batch: batch / each for batch, each in seconds.items()}


def looped(iterations: dict[int, float]) -> dict[int, float]:
    """Turn the published iterations a second of each batch into whole images a second."""
    # diffusers' progress bar counts 50 iterations where PNDM calls 51 times, and ends before the
    # VAE; what the VAE adds is taken from its share of the work.
    return {batch: batch * each / STEPS / (1 + OTHER_SHARE) for batch, each in iterations.items()}


# From two tables of diffusers' on PyTorch 2, whose addresses are in benchmarks/gpus.md; for the
# H100 nothing was found.
CARDS = (
    Card(
        "T4",
        ("t4",),
        timed({4: 29.74, 8: 55.99, 10: 69.86, 16: 113.26}),
        looped({1: 7.56, 4: 1.99, 16: 1 / 1.99}),
    ),
    Card(
        "V100",
        ("v100",),
        timed({4: 8.09, 8: 15.44, 10: 19.28, 16: 29.84}),
        looped({1: 22.17, 4: 6.86, 16: 1.90}),
    ),
    Card(
        "RTX 3090",
        ("rtx", "3090"),
        timed({1: 2.42, 4: 7.72, 8: 14.88, 10: 18.62, 16: 28.88, 32: 57.42, 64: 114.27}),
        looped({1: 25.69, 4: 7.30, 16: 1.91}),
    ),
    Card(
        "RTX 4090",
        ("rtx", "4090"),
        timed({1: 1.28, 4: 3.76, 8: 7.43, 16: 14.98, 32: 30.18, 64: 61.34}),
        looped({1: 49.81, 4: 15.59, 16: 3.85}),
    ),
    Card(
        "A100",
        ("a100",),
        timed({1: 1.98, 2: 2.38, 4: 3.89, 8: 7.04, 10: 8.67, 16: 13.55, 32: 26.68, 64: 53.03}),
        looped({1: 49.74, 4: 17.27, 16: 4.68}),
    ),
    Card("H100 SXM", ("h100", "hbm3"), {}, {}),
)


def find_card(device_name: str) -> Card | None:
    """Find a card by what ``torch.cuda.get_device_name`` calls it; None where it is another.

    >>> find_card("NVIDIA A100-SXM4-40GB").name
    'A100'
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & OTHERS:
        return None
    return next((card for card in CARDS if words.issuperset(card.match)), None)


def card_called(name: str) -> Card | None:
    """Find a card by what a site calls it in a request; a slice of one is another.

    >>> [card_called(name).name for name in ("a100_80gb", "rtx3090", "3090", "gpu-t4")]
    ['A100', 'RTX 3090', 'RTX 3090', 'T4']
    >>> card_called("a100_3g.20gb")
    """
    if re.search(r"\dg[._-]?\d+gb", name.lower()):
        return None
    # Many leave a GeForce card's first name out, or write both as one word.
    return find_card(name.lower().replace("rtx", "rtx ") + " rtx")


def published_speed(
    card: Card, batch_size: int | None = None, *, compiled: bool = False
) -> float | None:
    """Return a card's published images a second in the largest batch up to a size.

    Without a size the fastest of any batch; None where nothing is published.
    """
    speeds = card.compiled_images_per_second if compiled else card.images_per_second
    if not speeds or batch_size is None:
        return max(speeds.values(), default=None)
    fitting = [size for size in speeds if size <= batch_size]
    return speeds[max(fitting, default=min(speeds))]


def scaled(images_per_second: float, width: int, height: int, steps: int, guidance: float) -> float:
    """Scale a speed at the settings above to others, by work: rough, and of first order.

    Pixels count linearly, though attention grows faster; ``guidance`` up to 1 is off, as in
    diffusers, and halves the UNet's work. Images a second.
    """
    pixels = width * height / (WIDTH * HEIGHT)
    passes = GUIDED_PASSES if guidance > 1 else 1
    calls = unet_calls(steps) * passes / (unet_calls(STEPS) * GUIDED_PASSES)
    return images_per_second * (1 + OTHER_SHARE) / (pixels * (calls + OTHER_SHARE))
