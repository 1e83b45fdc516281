"""Intervals by bootstrap, against SciPy's, and where there is nothing to resample."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from sdwn.evaluation import metrics
from sdwn.evaluation.metrics import METRICS, Columns, Metric, columns_of, figures_of, intervals_of

COUNTS = ("images", "correct", "correct_top5", "black")


def counted(most: int, *counts: Sequence[int]) -> Columns:
    """Return what metrics are computed of: images, correct ones, by top-5, black ones."""
    return columns_of(
        [dict(zip(COUNTS, row, strict=True)) for row in zip(*counts, strict=True)], most
    )


def drawn(classes: int, seed: int = 0) -> Columns:
    """Draw right images of ten, of many classes none or all."""
    random = np.random.default_rng(seed)
    correct = random.binomial(10, random.beta(0.3, 0.4, classes))
    images = np.full(classes, 10)
    return counted(10, images, correct, np.minimum(images, correct + 1), np.zeros_like(correct))


def test_intervals_are_those_of_scipys_percentile_bootstrap() -> None:
    tally = drawn(300)
    statistics = {"mean_correct": np.mean, "std_correct": np.std}
    for name, statistic in statistics.items():
        theirs = scipy.stats.bootstrap(
            (tally["correct"],), statistic, method="percentile", n_resamples=4000, random_state=1
        ).confidence_interval
        # Both are drawn: the ends of two runs differ by a few percent of the width.
        width = theirs.high - theirs.low
        assert intervals_of(tally)[name] == pytest.approx(list(theirs), abs=0.1 * width)


def test_each_figure_lies_in_its_interval_and_the_same_comes_out_again() -> None:
    tally = drawn(862)
    found, figures = intervals_of(tally), figures_of(tally)
    for name, pair in found.items():
        assert pair is not None
        assert pair[0] < figures[name] < pair[1]
    assert found == intervals_of(drawn(862))
    assert found["none_correct"] == pytest.approx([1 - end for end in found["any_correct"][::-1]])


def test_classes_are_drawn_with_all_their_images() -> None:
    # A large class that is all right and small ones that are not: the share of images swings.
    correct = [1000, *[0] * 9]
    tally = counted(1000, [1000, *[1] * 9], correct, correct, [0] * 10)
    low, high = intervals_of(tally)["top1_percent"] or (-1, -1)
    assert low == 0
    assert 99 < high < 100


def test_the_spread_is_around_the_mean_of_what_was_drawn() -> None:
    # Of two classes half of the draws are one of them twice, without any spread.
    two = counted(10, [10, 10], [0, 10], [0, 10], [0, 0])
    assert intervals_of(two)["std_correct"] == [0, 5]


def test_a_new_metric_may_resample_any_count(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Metric(
        "black_percent",
        "black images",
        lambda of: 100 * int(of["black"].sum()) / int(of["images"].sum()),
        lambda means: 100 * means["black"] / means["images"],
    )
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, share))
    tally = counted(10, [10] * 7, [5] * 7, [6] * 7, [0, 1, 2, 2, 2, 3, 4])
    low, high = intervals_of(tally)["black_percent"] or (-1, -1)
    assert low < figures_of(tally)["black_percent"] == 20 < high


def test_of_one_class_nothing_can_be_said() -> None:
    one = counted(10, [10], [4], [5], [0])
    assert set(intervals_of(one).values()) == {None}


@pytest.mark.parametrize("correct", [0, 3, 10])
def test_of_equal_classes_the_interval_is_the_figure(correct: int) -> None:
    same = counted(10, [10] * 7, [correct] * 7, [10] * 7, [0] * 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = intervals_of(same)
    figures = figures_of(same)
    assert found == {name: pytest.approx([figures[name]] * 2) for name in found}
    assert found["std_correct"] == [0, 0]


def test_memory_does_not_decide_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = intervals_of(drawn(50))
    monkeypatch.setattr(metrics, "DRAWS", 130)
    assert intervals_of(drawn(50)) == {name: pytest.approx(ends) for name, ends in whole.items()}
