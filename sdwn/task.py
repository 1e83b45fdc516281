"""One array task: make the images of its shards, keeping what is finished at every moment."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdwn.errors import IntegrityError
from sdwn.files import RunPaths, atomic
from sdwn.images import Sample, encode
from sdwn.plan import ImageSpec, Plan, Shard, read_plan
from sdwn.shards import Contents, ImageFile, Selection, join, table, write_images

log = logging.getLogger(__name__)

# A kill costs the batch under way and at most this much finished work.
FLUSH_SECONDS = float(os.environ.get("SDWN_FLUSH_SECONDS", "5"))
REPORT_SECONDS = 60.0


class ImageSampler(Protocol):
    """What makes images: diffusers in production, plain noise in rehearsals."""

    provenance: dict[str, Any]

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        """Make a batch of images."""


@dataclass(frozen=True)
class ArrayTask:
    """What submitit pickles: a stage, a path, and the indices of the pieces of work."""

    stage: str
    path: str
    indices: tuple[int, ...]

    def __call__(self) -> None:
        """Run the stage."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        STAGES[self.stage](Path(self.path), self.indices)

    def checkpoint(self) -> Any:
        """Ask for the same task again: what is on disk says where to go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def load_sampler(plan: Plan) -> ImageSampler:
    """Load what the plan's model needs; only here do torch and diffusers come in."""
    if plan.config.model.name == "builtin:noise":
        from sdwn.noise import NoiseSampler

        return NoiseSampler(plan.config)
    from sdwn.sampler import Sampler

    return Sampler(plan.config)


def generate(run: Path, indices: Iterable[int]) -> None:
    """Make the shards of a run that aren't finished yet, one after another."""
    paths = RunPaths(run)
    plan = read_plan(paths)
    todo = [plan.shards[index] for index in indices if not paths.shard(index).exists()]
    if not todo:
        log.info("all shards of this task are finished already")
        return
    sampler = load_sampler(plan)
    session = task_session(sampler)
    for shard in todo:
        make_shard(paths, plan, shard, sampler, session)


STAGES: dict[str, Callable[[Path, Iterable[int]], None]] = {"generate": generate}


def task_session(sampler: ImageSampler) -> dict[str, Any]:
    """Record who makes images now: model, device, versions, host, job, start."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**sampler.provenance, "host": socket.gethostname(), "job": job_id(), "started": started}


def job_id() -> str:
    """Name the job this process runs in, as its scheduler does."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or "none"


def make_shard(
    paths: RunPaths, plan: Plan, shard: Shard, sampler: ImageSampler, session: dict[str, Any]
) -> None:
    """Make one shard: keep its sound pieces, sample what is missing, then join them.

    Another task may hold the same shard; both make the same images, and the first to finish
    gives it its name.
    """
    try:
        _sample_missing(paths, plan, shard, sampler, session)
        if not paths.shard(shard.index).exists():
            finish_shard(paths, plan, shard)
    except (FileNotFoundError, IntegrityError):
        # The task that finished first also removed the pieces.
        if not paths.shard(shard.index).exists():
            raise
    shutil.rmtree(paths.shard_pieces(shard.index), ignore_errors=True)
    log.info("shard %d: finished, %s", shard.index, paths.shard(shard.index))


def _sample_missing(
    paths: RunPaths, plan: Plan, shard: Shard, sampler: ImageSampler, session: dict[str, Any]
) -> None:
    specs = list(plan.specs(shard))
    batch_size = plan.config.generation.batch_size or plan.config.images_per_synset
    kept = sound_pieces(paths, plan, shard)
    attempt = 1 + max((piece.attempt for piece in kept), default=0)
    writer = PieceWriter(paths, plan, shard, session, attempt)
    progress = Progress(shard.index, len(specs))
    for batch in batches(len(specs), batch_size):
        if paths.shard(shard.index).exists():
            return
        if not covered(batch, kept):
            chosen = [specs[index] for index in batch]
            writer.add(batch, chosen, sampler.sample(chosen))
        progress.add(len(batch))
    writer.flush()


