"""The self-test, on a machine without a GPU, and what estimates take of one with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sdwn.config import load_config
from sdwn.jobs.profile import ClusterProfile
from sdwn.paths import RunPaths
from sdwn.preflight import selftest
from sdwn.preflight.selftest import SELF_CHECKS, Found, NotProvenError, SelfCheck, keep_speeds
from sdwn.preflight.speeds import SELFTEST, known_speeds

from conftest import REPOSITORY, Sdwn

# What a machine without a GPU can show.
SHOWN = {
    *("attention kernels", "first noise", "a batch twice", "NaN in half precision"),
    *("alone and in a batch, fp16", "alone and in a batch, bf16", "safety checker's flags"),
    *("out of memory", "tuning", "USR2 and SIGKILL in a batch"),
}


@pytest.mark.process
def test_a_task_without_a_gpu_shows_what_is_not_the_cards(sdwn: Sdwn) -> None:
    page = ("--page", "gpu-CARD.md")
    found = sdwn.json("selftest", "--quick", "--profile", "local", *page)
    outcomes = {one["check"]: one["outcome"] for one in found["checks"]}
    assert list(outcomes) == [check.name for check in SELF_CHECKS]
    assert {check for check, outcome in outcomes.items() if outcome == "ok"} == SHOWN
    rest = [one for one in found["checks"] if one["check"] not in SHOWN]
    assert all(one["outcome"] == "not proven" and one["found"] for one in rest)
    assert (found["format"], found["ok"], found["speeds"]) == ("sdwn-selftest", True, {})
    assert json.loads((sdwn.folder / "selftest/selftest.json").read_text()) == found
    assert not (sdwn.folder / "selftest/work").exists()
    text = (sdwn.folder / "gpu-cpu.md").read_text()
    assert all(f"| {check} |" in text for check in outcomes)


def test_a_check_that_fails_stops_no_other(sdwn: Sdwn, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Found:
        raise RuntimeError("fell off the bus")

    def unknown(_: Any) -> Found:
        raise NotProvenError("it has none")

    functions = {"bus": broken, "wheel": unknown, "engine": lambda _: Found("5", fits=False)}
    functions["lights"] = lambda _: Found("2 | 3", figures={"count": 2})
    checks = [SelfCheck("car", name, "2", one, name == "lights") for name, one in functions.items()]
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
    shown = sdwn("selftest", "--quick", "--page", "page.md", code=1).stdout
    assert re.search(r"failed +engine +5 \(expected: 2\)", shown)
    assert re.search(r"not proven +lights +only without --quick", shown)
    assert "| engine | 2 | 5 | failed |" in (sdwn.folder / "page.md").read_text()


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
        "speeds": {"plain": {"10": 2.0, "20": 2.5}, "compiled": {"20": 3.0}},
    }
    keep_speeds(content)
    (path,) = (tmp_path / "cache/gpus").iterdir()
    return path


@pytest.mark.parametrize(
    ("changes", "speed", "source"),
    [
        ((), 2.5, "sdwn selftest, 2026-11-26"),
        (("generation.batch_size=10",), 2.0, "sdwn selftest, 2026-11-26"),
        (("generation.compile=true",), 3.0, "sdwn selftest, 2026-11-26"),
        (("generation.num_inference_steps=25",), 4.76, "sdwn selftest, 2026-11-26, scaled by work"),
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


@pytest.mark.parametrize("damage", ["no JSON", '{"speeds": 1}', None, "infinite"])
def test_a_damaged_self_test_is_none(card: Path, tmp_path: Path, damage: str | None) -> None:
    content = json.loads(card.read_text())
    content["speeds"]["plain"] = {"10": -1} if damage is None else {"10": float("inf")}
    card.write_text(damage if damage and damage[0] in "n{" else json.dumps(content))
    config = load_config(REPOSITORY / "configs/paper.yaml")
    (found,) = known_speeds(config, ClusterProfile(gres="gpu:a100:1"), RunPaths(tmp_path / "run"))
    assert found.speed_source.startswith("published speed of an A100")
