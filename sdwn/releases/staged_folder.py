"""A folder under construction: it takes its name once everything in it is on disk.

Until then it lies beside that name, hidden, with a journal of what is finished: whoever builds
the same thing again after a kill goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdwn.errors import UsageError
from sdwn.io import TEMPORARY, is_own_folder, links, open_append, plain_disk_errors, sync

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
JOURNAL = ".journal.jsonl"


class StagedFolder:
    """A folder to fill; ``finished`` holds the record of each thing that is complete in it."""

    def __init__(self, root: Path, recipe: Mapping[str, Any]) -> None:
        self.root = root
        self._journal = root / JOURNAL
        lines = _lines(self._journal)
        self.finished = {line.pop("name"): line for line in lines[1:] if "name" in line}
        # sdwn makes no links: whoever did wants something written elsewhere.
        if lines[:1] != [json.loads(json.dumps(recipe))] or any(links(root)):
            self._begin(recipe)
        for half in self.root.rglob(f".*{TEMPORARY}"):
            half.unlink()

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Note that a thing is complete and on disk."""
        self._append({"name": name, **record})
        self.finished[name] = dict(record)

    def _append(self, line: Mapping[str, Any]) -> None:
        with open_append(self._journal) as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _begin(self, recipe: Mapping[str, Any]) -> None:
        _empty(self.root)
        self.finished = {}
        with open_append(self._journal) as file:
            file.truncate(0)
        self._append(recipe)

    def _give_name(self, target: Path) -> None:
        _sync_folders(self.root)
        # In this order: whoever waits for the journal's lock must find the target there.
        self.root.replace(target)
        (target / JOURNAL).unlink()
        sync(target.parent)


def build(target: Path, recipe: Mapping[str, Any], fill: Callable[[StagedFolder], None]) -> bool:
    """Fill a folder and give it its name; False where another process did so meanwhile.

    ``recipe`` says in JSON's terms what is built: an unfinished folder of another recipe is
    begun anew. Processes that build the same wait for one another. After an error what is
    finished is kept.

    Raises:
        UsageError: something else stands at ``target``.
    """
    require_free(target)
    target = target.absolute()
    folder = target.parent / f".{target.name}{UNFINISHED}"
    with plain_disk_errors(target), _locked(folder / JOURNAL, target) as mine:
        if not mine:
            return False
        begun = None
        try:
            begun = StagedFolder(folder, recipe)
            fill(begun)
            begun._give_name(target)
        except BaseException:
            if begun is not None and not begun.finished:
                _remove(folder)
            raise
    return True


def require_free(target: Path) -> None:
    """Refuse a place where something stands.

    Raises:
        UsageError: it is a file, a link, or a folder with something in it.
    """
    if target.name in ("", "..") or target.is_mount() or target.absolute() == Path.cwd():
        raise UsageError(f"{target}: expected the name of a new folder; choose one")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target}: expected a folder or nothing, found a file or a link")
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target}: expected an empty folder or none, found other files")


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[bool]:
    """Hold the journal's lock; false once what it would build is there already."""
    while True:
        try:
            _take(path.parent)
            file = open_append(path)
        except FileNotFoundError:
            continue  # its folder has just taken its name, or was given up
        with file:
            _lock(file.fileno(), target)
            mine = _is_same(path, file.fileno())
            there = target.is_dir() and any(target.iterdir())
            if mine and there:
                _remove(path.parent)  # begun in the moment in which another one ended
            if mine or there:
                yield not there
                return


def _take(folder: Path) -> None:
    """Make the folder, or take over what an earlier attempt of this user left.

    Whatever else stands at its name is somebody's, and nothing in it is touched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        return
    if is_own_folder(folder):
        # Listed once: another process may be removing it, its journal last.
        names = {path.name for path in folder.iterdir()}
        if not names or JOURNAL in names:
            return
        found = f"files without {JOURNAL}"
    else:
        found = "a link, a file or another user's folder"
    raise UsageError(
        f"{folder}: expected nothing, or what an earlier attempt of yours left there, found "
        f"{found}; see what it is and move it away, or choose another name"
    )


def _empty(folder: Path) -> None:
    """Remove everything but the journal."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove the folder, its journal last: without one it would be nobody's."""
    with contextlib.suppress(OSError):
        _empty(folder)
        (folder / JOURNAL).unlink()
        folder.rmdir()


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("%s: another process is writing it; waiting for it", target)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # Some shared file systems have no locks. Two writers would write the same bytes.
        log.info("%s: no lock: %s", target, error)


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the journal, and end its last line if a kill or a full disk cut it short."""
    lines, text = [], path.read_text(encoding="utf-8", errors="replace")
    if text and not text.endswith("\n"):
        with open_append(path) as file:
            file.write("\n")
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            lines += [content] if isinstance(content, dict) else []
    return lines


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        sync(Path(folder))
