"""Import of a folder of images from anywhere as a release, their bytes unchanged.

::

    list_source --> labels --> _check_image --> numbers --> parts --> write_release
    (file names)   (concept,   (decode, hash)   (in the    (whole     (reads each image
                    prompt)                      concept)   concepts)  a second time)

Nothing in the folder is trusted: files may be damaged, huge, pipes, or links to anywhere. What
cannot be taken is left out, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from PIL import UnidentifiedImageError

import sdwn
from sdwn import io
from sdwn.errors import IntegrityError, SdwnError, UsageError, first_lines
from sdwn.exchange.export import path_name
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import Concept
from sdwn.planning.tables import synset_columns
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import build, require_free
from sdwn.releases.writer import Origin, Part, cut_parts, write_release
from sdwn.storage.codecs import CODECS, EXCHANGED
from sdwn.storage.columns import to_columns
from sdwn.storage.images import decode, open_image
from sdwn.storage.shards import AHEAD, DECODERS, write_images
from sdwn.wordnet import corpus
from sdwn.wordnet.corpus import class_index, classes_by_name
from sdwn.wordnet.taxonomy import taxonomy_table

MOST_BYTES = 256 * 2**20
MOST_PIXELS = 64_000_000
MOST_TEXT_BYTES = 64 * 2**10

_BY_PILLOW_FORMAT = {kind: name for name in EXCHANGED for kind in CODECS[name].pillow_formats}
# What often lies beside images, and is neither an image nor a text of one.
_IGNORED = {"readme.md", ".csv", ".json", ".jsonl", ".parquet"}

_NUMBER = re.compile(r"(?:^|[_\- ])([0-9]+)\Z")
_WNID = re.compile(r"\bn[0-9]{8}(?![0-9A-Za-z])")
_OFFSET = re.compile(r"\b[0-9]{8}\b")
# WordNet's names have no other characters; NLTK prints them as Synset('dog.n.01').
_NAME = re.compile(r"(?<![\w.'/-])(?:Synset\(['\"])?([\w.'/-]+\.n\.(?!00)[0-9]{2})\b(?:['\"]\))?")
_FIELD = re.compile(r"^[ \t]*(prompt|label|id)[ \t]*[:=](.*)$", re.IGNORECASE | re.MULTILINE)
_KEY = re.compile(r"^[ \t]*(?:synset|wnid)[ \t]*[:=]", re.IGNORECASE | re.MULTILINE)


class UnfitError(Exception):
    """A file that cannot be taken; the message is the reason."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """The layout of a source, one of ``FORMATS``, and what its user knows of the images."""

    format: str
    part_bytes: int = io.PART_BYTES
    source: str | None = None  # where they are from
    licence: str | None = None  # in words, or as dataset hubs name it


class Imported(NamedTuple):
    """A release of imported images, and the files that were left out, with the reasons."""

    release: Release
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """The content of a folder, by names relative to it: files that may be images, and texts."""

    root: Path
    follow_links: bool
    images: tuple[str, ...]
    texts: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]  # what is left out, with the reason
    ignored: dict[str, int]  # by name, the folders without images of the user, such as @eaDir

    def __len__(self) -> int:
        return len(self.images) + len(self.skipped)

    def read(self, name: str, most: int) -> bytes:
        """Read a file of at most so many bytes, with an UnfitError for whatever prevents it."""
        path = self.root / name
        try:
            if path.is_symlink() and not self.follow_links:
                real = Path(os.path.realpath(path))  # also of links that go round in circles
                if not real.is_relative_to(self.root.resolve()):
                    raise UnfitError("a link that leaves the folder; --follow-links takes it")
            content = io.read_whole(path, most)
        except OSError as error:
            raise UnfitError(error.strerror) from None
        except SdwnError as error:
            raise UnfitError(str(error).removeprefix(f"{path}: ")) from None
        if not content:
            raise UnfitError("empty")
        return content


class SourceImage(NamedTuple):
    """A whole image: its name relative to its source, its label, its bytes' number and record."""

    name: str
    label: Label
    size: int
    row: dict[str, Any]


class Label(NamedTuple):
    """A concept, and the prompts of a text; ``stem`` is how the names of its images start."""

    concept: Concept
    prompts: tuple[str, ...] = ()
    stem: str = ""


