"""A run's folder as its tasks write to it: a disk that fails for a moment ends no task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sdwn.errors import DiskError, SdwnError
from sdwn.io import now, plain_disk_errors, write_text
from sdwn.jobs.processes import this_process
from sdwn.paths import WAITED, RunPaths

log = logging.getLogger(__name__)

WAIT_SECONDS = 300.0
RETRY_SECONDS = 5.0
POLL_SECONDS = 0.05

T = TypeVar("T")


class RunDisk:
    """Access of a process to its run's folder, tried again while the disk fails.

    ``ending`` is set once the task is told to end: from then on nothing is waited for.
    """

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths
        self.ending = False

    def retry(self, action: Callable[[], T]) -> T:
        """Run an action; while the disk fails, wait and run it again, for some minutes at most.

        Raises:
            DiskError: the disk failed all that time, or until the task was told to end.
        """
        began = None
        while True:
            last = self.ending
            try:
                self._require_folder()
                found = action()
            except DiskError as error:
                if began is None:
                    began = time.monotonic()
                    log.warning("waiting up to %.0f min for the disk: %s", WAIT_SECONDS / 60, error)
                    self._note(f"waiting for the disk since {now()}: {error}")
                if last or time.monotonic() - began > WAIT_SECONDS:
                    raise
                end = time.monotonic() + RETRY_SECONDS
                while not self.ending and time.monotonic() < end:
                    time.sleep(POLL_SECONDS)
            else:
                if began is not None:
                    text = f"waited {time.monotonic() - began:.0f} s for the disk, then went on"
                    log.info("%s", text)
                    self._note(text)
                return found

    def _require_folder(self) -> None:
        # Or files would be written under the old name of a folder that was renamed, or below
        # the place where a disk was mounted.
        with plain_disk_errors(self.paths.root):
            if not self.paths.plan.exists():
                raise DiskError(
                    f"{self.paths.root}: its plan.json is gone: the folder was renamed, removed or "
                    "unmounted while this task ran; bring it back and run the same command again"
                )

    def _note(self, text: str) -> None:
        process = this_process()
        write_note(self.paths, self.paths.note(process.job, process.rank, WAITED), text)


def write_note(paths: RunPaths, path: Path, text: str) -> None:
    """Write what a task says of itself, if the disk takes it: images matter more."""
    try:
        if paths.root.is_dir():
            write_text(path, text + "\n")
    except (SdwnError, OSError) as error:
        log.warning("not written: %s", error)
