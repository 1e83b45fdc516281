"""Images: encoded, decoded, and laid out on contact sheets."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngInfo

from sdwn.errors import IntegrityError
from sdwn.storage.codecs import CODECS

Pixels = NDArray[np.uint8]  # RGB of shape (height, width, 3)

# glibc gives an image's buffers back to the system and takes them anew for the next one, a third
# of the time of decoding, until one of up to 32 MB was freed (mallopt(3), M_MMAP_THRESHOLD).
np.empty(31 << 20, np.uint8)


# XMP of an image that a trained model made, in the words of IPTC.
MADE_BY_MODEL = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    b'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/'
    b'trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)


def encode(pixels: Pixels, codec: str, quality: int | None = None, xmp: bytes = b"") -> bytes:
    """Encode an image; without loss where the codec can and no quality is given."""
    how = CODECS[codec]
    if not how.pillow_formats:
        return np.ascontiguousarray(pixels).tobytes()
    quality = quality or how.default_quality
    options = how.lossless_options if quality is None else {"quality": quality}
    texts = PngInfo()
    if xmp:
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, how.pillow_formats[0], xmp=xmp, pnginfo=texts, **options)
    return buffer.getvalue()


def pixel_difference(one: Image.Image | Pixels, other: Image.Image | Pixels) -> tuple[float, int]:
    """Return the root mean square and the largest difference, in steps of 8-bit colour."""
    difference = np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other))
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64)))), int(difference.max())


_PNG = b"\x89PNG\r\n\x1a\n"


def decode(payload: bytes, codec: str, width: int, height: int) -> Image.Image:
    """Decode an image to RGB, turned as its EXIF orientation says.

    ``width`` and ``height`` are of the upright image; old imports recorded those of the stored one.
    """
    try:
        if codec in CODECS and not CODECS[codec].pillow_formats:
            if len(payload) != 3 * width * height:
                raise ValueError(f"{len(payload)} bytes")
            return Image.frombytes("RGB", (width, height), payload)
        image = open_image(payload, codec)
        # Before anything is decoded: a few bytes may claim to be an image of gigabytes.
        if image.size not in ((width, height), (height, width)):
            raise ValueError(f"it is {image.width}x{image.height}")
        stored = image.size
        image.load()
        exif = image.info.get("exif", b"")
        # Pillow warns of it though the alpha channel goes anyway.
        image.info.pop("transparency", None)
        if image.mode.startswith("I"):
            # 16 bits of grey, which Pillow would cut off above 255.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        upright = image.convert("RGB")
        if exif:
            with suppress(Exception):  # damaged EXIF says nothing
                told, orientation = Image.Exif(), Image.Exif()
                told.load(exif)
                orientation[Base.Orientation] = told.get(Base.Orientation, 1)
                upright.info = {"exif": orientation.tobytes()}
                upright = ImageOps.exif_transpose(upright)
        if (width, height) not in (upright.size, stored):
            raise ValueError(f"it is {upright.width}x{upright.height}")
        return upright
    except Exception as error:  # Pillow raises errors of any kind at bytes that are damaged
        raise IntegrityError(f"expected a {codec} image, {width}x{height}: {error}") from None


def undecodable(payload: bytes, codec: str, width: int, height: int) -> str | None:
    """Return why :func:`decode` cannot decode an image; None if it can."""
    try:
        decode(payload, codec, width, height)
    except IntegrityError as error:
        return str(error)
    return None


def open_image(payload: bytes, *codecs: str) -> Image.Image:
    """Read the header of an image of one of these codecs; no pixel is decoded yet."""
    if payload.startswith(_PNG):
        # Without texts and colour profiles: Pillow refuses an image with a large one.
        kept, start = [_PNG], len(_PNG)
        while start + 8 <= len(payload):
            length, kind = struct.unpack_from(">I4s", payload, start)
            stop = start + 12 + length  # length, kind, data, checksum
            if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
                kept.append(payload[start:stop])
            start = stop
        payload = b"".join(kept)
    # A camera's MPO is opened as the JPEG that it begins with.
    formats = [CODECS[codec].pillow_formats[0] for codec in codecs]
    return Image.open(io.BytesIO(payload), formats=formats)


PER_ROW = 10
CELL, LINE, GAP = 160, 24, 4  # pixels: of an image's cell, of a line of text, between both


def contact_sheet(
    title: str, images: int, cells: Iterable[tuple[Image.Image | None, str]]
) -> Image.Image:
    """Lay images with captions out, ten a row or more where they are hundreds; None is damaged."""
    # A WebP image may be 16,383 pixels high.
    columns = min(images, max(PER_ROW, math.isqrt(images)))
    height = LINE + math.ceil(images / columns) * (CELL + LINE)
    sheet = Image.new("RGB", (max(columns, 4) * CELL, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE * 2 // 3)
    pen.text((GAP, 0), " ".join(title.split()), "black", font)
    size = CELL - 2 * GAP
    for position, (image, caption) in enumerate(cells):
        row, column = divmod(position, columns)
        left, upper = column * CELL + GAP, LINE + row * (CELL + LINE)
        shown = image or Image.new("RGB", (size, size), "grey")
        sheet.paste(ImageOps.contain(shown, (size, size)), (left, upper))
        pen.text((left, upper + size + GAP), caption, "black", font)
    return sheet
