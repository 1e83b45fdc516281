"""Where a model's weights lie and which they are: built in, in a folder, in the hub's cache."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from sdwn.config import BUILTIN_MODELS, ModelConfig, RunConfig
from sdwn.errors import IntegrityError, UsageError
from sdwn.files import cache_folder, file_sha256, read_json

INDEX = "model_index.json"
# SHA-256 of what comes with the package, as sha256sum writes them.
SUMS = "SHA256SUMS"
# Counts every change to what is made in the cache, so that no cache keeps an older one.
BUILTIN_VERSION = 1
# Come with the package, in a folder of their name, and are read where they lie.
IN_PACKAGE = ("miniature",)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# The same weights in other formats, and what people read.
_IGNORED = (
    *("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx*"),
    *("*.md", "*.png", "*.jpg"),
)
_AGAIN = "install sdwn again, or bring them back with: git checkout sdwn/miniature"
_PLAIN = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(-\d{5}-of-\d{5})?"
    r"\.safetensors(\.index\.json)?"
)


@dataclass(frozen=True, slots=True)
class Weights:
    """A pipeline's folder in diffusers format, and which weights lie there.

    ``revision`` is the hub's commit, or the folder's own :func:`fingerprint`.
    """

    folder: Path
    revision: str


Source = Literal["builtin", "folder", "hub"]


def source(model: ModelConfig) -> Source:
    """Say where a model comes from.

    Raises:
        UsageError: its name is no folder here, and no name that the hub could know.
    """
    if model.builtin is not None:
        return "builtin"
    if Path(model.name).expanduser().is_dir():
        return "folder"
    if is_hub_name(model):
        return "hub"
    raise UsageError(
        f"model {model.name}: no such folder, and no hub name either; expected a folder in "
        "diffusers format, a name like CompVis/stable-diffusion-v1-4, or one of "
        f"{', '.join(BUILTIN_MODELS)}"
    )


def is_hub_name(model: ModelConfig) -> bool:
    """Tell whether a name that is no folder could be one of the hub's."""
    return _HUB_NAME.fullmatch(model.name) is not None


def is_commit(revision: str | None) -> bool:
    """Tell whether a revision is a commit, which never changes, and no branch or tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def builtin_path(name: str) -> Path:
    """Name the folder of a built-in model: in the package, or in the cache, made or not."""
    if name in IN_PACKAGE:
        return Path(__file__).resolve().parent.parent / name
    return cache_folder() / "models" / f"{name}-{BUILTIN_VERSION}"


def packaged(name: str) -> Path:
    """Give the folder of a model that comes with the package, once its files are as they came.

    Raises:
        IntegrityError: a file of it is missing, or another than was shipped.
    """
    folder = builtin_path(name)
    sums = folder / SUMS
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise IntegrityError(f"{sums}: cannot be read; {_AGAIN}") from None
    for line in lines:
        digest, _, file = line.partition("  ")
        if not (folder / file).is_file() or file_sha256(folder / file) != digest:
            raise IntegrityError(
                f"{folder / file}: missing, or another than came with the package; {_AGAIN}"
            )
    return folder


def model_folder(model: ModelConfig) -> Path:
    """Give the folder that a model is named after.

    Raises:
        UsageError: no pipeline lies there.
    """
    folder = Path(model.name).expanduser()
    if not (folder / INDEX).is_file():
        raise UsageError(
            f"model {folder}: no pipeline in diffusers format, for {INDEX} is missing; "
            "save one there with its save_pretrained"
        )
    return folder


def snapshot(name: str, revision: str | None) -> Path | None:
    """Find a commit's folder in the hub's cache, whole or not; it is named after the commit."""
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        commit = (cached / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or "main"
    folder = cached / "snapshots" / commit
    return folder if folder.is_dir() else None


def locate(config: RunConfig, commit: str | None = None) -> Path | None:
    """Find the folder of a config's weights, without the network; None where there is none.

    Of a model of the hub it is the one in its cache, at ``commit`` if that is given, and whole.

    Raises:
        IntegrityError: a model that comes with the package is not as it came.
    """
    model = config.model
    if model.builtin in IN_PACKAGE:
        return packaged(model.builtin)
    try:
        kind = source(model)
    except UsageError:
        return None
    if kind == "hub":
        cached = snapshot(model.name, commit or model.revision)
        return cached if cached is not None and is_whole(cached, config) else None
    folder = builtin_path(model.builtin) if model.builtin else Path(model.name).expanduser()
    return folder if (folder / INDEX).is_file() else None


def find(config: RunConfig) -> Weights | None:
    """Find a config's weights, without the network; None where they are not here."""
    folder = locate(config)
    if folder is None:
        return None
    hub = source(config.model) == "hub"
    return Weights(folder, folder.name if hub else fingerprint(folder))


