"""Picture files in a folder: find them, and check that each is whole, without trusting any."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from PIL import Image, UnidentifiedImageError

from sdwn.errors import IntegrityError, UsageError
from sdwn.storage.images import decode

MOST_BYTES = 256 * 2**20
MOST_PIXELS = 64_000_000

# Pictures that are checked at a time, for each thread.
GROUP = 32

# By Pillow's names; MPO is a camera's JPEG with more pictures behind it.
_CODECS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}

# What lies beside pictures and is nobody's picture.
_IGNORED_NAMES = {"thumbs.db", "desktop.ini", "readme.md"}
_IGNORED_SUFFIXES = {".csv", ".json", ".jsonl", ".parquet"}


class UnfitError(Exception):
    """A file that cannot be taken; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Tree:
    """What a folder holds, by names relative to it: files, texts, and what cannot be entered."""

    pictures: tuple[str, ...]
    texts: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A whole picture: its name relative to its source, and what its bytes are."""

    name: str
    size: int
    sha256: bytes
    codec: str
    width: int
    height: int
    black: bool


def explore(source: Path) -> Tree:
    """List a folder's files by name alone; hidden ones are left out, no linked folder entered.

    Raises:
        UsageError: it is no folder.
    """
    if not source.is_dir():
        raise UsageError(f"{source}: expected a folder of pictures, found none")
    found = list(_walk(source))
    skipped = tuple((name, reason) for name, reason in found if reason)
    files = [name for name, reason in found if not reason]
    texts = {name for name in files if name.lower().endswith(".txt")}
    pictures = sorted(name for name in files if name not in texts)
    return Tree(tuple(pictures), tuple(sorted(texts)), skipped)


def _walk(source: Path) -> Iterator[tuple[str, str]]:
    """Yield each file, and each folder that cannot be entered with the reason."""
    # Not by recursion, as os.walk does it up to Python 3.11: folders may lie a thousand deep.
    folders = [""]
    while folders:
        inside = folders.pop()
        try:
            with os.scandir(source / inside) as entries:
                seen = [entry for entry in entries if not _is_ignored(entry.name)]
        except OSError as error:
            yield inside, _reason(error)
            continue
        for entry in seen:
            name = os.path.join(inside, entry.name)  # noqa: PTH118 - pathlib takes longer
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            else:
                yield name, "a link to a folder; none is followed" if _links_a_folder(entry) else ""


def _links_a_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link that goes round in circles is read, and fails, as a file
        return False


def _is_ignored(name: str) -> bool:
    lower = name.lower()
    suffix = PurePath(lower).suffix
    return name.startswith(".") or lower in _IGNORED_NAMES or suffix in _IGNORED_SUFFIXES


def examine(source: Path, names: Sequence[str]) -> Iterator[tuple[str, Picture | str]]:
    """Read and decode files in threads; give each name with its picture, or why it is none."""
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads, "examine") as pool:
        # By groups: a future for each of millions of files would take gigabytes.
        for start in range(0, len(names), GROUP * threads):
            group = names[start : start + GROUP * threads]
            yield from zip(group, pool.map(partial(_examine, source), group), strict=True)


def _examine(source: Path, name: str) -> Picture | str:
    try:
        return _picture(source, name)
    except (UnfitError, IntegrityError) as error:
        return " ".join(str(error).split())
    except OSError as error:
        return _reason(error)
    except Exception as error:  # Pillow raises errors of any kind at bytes that are damaged
        return f"cannot be decoded: {' '.join(repr(error).split())}"


def _picture(source: Path, name: str) -> Picture:
    payload = read_file(source, name, MOST_BYTES)
    codec, width, height = _header(payload)
    # getbbox() finds what is not zero.
    black = decode(payload, codec, width, height).getbbox() is None
    digest = hashlib.sha256(payload).digest()
    return Picture(name, len(payload), digest, codec, width, height, black)


def _header(payload: bytes) -> tuple[str, int, int]:
    """Tell codec and size by the content, before any pixel is decoded."""
    too_large = f"expected at most {MOST_PIXELS // 10**6} million pixels"
    try:
        with Image.open(io.BytesIO(payload), formats=["jpeg", "png", "webp"]) as image:
            (width, height), codec = image.size, _CODECS[str(image.format)]
    except UnidentifiedImageError:
        raise UnfitError("expected a JPEG, PNG or WebP image, found none") from None
    except Image.DecompressionBombError:
        raise UnfitError(f"{too_large}, found far more") from None
    if width * height > MOST_PIXELS:
        raise UnfitError(f"{too_large}, found {width}x{height}")
    return codec, width, height


def read_file(source: Path, name: str, most: int) -> bytes:
    """Read a file that lies in a folder, of at most so many bytes.

    Raises:
        UnfitError: it is empty, too large, no plain file, or a link that leaves the folder.
        OSError: it cannot be read.
    """
    path = source / name
    if path.is_symlink():
        _require_inside(path, source)
    # To open a device may already do something, and to open a pipe may wait for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise UnfitError("no plain file")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise UnfitError("empty")
        if size > most:
            raise UnfitError(f"expected at most {most:,} bytes, found {size:,}")
        return file.read(most)


def _require_inside(link: Path, source: Path) -> None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # the second is for links that go round in circles
        raise UnfitError("a broken link") from None
    if not target.is_relative_to(source.resolve()):
        raise UnfitError("a link that leaves the folder")


def read_again(source: Path, picture: Picture) -> bytes:
    """Read a picture that was examined.

    Raises:
        IntegrityError: it is not what it was.
    """
    try:
        payload = read_file(source, picture.name, MOST_BYTES)
    except (UnfitError, OSError):
        payload = b""
    if hashlib.sha256(payload).digest() != picture.sha256:
        where = shown(str(source / picture.name))
        raise IntegrityError(f"{where}: changed while it was imported; run it again")
    return payload


def shown(name: str) -> str:
    r"""Write a file's name as text; its bytes that are no UTF-8 become escapes.

    >>> shown("caf\udce9.png")
    'caf\\xe9.png'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
