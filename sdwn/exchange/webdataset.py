"""Export format ``webdataset``: tars as the webdataset library reads them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from sdwn.exchange.export_source import ExportFormat, ExportSource, Span, path_name
from sdwn.io import atomic

NO_CLASS = -1


def _write(root: Path, name: str, source: ExportSource, span: Span) -> None:
    labelled = not source.table["imagenet_class"].null_count
    # USTAR ends at names of 100 bytes, and PAX headers hold times.
    with (
        atomic(root / name) as temporary,
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for image in source.map(span, lambda image: image):
            row = image.row
            # Readers take the first dot as the end of a sample's name.
            key = f"{path_name(row['wnid']).replace('.', '%2E')}_{row['number']:04d}"
            # Readers take each field's type from the first samples, which may have nothing there.
            label = NO_CLASS if row["imagenet_class"] is None else row["imagenet_class"]
            # Each sample has the same members: readers of batches need that.
            members = {
                image.extension: image.payload,
                "json": json.dumps({**row, "imagenet_class": label}).encode(),
                "txt": (row.get("prompt") or "").encode(),
            }
            if labelled:
                members["cls"] = str(label).encode()
            for extension, content in members.items():
                # Its other fields record nothing of when, where and by whom.
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


WEBDATASET = ExportFormat(
    name=lambda index, _: f"sdwn-{index:06d}.tar",
    write=_write,
    unit=1_000_000_000,
    data_files="sdwn-*.tar",
)
