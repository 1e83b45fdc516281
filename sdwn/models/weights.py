"""A model's weights: where they are, whether they are whole, and getting them from the hub.

A model is built in, a folder in diffusers format, a single file that is converted to one in the
cache, or a name of the hub. A LoRA, a textual inversion or another VAE that changes it is a file or
folder of its own. Only fetching needs the network, and only converting needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from glob import glob
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal
from uuid import uuid4

from sdwn import io
from sdwn.config import BUILTIN_MODELS, AddedWeights, ModelConfig, Record, RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, first_line, shell
from sdwn.models.builtin import builtin_folder
from sdwn.paths import STAGE_VARIABLE, cache_folder

log = logging.getLogger(__name__)

INDEX = "model_index.json"
SAFETENSORS = ".safetensors"
# What git clones instead of a large file where git-lfs is not installed.
POINTER = b"version https://git-lfs"

# What people write for a model, and nothing can load.
_ADDRESS = re.compile(r"(?:\w+://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

# The same weights in other formats, and what people read.
_IGNORED = "*.bin *.ckpt *.pt *.pth *.msgpack *.h5 *.onnx* *.md *.png *.jpg".split()
# A part's weights, whole, one of several files, or the index of these; diffusers looks for
# safetensors, of no variant unless it is asked for one.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?"
    r"\.(?P<format>safetensors|bin|ckpt|pt|msgpack)(?:\.index\.json)?"
)
# Classes of parts that are settings and vocabularies, without weights.
_WEIGHTLESS = re.compile(r"Tokenizer|Process|Scheduler|Extractor")
# What diffusers' own scripts call what changes a model.
_USUAL = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
# In a plain folder of the hub's weights: which they are.
_MARK = ".sdwn-weights.json"


class LockedFile(Record):
    """A file of the weights; what a folder holds may change, so its content counts too."""

    file: str
    bytes: int
    mtime_ns: int | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path, name: str) -> LockedFile:
        """Return a file's record under a name."""
        stat, digest = path.stat(), own_sha256(path)
        return cls(file=name, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=digest)

    def difference(self, path: Path) -> str:
        """Return how a file differs, "" if not; one of the same time and size is not read."""
        if not path.is_file():
            return "no such file"
        stat = path.stat()
        if self.sha256 is None or (stat.st_size, stat.st_mtime_ns) == (self.bytes, self.mtime_ns):
            return "" if stat.st_size == self.bytes else f"{stat.st_size} of {self.bytes} bytes"
        found = own_sha256(path)
        return "" if found == self.sha256 else f"expected SHA-256 {self.sha256}, found {found}"

    def require(self, path: Path, remedy: str) -> None:
        """Refuse a file that differs."""
        if fault := self.difference(path):
            raise IntegrityError(
                f"{path}: changed or missing since the run was locked to it ({fault}); {remedy}"
            )


class FoundWeights(Record):
    """Weights that change a model, here: files of a folder, or of a commit of the hub."""

    setting: str  # lora, textual_inversion or vae
    name: str
    commit: str | None
    folder: str | None  # None: the hub's cache
    files: list[LockedFile]

    def __str__(self) -> str:
        return f"{self.setting} {self.name}" + f" at {self.commit}" * bool(self.commit)

    @property
    def root(self) -> Path:
        """The folder that the files are in."""
        return Path(self.folder or snapshot(self.name, self.commit) or "the hub's cache")

    @property
    def path(self) -> Path:
        """The file that is loaded, or a VAE's folder."""
        first = self.root / self.files[0].file
        return first.parent if self.setting == "vae" else first


@dataclass(frozen=True, slots=True)
class Weights:
    """A pipeline's folder in diffusers format, and which weights are in it.

    ``revision`` is the hub's commit, the folder's `fingerprint`, or the beginning of a file's
    SHA-256; then ``+`` and a checksum of what is ``added``, in the order of ``ModelConfig.added``.
    """

    folder: Path
    revision: str
    added: tuple[FoundWeights, ...] = ()


