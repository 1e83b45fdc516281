"""A sampler without a model: coloured noise at a set pace, to rehearse a cluster without torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdwn.config import RunConfig
from sdwn.devices.device import Device
from sdwn.devices.gpu_profiles import run_workload
from sdwn.generation.batching import Sample
from sdwn.planning.plan import ImageSpec

SECONDS_A_STEP = 0.01


class NoiseSampler:
    """Makes each image from its seed alone; a step of an image takes 10 ms."""

    vae_slicing = False
    loading_seconds = 0.0

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.provenance: dict[str, Any] = {
            "model": config.model.name,
            "device": "cpu",
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        self.device = Device(gpu=False)
        self.workload = run_workload(config, self.provenance, self.device.total_bytes)

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Make a batch of images."""
        time.sleep(SECONDS_A_STEP * self.config.generation.num_inference_steps * len(specs))
        return [self._draw(spec) for spec in specs]

    def seconds(self, specs: Sequence[ImageSpec]) -> float:
        """Time a batch."""
        began = time.perf_counter()
        self.sample(specs)
        return time.perf_counter() - began

    def in_float32(self, spec: ImageSpec) -> Sample:
        """Make one image; noise has no precision."""
        return self.sample([spec])[0]

    def check(self, samples: list[Sample]) -> list[Sample]:
        """Noise is never flagged."""
        return samples

    def fits(self, sliced: bool) -> int | None:
        """There is no card to ask."""
        return None

    def slice_vae(self, on: bool = True) -> bool:
        """There is no VAE."""
        return False

    def release(self) -> None:
        """Nothing is held."""

    @property
    def limit_bytes(self) -> int:
        """The memory that a batch may use."""
        return self.device.limit_bytes

    @property
    def peak_bytes(self) -> int:
        """The most memory used since :meth:`forget_peak`."""
        return self.device.peak_bytes

    def forget_peak(self) -> None:
        """Begin to look for a new peak."""
        self.device.forget_peak()

    def _draw(self, spec: ImageSpec) -> Sample:
        shape = (self.config.generation.height, self.config.generation.width, 3)
        # RandomState's stream is frozen: the same noise under every NumPy.
        random = np.random.RandomState(spec.seed % 2**32)
        pixels = random.randint(0, 256, shape, dtype=np.uint8)
        return Sample(pixels, "ok", len(spec.prompt.split()), truncated=False)
