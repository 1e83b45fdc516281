"""What people take home: a synset's images as a zip, a search as a list; streamed."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sdwn.errors import IntegrityError
from sdwn.io import csv_cell, csv_text

if TYPE_CHECKING:
    from sdwn.browser.pictures import Pictures
    from sdwn.browser.shot import Shot
    from sdwn.releases.release import Release

TABLE, DAMAGED = "metadata.csv", "DAMAGED.txt"
LIST_HEAD = (
    *("wnid", "synset", "number", "status", "right"),
    *("top1_wnid", "top1", "top1_probability"),
)
# Of an image's own record; what an import has not stays empty.
RECORDED = ("wnid", "synset", "number", "status", "seed", "prompt", "width", "height", "sha256")
GUESSED = ("right", *(f"top{n}{what}" for n in range(1, 6) for what in ("", "_probability")))
ROWS_AT_ONCE = 500
LONGEST_NAME = 80


def file_name(synset: str, number: int, suffix: str) -> str:
    """Name an image's file by its synset, whatever the synset is called.

    >>> file_name("dog.n.01", 3, ".webp"), file_name("9/11.n.01", 0, ".png")
    ('dog.n.01-3.webp', '9_11.n.01-0.png')
    """
    return f"{plain_name(synset)}-{number}{suffix}"


def plain_name(name: str) -> str:
    """Leave of a name what every file system and every header takes.

    >>> plain_name("../../x.n.01"), plain_name("日本"), plain_name("cat-o'-nine-tails.n.01")
    ('_.._x.n.01', '__', 'cat-o_-nine-tails.n.01')
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:LONGEST_NAME] or "_"


def cell(value: Any) -> Any:
    """Return a value as people read it, see :func:`csv_cell`.

    >>> cell("=HYPERLINK(1)"), cell(True)
    ("'=HYPERLINK(1)", 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return csv_cell(value)


def image_list(shots: Iterable[Shot]) -> Iterator[str]:
    """Write a table of images as CSV, some rows at a time: what ``sdwn export --only`` takes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LIST_HEAD)
    for count, shot in enumerate(shots, start=1):
        writer.writerow(map(cell, _listed(shot)))
        if count % ROWS_AT_ONCE == 0:
            yield _taken(text)
    yield _taken(text)


def _listed(shot: Shot) -> list[Any]:
    row = [shot.wnid, shot.synset, shot.number, shot.status]
    if shot.verdict is None:
        return [*row, None, None, None, None]
    best = shot.verdict.top5[0]
    return [*row, shot.verdict.right, best.wnid, best.name, round(best.probability, 6)]


def _taken(text: io.StringIO) -> str:
    found = text.getvalue()
    text.seek(0)
    text.truncate()
    return found


def zipped(release: Release, pictures: Pictures, shots: Sequence[Shot]) -> Iterator[bytes]:
    """Write images as they are stored, and what is known of them, as a zip: one at a time.

    An image that is damaged is named in DAMAGED.txt and left out.
    """
    out = _Outbox()
    rows, damaged = list[list[Any]](), list[str]()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for shot in shots:
            try:
                stored = pictures.stored(shot.row)
            except IntegrityError as error:
                damaged.append(f"{shot.synset} {shot.number}: {error}\n")
                continue
            name = file_name(shot.synset, shot.number, stored.suffix)
            archive.writestr(_member(name), stored.payload)
            rows.append([name, *_described(release.row(shot.row), shot)])
            yield out.taken()
        archive.writestr(_member(TABLE), csv_text(("file", *RECORDED, *GUESSED), rows, cell))
        if damaged:
            archive.writestr(_member(DAMAGED), "".join(damaged))
    yield out.taken()


def _member(name: str) -> zipfile.ZipInfo:
    """Name a member, as of the zip format's first day: the same images give the same bytes."""
    found = zipfile.ZipInfo(name)
    found.external_attr = 0o644 << 16
    return found


def _described(row: dict[str, Any], shot: Shot) -> list[Any]:
    found = [row.get(name) for name in RECORDED]
    if shot.verdict is None:
        return [*found, *[None] * len(GUESSED)]
    found.append(shot.verdict.right)
    for guess in shot.verdict.top5:
        found += [guess.name, round(guess.probability, 6)]
    return found


class _Outbox(io.RawIOBase):
    """Keeps what a zip writes until it is taken away; it cannot go back, so nothing is kept."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self._blocks.append(bytes(block))
        return len(self._blocks[-1])

    def flush(self) -> None:
        """Do nothing: an archive that a server left behind is closed after this was."""

    def taken(self) -> bytes:
        found = b"".join(self._blocks)
        self._blocks.clear()
        return found
