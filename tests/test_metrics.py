"""Figures of an evaluation, against a slow reference and against cases worked by hand."""

import json
import statistics
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdwn.evaluation.metrics import METRICS, measure
from sdwn.evaluation.record import PAPER_FIGURES as PAPER
from sdwn.storage.columns import STATUSES

CLASS_WNIDS = ["n01440764", "n02123045", "n02356798", "n15075141"]
SCALARS = [metric.name for metric in METRICS]


@st.composite
def rows(draw):
    """Rows of up to four classes of up to six images, in any order."""
    found = [
        (
            wnid,
            number,
            draw(st.sampled_from(STATUSES)),
            draw(st.one_of(st.just(0), st.integers(-1, 6), st.integers(7, 999))),
        )
        for wnid in draw(st.lists(st.sampled_from(CLASS_WNIDS), min_size=1, unique=True))
        for number in range(draw(st.integers(1, 6)))
    ]
    return draw(st.permutations(found))


def reference(found, most):
    """Compute the scalars row by row, in plain Python."""
    by_class = {}
    for wnid, _, _, rank in found:
        by_class.setdefault(wnid, []).append(rank)
    right = {wnid: sum(rank == 0 for rank in ranks) for wnid, ranks in by_class.items()}
    scaled = [most * right[wnid] / len(ranks) for wnid, ranks in by_class.items()]
    return {
        "images": len(found),
        "classes": len(by_class),
        "images_per_class": most,
        "top1_percent": 100 * sum(right.values()) / len(found),
        "top5_percent": 100 * sum(rank in range(5) for *_, rank in found) / len(found),
        "mean_correct": statistics.fmean(scaled),
        "std_correct": statistics.pstdev(scaled),
        "any_correct": sum(count > 0 for count in right.values()) / len(by_class),
        "all_correct": sum(right[w] == len(by_class[w]) for w in by_class) / len(by_class),
        "none_correct": sum(count == 0 for count in right.values()) / len(by_class),
        "black_images": sum(status in ("nsfw", "nan", "black") for _, _, status, _ in found),
    }


def evaluated(found):
    return measured(*zip(*found, strict=True))


def measured(wnid, number, status, label_rank):
    columns = {"wnid": wnid, "number": number, "status": status, "label_rank": label_rank}
    return measure(pa.table({name: list(values) for name, values in columns.items()}))


def most_images(found):
    wnids = [row[0] for row in found]
    return max(wnids.count(wnid) for wnid in set(wnids))


@given(rows())
def test_figures_agree_with_a_plain_reference(found):
    result, per_class = evaluated(found)
    assert {name: result[name] for name in SCALARS} == pytest.approx(
        reference(found, most_images(found))
    )
    assert result["statuses"] == Counter(row[2] for row in found)
    assert json.loads(json.dumps(result)) == result
    for row in per_class:
        own = [each for each in found if each[0] == row["wnid"]]
        assert row["images"] == len(own)
        assert row["correct"] == sum(rank == 0 for *_, rank in own)
        assert row["correct_top5"] == sum(0 <= rank < 5 for *_, rank in own)
        assert row["black"] == sum(status in ("nsfw", "nan", "black") for _, _, status, _ in own)
    assert [row["wnid"] for row in per_class] == sorted({row[0] for row in found})
    right = [row["correct"] for row in per_class]
    assert result["histogram"] == [right.count(k) for k in range(most_images(found) + 1)]
    bright = [row for row in found if row[2] not in ("nsfw", "nan", "black")]
    if not bright:
        assert result["without_black"] is None
        return
    left_out = len({row[0] for row in found}) - len({row[0] for row in bright})
    expected = reference(bright, most_images(found)) | {"classes_left_out": left_out}
    assert result["without_black"] == pytest.approx(expected)


def test_a_full_release_by_hand():
    # Three classes of four images: 4, 1 and 0 right; the last one's are top-5 but one.
    wnid = np.repeat(CLASS_WNIDS[:3], 4)
    rank = [0, 0, 0, 0, 0, 1, 5, 700, 4, 4, 1, 5]
    result = measured(wnid, list(range(4)) * 3, ["ok"] * 12, rank)[0]
    assert result["histogram"] == [1, 1, 0, 0, 1]
    assert result["mean_correct"] == pytest.approx(5 / 3)
    assert result["std_correct"] == pytest.approx(1.699673)
    assert (result["any_correct"], result["all_correct"]) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    assert result["top1_percent"] == pytest.approx(100 * 5 / 12)
    assert result["top5_percent"] == pytest.approx(100 * 9 / 12)
    assert {name: result["without_black"][name] for name in SCALARS} == {
        name: result[name] for name in SCALARS
    }


def test_a_class_with_fewer_images_counts_by_its_share():
    wnid = [CLASS_WNIDS[0]] * 4 + [CLASS_WNIDS[1]] * 2
    result = measured(wnid, [0, 1, 2, 3, 0, 1], ["ok"] * 6, [0, 0, 0, 9, 0, 0])[0]
    assert result["images_per_class"] == 4
    assert result["mean_correct"] == pytest.approx((3 + 4) / 2)
    assert result["all_correct"] == 0.5
    assert result["histogram"] == [0, 0, 1, 1, 0]


def test_a_class_of_black_images_is_left_out_and_counted():
    wnid = [CLASS_WNIDS[0]] * 2 + [CLASS_WNIDS[1]] * 2
    result = measured(wnid, [0, 1, 0, 1], ["nsfw", "nan", "ok", "nan"], [7, 7, 0, 7])[0]
    assert result["black_images"] == 3
    assert result["mean_correct"] == 0.5
    assert result["without_black"]["classes_left_out"] == 1
    assert result["without_black"]["mean_correct"] == 2.0
    assert result["without_black"]["black_images"] == 0


def test_without_an_image_there_is_no_share():
    figures = measured([], [], [], [])[0]
    assert [figures[name] for name in ("classes", "top1_percent", "histogram")] == [0, None, []]


def test_the_papers_figures_agree_with_each_other():
    assert set(PAPER) <= set(SCALARS)
    assert PAPER["images"] == PAPER["classes"] * PAPER["images_per_class"]
    # Of counts from 0 to 10 with this mean, none can spread more than sqrt(m * (10 - m)).
    most = (PAPER["mean_correct"] * (10 - PAPER["mean_correct"])) ** 0.5
    assert PAPER["all_correct"] < PAPER["any_correct"]
    assert PAPER["none_correct"] == pytest.approx(1 - PAPER["any_correct"])
    assert PAPER["std_correct"] < most
