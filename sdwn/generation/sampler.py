"""The sampler of diffusers pipelines: a batch of images from their prompts and seeds."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sdwn.config import GenerationConfig, RunConfig
from sdwn.devices.device import Device, plain_out_of_memory
from sdwn.devices.tuning import run_workload
from sdwn.errors import OutOfMemoryError
from sdwn.generation.batching import ImageSampler, Sample
from sdwn.models.pipelines import (
    FAMILIES,
    denoiser,
    describe_pipeline,
    dtype,
    load_pipeline,
    obtain_weights,
    require_device,
)
from sdwn.models.weights import Weights
from sdwn.storage.images import Pixels

if TYPE_CHECKING:
    from sdwn.planning.plan import ImageSpec

log = logging.getLogger(__name__)

# Checking shares the card with the next batch: it must not need much of it.
_CHECKED_AT_ONCE = 16
# A batch holds few different prompts; a shard's come one synset after another.
_KEPT_PROMPTS = 64

TIMED_STEPS = 8


class Sampler(ImageSampler):
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
        weights = weights or obtain_weights(config)
        self.pipeline = load_pipeline(config, weights, self.device)
        # Apart from the pipeline, images are checked while the next ones are sampled.
        self._checker = getattr(self.pipeline, "safety_checker", None)
        if self._checker is not None:
            self.pipeline.safety_checker = None
        self.provenance = describe_pipeline(config, weights, self.pipeline, self.device)
        self.workload = run_workload(config, self.provenance, self.device.total_bytes)
        self._prompts = PromptEncoder(self.pipeline, config.generation)

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
        for i, spec in enumerate(specs):
            if samples[i].status != "nan":
                continue
            name = f"{spec.synset} {spec.number}"
            try:
                samples[i] = self.in_float32(spec)
            except OutOfMemoryError as error:
                log.warning("%s: NaN, and no room for float32: %s", name, error)
            else:
                outcome = "NaN again" if samples[i].status == "nan" else "whole"
                log.warning("%s: NaN, sampled again in float32: %s", name, outcome)
        return samples

    def _pixels(self, specs: Sequence[ImageSpec], **options: Any) -> tuple[Pixels, list[bool]]:
        """Sample a batch; return RGB of shape (images, height, width, 3), and which were NaN."""
        try:
            with plain_out_of_memory():
                return _to_uint8(self._run(specs, self._prompts, **options))
        except BaseException:
            self._restore_vae_dtype()
            raise

    def _run(
        self, specs: Sequence[ImageSpec], prompts: PromptEncoder, **options: Any
    ) -> torch.Tensor:
        generation = self.config.generation
        # On the CPU: the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(spec.seed) for spec in specs]
        arguments = prompts.arguments([spec.prompt for spec in specs])
        if prompts.family is not None:
            factor, network = self.pipeline.vae_scale_factor, denoiser(self.pipeline)
            size = generation.height // factor, generation.width // factor
            # float32 whatever the precision, so that this does not change an image's noise.
            noise = [
                torch.randn((1, network.config.in_channels, *size), generator=generator)
                for generator in generators
            ]
            arguments["latents"] = torch.cat(noise).to(self.pipeline.device, network.dtype)
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

    def _sample(self, spec: ImageSpec, pixels: Pixels, nan: bool) -> Sample:
        tokens = self._prompts.tokens(spec.prompt)
        truncated = tokens > self._prompts.token_limit
        status = "nan" if nan else "ok"
        return Sample(pixels, status, tokens, truncated, vae_slicing=self.vae_slicing)

    def _restore_vae_dtype(self) -> None:
        # Stable Diffusion XL decodes in float32 and, interrupted there, would stay in it.
        vae = getattr(self.pipeline, "vae", None)
        if vae is not None:
            vae.to(dtype=dtype(self.config))

    def in_float32(self, spec: ImageSpec) -> Sample:
        """Sample one image alone and in float32.

        Raises:
            OutOfMemoryError: the device has no room for weights of twice the size.
        """
        try:
            with plain_out_of_memory():
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

    def _flags_or_wait(self, samples: list[Sample]) -> list[bool]:
        """Check several at once, or one at a time, waiting until the next batch leaves room.

        Raises:
            OutOfMemoryError: the device has no room to check a single image.
        """
        try:
            with plain_out_of_memory():
                return self._flags(samples)
        except OutOfMemoryError as error:
            log.warning("while checking %d images: %s", len(samples), error)
        return [flag for sample in samples for flag in self._flags_alone([sample])]

    def _flags_alone(self, sample: list[Sample]) -> list[bool]:
        for seconds in (0.0, 5.0, 30.0):
            self.device.release()
            time.sleep(seconds)
            try:
                with plain_out_of_memory():
                    return self._flags(sample)
            except OutOfMemoryError as error:
                log.warning("while checking an image: %s", error)
        with plain_out_of_memory():
            return self._flags(sample)

    def _flags(self, samples: list[Sample]) -> list[bool]:
        assert self._checker is not None
        images = [Image.fromarray(sample.pixels) for sample in samples]
        pixels = self.pipeline.feature_extractor(images, return_tensors="pt").pixel_values
        clip_input = pixels.to(self.device.torch, self._checker.dtype)
        # It blackens what it is given; only the flags are wanted.
        given = np.zeros((len(samples), 1, 1, 3), dtype=np.float32)
        _, flags = self._checker(images=given, clip_input=clip_input)
        return [bool(flag) for flag in flags]

    def time_batch(self, specs: Sequence[ImageSpec]) -> float:
        """Return how many seconds a batch takes; of many steps only a few are timed.

        Raises:
            OutOfMemoryError: the device has no room for so many.
        """
        steps, ends = self.config.generation.num_inference_steps, list[float]()

        def end_step(*_: Any) -> dict[str, Any]:
            self.device.synchronize()
            ends.append(time.perf_counter())
            return {}

        options: dict[str, Any] = {}
        # Some families of pipelines have no such hook; all their steps are timed.
        hooks = inspect.signature(self.pipeline.__call__).parameters
        if steps > TIMED_STEPS and "callback_on_step_end" in hooks:
            options = {"num_inference_steps": TIMED_STEPS, "callback_on_step_end": end_step}
        began = time.perf_counter()
        self._pixels(specs, **options)
        taken = time.perf_counter() - began
        if len(ends) < 2:
            return taken
        return taken + (steps - TIMED_STEPS) * float(np.median(np.diff(ends)))

    def slice_vae(self, on: bool = True) -> bool:
        """Set whether images are decoded one at a time; return whether that changes anything."""
        vae: Any = getattr(self.pipeline, "vae", None)
        if self.vae_slicing == on or not hasattr(vae, "enable_slicing"):
            return False
        if on:
            vae.enable_slicing()
        else:
            vae.disable_slicing()
        self.vae_slicing = on
        return True


def _to_uint8(images: torch.Tensor) -> tuple[Pixels, list[bool]]:
    # NCHW in 0..1 to NHWC. In float32, as diffusers' own conversion to PIL.
    nan = images.isnan().flatten(1).any(dim=1)
    whole = images.float().masked_fill(nan[:, None, None, None], 0.0)
    pixels = (whole * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return pixels.cpu().numpy(), nan.tolist()


class PromptEncoder:
    """Turns prompts into the arguments of a pipeline's call.

    A prompt is encoded once and alone, so that its embedding depends on no other prompt of the
    batch; the negative one is encoded with the first. Pipelines of no known family encode the
    texts themselves, in every call.
    """

    def __init__(self, pipeline: Any, generation: GenerationConfig) -> None:
        self._pipeline = pipeline
        self._negative_prompt = generation.negative_prompt
        self._guidance = generation.guidance_scale > 1
        self.family = FAMILIES.get(type(pipeline).__name__)
        self._negatives: dict[str, torch.Tensor] = {}
        self._positives: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._counts: dict[str, int] = {}

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the pipeline's arguments for a batch of prompts."""
        if self.family is None:
            texts: dict[str, Any] = {"prompt": list(prompts)}
            if self._negative_prompt is not None:
                texts["negative_prompt"] = [self._negative_prompt] * len(prompts)
            return texts
        for prompt in prompts:
            if prompt not in self._positives:
                self._positives[prompt] = self._encode(prompt)
        encoded = [self._positives[prompt] for prompt in prompts]
        while len(self._positives) > _KEPT_PROMPTS:
            self._positives.popitem(last=False)
        batch = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
        for name, negative in self._negatives.items():
            batch[name] = negative.expand(len(prompts), *negative.shape[1:])
        return {**self.family.call_options, **batch}

    @torch.no_grad()
    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        assert self.family is not None
        first = self._guidance and not self._negatives
        negative = self._negative_prompt
        encoded = self._pipeline.encode_prompt(
            prompt=prompt,
            device=self._pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=first,
            negative_prompt=self.family.empty_negative if negative is None else negative,
            **self.family.encode_options,
        )
        named = dict(zip(self.family.returns, encoded, strict=True))
        if first:
            self._negatives = {k: v for k, v in named.items() if k.startswith("negative")}
        return {k: v for k, v in named.items() if not k.startswith("negative")}

    def tokens(self, prompt: str) -> int:
        """Count a prompt's tokens, start and end included."""
        if prompt not in self._counts:
            ids = self._pipeline.tokenizer(prompt, truncation=False, verbose=False).input_ids
            self._counts = {prompt: len(ids)}  # ten images of a synset ask one after another
        return self._counts[prompt]

    @property
    def token_limit(self) -> int:
        """How many of them the text encoder takes."""
        limit = self.family.token_limit if self.family else None
        return int(limit or self._pipeline.tokenizer.model_max_length)
