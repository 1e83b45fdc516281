"""The self-test, on a machine without a GPU, and what estimates take of one with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from sdwn.batches import BatchSize
from sdwn.config import load_config
from sdwn.devices.device import Device
from sdwn.exchange.export import ExportOptions, export
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.task import Meter, read_record
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.preflight import selftest
from sdwn.preflight.estimate import SELFTEST, known_speeds
from sdwn.preflight.selftest import SELF_CHECKS, Found, NotProvenError, SelfCheck, keep_speeds
from sdwn.releases.merge import merge
from sdwn.releases.release import Release

import families
from conftest import REPOSITORY, PlanRun, Sdwn

# What a machine without a GPU can show.
SHOWN = {
    *("first noise", "a batch twice", "NaN in half precision"),
    *("alone and in a batch, fp16", "alone and in a batch, bf16", "safety checker's flags"),
    *("out of memory", "tuning", "USR2 and SIGKILL in a batch"),
}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """All that Python finds on a machine with torch and with the wheels of docs/gpu.md."""
    lines = (REPOSITORY / "benchmarks/gpu-wheels.txt").read_text().splitlines()[1:]
    # With what these two need; what a wheel needs must be in the list itself.
    found, needed = {line.partition("==")[0] for line in lines}, ["torch", "torchvision"]
    while needed:
        if (name := needed.pop()) not in found:
            found.add(name)
            given = [Requirement(line) for line in metadata.requires(name) or ()]
            needed += [one.name for one in given if not one.marker or one.marker.evaluate()]
    folder = tmp_path / "bare"
    folder.mkdir()
    for distribution in map(metadata.distribution, found):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).is_symlink():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


@pytest.mark.process
def test_a_bare_machine_without_a_gpu_shows_what_is_not_the_cards(
    bare: Path, tmp_path: Path
) -> None:
    # With -S, Python finds nothing that is installed.
    command = [sys.executable, "-S", "-m", "sdwn", "selftest", "--quick", "--page", "gpu-CARD.md"]
    environment = {**os.environ, "PYTHONPATH": f"{bare}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    outcomes = {one["check"]: one["outcome"] for one in found["checks"]}
    assert list(outcomes) == [check.name for check in SELF_CHECKS]
    assert {check for check, outcome in outcomes.items() if outcome == "ok"} == SHOWN
    rest = [one for one in found["checks"] if one["check"] not in SHOWN]
    assert all(one["outcome"] == "not proven" and one["found"] for one in rest)
    assert (found["format"], found["ok"], found["speeds"]) == ("sdwn-selftest", True, {})
    assert json.loads((tmp_path / "selftest/selftest.json").read_text()) == found
    assert not (tmp_path / "selftest/work").exists()
    page = (tmp_path / "gpu-cpu.md").read_text()
    assert all(f"| {check} |" in page for check in outcomes)


@pytest.mark.process
def test_a_job_that_cannot_begin_says_why(sdwn: Sdwn) -> None:
    asked = ("selftest", "--profile", "local", "--model", "/nowhere/model")
    failed = " ".join(sdwn(*asked, code=1).stderr.split())
    assert f"the self-test ended after 0 of {len(SELF_CHECKS)} checks" in failed
    assert "model /nowhere/model: no such folder" in failed


def test_a_check_that_fails_stops_no_other(sdwn: Sdwn, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Found:
        raise RuntimeError("fell off the bus")

    def unknown(_: Any) -> Found:
        raise NotProvenError("it has none")

    functions = {"bus": broken, "wheel": unknown, "engine": lambda _: Found("5", fits=False)}
    functions["lights"] = lambda _: Found("2 | 3", figures={"count": 2})
    checks = [
        SelfCheck("car", name, "2", one, gpu=False, long=name == "lights")
        for name, one in functions.items()
    ]
    monkeypatch.setattr(selftest, "SELF_CHECKS", checks)
    monkeypatch.setattr(selftest.forkserver, "ensure_running", lambda: None)
    found = sdwn.json("selftest", "--out", "found", code=1)
    told = [(one["outcome"], one["found"]) for one in found["checks"]]
    assert told == [
        ("failed", "RuntimeError: fell off the bus"),
        ("not proven", "it has none"),
        ("failed", "5"),
        ("ok", "2 | 3"),
    ]
    assert "in broken" in found["checks"][0]["figures"]["traceback"]
    assert not found["ok"]
    assert "| 2 \\| 3 | ok |" in selftest.self_test_page(found)
    shown = sdwn("selftest", "--quick", "--page", "page.md", code=1).stdout
    assert re.search(r"failed +engine +5 \(expected: 2\)", shown)
    assert re.search(r"not proven +lights +left out by --quick", shown)
    assert "| car | engine | 2 | 5 | failed |" in (sdwn.folder / "page.md").read_text()


def test_half_precision_that_needs_a_gpu_is_not_proven(tmp_path: Path) -> None:
    """Of another model than the built-in ones, on a machine without a GPU."""
    families.one_block(tmp_path / "model")
    bench = selftest.Bench(tmp_path / "work", str(tmp_path / "model"), True, lambda _: None)
    assert bench.sampler().config.generation.precision == "fp32"
    with pytest.raises(NotProvenError, match="fp16 needs a GPU"):
        bench.sampler(precision="fp16")


def test_flags_of_a_profile_need_one(sdwn: Sdwn) -> None:
    assert "need --profile" in sdwn("selftest", "--time", "10", code=2).stderr


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has a self-test of an A100, and nothing else."""
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "cache"))
    content = {
        **SELFTEST.head(),
        "measured": "2026-11-26T04:00:00+00:00",
        "device": "NVIDIA A100-SXM4-40GB",
        "memory_gb": 42,
        "speeds": {"plain": {"10": 2.0, "20": 2.5}, "blocks": {"20": 3.0}, "whole": {"20": 3.5}},
    }
    keep_speeds(content)
    (path,) = (tmp_path / "cache/gpus").iterdir()
    return path


