"""The image codecs: one table for every reader and writer of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ImageCodec:
    """An encoding of images."""

    name: str  # in configs and records
    extension: str  # of a file of one image, without the dot
    media_type: str | None  # what browsers call it; None where no other program reads it
    pillow_formats: tuple[str, ...]  # Pillow's names of it; none for plain pixels
    # Encoded size by quality, as a share of raw pixels; by 0 where it is lossless.
    size_ratios: Mapping[int, float]
    # Of Pillow's save(), for a codec that can be lossless; the quality, for one that cannot.
    lossless_options: Mapping[str, Any] = field(default_factory=dict)
    default_quality: int | None = None
    takes_quality: bool = False  # an export may ask for one, and lose something for it

    def size_ratio(self, quality: int | None) -> float:
        """Return the size to expect of photographs, as a share of raw pixels."""
        wanted = quality or self.default_quality or 0
        return next(ratio for known, ratio in sorted(self.size_ratios.items()) if wanted <= known)

    def loss(self, quality: int | None) -> str:
        """Return ``lossless`` or, as an example, ``quality 95``."""
        wanted = quality or self.default_quality
        return f"quality {wanted}" if wanted else "lossless"


# To add a codec: a row at the end, for files hold a codec's position. Size ratios are means over
# 300 photo-like images of 512x512; one photograph may take a third more or less. Those of JPEG
# beside 95 are in proportion to it, over ten.
CODECS = {
    codec.name: codec
    for codec in (
        ImageCodec(
            name="webp",
            extension="webp",
            media_type="image/webp",
            pillow_formats=("WEBP",),
            size_ratios={0: 0.415},
            # Least effort: twice as fast as PNG below, a quarter smaller. The quality is an effort,
            # too: at Pillow's 80 an image takes three times as long and is no smaller.
            lossless_options={"lossless": True, "method": 0, "quality": 0},
            takes_quality=True,
        ),
        ImageCodec(
            name="png",
            extension="png",
            media_type="image/png",
            pillow_formats=("PNG",),
            size_ratios={0: 0.564},
            lossless_options={"compress_level": 1},
        ),
        ImageCodec(
            name="jpeg",
            extension="jpg",
            media_type="image/jpeg",
            # MPO is a camera's JPEG with more images behind it.
            pillow_formats=("JPEG", "MPO"),
            size_ratios={50: 0.045, 75: 0.065, 85: 0.085, 90: 0.105, 95: 0.153, 100: 0.32},
            default_quality=95,
            takes_quality=True,
        ),
        # RGB, row by row.
        ImageCodec("raw", "rgb", media_type=None, pillow_formats=(), size_ratios={0: 1.0}),
    )
}
# What other programs read: the codecs of images that are exported and imported.
EXCHANGED = tuple(name for name, codec in CODECS.items() if codec.media_type)
