"""Costs of the paper's images on each GPU: published speeds and arithmetic, as a page.

``python benchmarks/gpus.py > benchmarks/gpus.md``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sdwn.preflight import estimate as speeds
from sdwn.preflight.estimate import CARDS, Card, published_speed
from shared import markdown

IMAGES = 262_040
FLEETS = (1, 8, 64)


DIFFUSERS = (
    "plain: seconds in diffusers' table of PyTorch 2.0 attention, fp16, "
    "https://github.com/huggingface/diffusers/pull/2764; compiled: iterations a second, txt2img, "
    "torch nightly with compile and channels_last (Stable Diffusion 1.5, the same architecture), "
    "https://github.com/huggingface/diffusers/blob/07dc8feb1d54c93adb9a7443a48a6741e1dbf43f/"
    "docs/source/en/optimization/torch2.0.mdx"
)

OWN = (
    "this project's own, with random weights in the same architecture, torch 2.11, cuDNN's "
    "attention: sdwn selftest, where blocks alone compiled make 3.27 and 3.52 images a second"
)
UNET_GMAC = 401.6
FLOP_PER_MAC = 2
CALLS = speeds.STEPS + 1  # under PNDM, Stable Diffusion 1.4's scheduler
TERA_FLOP_UNET = CALLS * speeds.GUIDED_PASSES * UNET_GMAC * FLOP_PER_MAC / 1e3
TERA_FLOP_PER_IMAGE = TERA_FLOP_UNET * (1 + speeds.OTHER_SHARE)


@dataclass(frozen=True)
class Peak:
    """A card's dense tensor-core TFLOP/s in fp16, accumulated in fp32 as PyTorch does."""

    memory_gb: tuple[int, ...]
    teraflops: float
    source: str


PEAKS = {
    "T4": Peak(
        (16,),
        65,
        "NVIDIA's announcement, as reported in https://geektopia.es/es/technology/2018/09/13/"
        "noticias/nvidia-presenta-la-nueva-tesla-t4-basada-en-turing-orientada-a-inteligencia-"
        "artificial.html",
    ),
    "V100": Peak(
        (16, 32),
        125,
        "NVIDIA, https://developer.nvidia.com/programming-tensor-cores-cuda-9-0; the SXM2 module",
    ),
    "RTX 3090": Peak(
        (24,),
        71,
        "accumulating in fp32 (142 in fp16): NVIDIA's GA102 whitepaper v2, page 44, as cited in "
        "https://github.com/apoorvkh/academic-pretraining/issues/3",
    ),
    "RTX 4090": Peak(
        (24,), 165.2, "accumulating in fp32 (330.3 in fp16), https://gigagpu.com/?p=34220"
    ),
    "A100": Peak(
        (40, 80),
        312,
        "NVIDIA's datasheet, as cited in https://glennklockwood.com/garden/processors/A100",
    ),
    "H100": Peak(
        (80,),
        989.4,
        "NVIDIA's figures of the SXM module, as cited in https://glennklockwood.com/garden/processors/h100",
    ),
    "H200": Peak(
        (141,), 989.4, "the H100's chip, as https://aiwiki.ai/wiki/nvidia_h200 cites NVIDIA"
    ),
}

