"""Measurements of generation for `make bench`: ours and the peers, each a process of its own.

``python benchmarks/generation.py NAME FOLDER`` runs one and prints its figure.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from shared import IMAGES_PER_SYNSET, plan_made_up

BEGAN = time.perf_counter()

# Models that leave the CPU free meanwhile: images, how many a shard, and a second. Stable Diffusion
# 1.4 on an H100, and there one of a few steps, whose tasks have several shards.
PACED = {"paced": (200, 200, 2.6), "few_steps": (800, 200, 26.0)}
PACED_BATCH = 10

# A small Stable Diffusion XL of random weights. On this CPU an image costs it about twice what
# it costs to save a PNG file; Stable Diffusion 1.4 costs an H100 about four times that.
REAL: dict[str, Any] = {
    "height": 256,
    "width": 256,
    "num_inference_steps": 1,
    "precision": "fp32",
    "batch_size": 10,
    "scheduler": None,
    "safety_checker": False,
}
# The built-in pipeline of random weights: nearly all of an image's time is the model's.
TINY: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "precision": "fp32",
    "batch_size": 10,
}
REAL_TURNS, TINY_TURNS, IMAGES_A_TURN = 10, 20, 200


def photo_like(seed: int, size: int = 512) -> Any:
    """Draw what codecs find as hard as a photograph: noise, more of it in large shapes."""
    random, picture = np.random.default_rng(seed), np.zeros((size, size, 3))
    for scale in (2, 4, 8, 16, 32, 64, 128, 256):
        coarse = random.normal(size=(size // scale, size // scale, 3)) * scale**0.75
        picture += coarse.repeat(scale, axis=0).repeat(scale, axis=1)
    picture += random.normal(size=picture.shape)
    picture -= picture.min()
    return (picture / picture.max() * 255).astype(np.uint8)


def paced(folder: Path, model: str = "paced") -> float:
    """Ours: everything from the plan to the finished shard, but for the model itself."""
    from sdwn.generation.batching import NoiseSampler, Sample
    from sdwn.generation.task import make_shards

    pictures = [photo_like(seed) for seed in range(PACED_BATCH)]
    images, shard, images_per_second = PACED[model]

    class Paced(NoiseSampler):
        def sample(self, specs: Sequence[Any]) -> list[Sample]:
            time.sleep(len(specs) / images_per_second)
            return [Sample(picture, "ok", 9, truncated=False) for picture in pictures]

    batches = {"batch_size": PACED_BATCH}
    paths, plan = plan_made_up(folder / "run", images, shard=shard, generation=batches)
    sampler = Paced(plan.config)
    began = time.perf_counter()
    make_shards(paths, plan, plan.shards, sampler)
    return time.perf_counter() - began


def few_steps(folder: Path) -> float:
    """Ours, beside a model of a few steps."""
    return paced(folder, "few_steps")


def xl(folder: Path) -> str:
    """Make the small Stable Diffusion XL."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import families

    families.stable_diffusion_xl(folder / "model")
    return str(folder / "model")


def beside_loop(folder: Path, model: str, settings: dict[str, Any], turns: int) -> list[float]:
    """Time a run and the loop of accelerate's guide to distributed inference, in turn.

    Both load their weights and then make the same images, shard by shard; libraries are imported
    before. Two processes, one after the other, would also measure what the machine does meanwhile.

    Returns:
        Our images/s and the loop's: of the median turn, with its part of the loading.
    """
    from sdwn.generation.batching import load_sampler
    from sdwn.generation.task import make_shards
    from sdwn.preflight.peers import accelerate_loop

    paths, plan = plan_made_up(
        folder / "run", turns * IMAGES_A_TURN, model, IMAGES_A_TURN, generation=settings
    )
    loop = local(model), plan.config.generation, folder / "png"
    load_sampler(plan.config), accelerate_loop(*loop)

    began = time.perf_counter()
    # As a task does: its prompts are encoded before the other weights are loaded.
    sampler = load_sampler(plan.config, specs=chain.from_iterable(map(plan.specs, plan.shards)))
    loaded = time.perf_counter()
    make = accelerate_loop(*loop)
    loading = loaded - began, time.perf_counter() - loaded
    seconds = list[tuple[float, float]]()
    for shard in plan.shards:
        # We wait until a shard is on the disk, and would wait for the loop's files, too.
        os.sync()
        began = time.perf_counter()
        make_shards(paths, plan, [shard], sampler)
        made = time.perf_counter()
        specs = list(plan.specs(shard))
        make(specs, settings["batch_size"])
        seconds.append((made - began, time.perf_counter() - made))
        files = [folder / "png" / f"{spec.name}.png" for spec in specs]
        # Of a rounding: prompts are encoded alone here, and there together.
        assert largest_difference(paths.shard(shard.index), files) <= 1
    medians = map(median, zip(*seconds, strict=True))
    return [
        IMAGES_A_TURN / (turn + once / turns) for turn, once in zip(medians, loading, strict=True)
    ]


