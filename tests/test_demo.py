"""The main job on real parts: WordNet, array tasks, diffusers, HDF5, a real ImageNet classifier."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sdwn.evaluation.record import read_evaluation
from sdwn.paths import ReleasePaths
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet

import drawn
from conftest import FEW, PlanRun, Sdwn

pytestmark = pytest.mark.model

SMALL = (
    *("--set", "images_per_synset=2", "--set", "generation.batch_size=20"),
    *("--set", "generation.num_inference_steps=2"),
    *("--set", "generation.height=32", "--set", "generation.width=32"),
)
KEYS = {
    *("images", "synsets", "bytes", "classes", "top1_percent", "top5_percent", "mean_correct"),
    *("std_correct", "any_correct", "all_correct", "path", "report", "release"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sdwn, dict[str, Any]]:
    sdwn = Sdwn(tmp_path_factory.mktemp("demo"))
    return sdwn, sdwn.json("run", "demo", "run", *SMALL)


@pytest.mark.process
def test_the_demo_ends_with_a_verified_release(demo: tuple[Sdwn, dict[str, Any]]) -> None:
    sdwn, found = demo
    assert found.keys() >= KEYS
    assert (found["synsets"], found["images"]) == (40, 80)
    assert (found["classes"], found["evaluated_images"]) == (36, 72)
    assert sdwn.json("verify", found["release"])["ok"]
    assert found["statuses"] == {"ok": 80}
    merged = sdwn.json("merge", "run", "--evaluate")
    assert merged == {name: value for name, value in found.items() if name != "report"}


def test_what_the_safety_checker_flags_is_counted(generated: PlanRun) -> None:
    """By the pipeline of random weights, for the miniature has no checker."""
    paths, plan = generated(
        catalog=FEW,
        images_per_synset=4,
        model={"name": "builtin:tiny"},
        generation={"height": 16, "width": 16, "num_inference_steps": 1, "safety_checker": True},
    )
    release = merge([paths], ReleasePaths(paths.release))
    flagged = [i for i, row in enumerate(release.metadata.to_pylist()) if row["status"] == "nsfw"]
    assert 0 < len(flagged) == release.manifest.statuses["nsfw"] < plan.images / 2
    assert not any(release.array(index).any() for index in flagged)


@pytest.mark.process
def test_again_does_only_what_is_missing(demo: tuple[Sdwn, dict[str, Any]]) -> None:
    sdwn, found = demo
    root = sdwn.folder / "run"
    evaluation = (sdwn.folder / found["path"]).parent
    # Of predictions everything else follows, in a second or two.
    anew = {*evaluation.rglob("*")} - {evaluation / "predictions.parquet"}
    kept = [path for path in root.rglob("*") if path.is_file() and path not in anew]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert sdwn.json("run", "demo", "run", *SMALL) == found
    assert before == {path: path.stat().st_mtime_ns for path in kept}


def test_predictions_are_kept_an_image_a_row(demo: tuple[Sdwn, dict[str, Any]]) -> None:
    sdwn, found = demo
    table = pq.read_table((sdwn.folder / found["path"]).with_name("predictions.parquet"))
    assert table.num_rows == found["evaluated_images"]
    for row in table.to_pylist():
        assert len(row["top5"]) == len(row["top5_probability"]) == 5
        assert (row["label_rank"] < 5) == (row["imagenet_class"] in row["top5"])
    top5 = sum(row["label_rank"] < 5 for row in table.to_pylist())
    assert found["top5_percent"] == pytest.approx(100 * top5 / table.num_rows)


def test_figures_stand_beside_the_papers_only_for_the_papers_catalog(
    demo: tuple[Sdwn, dict[str, Any]],
) -> None:
    sdwn, found = demo
    evaluation = json.loads((sdwn.folder / found["path"]).read_text())
    assert "paper" not in evaluation, "40 synsets are not the paper's catalog"
    assert evaluation["figures"]["histogram"] is not None
    assert evaluation["classifier"]["checkpoint_sha256"]


def test_the_papers_catalog_gets_the_papers_figures_and_the_note(
    demo: tuple[Sdwn, dict[str, Any]], tmp_path: Path
) -> None:
    sdwn, found = demo
    root = shutil.copytree(sdwn.folder / found["release"], tmp_path / "release")
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "catalog": "sdwn-26204"}))
    release, table = Release(root), (sdwn.folder / found["path"]).with_name("predictions.parquet")
    paths = drawn.evaluation(release, pq.read_table(table))
    assert read_evaluation(release, paths)["paper"]["mean_correct"] == 4.16
    shown = write_report(release, "drawn").read_text()
    for text in ("4.16", "3.74", "73.0", "14.0", "861", "862", "n02113186", "arXiv:2211.01777"):
        assert text in shown


class Page(HTMLParser):
    """All references of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.text = ""
        self.pictures = 0
        self.read = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.read = tag not in ("script", "style")
        self.pictures += tag == "figure" and dict(attrs)["class"] in ("picture", "picture right")
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data if self.read else ""


