"""How far figures over classes could be otherwise: intervals by resampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE_PERCENT = 95
SEED = 0
# Draws held at once: memory stays flat in the number of rows.
_DRAWS = 2_000_000

Floats = NDArray[np.float64]
Interval = list[float]
# Turns the means of columns, over rows, into figures; takes many resamples at once.
Statistics = Callable[[Mapping[str, Floats]], Mapping[str, Floats]]


def intervals(
    columns: Mapping[str, NDArray[np.generic]], statistics: Statistics
) -> dict[str, Interval | None]:
    """Give the 95 % interval of each figure by the percentile bootstrap.

    A row, which is a class with all its images, is drawn as a whole, with replacement, as many
    rows as there are; 2,000 times, always with the same seed. ``statistics`` is given the mean
    of each column, one value a resample, and gives the figures that depend on them.

    Of a single row nothing can be said, and each interval is None. Where all rows are alike the
    interval is the figure itself, twice.

    >>> right = {"right": np.array([10, 0, 10, 10])}
    >>> intervals(right, lambda means: {"mean": means["right"]})
    {'mean': [2.5, 10.0]}
    >>> intervals({"right": np.array([10])}, lambda means: {"mean": means["right"]})
    {'mean': None}
    """
    table = np.column_stack([np.asarray(values, dtype=np.float64) for values in columns.values()])
    means = resampled_means(table)
    figures = statistics({name: means[:, i] for i, name in enumerate(columns)})
    if len(table) < 2:
        return dict.fromkeys(figures)
    return {name: _percentiles(values) for name, values in figures.items()}


def resampled_means(table: Floats) -> Floats:
    """Draw rows with replacement; give the columns' means, (resamples, columns)."""
    rows = len(table)
    generator = np.random.default_rng(SEED)
    step = max(1, _DRAWS // rows)
    found = []
    for start in range(0, RESAMPLES, step):
        times = min(step, RESAMPLES - start)
        drawn = generator.integers(rows, size=(times, rows)) + rows * np.arange(times)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=times * rows).reshape(times, rows)
        found.append(counts @ table / rows)
    return np.concatenate(found)


def _percentiles(values: Floats) -> Interval:
    tail = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return [float(low), float(high)]
