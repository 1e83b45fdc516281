"""A folder of images to import: its files, their synsets and prompts, and checks of each image.

Nothing in the folder is trusted: files may be damaged, huge, pipes, or links to anywhere. What
cannot be taken is left out, with the reason.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath, PurePosixPath

from PIL import Image, UnidentifiedImageError

from sdwn.errors import IntegrityError, UsageError
from sdwn.io import canonical, decode_text, is_stray
from sdwn.storage.codecs import CODECS, EXCHANGED
from sdwn.storage.images import decode, open_image
from sdwn.wordnet.corpus import Synset, shared_wordnet

MOST_BYTES = 256 * 2**20
MOST_PIXELS = 64_000_000
MOST_TEXT_BYTES = 64 * 2**10

_BY_PILLOW_FORMAT = {kind: name for name in EXCHANGED for kind in CODECS[name].pillow_formats}
# What often lies beside images, and is neither an image nor a text of one.
_IGNORED = {"readme.md", ".csv", ".json", ".jsonl", ".parquet"}

_WNID = re.compile(r"\bn[0-9]{8}(?![0-9A-Za-z])")
_OFFSET = re.compile(r"\b[0-9]{8}\b")
# WordNet's names have no other characters; NLTK prints them as Synset('dog.n.01').
_NAME = re.compile(r"(?<![\w.'/-])(?:Synset\(['\"])?([\w.'/-]+\.n\.(?!00)[0-9]{2})\b(?:['\"]\))?")
_FIELD = re.compile(r"^[ \t]*(prompt|synset|wnid)[ \t]*[:=][ \t]*", re.IGNORECASE | re.MULTILINE)


class UnfitError(Exception):
    """A file that cannot be taken; the message is the reason."""


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """The content of a folder, by names relative to it: files that may be images, and texts.

    ``skipped`` has what is left out, with the reason; ``ignored`` counts by name the folders that
    hold no images of the user, such as ``@eaDir``. With ``follow_links``, links count as what
    they lead to, wherever that is.
    """

    root: Path
    follow_links: bool
    images: tuple[str, ...]
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


def list_source(source: Path, follow_links: bool = False) -> SourceFolder:
    """List a folder's files by name alone; hidden ones are left out.

    A folder that several names lead to is read once, under a name that is no link if it has one:
    links may go round in circles.

    Raises:
        UsageError: it is no folder.
    """
    if not source.is_dir():
        raise UsageError(f"{source}: expected a folder of images, found none")
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
            hidden = entry.name[0] == "." or is_stray(entry.name)
            linked = False
            with suppress(
                OSError
            ):  # a link that goes round in circles is read, and fails, as a file
                linked = entry.is_symlink() and entry.is_dir()
            if not (linked or entry.is_dir(follow_symlinks=False)):
                lower = entry.name.lower()
                if not hidden and not {lower, PurePath(lower).suffix} & _IGNORED:
                    files.append(name)
            elif hidden:
                ignored[escaped_name(entry.name)] += 1
            elif not linked:
                folders.append(name)
            elif follow_links:
                links.append(name)
            else:
                skipped.append((name, "a link to a folder; --follow-links takes it"))
    texts = tuple(sorted(name for name in files if name.lower().endswith(".txt")))
    images = tuple(sorted(set(files) - set(texts)))
    return SourceFolder(source, follow_links, images, texts, tuple(skipped), dict(ignored))


@dataclass(frozen=True, slots=True)
class SourceImage:
    """A whole image: its name relative to its source, and what its bytes are."""

    name: str
    size: int
    sha256: bytes
    codec: str
    width: int
    height: int
    black: bool


def check_image(folder: SourceFolder, name: str) -> SourceImage | str:
    """Read and decode a file; return its image, or the reason why it is not one."""
    too_large = f"expected at most {MOST_PIXELS // 10**6} million pixels"
    try:
        payload = folder.read(name, MOST_BYTES)
        # Codec and size by the content, before any pixel is decoded.
        with open_image(payload, *EXCHANGED) as header:
            (width, height), codec = header.size, _BY_PILLOW_FORMAT[str(header.format)]
        if width * height > MOST_PIXELS:
            raise UnfitError(f"{too_large}, found {width}x{height}")
        image = decode(payload, codec, width, height)
        # getbbox() finds what is not zero.
        black = image.getbbox() is None
        digest = hashlib.sha256(payload).digest()
        return SourceImage(name, len(payload), digest, codec, *image.size, black)
    except UnidentifiedImageError:
        return "expected a JPEG, PNG or WebP image, found none"
    except Image.DecompressionBombError:
        return f"{too_large}, found far more"
    except (UnfitError, IntegrityError) as error:
        return " ".join(str(error).split())
    except OSError as error:
        return _reason(error)
    except Exception as error:  # Pillow raises errors of any kind at bytes that are damaged
        return f"cannot be decoded: {' '.join(repr(error).split())}"


def reread(folder: SourceFolder, image: SourceImage) -> bytes:
    """Read an image that was checked.

    Raises:
        IntegrityError: it is not what it was.
    """
    try:
        payload = folder.read(image.name, MOST_BYTES)
    except (UnfitError, OSError):
        payload = b""
    if hashlib.sha256(payload).digest() != image.sha256:
        where = escaped_name(str(folder.root / image.name))
        raise IntegrityError(f"{where}: changed while it was imported; run it again")
    return payload


@dataclass(frozen=True, slots=True)
class Label:
    """A synset and its prompt, None where unknown; ``stem`` is how its images' names start."""

    synset: Synset
    prompt: str | None = None
    stem: str = ""


