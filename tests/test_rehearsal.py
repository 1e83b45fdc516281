"""What `make rehearsal` runs; the job itself takes half an hour and is run by hand.

``python benchmarks/rehearsal.py --below bird.n.01`` tries the script in a few minutes.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
from sdwn.config import load_config
from sdwn.planning.plan import make_plan
from sdwn.wordnet.corpus import Synset

from conftest import REPOSITORY


def test_it_plans_the_papers_images_in_the_papers_shards(paper: tuple[Synset, ...]) -> None:
    rehearsal, full = (
        make_plan(load_config(REPOSITORY / "configs" / name), paper)
        for name in ("rehearsal.yaml", "paper.yaml")
    )
    assert (len(rehearsal.concepts), rehearsal.images) == (26_204, 262_040)
    assert rehearsal.table.equals(full.table), "prompts and shards included"
    assert list(rehearsal.specs(rehearsal.shards[-1])) == list(full.specs(full.shards[-1]))


@pytest.fixture
def disturbances(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("disturbances")


def test_its_disturbances_are_the_same_each_time_and_over_before_the_end(
    disturbances: ModuleType,
) -> None:
    found = disturbances.schedule(disturbances.MANY)
    assert found == disturbances.schedule(disturbances.MANY)
    assert {one.kind for one in found} == set(disturbances.MANY)
    assert len(found) == sum(disturbances.MANY.values())
    moments = [one.progress for one in found]
    assert moments == sorted(moments)
    assert moments[-1] < 0.95
