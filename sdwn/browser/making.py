"""How a release's images were made, as far as anybody recorded it, and how to make them again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from sdwn.browser.shot import Shot
from sdwn.errors import SdwnError
from sdwn.releases.release import Release

RECORDED = ("seed", "prompt")


def command(release: Release, synset: str) -> str | None:
    """Write the command that makes an image of a synset again, but for its number.

    None for an import, whose making nobody recorded.
    """
    if release.manifest.settings is None:
        return None
    return shlex.join(["sdwn", "regenerate", str(release.paths.root), synset])


def recorded(release: Release, shots: Sequence[Shot]) -> list[dict[str, Any]]:
    """Give, image by image, ``seed`` and ``prompt``; None where an import has none."""
    table = release.metadata
    columns = {name: table[name] for name in RECORDED if name in table.column_names}
    # Arrow's way of taking rows imports pandas where it is: half a second.
    found = ({name: column[shot.row].as_py() for name, column in columns.items()} for shot in shots)
    return [dict.fromkeys(RECORDED) | one for one in found]


def provenance(release: Release, shot: Shot) -> dict[str, Any] | None:
    """Say how an image was made; None where nobody recorded it, or its part cannot tell."""
    if release.manifest.settings is None:
        return None
    try:
        found = release.provenance(shot.row)
    except (SdwnError, OSError):
        return None
    return {name: value for name, value in found.items() if name != "row"}
