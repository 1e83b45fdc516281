"""Compare a release with its own record, and name whatever is damaged, missing or extra."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdwn import io
from sdwn.errors import DiskError, IntegrityError
from sdwn.evaluation.record import evaluations, read_own_predictions
from sdwn.prediction.table import FeatureTable, feature_names, keyed
from sdwn.releases.release import FileRecord, Release, image_name, sums_text
from sdwn.releases.staged_folder import JOURNAL
from sdwn.releases.writer import metadata_table
from sdwn.storage.images import undecodable
from sdwn.storage.shards import AHEAD, DECODERS
from sdwn.wordnet.taxonomy import read_taxonomy

_LOCATION = ["id", "label", "synset", "number"]
_LOCATION += ["offset", "bytes", "sha256", "codec", "width", "height"]


def verify(root: Path, quick: bool = False, advance: io.Advance = lambda _: None) -> list[str]:
    """List what is wrong with a release; an image in a damaged part by its synset and number.

    A quick check reads tables and texts, and of the images' files only structure and size; a
    full one reads every byte and decodes every image. ``advance`` is given how many bytes of
    files are done. What a desktop or a file server left (:func:`sdwn.io.strays`) is no problem.

    Raises:
        SdwnError: there is no release, or its manifest is damaged or of a later version.
    """
    release = Release(root)
    paths, manifest = release.paths, release.manifest
    recorded = {record.file: record for record in manifest.files}
    problems: list[str] = []
    sums = {name: record.sha256 for name, record in recorded.items()}
    sums[paths.manifest.name] = release.digest
    try:
        if io.read_whole(paths.sums, io.JSON_BYTES) != sums_text(sums).encode():
            problems.append(f"{paths.sums.name}: not the checksums that {paths.manifest.name} has")
    except (OSError, IntegrityError) as error:
        problems.append(str(error))
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
            try:
                problems += _check_file(release, record, quick, advance)
            except OSError as error:
                problems.append(f"{record.file[:200]}: cannot be read: {error.strerror}")
    # What they raise is of the release's own tables, and named already.
    with suppress(IntegrityError):
        problems += [
            f"{paths.manifest.name}: {name}: expected {count}, found {getattr(manifest, name)}"
            for name, count in release.counted.items()
            if getattr(manifest, name) != count
        ]
    with suppress(IntegrityError):
        for name in evaluations(paths):
            try:
                read_own_predictions(release, paths.evaluation(name))
            except IntegrityError as error:
                problems.append(str(error))
        for name in feature_names(paths):
            path = paths.features(name).features
            try:
                found = FeatureTable.read(path, manifest.most_rows)
                keyed(path, found, release.metadata)
            except IntegrityError as error:
                remedy = f"; {FeatureTable.FORMAT.remedy}"
                problems.append(str(error).removesuffix(remedy) + remedy)
    # A link is named by all that read there.
    return list(dict.fromkeys(problem.replace(f"{paths.root}/", "") for problem in problems))


def _check_file(
    release: Release, record: FileRecord, quick: bool, advance: io.Advance
) -> list[str]:
    name, path = record.file, release.paths.root / record.file
    if Path(name).name != name:
        return [f"{name}: a name in the manifest that leaves the release"]
    if not path.is_file():
        return [f"{name}: missing" if not path.exists() else f"{name}: no plain file"]
    if (size := path.stat().st_size) != record.bytes:
        advance(record.bytes)
        problem = f"{name}: expected {record.bytes} bytes, found {size}"
        return [*_damaged_images(release, name), problem]
    problems: list[str] = []
    if path.suffix == ".h5":
        problems = _check_rows(release, name)
        if problems or quick:
            advance(record.bytes)
            return problems and problems + _damaged_images(release, name)
        sha256, problems = _decode_images(release, name, advance)
    else:
        sha256 = io.file_sha256(path, advance)
    if sha256 == record.sha256 and path == release.paths.taxonomy:
        try:
            read_taxonomy(path)  # a stranger's may be anything under a checksum that fits
        except IntegrityError as error:
            problems = [str(error)]
    if sha256 == record.sha256:
        return problems
    changed = f"{name}: changed (its SHA-256 is not the recorded one)"
    return _damaged_images(release, name) or [changed]


def _check_rows(release: Release, part: str) -> list[str]:
    """Compare a part's own rows with those of the table that covers all parts."""
    table = release.paths.metadata.name
    plans = [*(one.digest for one in release.manifest.plans)] or [""]
    try:
        with release.open_part(part) as file:
            offsets = file.offsets + np.uint64(file.blob_start)
            plan = str(file.attributes.get("plan_digest", ""))
            if plan not in plans:
                return [f"{part}: of a plan that {release.paths.manifest.name} does not list"]
            concepts = release.concept_tables[plans.index(plan)]
            own = metadata_table(part, file.rows(), offsets, concepts, plan)
        all_parts = release.metadata.filter(pc.equal(release.metadata["part"], part))
    except (IntegrityError, DiskError) as error:
        return [str(error)]
    if len(own) != len(all_parts):
        return [f"{table}: part: {part} has {len(own)} images, {len(all_parts)} stand there"]

    def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
        # An index into a list of distinct values is another one in each table.
        return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column

    for name in own.column_names:
        if name not in all_parts.column_names or not plain(own[name]).equals(
            plain(all_parts[name])
        ):
            return [f"{table}: {name}: not what {part} has"]
    return []


def _decode_images(release: Release, part: str, advance: io.Advance) -> tuple[str, list[str]]:
    """Read a part once, from start to end: hash it, and decode each image in threads."""
    digest = hashlib.sha256()

    def images() -> Iterator[tuple[bytes, dict[str, Any]]]:
        with (release.paths.root / part).open("rb") as file:

            def hashed(size: int) -> bytes:
                block = file.read(size)
                digest.update(block)
                advance(len(block))
                return block

            for row in sorted(_rows(release, part), key=lambda row: int(row["offset"])):
                while hashed(min(io.BLOCK, row["offset"] - file.tell())):
                    pass
                yield hashed(row["bytes"]), row
            while hashed(io.BLOCK):
                pass

    def problem(image: tuple[bytes, dict[str, Any]]) -> str | None:
        payload, row = image
        reason = undecodable(payload, row["codec"], row["width"], row["height"])
        return reason and f"{part}: {image_name(row)}: {reason}"

    found = [text for text in io.in_threads(problem, images(), DECODERS, AHEAD) if text]
    return digest.hexdigest(), found


def _rows(release: Release, part: str) -> list[dict[str, Any]]:
    try:
        rows = release.metadata.filter(pc.equal(release.metadata["part"], part))
        found: list[dict[str, Any]] = rows.select(_LOCATION).to_pylist()
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise IntegrityError(f"{release.paths.metadata}: damaged: {error}") from None
    return found


def _damaged_images(release: Release, part: str) -> list[str]:
    """List a damaged part's damaged images, by plain reads: HDF5 may fail on such a file."""
    if not part.endswith(".h5"):
        return []
    try:
        rows = _rows(release, part)
    except IntegrityError:
        return []
    problems = []
    with (release.paths.root / part).open("rb") as file:
        for row in rows:
            try:
                file.seek(row["offset"])
                sha256 = hashlib.sha256(file.read(row["bytes"])).hexdigest()
            except (OSError, OverflowError, ValueError):
                sha256 = ""  # tables that are damaged, and named, may hold anything
            if sha256 != row["sha256"]:
                problems.append(f"{part}: {image_name(row)} is damaged")
    return problems
