"""The sampler of diffusers pipelines: a batch of images from their prompts and seeds.

::

    prompts ──> PromptEncoder ──> Embeddings ──┐
                each once, alone               ├──> pipeline ──> latents ──> images ──> check
    seeds ────> noise, in float32 ─────────────┘    the steps    the VAE     uint8      a thread
                                                                                        of its own

The text encoders are loaded first, alone, and let go once all prompts of a task are encoded; then
come the denoiser and the VAE.
"""

from __future__ import annotations

import inspect
import logging
import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from PIL import Image

from sdwn.batches import Placement
from sdwn.config import RunConfig
from sdwn.devices.device import Device, plain_out_of_memory
from sdwn.devices.tuning import (
    RESERVED_FOR_LIVE,
    WORKSPACE_BYTES,
    estimated_fit,
    run_workload,
)
from sdwn.errors import OutOfMemoryError, SdwnError, UsageError
from sdwn.generation.batching import ImageSampler, Sample
from sdwn.generation.encoder import (
    Embeddings,
    Encoded,
    Pair,
    PromptEncoder,
    equal_lengths,
    join_encoded,
    refusals_named,
)
from sdwn.generation.memory import activation_bytes
from sdwn.models.added import obtain_weights
from sdwn.models.families import PipelineInfo, call_arguments, check_settings, denoiser
from sdwn.models.pipeline import load_pipeline, load_text_encoders, loaded_bytes
from sdwn.models.weights import Weights
from sdwn.planning.concepts import Concept
from sdwn.planning.plan import ImageSpec

log = logging.getLogger(__name__)

# Checking shares the card with the next batch: it must not need much of it.
_CHECKED_AT_ONCE = 16
# Seconds to wait before images are checked one at a time, and again, and a last time.
_WAITS = (0.0, 5.0, 30.0)
TIMED_STEPS = 8
# Their versions may change pixels.
LIBRARIES = (torch, diffusers, transformers, accelerate)


