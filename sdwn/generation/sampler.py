"""The sampler of diffusers pipelines: a batch of images from their prompts and seeds.

::

    prompts ──> PromptEncoder ──> Encoded ─────┐
                each once, alone               ├──> pipeline ──> latents ──> images ──> check
    seeds ────> noise, in float32 ─────────────┘    the steps    the VAE     uint8      a thread
                                                                                        of its own

The text encoders are loaded first, alone, and let go once all prompts of a task are encoded.
"""

from __future__ import annotations

import inspect
import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeVar

import accelerate
import diffusers
import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map

from sdwn.batches import Placement
from sdwn.config import GenerationConfig, RunConfig
from sdwn.devices.device import Device, plain_out_of_memory
from sdwn.devices.tuning import RESERVED_FOR_LIVE, WORKSPACE_BYTES, estimated_fit, run_workload
from sdwn.errors import OutOfMemoryError, SdwnError, UsageError, first_line
from sdwn.generation.batching import ImageSampler, Sample
from sdwn.generation.memory import activation_bytes
from sdwn.models.families import PipelineInfo, call_options, check_settings, denoiser, text_readers
from sdwn.models.pipeline import load_pipeline, load_text_encoders, loaded_bytes
from sdwn.models.weights import Weights, obtain_weights
from sdwn.planning.plan import Concept, ImageSpec

log = logging.getLogger(__name__)

# Of encoded prompts that are kept at once: a thousand captions of FLUX.1, at 4 MB each.
MOST_BYTES = 4_000_000_000
# Checking shares the card with the next batch: it must not need much of it.
_CHECKED_AT_ONCE = 16
TIMED_STEPS = 8
_GUIDED = "do_classifier_free_guidance"
T = TypeVar("T")

# A prompt and its negative prompt, if any; and those of an ImageSpec.
Pair = tuple[str, str | None]
pair_of: Callable[[ImageSpec], Pair] = attrgetter("prompt", "negative_prompt")


@contextmanager
def refusals_named(pipeline: Any, generation: GenerationConfig) -> Iterator[None]:
    """Raise a UsageError that names the options where a pipeline does not take a value."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}: {value!r:.60}" for name, value in generation.options.items())
        raise UsageError(
            f"{type(pipeline).__name__} fails"
            + f" with generation.options {given}" * bool(given)
            + f": {first_line(error)}"
        ) from error


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its negative one, as a pipeline's call takes them."""

    arguments: dict[str, Any]  # embeddings in the CPU's memory, a batch of one, or texts
    tokens: int  # of the whole prompt, start and end included; 0 where nothing counts them
    truncated: bool  # the encoder that reads most of it took fewer
    cut: tuple[str, ...] = ()  # every text encoder that took fewer


