"""Contact sheets: images with short captions side by side, as one picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

# In pixels: a picture's cell, a line of text, a picture with its line.
COLUMNS = 10
CELL = 160
LINE = 24
TALL = CELL + LINE
GAP = 4


@dataclass(frozen=True, slots=True)
class Strip:
    """A title, and so many images below it, each with a caption; None is a damaged one."""

    title: str
    images: int
    cells: Iterable[tuple[Image.Image | None, str]]


def contact_sheet(strips: Sequence[Strip]) -> Image.Image:
    """Draw strips below one another, ten images a row, or more where they are hundreds."""
    most = max(strip.images for strip in strips)
    # As WebP a picture may be 16,383 pixels high.
    columns = min(most, max(COLUMNS, math.isqrt(most)))
    height = sum(LINE + math.ceil(strip.images / columns) * TALL for strip in strips)
    sheet = Image.new("RGB", (max(columns, 4) * CELL, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE * 2 // 3)
    top = 0
    for strip in strips:
        pen.text((GAP, top), " ".join(strip.title.split()), "black", font)
        for place, (image, caption) in enumerate(strip.cells):
            row, column = divmod(place, columns)
            left, upper = column * CELL + GAP, top + LINE + row * TALL
            size = CELL - 2 * GAP
            shown = image or Image.new("RGB", (size, size), "grey")
            sheet.paste(ImageOps.contain(shown, (size, size)), (left, upper))
            pen.text((left, upper + size + GAP), caption, "black", font)
        top += LINE + math.ceil(strip.images / columns) * TALL
    return sheet
