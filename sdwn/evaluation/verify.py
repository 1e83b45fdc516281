"""Hold a release against its own record, and name whatever is damaged, missing or extra."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdwn.errors import DiskError, IntegrityError
from sdwn.io import (
    BLOCK,
    JSON_BYTES,
    LINK,
    Advance,
    file_sha256,
    in_threads,
    is_stray,
    links,
    read_whole,
)
from sdwn.paths import ReleasePaths
from sdwn.releases.manifest import FileRecord, sums_text
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import JOURNAL
from sdwn.releases.writer import metadata_table
from sdwn.storage.images import undecodable
from sdwn.storage.shards import AHEAD, DECODERS, ImageFile

_PLACE = ["synset", "number", "offset", "bytes", "sha256", "codec", "width", "height"]


def verify(root: Path, quick: bool = False, advance: Advance = lambda _: None) -> list[str]:
    """Name what is wrong with a release; an image in a damaged part by its synset and number.

    A quick check reads tables and texts, and of the images' files only structure and size; a
    full one reads every byte and decodes every image. ``advance`` is told how many bytes of
    files are done. What a desktop or a file server left (:func:`sdwn.io.strays`) is no problem.

    Raises:
        SdwnError: there is no release, or its manifest is damaged or of a later version.
    """
    release = Release(root)
    recorded = {record.file: record for record in release.manifest.files}
    problems = [f"{name}: listed twice in the manifest" for name in _twice(release.manifest.files)]
    problems += _disagreements(release, recorded)
    linked = [str(path.relative_to(release.paths.root)) for path in links(release.paths.root)]
    problems += [f"{name}: {LINK}" for name in linked]
    extra = (name for name in _extra(release.paths, recorded) if name not in linked)
    problems += [f"{name}: not part of the release" for name in extra]
    for record in recorded.values():
        if record.file in linked:
            continue
        try:
            problems += _check_file(release, record, quick, advance)
        except OSError as error:
            problems.append(f"{record.file[:200]}: cannot be read: {error.strerror}")
    problems += _check_counts(release) + _check_evaluations(release)
    return list(dict.fromkeys(problems))  # a link is named by all that read there


def _check_evaluations(release: Release) -> list[str]:
    """Hold predictions against their records and the release."""
    from sdwn.evaluation.problems import evaluation_problems

    try:
        return [_within(release, problem) for problem in evaluation_problems(release)]
    except IntegrityError:
        return []  # of the release itself, and named already


def _twice(files: list[FileRecord]) -> list[str]:
    counts = Counter(file.file for file in files)
    return [name for name, count in counts.items() if count > 1]


def _disagreements(release: Release, recorded: dict[str, FileRecord]) -> list[str]:
    """Hold SHA256SUMS, to the letter, against the manifest."""
    paths = release.paths
    expected = {name: record.sha256 for name, record in recorded.items()}
    expected[paths.manifest.name] = release.digest
    try:
        text = read_whole(paths.sums, JSON_BYTES).decode() if paths.sums.is_file() else ""
    except (OSError, UnicodeDecodeError, IntegrityError) as error:
        return [f"{paths.sums.name}: cannot be read: {error}"]
    if text == sums_text(expected):
        return []
    names = [name for name, sha256 in expected.items() if f"{sha256}  {name}\n" not in text]
    about = ", ".join(names) or "its lines"
    return [f"{paths.sums.name} and {paths.manifest.name} disagree about {about}"]


def _extra(paths: ReleasePaths, recorded: Iterable[str]) -> Iterator[str]:
    # A kill may have left the journal, which goes last of all.
    known = {*recorded, paths.manifest.name, paths.sums.name, JOURNAL}
    for path in sorted(paths.root.iterdir()):
        # What is derived later lies in this folder, and only there.
        derived = path == paths.evaluations and path.is_dir()
        if path.name not in known and not derived and not is_stray(path.name):
            yield path.name


def _check_file(release: Release, record: FileRecord, quick: bool, advance: Advance) -> list[str]:
    name, path = record.file, release.paths.root / record.file
    if Path(name).name != name:
        return [f"{name}: a name in the manifest that leaves the release"]
    if not path.is_file():
        return [f"{name}: missing" if not path.exists() else f"{name}: no plain file"]
    if path.stat().st_size != record.bytes:
        advance(record.bytes)
        found = f"{name}: expected {record.bytes} bytes, found {path.stat().st_size}"
        return [*_damaged_images(release, name), found]
    if path.suffix == ".h5":
        return _check_part(release, record, quick, advance)
    return [] if file_sha256(path, advance) == record.sha256 else [_changed(name)]


def _check_part(release: Release, record: FileRecord, quick: bool, advance: Advance) -> list[str]:
    problems = _check_structure(release, record.file)
    if not problems and not quick:
        return _check_images(release, record, advance)
    advance(record.bytes)
    return problems + _damaged_images(release, record.file) if problems else []


def _changed(name: str) -> str:
    return f"{name}: changed (its SHA-256 is not the recorded one)"


def _check_structure(release: Release, name: str) -> list[str]:
    """Hold a part's own rows against those of the table that covers all parts."""
    try:
        with ImageFile(release.paths.root / name, most=release.manifest.most_rows) as file:
            offsets = file.offsets + np.uint64(file.blob_start)
            own = metadata_table(name, file.rows(), offsets, _classes(release))
        told = release.metadata.filter(pc.equal(release.metadata["part"], name))
    except (IntegrityError, DiskError) as error:
        return [_within(release, str(error))]
    table = release.paths.metadata.name
    if len(own) != len(told):
        return [f"{table}: part: {name} has {len(own)} images, {len(told)} stand there"]
    absent = [column for column in own.column_names if column not in told.column_names]
    differ = absent or [
        column for column in own.column_names if not _equal(own[column], told[column])
    ]
    if differ:
        return [f"{table}: {differ[0]}: not what {name} has"]
    return []


