"""Export formats ``folders``, as the paper describes its dataset, and ``imagefolder``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sdwn.errors import UsageError
from sdwn.exchange.export_source import ExportFormat, ExportImage, ExportSource, Span, path_name
from sdwn.io import sync
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import PlannedSynset

# A unit of an export that is resumed: a file each would be too many lines in the journal.
SYNSETS = 50


def _write(root: Path, _: str, source: ExportSource, span: Span, *, named_by: str) -> None:
    folders = dict[str, Path]()
    for synset in source.synsets(span):
        folder = folders[synset.wnid] = root / path_name(getattr(synset, named_by))
        folder.mkdir(exist_ok=True)
        if named_by == "synset":
            _write_file(folder / f"{folder.name}.txt", description(synset).encode())

    def write(image: ExportImage) -> None:
        folder = folders[image.row["wnid"]]
        _write_file(
            folder / f"{folder.name}_{image.row['number']}.{image.extension}", image.payload
        )

    for _result in source.map(span, write):
        pass
    for folder in (*folders.values(), root):
        sync(folder)


def description(synset: PlannedSynset) -> str:
    """Return the three lines that lie beside a synset's images."""
    lines = {"prompt": synset.prompt, "synset": synset.synset, "wnid": synset.wnid}
    return "".join(f"{name}: {' '.join(text.splitlines())}\n" for name, text in lines.items())


def _write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def _check(source: ExportSource, *, named_by: str) -> None:
    """Refuse synsets that would share a folder, or take the name of a file beside them."""
    paths = ReleasePaths(Path())
    owners = {path.name: "a file" for path in (paths.card, paths.synsets)}
    for synset in source.release.present:
        name = path_name(getattr(synset, named_by))
        if (owner := owners.setdefault(name, synset.wnid)) != synset.wnid:
            raise UsageError(
                f"the folder {name} of {synset.wnid} would be that of {owner} too; "
                "choose webdataset or parquet"
            )


def _format(named_by: str, data_files: str | None = None) -> ExportFormat:
    return ExportFormat(
        name=lambda index, _: f"synsets-{index:05d}",
        write=partial(_write, named_by=named_by),
        unit=SYNSETS,
        in_bytes=False,
        data_files=data_files,
        check=partial(_check, named_by=named_by),
    )


# For Hugging Face datasets: what lies in folders, and is no text (one ends in .txt).
FOLDERS = _format("synset", data_files="*/*[!t]")
IMAGEFOLDER = _format("wnid")