Find = Callable[[str], Synset]
Labels = Iterator[tuple[str, Label | str]]


def label_imagefolder(folder: SourceFolder) -> Labels:
    """Yield each file with its label, by its nearest folder or else its own name; or why not."""
    find = _finder()

    @cache
    def label(wnid: str) -> Label | str:
        try:
            return Label(find(wnid))
        except UnfitError as error:
            return str(error)

    for name in folder.images:
        wnid = _wnid(PurePosixPath(folder.root.name, name))
        yield name, label(wnid) if wnid else "no folder's name, nor its own, starts with a wnid"


def _wnid(path: PurePosixPath) -> str | None:
    """Find a wnid that a folder's name, or else the file's, starts with.

    >>> _wnid(PurePosixPath("train/n02084071-dog/a/b.jpg")), _wnid(PurePosixPath("n02121620_b.jpg"))
    ('n02084071', 'n02121620')
    """
    starts = (re.match(r"n[0-9]{8}(?![0-9])", name) for name in (*path.parts[-2::-1], path.name))
    return next((start[0] for start in starts if start), None)


def label_folders(folder: SourceFolder) -> Labels:
    """Yield each file with its label by the text beside it; or why it has none."""
    beside: dict[str, dict[str, str]] = defaultdict(dict)
    for text in folder.texts:
        beside[str(PurePosixPath(text).parent)].setdefault(stem(text), text)
    find = _finder()

    @cache
    def label(text: str) -> Label | str:
        try:
            return _read_label(folder, text, find)
        except UnfitError as error:
            return f"{escaped_name(text)}: {error}"

    for name in folder.images:
        texts = beside.get(str(PurePosixPath(name).parent), {})
        owners = texts.values() if len(texts) == 1 else map(texts.get, _bases(stem(name)))
        owner = next(filter(None, owners), None)
        yield name, label(owner) if owner else "no text beside it belongs to it"


def _bases(name: str) -> Iterator[str]:
    """Yield a name, and what is left of it without a number at its end, the longest first.

    >>> list(_bases("dog.n.01_12"))
    ['dog.n.01_12', 'dog.n.01_1', 'dog.n.01_', 'dog.n.01']
    """
    yield name
    start = len(name.rstrip("0123456789"))
    yield from (name[:stop] for stop in range(len(name) - 1, start - 1, -1))
    if start < len(name) and name[:start].endswith(("_", "-", " ")):
        yield name[: start - 1]


def stem(name: str) -> str:
    """Return a file's name, composed, without folder and ending; a synset's sense is no ending.

    >>> stem("a/dog.n.01.png"), stem("dog.n.01_2")
    ('dog.n.01', 'dog.n.01_2')
    """
    return canonical(re.sub(r"\.[A-Za-z]\w*\Z", "", PurePosixPath(name).name))


def _read_label(folder: SourceFolder, name: str, find: Find) -> Label:
    """Read synset and prompt; whatever names a synset in the text must name the same one."""
    try:
        text = decode_text(folder.read(name, MOST_TEXT_BYTES))
    except OSError as error:
        raise UnfitError(_reason(error)) from None
    except UnicodeDecodeError:
        raise UnfitError("expected UTF-8 text") from None
    if "\0" in text:
        raise UnfitError("expected UTF-8 text, found a zero byte")
    # By the labels prompt:, synset: and wnid:, if there are any.
    head, *pairs = _FIELD.split(text)
    fields = [(key.lower(), value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)]
    prompts = [value.strip() for key, value in fields if key == "prompt"]
    others = [value for key, value in fields if key != "prompt"]
    if prompts and others:
        prompt, rest = "\n".join(prompts), "\n".join((head, *others))
    else:
        # Without both, the prompt is what is left of the text when all names are gone.
        prompt = rest = text
        for pattern in (_FIELD, _NAME, _WNID if _WNID.search(text) else _OFFSET):
            prompt = pattern.sub(" ", prompt)
        prompt = " ".join(prompt.split())
    wnids = set(_WNID.findall(rest)) or {f"n{offset}" for offset in _OFFSET.findall(rest)}
    named = {text: find(text) for text in sorted({*wnids, *_NAME.findall(rest)})}
    if not named:
        raise UnfitError("expected a synset such as dog.n.01 or a wnid such as n02084071")
    if len({synset.wnid for synset in named.values()}) > 1:
        meant = ", ".join(f"{text} is {found.name} {found.wnid}" for text, found in named.items())
        raise UnfitError(f"expected one synset, found several: {meant}")
    return Label(next(iter(named.values())), prompt, stem(name))


def _finder() -> Find:
    wordnet = shared_wordnet()

    def find(identifier: str) -> Synset:
        try:
            return wordnet.synset(identifier)
        except UsageError as error:
            raise UnfitError(str(error).partition(";")[0]) from None

    return find


def escaped_name(name: str) -> str:
    r"""Return a file's name as text; its bytes that are no UTF-8 become escapes.

    >>> escaped_name("caf\udce9.png")
    'caf\\xe9.png'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