def unneeded(config: RunConfig) -> set[str]:
    """Name the parts of a pipeline that a config does without."""
    return set() if config.generation.safety_checker else {"safety_checker"}


def components(folder: Path) -> set[str]:
    """Name the parts that a pipeline's index lists.

    Raises:
        IntegrityError: it has no index that can be read.
    """
    index = read_json(folder / INDEX)
    return {
        name
        for name, kind in index.items()
        if isinstance(kind, list) and kind[:1] != [None] and not name.startswith("_")
    }


def is_whole(folder: Path, config: RunConfig) -> bool:
    """Tell whether every part of a pipeline is there that a config needs, with safetensors."""
    try:
        parts = components(folder) - unneeded(config)
        variant = config.model.variant
        names = needed(files(folder), parts, variant)
        return (
            bool(parts)
            and all(_has_part(folder / part, names) for part in parts)
            and (variant is None or any(_is_variant(name, variant) for name in names))
        )
    except IntegrityError:
        return False


def _has_part(part: Path, names: Collection[str]) -> bool:
    own = [name for name in names if name.startswith(f"{part.name}/")]
    weights = any(name.endswith(".safetensors") for name in own)
    if not own or ((part / "config.json").is_file() and not weights):
        return False
    indices = [name for name in own if ".index." in name]
    listed = (set(read_json(part.parent / name).get("weight_map", {}).values()) for name in indices)
    return all((part / file).is_file() for shards in listed for file in shards)


def files(folder: Path) -> list[str]:
    """List what loading a pipeline may read of its folder: no other format, no hidden file.

    Files beside the index count only where a part has no folder of its own.
    """
    found = (
        Path(top, name).relative_to(folder)
        for top, _, inside in os.walk(folder, followlinks=True)
        for name in inside
    )
    flat = any(not (folder / part).is_dir() for part in components(folder))
    return [
        name.as_posix()
        for name in sorted(found)
        if (flat or len(name.parts) > 1 or name.name == INDEX)
        and not _ignored(name)
        # The hub's cache has links, which may lead nowhere.
        and (folder / name).is_file()
    ]


def _ignored(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return hidden or any(fnmatch(name.name, pattern) for pattern in _IGNORED)


def needed(names: Iterable[str], parts: Collection[str], variant: str | None) -> list[str]:
    """Pick the files of a hub's model that diffusers takes, given which parts it has.

    >>> names = ["model_index.json", "README.md", "unet/config.json", "vae/config.json"]
    >>> names += [f"unet/diffusion_pytorch_model{v}.safetensors" for v in ("", ".fp16")]
    >>> needed(names, ["unet"], None)
    ['model_index.json', 'unet/config.json', 'unet/diffusion_pytorch_model.safetensors']
    >>> needed(names, ["unet"], "fp16")[-1]
    'unet/diffusion_pytorch_model.fp16.safetensors'
    """
    paths = [PurePosixPath(name) for name in names]
    chosen = {INDEX}
    for part in parts:
        own = [path for path in paths if path.parts[0] == part and len(path.parts) > 1]
        weights = [path for path in own if ".safetensors" in path.name]
        if weights:
            own = [path for path in own if path.name == "config.json"] + _of(variant, weights)
        chosen.update(map(str, own))
    return [str(path) for path in paths if str(path) in chosen]


def _of(variant: str | None, weights: list[PurePosixPath]) -> list[PurePosixPath]:
    if variant is not None and (those := [w for w in weights if _is_variant(w.name, variant)]):
        return those
    return [path for path in weights if _PLAIN.fullmatch(path.name)]


def _is_variant(name: str, variant: str) -> bool:
    return re.search(rf"\.{re.escape(variant)}[.-]", name) is not None


def fingerprint(folder: Path) -> str:
    """Return the first 16 hex digits of a SHA-256 over a pipeline's safetensors files."""
    return combined({name: file_sha256(folder / name) for name in files(folder) if _counts(name)})


def combined(digests: Mapping[str, str]) -> str:
    """Make a fingerprint of the files' own SHA-256 by name, given in the order of :func:`files`."""
    whole = hashlib.sha256()
    for name, digest in digests.items():
        if _counts(name):
            whole.update(name.encode() + b"\0" + bytes.fromhex(digest))
    return whole.hexdigest()[:16]


def _counts(name: str) -> bool:
    return name.endswith(".safetensors")


def switch_hub_off() -> None:
    """Keep this process from looking for the hub; the hub's library must not be loaded yet."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
