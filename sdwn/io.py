"""Reading and writing files: atomic writes, formats and versions, locks, text of users."""

from __future__ import annotations

import codecs
import csv
import datetime
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import unicodedata
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from rich.filesize import decimal

from sdwn import __version__
from sdwn.errors import DiskError, IntegrityError, SdwnError, UsageError, first_line, shell
from sdwn.paths import cache_folder

TEMPORARY = ".tmp"
BLOCK = 1 << 22
# A part of a release has at least so many bytes, and less than twice as many.
PART_BYTES = 4_000_000_000
# A spreadsheet takes a cell that begins so for a formula, and would work it out.
FORMULA = re.compile(r"\s*[=+\-@\t]")
# Larger than any of this toolkit; Python takes several times as much memory for what it reads.
TABLE_BYTES = 1_000_000_000
JSON_BYTES = 100_000_000

Advance = Callable[[int], None]  # reports how much more is done
OnMessage = Callable[[str], None]  # reports what delays the work


@cache
def code_version() -> str:
    """Return the version and a digest of the package's files, as they are at the first call."""
    package, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + content)
    return f"{__version__}+{digest.hexdigest()[:12]}"


def ignore(_: str) -> None:
    """Do nothing with a message."""


def now() -> str:
    """Return the time in UTC to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def writable_cache() -> Path:
    """Return the user's cache folder; raise an error where it cannot be written to."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        what = f"the cache in {folder} cannot be written to ({error.strerror})"
        raise SdwnError(f"{what}; set SDWN_CACHE to a folder that can") from None


