"""The hub: a model's weights from there, as many of its files as loading takes."""

from __future__ import annotations

import json
import logging
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
    find_folder,
    needed,
    other_weights,
    require_whole,
    snapshot,
    unneeded,
)

log = logging.getLogger(__name__)

# In a folder that is being filled: what is downloaded so far, from which a killed download resumes.
_UNFINISHED = ".sdwn-unfinished"
# In a folder that is filled: which weights it has.
_MARK = ".sdwn-weights.json"


def fetch_weights(
    config: RunConfig, revision: str | None = None, folder: Path | None = None
) -> Weights:
    """Download a config's model, whole, into the hub's cache or a folder of its own.

    What is there already is not downloaded again. ``revision`` replaces the config's. Where the
    hub does not answer, weights that are in its cache are used as they are.

    Raises:
        SdwnError: the hub does not give it, or there is no room for it.
        UsageError: something else is in the folder.
    """
    from huggingface_hub import constants

    wanted = revision or config.model.revision
    try:
        commit, sizes = _listing(config, wanted)
    except SdwnError:
        raise
    except Exception as error:  # each of the HTTP libraries that hub's has used has its own
        if (found := find_folder(config, wanted)) is None or folder is not None:
            raise SdwnError(_unavailable(config, error)) from error
        log.warning("the hub does not answer (%s): using what its cache has", first_line(error))
        return Weights(found, found.name)
    if folder is not None:
        _fill(config, commit, sizes, folder)
        found = folder
    else:
        cached = snapshot(config.model.name, commit)
        _require_space(_missing(sizes, cached), Path(constants.HF_HUB_CACHE))
        # By its branch: the cache then knows which commit that is.
        found = _download(config, wanted, sizes)
    require_whole(found, config)
    return Weights(found, commit)


def _listing(config: RunConfig, revision: str | None) -> tuple[str, dict[str, int]]:
    """Return the commit of a revision, and the sizes of its files that a config needs.

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
            raise SdwnError(
                f"model {model.name} on the hub: {other_weights(part, own, model.name)}"
            )
    return str(info.sha), {file: sizes[file] for file in wanted}


def _download(
    config: RunConfig, revision: str | None, names: Mapping[str, int], folder: Path | None = None
) -> Path:
    """Download files of a commit into the hub's cache or a plain folder; return their folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                config.model.name, revision=revision, allow_patterns=list(names), local_dir=folder
            )
        )
    except Exception as error:
        raise SdwnError(_unavailable(config, error)) from error


def _unavailable(config: RunConfig, error: Exception) -> str:
    return (
        f"model {config.model.name}: no folder of this name, and the hub did not give it: "
        f"{first_line(error)}; fetch it where there is a network, with: sdwn prefetch (after "
        "hf auth login where its terms ask for that), or name a local folder"
    )


def _missing(sizes: Mapping[str, int], folder: Path | None) -> int:
    """Count the bytes of the files that a folder does not have."""
    return sum(
        size for name, size in sizes.items() if folder is None or not (folder / name).exists()
    )


def _require_space(needed_bytes: int, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise SdwnError(
            f"{existing}: the weights need {decimal(needed_bytes)} more, and {decimal(free)} are "
            "free; free some, set HF_HOME to a folder on a larger disk, or fetch with --folder"
        )


def _fill(config: RunConfig, commit: str, sizes: Mapping[str, int], folder: Path) -> None:
    """Fill a plain folder with a commit's files, unless it has them already."""
    mark, unfinished = folder / _MARK, folder / _UNFINISHED
    wanted = {"model": config.model.name, "commit": commit}
    found = read_json(mark) if mark.exists() else {}
    if found == wanted and not _missing(sizes, folder):
        return
    # This user's own download is resumed, if nothing leads out of its folder.
    begun = folder.is_dir() and unfinished.exists() and is_own_folder(unfinished)
    begun = begun and not any(path.is_symlink() for path in folder.iterdir())
    if folder.exists() and not begun and (not folder.is_dir() or any(folder.iterdir())):
        what = f"its commit {found['commit']}" if found.get("commit") else "something else"
        raise UsageError(
            f"--folder {folder}: expected nothing there, or {config.model.name} whole at commit "
            f"{commit}, found {what}; choose another folder, or remove that one"
        )
    _require_space(_missing(sizes, unfinished), folder)
    _download(config, commit, sizes, unfinished)
    for name in sizes:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).replace(folder / name)
    write_text(mark, json.dumps(wanted) + "\n")
    shutil.rmtree(unfinished)
