"""What was measured, on the pages of reports and comparisons."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from sdwn.generation.task import generate
from sdwn.io import write_text
from sdwn.measures import record
from sdwn.measures.record import Measure, all_records, figure_rows, make_figure, write_record
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.reports.comparison import common_figures, open_sides
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet
from sdwn.workflow.status import next_for_release

from conftest import NOISE, Sdwn
from drawn import draw_features, evaluation, noise_release, predictions

ZEBRA, PANDA = WNIDS = ["n02391049", "n02510455"]
HOSTILE = "<img src=x onerror=alert(1)>"


def measured(release: Release, value: float, reference: Release | None = None) -> None:
    """Lay records of two commands into a release, as if they had found this value."""
    features = draw_features(release, np.eye(len(release)))
    figures = {"vendi": make_figure(value, (value - 1, value + 1), 4)}
    reasons = dict.fromkeys(("coverage", "density"), f"needs {HOSTILE}")
    rows = [{"name": wnid, "figures": figures} for wnid in WNIDS]
    content = {"figures": figures, "absent": reasons, "classes": rows}
    write_record("measures", release, features, None, content)
    if reference is None:
        return
    figures = {"transfer_accuracy": make_figure(10 * value, (10, 90), 4, 8)}
    figures["chance"] = make_figure(50, None, 0, 8)
    curve = [{"name": size, "draws": {"synthetic": 1}, "figures": figures} for size in (1, 2)]
    content = {"figures": figures, "classes": rows, "curve": curve, "train": None}
    content |= {"classes_left_out": {"synthetic": [], "test": ["n1"]}}
    content |= {"settings": {"seed": 0, "rule": "a rule", "strength": {"synthetic": 1.0}}}
    write_record("transfer", release, features, reference, content)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> list[Release]:
    folder = tmp_path_factory.mktemp("measured")
    found = [
        noise_release(folder / f"run{seed}", wordnet, WNIDS, images_per_synset=2, seed=seed)
        for seed in range(3)
    ]
    for release in found:
        evaluation(release, predictions(release))
    return found


def words(page: Path) -> str:
    """Return a page's text, without its tags."""
    text = page.read_text().partition("<main>")[2].partition("</main>")[0]
    return " ".join(re.sub("<[^>]*>", " ", re.sub("(?s)<svg.*?</svg>", "", text)).split())


def test_a_report_has_sections_of_what_was_measured_alone(
    releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, reference = releases[:2]
    write_text(release.paths.evaluation("drawn").report, "")
    assert next_for_release(release.paths.root).startswith("sdwn browse")
    measured(release, 3.5, reference)
    assert next_for_release(release.paths.root).startswith("sdwn report")
    # A measure that is new needs no more than its row.
    monkeypatch.setitem(record.MEASURES, "vendi", Measure("vendi", "new measure", "high", 3))
    page = write_report(release)
    text = words(page)
    assert "new measure 3.500 2.500 to 4.500 4" in text
    assert "Without density, coverage: needs &lt;img src=x" in text
    assert HOSTILE not in page.read_text()
    assert "By features drawn, tested on run1" in text
    assert "accuracy on real images, % 35.0 10.0 to 90.0 4 8" in text
    assert "2 classes, 1 more in the test images" in text
    assert "zebra 3.500" in text
    *_, found = all_records(release).values()
    said = figure_rows(found)
    assert said["accuracy on real images"].endswith(" %; images: 4, tested on 8")
    assert said["accuracy by chance"].endswith(" %; images: 8")
    (curve,) = page.parent.glob("figures/transfer-drawn--run1-*.svg")
    assert "training images a class" in curve.read_text()
    assert curve.with_suffix(".png").exists()


def test_releases_are_compared_by_what_all_have_measured_alike(
    releases: list[Release], sdwn: Sdwn
) -> None:
    first, second, third = releases
    measured(first, 3.5, third)
    measured(second, 4.5, third)
    sides = [f"{name}={one.paths.root}" for name, one in zip("ab", releases, strict=False)]
    found = sdwn.json("compare", *sides, "--out", "C")
    kinds = {one["kind"]: one for one in found["measures"]}
    assert list(kinds) == ["measures", "transfer"]
    assert kinds["transfer"]["reference"] == "run2"
    assert [one["value"] for one in kinds["measures"]["figures"]["vendi"]] == [3.5, 4.5]
    text = words(sdwn.folder / "C/comparison.html")
    assert "Use for training, by features drawn, tested on run2" in text
    assert "Vendi score 3.5 (2.5 to 4.5) 4 images 4.5 (3.5 to 5.5) 4 images" in text
    # Against another test set it is another figure.
    for path in second.paths.evaluations.glob("transfer/*/record.json"):
        path.unlink()
    measured(second, 4.5, first)
    assert [one["kind"] for one in common_figures(open_sides(sides))] == ["measures"]


def test_cells_are_ranked_by_a_measure_that_all_have(
    releases: list[Release], sdwn: Sdwn, tmp_path: Path
) -> None:
    base = {**NOISE, "catalog": {"name": "imagenet-1k", "only": WNIDS}, "images_per_synset": 2}
    sweep = {"base": base, "vary": {"generation.guidance_scale": [1, 2, 3]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    planned = sdwn.json("sweep", "sweep.yaml", "S")["cells"]
    cells = [cell["name"] for cell in planned]
    for value, name in zip((3, 5, 4), cells, strict=True):
        run = RunPaths(tmp_path / "S" / name)
        generate(run.root, range(1))
        release = merge([run], ReleasePaths(run.release), MergeOptions())
        evaluation(release, predictions(release))
        measured(release, value, releases[2])
    found = sdwn.json("compare", "S", "--by", "transfer_accuracy")
    assert [row["cell"] for row in found["cells"]] == [cells[1], cells[2], cells[0]]
    assert [row["transfer_accuracy"] for row in found["cells"]] == [50, 40, 30]
    assert found["words"].startswith(f"{cells[1]} is best by accuracy on real images, %: 50.0 (95")
    assert f"overlaps with that of {cells[2]} and {cells[0]})" in found["words"]
    with (tmp_path / "S/comparison/cells.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["vendi_low"] for row in rows] == ["4", "3", "2"]
    text = words(tmp_path / found["path"])
    assert "accuracy on real images, % by guidance scale" in text
    refused = sdwn("compare", "S", "--by", "coverage", code=2).stderr
    assert (
        "--by coverage: all cells have only top1_percent, top5_percent, own_subtree, vendi"
        in refused
    )
