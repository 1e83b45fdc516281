"""A model's weights: where they are, whether they are whole, and getting them from the hub.

A model is built in, a folder in diffusers format, a single file that is converted to one in the
cache, or a name of the hub, whose weights are in its cache. Only fetching needs the network, and
only converting needs torch. What changes a model (a LoRA, a textual inversion, another VAE) is a
file or folder of its own; see :mod:`sdwn.models.added`.
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
from functools import cache
from glob import glob
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal
from uuid import uuid4

from rich.filesize import decimal

from sdwn.config import BUILTIN_MODELS, ModelConfig, Record, RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, first_line, shell
from sdwn.io import (
    file_sha256,
    locked,
    private_folder,
    read_json,
    refuse_planted,
    writable_cache,
    write_text,
)
from sdwn.models.builtin import builtin_folder
from sdwn.paths import STAGE_VARIABLE, cache_folder

log = logging.getLogger(__name__)

INDEX = "model_index.json"
# What git clones instead of a large file where git-lfs is not installed.
POINTER = b"version https://git-lfs"

# What people write for a model, and nothing can load.
_ADDRESS = re.compile(r"(?:\w+://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

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
        stat = path.stat()
        return cls(
            file=name, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=own_sha256(path)
        )

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
    """Weights that change a model, on this machine: files of a folder, or of a commit of the hub.

    ``setting`` is ``lora``, ``textual_inversion`` or ``vae``; ``folder`` None in the hub's cache.
    """

    setting: str
    name: str
    commit: str | None
    folder: str | None
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

    ``revision`` is the hub's commit, the folder's own :func:`fingerprint`, or of a single file the
    beginning of its SHA-256; ``+`` and a checksum follow where a LoRA, textual inversion or VAE
    changes the model: ``added``, in the order of ``ModelConfig.added``.
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
    if is_safetensors(path) and path.is_file():
        return "file"
    if address := _ADDRESS.match(name):
        reason = f"this is the address of a page; write {setting}.name: {address[1]}"
    elif name.lower().endswith(".gguf"):
        reason = (
            "a GGUF file holds a quantized denoiser alone and is not loaded; name the model that "
            "it was made of, and set generation.quantization to use less memory"
        )
    elif name.lower().endswith(_PICKLES) or (path.is_file() and not is_safetensors(path)):
        reason = (
            "this is a single file that could run code and is not loaded; if you trust it, write "
            f"safetensors with: {rewriting(name, setting)}; then name that"
        )
    elif name.startswith(("/", "~", ".")):
        return "elsewhere"
    elif is_safetensors(path):
        reason = "no such file"
    elif _HUB_NAME.fullmatch(name):
        return "hub"
    else:
        reason = (
            "no such folder, and no hub name either; expected a folder in diffusers format, a "
            f"name like CompVis/stable-diffusion-v1-4, or one of {', '.join(BUILTIN_MODELS)}"
        )
    raise UsageError(f"{setting} {name}: {reason}")


def rewriting(name: str, setting: str) -> str:
    """Return the command that writes a single file in a form that is loaded."""
    pipelines = {"model": "StableDiffusionPipeline", "model.vae": "AutoencoderKL"}
    if setting in pipelines:
        return _conversion(pipelines[setting], f"from_single_file({json.dumps(name)})")
    code = (
        "import torch, safetensors.torch as s; s.save_file(torch.load("
        f'{json.dumps(name)}, weights_only=True), "NEW.safetensors")'
    )
    return shell("python", "-c", code)


def is_safetensors(path: Path) -> bool:
    """Return whether a file's name says that it holds weights alone."""
    return path.suffix.lower() == ".safetensors"


def _conversion(kind: str, load: str) -> str:
    code = f'from diffusers import {kind} as P; P.{load}.save_pretrained("FOLDER")'
    return shell("python", "-c", code)


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit, which never changes, and no branch or tag."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def own_revision(revision: str | None) -> str | None:
    """Return a model's own revision, without the checksum of what changes it."""
    match = re.fullmatch(r"([0-9a-f]{16,64})\+[0-9a-f]{16}", revision or "")
    return match[1] if match else revision


