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
the tables in memory, with room for the blob that takes none; plain writes then put tables and
images on the disk. So joining files copies bytes once, checks each image's SHA-256 and hashes
the result on the way, and a disk that fails is an error like any other: HDF5 itself ends the
process where it cannot write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sdwn.errors import IntegrityError, MisplacedError
from sdwn.io import Advance, in_threads, open_plain, plain_disk_errors
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


@dataclass(frozen=True, eq=False, slots=True)
class Contents:
    """A file without its blob: columns, the images' sizes in bytes, records of task runs."""

    rows: Table
    sizes: NDArray[Any]
    task_runs: Sequence[Mapping[str, Any]]


def write_images(
    path: Path, attributes: Mapping[str, Any], contents: Contents, payloads: Iterable[bytes]
) -> str:
    """Write a file of images, whose bytes are given in order, and return its SHA-256."""
    before, after = _tables(attributes, contents)
    needed = len(before) + int(contents.sizes.sum()) + len(after)
    digest, written = hashlib.sha256(), 0
    with plain_disk_errors(path.parent, needed), path.open("wb") as file:
        # Now, not after minutes of copying.
        _require_space(path, needed)
        for block in chain([before], payloads, [after]):
            file.write(block)
            digest.update(block)
            written += len(block)
    if written != needed:
        raise IntegrityError(f"{path}: expected {needed} bytes, found {written}")
    return digest.hexdigest()


def _require_space(path: Path, needed: int) -> None:
    found = os.statvfs(path.parent)
    if found.f_bavail * found.f_frsize < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _tables(attributes: Mapping[str, Any], contents: Contents) -> tuple[bytes, bytes]:
    """Return the bytes of a file before its blob, and those behind it."""
    offsets = np.concatenate([[0], np.cumsum(contents.sizes)]).astype("u8")
    fixed = {"format": FORMAT, "format_version": FORMAT_VERSION, "images": len(offsets) - 1}
    # In memory, but no BytesIO: the blob is a hole in it, and takes no memory.
    with os.fdopen(os.memfd_create("tables"), "r+b", buffering=0) as target:
        with h5py.File(target, "w", libver=LIBVER) as file:
            for name, value in {**fixed, **attributes}.items():
                if isinstance(value, str):
                    # Of fixed length it lies in the header, which has a checksum; HDF5's heap
                    # has none.
                    text = value.encode()
                    dtype = h5py.string_dtype("utf-8", max(1, len(text)))
                    file.attrs.create(name, np.bytes_(text), dtype=dtype)
                else:
                    file.attrs[name] = value

            group = file.create_group("rows")
            for column in (column for column in COLUMNS if column.name in contents.rows):
                values = np.ascontiguousarray(contents.rows[column.name])
                # The file's own type: HDF5 converts neither ASCII to UTF-8 nor numbers to names.
                dtype = np.dtype(column.dtype)
                if column.dtype is None:
                    dtype = h5py.string_dtype("utf-8", max(1, values.dtype.itemsize))
                elif column.names:
                    numbered = {name: number for number, name in enumerate(column.names)}
                    dtype = h5py.enum_dtype(numbered, column.dtype)
                # gzip, for ten images repeat their synset's prompt.
                dataset = group.create_dataset(
                    column.name,
                    data=values.view(dtype),
                    compression="gzip",
                    compression_opts=1,
                    fletcher32=True,
                )
                dataset.attrs["meaning"] = column.meaning
            # An open dataset's values are laid out last, behind the blob.
            del dataset

            lines = [json.dumps(task_run, sort_keys=True) for task_run in contents.task_runs]
            task_runs = np.array([line.encode() for line in lines])
            utf8 = h5py.string_dtype("utf-8", task_runs.dtype.itemsize)
            file.create_dataset("task_runs", data=task_runs.view(utf8), fletcher32=True)
            file.create_dataset("offsets", data=offsets, fletcher32=True)

            # The blob is allocated and not written.
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_layout(h5py.h5d.CONTIGUOUS)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            properties.set_obj_track_times(False)  # the same images give the same file
            space = h5py.h5s.create_simple((int(offsets[-1]),))
            blob = h5py.h5d.create(file.id, b"blob", h5py.h5t.STD_U8LE, space, dcpl=properties)
            start = int(blob.get_offset())
        target.seek(0)
        before = target.read(start)
        target.seek(start + int(offsets[-1]))
        return before, target.read()


