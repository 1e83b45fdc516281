"""A sampler without a model: coloured noise at a set pace, to rehearse a cluster without torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdwn.config import RunConfig
from sdwn.images import Sample
from sdwn.plan import ImageSpec

SECONDS_A_STEP = 0.01


class NoiseSampler:
    """Draw each image from its seed alone; a step of an image takes 10 ms."""

    def __init__(self, config: RunConfig) -> None:
        self._generation = config.generation
        self.provenance: dict[str, Any] = {
            "model": config.model.name,
            "device": "cpu",
            "numpy": np.__version__,
            "python": platform.python_version(),
        }

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Draw a batch of images."""
        time.sleep(SECONDS_A_STEP * self._generation.num_inference_steps * len(specs))
        return [self._draw(spec) for spec in specs]

    def _draw(self, spec: ImageSpec) -> Sample:
        shape = (self._generation.height, self._generation.width, 3)
        # RandomState's stream is frozen: the same noise under every NumPy.
        random = np.random.RandomState(spec.seed % 2**32)
        pixels = random.randint(0, 256, shape, dtype=np.uint8)
        return Sample(pixels, "ok", len(spec.prompt.split()), truncated=False)
