"""One synset's sheet, for ``sdwn show``: as values, as a page by itself, as one picture."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from markupsafe import Markup
from PIL import Image

from sdwn.browser import templates
from sdwn.browser.collection import Entry, ImageView
from sdwn.browser.library import Library
from sdwn.errors import IntegrityError
from sdwn.reports.thumbnails import data_url
from sdwn.storage.images import CELL, Strip, contact_sheet

# The longer side of an image; an import may have a thousand, which are shown smaller.
PIXELS, PIXELS_OF_MANY, MANY = 384, 192, 50
QUALITY = 85
# More are left out: of photographs these are 10 MB, and a browser opens no page of a gigabyte.
MOST = 1000
THREADS = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A synset of a release and its images by number.

    ``made`` has ``seed`` and ``prompt`` of each image, ``above`` the names of the synset's
    hypernyms from the root down, ``regenerate`` the command that regenerates an image, but for
    its number (None for an import).
    """

    library: Library
    entry: Entry
    images: Sequence[ImageView]
    made: list[dict[str, Any]]
    above: list[str]
    regenerate: str | None


def open_sheet(library: Library, name: str) -> Sheet:
    """Collect what is known of a synset, by name, wnid, or a lemma that only one synset has.

    Raises:
        UsageError: it names no synset of the release, or several.
    """
    entry = library.collection.entry(library.release.find_one(name))
    assert entry is not None
    images = library.images(entry.wnid)
    made = library.seeds_and_prompts(images)
    path = library.tree.path(entry.wnid)[:-1] if library.tree else []
    regenerate = library.regenerate_command(entry.synset)
    return Sheet(library, entry, images, made, [node.name for node in path], regenerate)


def sheet_record(sheet: Sheet) -> dict[str, Any]:
    """Return a sheet as plain values, the record of ``sdwn show --json``."""
    library, predictions = sheet.library, sheet.library.predictions
    correct, labelled = predictions.tally(sheet.entry) if predictions else (0, 0)
    shots = []
    for image, made in zip(sheet.images, sheet.made, strict=True):
        found = image.prediction
        shots.append(
            {
                "number": image.number,
                **made,
                "status": image.status,
                "state": image.state,
                "top5": [asdict(guess) for guess in found.top5] if found else None,
                "right": found.correct if found else None,
                "rank": found.rank if found else None,
                "subtree_probability": found.subtree_probability if found else None,
            }
        )
    return {
        "release": library.root,
        **{name: value for name, value in asdict(sheet.entry).items() if name != "position"},
        "above": sheet.above,
        "judged": labelled,
        "right": correct,
        "evaluation": predictions.name if predictions else None,
        "model": predictions.model if predictions else None,
        "regenerate": f"{sheet.regenerate} NUMBER" if sheet.regenerate else None,
        "shots": shots,
    }


def sheet_page(sheet: Sheet) -> str:
    """Render a sheet as one HTML file that loads nothing, up to MOST images inside."""
    # A parser of HTML makes one line end of two characters, and the hash would not be its own.
    style = templates.assets()["browse.css"].content.decode().replace("\r\n", "\n")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    pixels = PIXELS if len(sheet.images) <= MANY else PIXELS_OF_MANY
    urls = _each_small(sheet, pixels, lambda image: data_url(image, QUALITY))
    values = {
        "sheet": sheet,
        "entry": sheet.entry,
        "predictions": sheet.library.predictions,
        "images": list(zip(sheet.images[:MOST], sheet.made[:MOST], urls, strict=True)),
        "left_out": max(0, len(sheet.images) - MOST),
        "style": Markup(style),
        "style_hash": Markup(f"'sha256-{digest}'"),
    }
    return templates.render_page("sheet.html", values)


def sheet_picture(sheet: Sheet) -> Image.Image:
    """Draw a sheet as one picture: up to MOST images, each with its number and prediction."""
    entry, images = sheet.entry, sheet.images[:MOST]
    counted = f"{len(images):,} of {entry.images:,} images" if len(images) < entry.images else ""
    facts = [f"{entry.synset} {entry.wnid}", counted, entry.prompt or entry.definition]
    words = {"right": ", correct", "wrong": ", incorrect", "black": ", black"}
    captions = (f"{image.number}{words.get(image.state, '')}" for image in images)
    cells = zip(_each_small(sheet, CELL, lambda image: image), captions, strict=True)
    return contact_sheet([Strip(": ".join(filter(None, facts)), len(images), cells)])


def _each_small(sheet: Sheet, pixels: int, use: Callable[[Image.Image], T]) -> list[T | None]:
    """Make the first images small and use each, in threads; None for a damaged one."""

    def drawn(view: ImageView) -> T | None:
        try:
            image = sheet.library.release.image(view.row)
        except IntegrityError:
            return None
        image.thumbnail((pixels, pixels))
        return use(image)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(drawn, sheet.images[:MOST]))
