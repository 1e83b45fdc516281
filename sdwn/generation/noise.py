"""A sampler without a model: coloured noise at a set pace, to rehearse a cluster without torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

import numpy as np

from sdwn.config import RunConfig
from sdwn.devices.device import Device
from sdwn.devices.tuning import run_workload
from sdwn.generation.batching import ImageSampler, Sample
from sdwn.planning.plan import ImageSpec

SECONDS_A_STEP = 0.01


class NoiseSampler(ImageSampler):
    """A sampler of plain noise, from the seed alone; a step of an image takes 10 ms."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = Device(gpu=False)
        self.provenance = {
            "model": config.model.name,
            "device": "cpu",
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        self.workload = run_workload(config, self.provenance, self.device.total_bytes)

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Make a batch of images."""
        time.sleep(SECONDS_A_STEP * self.config.generation.num_inference_steps * len(specs))
        return [self._draw(spec) for spec in specs]

    def _draw(self, spec: ImageSpec) -> Sample:
        shape = (self.config.generation.height, self.config.generation.width, 3)
        # RandomState's stream is frozen: the same noise under every NumPy.
        random = np.random.RandomState(spec.seed % 2**32)
        pixels = random.randint(0, 256, shape, dtype=np.uint8)
        return Sample(pixels, "ok", len(spec.prompt.split()), truncated=False)
