"""A release's images as bytes: as stored, as thumbnails, in a zip; and as a table (CSV)."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from types import SimpleNamespace
from typing import IO, Any, cast

from sdwn.browser.collection import ImageView
from sdwn.errors import DiskError, IntegrityError
from sdwn.io import csv_cell, csv_text
from sdwn.releases.release import Release
from sdwn.storage.codecs import CODECS, ImageCodec
from sdwn.storage.images import decode

# Thumbnails kept in memory: of photographs about 10 MB, of noise 40.
KEPT = 1024
LIST_HEAD = "wnid synset number status right top1_wnid top1 top1_probability".split()
# Of an image's own record; what an import has not stays empty.
RECORDED = "wnid synset number status seed prompt width height sha256".split()
PREDICTED = ("right", *(f"top{n}{what}" for n in range(1, 6) for what in ("", "_probability")))
ROWS_AT_ONCE = 500
CORRECT = {None: None, True: "yes", False: "no"}


class StoredImages:
    """The images of a release by their rows; threads may share it.

    What reads an image raises IntegrityError where it is damaged or its disk does not answer.
    """

    def __init__(self, release: Release) -> None:
        self._release = release
        self.thumbnail = lru_cache(KEPT)(self._thumbnail)

    def read(self, row: int) -> tuple[bytes, ImageCodec]:
        """Return an image as it is stored, and its codec; raw pixels as PNG, for browsers."""
        codec = CODECS.get(self._release.location(row)["codec"])
        if codec is not None and codec.media_type:
            return self.payload(row), codec
        return self._encoded(row, "PNG", compress_level=1), CODECS["png"]

    def zip(self, images: Iterable[ImageView]) -> Iterator[bytes]:
        """Yield a zip of images as they are stored, with a table of what is known of them.

        A block an image, so that a zip of any size takes little memory. An image that is damaged
        is named in DAMAGED.txt and left out.
        """
        blocks, rows, damaged = _Blocks(), list[list[Any]](), list[str]()
        with zipfile.ZipFile(cast("IO[bytes]", blocks), "w", zipfile.ZIP_STORED) as archive:

            def add(name: str, content: bytes | str) -> None:
                # As of the zip format's first day: the same images give the same bytes.
                member = zipfile.ZipInfo(name)
                member.external_attr = 0o644 << 16
                archive.writestr(member, content)

            for image in images:
                try:
                    payload, codec = self.read(image.row)
                except IntegrityError as error:
                    damaged.append(f"{image.synset} {image.number}: {error}\n")
                    continue
                name = download_name(image.synset, image.number, codec.extension)
                add(name, payload)
                record = self._release.row(image.row)
                top5 = [(guess.name, round(guess.probability, 6)) for guess in image.top5]
                cells = [CORRECT[image.correct], *chain(*top5)]
                cells += [None] * (len(PREDICTED) - len(cells))
                rows.append([name, *(record.get(key) for key in RECORDED), *cells])
                yield blocks.take()
            add("metadata.csv", csv_text(("file", *RECORDED, *PREDICTED), rows))
            if damaged:
                add("DAMAGED.txt", "".join(damaged))
        yield blocks.take()

    def _thumbnail(self, row: int, pixels: int) -> bytes:
        """Return an image as WebP, its longer side of so many pixels or as small as it is."""
        return self._encoded(row, "WEBP", pixels, quality=80, method=2)

    def _encoded(self, row: int, form: str, pixels: int | None = None, **options: int) -> bytes:
        where, buffer = self._release.location(row), io.BytesIO()
        image = decode(self.payload(row), where["codec"], where["width"], where["height"])
        if pixels is not None:
            image.thumbnail((pixels, pixels), reducing_gap=2.0)
        image.save(buffer, form, **options)
        return buffer.getvalue()

    def payload(self, row: int) -> bytes:
        """Return the bytes that are stored of an image."""
        try:
            return self._release.payload(self._release.location(row))
        except DiskError as error:
            raise IntegrityError(f"it cannot be read: {str(error).partition(';')[0]}") from None


class _Blocks(list[bytes]):
    """The bytes that a zip writes, until they are taken; zipfile sees that it cannot seek in it."""

    def write(self, block: Any) -> int:
        self.append(bytes(block))
        return len(block)

    def flush(self) -> None:
        """Do nothing; zipfile calls it."""

    def take(self) -> bytes:
        found = b"".join(self)
        self.clear()
        return found


def image_list(images: Iterable[ImageView]) -> Iterator[str]:
    """Yield a CSV table of images, some rows at a time, which ``sdwn export --only`` reads."""

    def row(image: ImageView) -> list[Any]:
        best = image.top5[0] if image.top5 else None
        cells = [best.wnid, best.name, round(best.probability, 6)] if best else [None] * 3
        known = [image.wnid, image.synset, image.number, image.status, CORRECT[image.correct]]
        return [csv_cell(cell) for cell in (*known, *cells)]

    # What writes to this returns the line.
    line = cast("Any", SimpleNamespace(write=str))
    writer = csv.writer(line, lineterminator="\n")
    lines = (str(writer.writerow(cells)) for cells in chain([LIST_HEAD], map(row, images)))
    while block := "".join(islice(lines, ROWS_AT_ONCE)):
        yield block


def download_name(synset: str, number: int | None, extension: str) -> str:
    """Return a file name, in characters that every file system and every header takes.

    >>> download_name("dog.n.01", 3, "webp"), download_name("../../日本.n.01", None, "zip")
    ('dog.n.01-3.webp', '_..___.n.01.zip')
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", synset).lstrip(".-")[:80] or "_"
    return f"{plain}{'' if number is None else f'-{number}'}.{extension}"
