"""Use for training: probes on clusters whose answer is known, and what is refused."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdwn.errors import UsageError
from sdwn.io import ignore
from sdwn.measures.record import all_records
from sdwn.measures.transfer import ProbeImages, count_correct, measure_transfer
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from conftest import Sdwn
from drawn import draw_features, noise_release

# Zebra, panda, lion, tabby: animals; school bus, moped; and a class of the first release alone.
CLASSES = ["n02391049", "n02510455", "n02129165", "n02123045", "n04146614", "n03785016"]
ALONE = "n04487081"
IMAGES = {"synthetic": 12, "test": 20, "real": 7}
DIMENSIONS = 16


def clusters(release: Release, spread: float, seed: int) -> np.ndarray:
    """Draw features of each image around the centre of its class, the same in all releases."""
    wnids = release.metadata["wnid"].to_pylist()
    centre = np.random.default_rng(9).normal(size=(len(CLASSES) + 1, DIMENSIONS))
    at = [[*CLASSES, ALONE].index(wnid) for wnid in wnids]
    random = np.random.default_rng(seed)
    return 5 + centre[at] + spread * random.normal(size=(len(wnids), DIMENSIONS))


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> dict[str, Release]:
    folder, found = tmp_path_factory.mktemp("transfer"), dict[str, Release]()
    for seed, (name, images) in enumerate(IMAGES.items()):
        wnids = [*CLASSES, *[ALONE] * (name == "synthetic")]
        found[name] = noise_release(
            folder / name, wordnet, wnids, images_per_synset=images, seed=seed
        )
        draw_features(found[name], clusters(found[name], 2 if name == "synthetic" else 1.4, seed))
    return found


def transfer(releases: Mapping[str, Release], seed: int = 0) -> dict[str, Any]:
    return measure_transfer(releases, None, seed, ignore)[1]


def test_accuracy_on_real_images_stands_between_chance_and_real_images_own(
    releases: dict[str, Release],
) -> None:
    found = transfer(releases)
    figures = found["figures"]
    ours, real, chance = (
        figures[name] for name in ("transfer_accuracy", "real_accuracy", "chance")
    )
    assert chance["value"] == pytest.approx(100 / len(CLASSES))
    assert chance["value"] < ours["low"] < ours["value"] < ours["high"] < 100
    assert real["value"] > 60
    assert (ours["images"], ours["reference_images"]) == (6 * 12, 6 * 20)
    assert (real["images"], real["reference_images"]) == (6 * 7, 6 * 20)
    assert figures["transfer_top5"]["value"] > ours["value"]
    assert found["classes_left_out"] == {"synthetic": [ALONE], "test": [], "real": []}
    assert found["absent"] == {}
    # Every image counts once, in its class and in each group that has the class.
    by_class = {row["name"]: row["figures"]["transfer_accuracy"] for row in found["classes"]}
    assert sorted(by_class) == sorted(CLASSES)
    assert np.mean([one["value"] for one in by_class.values()]) == pytest.approx(ours["value"])
    assert {one["low"] for one in by_class.values()} == {None}
    groups = {row["name"]: row["figures"]["transfer_accuracy"] for row in found["groups"]}
    animals = np.mean([by_class[wnid]["value"] for wnid in CLASSES[:4]])
    assert groups["animals"]["value"] == pytest.approx(animals)
    assert groups["animals"]["images"] == 4 * 12


def test_the_learning_curve_goes_up_to_all_images(releases: dict[str, Release]) -> None:
    curve = transfer(releases)["curve"]
    assert [point["name"] for point in curve] == [1, 2, 5, 7, 10, 12]
    draws = {point["name"]: point["draws"] for point in curve}
    assert draws[1] == {"synthetic": 5, "real": 5}
    assert draws[7] == {"real": 1}
    assert draws[12] == {"synthetic": 1}
    values = [
        point["figures"]["transfer_accuracy"]["value"]
        for point in curve
        if "synthetic" in point["draws"]
    ]
    assert values[0] < values[-1]
    assert curve[0]["figures"]["transfer_accuracy"]["images"] == len(CLASSES)


def test_a_seed_gives_the_same_figures_again_and_another_other_draws(
    releases: dict[str, Release],
) -> None:
    first, again, other = (transfer(releases, seed) for seed in (3, 3, 4))
    assert first == again
    assert first["curve"][0] != other["curve"][0]
    # All images are all images, whatever the seed, where C is the same.
    assert first["settings"]["strength"] == other["settings"]["strength"]
    assert first["figures"]["transfer_accuracy"] == other["figures"]["transfer_accuracy"]


def test_shuffled_labels_give_chance_within_the_interval(releases: dict[str, Release]) -> None:
    release = releases["synthetic"]
    mixed = np.random.default_rng(0).permutation(clusters(release, 1, 0))
    draw_features(release, mixed, "mixed")
    draw_features(releases["test"], clusters(releases["test"], 1, 1), "mixed")
    two = {"synthetic": release, "test": releases["test"]}
    _, found = measure_transfer(two, "mixed", 0, ignore)
    figure, chance = found["figures"]["transfer_accuracy"], found["figures"]["chance"]["value"]
    assert figure["low"] <= chance <= figure["high"]
    assert found["absent"] == {"real_accuracy": "no real images to train on: add --train"}
    for one in two.values():
        one.paths.features("mixed").features.unlink()


def test_a_probe_is_the_one_of_scikit_learn(releases: dict[str, Release]) -> None:
    images = {
        name: ProbeImages(
            clusters(releases[name], 1.5, seed).astype(np.float16),
            np.unique(releases[name].metadata["wnid"].to_pylist(), return_inverse=True)[1],
        )
        for seed, name in enumerate(("real", "test"))
    }
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=10 / DIMENSIONS, tol=1e-6, max_iter=1000)
    )
    for classes in (2, len(CLASSES)):
        learnt, test = (one.take(one.label < classes) for one in images.values())
        probe.fit(learnt.vectors.astype(np.float32), learnt.label)
        right = probe.predict(test.vectors.astype(np.float32)) == test.label
        best, best_five = count_correct(learnt, test, 10)
        assert best.tolist() == np.bincount(test.label[right], minlength=classes).tolist()
        assert (best_five >= best).all()


def test_a_probe_that_can_learn_nothing_is_as_good_as_chance() -> None:
    label = np.repeat(np.arange(8), 3)
    same = ProbeImages(np.ones((24, 4), np.float16), label)
    best, best_five = count_correct(same, same, 1)
    assert best.sum() == 24 / 8
    assert best_five.sum() == 24 * 5 / 8


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 99))
def test_draws_are_nested_and_of_each_class(label: list[int], most: int, seed: int) -> None:
    # The vector of an image is its row.
    images = ProbeImages(np.arange(len(label), dtype=np.float16)[:, None], np.array(label))
    few, more = images.draw(most, seed), images.draw(most + 1, seed)
    assert set(few.vectors[:, 0]) <= set(more.vectors[:, 0])
    every = Counter(label)
    assert Counter(few.label.tolist()) == {one: min(n, most) for one, n in every.items()}


def test_what_would_be_no_test_is_refused(
    releases: dict[str, Release], wordnet: WordNet, tmp_path: Any
) -> None:
    synthetic, test = releases["synthetic"], releases["test"]
    with pytest.raises(UsageError, match=r"120 images also in .*; give --test a release without"):
        transfer({"synthetic": synthetic, "test": test, "real": test})
    other = noise_release(tmp_path, wordnet, [CLASSES[0]], images_per_synset=1, seed=9)
    draw_features(other, np.ones((1, DIMENSIONS)))
    with pytest.raises(UsageError, match="have 1 class in common; a probe needs two or more"):
        transfer({"synthetic": synthetic, "test": other})


def test_the_command_prints_and_keeps_its_figures(sdwn: Sdwn, releases: dict[str, Release]) -> None:
    folders = {name: one.paths.root for name, one in releases.items()}
    words = ("transfer", folders["synthetic"], "--test", folders["test"])
    said = sdwn(*words).stdout
    assert "accuracy if trained on real images  \u2013 no real images" in said
    assert "left out                            1 of synthetic: n04487081" in said
    found = sdwn.json(*words, "--train", folders["real"])
    path = Path(found["path"])
    record = all_records(releases["synthetic"])["transfer", path.parent.name]
    assert found["figures"] == record["figures"]
    assert record["train"]["release"] == releases["real"].digest
    curve = path.with_name("curve.csv")
    with curve.open(newline="") as table:
        rows = list(csv.DictReader(table))
    accuracies = [row for row in rows if row["measure"] == "transfer_accuracy"]
    assert [row["name"] for row in accuracies] == ["1", "2", "5", "10", "12"]
    assert {path.name for path in curve.parent.iterdir()} == {
        *("record.json", "curve.csv", "figures.csv", "groups.csv", "classes.csv")
    }


@pytest.mark.model
def test_the_miniatures_images_teach_its_classes_on_another_seed(
    wordnet: WordNet, tmp_path: Path, sdwn: Sdwn
) -> None:
    # King penguin, zebra, airliner, teapot, umbrella, banjo.
    wnids = ["n02056570", "n02391049", "n02690373", "n04398044", "n04507155", "n02787622"]
    generation = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
    generation |= {"scheduler": "DPMSolverMultistepScheduler", "safety_checker": False}
    drawn = {"model": {"name": "builtin:miniature"}, "generation": generation}
    releases = dict[str, Release]()
    for seed, name in enumerate(("synthetic", "test")):
        releases[name] = noise_release(
            tmp_path / name, wordnet, wnids, images_per_synset=2, seed=seed, **drawn
        )
        sdwn("features", releases[name].paths.root, "--model", "efficientnet-lite0")
    figures = transfer(releases)["figures"]
    assert figures["transfer_accuracy"]["low"] > figures["chance"]["value"]
