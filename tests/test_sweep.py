"""Sweeps: cells of one config, planned, made, kept going and compared as one."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdwn.cli import console
from sdwn.generation.task import generate
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.sweep import Cell, cell_name, read_sweep_file
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.workflow.plans import plan_sweep

import drawn
from conftest import NOISE, REPOSITORY, Sdwn, Testbed

BASE = {**NOISE, "catalog": {"roots": ["corgi.n.01"]}, "storage": {"images_per_shard": 5}}
GUIDANCE, PROMPTS = [1.5, 3], ["{definition}", "a {lemma}"]
VARY = {"generation.guidance_scale": GUIDANCE, "prompt": PROMPTS}
NAMES = [
    f"guidance_scale={scale},prompt={prompt}"
    for scale in GUIDANCE
    for prompt in ("definition", "a-lemma")
]


def write(folder: Path, name: str = "sweep.yaml", **content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"base": BASE, **content}))
    return path


def names(folder: Path) -> list[str]:
    return [cell["name"] for cell in json.loads((folder / "sweep.json").read_text())["cells"]]


def test_more_values_in_any_order_add_cells_and_keep_the_others(sdwn: Sdwn, tmp_path: Path) -> None:
    found = sdwn.json("sweep", write(tmp_path, vary=VARY), "S")
    assert [cell["name"] for cell in found["cells"]] == NAMES
    plans = {name: (tmp_path / "S" / name / "plan.json").read_bytes() for name in NAMES}
    more = {"prompt": ["a {lemma}!", *PROMPTS[::-1]], "generation.guidance_scale": [3, 0, 1.5]}
    sdwn("sweep", write(tmp_path, vary=more), "S")
    found = names(tmp_path / "S")
    assert found[:4] == NAMES
    assert {"prompt=a-lemma,guidance_scale=0", "prompt=a-lemma,guidance_scale=0-2"} < {*found}
    assert len(found) == 9
    # A setting more: where it has the base's value the cell is one that is there.
    steps = {**VARY, "generation.num_inference_steps": [1, 2]}
    sdwn("sweep", write(tmp_path, vary=steps), "S")
    assert len(names(tmp_path / "S")) == 9 + 4
    assert plans == {name: (tmp_path / "S" / name / "plan.json").read_bytes() for name in NAMES}


def test_a_base_is_a_file_beside_the_sweeps_or_shipped_and_settings_may_go_together(
    tmp_path: Path,
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base.yaml").write_text(json.dumps({**BASE, "catalog": {"file": "dogs.txt"}}))
    cells = [
        {},
        {"generation": {"guidance_scale": 0, "num_inference_steps": 2}},
        {"model.name": "builtin:tiny", "generation.height": 16},
    ]
    vary = {"images_per_synset": [2, 4]}
    found, config = read_sweep_file(
        write(tmp_path, base="sub/base.yaml", cells=cells, vary=vary), ()
    )
    assert [cell_name(settings) for settings in found][2:] == [
        "guidance_scale=0,num_inference_steps=2,images_per_synset=2",
        "guidance_scale=0,num_inference_steps=2,images_per_synset=4",
        "model=builtin-tiny,height=16,images_per_synset=2",
        "model=builtin-tiny,height=16,images_per_synset=4",
    ]
    configs = [config(settings) for settings in found]
    assert [config.generation.guidance_scale for config in configs] == [7.5, 7.5, 0, 0, 7.5, 7.5]
    assert all(config.generation.width == 16 for config in configs), "the rest of a section stays"
    assert configs[0].catalog.file == tmp_path / "sub/dogs.txt"
    (found, config) = read_sweep_file(write(tmp_path, base="demo"), ("images_per_synset=3",))
    assert [config(settings).images_per_synset for settings in found] == [3]
    for name, cells in (("demo-sweep", 6), ("study", 8)):
        found, config = read_sweep_file(REPOSITORY / f"configs/{name}.yaml", ())
        assert len({config(settings).model_dump_json() for settings in found}) == cells


NO_SWEEPS: list[tuple[dict[str, Any], str]] = [
    ({"vary": {"generation.guidance": [1]}}, "unknown key 'generation.guidance'; valid keys"),
    ({"vary": {"seed": [1, 2]}}, "seed: all cells have the base's"),
    ({"cells": [{"seed": 1}]}, "seed: all cells have the base's"),
    ({"vary": {"prompt": ["{lemma}", "{lemma}"]}}, "prompt=lemma and prompt=lemma are the sa"),
    ({"vary": {"evaluation.model": ["paper", "any"]}}, "model=any and model=paper are the sa"),
    ({"vary": {"prompt": []}}, "vary.prompt: List should have at least 1 item"),
    ({"vary": {"prompt": "{lemma}"}}, "vary.prompt: Input should be a valid list"),
    ({"vary": {"generation.height": [7]}}, "generation.height=7: generation.height: Input"),
    ({"grid": {}}, "unknown key 'grid'; valid keys here: base, vary, cells"),
    ({"base": "nothing"}, "no config 'nothing': expected a file, or one of those shipped"),
]


def test_what_makes_no_sweep_is_refused_before_anything_is_written(
    sdwn: Sdwn, tmp_path: Path
) -> None:
    for content, expected in NO_SWEEPS:
        refused = sdwn("sweep", write(tmp_path, **content), "S", code=2).stderr
        assert expected in refused
        assert not (tmp_path / "S").exists()


def test_cells_whose_names_differ_in_case_alone_have_folders_that_differ_in_more(
    sdwn: Sdwn, tmp_path: Path
) -> None:
    path = write(tmp_path, vary={"prompt": ["A {lemma}", "a {lemma}"]})
    cells = json.loads(sdwn("sweep", path, "S", "--json").stdout)["cells"]
    assert [cell["name"] for cell in cells] == ["prompt=A-lemma", "prompt=a-lemma-2"]
    record = tmp_path / "S/sweep.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "cells": []}))
    refused = sdwn("status", "S", code=1).stderr
    assert "damaged: cells: List should have at least 1 item" in refused
    assert "remove it and run sdwn sweep again" in refused
    record.unlink()
    assert json.loads(sdwn("sweep", path, "S", "--json").stdout)["cells"] == cells


def test_a_changed_base_or_another_kind_of_folder_is_refused(sdwn: Sdwn, tmp_path: Path) -> None:
    path = write(tmp_path, vary=VARY)
    sdwn("sweep", path, "S")
    before = sorted(tmp_path.rglob("*"))
    refused = sdwn("sweep", path, "S", "--set", "images_per_synset=6", code=2).stderr
    assert f"S/{NAMES[0]} belongs to another plan: images_per_synset: 5 here, 6 now" in refused
    assert sorted(tmp_path.rglob("*")) == before
    refused = sdwn("sweep", path, f"S/{NAMES[0]}", code=2).stderr
    assert "is no sweep; plan the sweep into a folder of its own" in refused
    (tmp_path / "base.yaml").write_text(json.dumps(BASE))
    assert "use: sdwn sweep SWEEP S" in sdwn("plan", "base.yaml", "S", code=2).stderr
    assert "no sweep's file" in sdwn("run", "base.yaml", "S", code=2).stderr
    assert "use: sdwn browse S/CELL/release" in sdwn("browse", "S", code=2).stderr


TEXTS = st.text("ab0{}_-.,=/% \n$é犬")


def test_a_cell_that_is_added_takes_the_weights_of_the_others(sdwn: Sdwn, tmp_path: Path) -> None:
    vary = {"model.name": ["builtin:tiny"], "generation.guidance_scale": [3]}
    sdwn("sweep", write(tmp_path, vary=vary), "S")
    lock = tmp_path / "S/model=builtin-tiny,guidance_scale=3/lock.json"
    earlier = {**json.loads(lock.read_text()), "written": "earlier"}
    lock.write_text(json.dumps(earlier))
    vary = {"model.name": ["builtin:noise", "builtin:tiny"], "generation.guidance_scale": [2, 3]}
    sdwn("sweep", write(tmp_path, vary=vary), "S")
    added = tmp_path / "S/model=builtin-tiny,guidance_scale=2/lock.json"
    assert json.loads(added.read_text()) == earlier
    assert not (tmp_path / "S/model=builtin-noise,guidance_scale=2/lock.json").exists()


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "model.name", "generation.options.a/b %", "model.lora"]),
        st.one_of(TEXTS, st.floats(), st.booleans(), st.lists(TEXTS)),
    )
)
def test_a_name_is_safe_whatever_varies(settings: dict[str, Any]) -> None:
    name = cell_name(settings)
    assert Cell(name=name, settings={}, digest="").name == name, "its own pattern takes it"
    assert len(name) <= 120


THREE = [f"guidance_scale={scale}" for scale in (0, 1.5, 3)]


@pytest.fixture
def sweep(sdwn: Sdwn, tmp_path: Path) -> RunPaths:
    sdwn("sweep", write(tmp_path, vary={"generation.guidance_scale": [0, 1.5, 3]}), "S")
    return RunPaths(tmp_path / "S")


@pytest.mark.process
def test_all_cells_are_made_merged_and_compared_as_one(
    sdwn: Sdwn, sweep: RunPaths, tmp_path: Path
) -> None:
    before = sdwn.json("status", "S")
    assert list(before) == THREE
    assert {one["shards_missing"] for one in before.values()} == {2}
    assert "add --wait" in sdwn("submit", "S", code=2).stderr
    # One ended after its first shard, and one has lost its plan: it fails alone.
    killed, lost = THREE[0], THREE[2]
    generate(sweep.root / killed, [0])
    shutil.move(sweep.root / lost / "plan.json", tmp_path / "plan.json")
    found = sdwn.json("submit", "S", "--wait", code=1)
    assert [name for name, one in found.items() if "error" in one] == [lost]
    assert "no plan here" in found[lost]["error"]
    assert found[killed]["shards"] == 1, "what it had was kept"
    shutil.move(tmp_path / "plan.json", sweep.root / lost / "plan.json")
    assert "next: sdwn submit S --wait" in sdwn("status", "S").stdout
    sdwn("submit", f"S/{lost}", "--wait")
    shown = sdwn("status", "S").stdout
    assert shown.count("10 of 10") == 3
    assert "next: sdwn merge S\n" in shown
    found = sdwn.json("merge", "S")
    assert [one["images"] for one in found.values()] == [10] * 3
    assert all(one["ok"] for one in sdwn.json("verify", "S").values())
    seeds = [Release(sweep.root / name / "release").metadata["seed"].to_pylist() for name in THREE]
    assert seeds.count(seeds[0]) == 3, "the same noise in all cells"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A sweep whose cells are evaluated by drawn predictions, but for the last, half made."""
    folder = tmp_path_factory.mktemp("evaluated")
    base = {**BASE, "catalog": NOISE["catalog"], "storage": {"images_per_shard": 100}}
    path = write(folder, base=base, vary=VARY)
    plan_sweep(path, folder / "S", (), console)
    sweep = RunPaths(folder / "S")
    for at, name in enumerate(names(sweep.root)):
        run = RunPaths(sweep.root / name)
        generate(run.root, range(1 + (at < 3)))
        if at < 3:
            release = merge([run], ReleasePaths(run.release))
            chance = (0.2, 0.3, 0.9)[at]
            drawn.evaluation(release, drawn.predictions(release, lambda _, chance=chance: chance))
    return sweep


