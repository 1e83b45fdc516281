"""LoRAs, textual inversions and another VAE of a model: found, fetched and checked.

Each is a safetensors file or a folder of this machine, or a name of the hub; a VAE is a folder or
a name of the hub. They are loaded with the model, see :mod:`sdwn.models.pipeline`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

from sdwn.config import AddedWeights, InversionSettings, ModelConfig, RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.io import read_json
from sdwn.models.weights import (
    FoundWeights,
    LockedFile,
    Weights,
    convert_once,
    download,
    fetch_model,
    file_fault,
    found_model,
    is_safetensors,
    locate,
    rewriting,
    snapshot,
    source,
    tensor_shapes,
)

# What diffusers' own scripts call them.
_USUAL = {
    "lora": "pytorch_lora_weights.safetensors",
    "textual_inversion": "learned_embeds.safetensors",
}


def find_added(
    model: ModelConfig,
    commits: Iterable[str | None] = (),
    *,
    fetch: bool = False,
    folder: Path | None = None,
) -> list[FoundWeights]:
    """Find what changes a model, on this machine; ``fetch`` downloads what is on the hub.

    ``commits`` are wanted, in this order, instead of the config's. Each download gets its own
    folder below ``folder``, instead of the hub's cache.

    Raises:
        UsageError: a name that nothing can load, or that leaves open which file is meant.
        SdwnError: it is not on this machine, or not whole.
    """
    return [
        _find(setting, chosen, commit, fetch, folder)
        for (setting, chosen), commit in zip_longest(model.added, commits)
    ]


def _find(
    setting: str,
    chosen: AddedWeights,
    commit: str | None = None,
    fetch: bool = False,
    below: Path | None = None,
) -> FoundWeights:
    label, folder = f"model.{setting} {chosen.name}", Path(chosen.name).expanduser()
    pick = partial(_chosen_files, label, setting, chosen)
    where, wanted = locate(chosen.name, f"model.{setting}"), commit or chosen.revision
    if where == "elsewhere":
        raise SdwnError(f"{label}: no such file or folder on this machine")
    if where == "file" and setting == "vae":
        remedy = f"make a folder with: {rewriting(chosen.name, 'model.vae')}"
        raise UsageError(f"{label}: expected a folder or a name of the hub; {remedy}")
    commit = None
    if where == "hub" and fetch:
        own = below and below / f"{setting}-{chosen.name.replace('/', '--')}"
        folder, commit = download(label, chosen.name, wanted, pick, own)
    elif where == "hub":
        if (found := snapshot(chosen.name, wanted)) is None:
            raise SdwnError(f"{label} is not in the hub's cache; get it with: sdwn prefetch")
        folder, commit = found, found.name
    if where == "file":
        folder, names = folder.parent, [folder.name]
    else:
        names = pick(
            [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
        )
    for name in names:
        if fault := file_fault(folder / name):
            raise IntegrityError(f"{label}: {name} {fault}")
    return FoundWeights(
        setting=setting,
        name=chosen.name,
        commit=commit,
        # Folders in the hub's cache are named after commits.
        folder=None if folder.name == commit else str(folder),
        files=[LockedFile.of(folder / name, name) for name in names],
    )


def _chosen_files(
    label: str, setting: str, chosen: AddedWeights, names: Collection[str], _: str = ""
) -> list[str]:
    """Pick the files that are loaded, of those in a folder or on the hub."""
    if setting == "vae":
        # A VAE alone, or that of a whole pipeline.
        for top in ("", "vae/"):
            wanted = [f"{top}config.json", f"{top}diffusion_pytorch_model.safetensors"]
            if set(wanted) <= set(names):
                return wanted
        raise UsageError(f"{label}: expected {' and '.join(wanted)}, or both at its top")
    listed = sorted(name for name in names if is_safetensors(Path(name)))
    fitting = [name for name in listed if name in (chosen.file, _USUAL[setting])] or listed
    wanted = [chosen.file] if chosen.file else fitting[:1] if len(fitting) == 1 else []
    if not listed or not wanted or wanted[0] not in listed:
        what = f"expected {chosen.file or 'one safetensors file'}, found"
        raise UsageError(
            f"{label}: {what} {', '.join(listed) or 'none'}" + "; name one with file" * bool(listed)
        )
    return wanted


def is_prefetched(model: ModelConfig) -> bool:
    """Return whether ``sdwn prefetch`` gets something of a model, from the hub or by converting."""
    names = (locate(one.name, f"model.{setting}") for setting, one in model.added)
    return source(model) in ("hub", "file") or "hub" in names


def with_added(found: Weights, added: Sequence[FoundWeights]) -> Weights:
    """Return a model's weights with what changes them."""
    if not added:
        return found
    lines = "\n".join(f"{one.setting} {file.sha256}" for one in added for file in one.files)
    checksum = hashlib.sha256(lines.encode()).hexdigest()[:16]
    return replace(found, revision=f"{found.revision}+{checksum}", added=tuple(added))


