"""Records of measures: written, read, and what is said of damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sdwn.measures.record import class_of_images, read_records, write_record
from sdwn.wordnet.corpus import WordNet

from drawn import draw_features, noise_release

FIGURE = {"value": 1.5, "low": 1.0, "high": 2.0, "images": 4, "reference_images": None}


def test_a_record_is_read_as_it_was_written_and_not_when_it_was_altered(
    wordnet: WordNet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = noise_release(tmp_path, wordnet, ["n02391049", "n02510455"], images_per_synset=2)
    features = draw_features(release, np.eye(4))
    paths = write_record("measures", release, features, None, {"figures": {"vendi": FIGURE}})
    record = read_records(release, "measures")["drawn"]
    assert record["figures"]["vendi"] == FIGURE
    assert record["features"]["name"] == "drawn"
    paths.record.write_text(paths.record.read_text().replace("1.5", "2.5"))
    assert read_records(release, "measures") == {}
    assert "altered" in caplog.text


def test_the_class_of_an_image_is_its_wnid(wordnet: WordNet, tmp_path: Path) -> None:
    release = noise_release(tmp_path, wordnet, ["n02510455", "n02391049"], images_per_synset=2)
    names, index = class_of_images(release.metadata)
    assert names == ["n02391049", "n02510455"]
    assert [names[one] for one in index] == release.metadata["wnid"].to_pylist()
