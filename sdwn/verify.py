"""Hold a release against its own record, and name whatever is damaged, missing or extra."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from sdwn.decoding import Decoding
from sdwn.errors import IntegrityError
from sdwn.files import BLOCK, ReleasePaths, file_sha256
from sdwn.manifest import FileRecord, sums_text
from sdwn.release import Release
from sdwn.shards import ImageFile

Advance = Callable[[int], None]

_PLACE = ["synset", "number", "offset", "bytes", "sha256", "codec", "width", "height"]


def verify(root: Path, quick: bool = False, advance: Advance = lambda _: None) -> list[str]:
    """Name what is wrong with a release; an image in a damaged part by its synset and number.

    A quick check reads tables and texts, and of the images' files only structure and size; a
    full one reads every byte and decodes every image. ``advance`` is told how many bytes of
    files are done.

    Raises:
        SdwnError: there is no release, or its manifest is damaged or of a later version.
    """
    release = Release(root)
    recorded = {record.file: record for record in release.manifest.files}
    problems = _disagreements(release, recorded)
    problems += [f"{name}: not part of the release" for name in _extra(release.paths, recorded)]
    for record in recorded.values():
        problems += _check_file(release, record, quick, advance)
    return problems + _check_counts(release)


def _disagreements(release: Release, recorded: dict[str, FileRecord]) -> list[str]:
    """Hold SHA256SUMS, to the letter, against the manifest."""
    paths = release.paths
    expected = {name: record.sha256 for name, record in recorded.items()}
    expected[paths.manifest.name] = release.digest
    try:
        text = paths.sums.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{paths.sums.name}: cannot be read: {error}"]
    if text == sums_text(expected):
        return []
    names = [name for name, sha256 in expected.items() if f"{sha256}  {name}\n" not in text]
    about = ", ".join(names) or "its lines"
    return [f"{paths.sums.name} and {paths.manifest.name} disagree about {about}"]


def _extra(paths: ReleasePaths, recorded: Iterable[str]) -> Iterator[str]:
    known = {*recorded, paths.manifest.name, paths.sums.name}
    for path in sorted(paths.root.iterdir()):
        # What is derived later lies in this folder, and only there.
        derived = path == paths.evaluations and path.is_dir()
        if path.name not in known and not derived:
            yield path.name


def _check_file(release: Release, record: FileRecord, quick: bool, advance: Advance) -> list[str]:
    name, path = record.file, release.paths.root / record.file
    if Path(name).name != name:
        return [f"{name}: a name in the manifest that leaves the release"]
    if path.is_symlink() or not path.is_file():
        return [f"{name}: missing" if not path.exists() else f"{name}: no plain file"]
    if path.stat().st_size != record.bytes:
        advance(record.bytes)
        found = f"{name}: expected {record.bytes} bytes, found {path.stat().st_size}"
        return [*_damaged_images(release, name), found]
    if path.suffix != ".h5":
        return [] if file_sha256(path, advance) == record.sha256 else [_changed(name)]
    if quick:
        advance(record.bytes)
        return _check_structure(release, name)
    return _check_images(release, record, advance)


def _changed(name: str) -> str:
    return f"{name}: changed (its SHA-256 is not the recorded one)"


def _check_structure(release: Release, name: str) -> list[str]:
    try:
        with ImageFile(release.paths.root / name) as file:
            images = len(file)
        rows = len(_rows(release, name))
    except IntegrityError as error:
        return [str(error)]
    if images != rows:
        return [f"{name}: expected {rows} images, found {images}"]
    return []


def _check_images(release: Release, record: FileRecord, advance: Advance) -> list[str]:
    """Hash a part and decode its images, reading it once."""
    try:
        rows = _rows(release, record.file)
    except IntegrityError:
        rows = []  # metadata.parquet is damaged, and named itself
    digest = hashlib.sha256()
    with (release.paths.root / record.file).open("rb") as file, Decoding() as decoding:
        for block, row in _blocks(file, rows):
            digest.update(block)
            advance(len(block))
            if row is not None:
                name = f"{record.file}: {row['synset']} {row['number']}"
                decoding.add(name, block, row["codec"], row["width"], row["height"])
        undecodable = decoding.problems()
    if digest.hexdigest() == record.sha256:
        return undecodable
    return _damaged_images(release, record.file) or [_changed(record.file)]


def _blocks(
    file: BinaryIO, rows: list[dict[str, Any]]
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Read a file from start to end, each image as a block of its own."""
    for row in sorted(rows, key=lambda row: int(row["offset"])):
        if row["offset"] < file.tell():
            continue  # tables that are damaged, and named, may say anything
        yield from ((block, None) for block in _until(file, row["offset"]))
        yield file.read(row["bytes"]), row
    while block := file.read(BLOCK):
        yield block, None


def _until(file: BinaryIO, offset: int) -> Iterator[bytes]:
    while block := file.read(min(BLOCK, offset - file.tell())):
        yield block


def _rows(release: Release, part: str) -> list[dict[str, Any]]:
    try:
        rows = release.metadata.filter(pc.equal(release.metadata["part"], part))
        found: list[dict[str, Any]] = rows.select(_PLACE).to_pylist()
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise IntegrityError(f"{release.paths.metadata}: damaged: {error}") from None
    return found


def _damaged_images(release: Release, part: str) -> list[str]:
    """Name a damaged part's damaged images, by plain reads: HDF5 may fail on such a file."""
    if not part.endswith(".h5"):
        return []
    try:
        rows = _rows(release, part)
    except IntegrityError:
        return []
    problems = []
    with (release.paths.root / part).open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            if hashlib.sha256(file.read(row["bytes"])).hexdigest() != row["sha256"]:
                problems.append(f"{part}: {row['synset']} {row['number']} is damaged")
    return problems


def _check_counts(release: Release) -> list[str]:
    """Hold the table with a row an image against what the manifest counts."""
    try:
        rows = release.metadata.num_rows
    except IntegrityError:
        return []  # named as damaged or missing already
    if rows != release.manifest.images:
        name = release.paths.metadata.name
        return [f"{name}: expected {release.manifest.images} images, found {rows}"]
    return []
