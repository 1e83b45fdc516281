"""The search for a card's best batch size. Pure: what runs a batch is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import OutOfMemoryError, SdwnError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GB = 1e9
CHOSEN = "chosen"
BLUE, RED = "#4477aa", "#cc6677"
MOST_PROBES = 10
TOLERANCE = 0.02
# The same batch again differs in speed by about so much (standard deviation).
NOISE = 0.01
# The choice holds for every slope this close to the fitted one.
STANDARD_ERRORS = 3
# Once noise may move a loss by no more than this, probing ends.
SURE = 0.01
# Batches slower than this share of the best are too small for the line through the others.
NEAR_BEST = 0.8
# A larger batch below this share of the best is slower indeed, not by noise.
PAST_BEST = 0.95


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one batch; ``peak_bytes`` is all that the process had in use at its peak."""

    images_per_second: float
    peak_bytes: int


RunBatch = Callable[[int], Run]


@dataclass(frozen=True, slots=True)
class Probe:
    """A batch size that was tried; both figures are None if it ran out of memory.

    Each try is two runs: ``images_per_second`` is of the second, which no warm-up slows, and
    ``peak_bytes`` the larger of both. Over several tries it is the mean, and the largest.
    """

    batch_size: int
    images_per_second: float | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Tuning:
    """The choice, and what it rests on.

    ``limit_bytes`` is what this process may use, head-room taken off. A batch peaks at about
    ``base_bytes + image_bytes * batch_size``. ``probes`` are in the order of size.
    """

    batch_size: int
    images_per_second: float
    peak_bytes: int
    limit_bytes: int
    base_bytes: float
    image_bytes: float
    probes: tuple[Probe, ...]


def sizes(images_per_synset: int, most: int) -> list[int]:
    """List the batch sizes on the grid: a synset's divisors, then its multiples, up to ``most``.

    >>> sizes(10, 40)
    [1, 2, 5, 10, 20, 30, 40]
    """
    divisors = [size for size in range(1, images_per_synset) if images_per_synset % size == 0]
    multiples = range(images_per_synset, most + 1, images_per_synset)
    return [size for size in (*divisors, *multiples) if size <= most]


def search(run: RunBatch, images_per_synset: int, limit_bytes: int, most: int = 200) -> Tuning:
    """Find the smallest batch size within 2 % of the best speed that memory allows.

    It starts with one synset and goes, by doubles and halves, where a curve through all probes
    puts the choice. It ends when noise can no longer move the choice, or after ten probes.

    Raises:
        SdwnError: the card has no room for one image.
    """
    found = _Search(run, sizes(images_per_synset, most), limit_bytes)
    size: int | None = max(size for size in found.grid if size <= images_per_synset)
    while size is not None and found.probes < MOST_PROBES:
        found.probe(size)
        size = found.next_size()
    return found.tuning()


@dataclass(frozen=True, slots=True)
class _Try:
    size: int
    speed: float
    peak: int


