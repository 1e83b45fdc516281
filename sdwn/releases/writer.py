"""Write a release: its parts one after another, then everything that describes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import sdwn
from sdwn.io import atomic, csv_text, file_sha256, is_stray, now, sync, write_text
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import PlannedSynset, table_text
from sdwn.releases.card import card
from sdwn.releases.manifest import FileRecord, Manifest, Missing, sums_text
from sdwn.releases.staged_folder import JOURNAL, StagedFolder
from sdwn.storage.columns import Table, names, texts
from sdwn.storage.shards import ImageFile
from sdwn.wordnet.taxonomy import write_taxonomy

# What distinguishes a run of a task from others on the same kind of device.
_OF_ONE_RUN = ("host", "job", "started")

Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a release's images are from: what it says of itself that they do not.

    ``synsets`` are all that the plan has, also those that this release has no images of.
    ``missing`` are those that the run had not made, ``skipped`` the files that could not be
    taken and why. ``taxonomy`` is what WordNet says of the synsets, None where nobody wrote it.
    """

    kind: str
    catalog: str
    synsets: tuple[PlannedSynset, ...]
    plan_digest: str | None = None
    settings: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    source: str | None = None
    licence: str | None = None
    selection: str | None = None
    missing: tuple[PlannedSynset, ...] = ()
    missing_shards: str = ""
    skipped: tuple[tuple[str, str], ...] = ()
    taxonomy: pa.Table | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """What every part says of itself."""
        return {
            "kind": "part",
            "plan_digest": self.plan_digest or "",
            "model": self.settings["model"]["name"] if self.settings else "",
            "settings": json.dumps(self.settings or {}),
        }


class ReleaseWriter:
    """Fills a folder with a release; leaving the block after its last part describes them."""

    def __init__(self, staged: StagedFolder, origin: Origin) -> None:
        self._staged, self._origin = staged, origin
        self._paths = ReleasePaths(staged.root)
        self._metadata = _MetadataWriter(
            self._paths.metadata, {row.wnid: row.imagenet_class for row in origin.synsets}
        )
        self._files: list[FileRecord] = []
        self._tally = _Tally()

    def __enter__(self) -> ReleaseWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._metadata.close()
        if kind is None:
            self._describe()

    def add_part(self, inputs: Any, write: Callable[[Path, Attributes], str]) -> bool:
        """Add a part, unless a killed attempt has finished it: then return False.

        Args:
            inputs: what it is made of, in JSON's terms.
            write: writes the file of images, with the attributes given, and returns its SHA-256.
        """
        path = self._paths.part(len(self._files))
        found = self._staged.finished.get(path.name)
        # A kill may fall between a part and its record, and a disk may fail between attempts.
        new = (
            found is None
            or found["inputs"] != json.loads(json.dumps(inputs))
            or not path.is_file()
            or found["sha256"] != file_sha256(path)
        )
        if found is None or new:
            with atomic(path) as temporary:
                digest = write(temporary, self._origin.attributes)
            found = {"inputs": inputs, "sha256": digest}
            self._staged.finish(path.name, found)
        self._files.append(_record(path, found["sha256"]))
        with ImageFile(path) as file:
            rows = file.rows()
            self._metadata.add(path.name, rows, file.offsets + np.uint64(file.blob_start))
            self._tally.add(rows, file.sessions)
        return new

    def _describe(self) -> None:
        """Write tables, card, manifest and checksums, each of which covers what came before."""
        self._remove_stale()
        sync(self._paths.metadata)
        origin, paths = self._origin, self._paths
        write_text(paths.synsets, table_text(origin.synsets))
        tables = [paths.metadata, paths.synsets]
        if origin.taxonomy is not None:
            write_taxonomy(paths.taxonomy, origin.taxonomy)
            tables.append(paths.taxonomy)
        if origin.missing:
            rows = [(row.wnid, row.synset) for row in origin.missing]
            tables.append(_write_csv(paths.missing, ("wnid", "synset"), rows))
        if origin.skipped:
            tables.append(_write_csv(paths.skipped, ("file", "reason"), origin.skipped))
        self._files += [_record(path, file_sha256(path)) for path in tables]
        present = [row for row in origin.synsets if row.wnid in self._tally.wnids]
        described = self._manifest(present)
        write_text(paths.card, card(described, present, self._tally.columns))
        self._files.append(_record(paths.card, file_sha256(paths.card)))
        write_text(paths.manifest, described.model_copy(update={"files": self._files}).text())
        digests = {file.file: file.sha256 for file in self._files}
        digests[paths.manifest.name] = file_sha256(paths.manifest)
        write_text(paths.sums, sums_text(digests))

    def _remove_stale(self) -> None:
        """Remove what attempts under other options have left."""
        kept = {JOURNAL, self._paths.metadata.name, *(file.file for file in self._files)}
        for path in self._paths.root.iterdir():
            if path.name not in kept and not is_stray(path.name):
                path.unlink()

    def _manifest(self, present: list[PlannedSynset]) -> Manifest:
        origin, tally = self._origin, self._tally
        return Manifest(
            sdwn=sdwn.__version__,
            created=now(),
            origin=origin.kind,
            catalog=origin.catalog,
            source=origin.source,
            licence=origin.licence,
            selection=origin.selection,
            plan_digest=origin.plan_digest,
            images=sum(tally.statuses.values()),
            synsets=len(present),
            imagenet_classes=sum(row.imagenet_class is not None for row in present),
            statuses=dict(sorted(tally.statuses.items())),
            truncated=tally.flags.get("truncated"),
            redone=tally.flags.get("redone"),
            missing=_missing(origin),
            skipped=len(origin.skipped),
            bytes=sum(file.bytes for file in self._files),
            settings=origin.settings,
            evaluation=origin.evaluation,
            made_on=tally.made_on() if origin.kind == "run" else [],
            files=self._files,
        )