def import_images(
    folder: SourceFolder,
    target: ReleasePaths,
    options: ImportOptions,
    advance: io.Advance = lambda _: None,
) -> Imported:
    """Write the release of a folder of images; run again after a kill, it resumes.

    ``advance`` is called for each file that was looked at, ``len(folder)`` times.
    """
    if target.root.resolve().is_relative_to(folder.root.resolve()):
        raise UsageError(f"{target.root} lies in {folder.root}, its source; choose another folder")
    require_free(target.root)
    found, left_out = _gather(folder, options.format, advance)
    skipped = tuple(sorted((escaped_name(name), reason) for name, reason in left_out))
    if not found:
        lines = [f"{folder.root}: expected images with labels, found none that is readable"]
        lines += first_lines([f"{name}: {reason}" for name, reason in skipped], 5)
        raise UsageError("\n".join(lines))
    groups = [images for _, images in sorted(found.items())]
    # Where texts of a concept differ, its own prompt is the first one's.
    planned = [group[0].label.concept for group in groups]
    wnids = [concept.wnid for concept in planned if concept.wnid]
    taxonomy = None
    with suppress(SdwnError):  # no folder names a synset where there is no WordNet
        taxonomy = taxonomy_table(wnids, corpus.open_wordnet()) if wnids else None
    record = {"origin": "import", "source": options.source, "licence": options.licence}
    record["catalog"] = f"imported from {escaped_name(folder.root.name)}"
    origin = Origin(record, imported=planned, skipped=skipped, taxonomy=taxonomy)
    fill = partial(write_release, origin=origin, parts=_parts(folder, groups, options.part_bytes))
    build(target.root, {"import": str(folder.root), "format": options.format}, fill)
    return Imported(Release(target.root), skipped)


def list_source(source: Path, follow_links: bool = False) -> SourceFolder:
    """List a folder's files by name alone; hidden ones are left out.

    Links are followed out of the source alone, and once: they may go round in circles.
    """
    if not source.is_dir():
        raise UsageError(f"{source}: expected a folder of images, found none")
    files, skipped, ignored = list[str](), list[tuple[str, str]](), Counter[str]()
    root = source.resolve()
    known = {root}
    if source.is_symlink():
        root = source.parent.resolve() / source.name  # a link's own name may be the wnid

    def unreadable(error: OSError) -> None:
        skipped.append((os.path.relpath(error.filename, root), str(error.strerror)))

    for here, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        inside = "" if here == str(root) else f"{os.path.relpath(here, root)}/"
        for name in (*folders,):
            path = Path(here, name)
            target = path.resolve() if path.is_symlink() else None
            if name[0] == "." or io.is_stray(name):
                ignored[escaped_name(name)] += 1
            elif target is None:
                continue
            elif not follow_links:
                skipped.append((inside + name, "a link to a folder; --follow-links takes it"))
            elif any(target.is_relative_to(one) or one.is_relative_to(target) for one in known):
                skipped.append((inside + name, "a link to a folder that has another name here"))
            else:
                known.add(target)
                continue
            folders.remove(name)
        for name in names:
            kinds = {name.lower(), PurePath(name.lower()).suffix}
            if name[0] != "." and not io.is_stray(name) and not kinds & _IGNORED:
                files.append(inside + name)
    texts = tuple(sorted(name for name in files if name.lower().endswith(".txt")))
    images = tuple(sorted(set(files) - set(texts)))
    return SourceFolder(root, follow_links, images, texts, tuple(skipped), dict(ignored))


def _gather(
    folder: SourceFolder, layout: str, advance: io.Advance
) -> tuple[dict[str, list[SourceImage]], list[tuple[str, str]]]:
    """Label and check every file; return images by id, and the files left out, with reasons."""
    skipped, labels = [*folder.skipped], dict[str, Label]()
    label_of = _LABELS[layout](folder)
    for name in folder.images:
        try:
            labels[name] = label_of(name)
        except UnfitError as error:
            skipped.append((name, str(error)))
    for _ in skipped:
        advance(1)
    images = defaultdict[str, list[SourceImage]](list)
    # The first of images of the same name and bytes is kept. Bytes alone are no reason to leave
    # one out: a run's black images all have the same.
    first = dict[tuple[str, str, bytes], SourceImage]()
    checked = io.in_threads(partial(_check_image, folder), labels.items(), DECODERS, AHEAD)
    for name, found in zip(labels, checked, strict=True):
        advance(1)
        if isinstance(found, str):
            skipped.append((name, found))
            continue
        id_ = found.label.concept.id
        twin = first.setdefault((id_, stem(name).casefold(), found.row["sha256"]), found)
        if twin is found:
            images[id_].append(found)
        else:
            same = f"duplicate: {escaped_name(twin.name)} has the same name and bytes"
            skipped.append((name, same))
    return images, skipped


