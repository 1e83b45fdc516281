"""A self-contained HTML page: templates, style, scripts and images in one file."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

from sdwn.errors import IntegrityError
from sdwn.io import in_threads
from sdwn.prediction.table import find_by_key, top1
from sdwn.releases.release import LOCATION, Release, Row
from sdwn.storage.columns import BLACK
from sdwn.storage.images import encode
from sdwn.wordnet.corpus import class_name

# So many images of a class are looked at: an import may have a thousand.
MOST = 50
THUMBNAIL_PIXELS = 128
# Of a class's images a sheet shows the first ten, five a row. A page of all 1000 classes has 10 MB
# of them if they are photographs.
SHEET_IMAGES, SHEET_COLUMNS, SHEET_PIXELS, SHEET_QUALITY = 10, 5, 72, 50
THREADS = 8


def render(template: str, values: Mapping[str, Any], scripts: tuple[str, ...]) -> str:
    """Render a page that needs nothing but itself; its policy names these scripts by hashes."""
    loader = cast("ChoiceLoader", _ENVIRONMENT.loader)
    style, *texts = (loader.get_source(_ENVIRONMENT, name)[0] for name in ("page.css", *scripts))
    return _ENVIRONMENT.get_template(template).render(
        **values,
        style=Markup(shared_text("house.css") + style),
        scripts=[Markup(text) for text in texts],
        script_hashes=Markup(" ".join(map(policy_hash, texts))),
    )


def template_environment(folder: str, **options: Any) -> Environment:
    """Return a folder's templates, and those that reports and browser share, for HTML."""
    loader = ChoiceLoader([PackageLoader("sdwn", f"templates/{one}") for one in (folder, "shared")])
    options |= {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    found = Environment(loader=loader, **options)
    found.filters["plain"] = plain
    return found


def policy_hash(text: str) -> str:
    """Return the hash by which a page's policy allows one script or style, in its quotes."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def plain(value: Any) -> str:
    """Return a setting as text for people."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


_ENVIRONMENT = template_environment("report")


def shared_text(name: str) -> str:
    """Return a file of style or script that reports and browser share."""
    return files("sdwn").joinpath("templates/shared", name).read_text(encoding="utf-8")


class Album(dict[str, list[dict[str, Any]]]):
    """The images of synsets by wnid, in the order of their numbers; of many, the first ones.

    An image is its row in the release, with ``predicted``, the wnid of the class that it was
    classified as or None, and ``correct``, whether that is its own class.
    """

    def __init__(self, release: Release, wnids: Iterable[str], predictions: pa.Table) -> None:
        super().__init__((wnid, []) for wnid in wnids)
        self.release, classes = release, release.classes
        columns = ["wnid", "id", "synset", "number", "status", *LOCATION]
        # Imported images may have none.
        columns += [name for name in ("prompt",) if name in release.metadata.column_names]
        wanted = pc.is_in(release.metadata["wnid"], pa.array([*self], pa.string()))
        table = release.metadata.select(columns).filter(wanted)
        order = [(name, "ascending") for name in ("wnid", "number", "id")]
        table = table.sort_by(order).combine_chunks()
        codes = table["wnid"].combine_chunks().dictionary_encode().indices.to_numpy()
        first = np.arange(len(codes)) - np.searchsorted(codes, codes) < MOST
        table = table.filter(pa.array(first))
        rows = find_by_key(table, predictions, ("id", "number"))
        best = [classes[index] for index in top1(predictions).tolist()] + [None]
        for row, image in zip(rows.tolist(), table.to_pylist(), strict=True):
            wnid, prompt = best[row], image.get("prompt") or ""
            own = {"prompt": prompt, "predicted": wnid, "correct": wnid == image["wnid"]}
            self[image["wnid"]].append({**image, **own})

    def gallery(self, wnid: str, most: int) -> list[dict[str, Any]]:
        """Return what a page shows of a class's first images: each with its predicted class."""
        keys = ("synset", "id", "number", "prompt", "status", "correct")
        return [
            {
                **{key: image[key] for key in keys},
                "black": image["status"] in BLACK,
                "predicted": image["predicted"] and class_name(image["predicted"]),
                "source": thumbnail(self.release, image),
            }
            for image in self[wnid][:most]
        ]

    def prompt(self, wnid: str) -> str:
        """Return the prompt of a class's images; of several, the first."""
        first, *others = dict.fromkeys(image["prompt"] for image in self[wnid])
        more = " (the first of several prompts; point at an image for its own)"
        return f"{first}{more if others else ''}"

    def sheets(self, wnids: Sequence[str]) -> dict[str, str]:
        """Return one small picture of each class's first images, each image cut to a square."""

        def sheet(wnid: str) -> str:
            images, side = self[wnid][:SHEET_IMAGES], SHEET_PIXELS
            rows = math.ceil(len(images) / SHEET_COLUMNS)
            drawn = Image.new("RGB", (SHEET_COLUMNS * side, rows * side))
            for index, image in enumerate(images):
                row, column = divmod(index, SHEET_COLUMNS)
                square = ImageOps.fit(_decoded(self.release, image), (side, side))
                drawn.paste(square, (column * side, row * side))
            return data_url(drawn, SHEET_QUALITY)

        return dict(zip(wnids, in_threads(sheet, wnids, THREADS, 2 * THREADS), strict=True))


def thumbnail(release: Release, image: int | Row, pixels: int = THUMBNAIL_PIXELS) -> str:
    """Return an image of a release, made small, as a data URL."""
    picture = _decoded(release, image)
    picture.thumbnail((pixels, pixels))
    return data_url(picture, 80)


def _decoded(release: Release, image: int | Row) -> Image.Image:
    try:
        return release.image(image)
    except IntegrityError:
        return Image.new("RGB", (1, 1))  # in place of a damaged one


def data_url(image: Image.Image, quality: int) -> str:
    """Encode an image as WebP inside a URL."""
    encoded = base64.b64encode(encode(np.asarray(image), "webp", quality)).decode()
    return f"data:image/webp;base64,{encoded}"
