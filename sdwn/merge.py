"""Shards become a release: checked, copied without decoding, and recorded."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import sdwn
from sdwn.card import card
from sdwn.errors import IntegrityError, UsageError
from sdwn.files import ReleasePaths, RunPaths, now, plain_disk_errors, sync, write_text
from sdwn.plan import ImageSpec, Plan, Shard, image_settings, read_plan, summary, table_text
from sdwn.release import FORMAT, FORMAT_VERSION, Release, file_sha256, sums_text
from sdwn.shards import COLUMNS, ImageFile, Selection, Table, join, names, require_origin, texts

PART_BYTES = 4 << 30
MERGING = ".merging"

Advance = Callable[[int], None]


def merge(
    runs: Sequence[RunPaths],
    release: ReleasePaths,
    part_bytes: int = PART_BYTES,
    advance: Advance = lambda _: None,
) -> Release:
    """Write the release of one or several run folders of the same plan.

    A release of this plan that stands there already is kept. ``advance`` is told how many
    images were copied.

    Raises:
        UsageError: the folders hold different plans, or another release stands there.
        IntegrityError: a shard is missing, duplicate, damaged or foreign; each is named.
    """
    plan = _common_plan(runs)
    if release.manifest.exists():
        advance(plan.images)
        return _existing(release, plan)
    _require_free(release.root)
    shards = _locate(runs, plan)
    with _building(release) as building:
        _build(plan, shards, building, part_bytes, advance)
    return Release(release.root)


def _common_plan(runs: Sequence[RunPaths]) -> Plan:
    folders = [paths.root.resolve() for paths in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"{folder} is given twice; name each run folder once")
    plans = [read_plan(paths) for paths in runs]
    for paths, plan in zip(runs, plans, strict=True):
        if plan.digest != plans[0].digest:
            raise UsageError(
                f"{paths.root} has plan {plan.digest[:12]}, {runs[0].root} has "
                f"{plans[0].digest[:12]}; only runs of the same plan make one release"
            )
    return plans[0]


def _require_free(root: Path) -> None:
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise UsageError(f"{root}: expected a folder or nothing, found a file or a link")
    if root.exists() and any(root.iterdir()):
        raise UsageError(f"{root}: expected an empty folder or none, found other files")


def _existing(paths: ReleasePaths, plan: Plan) -> Release:
    release = Release(paths.root)
    if release.manifest["plan_digest"] != plan.digest:
        raise UsageError(
            f"{paths.root} holds the release of another plan "
            f"({release.manifest['plan_digest'][:12]}, this is {plan.digest[:12]}); "
            "choose another folder"
        )
    return release


def _locate(runs: Sequence[RunPaths], plan: Plan) -> list[Path]:
    """Find every shard's one file, structure and origin checked.

    Raises:
        IntegrityError: with every problem, a line each.
    """
    places: dict[int, list[Path]] = {shard.index: [] for shard in plan.shards}
    problems = []
    for paths in runs:
        for index in sorted(paths.done_shards()):
            if index in places:
                places[index].append(paths.shard(index))
            else:
                path = paths.shard(index)
                problems.append(
                    f"{path}: foreign: the plan has no such shard; remove it: rm {path}"
                )
    problems += _missing(runs, [index for index, found in places.items() if not found])
    for index, found in places.items():
        problems += _shard_problems(plan, plan.shards[index], found)
    if problems:
        raise IntegrityError("\n".join(problems))
    return [found[0] for found in places.values()]


def _missing(runs: Sequence[RunPaths], indices: list[int]) -> Iterator[str]:
    if indices:
        yield (
            f"{len(indices)} shards missing ({ranges(indices)}); "
            f"make them with: sdwn submit {runs[0].root} --wait"
        )


def ranges(indices: Iterable[int]) -> str:
    """Write indices briefly.

    >>> ranges([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _shard_problems(plan: Plan, shard: Shard, found: list[Path]) -> Iterator[str]:
    if len(found) > 1:
        copies = ", ".join(map(str, found))
        yield f"shard {shard.index}: duplicate: {copies}; remove all but one"
        return
    for path in found:
        try:
            with ImageFile(path) as file:
                check_origin(file, plan, shard)
        except IntegrityError as error:
            yield _with_cure(path, error)


def _with_cure(path: Path, error: IntegrityError) -> str:
    return f"{error}; make it again with: rm {path} && sdwn submit {path.parent.parent} --wait"


def check_origin(file: ImageFile, plan: Plan, shard: Shard) -> None:
    """Hold a shard's record and its rows against the plan.

    Raises:
        IntegrityError: it belongs to another plan, is another shard, or has other rows.
    """
    require_origin(file, plan.digest, shard.index, plan.shard_images(shard))
    rows = file.rows()
    absent = [column.name for column in COLUMNS if column.name not in rows]
    if absent:
        raise IntegrityError(f"{file.path}: expected the column {absent[0]}, found none")
    if list(_identities(rows)) != [identity(spec, plan) for spec in plan.specs(shard)]:
        raise IntegrityError(f"{file.path}: its rows are not those that the plan asks for")


def identity(spec: ImageSpec, plan: Plan) -> tuple[Any, ...]:
    """Give what the plan says of an image."""
    size = plan.config.generation.width, plan.config.generation.height
    return (spec.wnid, spec.synset, spec.number, spec.seed, spec.prompt, *size)


def _identities(rows: Table) -> Iterator[tuple[Any, ...]]:
    columns = ("wnid", "synset", "number", "seed", "prompt", "width", "height")
    values = (texts(rows[c]) if rows[c].dtype.kind == "S" else rows[c].tolist() for c in columns)
    return zip(*values, strict=True)


@contextmanager
def _building(release: ReleasePaths) -> Iterator[ReleasePaths]:
    """Give a folder beside the release that takes its name once everything is on disk.

    Several merges may run at once: the first to finish gives the release its name.
    """
    _sweep(release)
    token = f"{socket.gethostname()}-{os.getpid()}"
    folder = release.root.parent / f".{release.root.name}.{token}{MERGING}"
    with plain_disk_errors(release.root):
        folder.mkdir(parents=True)
        try:
            yield ReleasePaths(folder)
            sync(folder)
            if not release.manifest.exists():
                folder.replace(release.root)
                sync(release.root.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(release: ReleasePaths) -> None:
    """Remove what merges killed on this machine have left: no more than copies."""
    start = f".{release.root.name}.{socket.gethostname()}-"
    for folder in release.root.parent.glob(f"{glob.escape(start)}*{MERGING}"):
        process = folder.name.removeprefix(start).removesuffix(MERGING)
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _build(
    plan: Plan, shards: list[Path], paths: ReleasePaths, part_bytes: int, advance: Advance
) -> None:
    writer = MetadataWriter(paths.metadata, plan)
    files, counts = [], Counter[str]()
    with writer:
        for number, group in enumerate(group_by_size(shards, part_bytes)):
            part = paths.part(number)
            digest, rows, offsets = _write_part(plan, part, group, advance)
            writer.add(part.name, rows, offsets)
            counts.update(names(rows["status"], "status"))
            files.append(record(part, digest))
    write_text(paths.synsets, table_text(plan.synsets))
    files += [record(path, file_sha256(path)) for path in _tables(paths)]
    _describe(plan, paths, files, dict(sorted(counts.items())))


def _tables(paths: ReleasePaths) -> list[Path]:
    sync(paths.metadata)
    return [paths.metadata, paths.synsets]


def group_by_size(paths: Iterable[Path], size: int) -> Iterator[list[Path]]:
    """Cut a list of files into runs of at least ``size`` bytes, whole files each."""
    group: list[Path] = []
    total = 0
    for path in paths:
        group.append(path)
        total += path.stat().st_size
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group


def _write_part(
    plan: Plan, part: Path, shards: list[Path], advance: Advance
) -> tuple[str, Table, Any]:
    attributes = {
        "kind": "part",
        "plan_digest": plan.digest,
        "model": plan.config.model.name,
        "settings": json.dumps(image_settings(plan.config)),
    }
    with ExitStack() as stack:
        files = [stack.enter_context(ImageFile(path)) for path in shards]
        selections = [Selection(file, 0, len(file)) for file in files]
        try:
            digest = join(part, attributes, selections, advance)
        except IntegrityError as error:
            raise IntegrityError("\n".join(_damaged(files)) or str(error)) from None
    sync(part)
    with ImageFile(part) as written:
        return digest, written.rows(), written.offsets + np.uint64(written.blob_start)


def _damaged(files: list[ImageFile]) -> Iterator[str]:
    for file in files:
        try:
            file.check()
        except IntegrityError as error:
            yield _with_cure(file.path, error)


@dataclass
class MetadataWriter:
    """Write the table with a row an image, a part at a time."""

    path: Path
    plan: Plan

    def __enter__(self) -> MetadataWriter:
        self._writer: pq.ParquetWriter | None = None
        self._classes = {row.wnid: row.imagenet_class for row in self.plan.synsets}
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()

    def add(self, part: str, rows: Table, offsets: Any) -> None:
        """Add a part's rows; image i is the file's bytes ``offsets[i]`` to ``offsets[i + 1]``."""
        batch = metadata_table(part, rows, offsets, self._classes)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, batch.schema, compression="zstd")
        self._writer.write_table(batch)


def metadata_table(
    part: str, rows: Table, offsets: Any, classes: dict[str, int | None]
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


def record(path: Path, digest: str) -> dict[str, Any]:
    """Describe a file of the release."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _describe(
    plan: Plan, paths: ReleasePaths, files: list[dict[str, Any]], statuses: dict[str, int]
) -> None:
    """Write the card, the manifest and the checksums, each of which covers what came before."""
    parts = [paths.root / file["file"] for file in files if file["file"].endswith(".h5")]
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sdwn": sdwn.__version__,
        "created": now(),
        "plan_digest": plan.digest,
        "catalog": plan.catalog,
        "images": plan.images,
        "synsets": len(plan.synsets),
        "imagenet_classes": summary(plan)["imagenet_classes"],
        "statuses": statuses,
        "bytes": sum(file["bytes"] for file in files),
        "settings": image_settings(plan.config),
        "made_on": _made_on(parts),
    }
    write_text(paths.card, card(manifest))
    files.append(record(paths.card, file_sha256(paths.card)))
    write_text(paths.manifest, json.dumps({**manifest, "files": files}, indent=2) + "\n")
    digests = {file["file"]: file["sha256"] for file in files}
    digests[paths.manifest.name] = file_sha256(paths.manifest)
    write_text(paths.sums, sums_text(digests))


def _made_on(parts: list[Path]) -> list[dict[str, Any]]:
    """Count the runs of tasks that made the images, by device and versions."""
    kinds: Counter[str] = Counter()
    for path in parts:
        with ImageFile(path) as file:
            for session in file.sessions:
                kind = {k: v for k, v in session.items() if k not in ("host", "job", "started")}
                kinds[json.dumps(kind, sort_keys=True)] += 1
    return [{**json.loads(kind), "task_runs": count} for kind, count in sorted(kinds.items())]


def merged_summary(release: Release) -> dict[str, Any]:
    """Say what a release holds."""
    manifest = release.manifest
    counts = {key: manifest[key] for key in ("images", "synsets", "bytes", "statuses")}
    return {**counts, "release": str(release.paths.root)}
