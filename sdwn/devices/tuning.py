"""GPU profiles: the best batch size of a device for a workload, found by doubling, and kept.

::

    tune ──> Tuning: the choice and all that was tried ──> GpuProfile ──> CACHE/gpus/*.json, *.svg
                                                                              │
    find_profile: every later task of the same workload takes it <────────────┘
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import linear_regression, median
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from sdwn.batches import batch_sizes
from sdwn.config import Positive, RunConfig
from sdwn.devices.device import GB, HEAD_ROOM, Device
from sdwn.errors import IntegrityError, OutOfMemoryError, SdwnError
from sdwn.io import Format, OnMessage, atomic, ignore, reading, refuse_planted, write_text
from sdwn.paths import cache_folder

log = logging.getLogger(__name__)

MOST_IMAGES = 200
MOST_PROBES = 10
# Measured runs of each size, after one that warms up.
RUNS = 3
# Speeds this close count as the same. Of such sizes the smallest is taken: a kill costs the batch
# under way. No larger size is tried once two doublings together gain no more than this; one alone
# says little, for the speed of the same batch varies by about as much.
TOLERANCE = 0.005
BLUE, RED = "#4477aa", "#cc6677"

# Measured by `sdwn selftest` on an H200 with torch 2.11: Stable Diffusion 1.4 at 512x512 in fp16
# makes torch reserve 2.73 GB and 1.09 GB an image. Of the former its weights and the safety
# checker's are 2.49 GB; an image's live tensors are 0.403 GB, of which convolutions make copies.
WORKSPACE_BYTES = 0.24e9
RESERVED_FOR_LIVE = 1.09 / 0.403

# Version 1 had no runs of a probe; its files were named by a hash alone.
FORMAT = Format("sdwn-gpu-profile", 2, "tune again", {1: dict})

# Anybody may have written a file; a field that is not known is of a later version.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Speed = Annotated[float, Field(gt=0)]


# The search


@dataclass(frozen=True, slots=True)
class Probe:
    """A batch size that was tried; speed and peak are None if it ran out of memory.

    ``runs`` are the images a second of each run after the one that warms up.
    """

    __pydantic_config__ = STRICT

    batch_size: Positive
    images_per_second: Speed | None
    peak_bytes: int | None
    runs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuning:
    """The chosen batch size, and the measurements behind it.

    ``limit_bytes`` is what this process may use, head-room taken off. A batch peaks at about
    ``base_bytes + image_bytes * batch_size``. ``probes`` are in the order of size.
    """

    __pydantic_config__ = STRICT

    batch_size: Positive
    images_per_second: Speed
    peak_bytes: int
    limit_bytes: int
    base_bytes: float
    image_bytes: float
    probes: tuple[Probe, ...]


def tune(
    run_batch: Callable[[int], float],
    memory: Device,
    images_per_synset: int,
    most: int = MOST_IMAGES,
    on_step: OnMessage = ignore,
) -> Tuning:
    """Double the batch, from one synset on, until memory ends or the gain stops.

    Where one synset has no room, batches are halved until one has. Of the sizes that were tried,
    the smallest within 0.5 % of the best speed is chosen. ``run_batch`` runs a batch of a size and
    returns its seconds, or raises OutOfMemoryError; ``on_step`` gets "batch 20, 3 of 10".

    Raises:
        SdwnError: there is no room for one image.
    """
    grid, limit = batch_sizes(images_per_synset, most), memory.limit_bytes
    # Those that have room, as (size, speed, peak), and the last size that has none.
    probes, fitting, too_large = list[Probe](), list[tuple[int, float, int]](), inf
    size: int | None = max(size for size in grid if size <= images_per_synset)
    while size is not None and len(probes) < MOST_PROBES:
        on_step(f"batch {size}, {len(probes) + 1} of {MOST_PROBES}")
        memory.forget_peak()
        speed, peak, runs = None, None, list[float]()
        with suppress(OutOfMemoryError):
            run_batch(size)
            runs = [size / run_batch(size) for _ in range(RUNS)]
            speed, peak = median(runs), memory.peak_bytes
        probes.append(Probe(size, speed, peak, tuple(runs)))
        log.info("%d images a batch: %s", size, f"{speed:.2f} images/s" if speed else "no room")
        if speed is not None and peak is not None and peak <= limit:
            fitting.append((size, speed, peak))
        else:
            too_large = size
        if not fitting:
            options = [size for size in grid if 2 * size <= too_large]
        elif len(fitting) > 2 and fitting[-1][1] < (1 + TOLERANCE) * fitting[-3][1]:
            break  # two doublings gained nothing
        else:
            last = fitting[-1][0]
            options = [size for size in grid if last < size <= 2 * last and size < too_large]
            # A single peak does not show how memory grows.
            if len(fitting) > 1:
                base, image = _memory_line(probes)
                options = [size for size in options if base + image * size <= limit]
        size = max(options, default=None)
    probes.sort(key=lambda probe: probe.batch_size)
    if not fitting:
        least = probes[0].peak_bytes
        found = "out of memory" if least is None else f"a peak of {least / GB:.1f} GB"
        raise SdwnError(
            f"no room for a batch of {probes[0].batch_size}: expected at most "
            f"{limit / GB:.1f} GB, found {found}; free the card of other work, make smaller "
            "pictures, let the VAE decode them one by one (VAE slicing), or take a larger card"
        )
    best = max(speed for _, speed, _ in fitting)
    chosen = next(one for one in fitting if one[1] >= (1 - TOLERANCE) * best)
    return Tuning(*chosen, limit, *_memory_line(probes), tuple(probes))


def _memory_line(probes: Sequence[Probe]) -> tuple[float, float]:
    """Fit peak = base + image * size, in bytes; from a single size, through the origin."""
    peaks = {p.batch_size: p.peak_bytes for p in probes if p.peak_bytes is not None}
    if len(peaks) == 1:
        return 0.0, next(peak / size for size, peak in peaks.items())
    image, base = linear_regression(list(peaks), list(peaks.values()))
    return base, image


# What is kept


@dataclass(frozen=True, slots=True)
class Workload:
    """The work that a speed is valid for: the card, the model, and what an image costs.

    ``memory_gb`` is the card's, in whole GB of 10^9 bytes; ``revision`` the weights' own. A field
    that is added later gets a default, and stands neither in the key nor in the file where it
    has it: what was measured before then stays valid.
    """

    __pydantic_config__ = STRICT

    device: str
    memory_gb: int
    model: str
    revision: str
    precision: str
    height: int
    width: int
    guidance: bool
    channels_last: bool
    compile: Literal["blocks", "whole"] | bool
    torch: str
    placement: str = "gpu"
    options: str = ""


def run_workload(
    config: RunConfig, provenance: dict[str, Any], total_bytes: int, guided: bool
) -> Workload:
    """Describe a run's work on a device; ``guided``, each step predicts a second time."""
    generation = config.generation
    names = ("attention", "quantization", "options")
    later = {name: value for name in names if (value := getattr(generation, name))}
    return Workload(
        device=str(provenance["device"]),
        memory_gb=round(total_bytes / GB),
        model=config.model.name,
        revision=str(provenance.get("revision", "")),
        precision=generation.precision,
        height=generation.height,
        width=generation.width,
        guidance=guided,
        channels_last=generation.channels_last,
        compile=generation.compile,
        torch=str(provenance.get("torch", "")),
        placement="offload" if provenance.get("placement") == "offload" else "gpu",
        options=json.dumps(later, sort_keys=True) if later else "",
    )


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """A workload's tuning, as it is kept for later tasks.

    The batch size holds for any ``num_inference_steps`` and ``scheduler``, the speed for these.
    """

    __pydantic_config__ = STRICT

    workload: Workload
    vae_slicing: bool
    tuning: Tuning
    measured: str
    num_inference_steps: Positive | None = None
    scheduler: str | None = None

    @property
    def path(self) -> Path:
        """The file in this user's cache that it is kept in."""
        work = _PROFILE.dump_python(self, exclude_defaults=True)["workload"]
        key = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:8]
        words = (self.workload.device, Path(self.workload.model).name)
        card, model = (re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") for word in words)
        return cache_folder() / "gpus" / f"{card[:40]}_{model[:40]}_{key}.json"

    @property
    def curve(self) -> Path:
        """The path of its plot: speed and memory against batch size."""
        return self.path.with_suffix(".svg")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, with the paths of what is kept."""
        return {**asdict(self), "path": str(self.path), "curve": str(self.curve)}


_PROFILE = TypeAdapter(GpuProfile)


def store_profile(profile: GpuProfile) -> GpuProfile:
    """Keep what was measured for every later task of the same workload, with its curve."""
    write_profile(profile, profile.path)
    with atomic(profile.curve) as temporary:
        draw_tuning(profile, temporary)
    return profile


def write_profile(profile: GpuProfile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    content = FORMAT.head() | _PROFILE.dump_python(profile, mode="json", exclude_defaults=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def find_profile(work: Workload) -> GpuProfile | None:
    """Return what was measured last for a workload, in a file of any version; None if nothing."""
    found = [profile for profile in stored_profiles() if profile.workload == work]
    return max(found, key=lambda profile: profile.measured, default=None)


def stored_profiles() -> list[GpuProfile]:
    """Read all profiles that are kept; those that cannot be read are left out."""
    found = []
    for path in sorted((cache_folder() / "gpus").glob("*.json")):
        with suppress(IntegrityError):
            found.append(read_profile(path))
    return found


def read_profile(path: Path) -> GpuProfile:
    """Read a GPU profile; an IntegrityError if it is damaged, too new, or could be anybody's."""
    content = FORMAT.read(path)
    refuse_planted(path)
    with reading(path, FORMAT.remedy):
        own = {key: value for key, value in content.items() if key not in FORMAT.head()}
        return _PROFILE.validate_json(json.dumps(own))


def estimated_fit(
    activations: tuple[int, int], free_bytes: float, total_bytes: float, sliced: bool
) -> int:
    """Estimate how many images fit beside weights that are loaded already; 0 where not one does.

    ``activations`` are the live tensors of an image while the denoiser runs, and while the VAE
    does; ``free_bytes`` is the card's memory without the weights; ``sliced``, images are decoded
    one by one.

    >>> stable_diffusion = 137_000_000, 404_000_000
    >>> cards = (8, 11, 16, 24, 40, 80)
    >>> [estimated_fit(stable_diffusion, (gb - 2.49) * GB, gb * GB, False) for gb in cards]
    [4, 6, 10, 17, 30, 63]
    """
    denoising, decoding = (RESERVED_FOR_LIVE * size for size in activations)
    room = free_bytes - HEAD_ROOM * total_bytes - WORKSPACE_BYTES
    if sliced and decoding > room:
        return 0
    return max(0, int(room / max(1.0, denoising, 0.0 if sliced else decoding)))


# What is shown


def tuning_table(tuning: Tuning) -> list[dict[str, object]]:
    """Return a row for each size that was tried, for people to read; None: no room in memory."""
    rows = list[dict[str, object]]()
    for probe in tuning.probes:
        speed, peak, note = probe.images_per_second, probe.peak_bytes, ""
        if peak is None:
            note = "out of memory"
        elif peak > tuning.limit_bytes:
            note = "over the head-room"
        elif probe.batch_size == tuning.batch_size:
            note = "chosen"
        row = {"batch size": probe.batch_size, "images/s": speed and float(f"{speed:.3g}")}
        rows.append({**row, "peak GB": peak and round(peak / GB, 2), "note": note})
    return rows


def draw_tuning(profile: GpuProfile, path: Path) -> None:
    """Plot speed and peak memory against batch size, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    work, tuning = profile.workload, profile.tuning
    limit, slope = tuning.limit_bytes / GB, tuning.image_bytes / GB
    ran = [probe for probe in tuning.probes if probe.peak_bytes is not None]
    runs = [(probe.batch_size, run) for probe in ran for run in probe.runs]
    sizes = [probe.batch_size for probe in ran]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdwn", "font.size": 11}):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        figure.suptitle(f"{work.model}, {work.width}x{work.height}, {work.device}")
        speed, memory = figure.subplots(2, 1, sharex=True)
        speed.plot(sizes, [probe.images_per_second or 0.0 for probe in ran], "o-", color=BLUE)
        speed.plot(
            [size for size, _ in runs], [run for _, run in runs], "k_", ms=14, label="each run"
        )
        label = f"chosen: {tuning.batch_size}"
        speed.plot(tuning.batch_size, tuning.images_per_second, "o", color=RED, ms=10, label=label)
        memory.plot(sizes, [(probe.peak_bytes or 0) / GB for probe in ran], "o", color=BLUE)
        memory.axline((0, tuning.base_bytes / GB), slope=slope, color=BLUE, linewidth=1)
        memory.axhline(limit, color=RED, linestyle="--", label=f"limit: {limit:.1f} GB")
        memory.plot(tuning.batch_size, tuning.peak_bytes / GB, "o", color=RED, ms=10)
        speed.set(ylabel="images/s")
        memory.set(xlabel="batch size", ylabel="peak memory, GB", xlim=(0, None))
        for axes in (speed, memory):
            axes.legend(frameon=False, loc="best")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        figure.savefig(path, format="svg", metadata={"Date": None})
