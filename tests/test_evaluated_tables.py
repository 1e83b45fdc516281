"""Tables of prompts, evaluated: rows of one class, of none, and of no class that is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import timm
import torch
from safetensors.torch import save_file
from sdwn.browser.library import Library
from sdwn.config import EvaluationConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.evaluation.record import evaluations, read_evaluation
from sdwn.evaluation.verify import verify
from sdwn.generation.task import generate
from sdwn.paths import ComparisonPaths, ReleasePaths, RunPaths
from sdwn.planning.plan import make_plan, write_plan
from sdwn.prediction.plan import open_prediction_plan
from sdwn.prediction.pretrained import own_classes
from sdwn.prediction.table import Predictions
from sdwn.releases.dataset import ReleaseDataset
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.reports.comparison import compare_evaluations, open_sides, write_comparison
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet
from timm.models import save_for_hf

import drawn
from conftest import Sdwn, noise_config
from served import served

ZEBRA, GREENHOUSE = "n02391049", "n03457902"
CAPTIONS = """id,prompt,label
in the grass,a zebra in high grass,zebra
at night,two zebras at night,Zebra
glass,a greenhouse by a lake,greenhouse
mine,my red bike,red bike
blank,something blurred,
"""


def made(folder: Path, table: str, wordnet: WordNet) -> Release:
    """Make a run and its release of a table, two images a row."""
    folder.mkdir()
    (folder / "table.csv").write_text(table)
    config = noise_config(catalog={"table": str(folder / "table.csv")}, images_per_synset=2)
    plan, paths = make_plan(config), RunPaths(folder / "run")
    write_plan(plan, paths, wordnet=wordnet)
    generate(paths.root, range(len(plan.shards)))
    return merge([paths], ReleasePaths(folder / "release"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    return made(tmp_path_factory.mktemp("tables") / "captions", CAPTIONS, wordnet)


@pytest.fixture
def captions(whole: Release, tmp_path: Path) -> Release:
    return Release(shutil.copytree(whole.paths.root, tmp_path / "release"))


def correct(*ids: str) -> Any:
    """Predict these rows' images correctly, by their order in the table."""

    def predictions(release: Release, every: bool = True) -> pa.Table:
        table = drawn.predictions(release, lambda wnid: 0.0, every=every)
        ranks = [
            0 if rank is not None and id_ in ids else rank
            for id_, rank in zip(*(table[n].to_pylist() for n in ("id", "label_rank")), strict=True)
        ]
        place = table.column_names.index("label_rank")
        return table.set_column(place, "label_rank", pa.array(ranks, pa.int16()))

    return predictions


def test_captions_of_a_class_count_together_and_other_rows_do_not(captions: Release) -> None:
    paths = drawn.evaluation(captions, correct("at night")(captions))
    record = json.loads(paths.evaluation.read_text())
    counts = {row["wnid"]: (row["images"], row["correct"]) for row in record["classes"]}
    assert counts == {ZEBRA: (4, 2), GREENHOUSE: (2, 0)}
    assert (record["images_classified"], record["images_without_wnid"]) == (10, 4)
    assert record["wordnet"]["own"]["synsets"] == 2
    assert sum(row["times"] for row in record["confusions"] if row["wnid"] == ZEBRA) <= 4
    assert verify(captions.paths.root) == []


def test_the_page_shows_pictures_of_each_row_with_its_own_prompt(captions: Release) -> None:
    drawn.evaluation(captions, correct("at night")(captions))
    page = write_report(captions).read_text()
    assert "5 concepts" in page
    assert "4 images are of concepts that are no synsets" in page
    for prompt in ("a zebra in high grass", "two zebras at night"):
        assert page.count(f'title="{prompt}"') == 2
    assert "my red bike" not in page
    assert "None" not in page.split("<script")[0].replace("None correct", "").replace("None.", "")


def test_images_of_releases_are_paired_by_row_and_number(captions: Release) -> None:
    for name, rows in (("one", ("at night", "glass")), ("other", ("in the grass", "glass"))):
        drawn.evaluation(captions, correct(*rows)(captions), name, model=name)
    folder = captions.paths.evaluations
    found = compare_evaluations(open_sides([str(folder / "one"), str(folder / "other")]))
    (pair,) = found["pairs"]
    assert (pair["same_images"]["only_first"], pair["same_images"]["only_second"]) == (2, 2)
    assert (found["classes_in_common"], pair["rate"]["mean"]) == (2, 0)


@pytest.fixture
def tiny(tmp_path: Path) -> EvaluationConfig:
    """Weights of timm's smallest ViT: a real classifier of random opinions."""
    torch.manual_seed(1)
    weights = tmp_path / "tiny.safetensors"
    save_file(timm.create_model("test_vit", num_classes=1000).state_dict(), weights)
    return EvaluationConfig(model="test_vit", checkpoint=weights, images="all")


def test_a_classifier_predicts_all_rows_and_is_held_to_those_of_a_class(
    captions: Release, tiny: EvaluationConfig
) -> None:
    found = drawn.evaluate(captions, tiny)
    assert (found["images_judged"], found["images"], found["classes"]) == (10, 6, 2)
    table = Predictions.read(Path(found["path"]).with_name("predictions.parquet"), 99).table
    assert table["wnid"].null_count == table["label_rank"].null_count == 4
    assert table["subtree_probability"].null_count == 4
    assert table["top5"].null_count == 0


