"""Import of a folder of images from anywhere as a release, their bytes unchanged.

::

    list_source --> labels --> check_image --> number --> parts --> ReleaseWriter
    (file names)   (synset,    (decode, hash)  (in the   (whole     (reads each image
                    prompt)                     synset)   synsets)   a second time)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sdwn
from sdwn.errors import UsageError
from sdwn.exchange.import_source import (
    Label,
    SourceFolder,
    SourceImage,
    check_image,
    escaped_name,
    label_folders,
    label_imagefolder,
    list_source,
    reread,
    stem,
)
from sdwn.io import PART_BYTES, Advance, in_threads, now
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import PlannedSynset
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import StagedFolder, build, require_free
from sdwn.releases.writer import Origin, ReleaseWriter, cut_parts
from sdwn.storage.columns import to_columns
from sdwn.storage.shards import Contents, write_images
from sdwn.wordnet.corpus import Synset, shared_wordnet
from sdwn.wordnet.imagenet import class_index
from sdwn.wordnet.taxonomy import taxonomy_table

_LABELS = {"folders": label_folders, "imagefolder": label_imagefolder}
FORMATS = tuple(_LABELS)

# Files that a message names when nothing at all can be imported.
SHOWN_REASONS = 5
# Images that are checked ahead, for each thread.
AHEAD = 32

_NUMBER = re.compile(r"(?:^|[_\- ])([0-9]+)\Z")

Labelled = list[tuple[Label, SourceImage]]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """The layout of a source, one of ``FORMATS``, and what its user knows of the images.

    ``source`` names where they are from, ``licence`` the terms, in words or as dataset
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
class Imported:
    """A release of imported images, and what was left out.

    ``skipped`` has each file with the reason, ``ignored`` counts folders by name, see
    :class:`SourceFolder`.
    """

    release: Release
    skipped: tuple[tuple[str, str], ...]
    ignored: dict[str, int]


def count_files(source: Path, follow_links: bool = False) -> int:
    """Count the files that an import looks at, those that it will leave out included.

    Raises:
        UsageError: it is no folder.
    """
    folder = list_source(source, follow_links)
    return len(folder.images) + len(folder.skipped)


def import_images(
    source: Path,
    target: ReleasePaths,
    options: ImportOptions,
    advance: Advance = lambda _: None,
) -> Imported:
    """Write the release of a folder of images; run again after a kill, it resumes.

    ``advance`` is called for each file that was looked at, see :func:`count_files`.

    Raises:
        UsageError: there is nothing to import, or ``target`` is taken or lies in the source.
        IntegrityError: an image changed while it was imported.
    """
    if not source.is_dir():
        raise UsageError(f"{source}: expected a folder of images, found none")
    root = source.resolve()
    if target.root.resolve().is_relative_to(root):
        raise UsageError(
            f"{target.root} lies in {source}, which it is made of; choose another folder"
        )
    require_free(target.root)
    if source.is_symlink():
        root = source.parent.resolve() / source.name  # a link's own name may be the wnid
    folder = list_source(root, options.follow_links)
    found, left_out = _gather(folder, options.format, advance)
    skipped = tuple(sorted((escaped_name(name), reason) for name, reason in left_out))
    if not found:
        lines = [f"{name}: {reason}" for name, reason in skipped[:SHOWN_REASONS]]
        if len(skipped) > SHOWN_REASONS:
            lines.append(f"and {len(skipped) - SHOWN_REASONS} more")
        if folder.ignored:
            names = (f"{count:,} {name}" for name, count in folder.ignored.items())
            lines.append(f"ignored folders: {', '.join(names)}")
        head = f"{source}: expected images of synsets, found none that is readable"
        raise UsageError("\n".join([head, *lines]))
    synsets = [images for _, images in sorted(found.items(), key=lambda item: item[0].wnid)]
    # Where texts of a synset differ, its own prompt is the first one's.
    planned = tuple(_planned(images[0][0]) for images in synsets)
    origin = Origin(
        kind="import",
        catalog=f"imported from {escaped_name(root.name)}",
        synsets=planned,
        source=options.source,
        licence=options.licence,
        skipped=skipped,
        taxonomy=taxonomy_table((row.wnid for row in planned), shared_wordnet()),
    )

    def fill(staged: StagedFolder) -> None:
        _fill(staged, origin, folder, synsets, options.part_bytes)

    if not build(target.root, {"import": str(root), "format": options.format}, fill):
        require_free(target.root)
    return Imported(Release(target.root), skipped, folder.ignored)