@dataclass(slots=True)
class _Search:
    run: RunBatch
    grid: list[int]
    limit: int
    tries: list[_Try] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    @property
    def probes(self) -> int:
        return len(self.tries) + len(self.failed)

    @property
    def ceiling(self) -> float:
        """The smallest size known to be too large."""
        over = [one.size for one in self.tries if one.peak > self.limit]
        return min([*over, *self.failed], default=inf)

    @property
    def good(self) -> list[_Try]:
        # A size that once ran is out too if a smaller one fails later: the card is shared.
        return [one for one in self.tries if one.size < self.ceiling]

    def probe(self, size: int) -> None:
        try:
            first, second = self.run(size), self.run(size)
        except OutOfMemoryError:
            self.failed.append(size)
        else:
            peak = max(first.peak_bytes, second.peak_bytes)
            self.tries.append(_Try(size, second.images_per_second, peak))

    def next_size(self) -> int | None:
        """Say what to probe next; None if the choice is settled."""
        if not self.good:
            return self.smaller()
        tried = {one.size for one in self.good}
        if len(tried) == 1 and self.fitting()[-1] < 2 * max(tried):
            return self.neighbour(max(tried))
        curve = _curve(self.good)
        candidates = self.candidates(curve)
        choice = curve.choice(candidates)
        half, double = self.steps(curve, candidates)
        if choice not in tried:
            return min(max(choice, half), double)
        if curve.doubt(choice, candidates) <= SURE:
            return None
        # The ends of a line say most about its slope, and small batches cost least.
        return half if half < curve.sizes[0] else curve.rarer_end

    def smaller(self) -> int:
        """Go down by half; there is no way down from one image."""
        fewer = [size for size in self.grid if 2 * size <= self.ceiling]
        if not fewer:
            raise self.no_room()
        return fewer[-1]

    def neighbour(self, size: int) -> int | None:
        """Give memory its second point: the size below, which fits, else the one above."""
        below = [other for other in self.grid if other < size]
        above = [other for other in self.grid if size < other < self.ceiling]
        near = below[-1:] or above[:1]
        return near[0] if near else None

    def fitting(self) -> list[int]:
        """Sizes that ran, or that the line through all peaks says will fit."""
        base, image = _memory(self.tries)
        ran = max(one.size for one in self.good)
        return [
            size
            for size in self.grid
            if size < self.ceiling and (size <= ran or base + image * size <= self.limit)
        ]

    def candidates(self, curve: _Curve) -> list[int]:
        return [size for size in self.fitting() if curve.low < size < curve.high]

    def steps(self, curve: _Curve, candidates: list[int]) -> tuple[int, int]:
        """Say how far down and up the next probe may go; at least one size, if there is one."""
        bottom, top = curve.sizes[0], curve.sizes[-1]
        below = [size for size in candidates if size < bottom]
        above = [size for size in candidates if size > top]
        most = min(2 * top, (top + self.ceiling) / 2)
        half = min((s for s in below if 2 * s >= bottom), default=max(below, default=bottom))
        double = max((s for s in above if s <= most), default=min(above, default=top))
        return half, double

    def tuning(self) -> Tuning:
        if not self.good:
            raise self.no_room()
        curve = _curve(self.good)
        candidates = self.candidates(curve)
        tried = [size for size in candidates if size in curve.sizes]
        choice = curve.choice(candidates)
        size = min((size for size in tried if size >= choice), default=tried[-1])
        chosen = [one for one in self.good if one.size == size]
        base, image = _memory(self.tries)
        return Tuning(
            batch_size=size,
            images_per_second=_mean_speed(chosen),
            peak_bytes=max(one.peak for one in chosen),
            limit_bytes=self.limit,
            base_bytes=base,
            image_bytes=image,
            probes=self.summary(),
        )

    def summary(self) -> tuple[Probe, ...]:
        probes = {size: Probe(size, None, None) for size in self.failed}
        for size in {one.size for one in self.tries} - probes.keys():
            tries = [one for one in self.tries if one.size == size]
            probes[size] = Probe(size, _mean_speed(tries), max(one.peak for one in tries))
        return tuple(probes[size] for size in sorted(probes))

    def no_room(self) -> SdwnError:
        size = min([*self.failed, *(one.size for one in self.tries)])
        peak = max((one.peak for one in self.tries if one.size == size), default=0)
        found = "out of memory" if size in self.failed else f"a peak of {peak / GB:.1f} GB"
        return SdwnError(
            f"no room for a batch of {size}: expected at most {self.limit / GB:.1f} GB, found "
            f"{found}; free the card of other work, make smaller pictures, let the VAE decode "
            "them one by one (VAE slicing), or take a larger card"
        )


@dataclass(frozen=True, slots=True)
class _Curve:
    """Seconds an image takes, ``seconds + slope * (1 / size - middle)``, for sizes near the best.

    A batch takes a fixed time and a time for each image, so this is a line in 1 / size, and its
    slope the fixed time. ``steepest`` is what noise may have hidden. ``sizes`` are the fitted
    ones, in order; ``low`` and ``high`` the nearest outside, known to be slow.
    """

    sizes: tuple[int, ...]
    low: float
    high: float
    middle: float
    seconds: float
    slope: float
    steepest: float

    def loss(self, size: int, most: int, slope: float) -> float:
        """Share of speed that a size loses against the largest one."""
        seconds = self.seconds + slope * (1 / size - self.middle)
        return slope * (1 / size - 1 / most) / seconds

    def choice(self, candidates: Sequence[int]) -> int:
        most = candidates[-1]
        good = (s for s in candidates if self.loss(s, most, self.steepest) <= TOLERANCE)
        return next(good)

    def doubt(self, choice: int, candidates: Sequence[int]) -> float:
        """Say how much noise may move the loss of the size that the choice just beats."""
        beaten = max((size for size in candidates if size < choice), default=choice)
        worst, likely = (
            self.loss(beaten, candidates[-1], slope) for slope in (self.steepest, self.slope)
        )
        return worst - likely

    @property
    def rarer_end(self) -> int:
        return min((self.sizes[0], self.sizes[-1]), key=self.sizes.count)


def _curve(good: Sequence[_Try]) -> _Curve:
    speeds = {
        size: _mean_speed([one for one in good if one.size == size])
        for size in sorted({one.size for one in good})
    }
    fastest = max(speeds, key=speeds.__getitem__)
    low = [s for s in speeds if s < fastest and speeds[s] < NEAR_BEST * speeds[fastest]]
    high = [s for s in speeds if s > fastest and speeds[s] < PAST_BEST * speeds[fastest]]
    return _fitted(good, max(low, default=0), min(high, default=inf))


