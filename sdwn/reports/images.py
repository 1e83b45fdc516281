"""The classified images of each class, and thumbnails of them inside a page, as data URLs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from sdwn.errors import IntegrityError
from sdwn.io import in_threads
from sdwn.releases.release import LOCATION, Release
from sdwn.storage.columns import BLACK
from sdwn.wordnet.imagenet import class_name, class_wnids

# So many images of a class are looked at: an import may have a thousand.
MOST = 50
GALLERY_PIXELS = 128
# Of a class's images a sheet shows the first ten, five a row.
SHEET_IMAGES, SHEET_COLUMNS = 10, 5
# With plotly.js (4.8 MB) and base64 (a third more) a page of all classes stays below 20 MB.
SHEET_BYTES = 10_000_000
# Sheets that are drawn to choose how small all must be.
TRIALS = 16
THREADS = 8


@dataclass(frozen=True, slots=True)
class ClassifiedImage:
    """An image of a class: its row in the release, and the class that was predicted, by wnid."""

    row: dict[str, Any]
    predicted: str | None

    @property
    def correct(self) -> bool:
        """True if its own class was predicted."""
        return self.predicted == str(self.row["wnid"])


class Album:
    """The images of classes, in the order of their numbers; of large classes the first ones."""

    def __init__(self, release: Release, wnids: Iterable[str], predictions: pa.Table) -> None:
        self.release = release
        self._wnids = pa.array(list(wnids), pa.string())
        self._predictions = predictions

    def __getitem__(self, wnid: str) -> list[ClassifiedImage]:
        return self._images[wnid]

    def name(self, wnid: str) -> str:
        """Return a class's first lemma, also of one that the release has not."""
        own = self.release.synsets.get(wnid)
        return own.lemmas.replace("_", " ").partition(", ")[0] if own else class_name(wnid)

    def first_classified_as(self, wnid: str, other: str) -> ClassifiedImage | None:
        """Return the first image of a class for which another class was predicted."""
        return next((image for image in self[wnid] if image.predicted == other), None)

    def gallery(self, wnid: str, most: int) -> list[dict[str, Any]]:
        """Return what a page shows of a class's first images: each with its predicted class."""
        return [
            {
                "synset": image.row["synset"],
                "number": image.row["number"],
                "status": image.row["status"],
                "black": image.row["status"] in BLACK,
                "correct": image.correct,
                "caption": self.name(image.predicted) if image.predicted else "not classified",
                "source": self.thumbnail(image),
            }
            for image in self[wnid][:most]
        ]

    def thumbnail(self, image: ClassifiedImage, pixels: int = GALLERY_PIXELS) -> str:
        """Return an image as a data URL."""
        small = self.decode(image)
        small.thumbnail((pixels, pixels))
        return data_url(small, 80)

    def decode(self, image: ClassifiedImage) -> Image.Image:
        """Decode an image; a black pixel stands in for one that is damaged."""
        try:
            return self.release.image(image.row)
        except IntegrityError:
            return Image.new("RGB", (1, 1))

    @cached_property
    def _images(self) -> dict[str, list[ClassifiedImage]]:
        classes = class_wnids()
        predicted = {
            (row["wnid"], row["number"]): classes[row["top5"][0]]
            for row in self._first(self._predictions.select(["wnid", "number", "top5"]))
        }
        found = {wnid: list[ClassifiedImage]() for wnid in self._wnids.to_pylist()}
        columns = ["wnid", "synset", "number", "status", *LOCATION]
        for row in self._first(self.release.metadata.select(columns)):
            image = ClassifiedImage(row, predicted.get((row["wnid"], row["number"])))
            found[row["wnid"]].append(image)
        return found

    def _first(self, table: pa.Table) -> list[dict[str, Any]]:
        """Return the rows of each class with the smallest numbers."""
        table = table.filter(pc.is_in(table["wnid"], self._wnids))
        table = table.sort_by([("wnid", "ascending"), ("number", "ascending")]).combine_chunks()
        codes = table["wnid"].combine_chunks().dictionary_encode().indices.to_numpy()
        rank = np.arange(len(codes)) - np.searchsorted(codes, codes)
        rows: list[dict[str, Any]] = table.filter(pa.array(rank < MOST)).to_pylist()
        return rows


@dataclass(frozen=True, slots=True)
class Grade:
    """The size and quality of a sheet's images."""

    pixels: int
    quality: int


# Best first. Of photographs an image takes 0.9, 0.6, 0.3 and 0.1 kB.
GRADES = (Grade(80, 60), Grade(64, 50), Grade(48, 40), Grade(32, 20))


def class_sheets(album: Album, wnids: Sequence[str], budget: int = SHEET_BYTES) -> dict[str, str]:
    """Return a sheet of each class's first images, small enough for the page's budget."""
    grade = choose_grade(album, wnids, budget)
    urls = in_threads(lambda wnid: _sheet(album, wnid, grade), wnids, THREADS, 2 * THREADS)
    return dict(zip(wnids, urls, strict=True))


def choose_grade(album: Album, wnids: Sequence[str], budget: int = SHEET_BYTES) -> Grade:
    """Choose the best grade at which all sheets are within the budget, by drawing a few."""
    tried = wnids[:: math.ceil(len(wnids) / TRIALS) or 1]
    for grade in GRADES:
        total = sum(len(_sheet(album, wnid, grade)) for wnid in tried) * 3 / 4
        if total * len(wnids) <= budget * len(tried):
            return grade
    return GRADES[-1]


def _sheet(album: Album, wnid: str, grade: Grade) -> str:
    """Return a sheet of a class's first images, five a row, each cut to a square."""
    images, side = album[wnid][:SHEET_IMAGES], grade.pixels
    rows = math.ceil(len(images) / SHEET_COLUMNS)
    drawn = Image.new("RGB", (SHEET_COLUMNS * side, rows * side))
    for index, image in enumerate(images):
        row, column = divmod(index, SHEET_COLUMNS)
        drawn.paste(ImageOps.fit(album.decode(image), (side, side)), (column * side, row * side))
    return data_url(drawn, grade.quality)


def data_url(image: Image.Image, quality: int) -> str:
    """Encode an image as WebP inside a URL."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