def test_the_report_is_one_file_that_says_what_it_shows(
    demo: tuple[Sdwn, dict[str, Any]],
) -> None:
    sdwn, found = demo
    page = Page()
    page.feed((sdwn.folder / found["report"]).read_text())
    assert not [r for r in page.references if not r.startswith(("data:", "#"))]
    text = " ".join(page.text.split())
    assert "trained on drawings of a few dozen classes to show how sdwn works" in text
    assert "says nothing about Stable Diffusion" in text
    assert "80 synthetic images, 72 of them classified by efficientnet-lite0" in text
    assert re.search(rf"top-5 {found['top5_percent']:.2f} %", text), "as the command prints it"
    assert page.pictures == 24 * 2
    assert "builtin:miniature" in text
    assert "king penguin" in text


@pytest.mark.process
def test_a_release_without_imagenet_classes_is_refused(sdwn: Sdwn, tmp_path: Path) -> None:
    small = ("--set", "catalog.only=[robin.n.01]", "--set", "model.name=builtin:noise")
    sdwn("plan", "demo", "run", *small)
    sdwn("submit", "run", "--wait")
    sdwn("merge", "run", "--release", "out")
    refused = sdwn("evaluate", "out", "--model", "efficientnet-lite0", code=1)
    assert "none of its synsets is an ImageNet-1k class" in refused.stderr
    assert "with --all" in refused.stderr
    assert "not evaluated yet; run: sdwn evaluate" in sdwn("report", "out", code=1).stderr
    found = sdwn.json("evaluate", "out", "--model", "efficientnet-lite0", "--all")
    assert (found["images"], found["classes"], found["top1_percent"]) == (0, 0, None)
    record = json.loads((sdwn.folder / found["path"]).read_text())
    assert record["images_classified"] == 10
    assert record["wordnet"]["nearest"]["images"] == 10, "by what lies near"


def test_an_evaluation_of_another_release_is_not_reported(
    sdwn: Sdwn, demo: tuple[Sdwn, dict[str, Any]]
) -> None:
    first, found = demo
    release = first.folder / found["release"]
    manifest = release / "manifest.json"
    whole = manifest.read_text()
    try:
        manifest.write_text(whole + "\n")
        refused = sdwn("report", release, code=1)
    finally:
        manifest.write_text(whole)
    assert "of another release" in refused.stderr


def test_a_damaged_image_leaves_the_report_whole(wordnet: WordNet, tmp_path: Path) -> None:
    release = drawn.noise_release(tmp_path / "run", wordnet, ["n02093991", "n02096177"])
    drawn.evaluation(release, drawn.predictions(release))
    row = release.row(3)
    with (release.paths.root / row["part"]).open("r+b") as part:
        part.seek(row["offset"])
        part.write(bytes(row["bytes"]))
    page = write_report(release).read_text(encoding="utf-8")
    assert f'alt="{row["synset"]}, image {row["number"]}"' in page
