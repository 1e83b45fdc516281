"""The HDF5 file of images: one schema for a partial shard, a shard and a part of a release.

::

    /            attributes: format, format_version, kind (piece, shard or part), images,
                 plan_digest, shard, settings (JSON), model, revision
    /blob        uint8 [bytes], contiguous: the encoded images, one after another
    /offsets     uint64 [images + 1]: image i is blob[offsets[i]:offsets[i + 1]]
    /rows/NAME   one dataset a column, a value an image; see columns.py
    /task_runs   JSON text, a value for each task run that made some of the images: device,
                 host, job, versions, start; rows/task_run points here

Text is UTF-8 of fixed length. A column that is absent holds nothing for any image. HDF5 writes
the tables in memory, with room for the blob that takes none, and plain writes put tables and
images on the disk: HDF5 itself ends the process where it cannot write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdwn.errors import IntegrityError, MisplacedError
from sdwn.io import Advance, in_threads, open_plain, plain_disk_errors, reading
from sdwn.storage.codecs import CODECS
from sdwn.storage.columns import COLUMNS, VERSION_1, Table, texts
from sdwn.storage.images import undecodable

FORMAT = "sdwn-images"
FORMAT_VERSION = 2
# HDF5 1.10's format checksums its own structure: a flipped bit there is an error, where the
# older one may send its reader round in circles.
LIBVER = ("v110", "v110")
# gzip makes a thousand bytes out of one at most: a table that claims more was never written.
MOST_COMPRESSED = 1032
# Images are decoded in threads, for Pillow leaves Python's lock to others; those that wait for
# them take memory.
DECODERS = len(os.sched_getaffinity(0))
AHEAD = 8 * DECODERS

# A file without its blob: columns, the images' sizes in bytes, records of task runs.
Contents = tuple[Table, ArrayLike, Iterable[Mapping[str, Any]]]


def write_images(
    path: Path, attributes: Mapping[str, Any], contents: Contents, payloads: Iterable[bytes]
) -> str:
    """Write a file of images, whose bytes are given in order, and return its SHA-256."""
    before, after = _tables(attributes, contents)
    needed = len(before) + int(np.sum(contents[1])) + len(after)
    digest = hashlib.sha256()
    with plain_disk_errors(path.parent, needed), path.open("wb") as file:
        if shutil.disk_usage(path.parent).free < needed:  # now, not after minutes of copying
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for block in chain([before], payloads, [after]):
            file.write(block)
            digest.update(block)
        if (written := file.tell()) != needed:
            raise IntegrityError(f"{path}: expected {needed} bytes, found {written}")
    return digest.hexdigest()


def _tables(attributes: Mapping[str, Any], contents: Contents) -> tuple[bytes, bytes]:
    """Return the bytes of a file before its blob, and those behind it."""
    rows, sizes, task_runs = contents
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype("u8")
    fixed = {"format": FORMAT, "format_version": FORMAT_VERSION, "images": len(offsets) - 1}

    def utf8(values: Any) -> Any:
        # HDF5 would convert ASCII. Of fixed length a text lies where it has a checksum.
        return values.view(h5py.string_dtype("utf-8", max(1, values.dtype.itemsize)))

    # In memory, but no BytesIO: the blob is a hole in it, and takes no memory.
    with os.fdopen(os.memfd_create("tables"), "r+b", buffering=0) as target:
        with h5py.File(target, "w", libver=LIBVER) as file:
            for name, value in {**fixed, **attributes}.items():
                text = isinstance(value, str)
                file.attrs.create(name, utf8(np.array(value.encode())) if text else value)
            group = file.create_group("rows")
            for column in (column for column in COLUMNS if column.name in rows):
                values = np.ascontiguousarray(rows[column.name])
                if column.dtype is None:
                    values = utf8(values)
                elif column.names:
                    numbered = {name: number for number, name in enumerate(column.names)}
                    values = values.view(h5py.enum_dtype(numbered, column.dtype))
                # gzip of level 1, for ten images repeat their synset's prompt.
                packed = {"compression": 1, "fletcher32": True}
                dataset = group.create_dataset(column.name, data=values, **packed)
                dataset.attrs["meaning"] = column.meaning
            del dataset  # an open dataset's values are laid out last, behind the blob

            lines = [json.dumps(task_run, sort_keys=True).encode() for task_run in task_runs]
            file.create_dataset("task_runs", data=utf8(np.array(lines)), fletcher32=True)
            file.create_dataset("offsets", data=offsets, fletcher32=True)

            # The blob is allocated and not written.
            early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            blob = file.create_dataset("blob", (int(offsets[-1]),), "u1", dcpl=early)
            start = int(blob.id.get_offset())
        target.seek(0)
        before = target.read(start)
        target.seek(start + int(offsets[-1]))
        return before, target.read()


class Expected(NamedTuple):
    """Requirements on a shard or partial shard: its plan, its shard, its number of images."""

    plan_digest: str
    shard: int
    images: int


class ImageFile:
    """A file of images, open for reading; image i is ``offsets[i]`` to ``offsets[i + 1]``.

    Offsets count from ``blob_start`` in the file. It must be what is ``expected`` of a run's file,
    else a MisplacedError; or have at most ``most`` images. Version 1 reads as version 2.
    """

    def __init__(
        self, path: Path, expected: Expected | None = None, most: int | None = None
    ) -> None:
        self.path = path
        self._rows: Table | None = None
        self._file = os.fdopen(open_plain(path), "rb", buffering=0)
        # HDF5 keeps a megabyte and more for each open file; a merge has many.
        with reading(path), h5py.File(path) as file:
            self.attributes: dict[str, Any] = {
                name: value.decode() if isinstance(value, bytes) else value
                for name, value in file.attrs.items()
            }
            found = {name: str(value) for name, value in self.attributes.items()}
            head = f"{found.get('format', 'another file')} {found.get('format_version', '')}"
            if head not in (f"{FORMAT} 1", f"{FORMAT} {FORMAT_VERSION}"):
                wanted = f"expected {FORMAT} version {FORMAT_VERSION}, found {head.strip()}"
                raise IntegrityError(f"{path}: {wanted}; read it with the sdwn that wrote it")
            self._stored = VERSION_1 if head == f"{FORMAT} 1" else {}  # what it calls a column
            plan, shard = found.get("plan_digest", ""), found.get("shard")
            if expected is not None and plan != expected.plan_digest:
                theirs, ours = f"plan {plan[:12]}" if plan else "no plan", expected.plan_digest
                raise MisplacedError(f"{path}: foreign: of {theirs}, not {ours[:12]}", plan)
            if expected is not None and shard != str(expected.shard):
                wrong = f"expected shard {expected.shard}, found shard {shard} of this plan"
                raise MisplacedError(f"{path}: {wrong}", plan)
            self._read_structure(file, expected.images if expected else most)
            if expected is not None and len(self) != expected.images:
                raise ValueError(f"expected {expected.images} images, found {len(self)}")

    def _read_structure(self, file: h5py.File, most: int | None) -> None:
        """Read offsets and task runs, after what tables claim is checked: they may take memory."""
        # A link could lead to any file.
        hard = h5py.h5l.TYPE_HARD
        if link := file.id.links.visit(lambda n, one: None if one.type == hard else n, info=True):
            raise ValueError(f"{link.decode(errors='replace')} is a link")
        runs = f"{self._stored.get('task_run', 'task_run')}s"
        rows = {f"rows/{name}": table for name, table in file["rows"].items()}
        others = {name: file[name] for name in ("offsets", runs)}
        for name, table in (rows | others).items():
            # One offset more than images.
            if most is not None and len(table) > most + 1:
                raise ValueError(f"expected {most:,} images, {name} claims {len(table):,}")
            elsewhere = table.external or table.is_virtual
            if elsewhere or table.nbytes > MOST_COMPRESSED * table.id.get_storage_size():
                raise ValueError(f"{name} claims more than the file holds")
        self.task_runs = [dict(json.loads(line)) for line in others[runs].asstr()[:]]
        self.offsets: NDArray[np.uint64] = others["offsets"][:].astype("u8", casting="safe")
        self.blob_start: int = file["blob"].id.get_offset()  # None in another file
        size, end = os.fstat(self._file.fileno()).st_size, self.blob_start + len(file["blob"])
        if size < end:
            raise IntegrityError(f"{self.path}: cut short: expected {end} bytes, found {size}")
        falling = bool((self.offsets[1:] < self.offsets[:-1]).any())
        if {len(table) for table in rows.values()} != {len(self)} or falling:
            raise ValueError("offsets and rows do not fit one another")

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self) -> Table:
        """Return all columns, checked to hold values that they may have; they are read once."""
        if self._rows is None:
            with reading(self.path), h5py.File(self.path) as file:
                rows, tables = Table(), dict(file["rows"])
                for column in COLUMNS:
                    stored = self._stored.get(column.name, column.name)
                    if stored not in tables:
                        continue
                    values = tables[stored][:]
                    if column.dtype is None:
                        texts(values)  # which fails for anything else
                    else:
                        values = values.astype(column.dtype, casting="safe", copy=False)
                    of_run = column.name == "task_run"
                    valid = len(self.task_runs) if of_run else len(column.names)
                    if (of_run or valid) and len(values) and values.max() >= valid:
                        raise ValueError(f"{stored}: {values.max()} is none of {valid} values")
                    rows[column.name] = values
                if self._stored and "seed" in rows:  # of a run, whose synsets had one prompt each
                    settings = json.loads(self.attributes["settings"])
                    negative = (settings["generation"]["negative_prompt"] or "").encode()
                    rows["prompt_number"] = np.zeros(len(self), "u4")
                    rows["negative_prompt"] = np.full(len(self), negative)
            self._rows = rows
        return self._rows

    def payload(self, index: int) -> bytes:
        """Read an encoded image."""
        start, stop = self.offsets[index : index + 2].tolist()
        with plain_disk_errors(self.path):
            return os.pread(self._file.fileno(), stop - start, self.blob_start + start)

    def payloads(self, start: int, stop: int, decoded: bool = False) -> Iterator[bytes]:
        """Read encoded images one after another; check the SHA-256 of each, or decode it, too."""
        rows = self.rows()

        def checked(index: int) -> bytes:
            payload = self.payload(index)
            if hashlib.sha256(payload).digest() != rows["sha256"][index].tobytes():
                raise IntegrityError(f"{self.path}: image {index} is damaged (SHA-256 differs)")
            if decoded:
                row = {name: values[index] for name, values in rows.items()}
                codec, size = tuple(CODECS)[row["codec"]], (int(row["width"]), int(row["height"]))
                if reason := undecodable(payload, codec, *size):
                    name = f"{(row['synset'] or row['id']).decode()} {row['number']}"
                    raise IntegrityError(f"{self.path}: {name}: {reason}")
            return payload

        images = range(start, stop)
        yield from in_threads(checked, images, DECODERS, AHEAD) if decoded else map(checked, images)

    def check(self, decoded: bool = False) -> None:
        """Check every image, see :meth:`payloads`."""
        for _ in self.payloads(0, len(self), decoded):
            pass


def join(
    path: Path,
    attributes: Mapping[str, Any],
    ranges: Sequence[tuple[ImageFile, int, int]],
    advance: Advance = lambda _: None,
    decoded: bool = False,
) -> str:
    """Copy rows of several files, from one up to another, into one file; return its SHA-256."""
    task_runs: dict[str, int] = {}
    tables, sizes = [], []
    for file, start, stop in ranges:
        table = {name: values[start:stop] for name, values in file.rows().items()}
        # Those that made some of these images, each once, under its number in the new file.
        made = set(table.get("task_run", np.zeros(1, "u4")).tolist())
        lines = [json.dumps(task_run, sort_keys=True) for task_run in file.task_runs]
        numbers = [
            task_runs.setdefault(line, len(task_runs)) if i in made else 0
            for i, line in enumerate(lines)
        ]
        if "task_run" in table:
            table["task_run"] = np.array(numbers, dtype="u4")[table["task_run"]]
        tables.append(table)
        sizes.append(np.diff(file.offsets[start : stop + 1]))
    rows = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    runs = map(json.loads, task_runs)

    def payloads() -> Iterator[bytes]:
        for file, start, stop in ranges:
            for payload in file.payloads(start, stop, decoded):
                yield payload
                advance(1)

    return write_images(path, attributes, (rows, np.concatenate(sizes), runs), payloads())
