"""A classifier's weights in a file: read without running code, renamed, compared with a network."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdwn.errors import SdwnError, shell
from sdwn.models.weights import is_pointer
from sdwn.prediction.classifier import EXPECTED

StateDict = dict[str, torch.Tensor]

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

    A training checkpoint's weights are found under ``state_dict_ema``, ``model_ema``,
    ``state_dict`` or ``model``, in this order; the names of what wraps the network go.

    Raises:
        SdwnError: the file is missing, unreadable, or holds something else.
    """
    try:
        pointer = is_pointer(path)
    except OSError as error:
        raise SdwnError(f"{path}: cannot be read: {error.strerror}") from None
    if pointer:
        raise SdwnError(f"{path}: a pointer of git-lfs, not the file itself; get it: git lfs pull")
    content: Any
    if path.suffix.lower() == ".safetensors":
        try:
            content = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SdwnError(f"{path}: not a readable safetensors file: {one_line(error)}") from None
    else:
        content = _read_torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = isinstance(content, Mapping) and all(map(torch.is_tensor, content.values()))
    if not tensors or not content:
        found = type(content).__name__
        if isinstance(content, Mapping):
            found = f"a mapping of {', '.join(map(repr, list(content)[:3])) or 'nothing'}"
        raise SdwnError(
            f"{path}: expected a state dict, tensors by name, found {found}; "
            "save model.state_dict() itself"
        )
    return _unwrapped(dict(content))


def _read_torch(path: Path) -> Any:
    try:
        # timm's training checkpoints carry their settings in a Namespace; it runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise SdwnError(
                f"{path}: not a readable torch file; copy or download it again"
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


def _unwrapped(state: StateDict) -> StateDict:
    """Extract the network from what was trained: ``model.module.head.bias`` is ``head.bias``.

    What lies beside it in a Lightning module, such as a loss's weights, is left out.
    """
    names = {key.partition(".")[0] for key in state}
    # No network of timm or torchvision has all its tensors in one attribute.
    alone = names if len(names) == 1 else set[str]()
    wrapper = next((name for name in (*_ATTRIBUTES, *alone) if name in names), None)
    inner = {
        key.partition(".")[2]: tensor
        for key, tensor in state.items()
        if key.startswith(f"{wrapper}.")
    }
    return _unwrapped(inner) if inner else state


def is_torchvision_vit(state: Mapping[str, Any]) -> bool:
    """Return whether a state dict is of a torchvision VisionTransformer, by its keys."""
    return "class_token" in state and "encoder.pos_embedding" in state


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


def fit_state_dict(
    state: StateDict, network: torch.nn.Module, model: str, source: str
) -> StateDict:
    """Rename a state dict's foreign keys to those of a network, or refuse it.

    Raises:
        SdwnError: it is of another network, or of another number of classes.
    """
    expected: StateDict = network.state_dict()
    if is_torchvision_vit(state):
        state = convert_torchvision_vit(state)
    elif "_conv_stem.weight" in state and _kinds(state) == _kinds(expected):
        # The package behind efficientnet-lite0 has other names in the same order.
        state = dict(zip(expected, state.values(), strict=True))
    reshaped = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    missing = [
        key
        for key in sorted(expected.keys() - state.keys())
        # Old batch norms don't count their batches; nothing here needs the count.
        if not key.endswith(".num_batches_tracked")
    ]
    unexpected = state.keys() - expected.keys()
    if not (reshaped or missing or unexpected):
        return state
    last = heads(network.pretrained_cfg.get("classifier"))  # type: ignore[operator, union-attr]
    if reshaped and all(key.rpartition(".")[0] in last for key in reshaped):
        raise SdwnError(
            f"{source}: expected a classifier of {EXPECTED}, "
            f"found {len(state[reshaped[0]])} classes; give a checkpoint fine-tuned on ImageNet-1k"
        )
    examples = [f"{k} {_shape(state[k])} instead of {_shape(expected[k])}" for k in reshaped]
    examples += [f"no {key}" for key in missing] + sorted(unexpected)
    raise SdwnError(
        f"{source}: expected a checkpoint of {model}, found {len(missing)} keys missing, "
        f"{len(unexpected)} unexpected, {len(reshaped)} of another shape, for example "
        f"{examples[0]}; name the model that it was trained as"
    )


def _kinds(tensors: StateDict) -> list[tuple[str, torch.Size]]:
    return [(key.rpartition(".")[2], tensor.shape) for key, tensor in tensors.items()]


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def heads(classifier: str | Sequence[str] | None) -> tuple[str, ...]:
    """List the names of a model's last layers, as its configuration in timm has them."""
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())


def one_line(error: Exception) -> str:
    """Return an error's text as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