def test_without_a_label_an_evaluation_is_refused_and_a_run_before_it_is_made(
    wordnet: WordNet, sdwn: Sdwn, tmp_path: Path, tiny: EvaluationConfig
) -> None:
    release = made(tmp_path / "plain", "id,prompt\na,a cat\nb,a dog\n", wordnet)
    for chosen in (tiny, tiny.model_copy(update={"images": "imagenet"})):
        with pytest.raises(SdwnError, match=r"none of its concepts .*; plan a table with a column"):
            open_prediction_plan(release, chosen)
    assert not release.paths.evaluations.exists()
    then = ("--then", "merge,evaluate", "--wait")
    assert "column label, wnid" in sdwn("submit", tmp_path / "plain/run", *then, code=1).stderr
    dataset = ReleaseDataset(release, labels=None)
    assert (dataset.classes, dataset.targets.tolist()) == ([], [-1] * 4)


def test_labels_of_a_dataset_are_those_of_the_table(captions: Release) -> None:
    with pytest.raises(UsageError, match="2 of 10 images are of no label"):
        ReleaseDataset(captions, labels="label")
    labelled = captions.subset(
        rows=[i for i, x in enumerate(captions.metadata["label"]) if x.as_py()]
    )
    dataset = ReleaseDataset(labelled, labels="label")
    assert dataset.classes == ["Zebra", "greenhouse", "red bike", "zebra"]
    assert [dataset.classes[label] for label in dataset.targets[::2]] == [
        labelled.row(row)["label"] for row in range(0, 8, 2)
    ]
    with pytest.raises(UsageError, match="4 of 10 images are of no synset"):
        ReleaseDataset(captions)


# A classifier of its own classes
OWN_NAMES = ["red bike", "Zebra", "green_door"]
OWN = CAPTIONS + "door,a door,Green Door\n"


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm saves what was trained on three classes: of random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "three"
    network = timm.create_model("test_vit", num_classes=3)
    names = {"label_names": OWN_NAMES}
    save_for_hf(network, str(folder), model_config=names, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet, own_model: Path) -> Release:
    release = made(tmp_path_factory.mktemp("own") / "labelled", OWN, wordnet)
    drawn.evaluate(release, EvaluationConfig(model=f"local-dir:{own_model}"))
    return release


def test_labels_are_held_to_a_classifiers_own_classes(own: Release, own_model: Path) -> None:
    (name,) = evaluations(own.paths)
    paths = own.paths.evaluation(name)
    assert name.startswith("three-")
    record = read_evaluation(own, paths)
    assert {row["wnid"]: row["images"] for row in record["classes"]} == {
        "red bike": 2, "Zebra": 4, "green_door": 2
    }  # fmt: skip
    assert (record["images_classified"], record["images_without_wnid"]) == (8, 4)
    assert (record["groups"], record["map"], record["figures"]["top5_percent"]) == ([], None, 100)
    assert not paths.table("groups").exists()
    assert not paths.table("synsets").exists()
    table = Predictions.read(paths.predictions, 99).table
    network = timm.create_model(f"local-dir:{own_model}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    for row in table.to_pylist():
        (index,) = (i for i in own.find(row["id"]) if own.row(int(i))["number"] == row["number"])
        with torch.inference_mode():
            expected = network(transform(own.image(int(index)))[None])[0].softmax(0)
        assert row["top5"] == expected.argsort(descending=True).tolist()
        assert row["label_probability"] == pytest.approx(float(expected[row["imagenet_class"]]))
        assert row["wnid"] == OWN_NAMES[row["imagenet_class"]]
        assert row["subtree_probability"] is None
    assert verify(own.paths.root) == []


def test_pages_of_own_classes_have_nothing_of_wordnet(
    own: Release, own_model: Path, wordnet: WordNet, tmp_path: Path
) -> None:
    page = write_report(own).read_text()
    assert "8 images of 3 of the classifier's own classes" in page
    assert "4 images are of concepts whose label is none of them" in page
    for anchor in ("groups", "map", "wordnet"):
        assert f'id="{anchor}"' not in page
    # The same labels and other images: of other prompts.
    other = made(tmp_path / "other", OWN.replace("a ", "the "), wordnet)
    drawn.evaluate(other, EvaluationConfig(model=f"local-dir:{own_model}"))
    sides = open_sides([f"one={own.paths.root}", f"other={other.paths.root}"])
    found = compare_evaluations(sides)
    assert (found["classes_in_common"], found["pairs"][0]["subtree_probability"]) == (3, None)
    write_comparison(found, sides, ComparisonPaths(tmp_path / "comparison"))
    page = (tmp_path / "comparison/comparison.html").read_text()
    assert "of the 3 classes that all of them have" in page
    assert "subtrees" not in page


def test_own_classes_are_browsed(own: Release) -> None:
    with served(Library(own.paths.root)) as address, httpx.Client(base_url=address) as client:
        for path in ("/", "/about", "/map", "/?seen=red+bike"):
            assert client.get(path).status_code == 200, path
        assert "of 2 correct" in client.get("/concepts/mine").text
        assert "green_door" in client.get("/concepts/mine/0").text
        assert client.get("/?seen=n02391049").status_code == 400


def test_no_label_of_a_classifiers_own_is_refused(
    wordnet: WordNet, sdwn: Sdwn, tmp_path: Path, own_model: Path
) -> None:
    release = made(tmp_path / "cats", "id,prompt,label\na,a cat,my cat\n", wordnet)
    chosen = ("--model", f"local-dir:{own_model}")
    shown = sdwn("evaluate", release.paths.root, *chosen, code=1).stderr
    assert "has a label that is a class of" in shown
    assert "red bike, Zebra, green_door" in shown
    assert not release.paths.evaluations.exists()
    (own_model.parent / "unnamed").mkdir()
    config = json.loads((own_model / "config.json").read_text())
    (own_model.parent / "unnamed/config.json").write_text(json.dumps({**config, "label_names": []}))
    with pytest.raises(SdwnError, match="a name for each of its 3 classes, found 0"):
        own_classes(f"local-dir:{own_model.parent / 'unnamed'}")