class Sampler(ImageSampler):
    """A run's pipeline, loaded and placed on this process's device.

    An image depends on its spec alone, up to the last bits of floating point; the same batch
    of specs on the same device and versions gives the same bytes.

    Args:
        weights: those that a run is locked to; without them the config's are found, or got from
            the hub.
        specs: the images that will be made: their prompts are encoded before the denoiser is
            loaded. The prompts of others are encoded when they are met, by encoders loaded again.
        placement: where weights lie while images are sampled.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: Weights | None = None,
        specs: Iterable[ImageSpec] = (),
        placement: Placement = "auto",
    ) -> None:
        self.config, self.placement = config, placement
        self.device = Device()
        if config.needs_gpu and not self.device.is_gpu:
            raise UsageError(
                "precision fp16 needs a GPU and none was found; "
                "plan with --set generation.precision=fp32 to run on the CPU"
            )
        # Before a run is locked to its weights, its settings may not have met them.
        begun = weights is not None
        self._weights = weights = weights or obtain_weights(config)
        for idle in check_settings(config, weights.folder, begun=begun):
            log.warning("%s", idle)
        self._info = PipelineInfo(weights.folder)
        # A pipeline of no known family encodes its texts itself.
        self._encodes_apart = bool(self._info.family.embeddings)
        self.pipeline: Any = None
        self.provenance = {}
        self._embeddings = Embeddings()
        self.cut_prompts = {}
        # Those of the task that are not encoded yet, in its order.
        self._coming = deque(dict.fromkeys(map(self._pair, specs)))
        if self._coming and self._encodes_apart:
            self._encode(self._coming, self._embeddings)
        self.pipeline, placed = load_pipeline(config, weights, self._info, self.device, placement)
        self._vae_dtype = getattr(getattr(self.pipeline, "vae", None), "dtype", None)
        # Apart from the pipeline, images are checked while the next ones are sampled.
        self._checker = getattr(self.pipeline, "safety_checker", None)
        if self._checker is not None:
            self.pipeline.safety_checker = None
        self.provenance = {
            "model": config.model.name,
            "revision": weights.revision,
            "pipeline": type(self.pipeline).__name__,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "precision": config.generation.precision,
            "device": self.device.name,
            "placement": placed,
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in LIBRARIES},
        }
        if weights.added:
            self.provenance["added"] = "; ".join(map(str, weights.added))
        guided = self._info.guided(config.generation)
        self.workload = run_workload(config, self.provenance, self.device.total_bytes, guided)

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Sample one batch, an image for each spec, in their order."""
        return self._make(specs, self._encoded(specs))

    def in_float32(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Sample images, each alone, with all weights in float32, which take twice the memory."""
        embeddings = Embeddings()
        with plain_out_of_memory():
            self._encode(deque(map(self._pair, specs)), embeddings, len(specs), in_float32=True)
        with self._in_float32():
            return [
                replace(self._make([spec], [embeddings[self._pair(spec)]])[0], retried_fp32=True)
                for spec in specs
            ]

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Have the pipeline in float32; there and back, every weight is what it was."""

        def tensors() -> list[torch.Tensor]:
            parts = (p for p in self.pipeline.components.values() if isinstance(p, torch.nn.Module))
            return [one for part in parts for one in chain(part.parameters(), part.buffers())]

        kinds = [one.dtype for one in tensors()]
        try:
            with plain_out_of_memory():
                self.pipeline.to(torch.float32)
            yield
        finally:
            for one, kind in zip(tensors(), kinds, strict=True):
                one.data = one.data.to(kind)

    def _pair(self, spec: ImageSpec) -> Pair:
        return spec.prompt, spec.negative_prompt

    def _encoded(self, specs: Sequence[ImageSpec]) -> list[Encoded]:
        """Return a batch's prompts encoded."""
        pairs = [self._pair(spec) for spec in specs]
        if not all(pair in self._embeddings for pair in pairs):
            # The batch begins the next block; the one before is let go where it is full.
            wanted = dict.fromkeys(pairs)
            self._coming.extendleft(reversed(wanted))
            if self._embeddings.full:
                self._embeddings = Embeddings()
            self._encode(self._coming, self._embeddings, len(wanted))
        return [self._embeddings[pair] for pair in pairs]

    def _encode(
        self,
        coming: deque[Pair],
        embeddings: Embeddings,
        at_least: int = 0,
        *,
        in_float32: bool = False,
    ) -> None:
        """Encode prompts until there is no more room; the text encoders are let go.

        The first ``at_least`` are encoded however little room there is.
        """
        # A card that has room for the denoiser may have none for the encoders beside it.
        aside = self._encodes_apart and self.provenance.get("placement") == "gpu"
        try:
            with plain_out_of_memory():
                if aside:
                    self.pipeline.to("cpu")
                    self.device.release()
                self._encode_alone(coming, embeddings, at_least, in_float32=in_float32)
        finally:
            if self.device.is_gpu:
                self.device.release()
            if aside:
                self.pipeline.to(self.device.torch)

    def _encode_alone(
        self, coming: deque[Pair], embeddings: Embeddings, at_least: int, *, in_float32: bool
    ) -> None:
        """Encode prompts by text encoders that nothing else refers to."""
        pipeline = self.pipeline
        if self._encodes_apart:
            pipeline = load_text_encoders(
                self.config, self._weights, self._info, self.device, self.placement
            )
            if in_float32:
                pipeline.to(torch.float32)
        encoder = PromptEncoder(pipeline, self.config.generation, self._info)
        while coming and (at_least > 0 or not embeddings.full):
            pair, at_least = coming.popleft(), at_least - 1
            if pair not in embeddings:
                encoded = encoder.encode(*pair)
                embeddings.add(pair, encoded)
                for name in encoded.cut:
                    self.cut_prompts[name] = self.cut_prompts.get(name, 0) + 1

    def _make(
        self, specs: Sequence[ImageSpec], encoded: Sequence[Encoded], **options: Any
    ) -> list[Sample]:
        """Sample and decode a batch; ``options`` go to the pipeline."""
        try:
            with plain_out_of_memory():
                images = self._denoise(specs, encoded, **options)
                # NCHW in 0..1 to NHWC. In float32, as diffusers' own conversion to PIL.
                nan = images.isnan().flatten(1).any(dim=1)
                whole = images.float().masked_fill(nan[:, None, None, None], 0.0)
                colours = (whole * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
                pixels, failed = colours.cpu().numpy(), nan.tolist()
        except BaseException:
            # Stable Diffusion XL decodes in float32 and, interrupted there, would stay in it.
            if (vae := getattr(self.pipeline, "vae", None)) is not None:
                vae.to(dtype=self._vae_dtype)
            raise
        return [
            Sample(
                pixels[i],
                "nan" if failed[i] else "ok",
                one.tokens,
                one.truncated,
                vae_slicing=self.vae_slicing,
            )
            for i, one in enumerate(encoded)
        ]

    def _denoise(
        self, specs: Sequence[ImageSpec], encoded: Sequence[Encoded], **options: Any
    ) -> torch.Tensor:
        """Run the steps and decode; only pipelines of no family need their text encoder here."""
        images: list[torch.Tensor] = [torch.empty(0)] * len(specs)
        for group in equal_lengths(encoded):
            chosen = [encoded[i] for i in group]
            made = self._call([specs[i].seed for i in group], join_encoded(chosen), options)
            for i, image in zip(group, made, strict=True):
                images[i] = image
        return torch.stack(images)

    def _call(
        self, seeds: Sequence[int], prompts: dict[str, Any], options: dict[str, Any]
    ) -> torch.Tensor:
        """Call the pipeline; the images, NCHW in 0..1."""
        generation, family = self.config.generation, self._info.family
        # On the CPU: the same noise on every device. Schedulers that add noise in their steps go
        # on with the same generators.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = inspect.signature(self.pipeline.__call__).parameters
        arguments = call_arguments(family, call, generation)
        arguments |= send_to_device(prompts, self.device.torch)
        kind = denoiser(self.pipeline).dtype
        if family.instead_of_fp16:
            # Their encoders may have another precision than the network.
            for name in prompts:
                if arguments[name].is_floating_point():
                    arguments[name] = arguments[name].to(kind)
        if family.noise is not None:
            size = generation.height, generation.width
            # float32 whatever the precision, so that this does not change an image's noise.
            noise = torch.cat([family.noise(self.pipeline, *size, one) for one in generators])
            kind = torch.float32 if family.float32 else kind
            arguments["latents"] = noise.to(self.device.torch, kind)
        arguments |= {"generator": generators, "output_type": "pt", **options}
        with refusals_named(self.pipeline, generation):
            images: torch.Tensor = self.pipeline(**arguments).images
        if images.shape[1] == 4:
            # Qwen-Image 2.1 makes some transparency: over white, as viewers show it.
            colours, opacity = images[:, :3], images[:, 3:]
            images = colours * opacity + (1 - opacity)
        if images.shape[-2:] != (generation.height, generation.width):
            found = f"{images.shape[-1]}x{images.shape[-2]}"
            raise SdwnError(
                f"{type(self.pipeline).__name__} made images of {found} pixels, not "
                f"{generation.width}x{generation.height}; write the former into the config"
            )
        return images

    def check(self, samples: list[Sample]) -> list[Sample]:
        """Blacken what the safety checker flags; may run while another batch is sampled."""
        if self._checker is None:
            return samples
        flags: list[bool] = []
        for start in range(0, len(samples), _CHECKED_AT_ONCE):
            flags += self._flags_or_wait(samples[start : start + _CHECKED_AT_ONCE], _WAITS)
        return [
            replace(sample, pixels=np.zeros_like(sample.pixels), status="nsfw")
            if flagged and sample.status == "ok"
            else sample
            for sample, flagged in zip(samples, flags, strict=True)
        ]

    def _flags_or_wait(self, samples: list[Sample], waits: Sequence[float]) -> list[bool]:
        """Check images; without room for it one at a time, and later, when a batch leaves some."""
        try:
            with plain_out_of_memory():
                return self._flags(samples)
        except OutOfMemoryError as error:
            if not waits:
                raise
            log.warning("while checking %d images: %s", len(samples), error)
        self.device.release()
        time.sleep(waits[0])
        return [flag for one in samples for flag in self._flags_or_wait([one], waits[1:])]

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
        """Return how many seconds a batch takes; of many steps only a few are timed."""
        generation, ends = self.config.generation, list[float]()
        steps, encoded = generation.num_inference_steps, self._encoded(specs)

        def end_step(*_: Any) -> dict[str, Any]:
            self.device.synchronize()
            ends.append(time.perf_counter())
            return {}

        options: dict[str, Any] = {}
        # Where there is no such hook, or the steps are given one by one, all of them are timed.
        hooks = inspect.signature(self.pipeline.__call__).parameters
        fixed = self._info.schedules(generation)
        if steps > TIMED_STEPS and "callback_on_step_end" in hooks and not fixed:
            options = {"num_inference_steps": TIMED_STEPS, "callback_on_step_end": end_step}
        began = time.perf_counter()
        self._make(specs, encoded, **options)
        taken = time.perf_counter() - began
        if len(ends) < 2:
            return taken
        left = (steps - TIMED_STEPS) * len(equal_lengths(encoded))
        return taken + left * float(np.median(np.diff(ends)))

    def fits(self, sliced: bool) -> int | None:
        """Estimate how many images a batch may have; None without a GPU."""
        if not self.device.is_gpu:
            return None
        free = self.device.usable_bytes - self._placed_bytes
        return estimated_fit(self._activations, free, self.device.total_bytes, sliced)

    def predicted_bytes(self, images: int) -> int:
        """Predict what a batch makes torch reserve, weights included; 0 without torch."""
        denoising, decoding = self._activations
        active = max(denoising * images, decoding * (1 if self.vae_slicing else images))
        return int(self._placed_bytes + WORKSPACE_BYTES + RESERVED_FOR_LIVE * active)

    @property
    def _placed_bytes(self) -> int:
        """The weights that lie on the device at once."""
        sizes = [*loaded_bytes(self.pipeline).values()]
        if self._checker is not None:
            sizes.append(self._checker.get_memory_footprint())
        return max(sizes) if self.provenance["placement"] == "offload" else sum(sizes)

    @cached_property
    def _activations(self) -> tuple[int, int]:
        """Bytes of live tensors for one image, while the denoiser runs and while the VAE does."""
        pair = next(iter(self._embeddings), ("", self.config.generation.negative_prompt))
        spec = ImageSpec(0, Concept(""), 0, pair[0], 0, negative_prompt=pair[1])
        return activation_bytes(self.pipeline, lambda: self._make([spec], self._encoded([spec])))

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
