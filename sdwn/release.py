"""A release: numbered parts of images, a table with a row an image, and a record of both."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, NonNegativeInt, ValidationError

from sdwn.errors import IntegrityError, SdwnError
from sdwn.files import ReleasePaths, read_json
from sdwn.images import decode
from sdwn.shards import ImageFile

FORMAT = "sdwn-release"
FORMAT_VERSION = 1
BLOCK = 1 << 22
METADATA_COLUMNS = (
    *("wnid", "synset", "number", "status", "imagenet_class", "part", "row", "offset", "bytes"),
    *("width", "height", "codec", "sha256"),
)

Advance = Callable[[int], None]


class Release:
    """A finished release, open for reading.

    Raises:
        SdwnError: there is none at this path.
        IntegrityError: its manifest is damaged or of a later version.
    """

    def __init__(self, root: Path) -> None:
        self.paths = ReleasePaths(Path(root))
        if not self.paths.manifest.exists():
            inside = ReleasePaths(self.paths.root / "release")
            advice = f"make one with: sdwn merge RUN --release {root}"
            if inside.manifest.exists():
                advice = f"did you mean {inside.root}?"
            raise SdwnError(f"{root}: no release here; {advice}")
        self.manifest = read_json(self.paths.manifest)
        found = self.manifest.get("format"), self.manifest.get("format_version")
        if found != (FORMAT, FORMAT_VERSION):
            raise IntegrityError(
                f"{self.paths.manifest}: expected {FORMAT} {FORMAT_VERSION}, "
                f"found {found[0]} {found[1]}"
            )
        _check_manifest(self.paths.manifest, self.manifest)
        self._files: dict[str, ImageFile] = {}

    def __len__(self) -> int:
        return int(self.manifest["images"])

    @cached_property
    def metadata(self) -> pa.Table:
        """The table with a row an image, in the order of the parts."""
        try:
            table = pq.read_table(self.paths.metadata)
        except (OSError, pa.ArrowException) as error:
            raise IntegrityError(f"{self.paths.metadata}: cannot be read: {error}") from None
        missing = [name for name in METADATA_COLUMNS if name not in table.column_names]
        if missing:
            raise IntegrityError(f"{self.paths.metadata}: expected the column {missing[0]}")
        return table

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which names every other file's."""
        return file_sha256(self.paths.manifest)

    @cached_property
    def synsets(self) -> dict[str, dict[str, str]]:
        """The plan's table of synsets, by wnid: lemmas, definition, prompt."""
        with self.paths.synsets.open(encoding="utf-8", newline="") as file:
            return {row["wnid"]: row for row in csv.DictReader(file)}

    def image(self, index: int) -> Image.Image:
        """Decode an image, by its row in the metadata."""
        return self.decoded(self.row(index))

    def decoded(self, row: dict[str, Any]) -> Image.Image:
        """Decode an image, by its record."""
        return decode(self.payload(row), row["codec"], row["width"], row["height"])

    def row(self, index: int) -> dict[str, Any]:
        """Read an image's record."""
        row: dict[str, Any] = self.metadata.slice(index, 1).to_pylist()[0]
        return row

    def payload(self, row: dict[str, Any]) -> bytes:
        """Read an encoded image, by its record.

        Raises:
            IntegrityError: it is not what its record says.
        """
        payload = self._part(row["part"]).payload(row["row"])
        if hashlib.sha256(payload).hexdigest() != row["sha256"]:
            raise IntegrityError(
                f"{row['part']}: {row['synset']} {row['number']} is damaged; "
                f"see what else is: sdwn verify {self.paths.root}"
            )
        return payload

    def _part(self, name: str) -> ImageFile:
        if name not in self._files:
            self._files[name] = ImageFile(self.paths.root / name)
        return self._files[name]

    def close(self) -> None:
        """Close the parts."""
        for file in self._files.values():
            file.close()
        self._files.clear()


class FileRecord(BaseModel):
    """A file of a release."""

    file: str
    bytes: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """What must stand in a manifest; more may."""

    images: NonNegativeInt
    synsets: NonNegativeInt
    bytes: NonNegativeInt
    catalog: str
    plan_digest: str
    created: str
    sdwn: str
    statuses: dict[str, int]
    settings: dict[str, Any]
    made_on: list[dict[str, Any]]
    files: list[FileRecord]


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    try:
        Manifest.model_validate(manifest, strict=True)
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(map(str, mistake["loc"]))
        raise IntegrityError(f"{path}: damaged: {where}: {mistake['msg']}") from None


def file_sha256(path: Path, advance: Advance = lambda _: None) -> str:
    """Hash a file in blocks, telling ``advance`` how many bytes went by."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def verify(root: Path, advance: Advance = lambda _: None) -> list[str]:
    """Hold every file of a release against its record and name what is wrong.

    An image in a damaged part is named by its synset and number.
    """
    release = Release(root)
    recorded = {record["file"]: record["sha256"] for record in release.manifest["files"]}
    problems = _disagreements(release, recorded)
    problems += [f"{name}: not part of the release" for name in _extra(release.paths, recorded)]
    for name, expected in recorded.items():
        problems += _check_file(release, name, expected, advance)
    return problems


def _disagreements(release: Release, recorded: dict[str, str]) -> list[str]:
    """Hold SHA256SUMS, to the letter, against the manifest."""
    paths = release.paths
    expected = {**recorded, paths.manifest.name: release.digest}
    try:
        text = paths.sums.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{paths.sums.name}: cannot be read: {error}"]
    if text == sums_text(expected):
        return []
    names = [name for name, sha256 in expected.items() if f"{sha256}  {name}\n" not in text]
    about = ", ".join(names) or "its lines"
    return [f"{paths.sums.name} and {paths.manifest.name} disagree about {about}"]


def sums_text(digests: dict[str, str]) -> str:
    """Write checksums as ``sha256sum -c`` reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _extra(paths: ReleasePaths, recorded: dict[str, str]) -> Iterator[str]:
    known = {*recorded, paths.manifest.name, paths.sums.name, paths.evaluations.name}
    return (path.name for path in sorted(paths.root.iterdir()) if path.name not in known)


def _check_file(release: Release, name: str, expected: str, advance: Advance) -> list[str]:
    path = release.paths.root / name
    if Path(name).name != name:
        return [f"{name}: a name in the manifest that leaves the release"]
    if not path.is_file():
        return [f"{name}: missing"]
    if file_sha256(path, advance) == expected:
        return []
    named = _damaged_images(release, name) if path.suffix == ".h5" else []
    return named or [f"{name}: changed (its SHA-256 is not the recorded one)"]


def _damaged_images(release: Release, part: str) -> list[str]:
    """Name a damaged part's damaged images, by plain reads: HDF5 may fail on such a file."""
    try:
        rows = release.metadata.filter(pc.equal(release.metadata["part"], part))
        rows = rows.select(["synset", "number", "offset", "bytes", "sha256"]).to_pylist()
    except (IntegrityError, pa.ArrowException, KeyError):
        return []
    problems = []
    with (release.paths.root / part).open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            if hashlib.sha256(file.read(row["bytes"])).hexdigest() != row["sha256"]:
                problems.append(f"{part}: {row['synset']} {row['number']} is damaged")
    return problems
