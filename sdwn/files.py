"""Every file name in one place, and files that appear only when they are whole."""

from __future__ import annotations

import csv
import datetime
import errno
import hashlib
import io
import json
import os
import re
import socket
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.filesize import decimal

from sdwn.errors import DiskError, IntegrityError, SdwnError, UsageError, shell
from sdwn.reading import decode_text

TEMPORARY = ".tmp"
# Names a folder of the node's own disk that weights are copied to once.
STAGE_VARIABLE = "SDWN_STAGE_WEIGHTS"
# Notes of a task that status tells: out of memory, other code than when it was submitted, and
# no GPU though one was given, and a disk that failed for a while.
LOWERED = ".lowered.txt"
CHANGED = ".changed.txt"
NO_GPU = ".no-gpu.txt"
WAITED = ".waited.txt"
BLOCK = 1 << 22
# A part of a release has at least so many bytes, and less than twice as many.
PART_BYTES = 4_000_000_000

# A spreadsheet takes a cell that begins so for a formula, and would work it out.
FORMULA = re.compile(r"\s*[=+\-@\t]")

# No table of synsets or prompts and no JSON of this toolkit is nearly as large; Python takes
# several times as much memory for what it reads.
TABLE_BYTES = 1_000_000_000
JSON_BYTES = 100_000_000

# Tells whoever waits how much more is done.
Advance = Callable[[int], None]

# As RunPaths writes them: five digits, or more without a leading zero.
SHARD_NUMBER = re.compile(r"[0-9]{5}|[1-9][0-9]{5,8}")
TASK_NAME = re.compile(r"(?P<job>[^.]+)\.(?P<rank>[0-9]+)(\.r(?P<start>[0-9]+))?\.json")
# What a task leaves when it starts again, and when it has loaded its model.
RESTART_NAME = re.compile(r"(?P<job>[^.]+)\.[0-9]+\.r(?P<start>[0-9]+)\.(json|started\.txt)")
PIECE_NAME = re.compile(r"([0-9]{6,9})-([0-9]{6,9})\.h5")


