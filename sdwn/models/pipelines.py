"""Pipelines: their families, the schedulers that fit them, and loading one onto a device.

Only what loads a pipeline, or knows a rare scheduler, imports torch and diffusers.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.config import RunConfig
from sdwn.errors import SdwnError, UsageError, first_line
from sdwn.io import read_json
from sdwn.models.builtin import builtin_folder
from sdwn.models.hub import fetch_weights
from sdwn.models.weights import (
    INDEX,
    Weights,
    components,
    find_folder,
    find_weights,
    fingerprint,
    is_commit,
    is_elsewhere,
    source,
    staged_if_wanted,
    weights_folder,
)

if TYPE_CHECKING:
    import torch

    from sdwn.devices.device import Device


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of pipeline that takes prompts as embeddings.

    Args:
        returns: what its ``encode_prompt`` returns, in order, by the names of its call's arguments.
        encode_options: arguments of ``encode_prompt`` beside the prompts.
        call_options: arguments of its call beside these and latents.
        empty_negative: the negative prompt that stands for none.
        token_limit: tokens that its text encoder takes, if not those of its tokenizer.
    """

    returns: tuple[str, ...]
    encode_options: Mapping[str, Any] = field(default_factory=dict)
    call_options: Mapping[str, Any] = field(default_factory=dict)
    empty_negative: str | None = None
    token_limit: int | None = None


_PIXART = Family(
    returns=(
        *("prompt_embeds", "prompt_attention_mask"),
        *("negative_prompt_embeds", "negative_prompt_attention_mask"),
    ),
    encode_options={"clean_caption": True},
    # Left alone, it would sample one of its favourite sizes and shrink the image.
    call_options={"negative_prompt": None, "use_resolution_binning": False},
    empty_negative="",
    token_limit=300,
)
# Any text-to-image pipeline works, from plain texts; one of these families takes each prompt's
# embedding, encoded once and alone, and the noise of each image. To add a family: a row here, if
# its call takes what its encode_prompt returns, and latents of the plain shape.
FAMILIES = {
    "StableDiffusionPipeline": Family(returns=("prompt_embeds", "negative_prompt_embeds")),
    "StableDiffusionXLPipeline": Family(
        returns=(
            *("prompt_embeds", "negative_prompt_embeds"),
            *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        )
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}

# Each of these can replace any other, which is known without diffusers' import of seconds.
INTERCHANGEABLE = {
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LMSDiscrete", "PNDM", "UniPCMultistep"),
    )
}
# Its steps draw noise for the batch as a whole, out of no image's generator.
_UNREPEATABLE = {"DPMSolverSDEScheduler"}


def require_usable(config: RunConfig) -> None:
    """Refuse a model that no task could load, and settings that do not fit it.

    Weights that are not on this machine are no reason, for they may be fetched later.

    Raises:
        UsageError: no model has this name, or the scheduler or safety checker does not fit it.
        IntegrityError: a part of the model is missing in its folder.
    """
    if is_elsewhere(config.model):
        check_settings(config, None)
    else:
        here = source(config.model) == "folder"
        check_settings(config, weights_folder(config) if here else find_folder(config))


def check_settings(config: RunConfig, folder: Path | None) -> bool:
    """Refuse what loading the weights in a folder would refuse; return whether that is all known.

    Only loading knows a scheduler that is not diffusers' own, or takes more than its settings.
    Without a folder, only a scheduler that diffusers does not have is refused.

    Raises:
        UsageError: the config's scheduler does not fit the model, or it has no safety checker.
        IntegrityError: its index cannot be read.
    """
    index: dict[str, Any] = {}
    if folder is not None:
        _require_safety_checker(config, there="safety_checker" in components(folder))
        index = read_json(folder / INDEX)
    wanted = config.generation.scheduler
    match index.get("scheduler"):
        case ["diffusers", str(kind)]:
            name = wanted or kind
            if (name == kind and kind not in _UNREPEATABLE) or {name, kind} <= INTERCHANGEABLE:
                return True
            import diffusers  # takes seconds

            try:
                own = getattr(diffusers, kind)()
            except (AttributeError, ImportError, TypeError):
                pass  # it needs more than its name
            else:
                _require_scheduler(name, own, str(index.get("_class_name")))
                return True
    if wanted is not None and wanted not in INTERCHANGEABLE:
        _require_known(wanted)
    return False


