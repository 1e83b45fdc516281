"""Picture files in a folder: find them, and check that each is whole, without trusting any."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from PIL import Image, UnidentifiedImageError

from sdwn.errors import IntegrityError, UsageError
from sdwn.io import is_stray
from sdwn.storage.images import decode, open_image

MOST_BYTES = 256 * 2**20
MOST_PIXELS = 64_000_000

# Pictures that are checked at a time, for each thread.
GROUP = 32

# By Pillow's names; MPO is a camera's JPEG with more pictures behind it.
_CODECS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}

# What lies beside pictures and is nobody's picture.
_IGNORED = {"readme.md", ".csv", ".json", ".jsonl", ".parquet"}


class UnfitError(Exception):
    """A file that cannot be taken; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The content of a folder, by names relative to it: picture files and texts.

    ``skipped`` has what is left out, with the reason; ``ignored`` counts by name the folders that
    hold no pictures of anybody's, such as ``@eaDir``. With ``follow_links``, links count as what
    they lead to, wherever that is.
    """

    root: Path
    follow_links: bool
    pictures: tuple[str, ...]
    texts: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    ignored: dict[str, int]

    def read(self, name: str, most: int) -> bytes:
        """Read a file of at most so many bytes.

        Raises:
            UnfitError: it is empty, too large, no plain file, or a link that leaves the folder.
            OSError: it cannot be read.
        """
        path = self.root / name
        if path.is_symlink():
            try:
                target = path.resolve(strict=True)
            except (OSError, RuntimeError):  # the second is for links that go round in circles
                raise UnfitError("a broken link") from None
            if not self.follow_links and not target.is_relative_to(self.root.resolve()):
                raise UnfitError("a link that leaves the folder; --follow-links takes it")
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


def explore(source: Path, follow_links: bool = False) -> Tree:
    """List a folder's files by name alone; hidden ones are left out.

    A folder that several names lead to is read once, under a name that is no link if it has one:
    links may go round in circles.

    Raises:
        UsageError: it is no folder.
    """
    if not source.is_dir():
        raise UsageError(f"{source}: expected a folder of pictures, found none")
    files, skipped, ignored = list[str](), list[tuple[str, str]](), Counter[str]()
    # Not by recursion, as os.walk does it up to Python 3.11: folders may lie a thousand deep.
    folders, links, known = [""], list[str](), set[tuple[int, int]]()
    while folders or links:
        if not folders:
            folders, links = sorted(links, reverse=True), []
        inside = folders.pop()
        try:
            found = (source / inside).stat()
            if follow_links and (found.st_dev, found.st_ino) in known:
                skipped.append((inside, "a link to a folder that has another name here"))
                continue
            known.add((found.st_dev, found.st_ino))
            with os.scandir(source / inside) as entries:
                seen = list(entries)
        except OSError as error:
            skipped.append((inside, _reason(error)))
            continue
        for entry in seen:
            name = os.path.join(inside, entry.name)  # noqa: PTH118 - pathlib takes longer
            linked, hidden = _links_a_folder(entry), entry.name[0] == "." or is_stray(entry.name)
            if not (linked or entry.is_dir(follow_symlinks=False)):
                lower = entry.name.lower()
                if not hidden and not {lower, PurePath(lower).suffix} & _IGNORED:
                    files.append(name)
            elif hidden:
                ignored[shown(entry.name)] += 1
            elif not linked:
                folders.append(name)
            elif follow_links:
                links.append(name)
            else:
                skipped.append((name, "a link to a folder; --follow-links takes it"))
    texts = {name for name in files if name.lower().endswith(".txt")}
    pictures = sorted(name for name in files if name not in texts)
    return Tree(
        source, follow_links, tuple(pictures), tuple(sorted(texts)), tuple(skipped), dict(ignored)
    )


def _links_a_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link that goes round in circles is read, and fails, as a file
        return False


def examine(tree: Tree, names: Sequence[str]) -> Iterator[tuple[str, Picture | str]]:
    """Read and decode files in threads; give each name with its picture, or why it is none."""
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads, "examine") as pool:
        # By groups: a future for each of millions of files would take gigabytes.
        for start in range(0, len(names), GROUP * threads):
            group = names[start : start + GROUP * threads]
            yield from zip(group, pool.map(partial(_examine, tree), group), strict=True)


def _examine(tree: Tree, name: str) -> Picture | str:
    try:
        return _picture(name, tree.read(name, MOST_BYTES))
    except (UnfitError, IntegrityError) as error:
        return " ".join(str(error).split())
    except OSError as error:
        return _reason(error)
    except Exception as error:  # Pillow raises errors of any kind at bytes that are damaged
        return f"cannot be decoded: {' '.join(repr(error).split())}"


def _picture(name: str, payload: bytes) -> Picture:
    codec, width, height = _header(payload)
    image = decode(payload, codec, width, height)
    # getbbox() finds what is not zero.
    black = image.getbbox() is None
    digest = hashlib.sha256(payload).digest()
    return Picture(name, len(payload), digest, codec, *image.size, black)


def _header(payload: bytes) -> tuple[str, int, int]:
    """Tell codec and size by the content, before any pixel is decoded."""
    too_large = f"expected at most {MOST_PIXELS // 10**6} million pixels"
    try:
        with open_image(payload, "jpeg", "png", "webp") as image:
            (width, height), codec = image.size, _CODECS[str(image.format)]
    except UnidentifiedImageError:
        raise UnfitError("expected a JPEG, PNG or WebP image, found none") from None
    except Image.DecompressionBombError:
        raise UnfitError(f"{too_large}, found far more") from None
    if width * height > MOST_PIXELS:
        raise UnfitError(f"{too_large}, found {width}x{height}")
    return codec, width, height


def read_again(tree: Tree, picture: Picture) -> bytes:
    """Read a picture that was examined.

    Raises:
        IntegrityError: it is not what it was.
    """
    try:
        payload = tree.read(picture.name, MOST_BYTES)
    except (UnfitError, OSError):
        payload = b""
    if hashlib.sha256(payload).digest() != picture.sha256:
        where = shown(str(tree.root / picture.name))
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