# Where a model is: ``elsewhere`` is a path of another machine, which this one lacks.
Source = Literal["builtin", "folder", "file", "hub", "elsewhere"]


def source(model: ModelConfig) -> Source:
    """Return where a model comes from; a name that nothing can load is a UsageError."""
    return "builtin" if model.builtin is not None else locate(model.name)


def locate(name: str, setting: str = "model") -> Source:
    """Return where the weights of a setting are; a name that nothing can load is a UsageError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return "folder"
    safetensors, is_file = name.lower().endswith(SAFETENSORS), path.is_file()
    if safetensors and is_file:
        return "file"
    if address := _ADDRESS.match(name):
        reason = f"this is the address of a page; write {setting}.name: {address[1]}"
    elif name.lower().endswith(".gguf"):
        reason = (
            "a GGUF file holds a quantized denoiser alone and is not loaded; name the model that "
            "it was made of, and set generation.quantization to use less memory"
        )
    elif name.lower().endswith(_PICKLES) or is_file:
        code = (
            f"import torch, safetensors.torch as s; d = torch.load({json.dumps(name)}, "
            'weights_only=True); s.save_file(d.get("state_dict", d), "NEW.safetensors")'
        )
        reason = (
            "this is a single file that could run code and is not loaded; if you trust it, write "
            f"safetensors with: {shell('python', '-c', code)}; then name that"
        )
    elif name.startswith(("/", "~", ".")):
        return "elsewhere"
    elif safetensors:
        reason = "no such file"
    elif _HUB_NAME.fullmatch(name):
        return "hub"
    else:
        reason = (
            "no such folder, and no hub name either; expected a folder in diffusers format, a "
            f"name like CompVis/stable-diffusion-v1-4, or one of {', '.join(BUILTIN_MODELS)}"
        )
    raise UsageError(f"{setting} {name}: {reason}")


def hub_commit(revision: str | None) -> str | None:
    """Return the commit of the hub in a `Weights.revision`; None where it has none."""
    match = re.match(r"[0-9a-f]{40}(?=\+|$)", revision or "")
    return match[0] if match else None


def weights_folder(config: RunConfig, commit: str | None = None) -> Path:
    """Return the folder of a config's whole weights; of the hub's the one of ``commit``."""
    model, where = config.model, source(config.model)
    if model.builtin is not None:
        return builtin_folder(model.builtin)
    if where == "hub":
        if (cached := snapshot(model.name, commit or model.revision)) is None:
            raise SdwnError(f"{model.name} is not in the hub's cache")
        folder = cached
    elif where == "file":
        folder = converted_folder(model)
        if not folder.is_dir():
            raise SdwnError(
                f"{model.name} is not converted to diffusers format yet; do so with: sdwn prefetch"
            )
    else:
        folder = Path(model.name).expanduser()
        if not (folder / INDEX).is_file():
            raise UsageError(
                f"model {folder}: no such folder, or {INDEX} is missing there; name a folder that "
                "has a pipeline in diffusers format, as save_pretrained writes it"
            )
    require_whole(folder, config)
    return folder


def find_folder(config: RunConfig) -> Path | None:
    """Return the folder of a config's weights; None where they are not here, or not whole."""
    try:
        return weights_folder(config)
    except SdwnError:
        if config.model.builtin not in (None, "noise"):
            raise
        return None


def own_sha256(file: Path) -> str:
    """Return a file's SHA-256; an unchanged file is read once in a process."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(file: Path, *_: int) -> str:
    return io.file_sha256(file)


def fingerprint(folder: Path) -> str:
    """Return the first 16 hex digits of a SHA-256 over a pipeline's safetensors files."""
    whole = hashlib.sha256()
    for name in files(folder):
        if name.endswith(".safetensors"):
            whole.update(name.encode() + b"\0" + bytes.fromhex(own_sha256(folder / name)))
    return whole.hexdigest()[:16]


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


