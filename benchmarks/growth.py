"""Figures of `make bench` at growing sizes of the work, drawn into ``benchmarks/growth.svg``.

``python benchmarks/growth.py`` prints the table alone.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from shared import PYTHON, markdown, output_of, peak_mb, plan_made_up, script, write_shard

SIZES = (100, 10_000, 1_000_000)
PICTURE = Path(__file__).with_suffix(".svg")
IMAGES_PER_SHARD = 1_000
SIDE = 8
PAYLOADS = [bytes([number]) * 3 * SIDE * SIDE for number in range(256)]
DIGESTS = [hashlib.sha256(payload).digest() for payload in PAYLOADS]
TEXT = """\
## How figures grow with the work

Images of {side}x{side} pixels, ten a synset, shards of {shard:,}: what is left is the work on their
records. Commands are whole processes, their start included. Beyond 20,000 images a part's rows are
the most that a merge holds; what grows then is the plan, by its synsets.

![Seconds and memory by the number of images](growth.svg)

{table}
"""


def figures(folder: Path, images: int) -> dict[str, float]:
    """Make a run and its release of so many images; return what was measured on the way."""
    run, release, found = folder / "run", folder / "release", dict[str, float]()
    began = time.perf_counter()
    size: dict[str, Any] = {"height": SIDE, "width": SIDE}
    paths, plan = plan_made_up(run, images, shard=IMAGES_PER_SHARD, generation=size)
    found["plan, written, s"] = time.perf_counter() - began
    for shard in plan.shards:
        chosen = [spec.seed % len(PAYLOADS) for spec in plan.specs(shard)]
        write_shard(
            *(paths, plan, shard),
            [PAYLOADS[i] for i in chosen],
            [DIGESTS[i] for i in chosen],
            **size,
        )
    began = time.perf_counter()
    output_of(PYTHON, "-m", "sdwn", "status", run)
    found["sdwn status, s"] = time.perf_counter() - began
    began = time.perf_counter()
    found["sdwn merge, peak MB"] = peak_mb("merge", run, "--release", release)
    found["sdwn merge, s"] = time.perf_counter() - began
    found["release opened, 100 images read, s"] = script("reading.py", "some", folder)["seconds"]
    found["search, ms a letter"] = script("browsing.py", "search", folder)["ms"]
    return found


def growth_section(folder: Path) -> str:
    """Measure all sizes, draw them, and return the section of the page."""
    measured = {}
    for images in SIZES:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            measured[images] = figures(Path(own), images)
    draw(measured)
    head = ("what", *(f"{images:,} images" for images in SIZES))
    rows = [[what, *(f"{measured[n][what]:.3g}" for n in SIZES)] for what in measured[SIZES[0]]]
    return TEXT.format(side=SIDE, shard=IMAGES_PER_SHARD, table=markdown(head, rows))


def draw(measured: dict[int, dict[str, float]]) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same figures give the same file; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "growth", "svg.fonttype": "none"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for what in measured[SIZES[0]]:
        name, _, unit = what.rpartition(", ")
        scale = 1000 if unit.startswith("ms") else 1
        values = [measured[images][what] / scale for images in SIZES]
        (right if unit == "peak MB" else left).plot(SIZES, values, marker="o", label=name)
    for axes, title in ((left, "seconds"), (right, "peak memory, MB")):
        axes.set(xscale="log", xlabel="images", title=title)
        axes.legend(frameon=False, fontsize="small")
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="sdwn-growth-") as name:
        Console().print(Markdown(growth_section(Path(name))))
