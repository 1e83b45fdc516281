"""Built-in models: their folders, and a notice about the use of their images."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sdwn.config import BUILTIN
from sdwn.io import file_sha256, reading

MINIATURE = f"{BUILTIN}miniature"
# Of what comes with the package, as sha256sum writes them.
SUMS = "SHA256SUMS"


@cache
def builtin_folder(name: str) -> Path:
    """Return the folder of a pipeline that comes with the package, after checking its files."""
    folder = Path(__file__).resolve().parent.parent / name
    remedy = "install sdwn again, or bring it back with: git checkout sdwn"
    with reading(folder / SUMS, remedy):
        sums = (folder / SUMS).read_text(encoding="utf-8")
    for line in sums.splitlines():
        digest, _, file = line.partition("  ")
        with reading(folder / file, remedy):
            if file_sha256(folder / file) != digest:
                raise ValueError("another than came with the package")
    return folder


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