def weights_folder(config: RunConfig, commit: str | None = None) -> Path:
    """Return the folder of a config's weights; of the hub's the one in its cache, at ``commit``.

    Raises:
        UsageError: the model's name is no folder here, and no name that the hub could know.
        IntegrityError: a part is missing, or diffusers cannot load it; the message says which.
        SdwnError: the weights are not on this machine.
    """
    model = config.model
    if model.builtin is not None:
        return builtin_folder(model.builtin)
    if (where := source(model)) == "file":
        folder = converted_folder(model)
        if not folder.is_dir():
            raise SdwnError(
                f"{model.name} is not converted to diffusers format yet; do so with: sdwn prefetch"
            )
    elif where != "hub":
        folder = Path(model.name).expanduser()
        if not (folder / INDEX).is_file():
            there = f"{INDEX} is missing there" if folder.is_dir() else "no such folder"
            raise UsageError(
                f"model {folder}: {there}; name a folder that has a pipeline in diffusers format, "
                "as save_pretrained writes it"
            )
    elif (cached := snapshot(model.name, commit or model.revision)) is not None:
        folder = cached
    else:
        raise SdwnError(f"{model.name} is not in the hub's cache")
    require_whole(folder, config)
    return folder


def find_folder(config: RunConfig, commit: str | None = None) -> Path | None:
    """Return what :func:`weights_folder` does; None where the weights are not here, or not whole.

    Only a model that comes with the package raises an error, where it is not as it came.
    """
    if config.model.builtin is not None:
        return builtin_folder(config.model.builtin) if config.model.builtin != "noise" else None
    try:
        return weights_folder(config, commit)
    except SdwnError:
        return None


def convert_once(model: ModelConfig) -> None:
    """Convert a single file, whole or not at all; of processes that start together, one does."""
    folder = converted_folder(model)
    if folder.is_dir():
        return
    from sdwn.models.single_file import convert  # torch and diffusers

    with locked(writable_cache() / "models.lock"):
        if folder.is_dir():
            return
        unfinished = folder.with_name(f".{folder.name}.{uuid4().hex}")
        unfinished.mkdir(parents=True)
        try:
            convert(model, unfinished)
            unfinished.rename(folder)
        except OSError:
            # On a file system without locks another process may have made the same one.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def found_model(config: RunConfig, commit: str | None = None) -> Weights:
    """Return a config's model on this machine; raises what :func:`weights_folder` does."""
    folder, where = weights_folder(config, commit), source(config.model)
    if where == "hub":
        return Weights(folder, folder.name)
    if where == "file":
        return Weights(folder, own_sha256(Path(config.model.name).expanduser())[:16])
    return Weights(folder, fingerprint(folder))


def converted_folder(model: ModelConfig) -> Path:
    """Return the folder in the cache that a single file is, or will be, converted to.

    Its name has the file's SHA-256, and stands for the settings that are put to it. One that any
    user could have put there is an IntegrityError.
    """
    file = Path(model.name).expanduser()
    state, given = [model.config or ""], Path(model.config or "").expanduser()
    if model.config and given.is_dir():
        stats = {name: (given / name).stat() for name in files(given)}
        state = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()]
    key = hashlib.sha256("\n".join([own_sha256(file), *state]).encode()).hexdigest()[:8]
    folder = cache_folder() / "models" / f"{file.stem}-{own_sha256(file)[:16]}-{key}"
    if folder.exists():
        refuse_planted(folder)
    return folder