def _check_image(folder: SourceFolder, labelled: tuple[str, Label]) -> SourceImage | str:
    """Read and decode a file; return its image, or the reason why it is not one."""
    name, label = labelled
    try:
        payload = folder.read(name, MOST_BYTES)
        # Codec and size by the content, before any pixel is decoded.
        with open_image(payload, *EXCHANGED) as header:
            (width, height), codec = header.size, _BY_PILLOW_FORMAT[str(header.format)]
        if width * height > MOST_PIXELS:
            most = f"{MOST_PIXELS // 10**6} million pixels"
            raise UnfitError(f"expected at most {most}, found {width}x{height}")
        image = decode(payload, codec, width, height)
    except UnidentifiedImageError:
        return "expected a JPEG, PNG or WebP image, found none"
    except Exception as error:  # Pillow raises errors of any kind at bytes that are damaged
        return " ".join(str(error).split()) or f"cannot be decoded: {error!r}"
    # getbbox() finds what is not zero.
    status, digest = "unknown" if image.getbbox() else "black", hashlib.sha256(payload).digest()
    concept = label.concept
    row: dict[str, Any] = {"id": concept.id, "wnid": concept.wnid or ""}
    row |= {"synset": concept.synset or "", "file": escaped_name(name), "task_run": 0}
    row |= {"status": status, "width": image.width, "height": image.height, "codec": codec}
    return SourceImage(name, label, len(payload), {**row, "sha256": digest})


def _parts(
    folder: SourceFolder, groups: list[list[SourceImage]], part_bytes: int
) -> Iterator[Part]:
    """Yield the parts, of whole concepts and at least ``part_bytes`` each."""
    task_run = {"imported_with": f"sdwn {sdwn.__version__}", "host": socket.gethostname()}
    task_run["started"] = io.now()

    def reread(image: SourceImage) -> bytes:
        payload = b""
        with suppress(UnfitError):
            payload = folder.read(image.name, MOST_BYTES)
        if hashlib.sha256(payload).digest() != image.row["sha256"]:
            where = escaped_name(str(folder.root / image.name))
            raise IntegrityError(f"{where}: changed while it was imported; run it again")
        return payload

    sizes = [sum(image.size for image in images) for images in groups]
    for first, last in cut_parts(sizes, part_bytes):
        images = [image for group in groups[first:last] for image in _numbered(group)]
        rows = [image.row for image in images]
        # The records name every file by its SHA-256.
        inputs = hashlib.sha256(json.dumps(rows, default=bytes.hex).encode()).hexdigest()
        contents = to_columns(rows), [image.size for image in images], [task_run]
        write = partial(write_images, contents=contents, payloads=map(reread, images))
        yield {"rows": inputs}, write, ""


def _numbered(images: list[SourceImage]) -> list[SourceImage]:
    """Number a concept's images by their names if these have distinct numbers, or else from 0."""
    tails = [stem(image.name).removeprefix(image.label.stem) for image in images]
    numbers = [int(match[1]) for tail in tails if (match := _NUMBER.search(tail))]
    if len(set(numbers)) < len(images) or max(numbers) >= 2**32:
        numbers = list(range(len(images)))
    for image, number in zip(images, numbers, strict=True):
        image.row["number"] = number
        if prompts := image.label.prompts:
            image.row["prompt"] = prompts[number % len(prompts)]
    return sorted(images, key=lambda image: image.row["number"])


# --- Labels, by the names of folders or by texts beside the images -----------------------------

# Returns a file's label, or raises an UnfitError that says why it has none.
Labeller = Callable[[str], Label]


