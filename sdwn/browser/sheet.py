"""One synset's sheet: what is known of it and of each image, to print or as a page by itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from markupsafe import Markup
from PIL import Image

from sdwn.browser import dress, making
from sdwn.browser.collection import Entry
from sdwn.browser.library import Library
from sdwn.browser.shot import Shot
from sdwn.errors import IntegrityError
from sdwn.reports.thumbnails import data_url
from sdwn.storage.images import CELL, Strip, contact_sheet

# The longer side of a picture; an import may have a thousand, which are shown smaller.
PIXELS, PIXELS_OF_MANY, MANY = 384, 192, 50
QUALITY = 85
# More are left out: of photographs these are 10 MB, and a browser opens no page of a gigabyte.
MOST = 1000
THREADS = 8
# What a picture says of an image beside its number.
SAID = {state: f", {state}" for state in ("right", "wrong", "black")}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A synset of a release, its images by number.

    ``made`` has, image by image, what is recorded of its making: ``seed``, ``prompt``. ``above``
    names its hypernyms from the root down.
    """

    library: Library
    entry: Entry
    shots: Sequence[Shot]
    made: list[dict[str, Any]]
    above: list[str]

    @property
    def regenerate(self) -> str | None:
        """The command that makes an image again, but for its number; None for an import."""
        return making.command(self.library.release, self.entry.synset)


def open_sheet(library: Library, name: str) -> Sheet:
    """Gather what is known of a synset, by name, wnid, or a lemma that only one synset has.

    Raises:
        UsageError: it names no synset of the release, or several.
    """
    wnid = library.release.find_one(name)
    entry = library.collection.entry(wnid)
    assert entry is not None
    shots = library.shots(wnid)
    path = library.tree.path(wnid)[:-1] if library.tree else []
    made = making.recorded(library.release, shots)
    return Sheet(library, entry, shots, made, [node.name for node in path])


def as_dict(sheet: Sheet) -> dict[str, Any]:
    """Give a sheet as plain values."""
    library, entry, judgement = sheet.library, sheet.entry, sheet.library.judgement
    right, judged = judgement.tally(entry) if judgement else (0, 0)
    return {
        "release": library.root,
        **{name: value for name, value in asdict(entry).items() if name != "position"},
        "above": sheet.above,
        "judged": judged,
        "right": right,
        "evaluation": judgement.name if judgement else None,
        "model": judgement.model if judgement else None,
        "regenerate": f"{sheet.regenerate} NUMBER" if sheet.regenerate else None,
        "shots": [_plain(*pair) for pair in zip(sheet.shots, sheet.made, strict=True)],
    }


def page(sheet: Sheet) -> str:
    """Write a sheet as one HTML file that asks for nothing, up to MOST pictures inside."""
    # A parser of HTML makes one line end of two characters, and the hash would not be its own.
    style = dress.assets()["browse.css"].content.decode().replace("\r\n", "\n")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    shots = sheet.shots[:MOST]
    pixels = PIXELS if len(sheet.shots) <= MANY else PIXELS_OF_MANY
    pictures = _each(sheet, shots, pixels, lambda image: data_url(image, QUALITY))
    values = {
        "sheet": sheet,
        "entry": sheet.entry,
        "judgement": sheet.library.judgement,
        "images": list(zip(shots, sheet.made[:MOST], pictures, strict=True)),
        "left_out": len(sheet.shots) - len(shots),
        "style": Markup(style),
        "style_hash": Markup(f"'sha256-{digest}'"),
    }
    return dress.render("sheet.html", values)


def picture(sheet: Sheet) -> Image.Image:
    """Draw a sheet as one picture: up to MOST images, each with its number and how it was seen."""
    entry, shots = sheet.entry, sheet.shots[:MOST]
    counted = f"{len(shots):,} of {entry.images:,} images" if len(shots) < entry.images else ""
    facts = [f"{entry.synset} {entry.wnid}", counted, entry.prompt or entry.definition]
    title = ": ".join(filter(None, facts))
    captions = (f"{shot.number}{SAID.get(shot.state, '')}" for shot in shots)
    images = _each(sheet, shots, CELL, lambda image: image)
    return contact_sheet([Strip(title, len(shots), zip(images, captions, strict=True))])


def _each(
    sheet: Sheet, shots: Sequence[Shot], pixels: int, use: Callable[[Image.Image], T]
) -> list[T | None]:
    """Draw images small and use each, in threads; None for a damaged one."""

    def draw(shot: Shot) -> T | None:
        try:
            image = sheet.library.release.image(shot.row)
        except IntegrityError:
            return None
        image.thumbnail((pixels, pixels))
        return use(image)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(draw, shots))


def _plain(shot: Shot, made: dict[str, Any]) -> dict[str, Any]:
    verdict = shot.verdict
    return {
        "number": shot.number,
        **made,
        "status": shot.status,
        "state": shot.state,
        "top5": [asdict(guess) for guess in verdict.top5] if verdict else None,
        "right": verdict.right if verdict else None,
        "rank": verdict.rank if verdict else None,
        "subtree_probability": verdict.subtree_probability if verdict else None,
    }