def own_sha256(file: Path) -> str:
    """Return a file's SHA-256; an unchanged file is read once in a process."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(file: Path, *_: int) -> str:
    return file_sha256(file)


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

    ``kinds`` are the parts of the pipeline, and the class of each; ``where`` is for messages. A
    part that is missing is an IntegrityError, which says what is there instead.
    """
    variant, chosen = config.model.variant, [INDEX]
    for part, kind in kinds.items():
        if part == "safety_checker" and not config.generation.safety_checker:
            continue
        own = [name for name in names if name.startswith(f"{part}/")]
        fault = "" if own else f"{INDEX} names the part {part}, and there are no files of it"
        if own and not _WEIGHTLESS.search(kind):
            weights = [name for name in own if ".safetensors" in name]
            given = [name for name in weights if variant and _is_variant(name, variant)]
            plain = [name for name in weights if _is_variant(name, None)]
            if f"{part}/config.json" not in own:
                fault = f"{part}/config.json is missing"
            elif not (given or plain):
                fault = _other_weights(part, own, config.model.name)
            own = [f"{part}/config.json", *(given or plain)]
        if fault:
            raise IntegrityError(f"{where} is not a whole model: {fault}")
        chosen += own
    if variant and not any(_is_variant(name, variant) for name in chosen):
        raise IntegrityError(f"{where}: no part has the variant {variant}; leave model.variant out")
    return chosen


def needed_here(folder: Path, config: RunConfig, ignored: Collection[str] = _IGNORED) -> list[str]:
    """Pick the files of a folder that diffusers loads for a config, as :func:`needed`."""
    kinds = components(read_json(folder / INDEX))
    return needed(folder, files(folder, ignored), kinds, config)


def _is_variant(name: str, variant: str | None) -> bool:
    """Return whether a file of weights is of a variant; of none, whether it is of no variant."""
    base = name.rpartition("/")[2]
    if variant:
        return re.search(rf"\.{re.escape(variant)}[.-]", base) is not None
    match = _WEIGHTS.fullmatch(base)
    return match is not None and not match["variant"]


def _other_weights(part: str, names: Iterable[str], model: str) -> str:
    """Describe which weights a part has instead of those that diffusers looks for."""
    own = sorted(name.rpartition("/")[2] for name in names)
    for match in filter(None, map(_WEIGHTS.fullmatch, own)):
        variant = match["variant"]
        if match["format"] == "safetensors":
            return (
                f"{part} has its weights only in the variant {variant}; set model.variant: "
                f"{variant}"
            )
        given = json.dumps(model) + (f', variant="{variant}"' if variant else "")
        return (
            f"{part} has its weights only as {match[0]}, which could run code and is not loaded; "
            "if you trust it, write safetensors into another folder: "
            f"{_conversion('DiffusionPipeline', f'from_pretrained({given})')}"
        )
    return f"{part} has no diffusion_pytorch_model.safetensors or model.safetensors"


def require_whole(folder: Path, config: RunConfig) -> None:
    """Check a pipeline's folder against its own index: every part that a config needs is whole."""
    for name in needed_here(folder, config, ()):
        if fault := file_fault(folder / name):
            raise IntegrityError(f"{folder} is not a whole model: {name} {fault}")


