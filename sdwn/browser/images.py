"""A release's images as bytes: as stored, as thumbnails, in a zip; and as a table (CSV)."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, cast

from sdwn.errors import DiskError, IntegrityError
from sdwn.io import csv_cell, csv_text
from sdwn.releases.release import Release
from sdwn.storage.codecs import CODECS, ImageCodec
from sdwn.storage.images import decode, is_turned

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdwn.browser.collection import ImageView

# Thumbnails kept in memory: of photographs about 10 MB, of noise 40.
KEPT = 1024

LIST_HEAD = (
    *("wnid", "synset", "number", "status", "right"),
    *("top1_wnid", "top1", "top1_probability"),
)
# Of an image's own record; what an import has not stays empty.
RECORDED = ("wnid", "synset", "number", "status", "seed", "prompt", "width", "height", "sha256")
PREDICTED = ("right", *(f"top{n}{what}" for n in range(1, 6) for what in ("", "_probability")))
ROWS_AT_ONCE = 500
LONGEST_NAME = 80


class StoredImages:
    """The images of a release by their rows; threads may share it.

    What reads an image raises IntegrityError where it is damaged or its disk does not answer;
    the next call reads it again.
    """

    def __init__(self, release: Release) -> None:
        self._release = release
        self.thumbnail = lru_cache(KEPT)(self._thumbnail)

    def read(self, row: int, upright: bool = False) -> tuple[bytes, ImageCodec]:
        """Return an image as it is stored, and its codec.

        Raw pixels, which no browser shows, become PNG. With ``upright``, also what browsers may
        leave on its side: all of them turn a JPEG as its EXIF orientation says, and only some a
        PNG or WebP.
        """
        location = self._release.location(row)
        codec = CODECS.get(location["codec"])
        if codec is None:
            raise IntegrityError(f"image {row}: no browser shows the codec {location['codec']!r}")
        if codec.media_type:
            payload = self._payload(row)
            if not upright or codec.name == "jpeg" or not is_turned(payload, codec.name):
                return payload, codec
        return _encoded(self._decoded(row), "PNG", compress_level=1), CODECS["png"]

    def is_damaged(self, row: int) -> bool:
        """Check whether an image's bytes are not those that were written.

        Nothing is decoded: of large images that takes seconds, and a gigabyte for a few at once.
        """
        try:
            self._payload(row)
        except IntegrityError:
            return True
        return False

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
                record, found = self._release.row(image.row), image.prediction
                cells: list[Any] = [None] * len(PREDICTED)
                if found is not None:
                    top5 = [(guess.name, round(guess.probability, 6)) for guess in found.top5]
                    cells = [found.correct, *chain(*top5)]
                rows.append([name, *(record.get(key) for key in RECORDED), *cells])
                yield blocks.take()
            add("metadata.csv", csv_text(("file", *RECORDED, *PREDICTED), rows, table_cell))
            if damaged:
                add("DAMAGED.txt", "".join(damaged))
        yield blocks.take()

    def _thumbnail(self, row: int, pixels: int) -> bytes:
        """Return an image as WebP, its longer side of so many pixels or as small as it is."""
        image = self._decoded(row)
        image.thumbnail((pixels, pixels), reducing_gap=2.0)
        return _encoded(image, "WEBP", quality=80, method=2)

    def _decoded(self, row: int) -> Image:
        location = self._release.location(row)
        size = location["width"], location["height"]
        return decode(self._payload(row), location["codec"], *size)

    def _payload(self, row: int) -> bytes:
        try:
            return self._release.payload(self._release.location(row))
        except DiskError as error:
            raise IntegrityError(f"it cannot be read: {str(error).partition(';')[0]}") from None


def _encoded(image: Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LIST_HEAD)
    for count, image in enumerate(images, start=1):
        cells: list[Any] = [None] * 4
        if image.prediction is not None:
            best = image.prediction.top5[0]
            cells = [image.prediction.correct, best.wnid, best.name, round(best.probability, 6)]
        row = [image.wnid, image.synset, image.number, image.status, *cells]
        writer.writerow(map(table_cell, row))
        if count % ROWS_AT_ONCE == 0:
            yield text.getvalue()
            text.seek(0)
            text.truncate()
    yield text.getvalue()


def table_cell(value: Any) -> Any:
    """Return a value as text for people, see :func:`csv_cell`.

    >>> table_cell("=HYPERLINK(1)"), table_cell(True)
    ("'=HYPERLINK(1)", 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return csv_cell(value)


def download_name(synset: str, number: int | None, extension: str) -> str:
    """Return a file name, in characters that every file system and every header takes.

    >>> download_name("dog.n.01", 3, "webp"), download_name("9/11.n.01", 0, "png")
    ('dog.n.01-3.webp', '9_11.n.01-0.png')
    >>> download_name("../../x.n.01", None, "zip"), download_name("日本", None, "zip")
    ('_.._x.n.01.zip', '__.zip')
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", synset).lstrip(".-")[:LONGEST_NAME] or "_"
    return f"{plain}{'' if number is None else f'-{number}'}.{extension}"
