"""Pictures of anywhere become a release, their bytes as they are."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import sdwn
from sdwn.errors import UsageError
from sdwn.exchange.pictures import (
    Picture,
    Tree,
    examine,
    explore,
    read_again,
    shown,
)
from sdwn.exchange.sources import Label, folders, image_folder, stem
from sdwn.io import PART_BYTES, Advance, now
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import PlannedSynset
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import Building, build, require_free
from sdwn.releases.writer import Origin, ReleaseWriter, cut
from sdwn.storage.columns import table
from sdwn.storage.shards import Contents, write_images
from sdwn.wordnet.imagenet import class_index

if TYPE_CHECKING:
    from sdwn.wordnet.corpus import Synset

_LAYOUTS = {"folders": folders, "imagefolder": image_folder}
FORMATS = tuple(_LAYOUTS)

# Reasons that are told when nothing at all can be imported.
TOLD_REASONS = 5

_NUMBER = re.compile(r"(?:^|[_\- ])([0-9]+)\Z")


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How a source is laid out, one of ``FORMATS``, and what its user knows of the pictures.

    ``source`` says where they are from, ``licence`` under which terms, in words or as dataset
    hubs name it. Parts have at least ``part_bytes``. ``follow_links`` takes what links lead to.

    Raises:
        UsageError: there is no such format.
    """

    format: str
    part_bytes: int = PART_BYTES
    source: str | None = None
    licence: str | None = None
    follow_links: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format: expected {' or '.join(FORMATS)}, found {self.format!r}")


@dataclass(frozen=True, slots=True)
class Intake:
    """A release of imported pictures, and what was left out.

    ``skipped`` has each file with the reason, ``ignored`` counts folders by name, see
    :class:`Tree`.
    """

    release: Release
    skipped: tuple[tuple[str, str], ...]
    ignored: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Image:
    """A picture and its place in the release."""

    label: Label
    picture: Picture
    number: int

    def row(self) -> dict[str, Any]:
        """Write its record."""
        picture, label = self.picture, self.label
        prompt = {} if label.prompt is None else {"prompt": label.prompt}
        return {
            "wnid": label.synset.wnid,
            "synset": label.synset.name,
            "number": self.number,
            **prompt,
            "status": "black" if picture.black else "unknown",
            "session": 0,
            "width": picture.width,
            "height": picture.height,
            "codec": picture.codec,
            "sha256": picture.sha256,
            "file": shown(picture.name),
        }


