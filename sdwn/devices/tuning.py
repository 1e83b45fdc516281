"""Search for a device's best batch size, by doubling; an argument runs a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import linear_regression
from typing import Protocol

from sdwn.errors import OutOfMemoryError, SdwnError

log = logging.getLogger(__name__)

GB = 1e9
MOST_IMAGES = 200
MOST_PROBES = 10
# Speeds this close count as the same: of such sizes the smallest is taken, for a kill costs the
# batch under way, and probing ends once two doublings together gain no more. One doubling alone
# says little, for the same batch again differs in speed by about as much.
TOLERANCE = 0.01
BLUE, RED = "#4477aa", "#cc6677"


class Memory(Protocol):
    """The memory that batches run in: a Device's, or a made-up card's."""

    @property
    def limit_bytes(self) -> int:
        """The most that may be in use during a batch."""

    @property
    def peak_bytes(self) -> int:
        """The most that was in use since :meth:`forget_peak`."""

    def forget_peak(self) -> None:
        """Begin to look for a new peak."""

    def release(self) -> None:
        """Return what no tensor holds."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A batch size that was tried; both figures are None if it ran out of memory.

    It runs twice: ``images_per_second`` is of the second run, which no warm-up slows, and
    ``peak_bytes`` the largest of both.
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


def batch_sizes(images_per_synset: int, most: int) -> list[int]:
    """List the batch sizes on the grid: a synset's divisors, then its multiples, up to ``most``.

    >>> batch_sizes(10, 40)
    [1, 2, 5, 10, 20, 30, 40]
    """
    divisors = [size for size in range(1, images_per_synset) if images_per_synset % size == 0]
    multiples = range(images_per_synset, most + 1, images_per_synset)
    return [size for size in (*divisors, *multiples) if size <= most]


def tune(
    run_batch: Callable[[int], float],
    memory: Memory,
    images_per_synset: int,
    most: int = MOST_IMAGES,
) -> Tuning:
    """Double the batch, from one synset on, until memory ends or the gain stops.

    Where one synset has no room, batches are halved first. Of what was tried, the smallest size
    within 1 % of the best speed is chosen.

    Args:
        run_batch: runs a batch of so many images and returns its seconds, or raises
            OutOfMemoryError.
        memory: where batches run.
        images_per_synset: sizes are multiples of it, or equal parts.
        most: the largest batch to try.

    Raises:
        SdwnError: there is no room for one image.
    """
    grid, limit = batch_sizes(images_per_synset, most), memory.limit_bytes
    probes, fitting, ceiling = list[Probe](), list[tuple[int, float, int]](), inf
    size: int | None = max(size for size in grid if size <= images_per_synset)
    while size is not None and len(probes) < MOST_PROBES:
        probe = _probe(run_batch, memory, size)
        probes.append(probe)
        if probe.peak_bytes is None or probe.images_per_second is None or probe.peak_bytes > limit:
            ceiling = size
        else:
            fitting.append((size, probe.images_per_second, probe.peak_bytes))
        if not fitting:
            options = [size for size in grid if 2 * size <= ceiling]
        elif len(fitting) > 2 and fitting[-1][1] < (1 + TOLERANCE) * fitting[-3][1]:
            break
        else:
            options = [size for size in grid if fitting[-1][0] < size <= 2 * fitting[-1][0]]
            options = [size for size in options if size < ceiling]
            # A single peak does not show how memory grows.
            if len(fitting) > 1:
                base, image = _memory_line(probes)
                options = [size for size in options if base + image * size <= limit]
        size = max(options, default=None)
    probes.sort(key=lambda probe: probe.batch_size)
    if not fitting:
        peak = probes[0].peak_bytes
        found = "out of memory" if peak is None else f"a peak of {peak / GB:.1f} GB"
        raise SdwnError(
            f"no room for a batch of {probes[0].batch_size}: expected at most "
            f"{limit / GB:.1f} GB, found {found}; free the card of other work, make smaller "
            "pictures, let the VAE decode them one by one (VAE slicing), or take a larger card"
        )
    best = max(speed for _, speed, _ in fitting)
    chosen = next(one for one in fitting if one[1] >= (1 - TOLERANCE) * best)
    return Tuning(*chosen, limit, *_memory_line(probes), tuple(probes))