@pytest.mark.parametrize(
    ("changes", "speed", "source"),
    [
        ((), 2.5, "sdwn selftest, 2026-11-26"),
        (("generation.batch_size=10",), 2.0, "sdwn selftest, 2026-11-26"),
        (("generation.compile=true",), 3.0, "sdwn selftest, 2026-11-26, compiled"),
        (("generation.compile=whole",), 3.5, "sdwn selftest, 2026-11-26, compiled"),
        (
            ("generation.num_inference_steps=25",),
            4.76,
            "sdwn selftest, 2026-11-26, scaled by work from 512x512 and 50 steps",
        ),
    ],
)
def test_a_cards_own_speeds_come_before_published_ones(
    card: Path, tmp_path: Path, changes: tuple[str, ...], speed: float, source: str
) -> None:
    config = load_config(REPOSITORY / "configs/paper.yaml", changes)
    (found,) = known_speeds(config, ClusterProfile(gres="gpu:a100:1"), RunPaths(tmp_path / "run"))
    assert found.device == "NVIDIA A100-SXM4-40GB, 42 GB"
    assert found.images_per_second == pytest.approx(speed, rel=0.01)
    assert found.speed_source == source
    (other,) = known_speeds(config, ClusterProfile(gres="gpu:v100:1"), RunPaths(tmp_path / "run"))
    assert other.speed_source.startswith("published speed of a V100")


@pytest.mark.parametrize("damage", ["no JSON", {"speeds": 1}, {"speeds": {"plain": []}}])
def test_a_damaged_self_test_is_none(card: Path, tmp_path: Path, damage: Any) -> None:
    content = json.loads(card.read_text())
    card.write_text(damage if isinstance(damage, str) else json.dumps({**content, **damage}))
    config = load_config(REPOSITORY / "configs/paper.yaml")
    (found,) = known_speeds(config, ClusterProfile(gres="gpu:a100:1"), RunPaths(tmp_path / "run"))
    assert found.speed_source.startswith("published speed of an A100")


def test_a_meter_counts_what_the_card_took(tmp_path: Path) -> None:
    class Card(Device):
        counter = iter([5000.0, 5000.5, 5250.0])

        @property
        def energy_joules(self) -> float:
            return next(self.counter)

    batch = BatchSize(10, "test")
    meter = Meter(
        RunPaths(tmp_path), device=Card(gpu=False), batch=batch, loading_seconds=1.0, total=10
    )
    meter.end()
    assert read_record(next((tmp_path / "tasks").iterdir())).energy_joules == 250.0


@pytest.mark.parametrize("energies", [(3.6e6, 7.2e6), (3.6e6, None), (None, None)])
def test_a_release_has_the_energy_that_every_task_told(
    generated: PlanRun, tmp_path: Path, energies: tuple[float | None, ...]
) -> None:
    paths, _ = generated()
    (record,) = paths.tasks.glob("*.json")
    content = json.loads(record.read_text())
    for job, joules in enumerate(energies):
        told = {**content, "energy_joules": joules}
        (paths.tasks / f"{job}.0.json").write_text(json.dumps(told))
    # One that found all its shards finished took nothing.
    record.write_text(json.dumps({**content, "first_images": 0, "images": 0}))
    release = merge([paths], ReleasePaths(tmp_path / "release"))
    whole = sum(filter(None, energies)) if None not in energies else None
    assert release.manifest.energy_joules == whole
    told = "their GPUs took 3.00 kWh" in release.paths.card.read_text()
    assert told == (whole is not None)
    export(release.subset(rows=range(5)), tmp_path / "part", ExportOptions("release"))
    assert Release(tmp_path / "part").manifest.energy_joules is None, "a part has a share of it"
