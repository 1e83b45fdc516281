"""``sdwn measure``: what stands in its record and tables, and what it refuses."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sdwn.errors import UsageError
from sdwn.io import ignore
from sdwn.measures.measure import measure_release
from sdwn.measures.record import (
    all_records,
    class_of_images,
    open_reference,
    score_table,
    write_record,
)
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from conftest import Sdwn
from drawn import draw_features, noise_release, write_features
from small_clip import CAPTIONS, EMPTY, drawings

WNIDS = ["n02391049", "n02510455", "n04398044"]  # zebra, giant panda, teapot
IMAGES, DIMENSIONS = 40, 16


def clustered(release: Release, seed: int, shift: float = 0) -> np.ndarray:
    """Draw features around a centre for each class."""
    wnids = sorted({*release.metadata["wnid"].to_pylist()})
    centres = np.random.default_rng(0).normal(0, 3, (len(wnids), DIMENSIONS))
    own = np.searchsorted(wnids, release.metadata["wnid"].to_pylist())
    noise = np.random.default_rng(seed).normal(shift, 1, (len(release), DIMENSIONS))
    return centres[own] + noise


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> list[Release]:
    """Two releases of the same classes; the second is the reference, of fewer of one class."""
    folder = tmp_path_factory.mktemp("measure")
    return [
        noise_release(folder / str(seed), wordnet, WNIDS, images_per_synset=IMAGES, seed=seed)
        for seed in (1, 2)
    ]


def measured(sdwn: Sdwn, *arguments: Any) -> dict[str, Any]:
    """Run the command; return the values of its figures."""
    found = sdwn.json("measure", *arguments)
    return {name: figure["value"] for name, figure in found["figures"].items()}


def test_a_release_is_compared_with_itself(releases: list[Release], sdwn: Sdwn) -> None:
    release, _ = releases
    draw_features(release, clustered(release, 1), clip_score=np.linspace(20, 30, len(release)))
    root = release.paths.root
    found = sdwn.json("measure", root, "--reference", root)
    figures, record = found["figures"], Path(found["path"])
    assert figures["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert figures["kernel_distance"]["value"] <= 0
    assert figures["coverage"]["value"] == 1
    assert figures["clip_score"]["value"] == pytest.approx(25)
    assert figures["clip_score"]["low"] < 25 < figures["clip_score"]["high"]
    assert {figure["images"] for figure in figures.values()} == {len(WNIDS) * IMAGES}
    assert "--model clip:MODEL" in found["absent"]["cmmd"]
    # The reference is as varied as the release, for they are one.
    for name, figure in found["reference_figures"].items():
        assert figure["value"] == pytest.approx(figures[name]["value"])
    # The same command again: byte for byte the same figures, in all files.
    before = {path: path.read_bytes() for path in record.parent.iterdir() if path != record}
    assert {path.name for path in before} == {
        *("figures.csv", "groups.csv", "classes.csv", "scores.parquet")
    }
    again = sdwn.json("measure", root, "--reference", root)
    assert again == found
    assert {path: path.read_bytes() for path in before} == before
    (kept,) = all_records(release).values()
    assert kept["figures"] == figures


def test_each_measure_tells_what_it_should(releases: list[Release], sdwn: Sdwn) -> None:
    release, reference = releases
    real = clustered(reference, 2)
    draw_features(reference, real)
    sides = release.paths.root, "--reference", reference.paths.root
    found = {}
    first = [*np.unique(release.metadata["wnid"].to_pylist(), return_index=True)[1]]
    own = np.repeat(np.sort(first), IMAGES)
    for name, vectors in {
        "good": clustered(release, 1),
        "shifted": clustered(release, 1, shift=1),
        "repeated": clustered(release, 1)[own],
    }.items():
        draw_features(release, vectors)
        found[name] = measured(sdwn, *sides)
    good, shifted, repeated = found.values()
    for other in (shifted, repeated):
        assert other["frechet_distance"] > good["frechet_distance"] + 1
        assert other["kernel_distance"] > good["kernel_distance"] + 0.1
        assert other["coverage"] < good["coverage"] - 0.2
    # A shift changes the variety little, one image a class takes it away.
    assert shifted["vendi_within"] == pytest.approx(good["vendi_within"], rel=0.2)
    assert repeated["vendi_within"] == pytest.approx(1, abs=1e-6)
    assert repeated["similarity_within"] == pytest.approx(1, abs=1e-6)
    assert repeated["vendi"] < len(WNIDS) + 1e-6


def test_figures_are_of_the_classes_that_both_have(
    releases: list[Release], wordnet: WordNet, tmp_path: Path
) -> None:
    release, _ = releases
    draw_features(release, clustered(release, 1))
    other = noise_release(tmp_path, wordnet, [*WNIDS[:2], "n02342885"], images_per_synset=12)
    draw_features(other, clustered(other, 2))
    paths, content = measure_release(release, other, None, 10_000, ignore)
    assert content["classes_left_out"] == {"release": [WNIDS[2]], "reference": ["n02342885"]}
    assert content["figures"]["coverage"]["images"] == 24
    assert content["absent"]["kernel_distance"] == "needs 100 images, has 24"
    assert [row["name"] for row in content["classes"]] == WNIDS[:2]
    # A class has no Fréchet distance here, and no other than its own Vendi score.
    assert [*content["classes"][0]["figures"]] == [
        *("density", "coverage", "vendi_within", "similarity_within")
    ]
    assert {row["name"] for row in content["groups"]} == {"animals", "mammals"}
    with paths.table("classes").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert {(row["name"], row["images"]) for row in rows} == {(one, "12") for one in WNIDS[:2]}
    # All images have a similarity to the others, those of a class that is there a nearest one.
    scores = pq.read_table(paths.scores)
    assert scores["similarity_within"].null_count == 0
    known = scores["nearest_real"].is_valid().to_pylist()
    assert known == [one in WNIDS[:2] for one in release.metadata["wnid"].to_pylist()]
    assert score_table(release)["nearest_real"].null_count == IMAGES


def test_at_most_so_many_images_are_compared(releases: list[Release]) -> None:
    release, reference = releases
    draw_features(release, clustered(release, 1))
    draw_features(reference, clustered(reference, 2))
    _, content = measure_release(release, reference, None, 60, ignore)
    figures = content["figures"]
    assert figures["frechet_distance"]["images"] == figures["vendi"]["images"] == 60
    assert figures["frechet_distance"]["reference_images"] == 60
    assert figures["similarity_within"]["images"] == len(release)
    assert "kernel_distance" in content["absent"]


def test_what_cannot_be_measured_is_named(
    releases: list[Release], wordnet: WordNet, tmp_path: Path, sdwn: Sdwn
) -> None:
    release, reference = releases
    draw_features(release, clustered(release, 1))
    root = reference.paths.root
    for path in reference.paths.evaluations.glob("features/*/*"):
        path.unlink()
    error = sdwn("measure", release.paths.root, "--reference", root, code=1).stderr
    assert f"sdwn features {root} --model drawn" in error
    single = noise_release(tmp_path, wordnet, ["n02342885", "n02123045"], images_per_synset=1)
    draw_features(single, np.eye(2, DIMENSIONS))
    with pytest.raises(UsageError, match="no class in common; the first are n02391049 and n0212"):
        measure_release(release, single, None, 10_000, ignore)
    # One image a class: nothing to compare within it, and no clip_score.
    with pytest.raises(UsageError, match=r"nothing can be measured: .*two images of a class"):
        measure_release(single, None, None, 10_000, ignore)


def test_every_number_is_finite(releases: list[Release]) -> None:
    release, reference = releases
    vectors = clustered(release, 1)
    vectors[::3] = 0
    vectors[1::3] = 60_000
    draw_features(release, vectors, clip_score=[None, 0.0] * (len(release) // 2))
    draw_features(reference, np.zeros((len(reference), DIMENSIONS)))
    paths, _ = measure_release(release, reference, None, 10_000, ignore)

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(paths.record.read_text(), parse_constant=fail)
    assert not np.isnan(pq.read_table(paths.scores)["nearest_real"].to_numpy()).any()


def test_a_clip_score_falls_with_other_prompts_and_knows_no_class_by_an_empty_one(
    small_clip: Path, sdwn: Sdwn
) -> None:
    wnids = sorted(CAPTIONS)[:8]
    others = [CAPTIONS[wnid] for wnid in wnids[3:] + wnids[:3]]
    found = {}
    for name, prompts in {
        "own": [CAPTIONS[wnid] for wnid in wnids],
        "permuted": others,
        "empty": [EMPTY] * len(wnids),
    }.items():
        for seed in range(3):
            for wnid, prompt, drawing in zip(wnids, prompts, drawings(wnids, seed), strict=True):
                folder = sdwn.folder / name / wnid
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "text.txt").write_text(f"prompt: {prompt}\nwnid: {wnid}\n")
                drawing.save(folder / f"{seed}.png")
        release = f"{name}-release"
        sdwn("import", name, release, "--format", "folders")
        sdwn("features", release, "--model", f"clip:{small_clip}")
        found[name] = sdwn.json("measure", release, "--reference", "own-release")
    own, permuted, empty = (one["figures"]["clip_score"] for one in found.values())
    assert own["low"] > permuted["high"]
    assert permuted["value"] < empty["value"] < own["value"]
    # All have the same images: by any other measure they are one.
    for one in found.values():
        assert one["figures"]["vendi"] == found["own"]["figures"]["vendi"]
        assert "cmmd" in one["absent"], "24 images"


# Records


FIGURE = {"value": 1.5, "low": 1.0, "high": 2.0, "images": 4, "reference_images": None}


def test_a_record_is_read_as_it_was_written_and_not_when_it_was_altered(
    wordnet: WordNet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = noise_release(tmp_path, wordnet, ["n02391049", "n02510455"], images_per_synset=2)
    features = draw_features(release, np.eye(4))
    content = {"figures": {"vendi": FIGURE}, "classes": [{"name": "=n1", "figures": {}}]}
    paths = write_record("measures", release, features, None, content)
    with paths.table("figures").open(newline="") as table:
        (row,) = csv.DictReader(table)
    assert (row["name"], row["measure"], row["low"], row["images"]) == ("all", "vendi", "1.0", "4")
    assert row["reference_images"] == ""
    assert paths.table("classes").is_file()
    assert not paths.table("groups").exists()
    paths.scores.write_bytes(b"of an earlier run")
    write_record("measures", release, features, None, content)
    assert not paths.scores.exists()
    record = all_records(release)["measures", "drawn"]
    assert record["figures"]["vendi"] == FIGURE
    assert record["features"]["name"] == "drawn"
    paths.record.write_text(paths.record.read_text().replace("1.5", "2.5"))
    assert all_records(release) == {}
    assert caplog.text.endswith("altered since it was written; measure the release again\n")
    paths.record.write_text("{}")
    assert all_records(release) == {}
    assert caplog.text.count("measure the release again") == 2, "each line says so once"


def test_the_class_of_an_image_is_its_wnid(wordnet: WordNet, tmp_path: Path) -> None:
    release = noise_release(tmp_path, wordnet, ["n02510455", "n02391049"], images_per_synset=2)
    names, index = class_of_images(release.metadata)
    assert names == ["n02391049", "n02510455"]
    assert [names[one] for one in index] == release.metadata["wnid"].to_pylist()


def test_features_of_another_encoder_are_no_reference(wordnet: WordNet, tmp_path: Path) -> None:
    release, other = (
        noise_release(tmp_path / name, wordnet, ["n02510455"], images_per_synset=2)
        for name in ("one", "other")
    )
    features, same = draw_features(release, np.eye(2)), draw_features(other, np.eye(2))
    again = replace(same, encoder={**same.encoder, "device": "another card"})
    write_features(other, again)
    assert open_reference(features, other).encoder["device"] == "another card"
    write_features(other, replace(same, encoder={"model": "x"}))
    with pytest.raises(UsageError, match="another encoder, or of other weights"):
        open_reference(features, other)
    draw_features(other, np.ones((2, 5)))
    with pytest.raises(UsageError, match="make them again: sdwn features"):
        open_reference(features, other)
