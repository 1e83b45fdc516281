"""Pieces: the finished images of a shard on disk, and how they become the shard."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sdwn.errors import IntegrityError
from sdwn.generation.batching import Sample
from sdwn.io import atomic
from sdwn.jobs.disk import RunDisk
from sdwn.paths import RunPaths
from sdwn.planning.plan import ImageSpec, Plan, Shard
from sdwn.storage.columns import image_table
from sdwn.storage.shards import Contents, Expected, ImageFile, RowRange, join, write_images

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """A shard to make: where, of which plan, and by whom."""

    disk: RunDisk
    plan: Plan
    shard: Shard
    session: dict[str, Any]

    @property
    def paths(self) -> RunPaths:
        """The files of its run."""
        return self.disk.paths

    @property
    def finished(self) -> bool:
        """Whether its final file is there, perhaps another task's."""
        try:
            return self.paths.shard(self.shard.index).is_file()
        except OSError:
            return False  # the disk fails, and whoever writes waits for it

    @property
    def specs(self) -> list[ImageSpec]:
        """Its images, in order."""
        return list(self.plan.specs(self.shard))


@dataclass(frozen=True, slots=True)
class Piece:
    """A finished run of images of a shard, on disk: ``start`` up to ``stop``."""

    path: Path
    start: int
    stop: int
    attempt: int


def covered(batch: range, pieces: Iterable[Piece]) -> bool:
    """Tell whether every image of a batch lies in some piece."""
    missing = set(batch)
    for piece in pieces:
        missing -= set(range(piece.start, piece.stop))
    return not missing


def sound_pieces(work: Work) -> list[Piece]:
    """List a shard's pieces that are whole and of this plan; others are removed.

    Raises:
        DiskError: they cannot be read for now, and may be whole.
    """
    sound = []
    for start, stop in work.paths.piece_ranges(work.shard.index):
        path = work.paths.piece(work.shard.index, start, stop)
        try:
            sound.append(work.disk.retry(partial(_sound, path, work, start, stop)))
        except IntegrityError as error:
            log.warning("made again: %s", error)
            path.unlink(missing_ok=True)
    return sound


def _sound(path: Path, work: Work, start: int, stop: int) -> Piece:
    with _opened(path, work.plan, work.shard, stop - start) as file:
        file.check()
        return _piece(file, start, stop)


def _opened(path: Path, plan: Plan, shard: Shard, images: int) -> ImageFile:
    return ImageFile(path, Expected(plan.digest, shard.index, images))


def _piece(file: ImageFile, start: int, stop: int) -> Piece:
    return Piece(file.path, start, stop, int(file.attributes.get("attempt", 1)))


