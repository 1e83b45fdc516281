"""Features of images: written, read, found by key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sdwn.errors import IntegrityError, SdwnError
from sdwn.prediction.table import open_features
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from drawn import draw_features, noise_release, write_features


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    folder = tmp_path_factory.mktemp("features")
    return noise_release(folder, wordnet, ["n02391049", "n02510455"], images_per_synset=3)


def test_features_come_in_the_order_of_the_images_that_are_chosen(release: Release) -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 5))
    draw_features(release, vectors, "test", clip_score=[20.5] + [None] * 5)
    found = open_features(release)
    assert found.vectors.dtype == np.float16
    assert np.array_equal(found.vectors, vectors.astype(np.float16))
    assert found.table["clip_score"].to_pylist() == [20.5] + [None] * 5
    some = open_features(release.subset(rows=[4, 1]))
    assert np.array_equal(some.vectors, vectors[[4, 1]].astype(np.float16))
    assert some.table["number"].to_pylist() == [1, 1]


def test_features_that_are_missing_or_damaged_are_refused(
    release: Release, wordnet: WordNet, tmp_path: Path
) -> None:
    with pytest.raises(SdwnError, match="not of other; make them with: sdwn features"):
        open_features(release, "other")
    other = noise_release(tmp_path, wordnet, ["n02391049"], images_per_synset=2)
    with pytest.raises(SdwnError, match="has no features; make them with"):
        open_features(other)
    vectors = np.ones((2, 3))
    vectors[1, 1] = np.nan
    draw_features(other, vectors)
    with pytest.raises(IntegrityError, match="not finite"):
        open_features(other)
    draw_features(other, np.ones((2, 3)), clip_score=[np.nan, 20])
    with pytest.raises(IntegrityError, match="not from 0 to 100; make the features again"):
        open_features(other)
    found = draw_features(other, np.ones((2, 3)))
    write_features(other, replace(found, encoder={"weights": "none"}))
    with pytest.raises(IntegrityError, match="no table of features; make the features again"):
        open_features(other)