def _fitted(good: Sequence[_Try], low: float, high: float) -> _Curve:
    near = sorted((one for one in good if low < one.size < high), key=lambda one: one.size)
    sizes = tuple(one.size for one in near)
    x, y = 1 / np.array(sizes), np.array([1 / one.speed for one in near])
    middle, seconds = float(x.mean()), float(y.mean())
    slope, error = 0.0, inf
    if len(set(sizes)) > 1:
        slope, error = _slope(x - middle, y - seconds, NOISE * seconds)
    # No time is negative, neither a batch's fixed one nor an image's.
    most = seconds / middle
    slope = min(max(slope, 0.0), most)
    steepest = min(slope + STANDARD_ERRORS * error, most)
    return _Curve(sizes, low, high, middle, seconds, slope, steepest)


def _slope(x: NDArray[np.float64], y: NDArray[np.float64], noise: float) -> tuple[float, float]:
    """Fit y = slope * x, both centred; give the slope and its standard error."""
    spread = float(x @ x)
    slope = float(x @ y) / spread
    rest = y - slope * x
    # A few points may lie on a line by luck; far off it, they say that it is not one.
    scatter = max(noise, sqrt(float(rest @ rest) / max(len(x) - 2, 1)))
    return slope, scatter / sqrt(spread)


def _memory(tries: Sequence[_Try]) -> tuple[float, float]:
    """Fit peak = base + image * size, in bytes; from a single size, through the origin."""
    # Tried again at once, a size may peak lower; its highest peak is what it needs.
    peaks = dict(sorted((one.size, one.peak) for one in tries))
    if len(peaks) == 1:
        return 0.0, max(peak / size for size, peak in peaks.items())
    image, base = np.polyfit(list(peaks), list(peaks.values()), 1)
    return float(base), float(image)


def _mean_speed(tries: Sequence[_Try]) -> float:
    return float(np.mean([one.speed for one in tries]))


def table(tuning: Tuning) -> list[dict[str, object]]:
    """Give a row for each probe, for people to read; None where it ran out of memory."""
    best = max(
        probe.images_per_second
        for probe in tuning.probes
        if probe.images_per_second is not None and _note(tuning, probe) in ("", CHOSEN)
    )
    return [_row(tuning, probe, best) for probe in tuning.probes]


def _row(tuning: Tuning, probe: Probe, best: float) -> dict[str, object]:
    speed, peak = probe.images_per_second, probe.peak_bytes
    return {
        "batch size": probe.batch_size,
        "images/s": None if speed is None else float(f"{speed:.3g}"),
        "peak GB": None if peak is None else round(peak / GB, 2),
        "percent of best": None if speed is None else round(100 * speed / best, 1),
        "note": _note(tuning, probe),
    }


def _note(tuning: Tuning, probe: Probe) -> str:
    if probe.peak_bytes is None:
        return "out of memory"
    if probe.peak_bytes > tuning.limit_bytes:
        return "over the head-room"
    return CHOSEN if probe.batch_size == tuning.batch_size else ""


def plot(tuning: Tuning, title: str, path: Path, kind: str | None = None) -> None:
    """Draw speed and peak memory against batch size, as SVG or PNG, by default as the path says."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdwn", "font.size": 11}):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        figure.suptitle(title)
        speed, memory = figure.subplots(2, 1, sharex=True)
        _plot_speed(speed, tuning)
        _plot_memory(memory, tuning)
        for axes in (speed, memory):
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        figure.savefig(path, format=kind, metadata={"Date": None})


def _plot_speed(axes: Axes, tuning: Tuning) -> None:
    ran = [probe for probe in tuning.probes if probe.images_per_second is not None]
    speeds = [probe.images_per_second or 0.0 for probe in ran]
    axes.plot([probe.batch_size for probe in ran], speeds, "o-", color=BLUE)
    label = f"chosen: {tuning.batch_size}"
    axes.plot(tuning.batch_size, tuning.images_per_second, "o", color=RED, ms=10, label=label)
    axes.set_ylabel("images/s")
    axes.legend(frameon=False, loc="best")


def _plot_memory(axes: Axes, tuning: Tuning) -> None:
    ran = [probe for probe in tuning.probes if probe.peak_bytes is not None]
    failed = [probe.batch_size for probe in tuning.probes if probe.peak_bytes is None]
    peaks = [(probe.peak_bytes or 0) / GB for probe in ran]
    axes.plot([probe.batch_size for probe in ran], peaks, "o", color=BLUE)
    line = [0, max(probe.batch_size for probe in tuning.probes)]
    expected = [(tuning.base_bytes + tuning.image_bytes * size) / GB for size in line]
    axes.plot(line, expected, color=BLUE, linewidth=1)
    limit = tuning.limit_bytes / GB
    axes.axhline(limit, color=RED, linestyle="--", label=f"limit: {limit:.1f} GB")
    if failed:
        axes.plot(failed, [limit] * len(failed), "x", color=RED, label="out of memory")
    axes.plot(tuning.batch_size, tuning.peak_bytes / GB, "o", color=RED, ms=10)
    axes.set_xlabel("batch size")
    axes.set_ylabel("peak memory, GB")
    axes.legend(frameon=False, loc="best")