def test_the_page_holds_every_cell_and_names_those_without_figures(
    sdwn: Sdwn, evaluated: RunPaths
) -> None:
    refused = sdwn("compare", evaluated.root, "--evaluation", "another", code=1).stderr
    assert "no cell is evaluated by another yet; run: sdwn evaluate" in refused
    found = sdwn.json("compare", evaluated.root)
    first, second, best, half = names(evaluated.root)
    assert found["words"].startswith(f"{best} has most images correct: ")
    assert "overlaps with no other). Class by class, which is" in found["words"]
    assert "it is better than each other one" in found["words"]
    assert [row["cell"] for row in found["cells"]] == [best, second, first]
    assert found["lacking"] == {half: "not evaluated by drawn"}
    page = Path(found["path"]).read_text()
    assert f"{half} is not compared: not evaluated by drawn" in page
    assert all(f"{name} compared with {best}" in page for name in (first, second))
    assert page.count('data-chart="generation.guidance_scale"') == 1
    assert (evaluated.comparison / "figures/generation.guidance_scale.svg").exists()
    with (evaluated.comparison / "cells.csv").open(newline="") as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert list(rows) == [best, second, first, half]
    assert rows[half]["lacks"]
    assert float(rows[best]["generation.guidance_scale"]) == 3
    for row in (rows[name] for name in (best, second, first)):
        assert float(row["top1_percent_low"]) < float(row["top1_percent"])


