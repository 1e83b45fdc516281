"""Predictions of the paper's catalog become an evaluation: record, tables, and reading both."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sdwn.cli.results import evaluation_rows
from sdwn.config import PAPER_CATALOG, EvaluationConfig
from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.record import CSV_COLUMNS, build_record, main_figures, read_evaluation
from sdwn.io import file_sha256, write_text
from sdwn.paths import EvaluationPaths, ReleasePaths
from sdwn.planning.plan import make_plan
from sdwn.planning.tables import write_concepts
from sdwn.releases.release import Manifest, Release
from sdwn.wordnet.corpus import Synset, WordNet, class_index

from conftest import noise_config

CLASSIFIER = {"model": "drawn by lot", "classes": 1000}
NUMBERS = range(10)
GREENHOUSE, FERRET = "n03457902", "n02443484"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, paper: tuple[Synset, ...]) -> Release:
    """What a release of the paper's catalog says of itself; figures need no image."""
    paths = ReleasePaths(tmp_path_factory.mktemp("release"))
    plan = make_plan(noise_config(), paper)
    write_concepts(paths.concepts(0), plan.table)
    nothing: dict[str, Any] = dict.fromkeys(("selection", "truncated", "retried_fp32", "missing"))
    manifest = Manifest(
        **nothing,
        sdwn="0",
        created="2026-01-01T00:00:00+00:00",
        origin="run",
        catalog=PAPER_CATALOG,
        plans=[],
        images=262_040,
        concepts=26_204,
        imagenet_classes=862,
        statuses={"ok": 262_040},
        skipped=0,
        bytes=0,
        made_on=[],
        files=[],
    )
    write_text(paths.manifest, manifest.model_dump_json())
    return Release(paths.root)


def drawn(wnids: list[str], seed: int = 0) -> pa.Table:
    """Draw predictions of ten images a synset: 40 % right, the rest any class."""
    random, index = np.random.default_rng(seed), class_index()
    rows = [(wnid, number) for wnid in wnids for number in NUMBERS]
    label = np.array([index.get(wnid, -1) for wnid, _ in rows])
    best = random.integers(1000, size=len(rows))
    right = (label >= 0) & (random.random(len(rows)) < 0.4)
    best[right] = label[right]
    for wnid, value in ((GREENHOUSE, label), (FERRET, (label + 1) % 1000)):
        own = [row == wnid for row, _ in rows]
        best[own] = value[own]
    rank = np.where(best == label, 0, random.integers(1, 1000, len(rows)))
    top5 = np.stack([best, *((best + step) % 1000 for step in (1, 2, 3, 4))], axis=1)
    return pa.table(
        {
            "wnid": [wnid for wnid, _ in rows],
            "number": pa.array([number for _, number in rows], pa.uint32()),
            "status": random.choice(["ok", "nsfw"], len(rows), p=[0.95, 0.05]).tolist(),
            "imagenet_class": pa.array(label, pa.int16(), mask=label < 0),
            "top5": pa.array(top5.tolist(), pa.list_(pa.int16())),
            "label_rank": pa.array(rank, pa.int16(), mask=label < 0),
            "subtree_probability": pa.array(random.random(len(rows)), pa.float32()),
        }
    )


Concluded = Callable[..., tuple[EvaluationPaths, dict[str, Any]]]


