"""A folder for each synset: as the paper describes its release, or as torchvision reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sdwn.errors import UsageError
from sdwn.exchange.gallery import Exhibit, Gallery, Span
from sdwn.exchange.layout import Layout
from sdwn.exchange.names import file_name
from sdwn.io import sync
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import PlannedSynset

SYNSETS = 50


def _by_name(synset: PlannedSynset) -> str:
    return file_name(synset.synset)


def _by_wnid(synset: PlannedSynset) -> str:
    return file_name(synset.wnid)


def _write_named(root: Path, _: str, gallery: Gallery, span: Span) -> None:
    for synset in gallery.synsets(span):
        folder = root / _by_name(synset)
        folder.mkdir(exist_ok=True)
        _write_file(folder / f"{folder.name}.txt", description(synset).encode())
    _write_images(root, _by_name, gallery, span)


def _write_numbered(root: Path, _: str, gallery: Gallery, span: Span) -> None:
    _write_images(root, _by_wnid, gallery, span)


def description(synset: PlannedSynset) -> str:
    """Give the three lines that lie beside a synset's images."""
    lines = {"prompt": synset.prompt, "synset": synset.synset, "wnid": synset.wnid}
    return "".join(f"{name}: {' '.join(text.splitlines())}\n" for name, text in lines.items())


def _write_images(
    root: Path, name: Callable[[PlannedSynset], str], gallery: Gallery, span: Span
) -> None:
    folders = {synset.wnid: root / name(synset) for synset in gallery.synsets(span)}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)

    def write(exhibit: Exhibit) -> None:
        folder = folders[exhibit.row["wnid"]]
        file = f"{folder.name}_{exhibit.row['number']}.{exhibit.extension}"
        _write_file(folder / file, exhibit.payload)

    for _ in gallery.each(span, write):
        pass
    for folder in (*folders.values(), root):
        sync(folder)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check(name: Callable[[PlannedSynset], str]) -> Callable[[Gallery], None]:
    """Refuse synsets that would share a folder, or take the name of a file beside them."""

    def check(gallery: Gallery) -> None:
        paths = ReleasePaths(Path())
        taken = {path.name: "a file" for path in (paths.card, paths.synsets)}
        for synset in gallery.release.present:
            found = taken.setdefault(name(synset), synset.wnid)
            if found != synset.wnid:
                raise UsageError(
                    f"the folder {name(synset)} of {synset.wnid} would be that of {found} too; "
                    "choose webdataset or parquet"
                )

    return check


def _unit(index: int, _: int) -> str:
    return f"synsets-{index:05d}"


# For Hugging Face datasets: what lies in folders, and is no text (one ends in .txt).
FOLDERS = Layout(
    _unit,
    _write_named,
    SYNSETS,
    in_bytes=False,
    data_files="*/*[!t]",
    check=_check(_by_name),
)
IMAGEFOLDER = Layout(_unit, _write_numbered, SYNSETS, in_bytes=False, check=_check(_by_wnid))
