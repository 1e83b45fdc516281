"""Releases and models side by side."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sdwn.errors import IntegrityError, UsageError
from sdwn.io import content_digest
from sdwn.paths import ComparisonPaths, ReleasePaths
from sdwn.releases.release import Release
from sdwn.reports.comparison import (
    compare_evaluations,
    open_sides,
    pair_in_words,
    write_comparison,
)
from sdwn.reports.figures import class_rates_figure, histogram_figure
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet

import drawn
from conftest import Sdwn
from opened import NARROW, opened

HOSTILE = "</script><script>alert(1)</script><b>$x$"
IRISH, CAIRN, PEMBROKE = "n02093991", "n02096177", "n02113023"


def better(wnid: str) -> float:
    return 0.2 if wnid == PEMBROKE else 0.95


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Path:
    """Releases of one catalog and of a part of it, evaluated by predictions that are drawn."""
    folder = tmp_path_factory.mktemp("compared")
    catalog = {"roots": ["corgi.n.01", "terrier.n.01"]}
    made = {
        "plain": ({}, lambda wnid: 0.5, True),
        "guided": ({"generation": {"guidance_scale": 3.0}}, better, True),
        "other": ({"seed": 1}, lambda wnid: float(wnid == IRISH), False),
        "corgis": ({"catalog": {"roots": ["corgi.n.01"]}}, lambda wnid: 0.0, False),
        "spaniels": ({"catalog": {"roots": ["spaniel.n.01"]}}, lambda wnid: 0.5, False),
    }
    for name, (changes, rate, every) in made.items():
        config = {"images_per_synset": 5, "catalog": catalog, **changes}
        run = drawn.noise_release(folder / f"{name}-run", wordnet, (), **config)
        release = Release(shutil.move(run.paths.root, folder / name))
        drawn.evaluation(release, drawn.predictions(release, rate, every=every))
    other, large = Release(folder / "other"), {"name": "large", "model": "large"}
    drawn.evaluation(other, drawn.predictions(other, lambda _: 0.9, seed=1), **large)
    return folder


def compared(folder: Path, *arguments: str) -> dict[str, Any]:
    sides = open_sides([str(folder / argument) for argument in arguments], "drawn")
    return dict(json.loads(json.dumps(compare_evaluations(sides))))


def test_what_helps_is_told_with_its_certainty(folder: Path) -> None:
    found = compared(folder, "plain", "guided")
    assert [side["name"] for side in found["sides"]] == ["plain", "guided"]
    assert found["settings"] == [{"setting": "generation.guidance_scale", "values": [7.5, 3.0]}]
    (pair,) = found["pairs"]
    rates = [side["figures"]["mean_correct"] / 5 for side in found["sides"]]
    assert pair["rate"]["mean"] == pytest.approx(rates[1] - rates[0])
    assert pair["rate"]["mean"] > 0.2
    assert pair["rate"]["p_value"] < 0.01
    low, high = pair["rate"]["interval"]
    assert 0 < low < pair["rate"]["mean"] < high
    assert pair["rate"]["pairs"] == found["classes_in_common"] == 28
    # Also the eleven synsets that are no ImageNet class are paired.
    assert pair["subtree_probability"]["pairs"] == 39
    assert pair["same_images"] is None


def test_groups_and_classes_are_paired_each_by_itself(folder: Path) -> None:
    found = compared(folder, "guided", "other")
    rows = {row["wnid"]: row for row in found["classes"]}
    assert rows[IRISH]["correct"][1] == 5
    assert rows[CAIRN]["correct"][1] == 0
    assert rows[CAIRN]["adjusted_p_values"][0] < 0.1 < rows[IRISH]["adjusted_p_values"][0]
    assert rows[PEMBROKE]["group"] == "dogs"
    groups = {row["name"]: row for row in found["pairs"][0]["groups"]}
    assert groups["dogs"]["classes"] == 28
    assert groups["dogs"]["worse"] >= 26
    assert groups["dogs"]["mean"] == pytest.approx(found["pairs"][0]["rate"]["mean"])
    assert groups["birds"]["classes"] == 0
    assert groups["birds"]["adjusted_p_value"] is None


def test_two_models_are_paired_image_by_image(folder: Path) -> None:
    found = compared(folder, "other/evaluations/drawn", "other/evaluations/large")
    assert [side["name"] for side in found["sides"]] == ["other by drawn", "other by large"]
    same = found["pairs"][0]["same_images"]
    assert same["only_second"] > same["only_first"]
    assert same["p_value"] < 0.001


def test_only_classes_in_common_count(folder: Path) -> None:
    found = compared(folder, "other", "corgis")
    assert found["classes_in_common"] == 2
    assert [side["classes_left_out"] for side in found["sides"]] == [26, 0]
    assert [side["figures"]["images"] for side in found["sides"]] == [10, 10]
    assert found["pairs"][0]["rate"]["mean"] == 0
    # Both classes are at one place; the figure has its whole scale all the same.
    (axes,) = class_rates_figure(found, 0).axes
    assert axes.get_xlim() == axes.get_ylim() == (-7, 107)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain", "other/evaluations/large"], "by drawn and .* by large: expected other images"),
        (["plain"], "nothing to compare"),
        (["plain", "plain"], "or the same images by others"),
        (["plain", "spaniels"], "no class in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    folder: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compared(folder, *arguments)


def test_releases_without_a_common_evaluation_say_so(folder: Path, tmp_path: Path) -> None:
    other = ReleasePaths(Path(shutil.copytree(folder / "spaniels", tmp_path / "spaniels")))
    shutil.move(other.evaluation("drawn").root, other.evaluation("vit").root)
    with pytest.raises(UsageError, match=r"no evaluation that all of them have \(.*: drawn; .*vit"):
        open_sides([str(folder / "plain"), str(other.root)])
    with pytest.raises(UsageError, match="no evaluation 'large'; there is drawn"):
        open_sides(2 * [str(folder / "plain")], "large")


def test_an_evaluation_that_is_not_this_releases_or_is_forged_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(folder / "plain", tmp_path / "plain")
    ours = ReleasePaths(root).evaluation("drawn")
    theirs = ReleasePaths(folder / "guided").evaluation("drawn")
    whole = json.loads(ours.evaluation.read_text())
    for lacking, use in {
        "classes": lambda: compare_evaluations(open_sides([str(root), str(folder / "guided")])),
        "wordnet": lambda: write_report(Release(root)),
    }.items():
        record = {name: value for name, value in whole.items() if name != lacking}
        forged = {**record, "digest": content_digest(record)}
        ours.evaluation.write_text(json.dumps(forged))
        with pytest.raises(IntegrityError, match=rf"evaluation\.json .*damaged: .*'{lacking}'"):
            use()
    shutil.copy(theirs.predictions, ours.predictions)
    with pytest.raises(IntegrityError, match="its SHA-256 is not the recorded one"):
        open_sides([str(root), str(root)])
    shutil.copy(theirs.evaluation, ours.evaluation)
    with pytest.raises(IntegrityError, match="of another release; evaluate the release again"):
        open_sides([str(root), str(root)])


def test_the_command_writes_page_tables_and_figures(
    sdwn: Sdwn, folder: Path, tmp_path: Path
) -> None:
    plain, guided, out = folder / "plain", folder / "guided", tmp_path / "out"
    found = sdwn.json("compare", plain, f"short={guided}", "--out", "out")
    assert found["pairs"][0]["verdict"].startswith("short is better than plain: on average ")
    assert found["settings"] == [{"setting": "generation.guidance_scale", "values": [7.5, 3.0]}]
    assert json.loads((out / "comparison.json").read_text())["classes_in_common"] == 28
    with (out / "classes.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 28
    assert rows[0]["images plain"] == "5"
    with (out / "groups.csv").open() as lines:
        dogs = next(row for row in csv.DictReader(lines) if row["name"] == "dogs")
    assert float(dogs["mean"]) == pytest.approx(found["pairs"][0]["rate"]["mean"])
    for name in ("histogram", "groups", "classes-0"):
        assert Image.open(out / f"figures/{name}.png").width > 500
        assert (out / f"figures/{name}.svg").read_text().startswith("<?xml")
    page = (out / "comparison.html").read_text()
    assert "<h1>short is better than plain</h1>" in page
    assert ">guidance scale</th>" in page
    assert 'id="measures"' not in page
    refused = sdwn("compare", plain, guided, "--out", plain / "compared", code=2)
    assert "it lies in" in refused.stderr
    assert "give two releases" in sdwn("compare", plain, code=2).stderr
    assert "--out is needed" in sdwn("compare", plain, guided, code=2).stderr
    (tmp_path / "file").touch()
    refused = sdwn("compare", plain, guided, "--out", "file", code=1)
    assert refused.stderr.endswith("error: file: expected a folder, found a file\n")


@pytest.mark.browser
def test_the_page_opens_without_an_error_or_a_request(
    folder: Path, tmp_path: Path, browser: Any
) -> None:
    sides = open_sides([str(folder / "plain"), f"{HOSTILE}={folder / 'guided'}"])
    paths = ComparisonPaths(tmp_path / "out")
    write_comparison(compare_evaluations(sides), sides, paths)

    # A script that is not the page's own would be complained of.
    found = opened(browser, paths.page, "[data-chart=classes-0] svg")
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith("data:")] == [paths.page.as_uri()]
    assert HOSTILE in found.page.locator("h1").inner_text()
    assert "dogs" in found.page.locator("[data-chart=groups] text").all_text_contents()
    column = "#class-table tbody tr td:nth-child(5)"
    numbers = [float(change) for change in found.page.locator(column).all_inner_texts()]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 1
    for _ in range(2):
        found.page.locator("#class-table thead button").filter(has_text="change").click()
    changes = found.page.locator(column).all_inner_texts()
    assert [float(change) for change in changes] == numbers[::-1]
    found.page.locator("[data-filter=class-table]").fill("pembroke")
    assert found.page.locator("#class-table tbody tr:visible").count() == 1

    narrow = opened(browser, paths.page, "[data-chart=classes-0] svg", viewport=NARROW)
    assert narrow.overflow == 0


@pytest.mark.parametrize(
    ("mean", "p_value", "headline", "certainty"),
    [
        (0.1, 0.0002, "b is better than a", "not by chance"),
        (-0.1, 0.04, "b is worse than a", "not by chance"),
        (0.1, 0.2, "b and a do not clearly differ", "maybe by chance"),
    ],
)
def test_a_result_in_words_is_as_certain_as_its_p(
    mean: float, p_value: float, headline: str, certainty: str
) -> None:
    rate = {"mean": mean, "interval": (mean - 0.05, mean + 0.05), "p_value": p_value}
    pair = {"first": "a", "second": "b", "rate": rate, "rates": (0.4, 0.4 + mean)}
    found, detail = pair_in_words(pair)
    assert found == headline
    assert f"{40 + 100 * mean:.1f} % of a class's images are correct instead of 40.0 %" in detail
    assert f"{100 * mean:+.1f} percentage points; {certainty}" in detail


def test_names_are_the_folders_or_the_users_own(folder: Path) -> None:
    root = str(folder / "plain")
    names = [side.name for side in open_sides([root, f"short={root}", root])]
    assert names == ["plain", "short", "plain (3)"]


def test_a_name_that_begins_with_an_underscore_stands_in_the_legend() -> None:
    (legend,) = histogram_figure({"_plain": [1, 2], "guided": [2, 1]}).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_plain", "guided"]


def test_probability_over_other_lists_of_classes_is_not_compared(
    folder: Path, tmp_path: Path
) -> None:
    evaluations = folder / "other/evaluations"
    sides = open_sides([str(evaluations / "drawn"), str(evaluations / "large")])
    sides[1].record["classifier"]["classes"] = 21841
    found = compare_evaluations(sides)
    assert found["pairs"][0]["subtree_probability"] is None
    write_comparison(found, sides, ComparisonPaths(tmp_path / "out"))
    page = ComparisonPaths(tmp_path / "out").page.read_text()
    assert "the classifiers know other lists of classes" in page