@pytest.fixture(scope="module")
def concluded(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Concluded:
    """Write predictions and conclude: the paths and the record as it is read back."""

    def write(predictions: pa.Table, **chosen: Any) -> tuple[EvaluationPaths, dict[str, Any]]:
        paths = EvaluationPaths(tmp_path_factory.mktemp("evaluation"))
        pq.write_table(predictions, paths.predictions)
        build_record(release, paths, predictions, CLASSIFIER, EvaluationConfig(**chosen))
        return paths, read_evaluation(release, paths)

    return write


@pytest.fixture(scope="module")
def classes(release: Release) -> list[str]:
    return [wnid for wnid in release.concepts if wnid in class_index()]


@pytest.fixture(scope="module")
def whole(concluded: Concluded, classes: list[str]) -> tuple[EvaluationPaths, dict[str, Any]]:
    return concluded(drawn(classes))


@pytest.fixture(scope="module")
def small(concluded: Concluded, classes: list[str]) -> tuple[EvaluationPaths, dict[str, Any]]:
    """Each twentieth class: some dogs among them, and things."""
    return concluded(drawn(classes[::20]))


def rows(paths: EvaluationPaths, name: str) -> list[dict[str, str]]:
    with paths.table(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_papers_catalog_has_862_classes_in_groups(
    whole: tuple[EvaluationPaths, dict[str, Any]],
) -> None:
    _, record = whole
    figures = record["figures"]
    assert (figures["classes"], figures["images"], record["images_classified"]) == (862, 8620, 8620)
    assert (record["selection"], record["classifier"]) == ("imagenet", CLASSIFIER)
    assert sum(figures["histogram"]) == 862
    assert figures["none_correct"] == pytest.approx(figures["histogram"][0] / 862)
    assert sum(figures["statuses"].values()) == 8620
    assert figures["statuses"]["nsfw"] == figures["black_images"]
    assert figures["without_black"]["images"] == figures["statuses"]["ok"]
    groups = {row["name"]: row for row in record["groups"]}
    assert (groups["animals"]["classes"], groups["dogs"]["images"]) == (371, 1160)
    animals = [row for row in record["classes"] if row["synset"] == "leafhopper.n.01"]
    assert animals[0]["group"] == "insects"
    low, high = groups["animals"]["intervals"]["mean_correct"]
    assert low < groups["animals"]["mean_correct"] < high


def test_what_the_paper_says_stands_beside_what_was_found(
    whole: tuple[EvaluationPaths, dict[str, Any]],
) -> None:
    _, record = whole
    paper = record["paper"]
    assert (paper["mean_correct"], paper["none_correct"], paper["classes"]) == (4.16, 0.27, 861)
    assert "arXiv" in paper["source"]
    assert "Cardigan" in paper["note"]
    (animals,) = paper["groups"]
    found = {row["name"]: row for row in record["groups"]}["animals"]
    assert (animals["synset"], animals["none_correct_classes"]) == ("animal.n.01", 162)
    assert animals["ours"] == found["none_correct_classes"] > 0
    named = {row["synset"]: (row["correct"], row["ours"]) for row in paper["named_classes"]}
    assert named["greenhouse.n.01"] == (10, 10)
    assert named["black-footed_ferret.n.01"] == (0, 0)


def test_each_table_says_what_the_record_says(
    whole: tuple[EvaluationPaths, dict[str, Any]],
) -> None:
    paths, record = whole
    figures = {row["figure"]: row for row in rows(paths, "figures")}
    for name in ("mean_correct", "none_correct"):
        row, low_high = figures[f"figures.{name}"], record["figures"]["intervals"][name]
        assert float(row["value"]) == record["figures"][name]
        assert [float(row["low"]), float(row["high"])] == low_high
        assert float(row["without_black"]) == record["figures"]["without_black"][name]
        assert float(row["paper"]) == record["paper"][name]
    own = record["wordnet"]["own"]
    assert float(figures["wordnet.own.subtree_probability"]["value"]) == own["subtree_probability"]
    counts = [int(row["classes"]) for row in rows(paths, "histogram")]
    assert counts == record["figures"]["histogram"]
    table = rows(paths, "classes")
    assert [row["wnid"] for row in table] == [row["wnid"] for row in record["classes"]]
    assert [int(row["correct"]) for row in table] == [row["correct"] for row in record["classes"]]
    assert "Cardigan, Cardigan_Welsh_corgi" in {row["lemmas"] for row in table}
    groups = rows(paths, "groups")
    assert [row["name"] for row in groups] == [row["name"] for row in record["groups"]]
    assert (
        float(groups[0]["mean_correct_low"]) == record["groups"][0]["intervals"]["mean_correct"][0]
    )


def test_the_most_frequent_confusions_are_in_the_record_and_all_in_the_table(
    whole: tuple[EvaluationPaths, dict[str, Any]],
) -> None:
    paths, record = whole
    shown, table = record["confusions"], rows(paths, "confusions")
    # All ten ferrets are taken for the class behind them.
    assert (shown[0]["synset"], shown[0]["times"]) == ("black-footed_ferret.n.01", 10)
    assert shown[0]["predicted_synset"] == "otter.n.02"
    assert len(shown) == 100
    assert [int(row["times"]) for row in table[:100]] == [row["times"] for row in shown]
    wrong = 8620 - sum(row["correct"] for row in record["classes"])
    assert sum(int(row["times"]) for row in table) == wrong


def test_figures_of_the_same_predictions_are_the_same(
    small: tuple[EvaluationPaths, dict[str, Any]], concluded: Concluded
) -> None:
    paths, record = small
    again, other = concluded(pq.read_table(paths.predictions))
    assert other["predictions_sha256"] == file_sha256(again.predictions)
    for own in ("created", "predictions_sha256", "digest"):
        other[own] = record[own]
    assert other == record
    for name in ("figures", "classes", "groups", "confusions", "synsets", "histogram"):
        assert again.table(name).read_bytes() == paths.table(name).read_bytes()


def test_other_groups_change_only_what_tells_of_groups(
    small: tuple[EvaluationPaths, dict[str, Any]], concluded: Concluded, tmp_path: Path
) -> None:
    paths, record = small
    mine = tmp_path / "mine.yaml"
    mine.write_text('"dogs, all": dog.n.01\nfood: food.n.01\n')
    other_paths, other = concluded(pq.read_table(paths.predictions), groups=str(mine))
    assert other["figures"] == record["figures"]
    assert {row["group"] for row in other["classes"]} == {"dogs, all", None}
    # None of the paper's classes is a dish: said as such, not left out.
    assert (other["groups"][1]["classes"], other["groups"][1]["mean_correct"]) == (0, None)
    table = rows(other_paths, "groups")
    assert [row["name"] for row in table] == ["dogs, all", "food"]
    assert table[1]["mean_correct"] == table[1]["mean_correct_low"] == ""


def test_synsets_that_are_no_classes_are_scored_and_not_counted(
    concluded: Concluded, wordnet: WordNet, classes: list[str]
) -> None:
    names = ("dog.n.01", "robin.n.01", "library.n.01")
    others = [wordnet.synset(name).wnid for name in names]
    paths, record = concluded(drawn([*classes[:20], *others]))
    figures = record["figures"]
    assert (record["selection"], record["images_classified"]) == ("all", 230)
    assert (figures["classes"], figures["images"], len(record["classes"])) == (20, 200, 20)
    own, nearest = record["wordnet"]["own"], record["wordnet"]["nearest"]
    # Dogs are a subtree with classes in it; robins and libraries have only a hypernym's.
    assert (own["synsets"], nearest["synsets"], nearest["images"]) == (21, 2, 20)
    table = {row["synset"]: row for row in rows(paths, "synsets")}
    assert len(table) == 23
    robin = table["robin.n.01"]
    assert (robin["scope_synset"], robin["scope_steps"]) == ("thrush.n.03", "1")
    assert (table["dog.n.01"]["scope_classes"], table["dog.n.01"]["chance"]) == ("118", "0.118")


def test_images_of_concepts_that_are_no_synsets_are_counted_and_not_scored(
    concluded: Concluded, classes: list[str]
) -> None:
    known, others = drawn(classes[:5]), drawn(["n00000001", "n00000002"], seed=1)
    wnid = pa.nulls(len(others), pa.string())
    others = others.set_column(0, "wnid", wnid)
    paths, record = concluded(pa.concat_tables([known, others]))
    _, expected = concluded(known)
    for name in ("figures", "groups", "classes", "confusions", "wordnet", "map"):
        assert record[name] == expected[name]
    assert (record["images_classified"], record["images_without_wnid"]) == (70, 20)
    assert (record["selection"], len(rows(paths, "synsets"))) == ("all", 5)


def test_an_evaluation_without_a_mistake_or_of_black_images_alone_has_all_files(
    concluded: Concluded, classes: list[str]
) -> None:
    black = pa.array(["nsfw"] * 10)
    predictions = drawn([GREENHOUSE]).drop_columns("status").append_column("status", black)
    paths, record = concluded(predictions)
    assert (record["confusions"], record["wordnet"]["nearest"]) == ([], None)
    assert record["figures"]["without_black"] is None
    assert set(record["figures"]["intervals"].values()) == {None}
    assert record["classes"][0]["miss_distance"] is None
    assert (
        paths.table("confusions").read_text() == CSV_COLUMNS["confusions"].replace(" ", ",") + "\n"
    )


def test_without_a_class_only_what_lies_near_is_scored(
    concluded: Concluded, release: Release, wordnet: WordNet
) -> None:
    paths, record = concluded(drawn([wordnet.synset("library.n.01").wnid]))
    figures = record["figures"]
    assert (figures["classes"], figures["top1_percent"], figures["histogram"]) == (0, None, [])
    assert (record["classes"], record["confusions"]) == ([], [])
    assert {group["classes"] for group in record["groups"]} == {0}
    assert sum(row["images"] for row in record["wordnet"].values() if row) == 10
    assert read_evaluation(release, paths) == record


def test_a_wrong_groups_file_leaves_the_evaluation_as_it_was(
    small: tuple[EvaluationPaths, dict[str, Any]], release: Release, tmp_path: Path
) -> None:
    paths, record = small
    mine = tmp_path / "mine.yaml"
    mine.write_text("dogs: dgo.n.01")
    predictions = pq.read_table(paths.predictions)
    with pytest.raises(UsageError, match=r"mine\.yaml: dogs: dgo\.n\.01: no such synset"):
        build_record(release, paths, predictions, CLASSIFIER, EvaluationConfig(groups=str(mine)))
    assert read_evaluation(release, paths) == record


def test_the_summary_gives_the_main_figures(
    small: tuple[EvaluationPaths, dict[str, Any]],
) -> None:
    paths, record = small
    found = main_figures(paths, record)
    figures = record["figures"]
    assert found["none_correct"] == figures["none_correct"]
    text = str(evaluation_rows(found))
    assert f"{figures['mean_correct']:.2f} of 10" in text
    assert f"{100 * figures['none_correct']:.1f} %" in text
    assert (found["evaluation"], found["path"]) == (paths.root.name, str(paths.evaluation))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 4}, "found sdwn-evaluation 4; evaluate the release again"),
        ({"groups": None}, "altered since it was written; evaluate the release again"),
    ],
)
def test_a_record_that_cannot_be_read_is_told_in_one_line(
    small: tuple[EvaluationPaths, dict[str, Any]],
    release: Release,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    _, record = small
    paths = EvaluationPaths(tmp_path)
    write_text(paths.evaluation, json.dumps({**record, **changes}))
    with pytest.raises(IntegrityError, match=message) as error:
        read_evaluation(release, paths)
    assert "\n" not in str(error.value)
    assert str(paths.evaluation) in str(error.value)


def test_another_catalog_is_not_compared_with_the_paper(release: Release, tmp_path: Path) -> None:
    other = Release(shutil.copytree(release.paths.root, tmp_path / "other"))
    other.manifest = other.manifest.model_copy(update={"selection": "1% of the synsets"})
    paths = EvaluationPaths(tmp_path / "evaluation")
    predictions = drawn([GREENHOUSE, FERRET])
    paths.root.mkdir()
    pq.write_table(predictions, paths.predictions)
    assert "paper" not in build_record(other, paths, predictions, CLASSIFIER, EvaluationConfig())
    assert {row["paper"] for row in rows(paths, "figures")} == {""}