def now() -> str:
    """Give the time to the second, as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cache_folder() -> Path:
    """Name the user's cache: ``$SDWN_CACHE``, ``$XDG_CACHE_HOME/sdwn``, or ``~/.cache/sdwn``."""
    if named := os.environ.get("SDWN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdwn"


def writable_cache() -> Path:
    """Return the user's cache, once something was written there.

    Raises:
        SdwnError: it cannot be written to.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise SdwnError(
            f"the cache in {folder} cannot be written to ({error.strerror}); set SDWN_CACHE to a "
            "folder that can"
        ) from None


def require_home() -> None:
    """Make a folder for caches where the system knows no home of this user.

    Libraries look for one where they are imported, and end, or make a folder named ``~``.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(private_folder(Path(tempfile.gettempdir())))


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of a run folder; of an evaluation's work, whose shards are tables, too."""

    root: Path
    shard_suffix: str = ".h5"

    @property
    def plan(self) -> Path:
        """Settings, digests and counts."""
        return self.root / "plan.json"

    @property
    def synsets(self) -> Path:
        """The plan's table of synsets, prompts and shards."""
        return self.root / "synsets.csv"

    @property
    def lock(self) -> Path:
        """Which weights its images are made with."""
        return self.root / "lock.json"

    @property
    def shards(self) -> Path:
        """Folder of finished shards."""
        return self.root / "shards"

    @property
    def pieces(self) -> Path:
        """Folder of the pieces of unfinished shards."""
        return self.root / "pieces"

    @property
    def jobs(self) -> Path:
        """Folder of what submitit keeps of each job: script, pickles, logs."""
        return self.root / "jobs"

    @property
    def tasks(self) -> Path:
        """Folder of what each process of a task says of itself."""
        return self.root / "tasks"

    @property
    def pilot(self) -> RunPaths:
        """The small run that ``sdwn pilot`` makes."""
        return RunPaths(self.root / "pilot")

    @property
    def probe(self) -> RunPaths:
        """The folder of ``sdwn doctor --probe``'s job."""
        return RunPaths(self.root / "probe")

    @property
    def question(self) -> Path:
        """The question to a pilot or a tuning, in its own folder, until its answer is taken."""
        return self.root / "question.json"

    @property
    def token(self) -> Path:
        """What the login node writes for a compute node to see, in the probe's own folder."""
        return self.root / "token.txt"

    @property
    def speed(self) -> Path:
        """How fast the pilot's device was, in the pilot's own folder."""
        return self.root / "speed.json"

    @property
    def answers(self) -> Path:
        """What the pilot says of the run, or the probe of its node, in its own folder."""
        return self.root / "answers.json"

    @property
    def contact_sheet(self) -> Path:
        """The pilot's images as one picture."""
        return self.root / "contact-sheet.png"

    @property
    def submissions(self) -> Path:
        """Journal of submissions, a JSON object a line."""
        return self.root / "submissions.jsonl"

    @property
    def submitting(self) -> Path:
        """Held by the command that submits."""
        return self.root / ".submitting.lock"

    @property
    def release(self) -> Path:
        """Where ``sdwn run`` and ``submit --then merge`` put the release."""
        return self.root / "release"

    def shard(self, index: int) -> Path:
        """Name a finished shard."""
        return self.shards / f"{index:05d}{self.shard_suffix}"

    def shard_index(self, name: str) -> int | None:
        """Read a shard's index from its file's name; None if that is no finished shard's.

        >>> run = RunPaths(Path("run"))
        >>> run.shard_index("00012.h5"), run.shard_index(".00012.h5.tmp"), run.shard_index("12.h5")
        (12, None, None)
        """
        number = name.removesuffix(self.shard_suffix)
        return int(number) if number != name and SHARD_NUMBER.fullmatch(number) else None

    def shard_pieces(self, index: int) -> Path:
        """Name the folder of a shard's pieces."""
        return self.pieces / f"{index:05d}"

    def piece(self, index: int, start: int, stop: int) -> Path:
        """Name a piece: the images ``start`` up to ``stop`` of a shard."""
        return self.shard_pieces(index) / f"{start:06d}-{stop:06d}.h5"

    def task(self, job: str, rank: int, start: int = 0) -> Path:
        """Name the record of a process of a task that was requeued ``start`` times."""
        return self.tasks / f"{job}.{rank}{f'.r{start}' if start else ''}.json"

    def task_names(self) -> set[str]:
        """List what tasks wrote of themselves, by name: records and notes."""
        return _files(self.tasks)

    def note(self, job: str, rank: int, kind: str) -> Path:
        """Name a note of a process: ``LOWERED``, ``CHANGED``, ``NO_GPU`` or ``WAITED``."""
        return self.tasks / f"{job}.{rank}{kind}"

    def done_shards(self) -> set[int]:
        """List the finished shards, from their names alone."""
        found = map(self.shard_index, _files(self.shards))
        return {index for index in found if index is not None}

    def piece_ranges(self, index: int) -> list[tuple[int, int]]:
        """List the image ranges of a shard's pieces, from their names alone."""
        matches = (PIECE_NAME.fullmatch(name) for name in _files(self.shard_pieces(index)))
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def started_shards(self) -> list[int]:
        """List the shards that have a folder of pieces."""
        if not self.pieces.is_dir():
            return []
        names = (path.name for path in self.pieces.iterdir())
        return sorted(int(name) for name in names if SHARD_NUMBER.fullmatch(name))


@dataclass(frozen=True, slots=True)
class ReleasePaths:
    """The files of a release folder."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What the release holds, and from where."""
        return self.root / "manifest.json"

    @property
    def metadata(self) -> Path:
        """A row an image."""
        return self.root / "metadata.parquet"

    @property
    def synsets(self) -> Path:
        """The plan's table of synsets."""
        return self.root / "synsets.csv"

    @property
    def missing(self) -> Path:
        """The synsets that an unfinished run had not made."""
        return self.root / "missing.csv"

    @property
    def skipped(self) -> Path:
        """The files of an import that could not be taken, and why."""
        return self.root / "skipped.csv"

    @property
    def card(self) -> Path:
        """The dataset card."""
        return self.root / "README.md"

    @property
    def sums(self) -> Path:
        """Checksums as ``sha256sum -c`` reads them."""
        return self.root / "SHA256SUMS"

    @property
    def evaluations(self) -> Path:
        """Folder of everything derived later."""
        return self.root / "evaluations"

    def part(self, number: int) -> Path:
        """Name a numbered part."""
        return self.root / f"images-{number:05d}.h5"

    def evaluation(self, name: str) -> EvaluationPaths:
        """Name an evaluation's folder."""
        return EvaluationPaths(self.evaluations / name)


@dataclass(frozen=True, slots=True)
class EvaluationPaths:
    """The files of one evaluation of a release."""

    root: Path

    @property
    def predictions(self) -> Path:
        """A row a classified image."""
        return self.root / "predictions.parquet"

    @property
    def work(self) -> RunPaths:
        """Where images are judged: the plan of it, shards of predictions, jobs, their journal."""
        return work_paths(self.root / "work")

    @property
    def evaluation(self) -> Path:
        """The figures."""
        return self.root / "evaluation.json"

    def table(self, name: str) -> Path:
        """Name a table as CSV: figures, histogram, classes, groups, confusions or synsets."""
        return self.root / f"{name}.csv"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    def figure(self, name: str, extension: str) -> Path:
        """Name a figure for print: histogram, groups or map, as png or svg."""
        return self.root / "figures" / f"{name}.{extension}"


@dataclass(frozen=True, slots=True)
class ComparisonPaths:
    """The files of a comparison of evaluations."""

    root: Path

    @property
    def comparison(self) -> Path:
        """The figures."""
        return self.root / "comparison.json"

    @property
    def classes(self) -> Path:
        """A row a class."""
        return self.root / "classes.csv"

    @property
    def groups(self) -> Path:
        """A row a group and pair."""
        return self.root / "groups.csv"

    def figure(self, name: str, extension: str) -> Path:
        """Name a figure for print: histogram, groups or classes-N, as png or svg."""
        return self.root / "figures" / f"{name}.{extension}"

    @property
    def page(self) -> Path:
        """The page."""
        return self.root / "comparison.html"


def work_paths(root: Path) -> RunPaths:
    """Name the files of an evaluation's work folder, whose shards are tables."""
    return RunPaths(root, ".parquet")


def _files(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


@contextmanager
def atomic(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Give a temporary name; on success sync the file and rename it to ``path``.

    The temporary file lies in ``folder`` (by default beside ``path``), which must be on the
    same file system. After an error it is removed and ``path`` is as before.

    Raises:
        DiskError: the disk is full, read-only or failing.
    """
    folder = folder or path.parent
    token = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = folder / f".{path.name}.{token}{TEMPORARY}"
    try:
        with plain_disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


# What a disk answers that is full, read-only, or (shared ones, for minutes) not there.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILING = (
    *(errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO),
    *(errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)


@contextmanager
def plain_disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what a full or failing disk answers into an error that says so.

    ``needed`` is how many bytes are written in all, where that is known.

    Raises:
        DiskError: in the place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskError(
                f"{path}: no space or quota left{_missing_space(path, error.errno, needed)}; "
                "everything finished is kept, free some and run the same command again"
            ) from error
        if error.errno in _FAILING:
            raise DiskError(
                f"{path}: its disk fails: {os.strerror(error.errno)}; everything finished is "
                "kept, run the same command again when the disk works"
            ) from error
        raise


def _missing_space(path: Path, reason: int, needed: int) -> str:
    """Compare the space that is needed with what is free; empty where neither is known."""
    found = [f"{decimal(needed)} needed"] if needed else []
    with suppress(OSError):
        path = path.absolute()
        folder = next(one for one in (path, *path.parents) if one.is_dir())
        disk = os.statvfs(folder)
        if disk.f_files and not disk.f_favail:
            found.append("no more files can be made there")
        else:
            found.append(f"{decimal(disk.f_bavail * disk.f_frsize)} free")
    if reason == errno.EDQUOT:
        found[-1:] = ["the quota is used up"]
    return f" ({', '.join(found)})" if found else ""


def sync(path: Path) -> None:
    """Put a file or a folder's entries on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_append(path: Path) -> TextIO:
    """Open a journal or a lock, made where it is missing; a link is refused.

    Appending through a link that somebody planted would write to any file of this user.
    """

    def opener(name: str, flags: int) -> int:
        # NONBLOCK: a pipe that nobody reads is an error here, and no endless wait.
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    try:
        return open(path, "a", encoding="utf-8", opener=opener)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UsageError(
            f"{path}: expected a file, found a link; if it is not yours, remove it: "
            f"{shell('rm', path)}"
        ) from None


def is_own_folder(path: Path) -> bool:
    """Return whether this is a real folder, no link, and belongs to this user."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def private_folder(shared: Path) -> Path:
    """Return this user's own folder below one that all users may write to.

    Raises:
        UsageError: what stands there is a link, another user's, or open to others.
    """
    folder = shared / f"sdwn-{os.getuid()}"
    shared.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_own_folder(folder) or folder.lstat().st_mode & 0o077:
        raise UsageError(
            f"{folder}: expected a folder that only you can open (mode 0700), found one that "
            f"others could have filled; remove it, or choose another folder than {shared}"
        )
    return folder


def refuse_planted(path: Path) -> None:
    """Refuse what any user could have put into a cache; a group may share one.

    Raises:
        IntegrityError: neither this user nor root owns it, and everybody may write beside it.
    """
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) and path.parent.stat().st_mode & stat.S_IWOTH:
        raise IntegrityError(
            f"{path}: another user's, in a folder that everybody may write to; set SDWN_CACHE to "
            "a folder that only you, or you and your group, may write to"
        )


# What desktops and file servers keep in any folder: thumbnails, deleted files, earlier states.
_STRAY = re.compile(
    r"thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|\.ds_store|\.directory"
    r"|@eadir|@recycle|@recently-snapshot|@tmp|#recycle|#snapshot|~snapshot|\$recycle\.bin|recycler"
    r"|system volume information|network trash folder|temporary items|__macosx|lost\+found"
    r"|\.snapshots?|\.zfs|\.appledouble|\.spotlight-v100|\.trashes|\.fseventsd"
    # Files that NFS or FUSE keeps for who has them open, and the other half of a Mac's file.
    r"|(\.nfs|\.fuse_hidden|\._|\.trash-).*",
    re.IGNORECASE | re.DOTALL,
)


def is_stray(name: str) -> bool:
    """Return whether a name is of what a desktop or a file server left.

    >>> [is_stray(name) for name in (".DS_Store", ".nfs0000000001", "@eaDir", "images-00000.h5")]
    [True, True, True, False]
    """
    return _STRAY.fullmatch(name) is not None


def strays(folder: Path) -> Iterator[Path]:
    """Yield what a desktop or a file server left below a folder, and enter none of it."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in sorted((*folders, *names)) if is_stray(name))
        folders[:] = [name for name in folders if not is_stray(name)]


def links(folder: Path) -> Iterator[Path]:
    """Yield what is no plain file below a folder: links, none of them followed, and pipes."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from () if is_stray(entry.name) else links(Path(entry.path))
            # submitit leaves a link beside each script, and nobody opens it.
            elif not entry.is_file(follow_symlinks=False) and "submission_file_" not in entry.name:
                yield Path(entry.path)


LINK = (
    "a link or a pipe, and a release holds plain files only; remove it, or, if it is yours, put a "
    "copy of what it stands for in its place"
)


def refuse_links(path: Path) -> None:
    """Refuse links and pipes at or below a path in a release.

    A link may lead to any file of whoever opens the release, and reading a pipe has no end.

    Raises:
        IntegrityError: there is one.
    """
    linked = path.is_symlink()
    if path.is_dir() and not linked:
        found = next(links(path), None)
    else:
        found = path if linked or (path.exists() and not path.is_file()) else None
    if found is not None:
        raise IntegrityError(f"{found}: {LINK}")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def csv_cell(value: Any) -> Any:
    """Return a value of a table so that a spreadsheet takes text for text.

    >>> csv_cell("=HYPERLINK(1)"), csv_cell("a = b"), csv_cell(-1), csv_cell(None)
    ("'=HYPERLINK(1)", 'a = b', -1, None)
    """
    if not isinstance(value, str):
        return value
    # Python leaves it without quotes, and a spreadsheet begins a row there.
    text = value.replace("\r", " ")
    return f"'{text}" if FORMULA.match(text) else text


def csv_text(
    head: Sequence[str], rows: Iterable[Iterable[Any]], cell: Callable[[Any], Any] = csv_cell
) -> str:
    """Write a table as CSV, None as nothing; ``cell`` prepares each value.

    >>> csv_text(("synset", "images"), [("dog.n.01", 10), ("a, b", None)]).splitlines()
    ['synset,images', 'dog.n.01,10', '"a, b",']
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(map(cell, row) for row in rows)
    return text.getvalue()


def file_sha256(path: Path, advance: Advance = lambda _: None) -> str:
    """Hash a file in blocks, telling ``advance`` how many bytes went by."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def open_plain(path: Path) -> int:
    """Open a plain file for reading and return its descriptor.

    Raises:
        IntegrityError: it is missing, or a folder, a pipe or a device.
    """
    try:
        with plain_disk_errors(path):
            # Opened in the usual way, a pipe would be waited for until somebody writes into it.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path}: no plain file")
    return descriptor


def read_whole(path: Path, most: int) -> bytes:
    """Read a plain file of at most so many bytes.

    Raises:
        IntegrityError: it is missing, no plain file, or larger.
    """
    with open(open_plain(path), "rb") as file, plain_disk_errors(path):
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise IntegrityError(f"{path}: expected at most {decimal(most)}, found {decimal(size)}")
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        IntegrityError: it is missing, cut short, too large, or no JSON object.
    """
    try:
        content = json.loads(decode_text(read_whole(path, JSON_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