class PromptEncoder:
    """Encodes prompts, each once and alone: its embedding depends on no other of the batch.

    It needs only the pipeline's text encoders. ``bytes`` counts those of all its embeddings.
    """

    def __init__(self, pipeline: Any, generation: GenerationConfig, info: PipelineInfo) -> None:
        self._pipeline, self._family, self._generation = pipeline, info.family, generation
        self._guided, self._takes_negative = info.guided(generation), False
        self._readers = text_readers(info.family, pipeline.components, generation)
        self._negatives: dict[str | None, dict[str, Any]] = {}
        self._shared: dict[str, Any] = {}
        self.bytes = 0
        if info.family.embeddings:
            # All that the call would give it, by the call's own defaults.
            taken = inspect.signature(pipeline.encode_prompt).parameters
            given = {name: one.default for name, one in info.call.items()}
            given |= call_options(generation)
            self._shared = {name: given[name] for name in taken if name in given}
            self._takes_negative = _GUIDED in taken
        encoder: Any = getattr(pipeline, "text_encoder", None)
        if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
            # Where diffusers looks for it with clip_skip; transformers 5 has no such level.
            encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)

    def encode(self, prompt: str, negative: str | None = None) -> Encoded:
        """Encode a prompt and its negative prompt."""
        counts = [(reader, reader.tokens([prompt])[0]) for reader in self._readers]
        cut = tuple(reader.name for reader, tokens in counts if tokens > reader.limit)
        tokens = counts[0][1] if counts else 0
        truncated = bool(counts) and counts[0][0].name in cut
        return Encoded(self._arguments(prompt, negative), tokens, truncated, cut)

    def _arguments(self, prompt: str, negative: str | None) -> dict[str, Any]:
        if not self._family.embeddings:
            texts = {"prompt": prompt, "negative_prompt": negative}
            return {name: text for name, text in texts.items() if text is not None}
        if not self._guided:
            return self._embeddings(prompt)
        if negative in self._negatives:
            return self._embeddings(prompt) | self._negatives[negative]
        if self._takes_negative:
            given = {} if negative is None else {"negative_prompt": negative}
            both = self._embeddings(prompt, **{_GUIDED: True, **given})
            kept = {name: value for name, value in both.items() if name.startswith("negative")}
        else:
            both = self._embeddings(prompt)
            kept = {f"negative_{k}": v for k, v in self._embeddings(negative or "").items()}
        self._negatives[negative] = kept
        return both | kept

    @torch.no_grad()
    def _embeddings(self, prompt: str, **options: Any) -> dict[str, Any]:
        """Encode one prompt; the embeddings by the names that the call has for them."""
        unguided = {_GUIDED: False} if self._takes_negative else {}
        device = self._pipeline._execution_device
        given = {**self._shared, **unguided, **options, "prompt": prompt, "device": device}
        with refusals_named(self._pipeline, self._generation):
            made = self._pipeline.encode_prompt(**given)
        named = zip(self._family.embeddings, made, strict=True)
        whole = {name: value for name, value in named if name is not None and value is not None}
        # A copy: a slice would keep all that it was cut from.
        kept: dict[str, Any] = tree_map(
            lambda one: one.cpu().clone() if torch.is_tensor(one) else one, whole
        )
        self.bytes += sum(one.nbytes for one in tree_leaves(kept) if torch.is_tensor(one))
        return kept


