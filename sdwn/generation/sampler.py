"""Sampling: a batch of image specs through a diffusers pipeline."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sdwn.config import RunConfig
from sdwn.devices import profiles as gpus
from sdwn.devices.device import Device, out_of_memory_told
from sdwn.errors import OutOfMemoryError
from sdwn.generation.batching import Sample
from sdwn.generation.prompts import PromptEncoder
from sdwn.models.pipelines import (
    denoiser,
    describe_pipeline,
    dtype,
    load_pipeline,
    obtained,
    require_device,
)
from sdwn.models.weights import Weights
from sdwn.storage.images import Pixels

if TYPE_CHECKING:
    from sdwn.planning.plan import ImageSpec

log = logging.getLogger(__name__)

# Checking shares the card with the next batch: it must not need much of it.
_CHECKED_AT_ONCE = 16

TIMED_STEPS = 8


class Sampler:
    """A run's pipeline, loaded and placed on this process's device.

    An image depends on its spec alone, up to the last bits of floating point; the same batch
    of specs on the same device and versions gives the same bytes. ``weights`` are those that a
    run is locked to; without them the config's are found, or got from the hub.

    Raises:
        UsageError: the config asks for a scheduler, precision or safety checker that this model
            or device has not.
        SdwnError: the model cannot be loaded.
    """

    def __init__(self, config: RunConfig, weights: Weights | None = None) -> None:
        self.config = config
        self.device = Device()
        require_device(config, self.device.torch.type)
        weights = weights or obtained(config)
        self.pipeline = load_pipeline(config, weights, self.device)
        # Apart from the pipeline, images are checked while the next ones are sampled.
        self._checker = getattr(self.pipeline, "safety_checker", None)
        if self._checker is not None:
            self.pipeline.safety_checker = None
        self.provenance = describe_pipeline(config, weights, self.pipeline, self.device)
        self.workload = gpus.workload(config, self.provenance, self.device.total_bytes)
        self._prompts = PromptEncoder(self.pipeline, config.generation)
        self.vae_slicing = False
        self.loading_seconds = 0.0

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Sample one batch, an image for each spec, in their order.

        An image that came out as NaN in half precision is sampled again, alone and in float32.

        Raises:
            OutOfMemoryError: the device has no room for so many; sampling fewer is possible.
        """
        pixels, nan = self._pixels(specs)
        samples = [self._sample(spec, pixels[i], nan[i]) for i, spec in enumerate(specs)]
        if self.config.generation.precision == "fp32":
            return samples
        return [
            self._again(spec, sample) if sample.status == "nan" else sample
            for spec, sample in zip(specs, samples, strict=True)
        ]

    def seconds(self, specs: Sequence[ImageSpec]) -> float:
        """Time a batch; from a few of many steps, for each of them takes as long.

        Raises:
            OutOfMemoryError: the device has no room for so many.
        """
        steps, ends = self.config.generation.num_inference_steps, list[float]()

        def end_step(*_: Any) -> dict[str, Any]:
            self.device.synchronize()
            ends.append(time.perf_counter())
            return {}

        timed = self._few_steps(end_step) if steps > TIMED_STEPS else {}
        began = time.perf_counter()
        self._pixels(specs, **timed)
        taken = time.perf_counter() - began
        if len(ends) < 2:
            return taken
        return taken + (steps - TIMED_STEPS) * float(np.median(np.diff(ends)))

    def _few_steps(self, end_step: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        # Some families of pipelines have no such hook; all their steps are timed.
        if "callback_on_step_end" not in inspect.signature(self.pipeline.__call__).parameters:
            return {}
        return {"num_inference_steps": TIMED_STEPS, "callback_on_step_end": end_step}

    def in_float32(self, spec: ImageSpec) -> Sample:
        """Sample one image alone and in float32.

        Raises:
            OutOfMemoryError: the device has no room for weights of twice the size.
        """
        try:
            with out_of_memory_told():
                self.pipeline.to(torch.float32)
                encoder = PromptEncoder(self.pipeline, self.config.generation)
                pixels, nan = _to_uint8(self._run([spec], encoder))
        finally:
            # There and back, every weight is what it was.
            self.pipeline.to(dtype(self.config))
        return dataclasses.replace(self._sample(spec, pixels[0], nan[0]), redone=True)

    def check(self, samples: list[Sample]) -> list[Sample]:
        """Blacken what the safety checker flags; may run while another batch is sampled."""
        if self._checker is None:
            return samples
        flags: list[bool] = []
        for start in range(0, len(samples), _CHECKED_AT_ONCE):
            flags += self._flags_or_wait(samples[start : start + _CHECKED_AT_ONCE])
        return [
            dataclasses.replace(sample, pixels=np.zeros_like(sample.pixels), status="nsfw")
            if flagged and sample.status == "ok"
            else sample
            for sample, flagged in zip(samples, flags, strict=True)
        ]

    def fits(self, sliced: bool) -> int | None:
        """Estimate how many images a batch may have; None where there is no card to ask."""
        if not self.device.is_gpu:
            return None
        free = self.device.usable_bytes - self.device.used_bytes
        return gpus.estimated_fit(self.config, free, self.device.total_bytes, sliced)

    def slice_vae(self, on: bool = True) -> bool:
        """Decode images one at a time, or no longer; False where that changes nothing."""
        vae: Any = getattr(self.pipeline, "vae", None)
        if self.vae_slicing == on or not hasattr(vae, "enable_slicing"):
            return False
        if on:
            vae.enable_slicing()
        else:
            vae.disable_slicing()
        self.vae_slicing = on
        return True

    def release(self) -> None:
        """Give memory back after running out of it."""
        self.device.release()

    @property
    def limit_bytes(self) -> int:
        """The memory that a batch may use."""
        return gpus.below_head_room(self.device.usable_bytes, self.device.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most memory used since :meth:`forget_peak`."""
        return self.device.peak_bytes

    def forget_peak(self) -> None:
        """Begin to look for a new peak."""
        self.device.forget_peak()

    def _pixels(self, specs: Sequence[ImageSpec], **options: Any) -> tuple[Pixels, list[bool]]:
        try:
            with out_of_memory_told():
                return _to_uint8(self._run(specs, self._prompts, **options))
        except BaseException:
            self._mend()
            raise

    def _sample(self, spec: ImageSpec, pixels: Pixels, nan: bool) -> Sample:
        tokens = self._prompts.tokens(spec.prompt)
        truncated = tokens > self._prompts.token_limit
        status = "nan" if nan else "ok"
        return Sample(pixels, status, tokens, truncated, vae_slicing=self.vae_slicing)

    def _run(
        self, specs: Sequence[ImageSpec], prompts: PromptEncoder, **options: Any
    ) -> torch.Tensor:
        generation = self.config.generation
        generators = [torch.Generator("cpu").manual_seed(spec.seed) for spec in specs]
        arguments = prompts.arguments([spec.prompt for spec in specs])
        if prompts.known:
            arguments["latents"] = self._latents(generators)
        output = self.pipeline(
            height=generation.height,
            width=generation.width,
            guidance_scale=generation.guidance_scale,
            # Schedulers that add noise in their steps go on with the same generators.
            generator=generators,
            output_type="pt",
            **{"num_inference_steps": generation.num_inference_steps, **options},
            **arguments,
        )
        images: torch.Tensor = output.images
        return images

    def _latents(self, generators: list[torch.Generator]) -> torch.Tensor:
        generation, factor = self.config.generation, self.pipeline.vae_scale_factor
        network = denoiser(self.pipeline)
        height, width = generation.height // factor, generation.width // factor
        # float32 whatever the precision, so that this does not change an image's noise.
        noise = [
            torch.randn((1, network.config.in_channels, height, width), generator=generator)
            for generator in generators
        ]
        return torch.cat(noise).to(self.pipeline.device, network.dtype)

    def _again(self, spec: ImageSpec, sample: Sample) -> Sample:
        try:
            again = self.in_float32(spec)
        except OutOfMemoryError as error:
            log.warning("%s %d: NaN, and no room for float32: %s", spec.synset, spec.number, error)
            return sample
        told = "NaN again" if again.status == "nan" else "whole"
        log.warning("%s %d: NaN, sampled again in float32: %s", spec.synset, spec.number, told)
        return again

    def _flags_or_wait(self, samples: list[Sample]) -> list[bool]:
        """Check several at once, or one at a time, or wait until the next batch leaves room."""
        for count, seconds in ((len(samples), 0.0), (1, 0.0), (1, 5.0), (1, 30.0)):
            time.sleep(seconds)
            try:
                with out_of_memory_told():
                    parts = (samples[i : i + count] for i in range(0, len(samples), count))
                    return [flag for part in parts for flag in self._flags(part)]
            except OutOfMemoryError as error:
                log.warning("while checking %d images: %s", count, error)
            self.device.release()
        return self._flags(samples[:1]) + self._flags_or_wait(samples[1:])

    def _flags(self, samples: list[Sample]) -> list[bool]:
        assert self._checker is not None
        pictures = [Image.fromarray(sample.pixels) for sample in samples]
        pixels = self.pipeline.feature_extractor(pictures, return_tensors="pt").pixel_values
        clip_input = pixels.to(self.device.torch, self._checker.dtype)
        # It blackens what it is given; only the flags are wanted.
        given = np.zeros((len(samples), 1, 1, 3), dtype=np.float32)
        _, flags = self._checker(images=given, clip_input=clip_input)
        return [bool(flag) for flag in flags]

    def _mend(self) -> None:
        # Stable Diffusion XL decodes in float32 and, interrupted there, would stay in it.
        vae = getattr(self.pipeline, "vae", None)
        if vae is not None:
            vae.to(dtype=dtype(self.config))


def _to_uint8(images: torch.Tensor) -> tuple[Pixels, list[bool]]:
    # NCHW in 0..1 to NHWC. In float32, as diffusers' own conversion to PIL.
    nan = images.isnan().flatten(1).any(dim=1)
    whole = images.float().masked_fill(nan[:, None, None, None], 0.0)
    pixels = (whole * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return pixels.cpu().numpy(), nan.tolist()
