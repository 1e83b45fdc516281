"""A model's weights: where they are, their revision, and checks that none is missing.

A model is built in, a folder in diffusers format, or a name of the hub, whose weights are in its
cache. Nothing here needs the network or torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from sdwn.config import BUILTIN_MODELS, ModelConfig, RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, shell
from sdwn.io import file_sha256, locked, private_folder, read_json
from sdwn.models.builtin import IN_PACKAGE, builtin_path, packaged
from sdwn.paths import STAGE_VARIABLE

log = logging.getLogger(__name__)

INDEX = "model_index.json"
# What git clones instead of a large file where git-lfs is not installed.
POINTER = b"version https://git-lfs"

# What people write for a model, and nothing can load.
_ADDRESS = re.compile(
    r"(?:\w+://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/([\w.-]+))?(?:[/?#].*)?"
)
_SINGLE_FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin", ".gguf", INDEX)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# The same weights in other formats, and what people read.
_IGNORED = (
    *("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx*"),
    *("*.md", "*.png", "*.jpg"),
)
# A part's weights, whole, one of several files, or the index of these; diffusers looks for
# safetensors, of no variant unless it is asked for one.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?"
    r"\.(?P<format>safetensors|bin|ckpt|pt|msgpack)(?:\.index\.json)?"
)
# Classes of parts that are settings and vocabularies, without weights.
_WEIGHTLESS = re.compile(r"Tokenizer|Process|Scheduler|Extractor")


@dataclass(frozen=True, slots=True)
class Weights:
    """A pipeline's folder in diffusers format, and which weights are in it.

    ``revision`` is the hub's commit, or the folder's own :func:`fingerprint`.
    """

    folder: Path
    revision: str


Source = Literal["builtin", "folder", "hub"]


def source(model: ModelConfig) -> Source:
    """Return where a model comes from.

    Raises:
        UsageError: its name is no folder here, and no name that the hub could know.
    """
    if model.builtin is not None:
        return "builtin"
    if Path(model.name).expanduser().is_dir():
        return "folder"
    if mistake := _mistake(model.name):
        raise UsageError(f"model {model.name}: {mistake}")
    if is_hub_name(model):
        return "hub"
    raise UsageError(
        f"model {model.name}: no such folder, and no hub name either; expected a folder in "
        "diffusers format, a name like CompVis/stable-diffusion-v1-4, or one of "
        f"{', '.join(BUILTIN_MODELS)}"
    )


def _mistake(name: str) -> str:
    """Return what to write instead of a name that nothing can load; "" for any other."""
    if address := _ADDRESS.fullmatch(name):
        revision = f" and model.revision: {address[2]}" * (address[2] not in (None, "main"))
        return f"this is the address of a page; write model.name: {address[1]}{revision}"
    if "://" in name:
        return "this is an address; download the model, and write the folder's path"
    if Path(name).name == INDEX:
        return f"this is a file; write the folder that it lies in, model.name: {Path(name).parent}"
    if name.lower().endswith(_SINGLE_FILES) or Path(name).expanduser().is_file():
        return (
            "this is a single file, and a folder in diffusers format is expected; for Stable "
            "Diffusion make one with: "
            f"{_conversion('StableDiffusionPipeline', f'from_single_file({json.dumps(name)})')}; "
            "then write model.name: FOLDER"
        )
    plain = re.sub(r"\s", "", name.replace("\\", "/")).rstrip("/")
    if plain != name and "/" in plain and _HUB_NAME.fullmatch(plain):
        return (
            "no such folder is here, and a name on the hub has no blanks, no backslash and no "
            f"slash at its end; if that is meant, write model.name: {plain}"
        )
    return ""


def _conversion(kind: str, load: str) -> str:
    code = f'from diffusers import {kind} as P; P.{load}.save_pretrained("FOLDER")'
    return shell("python", "-c", code)


def is_hub_name(model: ModelConfig) -> bool:
    """Return whether a name that is no folder could be one of the hub's."""
    return _HUB_NAME.fullmatch(model.name) is not None