def file_fault(file: Path) -> str:
    """Return why a file of weights or settings is not whole, "" where it is."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            return "is a pointer of git-lfs, not the file itself; get it with: git lfs pull"
    if file.suffix == ".safetensors":
        try:
            # Reads the header alone, and compares it with the file's size.
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            return f"is damaged or cut short ({error}); copy it anew"
    elif ".safetensors.index." in file.name:
        listed = read_json(file).get("weight_map", {}).values()
        if absent := [one for one in sorted(listed) if not (file.parent / one).is_file()]:
            return f"lists {absent[0]}, which is missing"
    return ""


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor in a safetensors file, of which the header alone is read."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


def fetch_model(config: RunConfig, revision: str | None, folder: Path | None) -> Weights:
    """Download a config's model, whole, into the hub's cache or a folder of its own.

    ``revision`` replaces the config's. Raises what :func:`download` and :func:`require_whole` do.
    """
    name, wanted = config.model.name, revision or config.model.revision

    def pick(names: Collection[str], commit: str) -> list[str]:
        from huggingface_hub import hf_hub_download

        if INDEX not in names:
            raise SdwnError(
                f"model {name}: no pipeline in diffusers format on the hub, for {INDEX} is "
                "missing; look there for the same model in diffusers format"
            )
        with TemporaryDirectory() as cache:
            index = hf_hub_download(name, INDEX, revision=commit, cache_dir=cache)
            kinds = components(read_json(Path(index)))
        return needed(f"model {name} on the hub", names, kinds, config)

    got, commit = download(f"model {name}", name, wanted, pick, folder)
    require_whole(got, config)
    return Weights(got, commit)


def download(
    what: str,
    name: str,
    wanted: str | None,
    pick: Callable[[Collection[str], str], list[str]],
    folder: Path | None = None,
) -> tuple[Path, str]:
    """Download files of a repository into the hub's cache, or a folder of their own.

    What is there already is not downloaded again. Where the hub does not answer, what is in its
    cache is used as it is.

    Args:
        what: names the repository in messages.
        name: the repository.
        wanted: a branch, tag or commit; None is its main branch.
        pick: returns those of its files that are wanted; it also gets the commit.
        folder: another place than the hub's cache.

    Returns:
        The folder that the files are in, and the commit.

    Raises:
        SdwnError: the hub does not give it, or there is no room for it.
        UsageError: something else is in the folder.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        info = HfApi().model_info(name, revision=wanted, files_metadata=True)
        commit = str(info.sha)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        names = pick(sizes, commit)
        if folder is not None:
            # A folder that has another commit, or anything else, stays as it is.
            mark, claim = folder / _MARK, {"model": name, "commit": commit}
            there = read_json(mark) if mark.is_file() else {}
            if there != claim and folder.exists() and any(folder.iterdir()):
                raise UsageError(
                    f"--folder {folder}: expected nothing there, or {name} at commit {commit}, "
                    f"found {there.get('commit', 'something else')}; choose another folder, or "
                    "remove that one"
                )
            write_text(mark, json.dumps(claim) + "\n")
        target = folder or snapshot(name, commit) or Path(constants.HF_HUB_CACHE)
        missing = sum(sizes[file] for file in names if not (target / file).exists())
        existing = next(path for path in (target, *target.absolute().parents) if path.is_dir())
        if (free := shutil.disk_usage(existing).free) < missing:
            raise SdwnError(
                f"{existing}: the weights need {decimal(missing)} more, and {decimal(free)} are "
                "free; free some, set HF_HOME to a folder on a larger disk, or fetch with --folder"
            )
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


def fingerprint(folder: Path) -> str:
    """Return the first 16 hex digits of a SHA-256 over a pipeline's safetensors files."""
    whole = hashlib.sha256()
    for name in files(folder):
        if name.endswith(".safetensors"):
            whole.update(name.encode() + b"\0" + bytes.fromhex(own_sha256(folder / name)))
    return whole.hexdigest()[:16]


def staged_if_wanted(folder: Path) -> Path:
    """Return a copy of a pipeline's folder on the node's own disk, where the profile wants one.

    :data:`STAGE_VARIABLE` says where. Without it, or if copying fails, it is the folder itself.
    """
    if not (wanted := os.environ.get(STAGE_VARIABLE)):
        return folder
    target = Path(os.path.expandvars(wanted)).expanduser()
    try:
        if "$" in str(target) or not target.is_absolute():
            raise UsageError(f"{target} is no folder on this node")
        return staged(folder, target)
    except (OSError, UsageError) as error:
        # Slower, but no reason to stop.
        log.warning("weights are not staged: %s", error)
        return folder


def staged(folder: Path, target: Path) -> Path:
    """Copy a pipeline's folder below ``target`` unless the same copy is there; return the copy.

    No other user can put weights there. Processes that start together on a node copy once.
    """
    stats = {name: (folder / name).stat() for name in files(folder)}
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()]
    state = hashlib.sha256(os.fsencode("\n".join([str(folder), *lines]))).hexdigest()[:16]
    copy = private_folder(target) / f"{folder.name}-{state}"
    with locked(copy.with_name(f".{copy.name}.lock")):
        # A copy may have been cut short, and what tidies a node's disk may have removed files.
        copied = {name: (copy / name).stat().st_size for name in files(copy)}
        if copied != {name: stat.st_size for name, stat in stats.items()}:
            shutil.rmtree(copy, ignore_errors=True)
            try:
                for name in stats:
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(folder / name, copy / name)
            except OSError:
                shutil.rmtree(copy, ignore_errors=True)
                raise
    return copy
