"""A folder under construction: it takes its name once everything in it is on disk.

::

    .NAME.unfinished/      hidden, beside its final name; one process at a time fills it
        .journal.jsonl     line 1: the recipe; then a line for each thing that is complete.
        ...                Its lock is held by the process that fills the folder
           |
           |  everything is finished and synced
           v
    NAME/                  by one rename; the journal goes last

A process that builds the same thing after a kill resumes from the journal.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from sdwn import io
from sdwn.errors import UsageError

JOURNAL = ".journal.jsonl"


class StagedFolder:
    """A folder to fill; ``finished`` holds the record of each thing that is complete in it."""

    def __init__(self, root: Path, recipe: Mapping[str, Any]) -> None:
        self.root, self._journal = root, root / JOURNAL
        lines = list[dict[str, Any]]()
        for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):  # a kill or a full disk cut it short
                lines.append(dict(json.loads(line)))
        self.finished = {line.pop("name"): line for line in lines[1:] if "name" in line}
        # sdwn makes no links: one here may make it write anywhere.
        if lines[:1] != [json.loads(json.dumps(recipe))] or any(io.links(root)):
            _empty(root)
            self.finished = {}
            with io.open_append(self._journal) as file:
                file.truncate(0)
            io.append_json(self._journal, recipe)
        for half in root.rglob(f".*{io.TEMPORARY}"):
            half.unlink()

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Record that a thing is complete and on disk."""
        io.append_json(self._journal, {"name": name, **record})
        self.finished[name] = dict(record)


def build(target: Path, recipe: Mapping[str, Any], fill: Callable[[StagedFolder], None]) -> None:
    """Fill a folder and give it its name; after an error what is finished is kept.

    ``target`` was found free by `require_free`; what is in it by now, another process has written.
    ``recipe`` is what is built, in JSON's terms: an unfinished folder of another one is emptied.
    ``fill`` writes what is not finished yet.
    """

    def refuse() -> NoReturn:
        raise UsageError(f"{target}: another process is writing it; run this again when it ended")

    target = target.absolute()
    folder = target.parent / f".{target.name}.unfinished"
    with io.plain_disk_errors(target), ExitStack() as lock:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            _require_own(folder)
            lock.enter_context(io.locked(folder / JOURNAL, refuse))
            staged = StagedFolder(folder, recipe)
        except FileNotFoundError:  # the folder has just taken its name, or was given up
            refuse()
        try:
            if target.exists() and any(target.iterdir()):
                refuse()
            fill(staged)
            for inside, _, _ in os.walk(folder):
                io.sync(Path(inside))
            # In this order: another process must find the lock held, or the target there.
            folder.replace(target)
            (target / JOURNAL).unlink()
            io.sync(target.parent)
        except BaseException:
            if not staged.finished:
                # The journal last: without one, no command would remove it.
                with suppress(OSError):
                    _empty(folder)
                    (folder / JOURNAL).unlink()
                    folder.rmdir()
            raise


def require_free(target: Path) -> None:
    """Raise a UsageError for a path that is a file, a link, or a folder with something in it."""
    if target.name in ("", "..") or target.is_mount() or target.absolute() == Path.cwd():
        raise UsageError(f"{target}: expected the name of a new folder; choose one")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target}: expected a folder or nothing, found a file or a link")
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target}: expected an empty folder or none, found other files")


def _require_own(folder: Path) -> None:
    """Refuse what is neither empty nor left by an earlier attempt of this user."""
    found = "a link, a file or another user's folder"
    if io.is_own_folder(folder):
        # Listed once: another process may be removing it, its journal last.
        names = {path.name for path in folder.iterdir()}
        if not names or JOURNAL in names:
            return
        found = f"files without {JOURNAL}"
    expected = f"{folder}: expected nothing, or what an earlier attempt of yours left there"
    raise UsageError(f"{expected}, found {found}; move it away, or choose another name")


def _empty(folder: Path) -> None:
    """Remove everything but the journal."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