@dataclass(frozen=True, slots=True)
class Expected:
    """Requirements on a shard or partial shard: its plan, its shard, its number of images."""

    plan_digest: str
    shard: int
    images: int


class ImageFile:
    """A file of images, open for reading; image i is ``offsets[i]`` to ``offsets[i + 1]``.

    Offsets count from ``blob_start`` in the file; ``attributes`` and ``task_runs`` are as above.
    It must be what is ``expected`` of a run's file, or have at most ``most`` images. A file of
    version 1 reads as one of version 2.

    Raises:
        MisplacedError: it is of another plan, or another shard.
        IntegrityError: it is missing, damaged, or of a later version.
    """

    def __init__(
        self, path: Path, expected: Expected | None = None, most: int | None = None
    ) -> None:
        self.path = path
        self._rows: Table | None = None
        self._descriptor = open_plain(path)
        try:
            # HDF5 keeps a megabyte and more for each open file; a merge has many.
            with _opened(path) as file:
                attributes = {name: file.attrs[name] for name in file.attrs}
                self.attributes: dict[str, Any] = {
                    k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()
                }
                found = {name: str(value) for name, value in self.attributes.items()}
                head = found.get("format", "another file"), found.get("format_version", "")
                if head not in ((FORMAT, "1"), (FORMAT, str(FORMAT_VERSION))):
                    raise IntegrityError(
                        f"{path}: expected {FORMAT} version {FORMAT_VERSION}, found "
                        f"{' '.join(head).strip()}; read it with the sdwn that wrote it"
                    )
                # What the file calls a column.
                self._stored = VERSION_1 if head[1] == "1" else {}
                runs = f"{self._stored.get('task_run', 'task_run')}s"
                plan, shard = found.get("plan_digest", ""), found.get("shard")
                if expected is not None and plan != expected.plan_digest:
                    theirs, ours = f"plan {plan[:12]}" if plan else "no plan", expected.plan_digest
                    raise MisplacedError(f"{path}: foreign: of {theirs}, not {ours[:12]}", plan)
                if expected is not None and shard != str(expected.shard):
                    wrong = f"expected shard {expected.shard}, found shard {shard} of this plan"
                    raise MisplacedError(f"{path}: {wrong}", plan)
                self._check_tables(file, runs, expected.images if expected else most)
                if expected is not None and len(self) != expected.images:
                    raise ValueError(f"expected {expected.images} images, found {len(self)}")
                self.task_runs = [json.loads(line) for line in file[runs].asstr()[:]]
                if not all(isinstance(task_run, dict) for task_run in self.task_runs):
                    raise ValueError("a task run is not a record")
        except BaseException:
            self.close()
            raise

    def _check_tables(self, file: h5py.File, runs: str, most: int | None) -> None:
        """Check what the file says of its tables, before one of them takes memory."""

        def objects(group: Any) -> dict[str, Any]:
            for name in group:
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"{name} is a link")  # which could lead to any file
            return dict(group.items())

        found = objects(file)
        rows = objects(found.get("rows", {}))
        required = (self._stored.get(c.name, c.name) for c in COLUMNS if c.required)
        missing = [name for name in dict.fromkeys(required) if name not in rows]
        missing += [name for name in ("blob", "offsets", runs) if name not in found]
        if missing:
            raise IntegrityError(f"{self.path}: expected {', '.join(missing)}, found nothing there")
        tables = {f"rows/{name}": table for name, table in rows.items()}
        tables.update({name: found[name] for name in ("offsets", runs)})
        for name, table in tables.items():
            # One offset more than images.
            if most is not None and len(table) > most + 1:
                raise ValueError(f"expected {most:,} images, {name} claims {len(table):,}")
            elsewhere = table.external or table.is_virtual
            if elsewhere or table.nbytes > MOST_COMPRESSED * table.id.get_storage_size():
                raise ValueError(f"{name} claims more than the file holds")
        blob, start = found["blob"], found["blob"].id.get_offset()
        self.offsets: NDArray[np.uint64] = found["offsets"][:].astype("u8", casting="safe")
        fitting = (
            {len(column) for column in rows.values()} == {len(self)}
            and start is not None
            and int(self.offsets[-1]) == len(blob)
            and self.offsets[0] == 0
            and bool(np.all(self.offsets[1:] >= self.offsets[:-1]))
        )
        if not fitting:
            raise IntegrityError(f"{self.path}: offsets, rows and blob do not fit one another")
        self.blob_start: int = start
        size, end = os.fstat(self._descriptor).st_size, start + len(blob)
        if size < end:
            raise IntegrityError(f"{self.path}: cut short: expected {end} bytes, found {size}")

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self) -> Table:
        """Return all columns, checked to hold values that they may have; they are read once."""
        if self._rows is None:
            with _opened(self.path) as file:
                rows = Table()
                for column in COLUMNS:
                    name = column.name
                    if (stored := self._stored.get(name, name)) not in file["rows"]:
                        continue
                    rows[name] = values = file["rows"][stored][:]
                    kind = "S" if column.dtype is None else np.dtype(column.dtype).kind
                    if values.dtype.kind != kind:
                        raise ValueError(
                            f"{name}: expected values of kind {kind}, found {values.dtype}"
                        )
                    if kind == "S":
                        texts(values)
                    valid = len(self.task_runs) if name == "task_run" else len(column.names)
                    limited = column.names or name == "task_run"
                    if limited and len(values) and int(values.max()) >= valid:
                        raise ValueError(
                            f"{name}: expected values below {valid}, found {values.max()}"
                        )
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
            payload = os.pread(self._descriptor, stop - start, self.blob_start + start)
        if len(payload) != stop - start:
            raise IntegrityError(f"{self.path}: cut short at byte {self.blob_start + start}")
        return payload

    def payloads(self, start: int, stop: int) -> Iterator[bytes]:
        """Read encoded images one after another, each checked against its SHA-256."""
        expected = self.rows()["sha256"][start:stop]
        for index, digest in zip(range(start, stop), expected, strict=True):
            payload = self.payload(index)
            if hashlib.sha256(payload).digest() != digest.tobytes():
                raise IntegrityError(f"{self.path}: image {index} is damaged (SHA-256 differs)")
            yield payload

    def check(self) -> None:
        """Check every image against its SHA-256."""
        for _ in self.payloads(0, len(self)):
            pass


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open a file with HDF5; turn whatever it says of a damaged one into one kind of error."""
    try:
        with plain_disk_errors(path):
            file = h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(f"{path}: cut short or no HDF5 file: {reason}") from None
    try:
        with plain_disk_errors(path), file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: damaged: {' '.join(str(error).split())}") from error


# Some images of a file: rows of the first number up to the second.
RowRange = tuple[ImageFile, int, int]


def join(
    path: Path,
    attributes: Mapping[str, Any],
    ranges: Sequence[RowRange],
    advance: Advance = lambda _: None,
    problems: list[tuple[Path, str]] | None = None,
) -> str:
    """Copy images of several files into one as they are, and return its SHA-256.

    ``advance`` is called with how many more images are copied. With ``problems`` each image is
    decoded too, and of those that cannot be, the file and the reason are added there.
    """
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
    contents = Contents(
        {name: np.concatenate([table[name] for table in tables]) for name in tables[0]},
        np.concatenate(sizes),
        [json.loads(line) for line in task_runs],
    )

    def images() -> Iterator[tuple[ImageFile, int, bytes]]:
        for file, start, stop in ranges:
            for index, payload in enumerate(file.payloads(start, stop), start):
                yield file, index, payload
                advance(1)

    def decoded(image: tuple[ImageFile, int, bytes]) -> bytes:
        file, index, payload = image
        row = {name: values[index] for name, values in file.rows().items()}
        codec, size = tuple(CODECS)[row["codec"]], (int(row["width"]), int(row["height"]))
        reason = undecodable(payload, codec, *size)
        if problems is not None and reason is not None:
            name = f"{(row['synset'] or row['id']).decode()} {row['number']}"
            problems.append((file.path, f"{file.path}: {name}: {reason}"))
        return payload

    if problems is not None:
        return write_images(
            path, attributes, contents, in_threads(decoded, images(), DECODERS, AHEAD)
        )
    return write_images(path, attributes, contents, (payload for _, _, payload in images()))