def _classes(release: Release) -> dict[str, int | None]:
    try:
        return {wnid: row.imagenet_class for wnid, row in release.synsets.items()}
    except IntegrityError:
        # The table is damaged, and named itself; then the release's own classes have to do.
        names = (release.metadata[name].to_pylist() for name in ("wnid", "imagenet_class"))
        return dict(zip(*names, strict=True))


def _equal(own: pa.ChunkedArray, told: pa.ChunkedArray) -> bool:
    if pa.types.is_dictionary(own.type):
        # An index into a list of distinct values is another one in each table.
        own, told = own.cast(pa.string()), told.cast(pa.string())
    return bool(own.type == told.type and own.equals(told))


def _within(release: Release, message: str) -> str:
    return message.replace(f"{release.paths.root}/", "")


def _check_images(release: Release, record: FileRecord, advance: Advance) -> list[str]:
    """Hash a part and decode its images, reading it once."""
    rows = _rows(release, record.file)
    digest = hashlib.sha256()

    def images() -> Iterator[tuple[bytes, dict[str, Any]]]:
        with (release.paths.root / record.file).open("rb") as file:
            for block, row in _blocks(file, rows):
                digest.update(block)
                advance(len(block))
                if row is not None:
                    yield block, row

    def problem(image: tuple[bytes, dict[str, Any]]) -> str | None:
        payload, row = image
        reason = undecodable(payload, row["codec"], row["width"], row["height"])
        return reason and f"{record.file}: {row['synset']} {row['number']}: {reason}"

    problems = [found for found in in_threads(problem, images(), DECODERS, AHEAD) if found]
    if digest.hexdigest() == record.sha256:
        return problems
    return _damaged_images(release, record.file) or [_changed(record.file)]


def _blocks(
    file: BinaryIO, rows: list[dict[str, Any]]
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Read a file from start to end, each image as a block of its own."""
    for row in sorted(rows, key=lambda row: int(row["offset"])):
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
            if _bytes(file, row) != row["sha256"]:
                problems.append(f"{part}: {row['synset']} {row['number']} is damaged")
    return problems


def _bytes(file: BinaryIO, row: dict[str, Any]) -> str:
    try:
        file.seek(row["offset"])
        return hashlib.sha256(file.read(row["bytes"])).hexdigest()
    except (
        OSError,
        OverflowError,
        ValueError,
    ):  # tables that are damaged, and named, may say anything
        return ""


def _check_counts(release: Release) -> list[str]:
    """Hold what the manifest counts against the table with a row an image."""
    try:
        recorded, found = release.manifest, release.counted
    except IntegrityError:
        return []  # named as damaged or missing already
    return [
        f"{release.paths.manifest.name}: {name}: expected {count}, found {getattr(recorded, name)}"
        for name, count in found.items()
        if getattr(recorded, name) != count
    ]