def require_home() -> None:
    """Set HOME to a private folder where this user has none; libraries look for it at import."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(private_folder(Path(tempfile.gettempdir())))


@contextmanager
def atomic(path: Path, folder: Path | None = None, parents: bool = True) -> Iterator[Path]:
    """Yield a temporary name; on success sync the file and rename it to ``path``.

    The temporary file lies in ``folder``, by default beside ``path``; folders are made, with
    their ``parents``. After an error ``path`` is as before; errors as in `plain_disk_errors`.
    """
    folder = folder or path.parent
    token = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = folder / f".{path.name}.{token}{TEMPORARY}"
    try:
        with plain_disk_errors(path):
            folder.mkdir(parents=parents, exist_ok=True)
            path.parent.mkdir(parents=parents, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


# What a disk answers that is full, read-only, or (shared ones, for minutes) not there.
_FULL = ("ENOSPC", "EDQUOT")
_FAILING = "EIO EROFS ESTALE ETIMEDOUT EREMOTEIO ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH".split()


@contextmanager
def plain_disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the OSError of a failing or full disk into a DiskError; ``needed`` bytes are written."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if (name := errno.errorcode.get(number)) not in (*_FULL, *_FAILING):
            raise
        fault, advice = f"its disk fails: {os.strerror(number)}", "when the disk works"
        if name in _FULL:
            found = [f"{decimal(needed)} needed"] if needed else []
            with suppress(OSError):
                parent = next(one for one in path.absolute().parents if one.is_dir())
                found.append(f"{decimal(shutil.disk_usage(parent).free)} free")
            fault, advice = f"no space or quota left ({', '.join(found)})", "after freeing some"
        kept = "everything finished is kept"
        raise DiskError(f"{path}: {fault}; {kept}, run the same command again {advice}") from error


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_append(path: Path) -> TextIO:
    """Open a journal or a lock for appending, made where it is missing; refuse a link."""
    # NOFOLLOW: through a link that somebody planted one would write to any file of this user.
    # NONBLOCK: a pipe that nobody reads is an error here, and no endless wait.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        remedy = f"if it is not yours, remove it: {shell('rm', path)}"
        raise UsageError(f"{path}: expected a file, found a link; {remedy}") from None


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a journal as a line of JSON, and sync it."""
    with open_append(path) as file:
        # A line that a crash cut short is ended first, so that it does not swallow this one.
        torn = path.read_bytes()[-1:] not in (b"", b"\n")
        file.write("\n" * torn + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_own_folder(path: Path) -> bool:
    """Return whether this is a folder, not a link, and belongs to this user."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def private_folder(shared: Path) -> Path:
    """Return this user's own folder below one that all users may write to; refuse any other."""
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
    """Raise an IntegrityError for a file that any user could have put into a cache."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) and path.parent.stat().st_mode & stat.S_IWOTH:
        raise IntegrityError(
            f"{path}: another user's, in a folder that everybody may write to; set SDWN_CACHE to "
            "a folder that only you, or you and your group, may write to"
        )


# What desktops and file servers keep in any folder: thumbnails, deleted files, earlier states,
# files that NFS or FUSE keeps for who has them open, and the other half of a Mac's file.
_STRAY = re.compile(
    r"thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|\.ds_store|\.directory"
    r"|@eadir|@recycle|@recently-snapshot|@tmp|#recycle|#snapshot|~snapshot|\$recycle\.bin|recycler"
    r"|system volume information|network trash folder|temporary items|__macosx|lost\+found"
    r"|\.snapshots?|\.zfs|\.appledouble|\.spotlight-v100|\.trashes|\.fseventsd"
    r"|(\.nfs|\.fuse_hidden|\._|\.trash-).*",
    re.IGNORECASE | re.DOTALL,
)


def is_stray(name: str) -> bool:
    """Return whether a desktop or a file server left a file of this name."""
    return _STRAY.fullmatch(name) is not None


def strays(folder: Path) -> Iterator[Path]:
    """Yield what desktops and file servers left below a folder; do not enter it."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in sorted((*folders, *names)) if is_stray(name))
        folders[:] = [name for name in folders if not is_stray(name)]


def links(folder: Path) -> Iterator[Path]:
    """Yield the links and pipes below a folder; follow none of them."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from () if is_stray(entry.name) else links(Path(entry.path))
            # submitit leaves a link beside each script, and nobody opens it.
            elif not entry.is_file(follow_symlinks=False) and "submission_file_" not in entry.name:
                yield Path(entry.path)


LINK = (
    "a link or a pipe, and a release holds plain files only; remove it, or, if it is yours, put a "
    "copy of what it stands for there"
)


def refuse_links(path: Path) -> None:
    """Raise an IntegrityError for a link or a pipe at or below a path in a release."""
    # A link may lead to any file of whoever opens the release, and reading a pipe has no end.
    found: Path | None = path
    if not os.path.lexists(path) or stat.S_ISREG(kind := path.lstat().st_mode):
        found = None
    elif stat.S_ISDIR(kind):
        found = next(links(path), None)
    if found is not None:
        raise IntegrityError(f"{found}: {LINK}")


def write_text(path: Path, text: str, errors: str = "strict", parents: bool = True) -> None:
    """Write a text file, whole or not at all; ``parents`` as in :func:`atomic`."""
    with atomic(path, parents=parents) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors, newline="")


def csv_cell(value: Any) -> Any:
    """Return a table's value so that a spreadsheet reads text as text, not as a formula.

    >>> csv_cell("=HYPERLINK(1)"), csv_cell("a = b"), csv_cell(-1), csv_cell(None)
    ("'=HYPERLINK(1)", 'a = b', -1, None)
    """
    if not isinstance(value, str):
        return json.dumps(value) if isinstance(value, list | dict) else value
    # Python leaves it without quotes, and a spreadsheet begins a row there.
    text = value.replace("\r", " ")
    return f"'{text}" if FORMULA.match(text) else text


def csv_text(head: Sequence[str], rows: Iterable[Iterable[Any]], escaped: bool = True) -> str:
    """Return a table as CSV text, None as an empty cell; ``escaped`` as by `csv_cell`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows((map(csv_cell, row) for row in rows) if escaped else rows)
    return text.getvalue()


def file_sha256(path: Path, advance: Advance = lambda _: None) -> str:
    """Return a file's SHA-256; call ``advance`` with the bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def open_plain(path: Path) -> int:
    """Open a plain file and return its descriptor; an IntegrityError if it is none, or missing."""
    try:
        with plain_disk_errors(path):
            # A normal open of a pipe waits until another process writes into it.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path}: no plain file")
    return descriptor


def read_whole(path: Path, most: int) -> bytes:
    """Read a plain file of at most so many bytes; an IntegrityError if it is none, or larger."""
    with open(open_plain(path), "rb") as file, plain_disk_errors(path):
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise IntegrityError(f"{path}: expected at most {decimal(most)}, found {decimal(size)}")
        return file.read()


@contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn what a damaged file brings about in the block into one IntegrityError that names it.

    So a reader takes what it needs of a file and checks no value beforehand. ``remedy`` is the
    next step. Errors of this package, which have sentences of their own, pass.
    """
    try:
        with plain_disk_errors(path):
            yield
    except (SdwnError, MemoryError):
        raise
    except Exception as error:  # of json, pydantic, pyarrow, h5py, csv and Python itself
        # Arrow and HDF5 have an OSError without a number for bytes that are not theirs.
        system = isinstance(error, OSError) and error.strerror
        what = f"cannot be read: {system}" if system else f"damaged: {first_line(error)}"
        raise IntegrityError("; ".join(filter(None, [f"{path}: {what}", remedy]))) from error


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a JSON object; an IntegrityError if it is missing, damaged or no object."""
    with reading(path, remedy):
        content = json.loads(decode_text(read_whole(path, JSON_BYTES)))
        if not isinstance(content, dict):
            raise TypeError(f"expected a JSON object, found {type(content).__name__}")
    return content


# A spreadsheet writes its country's separator.
SEPARATORS = ",;\t"


class Listed(NamedTuple):
    """A concept, or one image of it; ``where`` it stands in a list, and in which column ``key``."""

    where: str
    key: str | None
    name: str
    number: str | None = None


def canonical(name: str) -> str:
    """Return a name as composed Unicode (NFC): Macs write an é as two characters."""
    return unicodedata.normalize("NFC", name)


def decode_text(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 where a byte order mark says so; the mark is dropped."""
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig")


def read_text(path: Path) -> str:
    """Read a text file of a user, see :func:`decode_text`; line ends stay as they are."""
    try:
        if (size := path.stat().st_size) > TABLE_BYTES:
            most = decimal(TABLE_BYTES)
            raise UsageError(f"{path}: expected text of at most {most}, found {decimal(size)}")
        return decode_text(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected text in UTF-8, save it as such: {error}") from None


def read_list(path: Path, keys: Sequence[str] = ("wnid", "synset")) -> Iterator[Listed]:
    """Read a list of concepts: a table with one of the columns ``keys``, or one a line.

    In a table the column ``number`` may name images. In a line other words may follow, as in
    ``n01440764 tench, Tinca tinca``; ``#`` begins a comment.
    """
    text = read_text(path)
    header = text.partition("\n")[0]
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=header.count))
    try:
        columns = [cell.strip().lower() for cell in next(table, [])]
        key = next((name for name in keys if name in columns), None)
        indices = [columns.index(name) for name in (key, "number") if name in columns]
        for cells in table if key else ():
            if any(cell.strip() for cell in cells):
                where = f"{path}, line {table.line_num}"
                if max(indices) >= len(cells):
                    expected = f"expected {max(indices) + 1} cells or more, found {len(cells)}"
                    raise UsageError(f"{where}: {expected}")
                yield Listed(where, key, *(cells[index].strip() for index in indices))
    except csv.Error as error:
        raise UsageError(f"{path}: expected a CSV file: {error}") from None
    for line_number, line in enumerate(() if key else text.splitlines(), start=1):
        where = f"{path}, line {line_number}"
        name, *words = re.split(r"[\s,;]+", line.partition("#")[0].strip(), maxsplit=1)
        if words and re.search(r"\bn[0-9]{8}\b|\.n\.[0-9]", words[0]):
            raise UsageError(f"{where}: expected one synset a line, found several")
        if words and words[0].isdecimal():
            # Whole synsets would be taken where one image was meant.
            needs = "a table of images needs a first line such as wnid,number"
            raise UsageError(f"{where}: found a number behind {name!r}; {needs}")
        if name:
            yield Listed(where, None, name)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep what is made in the block out of Python's garbage collector; also a decorator."""
    # Visiting tens of thousands of records again and again is a third of the time.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


