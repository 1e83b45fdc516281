"""Configs, profiles and groups by path, or by name among those that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sdwn.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries them inside the package, a checkout has them at its top.
_FOLDERS = {
    "config": (_PACKAGE / "_shipped/configs", _PACKAGE.parent / "configs"),
    "groups": (_PACKAGE / "_shipped/configs/groups", _PACKAGE.parent / "configs/groups"),
    "profile": (_PACKAGE / "_shipped/profiles", _PACKAGE.parent / "slurm/profiles"),
}


def find(kind: Literal["config", "groups", "profile"], name: str) -> Path:
    """Find a config, profile or groups file.

    Raises:
        UsageError: there is none; the shipped ones are listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = _shipped(kind)
    if name in shipped:
        return shipped[name]
    raise UsageError(
        f"no {kind} {name!r}: expected a file, or one of those shipped: {', '.join(shipped)}"
    )


def _shipped(kind: str) -> dict[str, Path]:
    for folder in _FOLDERS[kind]:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}
