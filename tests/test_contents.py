"""The contents of a release on one screen: only what its records tell."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import ExportOptions, export
from sdwn.generation.task import generate
from sdwn.io import file_sha256
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.releases.merge import merge
from sdwn.releases.release import Release

import drawn
from conftest import REPOSITORY, PlanRun, Sdwn

OLD = REPOSITORY / "tests/files"


def shown(sdwn: Sdwn, release: Path) -> dict[str, str]:
    """Return what people read, by the words before it."""
    lines = sdwn("show", release).stdout.splitlines()
    found = {}
    for line in lines[1:-1]:
        name, _, value = line.partition("  ")
        found[name] = value.strip()
    assert lines[-1].startswith("next: sdwn ")
    return found


def test_a_run_is_told_from_its_plan_to_its_evaluations(
    sdwn: Sdwn, generated: PlanRun, tmp_path: Path
) -> None:
    paths, plan = generated()
    release = merge([paths], ReleasePaths(tmp_path / "release"))
    root = release.paths.root
    drawn.evaluation(release, drawn.predictions(release))
    drawn.draw_features(release, release.metadata["seed"].to_numpy().reshape(-1, 1) % 7)
    found, read = sdwn.json("show", root), shown(sdwn, root)
    (recorded,) = found["plans"]
    assert (recorded["digest"], recorded["images"]) == (plan.digest, plan.images)
    assert recorded["generation"]["width"] == 16
    assert read["plan"].startswith(f"{plan.digest[:12]}: {plan.images} images of below corgi")
    assert "16x8, 1 step, guidance 7.5, seed 0" in read["plan"]
    assert (found["images"], found["statuses"]) == (plan.images, {"ok": plan.images})
    provenance = release.provenance(0)["task_run"]
    assert found["made_with"]["model"] == ["builtin:noise"]
    assert found["made_with"]["host"] == [provenance["host"]]
    assert (read["host"], read["device"]) == (provenance["host"], "cpu")
    assert f"numpy {provenance['numpy']}" in read["versions"]
    assert found["started"] == provenance["started"]
    assert found["sha256"] == file_sha256(release.paths.manifest)
    assert (found["evaluations"], found["features"]) == (["drawn"], ["drawn"])
    assert (read["evaluations"], read["features"]) == ("drawn", "drawn")
    assert found["device_seconds"] > 0
    assert re.fullmatch(r"\d+ s", read["device time"])
    # Nothing tells these.
    assert not {"energy", "measures", "transfer", "duplicates", "source"} & set(read)
    assert read["kills survived"] == "0"
    assert verify(root) == []


def test_shards_that_a_later_task_finished_are_counted(sdwn: Sdwn, tmp_path: Path) -> None:
    paths = RunPaths(Path(shutil.copytree(OLD / "stopped", tmp_path / "stopped")))
    generate(paths.root, [0, 1, 2])
    merge([paths], ReleasePaths(tmp_path / "release"))
    assert sdwn.json("show", tmp_path / "release")["resumed"] == 1
    assert shown(sdwn, tmp_path / "release")["kills survived"] == "1"


@pytest.mark.parametrize("seconds", [(30.0, 3700.0), (30.0, None)])
def test_the_time_of_all_tasks_is_known_or_none(
    sdwn: Sdwn, generated: PlanRun, tmp_path: Path, seconds: tuple[float | None, ...]
) -> None:
    paths, _ = generated()
    (record,) = paths.tasks.glob("*.json")
    content = json.loads(record.read_text())
    content |= {"loading_seconds": 20.0, "first_seconds": 10.0, "seconds": 0.0, "busy": 0.0}
    for job, whole in enumerate(seconds):
        told = {**content, "seconds": ((whole or 0) - 30) / 2, "busy": 0.5 if whole != 30 else 0.0}
        text = json.dumps(told) if whole else "cut sh"
        (paths.tasks / f"{job}.0.json").write_text(text)
    record.unlink()
    release = merge([paths], ReleasePaths(tmp_path / "release"))
    known = None not in seconds
    assert release.manifest.device_seconds == (3730.0 if known else None)
    assert shown(sdwn, release.paths.root).get("device time") == ("1 h 2 min" if known else None)
    export(release.subset(rows=range(5)), tmp_path / "part", ExportOptions("release"))
    assert Release(tmp_path / "part").manifest.device_seconds is None, "a part has a share of it"


def test_old_releases_and_imports_tell_what_they_know(sdwn: Sdwn) -> None:
    old, imported = shown(sdwn, OLD / "release"), shown(sdwn, OLD / "imported")
    assert old["host"] == "node1"
    assert old["evaluations"] == "efficientnet-lite0"
    assert "device time" not in old
    assert imported["imported"].startswith("2026-11-25")
    assert not {"plan", "model", "kills survived", "merged"} & set(imported)
    assert sdwn.json("show", OLD / "imported")["plans"] == []


def test_options_of_a_synset_need_one(sdwn: Sdwn) -> None:
    for option in (["--open"], ["--save", "x.html"], ["--evaluation", "x"]):
        assert "need a SYNSET" in sdwn("show", OLD / "release", *option, code=2).stderr
