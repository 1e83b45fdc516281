"""The weights that classifiers come with: from where, and in which cache they lie."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

# As timm looks for them.
_FILES = ("model.safetensors", "pytorch_model.bin")


def cached(model: str) -> Path | None:
    """Find the safetensors of a timm name in the hub's cache, without the network.

    Files of other formats, which could hold code, are left to timm's own loading.
    """
    found = find(model)
    return found if found and found.suffix == ".safetensors" else None


def find(model: str) -> Path | None:
    """Find the weights of a timm name where :func:`fetch` puts them, without the network."""
    repository, names = _on_hub(model)
    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    if names or not (config := timm.get_pretrained_cfg(model)) or not config.url:
        return None
    return find_url(config.url)


def find_url(url: str) -> Path | None:
    """Find what :func:`fetch_url` has got before; None where it has not."""
    file = _url_file(url)
    return file if file.is_file() else None


def _url_file(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)


def fetch(model: str) -> Path:
    """Get the weights of a timm name into the cache, from the hub or by torch's downloader.

    Raises:
        Exception: of the hub or of the network, of many kinds.
    """
    repository, names = _on_hub(model)
    for name in names:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(repository, name))
    if names:
        raise FileNotFoundError(f"{repository} on the hub has none of {', '.join(names)}")
    return fetch_url(timm.get_pretrained_cfg(model).url)


def fetch_url(url: str) -> Path:
    """Get a file into the cache of torch.hub, checked against the hash in its name.

    Raises:
        OSError, RuntimeError: the network does not give it, or it is not what it should be.
    """
    file = _url_file(url)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([a-f0-9]*)\.", file.name)
        torch.hub.download_url_to_file(
            url, str(file), digest and digest[1], progress=sys.stderr.isatty()
        )
    return file


def _on_hub(model: str) -> tuple[str, tuple[str, ...]]:
    """Name a model's repository on the hub and the files to look for; none of those elsewhere."""
    config = timm.get_pretrained_cfg(model)
    if not config or not config.hf_hub_id:
        return "", ()
    return config.hf_hub_id, (config.hf_hub_filename,) if config.hf_hub_filename else _FILES