def test_what_cannot_be_told_apart_is_said(sdwn: Sdwn, evaluated: RunPaths) -> None:
    first, second, *_ = names(evaluated.root)
    for seed, name in enumerate((first, second)):
        release = Release(evaluated.root / name / "release")
        chance = drawn.predictions(release, lambda _: 0.5, seed=seed)
        drawn.evaluation(release, chance, "other", model="other")
    said = sdwn("compare", evaluated.root, "--evaluation", "other", "--out", "C").stdout
    best, worse = (first, second) if said.startswith(first) else (second, first)
    assert said.startswith(best)
    assert f"overlaps with that of {worse}). Class by class" in said
    assert f"it is not clearly better than {worse}" in said
    assert "not evaluated by other" in said
    for name in (first, second):
        release = Release(evaluated.root / name / "release")
        missed = drawn.predictions(release, lambda _: 0)
        drawn.evaluation(release, missed, "none", model="none")
    said = sdwn("compare", evaluated.root, "--evaluation", "none", "--out", "C").stdout
    assert said.startswith("all 2 evaluated cells are equal by top-1, %: 0.0\n")


@pytest.mark.slurm
def test_arrays_of_all_cells_run_together_and_a_killed_cell_goes_on(
    sdwn: Sdwn, sweep: RunPaths, cluster: Testbed
) -> None:
    found = sdwn.json("submit", "S", "--profile", "testbed")
    assert [one["shards"] for one in found.values()] == [2] * 3
    queue = set(cluster.run("squeue", "--noheader", "--array", "--format=%F").split())
    assert {one["job_ids"][0].partition("_")[0] for one in found.values()} <= queue
    assert all(one["jobs_live"] for one in sdwn.json("status", "S").values())
    killed = f"S/{THREE[-1]}"
    sdwn("cancel", killed)
    found = sdwn.json("status", "S")
    assert found[THREE[-1]]["jobs_live"] == 0
    done = sdwn.json("submit", "S", "--profile", "testbed", "--wait", "--then", "merge")
    assert set(done) == set(THREE)
    assert all(one["then"] for one in done.values())
    shown = sdwn.json("status", "S")
    assert {one["images_done"] for one in shown.values()} == {10}
    assert {one["then"]["merge"] for one in shown.values()} == {"done"}


@pytest.mark.model
@pytest.mark.long
def test_the_shipped_sweep_ends_with_its_page(sdwn: Sdwn, tmp_path: Path) -> None:
    small = ("--set", "images_per_synset=2", "--set", "generation.num_inference_steps=2")
    found = sdwn.json("run", "demo-sweep", "S", *small)
    assert len(found) == 6
    assert all(one["images"] == 80 for one in found.values())
    assert (tmp_path / "S/comparison/comparison.html").exists()
