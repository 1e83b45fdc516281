"""Judging a release in shards: kept after a kill, merged, held against the release."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from sdwn.config import EvaluationConfig
from sdwn.evaluation import judging
from sdwn.evaluation.evaluating import evaluate
from sdwn.files import ReleasePaths
from sdwn.merge import merge
from sdwn.release import Release
from sdwn.verify import verify

from conftest import PlanRun

SHARD = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's smallest ViT: a real classifier of random opinions."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", num_classes=1000).state_dict(), path)
    return path


@pytest.fixture
def tiny(checkpoint: Path) -> EvaluationConfig:
    return EvaluationConfig(model="test_vit", checkpoint=checkpoint)


@pytest.fixture
def release(generated: PlanRun, whole_runs: Path, tmp_path: Path) -> Release:
    """30 images of 6 synsets, two of them ImageNet classes."""
    catalog = {"roots": ["corgi.n.01"], "file": str(tmp_path / "more.txt")}
    (tmp_path / "more.txt").write_text("corgi.n.01\ndog.n.01\nfarm.n.01\nzebra.n.01\n")
    (paths, _), made = generated(catalog=catalog), whole_runs / "judged"
    if not made.exists():
        merge([paths], ReleasePaths(made))
    shutil.copytree(made, tmp_path / "release")
    return Release(tmp_path / "release")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "IMAGES_PER_SHARD", SHARD)


def test_judging(release, tiny):
    pass
    pass
    pass
    pass
    pass