def _probe(run_batch: Callable[[int], float], memory: Memory, size: int) -> Probe:
    memory.forget_peak()
    try:
        _, seconds = run_batch(size), run_batch(size)
    except OutOfMemoryError as error:
        reason = str(error)
    else:
        log.info("%d images a batch: %.2f images/s", size, size / seconds)
        return Probe(size, size / seconds, memory.peak_bytes)
    # Outside the handler, whose exception keeps the batch's memory.
    memory.release()
    log.info("%d images a batch: %s", size, reason)
    return Probe(size, None, None)


def _memory_line(probes: Sequence[Probe]) -> tuple[float, float]:
    """Fit peak = base + image * size, in bytes; from a single size, through the origin."""
    peaks = {p.batch_size: p.peak_bytes for p in probes if p.peak_bytes is not None}
    if len(peaks) == 1:
        return 0.0, next(peak / size for size, peak in peaks.items())
    image, base = linear_regression(list(peaks), list(peaks.values()))
    return base, image


def tuning_table(tuning: Tuning) -> list[dict[str, object]]:
    """Return a row for each probe, for people to read; None where it ran out of memory."""
    limit = tuning.limit_bytes
    best = max(
        probe.images_per_second
        for probe in tuning.probes
        if probe.images_per_second and probe.peak_bytes and probe.peak_bytes <= limit
    )
    rows: list[dict[str, object]] = []
    for probe in tuning.probes:
        speed, peak = probe.images_per_second, probe.peak_bytes
        note = "chosen" if probe.batch_size == tuning.batch_size else ""
        if peak is None or speed is None:
            row: dict[str, object] = dict.fromkeys(("images/s", "peak GB", "percent of best"))
            note = "out of memory"
        else:
            row = {"images/s": float(f"{speed:.3g}"), "peak GB": round(peak / GB, 2)}
            row["percent of best"] = round(100 * speed / best, 1)
            note = "over the head-room" if peak > limit else note
        rows.append({"batch size": probe.batch_size, **row, "note": note})
    return rows


def draw_tuning(tuning: Tuning, title: str, path: Path, kind: str | None = None) -> None:
    """Plot speed and peak memory against batch size, as SVG or PNG, by default as the path says."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ran = [probe for probe in tuning.probes if probe.peak_bytes is not None]
    failed = [probe.batch_size for probe in tuning.probes if probe.peak_bytes is None]
    sizes, limit = [probe.batch_size for probe in ran], tuning.limit_bytes / GB
    line = [0, tuning.probes[-1].batch_size]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdwn", "font.size": 11}):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        figure.suptitle(title)
        speed, memory = figure.subplots(2, 1, sharex=True)
        speed.plot(sizes, [probe.images_per_second or 0.0 for probe in ran], "o-", color=BLUE)
        label = f"chosen: {tuning.batch_size}"
        speed.plot(tuning.batch_size, tuning.images_per_second, "o", color=RED, ms=10, label=label)
        speed.set_ylabel("images/s")
        memory.plot(sizes, [(probe.peak_bytes or 0) / GB for probe in ran], "o", color=BLUE)
        expected = [(tuning.base_bytes + tuning.image_bytes * size) / GB for size in line]
        memory.plot(line, expected, color=BLUE, linewidth=1)
        memory.axhline(limit, color=RED, linestyle="--", label=f"limit: {limit:.1f} GB")
        if failed:
            memory.plot(failed, [limit] * len(failed), "x", color=RED, label="out of memory")
        memory.plot(tuning.batch_size, tuning.peak_bytes / GB, "o", color=RED, ms=10)
        memory.set(xlabel="batch size", ylabel="peak memory, GB")
        for axes in (speed, memory):
            axes.legend(frameon=False, loc="best")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        figure.savefig(path, format=kind, metadata={"Date": None})
