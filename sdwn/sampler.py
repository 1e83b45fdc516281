"""Sampling: a batch of image specs through a diffusers pipeline."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from sdwn.builtin import builtin_folder, fingerprint
from sdwn.config import ModelConfig, RunConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.images import Pixels, Sample

if TYPE_CHECKING:
    from sdwn.plan import ImageSpec

_BUILTIN = "builtin:"
_INDEX = "model_index.json"
# Its steps draw noise for the batch as a whole, out of no image's generator.
_UNREPEATABLE = {"DPMSolverSDEScheduler"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Sampler:
    """A run's pipeline, loaded and placed on this process's device.

    An image depends on its spec alone, up to the last bits of floating point; the same batch
    of specs on the same device and versions gives the same bytes.

    Raises:
        UsageError: the config asks for a scheduler, precision or safety checker that this model
            or device has not.
        SdwnError: the model cannot be loaded.
    """

    def __init__(self, config: RunConfig) -> None:
        device: torch.device = accelerate.PartialState().device
        require_device(config, device.type)
        _silence_libraries()
        self.generation = config.generation
        self.pipeline = _load(config)
        self.pipeline.scheduler = _scheduler(self.pipeline, config.generation.scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device)
        self.provenance = _provenance(config, self.pipeline, device)

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Sample one batch, an image for each spec, in their order."""
        generators = [torch.Generator("cpu").manual_seed(spec.seed) for spec in specs]
        prompts = [spec.prompt for spec in specs]
        output = self.pipeline(
            prompt=prompts,
            negative_prompt=self._negative_prompts(len(specs)),
            height=self.generation.height,
            width=self.generation.width,
            num_inference_steps=self.generation.num_inference_steps,
            guidance_scale=self.generation.guidance_scale,
            latents=self._latents(generators),
            # Schedulers that add noise in their steps go on with the same generators.
            generator=generators,
            output_type="pt",
        )
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(specs)
        pixels, nan = _to_uint8(output.images)
        tokens = self._count_tokens(prompts)
        limit = self.pipeline.tokenizer.model_max_length
        return [
            Sample(pixels[i], _status(flags[i], nan[i]), tokens[i], tokens[i] > limit)
            for i in range(len(specs))
        ]

    def _negative_prompts(self, count: int) -> list[str] | None:
        negative = self.generation.negative_prompt
        return None if negative is None else [negative] * count

    def _latents(self, generators: list[torch.Generator]) -> torch.Tensor:
        factor = self.pipeline.vae_scale_factor
        unet = self.pipeline.unet
        height, width = self.generation.height // factor, self.generation.width // factor
        # float32 whatever the precision, so that this does not change an image's noise.
        noise = [
            torch.randn((1, unet.config.in_channels, height, width), generator=generator)
            for generator in generators
        ]
        return torch.cat(noise).to(self.pipeline.device, unet.dtype)

    def _count_tokens(self, prompts: list[str]) -> list[int]:
        encoded = self.pipeline.tokenizer(prompts, truncation=False, verbose=False)
        return [len(ids) for ids in encoded.input_ids]


def require_device(config: RunConfig, device_type: str) -> None:
    """Refuse a config whose precision a device cannot run.

    ``device_type`` is torch's, as ``cuda`` or ``cpu``. Built-in models are small enough for
    half precision on a CPU.

    Raises:
        UsageError: half precision without a GPU.
    """
    if config.needs_gpu and device_type == "cpu":
        raise UsageError(
            "precision fp16 needs a GPU and none was found; "
            "plan with --set generation.precision=fp32 to run on the CPU"
        )


def _silence_libraries() -> None:
    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _load(config: RunConfig) -> Any:
    wanted = config.generation.safety_checker
    without: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    dtype = _DTYPES[config.generation.precision]
    pipeline = _from_pretrained(config.model, dtype=dtype, **({} if wanted else without))
    if getattr(pipeline, "unet", None) is None:
        raise SdwnError(
            f"model {config.model.name}: {type(pipeline).__name__} has no UNet; "
            "expected Stable Diffusion 1, 2 or XL, or a model built like them"
        )
    if wanted and getattr(pipeline, "safety_checker", None) is None:
        raise UsageError(
            f"generation.safety_checker is true, but model {config.model.name} has none; "
            "plan with --set generation.safety_checker=false"
        )
    return pipeline


def _from_pretrained(model: ModelConfig, **options: Any) -> Any:
    source = _source(model.name)
    try:
        return diffusers.AutoPipelineForText2Image.from_pretrained(
            source,
            revision=model.revision,
            variant=model.variant,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SdwnError(f"model {model.name}: {_advice(source)}: {_one_line(error)}") from error


def _source(name: str) -> Path | str:
    if name.startswith(_BUILTIN):
        return builtin_folder(name.removeprefix(_BUILTIN))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _pipeline_folder(folder)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UsageError(
            f"model {name}: no such folder, and no hub name either; expected a folder in "
            "diffusers format, a name like CompVis/stable-diffusion-v1-4, or builtin:tiny"
        )
    return name


def _pipeline_folder(folder: Path) -> Path:
    if not (folder / _INDEX).is_file():
        raise UsageError(
            f"model {folder}: no pipeline in diffusers format, for {_INDEX} is missing; "
            "save one there with its save_pretrained"
        )
    return folder


def _advice(source: Path | str) -> str:
    if isinstance(source, Path):
        return "the folder cannot be loaded; check that it is whole, with safetensors weights"
    return (
        "no folder of this name, and the hub did not give it; download it where there is a "
        "network (hf download), or name a local folder"
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no reason given'}"


def _scheduler(pipeline: Any, name: str) -> Any:
    kinds = {kind.__name__ for kind in pipeline.scheduler.compatibles}
    valid = (kinds | {type(pipeline.scheduler).__name__}) - _UNREPEATABLE
    if name not in valid:
        raise UsageError(
            f"generation.scheduler: {name} does not fit {type(pipeline).__name__}; "
            f"valid: {', '.join(sorted(valid))}"
        )
    return getattr(diffusers, name).from_config(pipeline.scheduler.config)


def _to_uint8(images: torch.Tensor) -> tuple[Pixels, list[bool]]:
    # NCHW in 0..1 to NHWC. In float32, as diffusers' own conversion to PIL.
    nan = images.isnan().flatten(1).any(dim=1)
    whole = images.float().masked_fill(nan[:, None, None, None], 0.0)
    pixels = (whole * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return pixels.cpu().numpy(), nan.tolist()


def _status(flagged: bool, nan: bool) -> str:
    if nan:
        return "nan"
    return "nsfw" if flagged else "ok"


def _provenance(config: RunConfig, pipeline: Any, device: torch.device) -> dict[str, str]:
    return {
        "model": config.model.name,
        "revision": _revision(config.model),
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": config.generation.precision,
        "device": _device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def _revision(model: ModelConfig) -> str:
    source = _source(model.name)
    if isinstance(source, Path):
        return fingerprint(source)
    # The hub's cache keeps a file below the commit that it belongs to.
    cached = try_to_load_from_cache(source, _INDEX, revision=model.revision)
    return Path(cached).parent.name if isinstance(cached, str) else model.revision or "main"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