def is_elsewhere(model: ModelConfig) -> bool:
    """Return whether a model is a folder of another machine, by a path that this one lacks."""
    path = model.name.startswith(("/", "~", "."))
    return path and not Path(model.name).expanduser().exists() and not _mistake(model.name)


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit, which never changes, and no branch or tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def weights_folder(config: RunConfig, commit: str | None = None) -> Path:
    """Return the folder of a config's weights.

    Of a model of the hub it is the one in its cache, at ``commit`` if that is given.

    Raises:
        UsageError: the model's name is no folder, and no name that the hub could know.
        IntegrityError: a part is missing, or diffusers cannot load it; the message says which.
        SdwnError: the weights are not on this machine.
    """
    model = config.model
    if model.builtin in IN_PACKAGE:
        return packaged(model.builtin)
    kind = source(model)
    if kind == "hub":
        cached = snapshot(model.name, commit or model.revision)
        if cached is None:
            raise SdwnError(f"{model.name} is not in the hub's cache")
        folder = cached
    else:
        folder = builtin_path(str(model.builtin)) if kind == "builtin" else model_folder(model)
    require_whole(folder, config)
    return folder


def find_folder(config: RunConfig, commit: str | None = None) -> Path | None:
    """Return what :func:`weights_folder` does; None where the weights are not here, or not whole.

    Raises:
        IntegrityError: a model that comes with the package is not as it came.
    """
    try:
        return weights_folder(config, commit)
    except SdwnError:
        if config.model.builtin in IN_PACKAGE:
            raise
        return None


def find_weights(config: RunConfig) -> Weights | None:
    """Return a config's weights; None where they are not on this machine."""
    folder = find_folder(config)
    if folder is None:
        return None
    hub = source(config.model) == "hub"
    return Weights(folder, folder.name if hub else fingerprint(folder))


def model_folder(model: ModelConfig) -> Path:
    """Return the folder that a model is named after.

    Raises:
        UsageError: there is no pipeline in it.
    """
    folder = Path(model.name).expanduser()
    if not (folder / INDEX).is_file():
        # A clone's outer folder, or one of the hub's cache.
        inner = next((p for d in ("*", "snapshots/*") for p in folder.glob(f"{d}/{INDEX}")), None)
        remedy = (
            f"one lies in {inner.parent}: write model.name: {inner.parent}"
            if inner
            else "save one there with its save_pretrained"
        )
        raise UsageError(
            f"model {folder}: no pipeline in diffusers format, for {INDEX} is missing; {remedy}"
        )
    return folder