def inversion_encoders(names: Collection[str]) -> list[tuple[str, str]]:
    """Return a textual inversion's tensors, and the endings of the encoders that they are for."""
    if set(names) == {"clip_l", "clip_g"}:
        return [("clip_l", ""), ("clip_g", "_2")]
    return [(name, "") for name in names]


def add_inversion_tokens(tokenizers: Mapping[str, Any], model: ModelConfig) -> None:
    """Add the tokens of a model's textual inversions to its tokenizers, as loading it does."""
    for found, chosen in zip(find_added(model), model.added, strict=True):
        if isinstance(chosen[1], InversionSettings):
            shapes = tensor_shapes(found.path)
            for key, ending in inversion_encoders(shapes):
                first = chosen[1].token or key
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
    for token in tokenizer.added_tokens_encoder:
        number, more = 1, ""
        while f"{token}_{number}" in tokenizer.added_tokens_encoder:
            more += f" {token}_{number}"
            number += 1
        prompt = prompt.replace(token, token + more)
    return prompt


def check_added(model: ModelConfig, parts: Mapping[str, str], folder: Path | None) -> None:
    """Refuse what cannot change a model, as far as files say; not what is not on this machine.

    ``parts`` are the model's and their classes, ``folder`` is where it lies; none where it is not
    on this machine.
    """
    if model.lora and find_spec("peft") is None:
        raise UsageError("model.lora needs peft; install it with: pip install 'sdwn[lora]'")
    for setting, chosen in model.added:
        try:
            found = _find(setting, chosen)
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
            width = read_json(folder / f"text_encoder{ending}" / "config.json").get("hidden_size")
            if (shape := shapes[key])[-1:] != [width] or len(shape) > 2 or 0 in shape:
                return f"its vectors have the shape {shape}, and the model's a width of {width}"
    elif found.setting == "vae" and folder is not None:
        configs = [read_json(one / "config.json") for one in (found.path, folder / "vae")]
        other, own = (
            f"{one.get('_class_name')} of {one.get('latent_channels')} latent channels and "
            f"{len(one.get('block_out_channels', ()))} levels"
            for one in configs
        )
        if other != own:
            return f"it is an {other}, and the model's own is an {own}"
    return ""


def found_weights(config: RunConfig, commit: str | None = None) -> Weights:
    """Return a config's weights and what changes them; a SdwnError says what is not here, or whole.

    ``commit`` is that of the hub's model, instead of the config's.
    """
    return with_added(found_model(config, commit), find_added(config.model))


def fetch_weights(
    config: RunConfig,
    commit: str | None = None,
    commits: Iterable[str | None] = (),
    folder: Path | None = None,
    below: Path | None = None,
) -> Weights:
    """Get a config's weights and what changes them: download them, or convert a single file.

    ``commit`` and ``commits`` replace the config's; ``folder`` and ``below`` the hub's cache, for
    the model, and for what changes it, in a folder each. Raises an SdwnError where one is not had.
    """
    if (where := source(config.model)) == "hub":
        found = fetch_model(config, commit, folder)
    elif folder is not None:
        raise UsageError(
            f"--folder is for models of the hub; {config.model.name} needs no fetching"
        )
    else:
        if where == "file":
            convert_once(config.model)
        found = found_model(config)
    added = find_added(config.model, commits, fetch=True, folder=below)
    return with_added(found, added)


def obtain_weights(config: RunConfig) -> Weights:
    """Find a config's weights and what changes them, or get them."""
    try:
        return found_weights(config)
    except UsageError:
        raise
    except SdwnError:
        return fetch_weights(config)
