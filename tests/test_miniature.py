"""The miniature as it comes with the package: whole, small, read where it lies, told of."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from sdwn.config import RunConfig, load_config
from sdwn.generation.sampler import Sampler
from sdwn.jobs.profile import load_profile
from sdwn.models.builtin import SUMS, builtin_folder
from sdwn.models.lock import ensure_lock, locked_weights
from sdwn.models.weights import fingerprint
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, make_plan, write_plan
from sdwn.preflight.doctor import check_run
from sdwn.wordnet.corpus import WordNet, read_catalog
from tools.miniature.table import read_table

from conftest import REPOSITORY, Sdwn

FOLDER = REPOSITORY / "sdwn/miniature"
# Of the demo, to show what becomes of them: drawn and released, not evaluated.
NOT_LEARNT = {"robin.n.01", "tiger.n.01", "library.n.01", "clock.n.01"}


@pytest.fixture(scope="module")
def demo() -> RunConfig:
    return load_config(
        REPOSITORY / "configs/demo.yaml",
        ("generation.num_inference_steps=1", "images_per_synset=1"),
    )


@pytest.fixture(scope="module")
def plan(demo: RunConfig, wordnet: WordNet) -> Plan:
    return make_plan(demo, read_catalog(demo.catalog, wordnet))


def test_its_weights_take_at_most_sixteen_megabytes() -> None:
    sizes = {path.parent.name: path.stat().st_size for path in FOLDER.rglob("*.safetensors")}
    assert sizes.keys() == {"text_encoder", "unet", "vae"}
    assert sum(sizes.values()) <= 16_000_000


def test_it_is_read_where_it_lies(demo: RunConfig, plan: Plan, cache: Path) -> None:
    def found() -> Iterator[tuple[str, int]]:
        for root in (FOLDER, cache / "models"):
            for path in sorted(root.rglob("*")):
                yield str(path), path.stat().st_mtime_ns

    before = list(found())
    sampler = Sampler(demo)
    (sample,) = sampler.sample(list(plan.specs(plan.shards[0]))[:1])
    assert sample.pixels.shape == (64, 64, 3)
    assert builtin_folder("miniature") == FOLDER
    assert list(found()) == before
    assert sampler.provenance["revision"] == fingerprint(FOLDER)


def test_a_run_is_locked_to_its_content(plan: Plan, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_plan(plan, paths)
    lock = ensure_lock(paths, plan)
    assert lock is not None
    assert lock.revision == fingerprint(FOLDER)
    assert {Path(file.file).parent.name for file in lock.files if file.sha256} >= {"unet", "vae"}
    locked = locked_weights(paths, plan.config.model)
    assert locked is not None
    assert (locked.folder, locked.revision) == (FOLDER, lock.revision)
    found = {finding.subject: finding for finding in check_run(paths, plan, load_profile("local"))}
    assert found["weights"].text == "builtin:miniature is built in"
    assert found["settings"].verdict == "ok"


def test_it_has_no_safety_checker_and_says_so_before_a_task_does(
    wordnet: WordNet, tmp_path: Path
) -> None:
    config = load_config(REPOSITORY / "configs/demo.yaml", ("generation.safety_checker=true",))
    plan, paths = make_plan(config, read_catalog(config.catalog, wordnet)), RunPaths(tmp_path)
    write_plan(plan, paths)
    found = {finding.subject: finding for finding in check_run(paths, plan, load_profile("local"))}
    assert "--set generation.safety_checker=false" in found["settings"].text


def test_the_demo_draws_what_it_has_learnt_and_names_what_it_has_not(plan: Plan) -> None:
    learnt = {subject.wnid for subject in read_table()}
    strange = {row.synset for row in plan.concepts if row.wnid not in learnt}
    assert strange == NOT_LEARNT
    assert {row.synset for row in plan.concepts if row.imagenet_class is None} == NOT_LEARNT


@pytest.mark.parametrize("name", ["miniature", "tiny"])
def test_what_came_with_the_package_is_listed_with_its_sums(name: str) -> None:
    folder = REPOSITORY / "sdwn" / name
    listed = [line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()]
    told = {folder / each for each in ("README.md", "NOTICE", SUMS)}
    there = {path for path in folder.rglob("*") if path.is_file()} - told
    assert {folder / each for each in listed} == there
    assert builtin_folder(name) == folder


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def test_its_card_is_finished(card: str) -> None:
    assert "TODO" not in card
    assert f"the {len(read_table())} classes of" in card
    for needed in (
        "Apache-2.0",
        "MIT",
        "Google",
        "Microsoft",
        "python -m tools.miniature",
        "NOTICE",
    ):
        assert needed in card
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for needed in ("Permission is hereby granted", "Google LLC", "WordNet 3.0 Copyright 2006"):
        assert needed in notice


@pytest.mark.model
def test_its_cards_example_draws(card: str) -> None:
    names: dict[str, Any] = {}
    exec(card.split("```python")[1].split("```", maxsplit=1)[0], names)
    assert names["image"].size == (64, 64)
    assert np.asarray(names["image"]).std() > 10


def test_its_card_tells_its_parts(card: str) -> None:
    parts = {
        path.parent.name: sum(tensor.numel() for tensor in load_file(path).values())
        for path in FOLDER.glob("*/*.safetensors")
    }
    rows = re.findall(r"^\| (.+) \| .* \| ([0-9.]+) million \|$", card, re.MULTILINE)
    assert dict(rows) == {
        "text encoder": f"{parts['text_encoder'] / 1e6:.1f}",
        "VAE": f"{parts['vae'] / 1e6:.1f}",
        "UNet": f"{parts['unet'] / 1e6:.1f}",
    }
    megabytes = sum(path.stat().st_size for path in FOLDER.glob("*/*.safetensors")) / 1e6
    assert f"In half precision: {megabytes:.1f} MB" in card
    words = json.loads((FOLDER / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    assert f"a vocabulary of {len(words):,} entries" in card


def test_its_card_tells_the_figures_of_its_table(card: str) -> None:
    with (FOLDER / "recognised.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["wnid"] for row in rows] == [subject.wnid for subject in read_table()]
    card = " ".join(card.split())
    drawn = [int(row["drawn"]) for row in rows]
    pictures = [int(row["training_pictures"]) for row in rows]
    images = sum(int(row["images"]) for row in rows)
    assert images == 10 * len(rows)
    assert f"| images that it draws | {sum(drawn) / images:.1%} |" in card
    assert f"| training pictures | {sum(pictures) / images:.1%} |" in card
    assert f"{drawn.count(10)} classes with all ten, {drawn.count(0)} with none" in card


@pytest.mark.process
def test_it_can_be_piloted_and_tuned_as_a_real_model(sdwn: Sdwn) -> None:
    text = (REPOSITORY / "configs/demo.yaml").read_text(encoding="utf-8")
    quick = sdwn.folder / "quick.yaml"
    small = re.sub(r"num_inference_steps: \d+", "num_inference_steps: 1", text)
    quick.write_text(re.sub(r"(height|width): 64", r"\1: 32", small))
    sdwn("plan", quick, "run", "--set", "catalog.only=[zebra.n.01, teapot.n.01]")
    found = sdwn.json("pilot", "run")
    assert (found["images"], found["nan"]) == (20, 0)
    (profile,) = sdwn.json("tune", quick)["profiles"]
    assert profile["workload"]["model"] == "builtin:miniature"
    assert profile["tuning"]["images_per_second"] > 0
    Path(profile["path"]).unlink()
