"""What changes a model: LoRAs, textual inversions and another VAE, found, fetched and checked.

Each is a safetensors file or a folder of this machine, or a name of the hub; a VAE is a folder or
a name of the hub. They are loaded with the model, see :mod:`sdwn.models.pipeline`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from sdwn.config import AddedWeights, ModelConfig, RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.models.weights import (
    FoundWeights,
    NoAnswerError,
    Weights,
    download,
    file_fault,
    is_safetensors,
    locate,
    obtain_model,
    own_sha256,
    rewriting,
    snapshot,
    source,
)

# What diffusers' own scripts call them.
_USUAL = {
    "lora": "pytorch_lora_weights.safetensors",
    "textual_inversion": "learned_embeds.safetensors",
}


def find_added(model: ModelConfig, commits: Iterable[str | None] = ()) -> list[FoundWeights]:
    """Find what changes a model; of the hub in its cache, at the commits if they are given.

    Raises:
        UsageError: a name that nothing can load, or that leaves open which file is meant.
        SdwnError: it is not on this machine, or not whole.
    """
    return [
        _find(setting, chosen, commit)
        for (setting, chosen), commit in zip_longest(model.added, commits)
    ]


def fetch_added(
    model: ModelConfig, commits: Iterable[str | None] = (), folder: Path | None = None
) -> list[FoundWeights]:
    """Find what changes a model, and download what is on the hub; else as :func:`find_added`.

    Below ``folder``, if one is given, each download gets its own.
    """
    found = []
    for (setting, chosen), commit in zip_longest(model.added, commits):
        label = f"model.{setting} {chosen.name}"
        if locate(chosen.name, f"model.{setting}") != "hub":
            found.append(_find(setting, chosen, None))
            continue
        own = folder and folder / f"{setting}-{chosen.name.replace('/', '--')}"
        pick, wanted = partial(_chosen_files, label, setting, chosen), commit or chosen.revision
        try:
            got, now = download(label, chosen.name, wanted, pick, own)
        except NoAnswerError:
            if own is not None:
                raise
            with suppress(SdwnError):
                found.append(_find(setting, chosen, commit))
                continue
            raise
        found.append(_in_folder(setting, chosen, got, now))
    return found


def _find(setting: str, chosen: AddedWeights, commit: str | None) -> FoundWeights:
    label, path = f"model.{setting} {chosen.name}", Path(chosen.name).expanduser()
    where = locate(chosen.name, f"model.{setting}")
    if where == "elsewhere":
        raise SdwnError(f"{label}: no such file or folder on this machine")
    if where == "hub":
        cached = snapshot(chosen.name, commit or chosen.revision)
        if cached is None:
            raise SdwnError(f"{label} is not in the hub's cache; get it with: sdwn prefetch")
        return _in_folder(setting, chosen, cached, cached.name)
    if where == "folder":
        return _in_folder(setting, chosen, path, None)
    if setting == "vae":
        remedy = f"make a folder with: {rewriting(chosen.name, 'model.vae')}"
        raise UsageError(f"{label}: expected a folder or a name of the hub; {remedy}")
    one_file = chosen.model_copy(update={"file": path.name})
    return _in_folder(setting, one_file, path.parent, None)


def _in_folder(
    setting: str, chosen: AddedWeights, folder: Path, commit: str | None
) -> FoundWeights:
    label = f"model.{setting} {chosen.name}"
    there = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
    names = _chosen_files(label, setting, chosen, there)
    for name in names:
        if fault := file_fault(folder / name):
            raise IntegrityError(f"{label}: {name} {fault}")
    return FoundWeights(setting, chosen.name, folder, tuple(names), commit)


def _chosen_files(
    label: str, setting: str, chosen: AddedWeights, names: Collection[str], _: str = ""
) -> list[str]:
    """Pick the files that are loaded, of those in a folder or on the hub."""
    if setting == "vae":
        # A VAE alone, or that of a whole pipeline.
        top = next((top for top in ("", "vae/") if f"{top}config.json" in names), None)
        weights = f"{top}diffusion_pytorch_model.safetensors"
        if top is None or weights not in names:
            raise SdwnError(f"{label}: expected config.json and {weights} there")
        return [f"{top}config.json", weights]
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
    digests = [(one.setting, own_sha256(one.folder / name)) for one in added for name in one.files]
    revision = f"{found.revision}+{added_checksum(digests)}"
    return replace(found, revision=revision, added=tuple(added))


def added_checksum(digests: Iterable[tuple[str, str]]) -> str:
    """Return 16 hex digits over the SHA-256 of the files that change a model."""
    lines = "\n".join(f"{setting} {digest}" for setting, digest in digests)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def obtain_weights(config: RunConfig) -> Weights:
    """Find a config's weights and what changes them, or get them."""
    try:
        added = find_added(config.model)
    except UsageError:
        raise
    except SdwnError:
        added = fetch_added(config.model)
    return with_added(obtain_model(config), added)
