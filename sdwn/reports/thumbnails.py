"""Small pictures inside a page: WebP as data URLs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from sdwn.errors import IntegrityError
from sdwn.releases.release import Release
from sdwn.reports.album import Album, Picture
from sdwn.storage.columns import BLACK

GALLERY_PIXELS = 128
# Of the class's pictures a sheet shows the first ten, five a row.
SHEET_PICTURES, SHEET_COLUMNS = 10, 5
# With plotly.js (4.8 MB) and base64 (a third more) a page of all classes stays below 20 MB.
SHEET_BYTES = 10_000_000
TRIALS = 16
THREADS = 8


@dataclass(frozen=True, slots=True)
class Grade:
    """How small a sheet's pictures are."""

    pixels: int
    quality: int


# Best first. In photographs a picture takes 0.9, 0.6, 0.3 and 0.1 kB.
GRADES = (Grade(80, 60), Grade(64, 50), Grade(48, 40), Grade(32, 20))


def thumbnail(release: Release, picture: Picture, pixels: int = GALLERY_PIXELS) -> str:
    """Give a picture as a data URL; an empty one where the image is damaged."""
    image = _opened(release, picture)
    image.thumbnail((pixels, pixels))
    return data_url(image, 80)


def shown(album: Album, synset: str, picture: Picture) -> dict[str, Any]:
    """Gather what a page shows of a picture: itself, and what it was taken for."""
    status = picture.row["status"]
    return {
        "synset": synset,
        "number": picture.row["number"],
        "status": status,
        "black": status in BLACK,
        "right": picture.right,
        "caption": album.name(picture.seen) if picture.seen else "not judged",
        "source": thumbnail(album.release, picture),
    }


def sheets(album: Album, wnids: Sequence[str], budget: int = SHEET_BYTES) -> dict[str, str]:
    """Draw each class's first pictures side by side, as small as all of them must be."""
    chosen = grade(album, wnids, budget)
    with ThreadPoolExecutor(THREADS) as pool:
        drawn = pool.map(lambda wnid: data_url(sheet(album, wnid, chosen), chosen.quality), wnids)
        return dict(zip(wnids, drawn, strict=True))


def grade(album: Album, wnids: Sequence[str], budget: int = SHEET_BYTES) -> Grade:
    """Choose the best grade at which all sheets are within the budget, by drawing a few."""
    tried = wnids[:: math.ceil(len(wnids) / TRIALS) or 1]
    for chosen in GRADES:
        urls = [data_url(sheet(album, wnid, chosen), chosen.quality) for wnid in tried]
        if _bytes(urls) * len(wnids) <= budget * len(tried):
            return chosen
    return GRADES[-1]


def sheet(album: Album, wnid: str, chosen: Grade) -> Image.Image:
    """Draw a class's first pictures, five a row, each cut to a square."""
    pictures, side = album[wnid][:SHEET_PICTURES], chosen.pixels
    rows = math.ceil(len(pictures) / SHEET_COLUMNS)
    drawn = Image.new("RGB", (SHEET_COLUMNS * side, rows * side))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, SHEET_COLUMNS)
        cut = ImageOps.fit(_opened(album.release, picture), (side, side))
        drawn.paste(cut, (column * side, row * side))
    return drawn


def data_url(image: Image.Image, quality: int) -> str:
    """Encode an image as WebP inside a URL."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _opened(release: Release, picture: Picture) -> Image.Image:
    try:
        return release.image(picture.row)
    except IntegrityError:
        return Image.new("RGB", (1, 1))


def _bytes(urls: Iterable[str]) -> float:
    return sum(map(len, urls)) * 3 / 4
