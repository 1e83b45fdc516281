"""How exported images are encoded: as they are stored, or anew."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdwn.errors import UsageError
from sdwn.releases.release import Release, Row
from sdwn.storage.images import LOSSLESS, Pixels

CODECS = ("stored", "png", "webp", "jpeg")
EXTENSIONS = {"webp": "webp", "png": "png", "jpeg": "jpg"}
JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Encoding:
    """A codec, ``stored`` for whatever it is, and a quality.

    Images that have the codec already stay as they are, unless a quality is given. ``raw`` is
    nothing that other programs read, and becomes PNG.

    Raises:
        UsageError: there is no such codec, or it has no such quality.
    """

    codec: str = "stored"
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UsageError(f"codec: expected {', '.join(CODECS)}, found {self.codec!r}")
        if self.quality is None:
            return
        if self.codec == "stored":
            raise UsageError("a quality is for images that are encoded anew: name jpeg or webp")
        if self.codec == "png":
            raise UsageError("png is lossless and has no quality: leave it out, or name jpeg")
        if not 1 <= self.quality <= 100:
            raise UsageError(f"quality: expected 1 to 100, found {self.quality}")

    def encoded(self, release: Release, row: Row) -> tuple[bytes, str]:
        """Give an image's bytes and their codec.

        Raises:
            IntegrityError: the image is damaged.
            UsageError: the codec takes no such image.
        """
        if self._keeps(row["codec"]):
            return release.payload(row), row["codec"]
        try:
            return self._encode(release.array(row)), self._target
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{row['synset']} {row['number']} cannot be {self._target}: {error}; "
                "choose another codec"
            ) from None

    def text(self, stored: set[str]) -> str | None:
        """Say how images that were stored in these codecs are encoded; None if as before."""
        if all(map(self._keeps, stored)):
            return None
        before = stored & set(EXTENSIONS)
        anew = f", anew from {' and '.join(sorted(before))}" if before else ""
        quality = self._options.get("quality")
        return f"{self._target}, {f'quality {quality}' if quality else 'lossless'}{anew}"

    @property
    def _target(self) -> str:
        return "png" if self.codec == "stored" else self.codec

    @property
    def _options(self) -> dict[str, Any]:
        if self.quality is None and self._target in LOSSLESS:
            return LOSSLESS[self._target]
        return {"quality": self.quality or JPEG_QUALITY}

    def _keeps(self, codec: str) -> bool:
        if self.codec == "stored":
            return codec != "raw"
        return codec == self.codec and self.quality is None

    def _encode(self, pixels: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, self._target, **self._options)
        return buffer.getvalue()
