"""A release as it is shown: what it holds, its pictures, and whether it is still the same."""

from __future__ import annotations

from pathlib import Path

from sdwn.browser.library import Library
from sdwn.browser.pictures import Pictures
from sdwn.paths import ReleasePaths

Stamp = tuple[int, int, int]


class Exhibit:
    """One release, open for looking at.

    Raises:
        SdwnError: there is no release at this path, or no such evaluation.
    """

    def __init__(self, root: Path, evaluation: str | None = None) -> None:
        self._manifest = ReleasePaths(root.absolute()).manifest
        # Before it is read: what comes in between is a change.
        self._stamp = _stamp(self._manifest)
        self.library = Library(root, evaluation)
        self.pictures = Pictures(self.library.release)

    @property
    def changed(self) -> str | None:
        """Say that the release on disk is another one than was opened; None if it is the same."""
        now = _stamp(self._manifest)
        if now == self._stamp:
            return None
        what = "was replaced" if now else "is gone or cannot be read"
        return f"{self._manifest.parent} {what} since it was opened; start sdwn browse again"


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
