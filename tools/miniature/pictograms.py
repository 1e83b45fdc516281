"""Pictograms: emoji out of packages of the npm registry, drawn as images of 128 pixels.

The packages' licences: Noto Emoji, both designs, Apache-2.0; Fluent Emoji, in colour and as
rendered in three dimensions, MIT.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from sdwn.errors import SdwnError

PIXELS = 128
SVG = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
}
WEBP = {"fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0"}
PACKAGES = SVG | WEBP


def pictogram(name: str, packages: Path) -> Image.Image:
    """Draw one, such as ``noto:guitar``, in RGBA without its empty edges.

    ``packages`` is the folder of :func:`fetch`.

    Raises:
        SdwnError: there is none of this name.
    """
    design, _, emoji = name.partition(":")
    if design not in PACKAGES:
        raise SdwnError(f"{name}: no such design; expected one of {', '.join(PACKAGES)}")
    try:
        drawn = _from_svg(design, emoji, packages) if design in SVG else _webp(emoji, packages)
    except KeyError:
        raise SdwnError(f"{name}: no such pictogram in {PACKAGES[design]}") from None
    return trimmed(drawn)


def trimmed(image: Image.Image) -> Image.Image:
    """Cut clear edges off."""
    seen = image.getchannel("A").point(lambda value: 255 if value > 8 else 0)
    return image.crop(seen.getbbox())


def fetch(designs: Collection[str], folder: Path) -> None:
    """Get the packages of some designs from the npm registry, where they are not there yet.

    Raises:
        SdwnError: npm is missing, or gets nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # What the others call an emoji is told in the first.
    wanted = {"noto", *designs} if designs else set()
    for package in sorted(PACKAGES[design] for design in wanted):
        if archive_path(package, folder).exists():
            continue
        if shutil.which("npm") is None:
            raise SdwnError(
                f"expected npm, to get {package}; install Node.js, or put its .tgz in {folder}"
            )
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            got = subprocess.run(
                ["npm", "pack", "--silent", package],
                cwd=unfinished,
                capture_output=True,
                text=True,
                check=False,
            )
            if got.returncode:
                raise SdwnError(f"npm pack {package}: {got.stderr.strip()[-300:]}")
            archive_path(package, Path(unfinished)).replace(archive_path(package, folder))


def archive_path(package: str, folder: Path) -> Path:
    """Name the file that ``npm pack`` writes.

    >>> archive_path("@iconify-json/noto@1.2.9", Path("got")).as_posix()
    'got/iconify-json-noto-1.2.9.tgz'
    """
    return folder / f"{package.lstrip('@').replace('/', '-').replace('@', '-')}.tgz"


def _read(package: str, member: str, folder: Path) -> bytes:
    with tarfile.open(archive_path(package, folder)) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None
        return file.read()


@cache
def _json(package: str, member: str, folder: Path) -> Any:
    return json.loads(_read(package, member, folder))


def _from_svg(design: str, emoji: str, packages: Path) -> Image.Image:
    # Imported here: only who trains the miniature has it.
    import resvg_py

    icons = _json(SVG[design], "icons.json", packages)
    icon = icons["icons"][emoji]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=PIXELS, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _webp(emoji: str, packages: Path) -> Image.Image:
    code = _plain_codes(packages)[emoji]
    member = _members(WEBP["fluent-3d"], packages)[code]
    file = io.BytesIO(_read(WEBP["fluent-3d"], member, packages))
    small = Image.open(file).convert("RGBa").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    return small.convert("RGBA")


@cache
def _plain_codes(packages: Path) -> dict[str, str]:
    codes = _json(SVG["noto"], "chars.json", packages)
    return {name: code.replace("-fe0f", "") for code, name in codes.items()}


@cache
def _members(package: str, packages: Path) -> dict[str, str]:
    with tarfile.open(archive_path(package, packages)) as archive:
        names = [name.removeprefix("package/") for name in archive.getnames()]
    return {Path(name).stem.replace("-fe0f", ""): name for name in names}
