"""Loading: a config's model as a diffusers pipeline, placed and prepared."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from sdwn.builtin import builtin_folder, fingerprint
from sdwn.config import ModelConfig, RunConfig
from sdwn.device import Device
from sdwn.errors import SdwnError, UsageError
from sdwn.files import STAGE_VARIABLE

_INDEX = "model_index.json"
# Its steps draw noise for the batch as a whole, out of no image's generator.
_UNREPEATABLE = {"DPMSolverSDEScheduler"}
log = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_ignored = shutil.ignore_patterns(
    "*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx*"
)


def load(config: RunConfig, device: Device) -> Any:
    """Load a config's pipeline onto a device.

    Raises:
        UsageError: the config asks for a scheduler, precision or safety checker that this model
            or device has not.
        SdwnError: the model cannot be loaded.
    """
    require_device(config, device.torch.type)
    _silence_libraries()
    pipeline = _from_config(config)
    pipeline.scheduler = _scheduler(pipeline, config.generation.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device.torch)
    _prepare(pipeline, config)
    return pipeline


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


def denoiser(pipeline: Any) -> Any:
    """Give the network that takes the steps: a UNet or a transformer."""
    return getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)


def _silence_libraries() -> None:
    # They warn of every truncated prompt and every flagged image, which a sample records.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _from_config(config: RunConfig) -> Any:
    wanted = config.generation.safety_checker
    without: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    dtype = DTYPES[config.generation.precision]
    pipeline = _from_pretrained(config.model, dtype=dtype, **({} if wanted else without))
    if denoiser(pipeline) is None:
        raise SdwnError(
            f"model {config.model.name}: {type(pipeline).__name__} has neither a UNet nor a "
            "transformer; expected a text-to-image pipeline such as Stable Diffusion 1, 2 or XL"
        )
    if wanted and getattr(pipeline, "safety_checker", None) is None:
        raise UsageError(
            f"generation.safety_checker is true, but model {config.model.name} has none; "
            "plan with --set generation.safety_checker=false"
        )
    return pipeline


def _from_pretrained(model: ModelConfig, **options: Any) -> Any:
    source = _source(model)
    try:
        return diffusers.AutoPipelineForText2Image.from_pretrained(
            _staged(source, model),
            revision=model.revision,
            variant=model.variant,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SdwnError(f"model {model.name}: {_advice(source)}: {_one_line(error)}") from error


def _source(model: ModelConfig) -> Path | str:
    if model.builtin is not None:
        return builtin_folder(model.builtin)
    name = model.name
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


def _staged(source: Path | str, model: ModelConfig) -> Path | str:
    """Copy the weights to the node's own disk, once a node, where that is asked for."""
    wanted = os.environ.get(STAGE_VARIABLE, "")
    if not wanted:
        return source
    target = Path(os.path.expandvars(wanted)).expanduser()
    folder = source if isinstance(source, Path) else _cached_snapshot(source, model)
    if folder is None:
        return source
    if "$" in str(target) or not target.is_absolute():
        log.warning("weights are not staged: %s is no folder on this node", target)
        return source
    try:
        return staged(folder, target)
    except OSError as error:
        # Slower, but no reason to stop.
        log.warning("weights are not staged: %s", error)
        return source


def _cached_snapshot(name: str, model: ModelConfig) -> Path | None:
    try:
        return Path(snapshot_download(name, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None  # from_pretrained downloads it, or says why it can't


def staged(folder: Path, target: Path) -> Path:
    """Copy a pipeline's folder below ``target`` unless the same copy is there; return the copy.

    Processes of one node that start together copy once: a lock of the node's own disk.
    """
    copy = target / f"{folder.name}-{_state(folder)}"
    target.mkdir(parents=True, exist_ok=True)
    with (target / f".{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(copy, folder):
            shutil.rmtree(copy, ignore_errors=True)
            _copy(folder, copy)
    return copy


def _copy(folder: Path, copy: Path) -> None:
    unfinished = copy.with_name(f".{copy.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(folder, unfinished, ignore=_ignored)
        unfinished.rename(copy)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_whole(copy: Path, folder: Path) -> bool:
    # Whoever tidies a node's disk may have taken files away.
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    wanted = [name for name in files if not _ignored("", [name.name])]
    return all(
        (copy / name).is_file() and (copy / name).stat().st_size == (folder / name).stat().st_size
        for name in wanted
    )


def _state(folder: Path) -> str:
    files = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    lines = [f"{path.relative_to(folder)} {s.st_size} {s.st_mtime_ns}" for path, s in files]
    return hashlib.sha256("\n".join([str(folder), *lines]).encode()).hexdigest()[:16]


def _scheduler(pipeline: Any, name: str | None) -> Any:
    name = name or type(pipeline.scheduler).__name__
    kinds = {kind.__name__ for kind in getattr(pipeline.scheduler, "compatibles", ())}
    valid = (kinds | {type(pipeline.scheduler).__name__}) - _UNREPEATABLE
    if name not in valid:
        raise UsageError(
            f"generation.scheduler: {name} does not fit {type(pipeline).__name__}; "
            f"valid: {', '.join(sorted(valid))}"
        )
    return getattr(diffusers, name).from_config(pipeline.scheduler.config)


def _prepare(pipeline: Any, config: RunConfig) -> None:
    if config.generation.channels_last:
        for part in (denoiser(pipeline), getattr(pipeline, "vae", None)):
            if part is not None:
                part.to(memory_format=torch.channels_last)
    if config.generation.compile:
        _compile(denoiser(pipeline))


def _compile(network: Any) -> None:
    # One block is compiled and serves all its likes.
    if getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks()
    else:
        network.compile()


def provenance(config: RunConfig, pipeline: Any, device: Device) -> dict[str, Any]:
    """Say what samples: model and revision, scheduler, precision, device, versions."""
    return {
        "model": config.model.name,
        "revision": _revision(config.model),
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


def _revision(model: ModelConfig) -> str:
    source = _source(model)
    if isinstance(source, Path):
        staged_or_not = _staged(source, model)
        assert isinstance(staged_or_not, Path)
        return fingerprint(staged_or_not)
    # The hub's cache keeps a file below the commit that it belongs to.
    cached = try_to_load_from_cache(source, _INDEX, revision=model.revision)
    return Path(cached).parent.name if isinstance(cached, str) else model.revision or "main"