def snapshot(name: str, revision: str | None) -> Path | None:
    """Return a commit's folder in the hub's cache, whole or not; it is named after the commit."""
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        commit = (cached / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or "main"
    folder = cached / "snapshots" / commit
    return folder if folder.is_dir() else None


def components(folder: Path) -> dict[str, str]:
    """Return the parts that a pipeline's index names, and the class of each.

    Raises:
        IntegrityError: it has no index that can be read.
    """
    index = read_json(folder / INDEX)
    return {
        name: str(kind[-1])
        for name, kind in index.items()
        if isinstance(kind, list) and kind[:1] not in ([], [None]) and name[:1] != "_"
    }


def unneeded(config: RunConfig) -> set[str]:
    """Return the parts of a pipeline that a config does without."""
    return set() if config.generation.safety_checker else {"safety_checker"}


def files(folder: Path) -> list[str]:
    """List what loading a pipeline may read of its folder: no other format, no hidden file.

    Files beside the index count only where a part has no folder of its own.
    """
    flat = any(not (folder / part).is_dir() for part in components(folder))
    found = (
        Path(top, name).relative_to(folder)
        for top, _, inside in os.walk(folder, followlinks=True)
        for name in inside
        if not any(fnmatch(name, pattern) for pattern in _IGNORED)
    )
    return [
        name.as_posix()
        for name in sorted(found)
        if (flat or len(name.parts) > 1 or name.name == INDEX)
        and not any(part.startswith(".") for part in name.parts)
        # The hub's cache has links, which may lead nowhere.
        and (folder / name).is_file()
    ]


def needed(names: Iterable[str], parts: Collection[str], variant: str | None) -> list[str]:
    """Pick the files of a hub's model that diffusers loads, given which parts it has.

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
            those = [path for path in weights if variant and _is_variant(path.name, variant)]
            plain = ((path, _WEIGHTS.fullmatch(path.name)) for path in weights)
            those = those or [path for path, match in plain if match and not match["variant"]]
            own = [path for path in own if path.name == "config.json"] + those
        chosen.update(map(str, own))
    return [str(path) for path in paths if str(path) in chosen]


def _is_variant(name: str, variant: str) -> bool:
    return re.search(rf"\.{re.escape(variant)}[.-]", name) is not None


def require_whole(folder: Path, config: RunConfig) -> None:
    """Check a pipeline's folder against its own index: every part that a config needs is there.

    A task would find the same out after hours in the queue, and from a longer error.

    Raises:
        IntegrityError: what is missing, what is there instead, and the setting that takes it.
    """
    kinds, variant = components(folder), config.model.variant
    parts = [part for part in kinds if part not in unneeded(config)]
    names = needed(files(folder), parts, variant)
    faults = [fault for part in parts if (fault := _fault(folder / part, kinds[part], names))]
    if not parts:
        faults = [f"{INDEX} names no parts of a pipeline"]
    elif "safety_checker" in parts and "feature_extractor" not in kinds:
        faults.append(
            "it has a safety checker and no feature extractor, without which diffusers takes "
            "none; set generation.safety_checker: false"
        )
    elif not faults and variant and not any(_is_variant(name, variant) for name in names):
        faults = [f"no part has the variant {variant}; leave model.variant out"]
    if faults:
        more = f" (and {len(faults) - 1} more parts like it)" if len(faults) > 1 else ""
        raise IntegrityError(f"{folder} is not a whole model: {faults[0]}{more}")


def _fault(part: Path, kind: str, names: Collection[str]) -> str:
    """Return why diffusers would not load a part of a pipeline; "" if nothing is seen."""
    if not part.is_dir():
        # diffusers then reads what lies beside the index.
        beside = [file for file in part.parent.glob("*.json") if file.name != INDEX]
        return "" if beside else f"{INDEX} names the part {part.name}, and there is no such folder"
    own = [part.parent / name for name in names if name.startswith(f"{part.name}/")]
    if pointers := [file.name for file in own if is_pointer(file)]:
        return (
            f"{part.name}/{pointers[0]} is a pointer of git-lfs, not the file itself; get it with "
            "git lfs pull in that folder"
        )
    if _WEIGHTLESS.search(kind):
        return "" if own else f"{part.name} has no files"
    if not (part / "config.json").is_file():
        return f"{part.name}/config.json is missing"
    tensors = {file for file in own if file.suffix == ".safetensors"}
    if not tensors:
        return other_weights(part.name, [path.name for path in part.iterdir()], str(part.parent))
    for index in (file for file in own if ".index." in file.name):
        tensors |= {part / file for file in read_json(index).get("weight_map", {}).values()}
    return next((damage for file in sorted(tensors) if (damage := _damage(file))), "")


def _damage(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        # Reads the header alone, and compares it with the file's size.
        with safe_open(file, framework="numpy"):
            return ""
    except FileNotFoundError:
        return f"{file.parent.name}/{file.name} is missing, which the part's index lists"
    except (OSError, SafetensorError) as error:
        return f"{file.parent.name}/{file.name} is damaged or cut short ({error}); copy it anew"


def other_weights(part: str, names: Iterable[str], model: str) -> str:
    """Describe which weights a part has instead of those that diffusers looks for.

    >>> other_weights("unet", ["config.json", "diffusion_pytorch_model.fp16.safetensors"], "sd")
    'unet has its weights only in the variant fp16; set model.variant: fp16'
    """
    names = sorted(names)
    found = [match for name in names if (match := _WEIGHTS.fullmatch(name))]
    if variants := [m["variant"] for m in found if m["format"] == "safetensors" and m["variant"]]:
        variant = variants[0]
        return f"{part} has its weights only in the variant {variant}; set model.variant: {variant}"
    if pickles := [match for match in found if match["format"] != "safetensors"]:
        variant = pickles[0]["variant"]
        given = json.dumps(model) + (f', variant="{variant}"' if variant else "")
        return (
            f"{part} has its weights only as {pickles[0][0]}, which could run code and is not "
            "loaded; if you trust it, write safetensors into another folder: "
            f"{_conversion('DiffusionPipeline', f'from_pretrained({given})')}"
        )
    there = ", ".join(name for name in names if name != "config.json") or "no weights"
    return f"{part} has {there}, and diffusers looks for diffusion_pytorch_model.safetensors"


def is_pointer(file: Path) -> bool:
    """Return whether a file is only git's pointer to a large one, for want of git-lfs."""
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def size(file: Path) -> int | None:
    """Return a file's size in bytes; None where it is missing."""
    try:
        return file.stat().st_size
    except OSError:
        return None


def fingerprint(folder: Path) -> str:
    """Return the first 16 hex digits of a SHA-256 over a pipeline's safetensors files."""
    tensors = [name for name in files(folder) if name.endswith(".safetensors")]
    return combined({name: file_sha256(folder / name) for name in tensors})


def combined(digests: Mapping[str, str]) -> str:
    """Compute a fingerprint from the files' own SHA-256 by name, in the order of :func:`files`."""
    whole = hashlib.sha256()
    for name, digest in digests.items():
        if name.endswith(".safetensors"):
            whole.update(name.encode() + b"\0" + bytes.fromhex(digest))
    return whole.hexdigest()[:16]


def staged_if_wanted(folder: Path) -> Path:
    """Return a copy of a pipeline's folder on the node's own disk, where the profile wants one.

    :data:`STAGE_VARIABLE` says where; without it, or if copying fails, it is the folder itself.
    """
    wanted = os.environ.get(STAGE_VARIABLE, "")
    if not wanted:
        return folder
    target = Path(os.path.expandvars(wanted)).expanduser()
    if "$" in str(target) or not target.is_absolute():
        log.warning("weights are not staged: %s is no folder on this node", target)
        return folder
    try:
        return staged(folder, target)
    except (OSError, UsageError) as error:
        # Slower, but no reason to stop.
        log.warning("weights are not staged: %s", error)
        return folder


def staged(folder: Path, target: Path) -> Path:
    """Copy a pipeline's folder below ``target`` unless the same copy is there; return the copy.

    A node's disk is everybody's, so the copy is in a folder that no other user can put weights
    into. Processes of one node that start together copy once.

    Raises:
        UsageError: another user could have filled that folder.
    """
    names = files(folder)
    stats = ((name, (folder / name).stat()) for name in names)
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    state = hashlib.sha256(os.fsencode("\n".join([str(folder), *lines]))).hexdigest()[:16]
    copy = private_folder(target) / f"{folder.name}-{state}"
    with locked(copy.with_name(f".{copy.name}.lock")):
        # What tidies a node's disk may have removed files.
        if any(size(copy / name) != size(folder / name) for name in names):
            unfinished = copy.with_name(f".{copy.name}.unfinished")
            for old in (copy, unfinished):
                shutil.rmtree(old, ignore_errors=True)
            try:
                for name in names:
                    (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(folder / name, unfinished / name)
                unfinished.rename(copy)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return copy