def cut(sizes: Sequence[float], least: float) -> list[tuple[int, int]]:
    """Cut a row of sizes into runs of at least ``least``; what is left goes with the last.

    So a run of small things has less than twice ``least``.

    >>> cut([3, 3, 3, 3, 3], 5)
    [(0, 2), (2, 5)]
    """
    ends, total = list[int](), 0.0
    for end, size in enumerate(sizes, start=1):
        total += size
        if total >= least:
            ends.append(end)
            total = 0
    ends[-1:] = [len(sizes)]
    return list(pairwise([0, *ends]))


def _missing(origin: Origin) -> Missing | None:
    if not origin.missing:
        return None
    each = origin.settings["images_per_synset"] if origin.settings else 0
    count = len(origin.missing)
    return Missing(shards=origin.missing_shards, synsets=count, images=count * each)


class _Tally:
    """Counts over all parts."""

    def __init__(self) -> None:
        self.wnids: set[str] = set()
        self.columns: set[str] = set()
        self.statuses: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self._sessions: dict[str, str] = {}

    def add(self, rows: Table, sessions: list[dict[str, Any]]) -> None:
        self.columns.update(rows)
        self.wnids.update(texts(np.unique(rows["wnid"])))
        self.statuses.update(names(rows["status"], "status"))
        for name in ("truncated", "redone"):
            if name in rows:
                self.flags[name] += int(rows[name].sum())
        for session in sessions:
            kind = {key: value for key, value in session.items() if key not in _OF_ONE_RUN}
            # A session stands in each part that has images of it.
            line = json.dumps(session, sort_keys=True)
            self._sessions[line] = json.dumps(kind, sort_keys=True)

    def made_on(self) -> list[dict[str, Any]]:
        """Count the runs of tasks by model, device and versions."""
        kinds = Counter(self._sessions.values())
        return [{**json.loads(kind), "task_runs": count} for kind, count in sorted(kinds.items())]


class _MetadataWriter:
    """Writes the table with a row an image, a part at a time."""

    def __init__(self, path: Path, classes: Mapping[str, int | None]) -> None:
        self._path, self._classes = path, classes
        self._writer: pq.ParquetWriter | None = None

    def add(self, part: str, rows: Table, offsets: Any) -> None:
        """Add a part's rows; image i is the file's bytes ``offsets[i]`` to ``offsets[i + 1]``."""
        batch = metadata_table(part, rows, offsets, self._classes)
        if self._writer is None:
            # Arrow takes a path as text, and not every path is.
            self._file = self._path.open("wb")
            self._writer = pq.ParquetWriter(self._file, batch.schema, compression="zstd")
        self._writer.write_table(batch)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._file.close()


def metadata_table(
    part: str, rows: Table, offsets: Any, classes: Mapping[str, int | None]
) -> pa.Table:
    """Turn the rows of a part into Arrow, with where each image lies and its ImageNet class."""
    wnids = texts(rows["wnid"])
    columns: dict[str, Any] = {
        "part": pa.array([part] * len(wnids)).dictionary_encode(),
        "row": pa.array(range(len(wnids)), pa.uint32()),
        "offset": pa.array(offsets[:-1], pa.uint64()),
        "bytes": pa.array(np.diff(offsets), pa.uint32()),
        "imagenet_class": pa.array([classes.get(wnid) for wnid in wnids], pa.int16()),
    }
    for name, values in rows.items():
        columns[name] = _arrow(name, values)
    return pa.table(
        {name: columns[name] for name in (*_FIRST, *sorted(set(columns) - set(_FIRST)))}
    )


_FIRST = ("wnid", "synset", "number", "status", "imagenet_class", "part", "row", "offset", "bytes")


def _arrow(name: str, values: Any) -> pa.Array:
    if name in ("status", "codec"):
        return pa.array(names(values, name))
    if name == "sha256":
        return pa.array([value.tobytes().hex() for value in values])
    return pa.array(texts(values) if values.dtype.kind == "S" else values)


def _record(path: Path, digest: str) -> FileRecord:
    return FileRecord(file=path.name, bytes=path.stat().st_size, sha256=digest)


def _write_csv(path: Path, head: tuple[str, ...], rows: Any) -> Path:
    write_text(path, csv_text(head, rows))
    return path