def components(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts that a pipeline's index names, and the class of each."""
    return {
        name: str(kind[-1])
        for name, kind in index.items()
        if isinstance(kind, list) and kind[:1] not in ([], [None]) and name[:1] != "_"
    }


def files(folder: Path, ignored: Collection[str] = _IGNORED) -> list[str]:
    """List what loading a pipeline may read of its folder: no other format, no hidden file."""
    # Unlike Path.rglob, it looks into folders that are links.
    found = glob("*/**/*", root_dir=folder, recursive=True)  # noqa: PTH207
    return [
        str(path)
        for path in sorted(map(PurePosixPath, [INDEX, *found]))
        # The hub's cache has links, which may lead nowhere.
        if (folder / path).is_file() and not any(fnmatch(path.name, kind) for kind in ignored)
    ]


def needed(
    where: object, names: Collection[str], kinds: Mapping[str, str], config: RunConfig
) -> list[str]:
    """Pick the files that diffusers loads for a config, of those in a folder or on the hub.

    ``kinds`` has the class of each part of the pipeline, ``where`` is for messages. A part that is
    missing is an IntegrityError, which says what is there instead.
    """
    variant, chosen = config.model.variant, [INDEX]
    for part, kind in kinds.items():
        if part == "safety_checker" and not config.generation.safety_checker:
            continue
        own = [name for name in names if name.startswith(f"{part}/")]
        fault = "" if own else f"{INDEX} names the part {part}, and there are no files of it"
        if own and not _WEIGHTLESS.search(kind):
            weights = [name for name in own if SAFETENSORS in name]
            given = [name for name in weights if variant and _is_variant(name, variant)]
            given = given or [name for name in weights if _is_variant(name, None)]
            if f"{part}/config.json" not in own:
                fault = f"{part}/config.json is missing"
            elif not given:
                fault = _other_weights(part, own, config.model.name)
            own = [f"{part}/config.json", *given]
        if fault:
            raise IntegrityError(f"{where} is not a whole model: {fault}")
        chosen += own
    if variant and not any(_is_variant(name, variant) for name in chosen):
        raise IntegrityError(f"{where}: no part has the variant {variant}; leave model.variant out")
    return chosen


def needed_here(folder: Path, config: RunConfig) -> list[str]:
    """Pick the files of a folder that diffusers loads for a config, as :func:`needed`."""
    return needed(folder, files(folder, ()), components(io.read_json(folder / INDEX)), config)


def _is_variant(name: str, variant: str | None) -> bool:
    """Return whether a file of weights is of a variant; of none, whether it is of no variant."""
    if variant:
        return f".{variant}." in name or f".{variant}-" in name
    match = _WEIGHTS.fullmatch(name.rpartition("/")[2])
    return match is not None and not match["variant"]


def _other_weights(part: str, names: Iterable[str], model: str) -> str:
    """Describe which weights a part has instead of those that diffusers looks for."""
    base = sorted(name.rpartition("/")[2] for name in names)
    found = next(filter(None, map(_WEIGHTS.fullmatch, base)), None)
    if found is None:
        return f"{part} has no diffusion_pytorch_model.safetensors or model.safetensors"
    variant, given = found["variant"], json.dumps(model)
    if found["format"] == "safetensors":
        return f"{part} has its weights only in the variant {variant}; set model.variant: {variant}"
    if variant:
        given += f', variant="{variant}"'
    code = f"from diffusers import DiffusionPipeline as P; P.from_pretrained({given})"
    return (
        f"{part} has its weights only as {found[0]}, which could run code and is not loaded; if "
        "you trust it, write safetensors into another folder: "
        + shell("python", "-c", f'{code}.save_pretrained("FOLDER")')
    )


def require_whole(folder: Path, config: RunConfig) -> None:
    """Check a pipeline's folder against its own index: every part that a config needs is whole."""
    for name in needed_here(folder, config):
        if fault := file_fault(folder / name):
            raise IntegrityError(f"{folder} is not a whole model: {name} {fault}")


def file_fault(file: Path) -> str:
    """Return why a file of weights or settings is not whole, "" where it is."""
    from safetensors import SafetensorError

    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            return "is a pointer of git-lfs, not the file itself; get it with: git lfs pull"
    if file.suffix == SAFETENSORS:
        try:
            # The header, which is compared with the file's size.
            tensor_shapes(file)
        except (OSError, SafetensorError) as error:
            return f"is damaged or cut short ({error}); copy it anew"
    elif ".safetensors.index." in file.name:
        listed = io.read_json(file).get("weight_map", {}).values()
        if absent := [one for one in sorted(listed) if not (file.parent / one).is_file()]:
            return f"lists {absent[0]}, which is missing"
    return ""


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor in a safetensors file, of which the header alone is read."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


# Getting them


def found_weights(config: RunConfig, commit: str | None = None) -> Weights:
    """Return a config's weights, of the hub's those of `commit`, and what changes them."""
    folder = weights_folder(config, commit)
    return _weights(config, folder, None, [find_added(*one) for one in config.model.added])


def fetch_weights(
    config: RunConfig,
    commit: str | None = None,
    commits: Iterable[str | None] = (),
    folder: Path | None = None,
) -> Weights:
    """Get a config's weights and what changes them: download them, or convert a single file.

    ``commit`` and ``commits`` replace the config's, ``folder`` the hub's cache.
    """
    model, where = config.model, source(config.model)

    def pick(names: Collection[str], commit: str) -> list[str]:
        from huggingface_hub import hf_hub_download

        if INDEX not in names:
            raise SdwnError(
                f"model {model.name}: no pipeline in diffusers format on the hub, for {INDEX} is "
                "missing; look there for the same model in diffusers format"
            )
        with TemporaryDirectory() as cache:
            index = hf_hub_download(model.name, INDEX, revision=commit, cache_dir=cache)
            kinds = components(io.read_json(Path(index)))
        return needed(f"model {model.name} on the hub", names, kinds, config)

    if where == "hub":
        wanted = commit or model.revision
        got, commit = download(f"model {model.name}", model.name, wanted, pick, folder)
        require_whole(got, config)
    elif folder is not None:
        raise UsageError(f"--folder is for models of the hub; {model.name} needs no fetching")
    else:
        if where == "file":
            convert_once(model)
        got = weights_folder(config)
    # Not among what loading the pipeline may read.
    below = folder and folder / ".added"
    added = [
        find_added(setting, chosen, at, True, below)
        for (setting, chosen), at in zip_longest(model.added, commits)
    ]
    return _weights(config, got, commit, added)


def obtain_weights(config: RunConfig) -> Weights:
    """Find a config's weights and what changes them, or get them."""
    try:
        return found_weights(config)
    except UsageError:
        raise
    except SdwnError:
        return fetch_weights(config)


def _weights(
    config: RunConfig, folder: Path, commit: str | None, added: list[FoundWeights]
) -> Weights:
    where = source(config.model)
    if where == "hub":
        revision = commit or folder.name
    elif where == "file":
        revision = own_sha256(Path(config.model.name).expanduser())[:16]
    else:
        revision = fingerprint(folder)
    if added:
        lines = "\n".join(f"{one.setting} {file.sha256}" for one in added for file in one.files)
        revision += f"+{hashlib.sha256(lines.encode()).hexdigest()[:16]}"
    return Weights(folder, revision, tuple(added))


def find_added(
    setting: str,
    chosen: AddedWeights,
    commit: str | None = None,
    fetch: bool = False,
    below: Path | None = None,
) -> FoundWeights:
    """Find what changes a model, on this machine; `fetch` downloads what is on the hub.

    `commit` is wanted instead of the config's, and goes into a folder `below` another, instead of
    the hub's cache.
    """
    label, folder = f"model.{setting} {chosen.name}", Path(chosen.name).expanduser()
    pick = partial(_chosen_files, label, setting, chosen)
    where, wanted, commit = locate(chosen.name, f"model.{setting}"), commit or chosen.revision, None
    if where == "elsewhere":
        raise SdwnError(f"{label}: no such file or folder on this machine")
    if where == "hub" and fetch:
        own = below and below / f"{setting}-{chosen.name.replace('/', '--')}"
        folder, commit = download(label, chosen.name, wanted, pick, own)
    elif where == "hub":
        if (cached := snapshot(chosen.name, wanted)) is None:
            raise SdwnError(f"{label} is not in the hub's cache; get it with: sdwn prefetch")
        folder, commit = cached, cached.name
    if where == "file":
        folder, there = folder.parent, [folder.name]
    else:
        there = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
    names = pick(there)
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
        raise UsageError(f"{label}: expected {' and '.join(wanted)}, or both at the folder's top")
    listed = sorted(name for name in names if name.lower().endswith(SAFETENSORS))
    fitting = [name for name in listed if name in ((chosen.file,) if chosen.file else _USUAL)]
    fitting = fitting or ([] if chosen.file else listed)
    if len(fitting) != 1:
        raise UsageError(
            f"{label}: expected {chosen.file or 'one safetensors file'}, found "
            + (", ".join(listed) or "none")
            + "; name one with file" * bool(listed)
        )
    return fitting


def is_prefetched(model: ModelConfig) -> bool:
    """Return whether ``sdwn prefetch`` gets something of a model, from the hub or by converting."""
    names = (locate(one.name, f"model.{setting}") for setting, one in model.added)
    return source(model) in ("hub", "file") or "hub" in names


def download(
    what: str,
    name: str,
    wanted: str | None,
    pick: Callable[[Collection[str], str], list[str]],
    folder: Path | None = None,
) -> tuple[Path, str]:
    """Download files of a repository into the hub's cache, or a ``folder`` of their own.

    Where the hub does not answer, what is in its cache is used as it is. ``what`` names the
    repository in messages, ``wanted`` is a branch, tag or commit, and ``pick`` gets the names of
    all files, and the commit. Returns the folder that the files are in, and the commit.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, revision=wanted)
        commit = str(info.sha)
        names = pick([file.rfilename for file in info.siblings or ()], commit)
        if folder is not None:
            # A folder that has another commit, or anything else, stays as it is.
            mark, claim = folder / _MARK, {"model": name, "commit": commit}
            there = io.read_json(mark) if mark.is_file() else {}
            if there != claim and folder.exists() and any(folder.iterdir()):
                raise UsageError(
                    f"--folder {folder}: expected nothing there, or {name} at commit {commit}; "
                    "choose another folder, or remove that one"
                )
            io.write_text(mark, json.dumps(claim) + "\n")
        # Into the cache by its branch, so that this knows which commit that is.
        given = wanted if folder is None else commit
        got = snapshot_download(name, revision=given, allow_patterns=names, local_dir=folder)
    except SdwnError:
        raise
    except Exception as error:  # each of the HTTP libraries that hub's has used has its own
        fault = f"{what}: no folder of this name, and the hub did not give it: {first_line(error)}"
        if folder is None and (found := snapshot(name, wanted)) is not None:
            log.warning("%s; using what its cache has", fault)
            return found, found.name
        raise SdwnError(
            f"{fault}; fetch it where there is a network, with: sdwn prefetch (after hf auth login "
            "where its terms ask for that), or name a local folder"
        ) from error
    return folder or Path(got), commit


# Single files


def converted_folder(model: ModelConfig) -> Path:
    """Return the folder in the cache that a single file, with its settings, is converted to."""
    file, given = Path(model.name).expanduser(), Path(model.config or "").expanduser()
    state = _state(given) if model.config and given.is_dir() else [model.config or ""]
    key = hashlib.sha256("\n".join([own_sha256(file), *state]).encode()).hexdigest()[:8]
    folder = cache_folder() / "models" / f"{file.stem}-{own_sha256(file)[:16]}-{key}"
    if folder.exists():
        io.refuse_planted(folder)
    return folder


def _state(folder: Path) -> list[str]:
    """Return a line for each file of a pipeline, which changes with it."""
    stats = {name: (folder / name).stat() for name in files(folder)}
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()]


def convert_once(model: ModelConfig) -> None:
    """Convert a single file, whole or not at all; of processes that start together, one does."""
    folder = converted_folder(model)
    if folder.is_dir():
        return
    with io.locked(io.writable_cache() / "models.lock"):
        if folder.is_dir():
            return
        unfinished = folder.with_name(f".{folder.name}.{uuid4().hex}")
        unfinished.mkdir(parents=True)
        try:
            convert(model, unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def convert(model: ModelConfig, folder: Path) -> None:
    """Write a model's single file in diffusers format, its weights in the type that they have."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        load_single_file_checkpoint,
    )
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    file, name = Path(model.name).expanduser(), model.config
    settings = Path(name or "").expanduser()
    with safe_open(file, framework="pt") as tensors:
        types = {tensors.get_slice(one).get_dtype() for one in tensors.keys()}  # noqa: SIM118
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    floats = types & {*halves, "F32"}
    dtype = halves.get(floats.pop(), torch.float32) if len(floats) == 1 else torch.float32
    diffusers.utils.logging.disable_progress_bar()
    try:
        if not name:
            checkpoint = load_single_file_checkpoint(str(file))
            name = str(fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"])
        if not (model.config and settings.is_dir()):
            # Settings and vocabularies, without weights.
            kinds = ["*.json", "*.txt", "*.model"]
            settings = Path(snapshot_download(name, allow_patterns=kinds))
        kind = getattr(diffusers, str(io.read_json(settings / INDEX).get("_class_name")))
        loaded = kind.from_single_file(str(file), config=str(settings), dtype=dtype)
    except Exception as error:  # of many kinds, by the file, and by hub's HTTP library
        raise SdwnError(
            f"model {file}: diffusers cannot convert it with the settings of {name}: "
            f"{first_line(error)}; run sdwn prefetch where there is a network, or set "
            "model.config to a folder in diffusers format of the same architecture"
        ) from error
    loaded.save_pretrained(folder)


def staged_if_wanted(folder: Path) -> Path:
    """Return a copy of a pipeline's folder on the node's own disk, where the profile wants one.

    If copying fails, it is the folder itself. No other user can put weights there; processes that
    start together on a node copy once.
    """
    if not (wanted := os.environ.get(STAGE_VARIABLE)):
        return folder
    target = Path(os.path.expandvars(wanted)).expanduser()
    try:
        if "$" in str(target) or not target.is_absolute():
            raise UsageError(f"{target} is no folder on this node")
        state = "\n".join([str(folder), *_state(folder)])
        name = f"{folder.name}-{hashlib.sha256(os.fsencode(state)).hexdigest()[:16]}"
        copy = io.private_folder(target) / name
        with io.locked(copy.with_name(f".{name}.lock")):
            sizes, copied = (
                {name: (top / name).stat().st_size for name in files(top)} for top in (folder, copy)
            )
            # A copy may have been cut short, and what tidies a node's disk may have removed files.
            if copied != sizes:
                shutil.rmtree(copy, ignore_errors=True)
                for name in sizes:
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(folder / name, copy / name)
    except (OSError, UsageError) as error:
        # Slower, but no reason to stop.
        log.warning("weights are not staged: %s", error)
        return folder
    return copy