def largest_difference(shard: Path, files: Sequence[Path]) -> int:
    """Return the largest difference, of 255, between a shard's pixels and those of image files."""
    from PIL import Image
    from sdwn.storage.images import decode
    from sdwn.storage.shards import ImageFile

    largest = 0
    with ImageFile(shard) as images:
        for index, file in enumerate(files):
            theirs = np.asarray(Image.open(file)).astype(int)
            ours = decode(images.payload(index), "webp", *theirs.shape[1::-1])
            largest = max(largest, int(np.abs(np.asarray(ours) - theirs).max()))
    return largest


def local(model: str) -> Path:
    """Return the folder of a model."""
    from sdwn.models.builtin import builtin_folder

    return builtin_folder("tiny") if model.startswith("builtin:") else Path(model)


def real(folder: Path) -> list[float]:
    """Ours and the loop, with the small Stable Diffusion XL."""
    return beside_loop(folder, xl(folder), REAL, REAL_TURNS)


def tiny(folder: Path) -> list[float]:
    """Ours and the loop, with the built-in pipeline of random weights."""
    return beside_loop(folder, "builtin:tiny", TINY, TINY_TURNS)


def start(folder: Path) -> float:
    """Ours: ten images, as a task's process makes it."""
    from sdwn.generation.task import GENERATE
    from sdwn.jobs.task import ArrayTask

    plan_made_up(folder / "run", IMAGES_PER_SYNSET, "builtin:tiny", generation=TINY)
    ArrayTask(GENERATE, str(folder / "run"), (0,))()
    return 0.0


def start_diffusers(folder: Path) -> float:
    """A peer: ten images in a plain script, saved."""
    from diffusers import AutoPipelineForText2Image
    from sdwn.models.builtin import builtin_folder

    pipeline = AutoPipelineForText2Image.from_pretrained(builtin_folder("tiny"))
    size = {"height": TINY["height"], "width": TINY["width"]}
    images = pipeline(["a dog"] * IMAGES_PER_SYNSET, num_inference_steps=4, **size).images
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return 0.0


def tuner(_: Path) -> float:
    """The worst share of the best speed over simulated cards; fails above ten probes or memory."""
    return min(tuned_share(np.random.default_rng(seed)) for seed in range(500))


class SimulatedCard:
    """A fixed time a batch, a time an image, 1 % of noise, an A100's memory line."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random, self.peak_bytes = random, 0
        self.fixed, self.each = random.uniform(0.5, 4.0), random.uniform(0.3, 1.5)
        self.limit_bytes = int(0.9e9 * random.choice([8, 11, 16, 24, 40, 80]))

    def seconds(self, size: int) -> float:
        self.peak_bytes = self.peak(size)
        return size / self.speed(size) / self.random.normal(1.0, 0.01)

    def speed(self, size: int) -> float:
        return size / (self.fixed + self.each * size)

    def peak(self, size: int) -> int:
        return int(3.6e9 + 0.81e9 * size)

    def forget_peak(self) -> None:
        pass


def tuned_share(random: np.random.Generator) -> float:
    """Tune one card; return the chosen size's share of the best speed that memory allows."""
    from sdwn.batches import batch_sizes
    from sdwn.devices.tuning import tune

    card: Any = SimulatedCard(random)
    found = tune(card.seconds, card, 10)
    assert card.peak(found.batch_size) <= card.limit_bytes
    assert len(found.probes) <= 10
    fitting = (s for s in batch_sizes(10, 200) if card.peak(s) <= card.limit_bytes)
    return float(card.speed(found.batch_size) / max(map(card.speed, fitting)))


RUNS = {run.__name__: run for run in (paced, few_steps, real, tiny, start, start_diffusers, tuner)}


def main(name: str, folder: str) -> None:
    figure = RUNS[name](Path(folder))
    print(json.dumps({"figure": figure, "whole_seconds": time.perf_counter() - BEGAN}))


if __name__ == "__main__":
    main(*sys.argv[1:])
