"""Built-in models: their folders, and a notice about the use of their images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from sdwn.config import BUILTIN
from sdwn.errors import IntegrityError, UsageError
from sdwn.io import file_sha256, locked, refuse_planted, writable_cache
from sdwn.paths import cache_folder

MINIATURE = f"{BUILTIN}miniature"
# They come with the package, in a folder of their name, and are read there.
IN_PACKAGE = ("miniature",)
# Of what comes with the package, as sha256sum writes them.
SUMS = "SHA256SUMS"
# Counts every change to what is made in the cache, so that no cache keeps an older one.
BUILTIN_VERSION = 1


def builtin_path(name: str) -> Path:
    """Return the folder of a built-in model: in the package, or in the cache, made or not.

    Raises:
        IntegrityError: any user could have put it into the cache.
    """
    if name in IN_PACKAGE:
        return Path(__file__).resolve().parent.parent / name
    folder = cache_folder() / "models" / f"{name}-{BUILTIN_VERSION}"
    if folder.exists():
        refuse_planted(folder)
    return folder


def packaged(name: str) -> Path:
    """Return the folder of a model that comes with the package, after checking its files.

    Raises:
        IntegrityError: a file of it is missing, or another than was shipped.
    """
    folder = builtin_path(name)
    fault, remedy = folder / SUMS, "install sdwn again, or bring it back with: git checkout sdwn"
    try:
        for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
            digest, _, file = line.partition("  ")
            fault = folder / file
            if file_sha256(fault) != digest:
                raise ValueError("another than came with the package")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{fault}: {error}; {remedy}") from None
    return folder


def builtin_folder(name: str) -> Path:
    """Return a built-in pipeline's folder in diffusers format.

    One that does not come with the package is made on first use, in ``models`` below the cache.

    Raises:
        UsageError: no built-in pipeline has this name.
        IntegrityError: one that comes with the package is not as it came.
    """
    if name in IN_PACKAGE:
        return packaged(name)
    if name != "tiny":
        valid = ", ".join(f"builtin:{known}" for known in ("tiny", *IN_PACKAGE))
        raise UsageError(f"builtin:{name}: no such built-in model; valid: {valid}")
    folder = builtin_path(name)
    if not folder.is_dir():
        from sdwn.models.tiny import save_tiny  # torch and diffusers

        make_once(folder, save_tiny)
    return folder


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder in the cache, whole or not at all; of processes that start together, one does.

    ``make`` writes what it holds into a folder.
    """
    with locked(writable_cache() / "models.lock"):
        if folder.is_dir():
            return
        unfinished = folder.with_name(f".{folder.name}.{uuid4().hex}")
        unfinished.mkdir(parents=True)
        try:
            make(unfinished)
            unfinished.rename(folder)
        except OSError:
            # On a file system without locks another process may have made the same one.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def notice(model: str) -> str | None:
    """Return a notice about the images of a built-in model; None for any other model."""
    if not model.startswith(BUILTIN):
        return None
    if model == MINIATURE:
        return (
            f"These images come from {model}, a pipeline under a hundredth of Stable Diffusion's "
            "size, trained on drawings of a few dozen classes to show how sdwn works. What is "
            "recognised in them says nothing about Stable Diffusion."
        )
    return (
        f"These images come from {model}, which exercises every step and shows noise. What is "
        "recognised in them means nothing, and says nothing about Stable Diffusion."
    )


def terms(model: str) -> str | None:
    """Return the terms of use of a built-in model's images; None for any other model."""
    if model == MINIATURE:
        return (
            "The images come from a model trained on drawings of sdwn itself (Apache-2.0), of "
            "Google's Noto Emoji (Apache-2.0) and of Microsoft's Fluent Emoji (MIT)."
        )
    if model.startswith(BUILTIN):
        return "The images come from no trained model; sdwn itself is under Apache-2.0."
    return None
