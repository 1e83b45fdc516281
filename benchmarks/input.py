"""Measurements of the classifier's input for `make bench`: a release against timm's loader.

``python benchmarks/input.py SIDE PRESET FOLDER`` reads, decodes, resizes, crops and normalises
all images that ``reading.py make FOLDER`` wrote, as the preset's model wants them, in batches and
on all CPUs, and prints how many a second. SIDE is ``release``, or ``timm``: its dataset and
loader over the folder of PNG files. Both have started before: a first pass does not count.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH = 32
PASSES = 2
WORKERS = len(os.sched_getaffinity(0))


def release(preset: str, folder: Path) -> Callable[[], Iterator[Any]]:
    import numpy as np
    import sdwn
    import timm
    import torch
    from sdwn.prediction.network import Classifier, prepared_images
    from sdwn.prediction.pretrained import PRESETS

    # Its network is not run; any will do.
    network = timm.create_model("test_resnet", num_classes=1000)
    classifier = Classifier(preset, network, PRESETS[preset].preprocessing, {})
    opened = sdwn.Release(folder / "release")

    def batches() -> Iterator[Any]:
        images = prepared_images(opened, classifier, ahead=2 * BATCH)
        while chunk := list(itertools.islice(images, BATCH)):
            pixels = np.stack([pixels for _, pixels in chunk])
            yield classifier.normalise(torch.from_numpy(pixels))

    return batches


def timms(preset: str, folder: Path) -> Callable[[], Iterator[Any]]:
    import torch
    from sdwn.prediction.pretrained import PRESETS
    from sdwn.preflight.peers import timm_loader

    options = {"num_workers": WORKERS, "device": torch.device("cpu")}
    loader = timm_loader(folder / "png", PRESETS[preset].preprocessing, BATCH, **options)
    return lambda: (images for images, _ in loader)


def main(side: str, preset: str, folder: str) -> None:
    batches = {"release": release, "timm": timms}[side](preset, Path(folder))
    sum(len(batch) for batch in batches())
    began = time.perf_counter()
    images = sum(len(batch) for _ in range(PASSES) for batch in batches())
    found = images / (time.perf_counter() - began)
    print(json.dumps({"images_per_second": found, "images": images}))


if __name__ == "__main__":
    main(*sys.argv[1:])
