"""The map's places: word vectors from files, a text encoder, WordNet; figures for print."""

from __future__ import annotations

import base64
import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sdwn.config import EvaluationConfig
from sdwn.errors import UsageError
from sdwn.evaluation.class_map import build_class_map, find_vectors, map_labels
from sdwn.evaluation.record import read_evaluation
from sdwn.models.builtin import builtin_folder
from sdwn.releases.release import Release
from sdwn.reports.figures import write_report_files
from sdwn.reports.page import SHEET_PIXELS, Album
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet

from drawn import evaluation, noise_release, predictions

SVG = "{http://www.w3.org/2000/svg}"
WORDS = {
    "tench": [1, 0, 0, 0],
    "Maltese_dog": [0, 1, 0, 0],
    "black": [0, 0, 1, 0],
    "footed": [0, 0, 3, 0],
    "ferret": [0, 0, 5, 6],
    "polo-neck": [7, 7, 7, 7],
    "kite": [0, 0, 0, 0],
}


def lines(words: dict[str, list[int]]) -> str:
    return "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in words.items())


@pytest.mark.parametrize("header", ["", "7 4\n"])
def test_names_are_found_as_one_word_by_words_in_lower_case_and_by_other_names(
    tmp_path: Path, header: str
) -> None:
    path = tmp_path / "vectors.txt"
    # GloVe has tokens with spaces; the first line of a word counts; Windows ends lines otherwise.
    text = header + lines(WORDS) + "tench . 9 9 9 9\ntench 8 8 8 8\n"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    names = {
        "fish": ["Tench", "Tinca tinca"],
        "dog": ["Maltese dog"],
        "ferret": ["Black-footed ferret"],
        "jumper": ["turtleneck", "polo neck"],
        "kite": ["kite"],
        "unknown": ["no such thing"],
    }
    found = find_vectors(path, names)
    assert {key: vector.tolist() for key, vector in found.items()} == {
        "fish": [1, 0, 0, 0],
        "dog": [0, 1, 0, 0],
        "ferret": [0, 0, 3, 2],
        "jumper": [7, 7, 7, 7],
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "found ''"),
        (b"3000000 300\n</s> \x12\x94\x01\xff\x00", "line 2: expected a word and its numbers"),
        (b"cat 1 2 3\ndog 1\n", "as many in each line"),
        (b"cat 1 2 3\ndog 1 nan 3\n", "found 'dog 1 nan 3"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        find_vectors(path, {"one": ["dog"]})
    message = str(refused.value)
    assert said in message
    assert message.startswith(str(path))
    assert "\n" not in message


CLASSES = (
    *("n02085620", "n02085782", "n02085936", "n02086079", "n02086240", "n02086646"),  # dogs
    *("n02787622", "n02804610", "n02992211", "n03110669", "n03249569", "n03394916"),  # instruments
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    return noise_release(tmp_path_factory.mktemp("map") / "run", wordnet, CLASSES)


def spread_apart(found: dict[str, Any]) -> bool:
    """Whether the dogs lie nearer to one another than to any instrument, on the whole."""
    points = np.array([found["places"][wnid] for wnid in CLASSES if wnid in found["places"]])
    half = len(points) // 2
    dogs, others = points[:half], points[half:]
    inside = np.linalg.norm(dogs[:, None] - dogs, axis=-1).mean()
    return bool(inside < np.linalg.norm(dogs[:, None] - others, axis=-1).mean())


def test_word_vectors_place_what_they_know_and_say_what_not(
    release: Release, tmp_path: Path
) -> None:
    path = tmp_path / "words.txt"
    random = np.random.default_rng(0)
    known = {wnid: release.concepts[wnid].lemmas.split(", ")[0] for wnid in CLASSES[:-1]}
    centre = {wnid: [9, 0, 0] if wnid in CLASSES[:6] else [0, 9, 0] for wnid in known}
    path.write_text(lines({name: centre[w] + random.normal(size=3) for w, name in known.items()}))
    found = build_class_map(release, CLASSES, path)
    assert found["source"] == "words.txt"
    assert found["note"].startswith("1 of 12 classes are left out")
    assert set(found["places"]) == set(known)
    assert spread_apart(found)
    assert all(abs(value) <= 1 for place in found["places"].values() for value in place)
    assert build_class_map(release, CLASSES[::-1], path) == found
    path.write_text("nothing 1 2 3\n")
    with pytest.raises(UsageError, match="found none of the 12 classes' names"):
        build_class_map(release, CLASSES, path)


def test_without_a_model_wordnet_places_classes(release: Release) -> None:
    found = build_class_map(release, CLASSES, None)
    assert found["source"] == "WordNet path distance"
    assert "builtin:noise has no text encoder" in found["note"]
    assert spread_apart(found)
    assert build_class_map(release, CLASSES, None) == found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_classes_have_places_too(release: Release, count: int) -> None:
    found = build_class_map(release, CLASSES[:count], None)["places"]
    assert len({tuple(place) for place in found.values()}) == count


def model_of(release: Release, name: str) -> Release:
    found = Release(release.paths.root)
    (plan,) = found.manifest.plans
    plan = plan.model_copy(update={"settings": {**plan.settings, "model": {"name": name}}})
    found.manifest = found.manifest.model_copy(update={"plans": [plan]})
    return found


@pytest.mark.model
def test_the_models_own_text_encoder_places_names(release: Release) -> None:
    found = build_class_map(model_of(release, "builtin:tiny"), CLASSES, None)
    assert found["source"] == "text encoder of builtin:tiny"
    assert "random" in found["note"]
    assert found["places"].keys() == set(CLASSES)
    assert found["places"] != build_class_map(release, CLASSES, None)["places"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CompVis/stable-diffusion-v1-4", " is not in the hub's cache"),
        ("/no/such/folder", ": no such folder"),
    ],
)
def test_a_model_that_is_not_here_leaves_wordnet(release: Release, name: str, reason: str) -> None:
    found = build_class_map(model_of(release, name), CLASSES, None)
    assert found["source"] == "WordNet path distance"
    assert f"{name}{reason}" in found["note"]


def test_a_damaged_text_encoder_leaves_wordnet(release: Release, tmp_path: Path) -> None:
    model = Path(shutil.copytree(builtin_folder("tiny"), tmp_path / "model"))
    (model / "text_encoder/config.json").write_text('{"model_type": "t5"}')
    found = build_class_map(model_of(release, str(model)), CLASSES, None)
    assert found["source"] == "WordNet path distance"
    assert "cannot be loaded" in found["note"]


def test_figures_for_print_are_real_and_always_the_same(release: Release) -> None:
    paths = evaluation(release, predictions(release))
    record = read_evaluation(release, paths)
    drawn = write_report_files(paths, release, record, {})
    assert sorted(drawn) == ["groups", "histogram", "map"]
    written = [paths.figure(name, kind) for name in drawn for kind in ("png", "svg", "pdf")]
    before = {path: path.read_bytes() for path in written}
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width == 1050
                assert len(image.convert("L").getcolors(256) or ()) > 10
        elif path.suffix == ".svg":
            root = ElementTree.fromstring(path.read_text())
            texts = [e.text or "" for e in root.iter(f"{SVG}text")]
            assert any("correct" in text or "dogs" in text for text in texts)
    write_report_files(paths, release, record, {})
    assert before == {path: path.read_bytes() for path in written}
    # The map names extremes, and no name lies over another.
    rows, labels = record["classes"], map_labels(record)
    extremes = {max(row["correct"] for row in rows), min(row["correct"] for row in rows)}
    shown = {int(label["text"].rpartition(" ")[2].removesuffix("/10")) for label in labels}
    assert extremes <= shown
    for one in labels:
        same_height = [label for label in labels if abs(label["y"] - one["y"]) < 0.04]
        ends = sorted(
            (label["x"], label["x"] + 0.02 * len(label["text"]))
            if label["side"] == "left"
            else (label["x"] - 0.02 * len(label["text"]), label["x"])
            for label in same_height
        )
        assert all(before[1] < after[0] for before, after in pairwise(ends))
    text = paths.figure("map", "svg").read_text()
    assert all(label["text"] in text for label in labels)


def test_a_class_has_a_sheet_of_its_first_ten_images(release: Release) -> None:
    urls = Album(release, CLASSES, predictions(release)).sheets(CLASSES)
    assert urls.keys() == set(CLASSES)
    with Image.open(io.BytesIO(base64.b64decode(urls[CLASSES[0]].partition(",")[2]))) as sheet:
        assert sheet.size == (5 * SHEET_PIXELS, 2 * SHEET_PIXELS)


def test_of_a_large_class_the_first_pictures_are_looked_at(
    tmp_path: Path, wordnet: WordNet
) -> None:
    release = noise_release(tmp_path / "run", wordnet, CLASSES[:2], images_per_synset=51)
    table = predictions(release)
    album = Album(release, CLASSES[:2], table)
    right = {(row["wnid"], row["number"]): row["label_rank"] == 0 for row in table.to_pylist()}
    for wnid in CLASSES[:2]:
        assert [picture["number"] for picture in album[wnid]] == list(range(50))
        assert all(one["correct"] == right[wnid, one["number"]] for one in album[wnid])
    evaluation(release, table)
    page = write_report(release).read_text()
    assert page.count('<figure class="picture') == 2 * 20
    # Nothing was measured.
    assert 'id="measures"' not in page
    assert 'id="transfer"' not in page


def test_without_a_class_the_page_shows_what_wordnet_tells(
    tmp_path: Path, wordnet: WordNet
) -> None:
    synsets = ["n02084071", "n02121620", "n01503061"]  # dog, cat, bird
    catalog = {"synsets": synsets}
    release = noise_release(tmp_path / "run", wordnet, synsets, catalog=catalog)
    paths = evaluation(release, predictions(release, every=True))
    assert read_evaluation(release, paths)["map"] is None
    page = write_report(release).read_text()
    assert "none of them an ImageNet-1k class" in page
    assert "recognised best" in page
    assert 'id="classes"' not in page
    assert not (paths.root / "figures").exists()


def test_groups_are_drawn_as_they_are_named(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {r"$\cost$": "dog.n.01", "_own": "musical_instrument.n.01"}
    groups = tmp_path / "groups.yaml"
    groups.write_text(json.dumps(names))
    chosen = EvaluationConfig(groups=str(groups))
    paths = evaluation(release, predictions(release), "signs", chosen)
    assert write_report(release, "signs").is_file()
    for figure in ("groups", "map"):
        texts = ElementTree.parse(paths.figure(figure, "svg")).iter(f"{SVG}text")
        drawn = {(one.text or "").strip().partition(" (")[0] for one in texts}
        assert names.keys() <= drawn, figure

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such font")

    # An error of drawing is none of the record.
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(ValueError, match="no such font"):
        write_report(release, "signs")
