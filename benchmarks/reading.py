"""Measurements of reading for `make bench`: a release and a folder of PNG files, the same images.

``python benchmarks/reading.py make FOLDER`` writes both; ``release`` and ``png`` read all images
in random order, decoded, and print how many a second. ``some`` prints the seconds that opening
any release takes, and reading 100 of its images, not decoded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from shared import plan_made_up
from skimage import data

IMAGES = 300
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "retina")
SEED = 0


def photograph(seed: int) -> Any:
    """Cut a piece out of a real photograph, as large as Stable Diffusion's images."""
    random = np.random.default_rng(seed)
    whole = Image.fromarray(getattr(data, PHOTOGRAPHS[seed % len(PHOTOGRAPHS)])())
    side = int(min(whole.size) * random.uniform(0.6, 1))
    left, top = (int(random.integers(0, length - side + 1)) for length in whole.size)
    return np.asarray(whole.crop((left, top, left + side, top + side)).resize((512, 512)))


def make(folder: Path) -> None:
    from sdwn.generation.batching import NoiseSampler, Sample
    from sdwn.generation.task import make_shards
    from sdwn.paths import ReleasePaths
    from sdwn.releases.merge import merge

    class Photos(NoiseSampler):
        def sample(self, specs: Sequence[Any]) -> list[Sample]:
            pixels = [photograph(spec.seed % 2**32) for spec in specs]
            return [Sample(picture, "ok", 9, truncated=False) for picture in pixels]

    paths, plan = plan_made_up(folder / "run", IMAGES)
    make_shards(paths, plan, plan.shards, Photos(plan.config))
    release = merge([paths], ReleasePaths(folder / "release"))
    (folder / "png").mkdir()
    for index in range(IMAGES):
        release.image(index).save(folder / f"png/{index:05d}.png")


def rate(read: Callable[[int], Any]) -> float:
    order = np.random.default_rng(SEED).permutation(IMAGES)
    read(0)  # Pillow loads its plugins, which no longer data set would notice
    began = time.perf_counter()
    for index in order.tolist():
        read(index)
    return IMAGES / (time.perf_counter() - began)


def release(folder: Path) -> float:
    import sdwn

    dataset = sdwn.ReleaseDataset(sdwn.Release(folder / "release"))
    return rate(lambda index: dataset[index][0])


def png(folder: Path) -> float:
    # As torchvision's ImageFolder opens a file.
    return rate(lambda index: Image.open(folder / f"png/{index:05d}.png").convert("RGB"))


def some(folder: Path) -> float:
    import sdwn

    began = time.perf_counter()
    release = sdwn.Release(folder / "release")
    for index in np.random.default_rng(SEED).integers(len(release), size=100).tolist():
        release.payload(release.location(index))
    return time.perf_counter() - began


def main(name: str, folder: str) -> None:
    if name == "make":
        make(Path(folder))
    elif name == "some":
        print(json.dumps({"seconds": some(Path(folder))}))
    else:
        found = {"release": release, "png": png}[name](Path(folder))
        print(json.dumps({"images_per_second": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
