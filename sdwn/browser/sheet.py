"""A synset's sheet, the result of ``sdwn show``: as values, as a page by itself, as one picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from markupsafe import Markup
from PIL import Image

from sdwn.browser.collection import Entry, ImageView
from sdwn.browser.library import Library
from sdwn.browser.views import assets, render_page
from sdwn.errors import IntegrityError
from sdwn.io import in_threads
from sdwn.reports.page import data_url, policy_hash
from sdwn.storage.images import CELL, contact_sheet

# The longer side of an image; an import may have a thousand, which are shown smaller.
PIXELS, PIXELS_OF_MANY, MANY = 384, 192, 50
QUALITY = 85
# More are left out: of photographs these are 10 MB, and a browser opens no page of a gigabyte.
MOST = 1000
THREADS = 8

T = TypeVar("T")


def sheet_record(library: Library, entry: Entry) -> dict[str, Any]:
    """Return the facts about a synset and each image, the record of ``sdwn show --json``."""
    predictions, images = library.predictions, library.images(entry.wnid)
    correct, labelled = library.tally(entry.position)
    regenerate = library.regenerate_command(entry.synset)
    return {
        "release": library.root,
        **{name: value for name, value in asdict(entry).items() if name != "position"},
        "above": _above(library, entry),
        "judged": labelled,
        "right": correct,
        "evaluation": predictions.name if predictions else None,
        "model": predictions.model if predictions else None,
        "regenerate": f"{regenerate} NUMBER" if regenerate else None,
        "shots": [
            {
                "number": image.number,
                **made,
                "status": image.status,
                "state": image.state,
                "top5": [guess._asdict() for guess in image.top5] or None,
                "right": image.correct,
                "rank": image.rank,
                "subtree_probability": image.subtree_probability,
            }
            for image, made in zip(images, library.seeds_and_prompts(images), strict=True)
        ],
    }


def _above(library: Library, entry: Entry) -> list[str]:
    """Return the names of a synset's hypernyms from the root down."""
    return [node.name for node in library.tree.path(entry.wnid)[:-1]] if library.tree else []


def sheet_page(library: Library, entry: Entry) -> str:
    """Render a synset as one HTML file that loads nothing, up to MOST images inside."""
    # A parser of HTML makes one line end of two characters, and the hash would not be its own.
    style = assets()["browse.css"].decode().replace("\r\n", "\n")
    pixels = PIXELS if entry.images <= MANY else PIXELS_OF_MANY
    images, urls = _small(library, entry, pixels, lambda image: data_url(image, QUALITY))
    values = {
        "library": library,
        "entry": entry,
        "above": _above(library, entry),
        "regenerate": library.regenerate_command(entry.synset),
        "images": list(zip(images, library.seeds_and_prompts(images), urls, strict=True)),
        "left_out": entry.images - len(images),
        "style": Markup(style),
        "style_hash": Markup(policy_hash(style)),
    }
    return render_page("sheet.html", values)


def sheet_picture(library: Library, entry: Entry) -> Image.Image:
    """Render a synset as one picture: up to MOST images, with number and prediction."""
    images, small = _small(library, entry, CELL, lambda image: image)
    counted = f"{len(images):,} of {entry.images:,} images" if len(images) < entry.images else ""
    facts = [f"{entry.synset} {entry.wnid}", counted, entry.prompt or entry.definition]
    words = {"right": ", correct", "wrong": ", incorrect", "black": ", black"}
    captions = (f"{image.number}{words.get(image.state, '')}" for image in images)
    cells = zip(small, captions, strict=True)
    return contact_sheet(": ".join(filter(None, facts)), len(images), cells)


def _small(
    library: Library, entry: Entry, pixels: int, use: Callable[[Image.Image], T]
) -> tuple[list[ImageView], list[T | None]]:
    """Make a synset's images small, up to MOST, and use each; None for a damaged one."""

    def drawn(view: ImageView) -> T | None:
        try:
            image = library.release.image(view.row)
        except IntegrityError:
            return None
        image.thumbnail((pixels, pixels))
        return use(image)

    images = library.images(entry.wnid)[:MOST]
    return images, list(in_threads(drawn, images, THREADS, ahead=2 * THREADS))
