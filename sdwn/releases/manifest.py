"""What a release says of itself: the first file that a reader opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from sdwn.config import Record
from sdwn.errors import IntegrityError
from sdwn.io import read_json
from sdwn.models.builtin import notice

FORMAT = "sdwn-release"
FORMAT_VERSION = 1


Count = Annotated[int, Field(ge=0, lt=2**63)]


class FileRecord(Record):
    """A file of a release."""

    file: str
    bytes: Count
    sha256: str


class Missing(Record):
    """What the plan has and a release has not; its synsets stand in ``missing.csv``."""

    shards: str
    synsets: Count
    images: Count


class Manifest(Record):
    """What a release holds and where that is from; a later sdwn may say more.

    ``origin`` is ``run`` or ``import``; of an import ``plan_digest`` and ``settings`` are None,
    and ``source`` and ``licence`` are what its user said of the pictures.
    ``selection`` says in words what was taken of a larger release, ``missing`` what the run had
    not made, ``skipped`` how many files of an import could not be taken (``skipped.csv``).
    ``statuses`` counts images by status. ``truncated`` and ``redone`` count images, None where
    nobody recorded it. ``evaluation`` has the settings that the run's config evaluates it with.
    ``made_on`` counts runs of tasks by model, device and versions.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
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
        """The catalog, and what was taken of it; equal to the catalog's name for all of it."""
        name = f"{self.catalog} ({self.selection})" if self.selection else self.catalog
        return f"{name}, incomplete" if self.missing else name

    @property
    def most_rows(self) -> int:
        """More rows than this no table of the release is read with.

        There is room for a manifest that counts wrongly, which is told as such.
        """
        return 2 * self.images + 1000

    @property
    def notice(self) -> str | None:
        """What is to be said of images of a built-in model, in a sentence or two."""
        return notice(self.settings["model"]["name"]) if self.settings is not None else None

    def text(self) -> str:
        """Write it as JSON."""
        return self.model_dump_json(indent=2) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        IntegrityError: it is damaged or of a later version.
    """
    content = read_json(path)
    found = content.get("format"), content.get("format_version")
    if found != (FORMAT, FORMAT_VERSION):
        raise IntegrityError(
            f"{path}: expected {FORMAT} {FORMAT_VERSION}, found {found[0]} {found[1]}; "
            "read it with the sdwn that wrote it"
        )
    try:
        json.dumps(content, ensure_ascii=False).encode()
        return Manifest.model_validate(content)
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(map(str, mistake["loc"]))
        raise IntegrityError(f"{path}: damaged: {where}: {mistake['msg']}") from None
    except UnicodeEncodeError as error:
        raise IntegrityError(f"{path}: damaged: no Unicode: {error}") from None


def sums_text(digests: Mapping[str, str]) -> str:
    """Write checksums as ``sha256sum -c`` reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())
