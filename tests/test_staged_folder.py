"""Folders that appear only whole: kills, rivals, and what earlier attempts have left."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from sdwn.errors import UsageError
from sdwn.evaluation.verify import verify
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.staged_folder import JOURNAL, StagedFolder, build, require_free

from conftest import FEW, PlanRun, Sdwn, interrupt_at

SMALL_PARTS = MergeOptions(part_bytes=1)


@pytest.fixture
def generated(generated: PlanRun) -> PlanRun:
    return partial(generated, catalog=FEW)


def fill(staged: StagedFolder) -> None:
    for name in ("a", "b", "c"):
        if name not in staged.finished:
            (staged.root / name).write_text(name)
            staged.finish(name, {"length": 1})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    build(target, {"of": "letters"}, fill)
    assert names(target) == ["a", "b", "c"]
    assert names(tmp_path) == ["out"]
    with pytest.raises(UsageError, match="expected an empty folder or none"):
        require_free(target)


def stopped(target: Path) -> Path:
    """Begin a folder, and stop after its first file."""

    def stop(staged: StagedFolder) -> None:
        (staged.root / "a").write_text("a, first attempt")
        staged.finish("a", {"length": 1})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(target, {"of": "letters"}, stop)
    assert not target.exists()
    return target.parent / f".{target.name}.unfinished"


@pytest.mark.parametrize("junk", [b"", b'{"name": "b"', b"\xff\xfe\n", b"[3]\n7\n{}\n", b"\0" * 99])
def test_what_is_finished_is_kept_whatever_the_journal_ends_in(tmp_path: Path, junk: bytes) -> None:
    unfinished = stopped(tmp_path / "out")
    with (unfinished / JOURNAL).open("ab") as file:
        file.write(junk)
    build(tmp_path / "out", {"of": "letters"}, fill)
    assert (tmp_path / "out/a").read_text() == "a, first attempt"
    assert names(tmp_path / "out") == ["a", "b", "c"]


def test_another_recipe_begins_anew(tmp_path: Path) -> None:
    unfinished = stopped(tmp_path / "out")
    (unfinished / "folder").mkdir()
    build(tmp_path / "out", {"of": "other letters"}, fill)
    assert (tmp_path / "out/a").read_text() == "a"
    assert names(tmp_path / "out") == ["a", "b", "c"]


def test_an_attempt_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    def fail(staged: StagedFolder) -> None:
        (staged.root / "a").write_text("a")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build(tmp_path / "out", {}, fail)
    assert names(tmp_path) == []


def rivals(target: Path) -> list[bool]:
    """Let four threads build the same, and say who did."""
    start = threading.Barrier(4)

    def rival(_: int) -> bool:
        start.wait()
        try:
            build(target, {}, fill)
        except UsageError:  # another one writes it, or has done so
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(rival, range(4)))


def test_of_rivals_one_builds_and_the_others_are_refused(tmp_path: Path) -> None:
    for attempt in range(20):
        target = tmp_path / str(attempt)
        assert rivals(target).count(True) == 1
        assert names(target) == ["a", "b", "c"]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_another_process_fills_is_refused(tmp_path: Path) -> None:
    def fill_beside_another(staged: StagedFolder) -> None:
        with pytest.raises(UsageError, match="another process is writing it"):
            build(tmp_path / "out", {}, fill)
        fill(staged)

    build(tmp_path / "out", {}, fill_beside_another)
    assert names(tmp_path / "out") == ["a", "b", "c"]


def test_what_took_its_name_after_a_command_began_is_another_processes(tmp_path: Path) -> None:
    """As of two merges at once, one of which still looks at its shards when the other ends."""
    target = tmp_path / "out"
    require_free(target)
    build(target, {}, fill)
    with pytest.raises(UsageError, match="another process is writing it; run this again"):
        build(target, {}, fill)
    assert names(target) == ["a", "b", "c"]
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_no_other_process(sdwn: Sdwn, generated: PlanRun) -> None:
    generated()
    refused = sdwn("merge", "run", "--release", "/proc/zz", code=1).stderr
    assert refused.strip() == "error: /proc/.zz.unfinished: No such file or directory"


@pytest.mark.parametrize("place", [".", "..", "/", "sub/.."])
def test_places_that_cannot_be_replaced_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "here/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="expected the name of a new folder"):
        require_free(Path(place))


@pytest.fixture
def begun(generated: PlanRun) -> tuple[RunPaths, Plan, Path]:
    """A merge that was stopped in its fourth part."""
    paths, plan = generated()
    with pytest.raises(KeyboardInterrupt):
        merge([paths], ReleasePaths(paths.release), SMALL_PARTS, interrupt_at(35))
    return paths, plan, paths.root / ".release.unfinished"


def test_a_part_that_is_not_what_its_record_says_is_written_again(
    begun: tuple[RunPaths, Plan, Path],
) -> None:
    paths, plan, unfinished = begun
    # As where a kill came between a part of another attempt and its record.
    shutil.copy(unfinished / "images-00000.h5", unfinished / "images-00001.h5")
    part = unfinished / "images-00002.h5"
    part.write_bytes(part.read_bytes()[:-1])
    release = merge([paths], ReleasePaths(paths.release), SMALL_PARTS)
    assert verify(release.paths.root) == []
    assert release.metadata["wnid"].to_pylist() == [
        row.wnid for row in plan.concepts for _ in range(plan.config.images_per_synset)
    ]


def test_what_attempts_under_other_options_left_is_removed(
    begun: tuple[RunPaths, Plan, Path],
) -> None:
    paths, _, unfinished = begun
    for name in ("missing.csv", "skipped.csv", "images-00099.h5", "README.md"):
        (unfinished / name).write_text("stale")
    release = merge([paths], ReleasePaths(paths.release))
    assert verify(release.paths.root) == []
    assert len(list(release.paths.root.glob("*.h5"))) == 1


def test_merging_into_the_folder_one_stands_in_is_refused(sdwn: Sdwn, generated: PlanRun) -> None:
    paths, _ = generated()
    refused = sdwn("merge", paths.root, "--release", ".", code=2)
    assert "expected the name of a new folder" in refused.stderr