def _gather(
    folder: SourceFolder, format: str, advance: Advance
) -> tuple[dict[Synset, Labelled], list[tuple[str, str]]]:
    """Label and check every file; return images by synset, and the files left out, with reasons."""
    images, skipped, labels = dict[Synset, Labelled](), [*folder.skipped], dict[str, Label]()
    for name, label in _LABELS[format](folder):
        if isinstance(label, Label):
            labels[name] = label
        else:
            skipped.append((name, label))
    for _ in skipped:
        advance(1)
    threads = len(os.sched_getaffinity(0))
    check = partial(check_image, folder)
    checked = in_threads(check, labels, threads, AHEAD * threads)
    for (name, label), found in zip(labels.items(), checked, strict=True):
        advance(1)
        if isinstance(found, SourceImage):
            images.setdefault(label.synset, []).append((label, found))
        else:
            skipped.append((name, found))
    for of_synset in images.values():
        skipped.extend(_drop_twins(of_synset))
    return images, skipped


def _drop_twins(images: Labelled) -> Iterator[tuple[str, str]]:
    """Keep the first of images of the same name and bytes, and yield the others with the reason.

    Bytes alone are no reason: a run's black images all have the same.
    """
    first, kept = dict[tuple[str, bytes], SourceImage](), Labelled()
    for label, image in images:
        twin = first.setdefault((stem(image.name).casefold(), image.sha256), image)
        if twin is image:
            kept.append((label, image))
        else:
            yield image.name, f"duplicate: {escaped_name(twin.name)} has the same name and bytes"
    images[:] = kept


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


def _fill(
    staged: StagedFolder,
    origin: Origin,
    folder: SourceFolder,
    synsets: Sequence[Labelled],
    part_bytes: int,
) -> None:
    """Write the parts, of whole synsets and at least ``part_bytes`` each."""
    session = {
        "imported_with": f"sdwn {sdwn.__version__}",
        "host": socket.gethostname(),
        "started": now(),
    }
    sizes = [sum(image.size for _, image in images) for images in synsets]
    with ReleaseWriter(staged, origin) as writer:
        for first, last in cut_parts(sizes, part_bytes):
            numbered = [one for images in synsets[first:last] for one in _numbered(images)]
            rows = [_row(*one) for one in numbered]
            # The records name every file by its SHA-256.
            inputs = hashlib.sha256(json.dumps(rows, default=bytes.hex).encode()).hexdigest()
            lengths = np.array([image.size for _, image, _ in numbered])
            payloads = (reread(folder, image) for _, image, _ in numbered)
            contents = Contents(to_columns(rows), lengths, [session])
            write = partial(write_images, contents=contents, payloads=payloads)
            writer.add_part({"rows": inputs}, write)


def _numbered(images: Labelled) -> list[tuple[Label, SourceImage, int]]:
    """Number a synset's images by their names if these have distinct numbers, or else from 0."""
    tails = [stem(image.name).removeprefix(label.stem) for label, image in images]
    numbers = [int(match[1]) for tail in tails if (match := _NUMBER.search(tail))]
    if len(set(numbers)) < len(images) or max(numbers) >= 2**32:
        numbers = list(range(len(images)))
    found = [(*one, number) for one, number in zip(images, numbers, strict=True)]
    return sorted(found, key=lambda one: one[2])


def _row(label: Label, image: SourceImage, number: int) -> dict[str, Any]:
    prompt = {} if label.prompt is None else {"prompt": label.prompt}
    return {
        "wnid": label.synset.wnid,
        "synset": label.synset.name,
        "number": number,
        **prompt,
        "status": "black" if image.black else "unknown",
        "session": 0,
        "width": image.width,
        "height": image.height,
        "codec": image.codec,
        "sha256": image.sha256,
        "file": escaped_name(image.name),
    }