def equal_lengths(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Group prompts, by their positions, so that the embeddings of a group fit into one tensor.

    Padded ones would need a mask, and change the positions that some networks give to pixels.
    """
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(encoded):
        shapes = tuple(each.shape for each in one.arguments.values() if torch.is_tensor(each))
        groups.setdefault(shapes, []).append(i)
    return list(groups.values())


def join_encoded(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """Join prompts of equal lengths to the arguments of a pipeline's call."""
    joined: dict[str, Any] = {}
    for name, first in encoded[0].arguments.items():
        every = [one.arguments[name] for one in encoded]
        if torch.is_tensor(first):
            joined[name] = torch.cat(every)
        else:
            joined[name] = list(chain(*every)) if isinstance(first, list) else every
    return joined


class Sampler(ImageSampler):
    """A run's pipeline, loaded and placed on this process's device.

    An image depends on its spec alone, up to the last bits of floating point; the same batch
    of specs on the same device and versions gives the same bytes.

    ``weights`` are those that a run is locked to; else the config's are found, or got from the hub.
    The prompts of ``specs`` are encoded before the denoiser is loaded; those of other images when
    they are met, by encoders loaded again.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: Weights | None = None,
        specs: Iterable[ImageSpec] = (),
        placement: Placement = "auto",
    ) -> None:
        self.config, self.device, self.placement = config, Device(), placement
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
        self.provenance, self.cut_prompts = {}, {}
        # A block of encoded prompts, and the bytes that it has room for.
        self._block, self._room = dict[Pair, Encoded](), MOST_BYTES
        # Those of the task that come after the block, in its order.
        self._coming = deque(dict.fromkeys(map(pair_of, specs)))
        if self._coming and self._encodes_apart:
            self._use_encoder(self._fill_block)
        self.pipeline, placed = load_pipeline(config, weights, self._info, self.device, placement)
        self._vae_dtype = getattr(getattr(self.pipeline, "vae", None), "dtype", None)
        # Apart from the pipeline, images are checked while the next ones are sampled.
        self._checker: Any = getattr(self.pipeline, "safety_checker", None)
        self._sampling = threading.Lock()
        if self._checker is not None:
            self.pipeline.safety_checker = None
        # Their versions may change pixels.
        libraries = (torch, diffusers, transformers, accelerate)
        self.provenance = {
            "model": config.model.name,
            "revision": weights.revision,
            "pipeline": type(self.pipeline).__name__,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "precision": config.generation.precision,
            "device": self.device.name,
            "placement": placed,
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in libraries},
        }
        if weights.added:
            self.provenance["added"] = "; ".join(map(str, weights.added))
        guided = self._info.guided(config.generation)
        self.workload = run_workload(config, self.provenance, self.device.total_bytes, guided)

    def _encoded(self, specs: Sequence[ImageSpec]) -> list[Encoded]:
        """Return a batch's prompts encoded."""
        pairs = list(map(pair_of, specs))
        if not self._block.keys() >= {*pairs}:
            if self._room <= 0:
                # The batch begins the next block; the one before is let go.
                self._block, self._room = {}, MOST_BYTES
            self._use_encoder(partial(self._fill_block, batch=pairs))
        return [self._block[pair] for pair in pairs]

    def _fill_block(self, encoder: PromptEncoder, batch: Iterable[Pair] = ()) -> None:
        """Encode a batch's prompts, then those that come, until the block is full."""
        needed = deque(batch)
        while needed or (self._coming and encoder.bytes < self._room):
            pair = (needed or self._coming).popleft()
            if pair not in self._block:
                self._block[pair] = one = encoder.encode(*pair)
                for name in one.cut:
                    self.cut_prompts[name] = self.cut_prompts.get(name, 0) + 1
        self._room -= encoder.bytes

    def _use_encoder(self, use: Callable[[PromptEncoder], T], *, in_float32: bool = False) -> T:
        """Load the text encoders alone, unless the family is unknown; use them and let them go."""
        pipeline = self.pipeline
        # A card that has room for the denoiser may have none for the encoders beside it.
        aside = self._encodes_apart and self.provenance.get("placement") == "gpu"
        try:
            with plain_out_of_memory():
                if aside:
                    pipeline.to("cpu")
                    self.device.release()
                if self._encodes_apart:
                    pipeline = load_text_encoders(
                        self.config, self._weights, self._info, self.device, self.placement
                    )
                    if in_float32:
                        pipeline.to(torch.float32)
                return use(PromptEncoder(pipeline, self.config.generation, self._info))
        finally:
            # Nothing else refers to the text encoders.
            pipeline = None
            if self.device.is_gpu:
                self.device.release()
            if aside:
                self.pipeline.to(self.device.torch)

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Sample one batch, an image for each spec, in their order."""
        return self._make(specs, self._encoded(specs))

    def in_float32(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Sample images, each alone, with all weights in float32, which take twice the memory."""

        def tensors() -> list[torch.Tensor]:
            parts = (p for p in self.pipeline.components.values() if isinstance(p, torch.nn.Module))
            return [one for part in parts for one in chain(part.parameters(), part.buffers())]

        # No part of the block: the precision is another.
        pairs = dict.fromkeys(map(pair_of, specs))
        encoded = self._use_encoder(
            lambda encoder: {pair: encoder.encode(*pair) for pair in pairs}, in_float32=True
        )
        kinds = [one.dtype for one in tensors()]
        try:
            with plain_out_of_memory():
                self.pipeline.to(torch.float32)
            return [
                replace(self._make([spec], [encoded[pair_of(spec)]])[0], retried_fp32=True)
                for spec in specs
            ]
        finally:
            # There and back, every weight is what it was.
            for one, kind in zip(tensors(), kinds, strict=True):
                one.data = one.data.to(kind)

    def _make(
        self, specs: Sequence[ImageSpec], encoded: Sequence[Encoded], **options: Any
    ) -> list[Sample]:
        """Sample and decode a batch; ``options`` go to the pipeline."""
        images: list[torch.Tensor] = [torch.empty(0)] * len(specs)
        try:
            with self._sampling, plain_out_of_memory():
                for group in equal_lengths(encoded):
                    prompts = join_encoded([encoded[i] for i in group])
                    made = self._call([specs[i].seed for i in group], prompts, options)
                    for i, image in zip(group, made, strict=True):
                        images[i] = image
                batch = torch.stack(images)
                # NCHW in 0..1 to NHWC. In float32, as diffusers' own conversion to PIL.
                nan = batch.isnan().flatten(1).any(dim=1)
                whole = batch.float().masked_fill(nan[:, None, None, None], 0.0)
                colours = (whole * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
                pixels, failed = colours.cpu().numpy(), nan.tolist()
        except BaseException:
            # Stable Diffusion XL decodes in float32 and, interrupted there, would stay in it.
            if (vae := getattr(self.pipeline, "vae", None)) is not None:
                vae.to(dtype=self._vae_dtype)
            raise
        sliced = self.vae_slicing
        return [
            Sample(picture, "nan" if bad else "ok", one.tokens, one.truncated, vae_slicing=sliced)
            for picture, bad, one in zip(pixels, failed, encoded, strict=True)
        ]

    def _call(
        self, seeds: Sequence[int], prompts: dict[str, Any], options: dict[str, Any]
    ) -> torch.Tensor:
        """Run the steps and decode; the images, NCHW in 0..1."""
        generation, family = self.config.generation, self._info.family
        # On the CPU: the same noise on every device. Schedulers that add noise in their steps go
        # on with the same generators.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        arguments = self._info.arguments(generation)
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
            some, no_room = samples[start : start + _CHECKED_AT_ONCE], ""
            try:
                with plain_out_of_memory():
                    flags += self._flags(some)
            except OutOfMemoryError as error:
                no_room = str(error)
            if no_room:
                log.warning("while checking %d images: %s", len(some), no_room)
                # One at a time, and between two batches.
                with self._sampling, plain_out_of_memory():
                    self.device.release()
                    flags += [flag for one in some for flag in self._flags([one])]
        return [
            replace(sample, pixels=np.zeros_like(sample.pixels), status="nsfw")
            if flagged and sample.status == "ok"
            else sample
            for sample, flagged in zip(samples, flags, strict=True)
        ]

    def _flags(self, samples: list[Sample]) -> list[bool]:
        images = [Image.fromarray(sample.pixels) for sample in samples]
        pixels = self.pipeline.feature_extractor(images, return_tensors="pt").pixel_values
        clip_input = pixels.to(self.device.torch, self._checker.dtype)
        # It blackens what it is given; only the flags are wanted.
        given = np.zeros((len(samples), 1, 1, 3), dtype=np.float32)
        _, flags = self._checker(images=given, clip_input=clip_input)
        return [bool(flag) for flag in flags]

    # Speed and memory

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
        hooked = "callback_on_step_end" in self._info.call
        if steps > TIMED_STEPS and hooked and not self._info.schedules(generation):
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
        pair = next(iter(self._block), ("", self.config.generation.negative_prompt))
        spec = ImageSpec(0, Concept(""), 0, pair[0], 0, negative_prompt=pair[1])
        return activation_bytes(self.pipeline, lambda: self._make([spec], self._encoded([spec])))

    def slice_vae(self) -> bool:
        """Decode images one at a time from now on; return whether that changes anything."""
        vae: Any = getattr(self.pipeline, "vae", None)
        if self.vae_slicing or not hasattr(vae, "enable_slicing"):
            return False
        vae.enable_slicing()
        self.vae_slicing = True
        return True
