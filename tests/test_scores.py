"""The table of an image's scores: from predictions, features, measures and duplicates, by key."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sdwn.errors import IntegrityError, UsageError
from sdwn.measures.record import SCORES, score_table, write_record, write_scores
from sdwn.prediction.table import IMAGE_KEY, Features
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from drawn import draw_features, evaluation, noise_release, predictions

# Two ImageNet classes and a synset that is none.
ZEBRA, BUTTERFLY, HORSE = "n02391049", "n02276258", "n02374451"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return noise_release(folder, wordnet, [ZEBRA, BUTTERFLY], images_per_synset=3).paths.root


@pytest.fixture
def release(fresh: Path, tmp_path: Path) -> Release:
    return Release(shutil.copytree(fresh, tmp_path / "release"))


def record_scores(release: Release, features: Features, kind: str, **columns: object) -> Path:
    """Lay a record and its scores of all images into a release."""
    paths = write_record(kind, release, features, None, {"figures": {}})  # type: ignore[arg-type]
    write_scores(paths.scores, release.metadata, columns)
    return paths.scores


def test_a_release_without_any_has_all_columns_without_values(release: Release) -> None:
    table = score_table(release)
    assert table.column_names == [*IMAGE_KEY, *SCORES]
    assert table.select(IMAGE_KEY).equals(release.metadata.select(IMAGE_KEY))
    assert all(table[name].null_count == 6 for name in SCORES)
    assert [table[name].type for name in SCORES] == [score.type for score in SCORES.values()]


def test_all_scores_of_an_image_stand_in_its_row(release: Release) -> None:
    drawn = predictions(release, seed=3)
    evaluation(release, drawn)
    clip = draw_features(release, np.eye(6), "clip", clip_score=[30, None, 10, 20, 5, 1])
    draw_features(release, np.eye(6), "other")  # later, and no CLIP
    record_scores(release, clip, "measures", similarity_within=np.arange(6.0))
    record_scores(
        release,
        clip,
        "duplicates",
        duplicate_group=[0, None, 0, None, None, None],
        duplicate_of_better=[False, False, True, False, False, False],
    )
    found = score_table(release)
    for row, given in zip(found.to_pylist(), drawn.to_pylist(), strict=True):
        assert row["correct"] is (given["label_rank"] == 0)
        assert row["correct_top5"] is (given["label_rank"] < 5)
        assert row["confidence"] == max(given["top5_probability"])
        assert row["label_probability"] == given["label_probability"]
        assert row["subtree_probability"] == given["subtree_probability"]
    assert found["clip_score"].to_pylist() == [30, None, 10, 20, 5, 1]
    assert found["similarity_within"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert found["duplicate_group"].to_pylist() == [0, None, 0, None, None, None]
    assert found["nearest_real"].null_count == 6

    some = release.subset(rows=[4, 2])
    assert score_table(some).equals(found.take([4, 2]))


def test_predictions_of_some_images_leave_the_others_without(
    tmp_path: Path, wordnet: WordNet
) -> None:
    catalog = {"roots": ["equine.n.01"], "only": [ZEBRA, HORSE]}
    mixed = noise_release(tmp_path, wordnet, (), catalog=catalog, images_per_synset=2)
    drawn = predictions(mixed)
    evaluation(mixed, drawn)
    found = score_table(mixed)
    zebras = [wnid == ZEBRA for wnid in mixed.metadata["wnid"].to_pylist()]
    assert sum(zebras) == len(drawn) == 2
    assert [value is not None for value in found["confidence"].to_pylist()] == zebras


def test_the_latest_counts_unless_another_evaluation_is_named(release: Release) -> None:
    right, wrong = (predictions(release, lambda _, p=p: p) for p in (1.0, 0.0))
    old, new = evaluation(release, right, "right"), evaluation(release, wrong, "wrong")
    os.utime(old.evaluation, (1, 1))
    os.utime(new.evaluation, (2, 2))
    assert score_table(release)["correct"].to_pylist() == [False] * 6
    assert score_table(release, "right")["correct"].to_pylist() == [True] * 6
    with pytest.raises(UsageError, match="no evaluation 'no'; there is right, wrong"):
        score_table(release, "no")

    features = draw_features(release, np.eye(6), clip_score=[1.0] * 6)
    record_scores(release, features, "measures", nearest_real=[0.5] * 6)
    later = draw_features(release, np.eye(6), "later", clip_score=[2.0] * 6)
    record_scores(release, later, "measures", nearest_real=[None] + [0.25] * 5)
    found = score_table(release)
    assert found["nearest_real"].to_pylist() == [None] + [0.25] * 5
    assert found["clip_score"].to_pylist() == [2.0] * 6


def test_what_is_damaged_or_foreign_is_named_and_left_out(
    release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    of = evaluation(release, predictions(release))
    features = draw_features(release, np.eye(6), clip_score=[1.0] * 6)
    scores = record_scores(release, features, "measures", similarity_within=[1.0] * 6)
    group = record_scores(release, features, "duplicates", duplicate_group=[1] * 6)
    group.write_bytes(release.paths.concepts(0).read_bytes())
    scores.write_bytes(scores.read_bytes()[:-20])
    of.predictions.write_bytes(of.predictions.read_bytes() + b" ")
    found = score_table(release)
    assert {name for name in SCORES if found[name].null_count < 6} == {"clip_score"}
    assert all(str(path) in caplog.text for path in (group, scores, of.predictions))
    assert "no table of scores" in caplog.text
    with pytest.raises(IntegrityError, match=r"predictions\.parquet: changed"):
        score_table(release, "drawn")


def test_images_that_are_others_now_have_no_score(release: Release) -> None:
    """By number and SHA-256: a score of another release's image is nobody's here."""
    features = draw_features(release, np.eye(6))
    images = release.metadata
    paths = write_record("measures", release, features, None, {"figures": {}})
    digests = pa.array([*images["sha256"].to_pylist()[:5], "another"])
    other = images.drop_columns(["sha256"]).append_column("sha256", digests)
    write_scores(paths.scores, other, {"similarity_within": np.arange(6.0)})
    assert score_table(release)["similarity_within"].to_pylist() == [0, 1, 2, 3, 4, None]