def batches(images: int, size: int) -> Iterator[range]:
    """Cut a shard into batches, on a grid that no restart moves.

    >>> list(batches(25, 10))
    [range(0, 10), range(10, 20), range(20, 25)]
    """
    return (range(start, min(start + size, images)) for start in range(0, images, size))


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


def sound_pieces(paths: RunPaths, plan: Plan, shard: Shard) -> list[Piece]:
    """List a shard's pieces that are whole and of this plan; others are removed."""
    sound = []
    for start, stop in paths.piece_ranges(shard.index):
        path = paths.piece(shard.index, start, stop)
        try:
            with ImageFile(path) as file:
                _require(file, plan, shard, stop - start)
                file.check()
                sound.append(Piece(path, start, stop, int(file.attributes.get("attempt", 1))))
        except IntegrityError as error:
            log.warning("made again: %s", error)
            path.unlink(missing_ok=True)
    return sound


def _require(file: ImageFile, plan: Plan, shard: Shard, images: int) -> None:
    found = file.attributes.get("plan_digest"), file.attributes.get("shard"), len(file)
    if found != (plan.digest, shard.index, images):
        raise IntegrityError(
            f"{file.path}: expected {images} images of shard {shard.index} of plan "
            f"{plan.digest[:12]}, found {found[2]} of shard {found[1]} of {str(found[0])[:12]}"
        )


@dataclass
class PieceWriter:
    """Collect batches and write them as pieces, often enough that a kill costs little."""

    paths: RunPaths
    plan: Plan
    shard: Shard
    session: dict[str, Any]
    attempt: int
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _payloads: list[bytes] = field(default_factory=list)
    _start: int = 0
    _flushed: float = field(default_factory=time.monotonic)

    def add(self, batch: range, specs: Sequence[ImageSpec], samples: Sequence[Sample]) -> None:
        """Take a batch in; it may be written now or with later ones."""
        if batch.start != self._start + len(self._rows):
            self.flush()
            self._start = batch.start
        for place, (spec, sample) in enumerate(zip(specs, samples, strict=True)):
            payload = encode(sample.pixels, self.plan.config.storage)
            row = _row(spec, sample, payload, self.plan.config.storage.codec)
            made = {"batch": batch.start, "batch_size": len(batch), "place": place}
            self._rows.append({**row, **made, "attempt": self.attempt, "session": 0})
            self._payloads.append(payload)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one piece."""
        if self._rows:
            self._write()
        self._start += len(self._rows)
        self._rows, self._payloads = [], []
        self._flushed = time.monotonic()

    def _write(self) -> None:
        stop = self._start + len(self._rows)
        path = self.paths.piece(self.shard.index, self._start, stop)
        attributes = {
            **shard_attributes(self.plan, self.shard, "piece"),
            "attempt": self.attempt,
        }
        sizes = np.array([len(payload) for payload in self._payloads], dtype="u8")
        contents = Contents(table(self._rows), sizes, [self.session])
        with atomic(path) as temporary:
            write_images(temporary, attributes, contents, self._payloads)


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
    """Join a shard's pieces, check the result, and give it its name."""
    final = paths.shard(shard.index)
    folder = paths.shard_pieces(shard.index)
    with ExitStack() as stack:
        selections = [
            Selection(stack.enter_context(ImageFile(piece.path)), start, stop)
            for piece, start, stop in cover(sound_pieces(paths, plan, shard))
        ]
        with atomic(final, folder=folder) as temporary:
            join(temporary, shard_attributes(plan, shard, "shard"), selections)
            with ImageFile(temporary) as written:
                _require(written, plan, shard, plan.shard_images(shard))
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


@dataclass
class Progress:
    """Say in the log, once a minute, how far a shard is."""

    shard: int
    images: int
    done: int = 0
    _started: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)

    def add(self, images: int) -> None:
        """Count images."""
        self.done += images
        now = time.monotonic()
        if now - self._said >= REPORT_SECONDS:
            self._said = now
            rate = self.done / (now - self._started)
            log.info("shard %d: %d of %d, %.2f images/s", self.shard, self.done, self.images, rate)
