"""LoRAs, textual inversions and another VAE of a model: checked before a run, loaded with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from itertools import count, takewhile
from math import prod
from pathlib import Path
from typing import Any

from sdwn.config import AddedWeights, InversionSettings, LoraSettings, ModelConfig, RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, first_line
from sdwn.io import read_json
from sdwn.models.weights import FoundWeights, Weights, find_added, tensor_shapes


def check_added(model: ModelConfig, parts: Mapping[str, str], folder: Path | None) -> None:
    """Refuse what cannot change a model of these parts, as far as files on this machine say."""
    if model.lora and find_spec("peft") is None:
        raise UsageError("model.lora needs peft; install it with: pip install 'sdwn[lora]'")
    for setting, chosen in model.added:
        try:
            found = find_added(setting, chosen)
        except (UsageError, IntegrityError):
            raise
        except SdwnError:
            continue
        if fault := _fault(found, chosen, parts, folder):
            raise UsageError(f"model.{found}: {fault}")


def _fault(
    found: FoundWeights, chosen: AddedWeights, parts: Mapping[str, str], folder: Path | None
) -> str:
    """Return why weights would change a model into something else, "" if not."""
    if isinstance(chosen, InversionSettings):
        shapes = tensor_shapes(found.path)
        keys = inversion_encoders(shapes)
        encoders = [kind for name, kind in parts.items() if name.startswith("text_encoder")]
        wanted = sum(kind.startswith("CLIP") for kind in encoders)
        if parts and len(keys) != wanted:
            return f"it is for {len(keys)} text encoders of CLIP, and the model has {wanted}"
        if chosen.token is None and (len(keys) > 1 or keys[0][0] == "emb_params"):
            return "it names no token; give the word that stands for it in prompts with token"
        if folder is None:
            return ""
        for key, ending in keys:
            width = read_json(folder / f"text_encoder{ending}/config.json").get("hidden_size")
            if (shape := shapes[key])[-1:] != [width] or len(shape) > 2 or 0 in shape:
                return f"its vectors have the shape {shape}, and the model's a width of {width}"
    elif found.setting == "vae" and folder is not None:
        other, own = (
            f"{one.get('_class_name')} of {one.get('latent_channels')} latent channels and "
            f"{len(one.get('block_out_channels', ()))} levels"
            for one in map(read_json, (found.path / "config.json", folder / "vae/config.json"))
        )
        if other != own:
            return f"it is an {other}, and the model's own is an {own}"
    return ""


def inversion_encoders(names: Collection[str]) -> list[tuple[str, str]]:
    """Return a textual inversion's tensors, and the endings of the encoders that they are for."""
    if set(names) == {"clip_l", "clip_g"}:
        return [("clip_l", ""), ("clip_g", "_2")]
    return [(name, "") for name in names]


def add_inversion_tokens(tokenizers: Mapping[str, Any], model: ModelConfig) -> None:
    """Add the tokens of a model's textual inversions to its tokenizers, as loading it does."""
    for chosen in model.textual_inversion:
        found = find_added("textual_inversion", chosen)
        shapes = tensor_shapes(found.path)
        for key, ending in inversion_encoders(shapes):
            first = chosen.token or key
            more = [f"{first}_{number}" for number in range(1, prod(shapes[key][:-1]))]
            tokenizer = tokenizers[f"tokenizer{ending}"]
            if taken := {first, *more} & tokenizer.get_vocab().keys():
                raise UsageError(
                    f"model.{found}: the model has {min(taken)} in its vocabulary already, or "
                    "another inversion has; name another word with token"
                )
            tokenizer.add_tokens([first, *more])


def with_all_vectors(tokenizer: Any, prompt: str) -> str:
    """Return a prompt with all tokens of each textual inversion in it, as a pipeline reads it."""
    tokens = tokenizer.added_tokens_encoder
    for token in tokens:
        more = takewhile(tokens.__contains__, (f"{token}_{number}" for number in count(1)))
        prompt = prompt.replace(token, " ".join([token, *more]))
    return prompt


def change_model(pipeline: Any, config: RunConfig, weights: Weights) -> None:
    """Add LoRAs and textual inversions to those parts of a pipeline that are loaded."""
    for (_, chosen), found in zip(config.model.added, weights.added, strict=True):
        try:
            if isinstance(chosen, LoraSettings):
                _fuse_lora(pipeline, found.path, chosen.scale)
            elif isinstance(chosen, InversionSettings):
                _load_inversion(pipeline, found.path, chosen.token)
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SdwnError(
                f"model.{found} does not fit {type(pipeline).__name__}: {first_line(error)}"
            ) from error


def _fuse_lora(pipeline: Any, file: Path, scale: float) -> None:
    """Add a LoRA to the weights that it changes, so that a step takes no longer than without."""
    import torch

    changed, read = pipeline._lora_loadable_modules, pipeline.lora_state_dict
    loaded = [name for name in changed if isinstance(getattr(pipeline, name), torch.nn.Module)]
    if not loaded:
        return

    def of_loaded_parts(*given: Any, **options: Any) -> tuple[Any, ...]:
        state, *rest = read(*given, **options)
        tops = {name: name.split(".")[0] for name in state}
        if not {*changed}.intersection(tops.values()):
            raise ValueError("it has no weights for any part of this model")
        return {name: state[name] for name, top in tops.items() if top in loaded}, *rest

    # What the pipeline calls for itself, with what is for parts that are not loaded left out.
    pipeline.lora_state_dict = of_loaded_parts
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="added")
    del pipeline.lora_state_dict
    pipeline.fuse_lora(components=loaded, lora_scale=scale, adapter_names=["added"])
    pipeline.unload_lora_weights()


def _load_inversion(pipeline: Any, file: Path, token: str | None) -> None:
    """Add a textual inversion to each tokenizer and text encoder that it is for."""
    from safetensors.torch import load_file

    state = load_file(file)
    for key, ending in inversion_encoders(state):
        encoder = getattr(pipeline, f"text_encoder{ending}", None)
        if encoder is not None:
            pipeline.load_textual_inversion(
                {token or key: state[key]},
                tokenizer=getattr(pipeline, f"tokenizer{ending}"),
                text_encoder=encoder,
            )