Given = TypeVar("Given")
Result = TypeVar("Result")


def in_threads(
    use: Callable[[Given], Result], given: Iterable[Given], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yield a function's results in order, computed in threads up to ``ahead`` items ahead."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for one in given:
            waiting.append(pool.submit(use, one))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def seconds(variable: str, default: float) -> float:
    """Read a number of seconds from the environment."""
    found = os.environ.get(variable, str(default))
    try:
        return max(0.0, float(found))
    except ValueError:
        raise UsageError(f"{variable}: expected seconds, found {found!r}") from None


@dataclass(frozen=True, slots=True)
class Format:
    """A JSON format of this project: its name, its version, and what a reader can do about others.

    ``remedy`` is the next step where a file has another version; ``upgrades`` turn the content
    of version n, but for these two, into that of n + 1; an old one may have the name ``former``.
    """

    name: str
    version: int
    remedy: str
    upgrades: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    former: str = ""

    def head(self) -> dict[str, Any]:
        """Return the two entries that every file of this format begins with."""
        return {"format": self.name, "format_version": self.version}

    def read(self, path: Path) -> dict[str, Any]:
        """Read a file of this format, upgraded to this version; an IntegrityError if it is none."""
        with self.reading(path) as content:
            return content

    @contextmanager
    def reading(self, path: Path) -> Iterator[dict[str, Any]]:
        """Read a file for a block that takes it apart; errors in it as in :func:`reading`."""
        with reading(path, self.remedy):
            yield self.upgraded(read_json(path, self.remedy), path)

    def read_sealed(self, path: Path) -> dict[str, Any]:
        """Read a record that holds its own digest; an IntegrityError if it was altered."""
        content = self.read(path)
        if content.get("digest") != content_digest(content):
            raise IntegrityError(f"{path}: altered since it was written; {self.remedy}")
        return content

    def upgraded(self, content: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return what a file holds, upgraded to this version; an IntegrityError if it is none."""
        found, version = content.get("format"), content.get("format_version")
        if found in (self.name, self.former):
            while isinstance(version, int) and version in self.upgrades:
                found, version, content = self.name, version + 1, self.upgrades[version](content)
                content |= {"format": found, "format_version": version}
        if (found, version) != (self.name, self.version):
            other = f"{found} {version}" if found else "another file"
            expected = f"expected {self.name} {self.version}, found {other}"
            raise IntegrityError(f"{path}: {expected}; {self.remedy}")
        return content


def content_digest(content: Mapping[str, Any]) -> str:
    """Compute SHA-256 over everything in a record but its own ``digest``."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[TextIO]:
    """Lock a file, made where it is missing; call ``waiting`` once if another process holds it."""
    with open_append(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # this file system has no locks
        yield file
