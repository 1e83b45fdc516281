"""The manifest of a release: the first file that a reader opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from sdwn.config import Record
from sdwn.errors import IntegrityError
from sdwn.io import Format
from sdwn.models.builtin import notice

MANIFEST = Format(
    "sdwn-release", 1, "if it is damaged, copy it again; if it is newer, upgrade sdwn"
)

Count = Annotated[int, Field(ge=0, lt=2**63)]


class FileRecord(Record):
    """A file of a release."""

    file: str
    bytes: Count
    sha256: str


class Missing(Record):
    """The part of the plan that a release lacks; ``missing.csv`` lists its synsets."""

    shards: str
    synsets: Count
    images: Count


class Manifest(Record):
    """The content of a release and its origin; entries that a later sdwn adds are ignored.

    Attributes:
        origin: ``run`` or ``import``.
        source: of an import, where its user took the images from.
        licence: of an import, as its user gave it.
        selection: which part of a larger release this is, in words.
        plan_digest: of a run; None for an import.
        statuses: the number of images by status.
        truncated: the number of images with a prompt that was cut; None where it is not known.
        redone: the number of images sampled again in float32; None where it is not known.
        missing: what the run had not made.
        skipped: how many files of an import could not be taken; ``skipped.csv`` lists them.
        settings: of a run, those that decide its images; None for an import.
        evaluation: the settings that the run's config evaluates it with.
        made_on: the number of task runs by model, device and versions.
    """

    format: str = MANIFEST.name
    format_version: int = MANIFEST.version
    sdwn: str
    created: str
    origin: str
    catalog: str
    source: str | None = None
    licence: str | None = None
    selection: str | None
    plan_digest: str | None
    images: Count
    synsets: Count
    imagenet_classes: Count
    statuses: dict[str, Count]
    truncated: Count | None
    redone: Count | None
    missing: Missing | None
    skipped: Count
    bytes: Count
    settings: dict[str, Any] | None
    evaluation: dict[str, Any] | None = None
    made_on: list[dict[str, Any]]
    files: list[FileRecord]

    @property
    def name(self) -> str:
        """The catalog and the part of it, in words; for all of it, the catalog's name alone."""
        name = f"{self.catalog} ({self.selection})" if self.selection else self.catalog
        return f"{name}, incomplete" if self.missing else name

    @property
    def most_rows(self) -> int:
        """The most rows that a table of the release is read with.

        More than ``images``, so that a manifest that counts wrongly is reported as such.
        """
        return 2 * self.images + 1000

    @property
    def notice(self) -> str | None:
        """The note on images of a built-in model, in a sentence or two."""
        return notice(self.settings["model"]["name"]) if self.settings is not None else None

    def text(self) -> str:
        """Return the file's content, JSON."""
        return self.model_dump_json(indent=2) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        IntegrityError: it is damaged or of a later version.
    """
    content = MANIFEST.read(path)
    try:
        json.dumps(content, ensure_ascii=False).encode()  # JSON may hold half a character
        return Manifest.model_validate(content)
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(map(str, mistake["loc"]))
        raise IntegrityError(f"{path}: damaged: {where}: {mistake['msg']}") from None
    except UnicodeEncodeError as error:
        raise IntegrityError(f"{path}: damaged: no Unicode: {error}") from None


def sums_text(digests: Mapping[str, str]) -> str:
    """Return checksums by file name as ``sha256sum -c`` reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())