@dataclass(frozen=True, slots=True)
class _Harvest:
    """The content of a source: labelled pictures by synset, and what was left out and why."""

    pictures: dict[Synset, list[tuple[Label, Picture]]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def count_pictures(source: Path, follow_links: bool = False) -> int:
    """Count the files that an import looks at, those that it will leave out included.

    Raises:
        UsageError: it is no folder.
    """
    tree = explore(source, follow_links)
    return len(tree.pictures) + len(tree.skipped)


def import_pictures(
    source: Path,
    target: ReleasePaths,
    options: ImportOptions,
    advance: Advance = lambda _: None,
) -> Intake:
    """Write the release of a folder of pictures; what a kill left unfinished is gone on with.

    ``advance`` is told of each file that was looked at, see :func:`count_pictures`.

    Raises:
        UsageError: there is nothing to import, or no place for the release.
        IntegrityError: a picture changed while it was imported.
    """
    root = _checked(source, target.root)
    tree = explore(root, options.follow_links)
    harvest = _gather(tree, options.format, advance)
    skipped = tuple(sorted((shown(name), reason) for name, reason in harvest.skipped))
    if not harvest.pictures:
        raise UsageError(f"{source}: {_nothing(skipped, tree.ignored)}")
    found = sorted(harvest.pictures.items(), key=lambda item: item[0].wnid)
    synsets = [_numbered(pictures) for _, pictures in found]
    # Where texts of a synset differ, its own prompt is the first one's.
    origin = _origin(root, options, [pictures[0][0] for _, pictures in found], skipped)

    def fill(building: Building) -> None:
        _fill(building, origin, tree, _parts(synsets, options.part_bytes))

    if not build(target.root, {"import": str(root), "format": options.format}, fill):
        require_free(target.root)
    return Intake(Release(target.root), skipped, tree.ignored)


def _checked(source: Path, target: Path) -> Path:
    if not source.is_dir():
        raise UsageError(f"{source}: expected a folder of pictures, found none")
    root = source.resolve()
    if target.resolve().is_relative_to(root):
        raise UsageError(f"{target} lies in {source}, which it is made of; choose another place")
    require_free(target)
    # A link's own name may be the wnid.
    return source.parent.resolve() / source.name if source.is_symlink() else root


def _nothing(skipped: Sequence[tuple[str, str]], ignored: Mapping[str, int]) -> str:
    reasons = [f"{name}: {reason}" for name, reason in skipped[:TOLD_REASONS]]
    more = [f"and {len(skipped) - TOLD_REASONS} more"] if len(skipped) > TOLD_REASONS else []
    if ignored:
        more.append("ignored folders: " + ", ".join(f"{n:,} {name}" for name, n in ignored.items()))
    return "\n".join(["expected pictures of synsets, found none that is sound", *reasons, *more])


def _gather(tree: Tree, format: str, advance: Advance) -> _Harvest:
    """Label and check every file."""
    harvest, labels = _Harvest(), dict[str, Label]()
    harvest.skipped.extend(tree.skipped)
    for name, label in _LAYOUTS[format](tree):
        if isinstance(label, Label):
            labels[name] = label
        else:
            harvest.skipped.append((name, label))
    for _ in harvest.skipped:
        advance(1)
    for name, found in examine(tree, list(labels)):
        advance(1)
        if isinstance(found, Picture):
            label = labels[name]
            harvest.pictures.setdefault(label.synset, []).append((label, found))
        else:
            harvest.skipped.append((name, found))
    for pictures in harvest.pictures.values():
        harvest.skipped.extend(_drop_twins(pictures))
    return harvest


def _drop_twins(pictures: list[tuple[Label, Picture]]) -> Iterator[tuple[str, str]]:
    """Keep the first of pictures of the same name and bytes, and yield the others with the reason.

    Bytes alone are no reason: a run's black images all have the same.
    """
    first, kept = dict[tuple[str, bytes], Picture](), list[tuple[Label, Picture]]()
    for label, picture in pictures:
        twin = first.setdefault((stem(picture.name).casefold(), picture.sha256), picture)
        if twin is picture:
            kept.append((label, picture))
        else:
            yield picture.name, f"duplicate: {shown(twin.name)} has the same name and bytes"
    pictures[:] = kept


def _numbered(pictures: Sequence[tuple[Label, Picture]]) -> list[_Image]:
    """Number a synset's pictures by their names if these have distinct numbers, or else from 0."""
    tails = [stem(picture.name).removeprefix(label.stem) for label, picture in pictures]
    numbers = [int(match[1]) for tail in tails if (match := _NUMBER.search(tail))]
    if len(set(numbers)) < len(pictures) or max(numbers) >= 2**32:
        numbers = list(range(len(pictures)))
    images = (_Image(*found, number) for found, number in zip(pictures, numbers, strict=True))
    return sorted(images, key=lambda image: image.number)


def _parts(synsets: list[list[_Image]], size: int) -> list[list[_Image]]:
    """Put whole synsets together to parts of at least ``size`` bytes."""
    sizes = [sum(image.picture.size for image in images) for images in synsets]
    return [[image for images in synsets[a:b] for image in images] for a, b in cut(sizes, size)]


def _origin(
    root: Path,
    options: ImportOptions,
    labels: Iterable[Label],
    skipped: tuple[tuple[str, str], ...],
) -> Origin:
    return Origin(
        kind="import",
        catalog=f"imported from {shown(root.name)}",
        synsets=tuple(map(_planned, labels)),
        source=options.source,
        licence=options.licence,
        skipped=skipped,
    )


def _planned(label: Label) -> PlannedSynset:
    synset = label.synset
    return PlannedSynset(
        wnid=synset.wnid,
        synset=synset.name,
        shard=0,  # a table's column that only runs have a meaning for
        imagenet_class=class_index().get(synset.wnid),
        lemmas=", ".join(synset.lemmas),
        definition=synset.definition,
        prompt=label.prompt or "",
    )


def _fill(building: Building, origin: Origin, tree: Tree, parts: Iterable[list[_Image]]) -> None:
    session = {
        "imported_with": f"sdwn {sdwn.__version__}",
        "host": socket.gethostname(),
        "started": now(),
    }
    with ReleaseWriter(building, origin) as writer:
        for images in parts:
            rows = [image.row() for image in images]
            sizes = np.array([image.picture.size for image in images])
            payloads = (read_again(tree, image.picture) for image in images)
            contents = Contents(table(rows), sizes, [session])
            write = partial(write_images, contents=contents, payloads=payloads)
            writer.add_part({"rows": _digest(rows)}, write)


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash the records: they name every file by its SHA-256."""
    return hashlib.sha256(json.dumps(rows, default=bytes.hex).encode()).hexdigest()
