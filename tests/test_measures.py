"""Records of measures: written, read, and what is said of damaged ones."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sdwn.errors import UsageError
from sdwn.measures.record import (
    class_of_images,
    groups_of_classes,
    open_reference,
    read_records,
    write_record,
)
from sdwn.wordnet.corpus import WordNet

from drawn import draw_features, noise_release, write_features

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
    record = read_records(release, "measures")["drawn"]
    assert record["figures"]["vendi"] == FIGURE
    assert record["features"]["name"] == "drawn"
    paths.record.write_text(paths.record.read_text().replace("1.5", "2.5"))
    assert read_records(release, "measures") == {}
    assert caplog.text.endswith("altered since it was written; measure the release again\n")
    paths.record.write_text("{}")
    assert read_records(release, "measures") == {}
    assert caplog.text.count("measure the release again") == 2, "each line says so once"


def test_the_class_of_an_image_is_its_wnid(wordnet: WordNet, tmp_path: Path) -> None:
    release = noise_release(tmp_path, wordnet, ["n02510455", "n02391049"], images_per_synset=2)
    names, index = class_of_images(release.metadata)
    assert names == ["n02391049", "n02510455"]
    assert [names[one] for one in index] == release.metadata["wnid"].to_pylist()


def test_classes_are_found_in_the_groups_that_hold_them(wordnet: WordNet, tmp_path: Path) -> None:
    release = noise_release(tmp_path, wordnet, ["n02510455", "n02391049"], images_per_synset=1)
    held = groups_of_classes(release, ["n02391049", "a label", "n02510455"])
    assert {name: which.tolist() for name, which in held.items()} == {
        "animals": [True, False, True],
        "mammals": [True, False, True],
    }


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
    with pytest.raises(UsageError, match=r"another encoder \(model differ"):
        open_reference(features, other)
    draw_features(other, np.ones((2, 5)))
    with pytest.raises(UsageError, match=r"another encoder \(dimensions differ"):
        open_reference(features, other)
