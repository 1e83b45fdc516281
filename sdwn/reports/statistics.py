"""Statistics of paired differences: of the same classes under two conditions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sdwn.evaluation.metrics import percentiles, resampled_means

SEED = 0
RESAMPLES = 9_999
# From so many pairs on, the mean of randomly flipped signs is normal for all that p tells.
MANY = 5_000
# Of a difference, beyond which there is only rounding.
DIGITS = 12
# Numbers drawn at once, so that memory does not grow with the number of pairs.
DRAWN = 4_000_000


def difference(first: ArrayLike, second: ArrayLike) -> dict[str, Any]:
    """Compare paired values, such as the rates of the same classes in two releases.

    Returns:
        ``mean``, of second minus first; ``interval``, its 95 % bootstrap interval over pairs;
        ``p_value``, two-sided: how often the mean would be as far from 0 if each pair's order
        were chance (a permutation test by flipped signs; with 5,000 pairs or more the t test,
        which agrees there). Both are None of a single pair. ``pairs``, and of them how many are
        ``better``, ``worse`` and ``equal``.

    Raises:
        ValueError: there are no pairs, or not as many of one as of the other.

    >>> found = difference([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    >>> round(found["mean"], 3), found["better"], found["p_value"]  # 2 of the 64 ways to flip signs
    (0.1, 6, 0.03125)
    """
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if not before.size or before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"expected pairs, found values of shape {before.shape} and {after.shape}")
    # Rates are fractions of few images: rounding must not make equal ones differ.
    change = (after - before).round(DIGITS)
    several = len(change) > 1
    return {
        "pairs": len(change),
        "mean": float(change.mean()),
        "interval": percentiles(resampled_means(change[:, None])[:, 0]) if several else None,
        "p_value": _p_value(change) if several else None,
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
        "equal": int((change == 0).sum()),
    }


def _p_value(change: NDArray[np.float64]) -> float:
    # Equal pairs have no sign to flip; without them few enough are left to try all ways more often.
    moved = change[change != 0]
    if len(moved) < 2:
        return 1.0
    if len(moved) >= MANY:
        return float(stats.ttest_1samp(change, 0).pvalue)
    found = stats.permutation_test(
        (moved,),
        # 0.1 + 0.3 - 0.4 is not 0, and what is as far from 0 would not be counted as such.
        lambda values, axis: values.sum(axis=axis).round(DIGITS),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN // len(moved)),
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values for multiple tests, by Holm's method; None stays None.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        found[index] = least
    return found


def rates_differ(
    correct: NDArray[np.int64],
    images: NDArray[np.int64],
    other_correct: NDArray[np.int64],
    other_images: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Test each class by itself: p of Fisher's exact test, adjusted over all classes.

    The adjustment is Benjamini and Hochberg's: of the classes at 0.05 and below, one in twenty
    is expected to be chance.
    """
    fisher = cache(lambda table: stats.fisher_exact(np.reshape(table, (2, 2))).pvalue)
    tables = np.stack([correct, images - correct, other_correct, other_images - other_correct], 1)
    p_values = np.array([fisher(tuple(table)) for table in tables.tolist()], dtype=float)
    adjusted: NDArray[np.float64] = stats.false_discovery_control(p_values)
    return adjusted


def images_differ(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, float]:
    """Test two classifiers on the same images, by McNemar's exact test.

    Returns ``p_value``, and on how many images ``only_first`` or ``only_second`` is correct.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    apart = only_first + only_second
    p_value = float(stats.binomtest(only_second, apart).pvalue) if apart else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}
