"""The hub: getting a model's weights from there, as much of them as loading takes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.filesize import decimal

from sdwn.config import RunConfig
from sdwn.errors import SdwnError, UsageError, first_line
from sdwn.io import is_own_folder, read_json, write_text
from sdwn.models.weights import (
    INDEX,
    Weights,
    components,
    files,
    instead,
    locate,
    needed,
    require_whole,
    snapshot,
    unneeded,
)

log = logging.getLogger(__name__)

# In a folder that is being filled: the hub's own cache, from which a killed download goes on.
_UNFINISHED = ".sdwn-unfinished"
# In a folder that is filled: which weights it has.
_MARK = ".sdwn-weights.json"


def fetch_weights(
    config: RunConfig, revision: str | None = None, folder: Path | None = None
) -> Weights:
    """Get a config's model from the hub, whole, into the hub's cache or a folder of its own.

    What is there already is not fetched again. ``revision`` is taken in place of the config's.
    Where the hub does not answer, weights that are there are taken as they are.

    Raises:
        SdwnError: the hub does not give it, or there is no room for it.
        UsageError: something else is in the folder.
    """
    wanted = revision or config.model.revision
    try:
        commit, sizes = _listing(config, wanted)
    except SdwnError:
        raise
    except Exception as error:  # each of the HTTP libraries that hub's has used has its own
        if (found := locate(config, wanted)) is None or folder is not None:
            raise SdwnError(_unavailable(config, error)) from error
        log.warning("no answer of the hub (%s): taking what its cache has", first_line(error))
        return Weights(found, found.name)
    if folder is not None:
        _fill(config, commit, sizes, folder)
        found = folder
    else:
        _require_space(_missing(sizes, snapshot(config.model.name, commit)), _cache())
        found = download(config, wanted)
    require_whole(found, config)
    return Weights(found, commit)


def download(config: RunConfig, revision: str | None = None, cache: Path | None = None) -> Path:
    """Bring a model into the hub's cache, or another, and return the commit's folder there.

    diffusers chooses the files, as it does when it loads them: safetensors alone, of the
    variant, without the parts that the config does without.

    Raises:
        SdwnError: the hub does not give it.
    """
    from diffusers import DiffusionPipeline

    without = dict.fromkeys(unneeded(config))
    try:
        found = DiffusionPipeline.download(
            config.model.name,
            revision=revision or config.model.revision,
            variant=config.model.variant,
            use_safetensors=True,
            cache_dir=cache,
            **without,
        )
    except Exception as error:
        raise SdwnError(_unavailable(config, error)) from error
    return Path(found)


def _unavailable(config: RunConfig, error: Exception) -> str:
    return (
        f"model {config.model.name}: no folder of this name, and the hub did not give it: "
        f"{first_line(error)}; fetch it where there is a network, with: sdwn prefetch (after "
        "hf auth login where its terms ask for that), or name a local folder"
    )


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _listing(config: RunConfig, revision: str | None) -> tuple[str, dict[str, int]]:
    """Ask the hub which commit a revision stands for, and how large the files are that are needed.

    Raises:
        SdwnError: it has no pipeline in diffusers format, or not these weights of a part.
    """
    from huggingface_hub import HfApi, hf_hub_download

    model = config.model
    info = HfApi().model_info(model.name, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if INDEX not in sizes:
        raise SdwnError(
            f"model {model.name}: no pipeline in diffusers format on the hub, for {INDEX} is "
            f"missing; it has {', '.join(sorted(sizes)[:5]) or 'no files'}; look there for the "
            "same model in diffusers format"
        )
    with TemporaryDirectory() as cache:
        index = hf_hub_download(model.name, INDEX, revision=info.sha, cache_dir=cache)
        kinds = components(Path(index).parent)
    parts = sorted(kinds.keys() - unneeded(config))
    wanted = needed(sizes, parts, model.variant)
    for part in parts:
        own = [name.removeprefix(f"{part}/") for name in sizes if name.startswith(f"{part}/")]
        found = any(name.startswith(f"{part}/") and "safetensors" in name for name in wanted)
        if "config.json" in own and not found:
            raise SdwnError(f"model {model.name} on the hub: {instead(part, own, model.name)}")
    return str(info.sha), {file: sizes[file] for file in wanted}


def _missing(sizes: Mapping[str, int], folder: Path | None) -> int:
    """Count the bytes of the files that a folder has not."""
    return sum(
        size for name, size in sizes.items() if folder is None or not (folder / name).exists()
    )


def _require_space(needed_bytes: int, folder: Path) -> None:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise SdwnError(
            f"{folder}: the weights need {decimal(needed_bytes)} more, and {decimal(free)} are "
            "free; free some, set HF_HOME to a folder on a larger disk, or fetch with --folder"
        )


def _fill(config: RunConfig, commit: str, sizes: Mapping[str, int], folder: Path) -> None:
    """Make a plain folder of a commit's files, unless it is one already."""
    mark, unfinished = folder / _MARK, folder / _UNFINISHED
    wanted = {"model": config.model.name, "commit": commit}
    found = read_json(mark) if mark.exists() else {}
    if found == wanted and not _missing(sizes, folder):
        return
    if folder.exists() and not (
        folder.is_dir() and (_is_begun(unfinished) or not any(folder.iterdir()))
    ):
        what = f"its commit {found['commit']}" if found.get("commit") else "something else"
        raise UsageError(
            f"--folder {folder}: expected nothing there, or {config.model.name} whole at commit "
            f"{commit}, found {what}; choose another folder, or remove that one"
        )
    _require_space(_missing(sizes, None), folder)
    cached = download(config, commit, unfinished)
    for name in files(cached):
        _put((cached / name).resolve(), folder / name)
    write_text(mark, json.dumps(wanted) + "\n")
    shutil.rmtree(unfinished)


def _is_begun(unfinished: Path) -> bool:
    """Return whether this user left it unfinished, and nothing leads out of its folder."""
    linked = any(path.is_symlink() for path in unfinished.parent.iterdir())
    return not linked and unfinished.exists() and is_own_folder(unfinished)


def _put(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        # The hub keeps equal files once: moving would leave nothing for the second.
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
