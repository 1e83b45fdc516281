"""Compare a release with its own record, and name whatever is damaged, missing or extra."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from sdwn import io
from sdwn.errors import DiskError, IntegrityError
from sdwn.evaluation.record import evaluations, read_own_predictions
from sdwn.prediction.table import FeatureTable, feature_names
from sdwn.releases.release import LOCATION, FileRecord, Release, image_name
from sdwn.releases.staged_folder import JOURNAL
from sdwn.storage.images import undecodable
from sdwn.storage.shards import AHEAD, DECODERS
from sdwn.wordnet.taxonomy import read_taxonomy


def verify(root: Path, quick: bool = False, advance: io.Advance = lambda _: None) -> list[str]:
    """List what is wrong with a release; an image in a damaged part by its synset and number.

    A quick check reads tables and texts, and of the images' files only structure and size; a
    full one reads every byte and decodes every image. ``advance`` is given how many bytes of
    files are done. What a desktop or a file server left (:func:`sdwn.io.strays`) is no problem.
    """
    release, problems = Release(root), list[str]()
    paths, manifest = release.paths, release.manifest

    @contextmanager
    def noted(what: str = "") -> Iterator[None]:
        try:
            yield
        except (DiskError, IntegrityError) as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{what[:200]}: cannot be read: {error.strerror}")

    recorded = {record.file: record for record in manifest.files}
    with noted(paths.sums.name):
        if io.read_whole(paths.sums, io.JSON_BYTES) != manifest.sums(release.digest).encode():
            problems.append(f"{paths.sums.name}: not the checksums that {paths.manifest.name} has")
    linked = [str(path.relative_to(paths.root)) for path in io.links(paths.root)]
    problems += [f"{name}: {io.LINK}" for name in linked]
    # A kill may have left the journal, which goes last of all. What is derived later lies in the
    # folder of evaluations, and only there.
    known = {*recorded, *linked, paths.manifest.name, paths.sums.name, JOURNAL}
    known |= {paths.evaluations.name} if paths.evaluations.is_dir() else set()
    extra = (path.name for path in sorted(paths.root.iterdir()) if path.name not in known)
    problems += [f"{name}: not part of the release" for name in extra if not io.is_stray(name)]
    for record in recorded.values():
        if record.file not in linked:
            with noted(record.file):
                problems += _check_file(release, record, quick, advance)
    with noted():
        problems += [
            f"{paths.manifest.name}: {name}: expected {count}, found {getattr(manifest, name)}"
            for name, count in release.counted.items()
            if getattr(manifest, name) != count
        ]
        for name in sorted(evaluations(paths)):
            with noted():
                read_own_predictions(release, paths.evaluation(name))
        for name in feature_names(paths):
            path = paths.features(name).features
            with noted():
                FeatureTable.read(path, manifest.most_rows).keyed(path, release.metadata)
    # A link or a table that is damaged is named by all that read there.
    return list(dict.fromkeys(problem.replace(f"{paths.root}/", "") for problem in problems))


def _check_file(
    release: Release, record: FileRecord, quick: bool, advance: io.Advance
) -> list[str]:
    name, path = record.file, release.paths.root / record.file
    if Path(name).name != name:
        return [f"{name}: a name in the manifest that leaves the release"]
    if not path.is_file():
        return [f"{name}: missing" if not path.exists() else f"{name}: no plain file"]
    is_part = path.suffix == ".h5"
    problems = list[str]()
    if (size := path.stat().st_size) != record.bytes:
        problems = [f"{name}: expected {record.bytes} bytes, found {size}"]
    elif is_part:
        problems = _check_rows(release, name)
    if problems or (quick and is_part):
        advance(record.bytes)
        return problems and problems + _damaged_images(release, name)
    if is_part:
        sha256, problems = _decode_images(path, _rows(release, name), advance)
    else:
        sha256 = io.file_sha256(path, advance)
    if sha256 != record.sha256:
        changed = f"{name}: changed (its SHA-256 is not the recorded one)"
        return _damaged_images(release, name) or [changed]
    if path == release.paths.taxonomy:
        read_taxonomy(path)  # a stranger's may be anything under a checksum that fits
    return problems


def _check_rows(release: Release, part: str) -> list[str]:
    """Compare a part's own checksums of images with those of the table that covers all parts."""
    try:
        with release.open_part(part) as file:
            own = [one.tobytes().hex() for one in file.rows()["sha256"]]
        rows = release.metadata.filter(pc.equal(release.metadata["part"], part))
    except (IntegrityError, DiskError) as error:
        return [str(error)]
    same = own == rows["sha256"].to_pylist()
    return [] if same else [f"{release.paths.metadata.name}: not the images of {part}"]


def _decode_images(
    path: Path, rows: list[dict[str, Any]], advance: io.Advance
) -> tuple[str, list[str]]:
    """Read a part once, from start to end: hash it, and decode each image in threads."""
    digest = hashlib.sha256()

    def images() -> Iterator[tuple[bytes, dict[str, Any]]]:
        with path.open("rb") as file:

            def hashed(size: int) -> bytes:
                block = file.read(size)
                digest.update(block)
                advance(len(block))
                return block

            for row in sorted(rows, key=itemgetter("offset")):
                while hashed(max(0, min(io.BLOCK, row["offset"] - file.tell()))):
                    pass
                yield hashed(row["bytes"]), row
            while hashed(io.BLOCK):
                pass

    def problem(image: tuple[bytes, dict[str, Any]]) -> str | None:
        payload, row = image
        reason = undecodable(payload, row["codec"], row["width"], row["height"])
        return reason and f"{path.name}: {image_name(row)}: {reason}"

    found = [text for text in io.in_threads(problem, images(), DECODERS, AHEAD) if text]
    return digest.hexdigest(), found


def _damaged_images(release: Release, part: str) -> list[str]:
    """List a damaged part's damaged images, by plain reads: HDF5 may fail on such a file."""
    problems = []
    for row in _rows(release, part):
        try:
            release.payload(row)
        except (DiskError, IntegrityError):
            problems.append(f"{part}: {image_name(row)} is damaged")
    return problems


def _rows(release: Release, part: str) -> list[dict[str, Any]]:
    """Return what tells where a part's images are; none by a damaged table, which is named."""
    with suppress(IntegrityError):
        columns = release.metadata.select(["id", "label", "synset", "number", *LOCATION])
        return [*columns.filter(pc.equal(columns["part"], part)).to_pylist()]
    return []