PAGE = """\
# {images:,} images on a GPU: published speeds beside the floor

What follows is other people's published figures and arithmetic on them; only the speeds of the
[H100](gpu-nvidia-h100-80gb-hbm3.md) and the [H200](gpu-nvidia-h200.md) are this project's own, by
its self-test. Written by
`python benchmarks/gpus.py > benchmarks/gpus.md` from
[sdwn/preflight/estimate.py](../sdwn/preflight/estimate.py).

## The work of one image

Stable Diffusion 1.4, 512x512, 50 steps, fp16, guidance 7.5:

{work}

PNDM calls the UNet 51 times for 50 steps. 401.6 GMAC is what `torch.utils.flop_counter` counts in
diffusers' UNet, attention included (tests/test_speeds.py counts again).

## Images a second, by batch size

{batches}

Peak: dense fp16 on tensor cores. PyTorch accumulates in fp32, and so does the peak taken here:
a GeForce card's peak in fp16 is twice that. Compiled: `torch.compile` of the UNet and
channels_last (`generation.compile`, `generation.channels_last`): it takes time at each start and
may change last bits.

## What {images:,} images cost

Hours, at the best published speed of any batch size. Hours on one card are GPU-hours. The floor
is this work done at the peak, which none of these runs reaches.

{costs}

Loading, queues and retries come on top; so does encoding, unless it overlaps with the GPU's work.

## Sources

{sources}

How they were read:

- The table's own benchmark ran Stable Diffusion 1.4 with 50 steps. The script in
  [the pull request it names](https://github.com/huggingface/diffusers/pull/2303) has DPM-Solver
  (50 UNet calls) and no safety checker: 2 % less work than here. Batches of 32 and more sliced
  the VAE. The whole table was read in
  [a copy](https://github.com/showlab/BoxDiff/blob/1bb2dbfea8904d23ad95addcb78c57a285f10eaf/diffusers/docs/source/en/optimization/torch2.0.mdx).
- Compiled speeds are published as iterations a second (A100, batch 16: 4.68). An image is taken
  as 50 of them, as diffusers' progress bar counts, and {other:.1f} % more for what follows.
  They are not of the same run as the plain ones: their page has an A100 without compile at
  3.04 to 3.60 iterations a second at batch 16, {eager_low:.2f} to {eager_high:.2f} images.
- The A100's of batch 1 are later than the rest, from one prompt to the decoded image. So are the
  H100's, in iterations a second, where nothing says whether it is SXM or PCIe; larger batches were
  measured on an SXM module, whose peak this is.

## Published since, of other models and other engines

Estimates take those of diffusers alone, which is what tasks run, and each for its own model.

{since}
"""

MLPERF = (
    "[MLPerf inference 4.1](https://github.com/mlcommons/inference_results_v4.1): an eighth of all"
)
STABLE_FAST = "[stable-fast](https://github.com/chengzeyi/stable-fast), README"
FAL = (
    "[fal-ai, January 2024](https://github.com/fal-ai/stable-diffusion-benchmarks): A100 80 GB "
    "SXM, torch 2.1, 50 steps, batch 1"
)
# What was measured; images a second of one card; its source; what estimates make of it.
SINCE = (
    ("SD 1.5, A100", 1 / 1.604, FAL, "SD 1, batch 1"),
    ("SD 1.5, A100, compiled, channels_last", 1 / 1.058, FAL, "SD 1, batch 1, compiled"),
    ("SD 1.5, A100, OneFlow", 1 / 0.950, FAL, "another engine"),
    ("SD 1.5, A100, TensorRT 9.0", 1 / 0.819, FAL, "another engine"),
    (
        "SD 1.5, H100 SXM, ONNX Runtime, 50 steps",
        1 / 0.572,
        "[onnxruntime#22834](https://github.com/microsoft/onnxruntime/pull/22834); size and steps "
        "are its script's defaults",
        "another engine",
    ),
    ("SD 1.5, H100", speeds.looped({1: 54.5})[1], STABLE_FAST, "SD 1, batch 1"),
    ("SD 1.5, H100, compiled", speeds.looped({1: 66.0})[1], STABLE_FAST, "SD 1, batch 1, compiled"),
    ("SD 1.5, H100, stable-fast", 104.6 / speeds.STEPS, STABLE_FAST, "another engine"),
    ("SDXL, 1024x1024, A100", 1 / 5.932, FAL, "SDXL at 1024x1024"),
    ("SDXL, 1024x1024, A100, compiled, channels_last", 1 / 5.136, FAL, "compiled"),
    ("SDXL, 1024x1024, H100", speeds.looped({1: 14.9})[1], STABLE_FAST, "SDXL at 1024x1024"),
    ("SDXL, 1024x1024, H100, compiled", speeds.looped({1: 18.5})[1], STABLE_FAST, "compiled"),
    ("SDXL, 1024x1024, A100, TensorRT 9.0", 1 / 4.102, FAL, "another engine"),
    ("SDXL, 1024x1024, 20 steps, one of 8 H100, TensorRT", 16.35 / 8, MLPERF, "another engine"),
    ("SDXL, 1024x1024, 20 steps, one of 8 H200, TensorRT", 17.42 / 8, MLPERF, "another engine"),
    (
        "SDXL-Turbo, L4, batch 16",
        1000 / (11 * 60),
        "[datadreamer#34](https://github.com/luxonis/datadreamer/pull/34): 4 steps by its code, "
        "which moves each part to the card for every call; 0.25 at batch 1",
        "moved for each call, as no task does",
    ),
    (
        "Qwen-Image-2512, 512x512, 50 steps, H200, batch 16, compiled",
        16 / (50 * 0.832),
        "[sglang#22183](https://github.com/sgl-project/sglang/pull/22183); 0.12 at batch 1",
        "another engine",
    ),
)


