"""Images to ImageNet predictions: the one place of timm models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sdwn.devices.device import own_device
from sdwn.errors import SdwnError, UsageError
from sdwn.prediction import pretrained
from sdwn.prediction.checkpoint import StateDict, fit, is_torchvision_vit, read_checkpoint
from sdwn.prediction.classes import EXPECTED, SIZES, ClassList, class_list
from sdwn.prediction.presets import (
    PAPER,
    PRESETS,
    empty_network,
    lite_file,
    unavailable,
    weights_record,
)
from sdwn.prediction.resizing import Resizing
from sdwn.prediction.scores import Scores, score
from sdwn.storage.images import Pixels
from sdwn.wordnet.imagenet import CLASSES


@dataclass(frozen=True, eq=False, slots=True)
class Logits:
    """A batch's logits, float32 of shape (n, classes), on their way from the device.

    ``ready`` is what waits for them; None where they are there already.
    """

    values: torch.Tensor
    ready: torch.cuda.Event | None


class Classifier:
    """A timm model with its preprocessing, on this process's device.

    ``prepare`` makes a PIL image what :meth:`start` takes, as timm does for this model.
    ``classes`` is the wnid of each output; ``record`` says, in plain values for a JSON file, what
    model, weights and versions judged. ``most`` is how many images memory has room for, once it
    had none for more.

    Raises:
        SdwnError: the model knows another number of classes than any list of ImageNet's.
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
        self.device: torch.device = own_device()
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        self.preprocessing = dict(preprocessing)
        self.most: int | None = None
        known = class_list(int(network.num_classes))  # type: ignore[arg-type]
        if known is None:
            raise SdwnError(f"{name}: expected {EXPECTED}, found {network.num_classes}")
        self.classes: tuple[str | None, ...] = known.wnids
        self._columns = torch.from_numpy(known.columns)
        network = network.to(self.device, self.dtype).eval()
        # In this layout EfficientNet-Lite0 takes half the CPU time for a batch of 32.
        self.network = network.to(memory_format=torch.channels_last)
        # Of an RGB image, and safe in threads.
        self.prepare = Resizing(
            timm.data.create_transform(**preprocessing, is_training=False, use_prefetcher=True)
        )
        # A row of pixels of each: on a CPU, operations on three channels at a time crawl.
        width = preprocessing["input_size"][2]
        self._mean, self._std = (
            (255 * torch.tensor(preprocessing[name], device=self.device)).repeat(width)
            for name in ("mean", "std")
        )
        self.record = {"model": name, **weights, **_plain(preprocessing), **self._told(known)}

    def _told(self, known: ClassList) -> dict[str, Any]:
        return {
            "classes": len(known.wnids),
            "class_list": known.name,
            "unknown_imagenet_classes": int((known.columns < 0).sum()),
            "device": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {module.__name__: str(module.__version__) for module in _LIBRARIES},
        }

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 (n, height, width, 3) into what the network takes, on its device."""
        images = pixels.to(self.device, non_blocking=True).float()
        images.flatten(2).sub_(self._mean).div_(self._std)
        # In memory it stays as it is, which is channels_last.
        return images.permute(0, 3, 1, 2).to(self.dtype)

    @torch.inference_mode()
    def start(self, pixels: Pixels) -> Logits:
        """Begin with a batch of prepared images, (n, height, width, 3); a GPU works on meanwhile.

        Raises:
            RuntimeError, MemoryError: no room for so many, among others.
        """
        batch = torch.from_numpy(pixels)
        if self.device.type != "cuda":
            return Logits(self.network(self.normalise(batch)).float(), None)
        logits = self.network(self.normalise(batch.pin_memory())).float()
        values = logits.to("cpu", non_blocking=True)
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record()
        return Logits(values, ready)

    def finish(
        self,
        logits: Logits,
        labels: Sequence[int | None],
        subtrees: Sequence[tuple[int, ...] | None],
    ) -> Scores:
        """Wait for a batch and score it.

        Args:
            logits: of :meth:`start`.
            labels: index of each image's ImageNet-1k class, None without one.
            subtrees: for each image, classes whose probabilities are summed, or None.

        Raises:
            SdwnError: the model gave numbers that are not finite.
        """
        if logits.ready is not None:
            logits.ready.synchronize()
        wrong = int((~logits.values.isfinite().all(dim=1)).sum())
        if wrong:
            raise SdwnError(
                f"{self.name} gave infinite or NaN logits for {wrong} of {len(labels)} images in "
                f"{self.record['dtype']}; check the checkpoint, or load it in float32"
            )
        return score(logits.values, self._columns, labels, subtrees)

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
        pixels = np.stack([self.prepare(image.convert("RGB")) for image in images])
        return self.finish(self.start(pixels), target, [None] * len(images))


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
    return Classifier(model, *_loaded(model, checkpoint), dtype)


def find_classifier(model: str, checkpoint: Path | None) -> Path | None:
    """Check that a classifier can be loaded here without the network; return its weights' file.

    None where the weights that a model comes with are not on this machine.

    Raises:
        UsageError: timm knows no such model, or its weights are for other classes.
        SdwnError: the checkpoint cannot be read, or is of another model.
    """
    if checkpoint is not None:
        _loaded(model, checkpoint)
        return checkpoint
    if model == "efficientnet-lite0":
        return lite_file()
    if model == "paper":
        return pretrained.find_url(PAPER.url)
    require_known(model)
    _check_own_classes(model)
    return pretrained.find(model)


_Loaded = tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]


def _loaded(model: str, checkpoint: Path | None) -> _Loaded:
    """Load a network, its preprocessing, and the record of its weights."""
    if model in PRESETS:
        return _load_preset(model, checkpoint)
    require_known(model)
    if checkpoint is None:
        network, weights = _pretrained(model)
        return network, _preprocessing(network), weights
    state = read_checkpoint(checkpoint)
    network = timm.create_model(model, num_classes=_classes_in(state, model))
    preprocessing = _preprocessing(network)
    if is_torchvision_vit(state):
        preprocessing |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    network.load_state_dict(fit(state, network, model, str(checkpoint)), strict=False)
    return network, preprocessing, weights_record("checkpoint", checkpoint)


def fetch_own(model: str) -> Path:
    """Get the weights of a model that :func:`find_classifier` has not found; return their file.

    Raises:
        SdwnError: the weights cannot be had.
    """
    try:
        if model == "paper":
            return pretrained.fetch_url(PAPER.url)
        return pretrained.fetch(model)
    except Exception as error:  # torch.hub's, the hub's, of either of its HTTP libraries
        raise SdwnError(unavailable(model, f"the weights of {model}", error)) from None


def _preprocessing(network: torch.nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = timm.data.resolve_model_data_config(network)
    return config


def _load_preset(name: str, checkpoint: Path | None) -> _Loaded:
    preset = PRESETS[name]
    if checkpoint is None:
        state, weights = preset.weights()
    else:
        state, weights = read_checkpoint(checkpoint), weights_record("checkpoint", checkpoint)
    network = empty_network(name, _classes_in(state, preset.architecture))
    fitting = fit(state, network, name, str(checkpoint or weights["weights"]))
    # The file's tensors become the parameters: 2.4 GB of the paper's ViT are held once.
    network.load_state_dict(fitting, strict=False, assign=True)
    return network, dict(preset.preprocessing), weights


def _classes_in(state: StateDict, architecture: str) -> int:
    """Count the classes that a checkpoint's last layer has, if they are a list of ImageNet's."""
    config = timm.get_pretrained_cfg(architecture)
    named = (config and config.classifier) or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    for key in [f"{head}.bias" for head in heads] + ["heads.head.bias"]:
        if key in state and len(state[key]) in SIZES:
            return len(state[key])
    return CLASSES


def require_known(model: str) -> None:
    """Refuse a name that is neither a preset's nor timm's.

    Raises:
        UsageError: it is neither; like names are told.
    """
    known = [*PRESETS, *timm.list_pretrained(), *timm.list_models()]
    if model in known:
        return
    close = difflib.get_close_matches(model, known, n=3)
    meant = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
    raise UsageError(f"model {model!r}: expected {', '.join(PRESETS)} or a timm model; {meant}")


def _check_own_classes(model: str) -> None:
    """Refuse before the download a model whose own weights know other classes."""
    found = _own_classes(model)
    if found in SIZES:
        return
    # Those that know the 1000 classes alone come first.
    names = sorted(timm.list_pretrained(f"{model.partition('.')[0]}.*"), key=_own_classes)
    fitting = [name for name in names if _own_classes(name) in SIZES]
    instead = f"use {' or '.join(fitting[:3])}" if fitting else "give a checkpoint that has them"
    raise UsageError(
        f"model {model}: expected weights for {EXPECTED}, found {found or 'no'} classes; {instead}"
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
        raise SdwnError(unavailable(model, f"the weights of {model}", error)) from None
    file = pretrained.cached(model)
    at = f", at {file.parent.name}" if file else ""
    return network, weights_record(f"timm's own for this name{at}", file)


def _checked_labels(labels: Sequence[int] | NDArray[Any], images: int) -> list[int]:
    target = np.asarray(labels, dtype=np.int64)
    if not images or target.shape != (images,):
        raise ValueError(f"expected one label an image, found {target.shape} for {images} images")
    if target.min() < 0 or target.max() >= CLASSES:
        raise ValueError(f"labels are class indices 0 to {CLASSES - 1}, found {labels!r}")
    found: list[int] = target.tolist()
    return found


def _plain(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in preprocessing.items()
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_LIBRARIES = (timm, torch, torchvision)