@dataclass
class PieceWriter:
    """Collects batches and writes them as pieces, often enough that a kill costs little.

    Another task may hold the same shard; both make the same images, and the first to finish
    gives it its name and removes the pieces: what is added later is dropped. Pieces that are
    lost otherwise, removed or damaged, are found missing when the shard is finished.
    """

    work: Work
    attempt: int
    flush_seconds: float
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _payloads: list[bytes] = field(default_factory=list)
    _start: int = 0
    _flushed: float = field(default_factory=time.monotonic)

    def add(
        self,
        batch: range,
        specs: Sequence[ImageSpec],
        samples: Sequence[Sample],
        payloads: Sequence[bytes],
    ) -> None:
        """Take a batch in; it may be written now or with later ones."""
        if batch.start != self._start + len(self._rows):
            self.flush()
            self._start = batch.start
        codec = self.work.plan.config.storage.codec
        for place, (spec, sample, payload) in enumerate(zip(specs, samples, payloads, strict=True)):
            row = {**_row(spec, sample, payload, codec), **_composition(batch, place, sample)}
            self._rows.append({**row, "attempt": self.attempt, "session": 0})
            self._payloads.append(payload)
        if time.monotonic() - self._flushed >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one piece."""
        if self._rows:
            try:
                self.work.disk.retry(self._write)
            except FileNotFoundError as error:
                log.warning("removed while it was written: %s", error)
        self._start += len(self._rows)
        self._rows, self._payloads = [], []
        self._flushed = time.monotonic()

    def finish(self) -> bool:
        """Write what is left, and make the shard of all its pieces; False where some are lost."""
        self.flush()
        work = self.work
        try:
            if not work.finished:
                work.disk.retry(partial(finish_shard, work.paths, work.plan, work.shard))
        except (FileNotFoundError, IntegrityError) as error:
            # Another task may have finished it, and removed its pieces.
            if not work.finished:
                log.warning("shard %d: what is lost is drawn again: %s", work.shard.index, error)
                return False
        shutil.rmtree(work.paths.shard_pieces(work.shard.index), ignore_errors=True)
        log.info("shard %d: finished", work.shard.index)
        return True

    def _write(self) -> None:
        paths, plan, shard = self.work.paths, self.work.plan, self.work.shard
        path = paths.piece(shard.index, self._start, self._start + len(self._rows))
        attributes = {**shard_attributes(plan, shard, "piece"), "attempt": self.attempt}
        sizes = np.array([len(payload) for payload in self._payloads], dtype="u8")
        contents = Contents(image_table(self._rows), sizes, [self.work.session])
        with atomic(path) as temporary:
            write_images(temporary, attributes, contents, self._payloads)


def _composition(batch: range, place: int, sample: Sample) -> dict[str, Any]:
    """Say with which others an image was sampled; one that was sampled again was alone."""
    first, size, place = (
        (batch.start + place, 1, 0) if sample.redone else (batch.start, len(batch), place)
    )
    how = {"redone": sample.redone, "vae_slicing": sample.vae_slicing}
    return {"batch": first, "batch_size": size, "place": place, **how}


def _row(spec: ImageSpec, sample: Sample, payload: bytes, codec: str) -> dict[str, Any]:
    height, width, _ = sample.pixels.shape
    return {
        "wnid": spec.wnid,
        "synset": spec.synset,
        "number": spec.number,
        "seed": spec.seed,
        "prompt": spec.prompt,
        "tokens": sample.tokens,
        "truncated": sample.truncated,
        "status": sample.status,
        "width": width,
        "height": height,
        "codec": codec,
        "sha256": sha256(payload).digest(),
    }


def shard_attributes(plan: Plan, shard: Shard, kind: str) -> dict[str, Any]:
    """Say of which plan and shard a file is, and under which settings it was made."""
    return {
        "kind": kind,
        "plan_digest": plan.digest,
        "shard": shard.index,
        "model": plan.config.model.name,
        "revision": plan.config.model.revision or "",
        "settings": plan.config.model_dump_json(exclude={"evaluation"}),
    }


def finish_shard(paths: RunPaths, plan: Plan, shard: Shard) -> None:
    """Join a shard's pieces, check the result, and give it its name.

    Raises:
        IntegrityError: pieces are missing or damaged.
    """
    final = paths.shard(shard.index)
    folder = paths.shard_pieces(shard.index)
    images = plan.shard_images(shard)
    with ExitStack() as stack:
        files: dict[Piece, ImageFile] = {}
        for start, stop in paths.piece_ranges(shard.index):
            path = paths.piece(shard.index, start, stop)
            file = stack.enter_context(_opened(path, plan, shard, stop - start))
            files[_piece(file, start, stop)] = file
        selections = [RowRange(files[piece], start, stop) for piece, start, stop in cover(files)]
        found = sum(selection.stop - selection.start for selection in selections)
        if found != images:
            raise IntegrityError(f"{folder}: expected {images} images, found {found}")
        with atomic(final, folder=folder) as temporary:
            join(temporary, shard_attributes(plan, shard, "shard"), selections)
            with _opened(temporary, plan, shard, images) as written:
                written.check()


def cover(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, int, int]]:
    """Take each image from the piece that made it first: runs of rows of a piece, in order.

    >>> pieces = [Piece(Path("a"), 0, 20, 1), Piece(Path("b"), 10, 30, 2)]
    >>> [(str(piece.path), start, stop) for piece, start, stop in cover(pieces)]
    [('a', 0, 20), ('b', 10, 20)]
    """
    owner: dict[int, Piece] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.attempt, piece.start)):
        for image in range(piece.start, piece.stop):
            owner.setdefault(image, piece)
    for piece, images in groupby(sorted(owner), key=owner.__getitem__):
        run = list(images)
        yield piece, run[0] - piece.start, run[-1] + 1 - piece.start
