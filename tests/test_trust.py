"""What others leave in a folder deletes, runs and reveals nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sdwn.errors import UsageError
from sdwn.files import RunPaths
from sdwn.jobs import scheduler
from sdwn.jobs.journal import note_cancelled
from sdwn.jobs.submission import alone
from sdwn.releases.building import JOURNAL, Building, build
from submitit.local.local import start_controller

from conftest import wait_until


def fill(building: Building) -> None:
    (building.root / "a").write_text("a")


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's that nothing here may touch, as if sdwn had begun it."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years")
    return folder


class TestAnUnfinishedFolder:
    def test_a_link_is_not_followed(self, precious: Path, tmp_path: Path) -> None:
        (precious / JOURNAL).write_text("")
        (tmp_path / ".out.unfinished").symlink_to(precious)
        with pytest.raises(UsageError, match=r"\.out\.unfinished: .* found a link"):
            build(tmp_path / "out", {}, fill)
        assert contents(precious) == {"thesis.txt": "three years"}

    def test_a_folder_that_sdwn_did_not_begin_is_left(self, precious: Path, tmp_path: Path) -> None:
        precious.rename(tmp_path / ".out.unfinished")
        with pytest.raises(UsageError, match="found files without"):
            build(tmp_path / "out", {}, fill)
        assert contents(tmp_path / ".out.unfinished") == {"thesis.txt": "three years"}

    def test_a_folder_of_another_user_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / ".out.unfinished"
        folder.mkdir()
        (folder / JOURNAL).write_text("{}\n")
        own = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
        with pytest.raises(UsageError, match="another user's folder"):
            build(tmp_path / "out", {}, fill)
        assert (folder / JOURNAL).read_text() == "{}\n"

    def test_a_journal_that_is_a_link_is_not_written(self, precious: Path, tmp_path: Path) -> None:
        (tmp_path / ".out.unfinished").mkdir()
        (tmp_path / ".out.unfinished" / JOURNAL).symlink_to(precious / "thesis.txt")
        with pytest.raises(UsageError, match="found a link"):
            build(tmp_path / "out", {}, fill)
        assert contents(precious) == {"thesis.txt": "three years"}

    def test_a_link_within_is_not_written_through(self, precious: Path, tmp_path: Path) -> None:
        folder = tmp_path / ".out.unfinished"
        folder.mkdir()
        (folder / JOURNAL).write_text("{}\n")
        (folder / "a").symlink_to(precious / "thesis.txt")
        assert build(tmp_path / "out", {}, fill)
        assert contents(precious) == {"thesis.txt": "three years"}
        assert (tmp_path / "out/a").read_text() == "a"


def test_journal_and_lock_of_a_run_are_no_links(precious: Path, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    paths.submissions.symlink_to(precious / "thesis.txt")
    paths.submitting.symlink_to(precious / "thesis.txt")
    with pytest.raises(UsageError, match="found a link"):
        note_cancelled(paths)
    with pytest.raises(UsageError, match="found a link"), alone(paths, print):
        pass
    assert contents(precious) == {"thesis.txt": "three years"}


@pytest.mark.parametrize("setup", [[], ["export A=1", "umask 022"]], ids=["plain", "setup"])
def test_only_a_runs_own_processes_are_its_jobs(tmp_path: Path, setup: list[str]) -> None:
    """A number in a journal may be any process's by now."""
    jobs, others = tmp_path / "a run/jobs", tmp_path / "another/jobs"
    for folder in (jobs, others):
        folder.mkdir(parents=True)
    with start_controller(jobs / "%j", "sleep 60", setup=setup) as process:
        pid, host = str(process.pid), socket.gethostname()
        (jobs / pid).mkdir()
        wait_until(lambda: scheduler.processes(jobs, host, [pid]))
        assert not scheduler.processes(others, host, [pid])
        scheduler.cancel("local", others, [pid])
        assert process.poll() is None
        scheduler.cancel("local", jobs, [pid])
        assert process.wait() in (-signal.SIGKILL, 128 + signal.SIGKILL)


def test_a_process_that_only_speaks_of_submitit_is_left(tmp_path: Path) -> None:
    code, words = "import time; time.sleep(60)", ["-m", "submitit.local._local", b"/caf\xe9/%j"]
    with subprocess.Popen([sys.executable, "-c", code, *words]) as process:
        pid = str(process.pid)
        scheduler.cancel("local", tmp_path, [pid])
        assert not scheduler.processes(tmp_path, socket.gethostname(), [pid])
        assert process.poll() is None
        process.kill()