def label_by_names(folder: SourceFolder) -> Labeller:
    """Label a file by the wnid that the name of its nearest folder, or its own, starts with.

    ``n02084071-dog/a/b.jpg`` and ``n02084071_b.jpg`` are of n02084071. Without a wnid, the name of
    the folder that a file lies in is its label.
    """

    def label_of(name: str) -> Label:
        *folders, own = PurePosixPath(folder.root.name, name).parts
        starts = (re.match(r"n[0-9]{8}(?![0-9])", part) for part in (*reversed(folders), own))
        if found := next(filter(None, starts), None):
            return Label(_find(found[0]))
        if len(folders) == 1:
            raise UnfitError("it lies in no folder, and its own name starts with no wnid")
        written = io.canonical(escaped_name(folders[-1]))  # as an export writes it, or anybody else
        read = unquote(written)
        return Label(_of_label(read if path_name(read) == written else written))

    return label_of


def label_by_texts(folder: SourceFolder) -> Labeller:
    """Label a file by the text beside it: the only one, or that of its name without a number."""
    beside: dict[str, dict[str, str]] = defaultdict(dict)
    for text in folder.texts:
        beside[str(PurePosixPath(text).parent)].setdefault(stem(text), text)
    read = cache(partial(_read_label, folder))

    def label_of(name: str) -> Label:
        texts, own = beside.get(str(PurePosixPath(name).parent), {}), stem(name)
        if len(texts) == 1:
            (own,) = texts
        while own not in texts and own[-1:] in (*"0123456789_- ",):
            own = own[:-1]
        if own not in texts:
            raise UnfitError("no text beside it belongs to it")
        try:
            return read(texts[own])
        except UnfitError as error:
            raise UnfitError(f"{escaped_name(texts[own])}: {error}") from None

    return label_of


_LABELS = {"folders": label_by_texts, "imagefolder": label_by_names}
FORMATS = tuple(_LABELS)


def stem(name: str) -> str:
    """Return a file's name, composed, without folder and ending; a synset's sense is no ending."""
    return io.canonical(re.sub(r"\.[A-Za-z]\w*\Z", "", PurePosixPath(name).name))


def _read_label(folder: SourceFolder, name: str) -> Label:
    """Read concept and prompts; whatever names a synset in the text must name the same one."""
    try:
        text = io.decode_text(folder.read(name, MOST_TEXT_BYTES))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UnfitError("expected UTF-8 text without zero bytes")
    own, prompts, rest = dict[str, str](), list[str](), _FIELD.sub("", text)
    for key, value in _FIELD.findall(text):
        if key.lower() == "prompt":
            prompts.append(value.strip())
        else:
            own[key.lower()] = " ".join(value.split())
    if not prompts:  # what is left of the text when all names are gone
        prompt = rest
        for pattern in (_KEY, _NAME, _WNID if _WNID.search(text) else _OFFSET):
            prompt = pattern.sub(" ", prompt)
        prompts = [" ".join(prompt.split())]
    wnids = set(_WNID.findall(rest)) or {f"n{offset}" for offset in _OFFSET.findall(rest)}
    named = {text: _find(text) for text in sorted({*wnids, *_NAME.findall(rest)})}
    if len({concept.id for concept in named.values()}) > 1:
        meant = ", ".join(f"{text} is {found.name} {found.id}" for text, found in named.items())
        raise UnfitError(f"expected one synset, found several: {meant}")
    concept = next(iter(named.values()), None)
    if id_ := own.get("id") or own.get("label"):
        label = own.get("label", "")
        concept = replace(concept or _of_label(label), id=_as_id(id_), label=label)
    if concept is None:
        raise UnfitError("expected a synset such as dog.n.01 or a wnid such as n02084071")
    concept = replace(concept, prompts=tuple(filter(None, prompts)))
    return Label(concept, tuple(prompts), stem(name))


def _find(identifier: str) -> Concept:
    try:
        found = corpus.open_wordnet().synset(identifier)
    except UsageError as error:
        raise UnfitError(str(error).partition(";")[0]) from None
    columns = synset_columns([found])
    return Concept(found.wnid, **{name: values[0] for name, values in columns.items()})


def _of_label(label: str) -> Concept:
    """Return the concept of a label, with the wnid of the only ImageNet class that has it."""
    classes = classes_by_name().get(label.replace("_", " ").lower(), [])
    wnid = classes[0] if len(classes) == 1 else None
    return Concept(_as_id(label), label, wnid, imagenet_class=class_index().get(wnid or ""))


def _as_id(text: str) -> str:
    # As in a table of prompts, it can name a folder.
    fits = text.isprintable() and "/" not in text and text not in (".", "..")
    return text if fits and len(text.encode()) <= 150 else path_name(text)


def escaped_name(name: str) -> str:
    """Return a file's name as text; its bytes that are no UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
