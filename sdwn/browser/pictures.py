"""A release's images for a browser: as they are stored, and small."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from sdwn.errors import DiskError, IntegrityError
from sdwn.releases.release import Release
from sdwn.storage.codecs import CODECS
from sdwn.storage.images import is_turned

if TYPE_CHECKING:
    from PIL.Image import Image

# The longer side, on a page of results and on a synset's own.
SIZES = (192, 384)
# So many small pictures are kept: of photographs about 10 MB, of noise 40.
KEPT = 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """An encoded image: ``codec`` is webp, png or jpeg."""

    payload: bytes
    codec: str

    @property
    def media_type(self) -> str:
        """What a browser calls it."""
        return CODECS[self.codec].media_type or "application/octet-stream"

    @property
    def suffix(self) -> str:
        """What ends its file's name."""
        return f".{CODECS[self.codec].extension}"


class Pictures:
    """The images of a release by their rows; from several threads, too.

    What reads an image raises IntegrityError where it is damaged or its disk does not answer;
    the next call reads it again.
    """

    def __init__(self, release: Release) -> None:
        self._release = release
        self._kept = lru_cache(KEPT)(self._drawn)

    def digest(self, row: int) -> str:
        """Give the recorded SHA-256 of an image, without reading it."""
        return str(self._release.location(row)["sha256"])

    def stored(self, row: int, upright: bool = False) -> Stored:
        """Return an image as it is stored; raw pixels, which no browser shows, as PNG.

        With ``upright``, also as PNG what browsers may leave on its side: all of them turn a
        JPEG as its EXIF orientation says, and only some a PNG or WebP.
        """
        place = self._release.location(row)
        codec = place["codec"]
        if codec not in CODECS:
            raise IntegrityError(f"image {row}: no browser shows the codec {codec!r}")
        if CODECS[codec].media_type:
            with _disk_errors():
                payload = self._release.payload(place)
            if not upright or codec == "jpeg" or not is_turned(payload, codec):
                return Stored(payload, codec)
        return Stored(_encoded(self._decoded(row), "PNG", compress_level=1), "png")

    def thumbnail(self, row: int, pixels: int) -> bytes:
        """Give an image as WebP, its longer side of so many pixels or as small as it is."""
        return self._kept(row, pixels)

    def is_damaged(self, row: int) -> bool:
        """Tell whether an image's bytes are not those that were written.

        Nothing is decoded: of large images that takes seconds, and a gigabyte for a few at once.
        """
        try:
            with _disk_errors():
                self._release.payload(self._release.location(row))
        except IntegrityError:
            return True
        return False

    def _drawn(self, row: int, pixels: int) -> bytes:
        image = self._decoded(row)
        image.thumbnail((pixels, pixels), reducing_gap=2.0)
        return _encoded(image, "WEBP", quality=80, method=2)

    def _decoded(self, row: int) -> Image:
        with _disk_errors():
            return self._release.image(row)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except DiskError as error:
        raise IntegrityError(f"it cannot be read: {str(error).partition(';')[0]}") from None


def _encoded(image: Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
