"""Encode and decode images."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdwn.config import StorageConfig
from sdwn.errors import IntegrityError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled image and what happened to it.

    ``pixels`` is RGB of shape (height, width, 3). ``status`` is ``ok``, ``nsfw`` (the safety
    checker blackened it) or ``nan`` (the model gave NaN; black). ``tokens`` counts the whole
    prompt's, start and end included; ``truncated`` says that the text encoder took fewer.
    ``redone`` says that it gave NaN in half precision and was sampled again, alone and in
    float32; ``vae_slicing`` that its batch was decoded one by one.
    """

    pixels: Pixels
    status: str
    tokens: int
    truncated: bool
    redone: bool = False
    vae_slicing: bool = False


CODECS = ("webp", "png", "jpeg", "raw")

# Effort 0 of lossless WebP: 2 to 10 times faster than PNG and a fifth smaller.
LOSSLESS: dict[str, dict[str, Any]] = {
    "webp": {"lossless": True, "method": 0},
    "png": {"compress_level": 1},
}


def encode(pixels: Pixels, storage: StorageConfig) -> bytes:
    """Encode an image, (height, width, 3) uint8 RGB; all codecs but JPEG are lossless."""
    if storage.codec == "raw":
        return np.ascontiguousarray(pixels).tobytes()
    options = LOSSLESS.get(storage.codec, {"quality": storage.quality})
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, storage.codec, **options)
    return buffer.getvalue()


def decode(payload: bytes, codec: str, width: int, height: int) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        IntegrityError: the bytes are no such image.
    """
    try:
        if codec not in CODECS:
            raise ValueError("no such codec")
        if codec == "raw":
            if len(payload) != 3 * width * height:
                raise ValueError(f"{len(payload)} bytes")
            return Image.frombytes("RGB", (width, height), payload)
        if codec == "webp" and (image := _decode_webp(payload)) is not None:
            if image.size != (width, height):
                raise ValueError(f"it is {image.width}x{image.height}")
            return image
        image = Image.open(io.BytesIO(payload), formats=[codec])
        # Before anything is decoded: a few bytes may claim to be an image of gigabytes.
        if image.size != (width, height):
            raise ValueError(f"it is {image.width}x{image.height}")
        image.load()
        return _rgb(image)
    except (OSError, ValueError, SyntaxError, OverflowError, Image.DecompressionBombError) as error:
        raise IntegrityError(f"expected a {codec} image, {width}x{height}: {error}") from None


def _decode_webp(payload: bytes) -> Image.Image | None:
    """Decode with torchvision, where it is loaded anyway: Pillow takes half as long again.

    None where it is not, or takes no such image: animations, and whatever is damaged.
    """
    if "torchvision.io" not in sys.modules:
        return None
    torch, vision = sys.modules["torch"], sys.modules["torchvision.io"]
    encoded = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else None
    try:
        pixels = vision.decode_webp(encoded, mode=vision.ImageReadMode.RGB)
    except (RuntimeError, TypeError, AttributeError):
        return None
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would cut off above 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
