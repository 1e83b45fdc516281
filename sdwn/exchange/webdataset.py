"""Tars as the webdataset library reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sdwn.exchange.gallery import Exhibit, Gallery, Span
from sdwn.exchange.layout import Layout
from sdwn.exchange.names import file_name
from sdwn.io import atomic

PART_BYTES = 1_000_000_000
NO_CLASS = -1


def _write(root: Path, name: str, gallery: Gallery, span: Span) -> None:
    # USTAR ends at names of 100 bytes, and PAX headers hold times.
    with (
        atomic(root / name) as temporary,
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for exhibit in gallery.each(span, lambda exhibit: exhibit):
            for extension, content in _members(exhibit, gallery.labelled):
                # Its other fields say nothing of when, where and by whom.
                member = tarfile.TarInfo(f"{key(exhibit)}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def key(exhibit: Exhibit) -> str:
    """Name a sample; readers take the first dot as the end of the name."""
    wnid = file_name(exhibit.row["wnid"]).replace(".", "%2E")
    return f"{wnid}_{exhibit.row['number']:04d}"


def _members(exhibit: Exhibit, labelled: bool) -> Iterator[tuple[str, bytes]]:
    """Give a sample's members: the same for all samples, as readers of batches want it."""
    row = exhibit.row
    yield exhibit.extension, exhibit.payload
    # Readers take each field's type from the first samples, which may have nothing there.
    label = NO_CLASS if row["imagenet_class"] is None else row["imagenet_class"]
    yield "json", json.dumps({**row, "imagenet_class": label}).encode()
    yield "txt", (row.get("prompt") or "").encode()
    if labelled:
        yield "cls", str(row["imagenet_class"]).encode()


WEBDATASET = Layout(
    lambda index, _: f"sdwn-{index:06d}.tar", _write, PART_BYTES, data_files="sdwn-*.tar"
)