def _require_known(scheduler: str) -> None:
    import diffusers  # takes seconds

    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    if scheduler not in names:
        known = {name.removesuffix("Scheduler").lower(): name for name in names}
        short = scheduler.removesuffix("Scheduler").lower()
        close = difflib.get_close_matches(short, known, n=3, cutoff=0.4)
        meant = " or ".join(known[one] for one in close) or ", ".join(sorted(names))
        raise UsageError(
            f"generation.scheduler: diffusers has no {scheduler}; did you mean {meant}?"
        )


def _require_scheduler(name: str, own: Any, pipeline: str) -> None:
    kinds = {kind.__name__ for kind in getattr(own, "compatibles", ())}
    valid = (kinds | {type(own).__name__}) - _UNREPEATABLE
    if name not in valid:
        raise UsageError(
            f"generation.scheduler: {name} does not fit {pipeline}; "
            f"valid: {', '.join(sorted(valid))}"
        )


def _require_safety_checker(config: RunConfig, *, there: bool) -> None:
    if config.generation.safety_checker and not there:
        raise UsageError(
            f"generation.safety_checker is true, but model {config.model.name} has none; "
            "plan with --set generation.safety_checker=false"
        )


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


def obtain_weights(config: RunConfig) -> Weights:
    """Find a config's weights, or get them: make a built-in model, or download one of the hub.

    The hub is not asked for a commit that its cache has.

    Raises:
        UsageError: the model's name is no folder, and no name that the hub could know.
        IntegrityError: a part of the model is missing in its folder.
        SdwnError: the hub does not give it.
    """
    model = config.model
    if (kind := source(model)) != "hub":
        folder = builtin_folder(str(model.builtin)) if kind == "builtin" else weights_folder(config)
        return Weights(folder, fingerprint(folder))
    found = find_weights(config) if is_commit(model.revision) else None
    return found or fetch_weights(config)


def dtype(config: RunConfig) -> torch.dtype:
    """Return the type of a config's weights."""
    import torch

    precisions = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return precisions[config.generation.precision]


def denoiser(pipeline: Any) -> Any:
    """Return the network that takes the steps: a UNet or a transformer."""
    return getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)


def load_pipeline(config: RunConfig, weights: Weights, device: Device) -> Any:
    """Load a config's pipeline onto a device.

    Raises:
        UsageError: the config asks for a scheduler or safety checker that this model has not.
        SdwnError: the model cannot be loaded.
    """
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    name, folder = config.model.name, staged_if_wanted(weights.folder)
    without = {"safety_checker": None, "requires_safety_checker": False}
    options: dict[str, Any] = {} if config.generation.safety_checker else without
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            folder,
            variant=config.model.variant,
            use_safetensors=True,
            dtype=dtype(config),
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SdwnError(
            f"model {name}: the folder {folder} cannot be loaded; check that it is whole, "
            f"with safetensors weights: {first_line(error)}"
        ) from error
    kind, network = type(pipeline).__name__, denoiser(pipeline)
    if network is None:
        raise SdwnError(
            f"model {name}: {kind} has neither a UNet nor a transformer; expected a text-to-image "
            "pipeline such as Stable Diffusion 1, 2 or XL"
        )
    _require_safety_checker(config, there=getattr(pipeline, "safety_checker", None) is not None)

    own = pipeline.scheduler
    scheduler = config.generation.scheduler or type(own).__name__
    _require_scheduler(scheduler, own, kind)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device.torch)
    if config.generation.channels_last:
        for part in (network, getattr(pipeline, "vae", None)):
            if part is not None:
                part.to(memory_format=torch.channels_last)
    if config.generation.compile:
        # One block is compiled and serves all its likes.
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks()
        else:
            network.compile()
    return pipeline


def describe_pipeline(
    config: RunConfig, weights: Weights, pipeline: Any, device: Device
) -> dict[str, Any]:
    """Record what samples: model and revision, scheduler, precision, device, versions."""
    import accelerate
    import diffusers
    import torch
    import transformers

    return {
        "model": config.model.name,
        "revision": weights.revision,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": config.generation.precision,
        "device": device.name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