def main() -> None:
    page = PAGE.format(
        images=IMAGES,
        work=markdown(("part", "TFLOP"), work()),
        batches=markdown(("card", "memory, GB", "peak, TFLOP/s", "plain", "compiled"), batches()),
        costs=markdown(
            ("card", "speed", "images/s", "of peak", *(f"on {cards}" for cards in FLEETS)), costs()
        ),
        sources="\n".join(sources()),
        other=100 * speeds.OTHER_SHARE,
        eager_low=speeds.looped({16: 3.04})[16],
        eager_high=speeds.looped({16: 3.60})[16],
        since=markdown(
            ("what", "images/s", "source", "in estimates"),
            ((what, f"{speed:.2f}", source, use) for what, speed, source, use in SINCE),
        ),
    )
    print(page, end="")


def work() -> Iterator[tuple[str, str]]:
    unet, passes = TERA_FLOP_UNET, speeds.GUIDED_PASSES
    factors = f"{CALLS} calls x {passes} for guidance x {UNET_GMAC} GMAC x {FLOP_PER_MAC}"
    yield f"UNet: {factors}", f"{unet:.2f}"
    yield f"VAE decoder, {speeds.VAE_SHARE:.0%} of that", f"{unet * speeds.VAE_SHARE:.2f}"
    yield f"safety checker, {speeds.SAFETY_SHARE:.1%}", f"{unet * speeds.SAFETY_SHARE:.2f}"
    yield f"text encoder, {speeds.TEXT_SHARE:.2%}", f"{unet * speeds.TEXT_SHARE:.2f}"
    yield "an image", f"{TERA_FLOP_PER_IMAGE:.1f}"


def batches() -> Iterator[tuple[str, ...]]:
    for card in CARDS:
        peak = PEAKS[card.name]
        memory = " or ".join(map(str, peak.memory_gb))
        yield card.name, memory, f"{peak.teraflops:g}", listed(card.plain), listed(card.whole)


def listed(by_batch: Mapping[int, float]) -> str:
    return ", ".join(f"{batch}: {speed:.2f}" for batch, speed in by_batch.items()) or "-"


def costs() -> Iterator[tuple[str, ...]]:
    for card in CARDS:
        for basis, speed in bases(card):
            hours = IMAGES / speed / 3600
            share = f"{speed / floor(card):.0%}"
            fleets = (f"{hours / cards:,.1f}" for cards in FLEETS)
            yield card.name, basis, f"{speed:.2f}", share, *fleets


def floor(card: Card) -> float:
    """Images a second that a card cannot exceed: its peak over the work of an image."""
    return PEAKS[card.name].teraflops / TERA_FLOP_PER_IMAGE


def bases(card: Card) -> Iterator[tuple[str, float]]:
    yield "plain", published_speed(card)
    yield "compiled", published_speed(card, way="whole")
    yield "floor", floor(card)


def sources() -> Iterator[str]:
    names = ", ".join(card.name for card in CARDS[:-2])
    yield f"- Speeds, {names}: {DIFFUSERS}."
    yield f"- Speeds, H100, batch 1: {STABLE_FAST}; iterations a second, PyTorch 2.1.0."
    yield f"- Speeds, H100 and H200, larger batches: {OWN}."
    yield from (f"- Peak, {card.name}: {PEAKS[card.name].source}." for card in CARDS)


if __name__ == "__main__":
    main()
