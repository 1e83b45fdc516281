"""Speed as ratios against named peers, each pair measured in turn in one run.

``python benchmarks/bench.py [ROW ...]`` prints a table; figures are medians of whole processes.
Without a ROW it measures all, and how figures grow, and writes ``benchmarks/bench.md``.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from growth import growth_section
from rich.console import Console
from rich.table import Table
from shared import (
    PYTHON,
    machine_text,
    markdown,
    output_of,
    peak_mb,
    plan_made_up,
    script,
    write_shard,
)

from generation import IMAGES_A_TURN, PACED, REAL_TURNS, TINY_TURNS

ROUNDS = 3
PAGE = Path(__file__).with_suffix(".md")
TEXT = """\
# Speed against named peers

{machine}. Written by `make bench` in {minutes:.0f} minutes: each row is something this project does
and a named peer, run in turn. Figures are medians of whole processes, ratios medians of the pairs;
beside accelerate's loop, one process makes images in both ways, {turn} in turn, and the medians are
of {real} or {tiny} turns.

{table}

{growth}"""
PACKAGES = ("torch", "diffusers", "timm", "h5py", "pyarrow", "pillow", "nltk")

NLTK = """
from sdwn.wordnet.corpus import open_wordnet
reader = open_wordnet()._reader
top = reader.synset("object.n.01")
assert sum(1 for _ in top.closure(lambda synset: synset.hyponyms())) == 29580
"""


@dataclass(frozen=True)
class Row:
    """A thing measured, the peer it stands against, and the ratio to reach."""

    what: str
    peer: str
    to_reach: str
    pair: Callable[[Path], Sequence[float]]  # our figure and theirs
    rounds: int = ROUNDS
    warm: bool = True  # once before, and not counted: caches of files

    def reached(self, ratio: float) -> bool:
        """Return whether a ratio is on the right side of what is to be reached."""
        side, _, limit = self.to_reach.partition(" ")
        return ratio <= float(limit) if side == "<=" else ratio >= float(limit)


def plan_ours(folder: Path) -> None:
    target = Path(tempfile.mkdtemp(dir=folder))
    output_of(PYTHON, "-m", "sdwn", "plan", "paper", target / "run")


def plan_nltk(folder: Path) -> None:
    output_of(PYTHON, "-c", NLTK)


def make_finished(run: Path, shards: int = 50_000) -> None:
    """Write a run of which all but a few shards are there, as far as names and a journal tell."""
    from sdwn.generation.task import GENERATE
    from sdwn.jobs.journal import intend, settle
    from sdwn.jobs.profile import load_profile, split_into_arrays
    from sdwn.jobs.scheduler import job_ids
    from sdwn.jobs.submit import WorkOrder

    paths, plan = plan_made_up(run, shards * 10, shard=10)
    paths.tasks.mkdir()
    site = load_profile("local")
    slurm = site.model_copy(update={"executor": "slurm"})
    tasks = WorkOrder(paths, plan, {"generate": GENERATE}, slurm).tasks_for(range(shards))
    for number, (group, _) in enumerate(split_into_arrays(tasks, 1001, at_once=1)):
        ids = job_ids(str(number + 1), len(group))
        settle(paths, intend(paths, group, site), ids)
        for job in ids:
            paths.task(job, 0).touch()
    for shard in plan.shards[:-10]:
        paths.shard(shard.index).touch()


def make_shards(run: Path, shards: int = 8, images: int = 500, size: int = 400_000) -> None:
    """Write a run whose shards hold random bytes in place of images."""
    paths, plan = plan_made_up(run, shards * images, shard=images)
    random = np.random.default_rng(0)
    for shard in plan.shards:
        payloads = [random.bytes(size) for _ in range(images)]
        digests = [hashlib.sha256(payload).digest() for payload in payloads]
        write_shard(paths, plan, shard, payloads, digests)


def merge_peak(name: str) -> Callable[[Path], float]:
    """Merge one of two runs of the same bytes, and return the process's peak in MB."""

    def measure(folder: Path) -> float:
        found = peak_mb("merge", folder / name, "--release", folder / "peak")
        output_of("rm", "-r", folder / "peak")
        return found

    return measure


def merge_ours(folder: Path) -> None:
    output_of(PYTHON, "-m", "sdwn", "merge", folder / "run", "--release", folder / "release")
    output_of("rm", "-r", folder / "release")


def merge_cat(folder: Path) -> None:
    copy = folder / "copy"
    output_of("sh", "-c", f"cat {folder}/run/shards/*.h5 | tee {copy} | sha256sum && sync {copy}")
    output_of("rm", copy)


def timed(action: Callable[[Path], object]) -> Callable[[Path], float]:
    def measure(folder: Path) -> float:
        start = time.perf_counter()
        action(folder)
        return time.perf_counter() - start

    return measure


def in_turn(
    ours: Callable[[Path], float], theirs: Callable[[Path], float]
) -> Callable[[Path], Sequence[float]]:
    """Measure ours, then theirs."""
    return lambda folder: (ours(folder), theirs(folder))


def generation(name: str, figure: str = "figure") -> Callable[[Path], Any]:
    def measure(folder: Path) -> Any:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            return script("generation.py", name, own)[figure]

    return measure


def own_time(model: str) -> Callable[[Path], float]:
    images, _, images_per_second = PACED[model]
    return lambda _: images / images_per_second


def reading(name: str) -> Callable[[Path], float]:
    return lambda folder: script("reading.py", name, folder / "reading")["images_per_second"]


def loading(side: str, preset: str) -> Callable[[Path], float]:
    """Measure how fast images are prepared for a preset's model."""
    return lambda folder: script("input.py", side, preset, folder / "reading")["images_per_second"]


def browsing(name: str, figure: str = "ms") -> Callable[[Path], float]:
    return lambda folder: script("browsing.py", name, folder / "browsing")[figure]


def measuring(name: str, made: str = "measuring") -> Callable[[Path], float]:
    return lambda folder: script("measuring.py", name, folder / made)["figure"]


OWN_TIME = "the model's own time"
LOOP = "accelerate's documented loop"
HEAD = ("what", "ours", "peer", "theirs", "ratio", "to reach")

ROWS = {
    "plan": Row(
        "plan of 26,204 synsets, s",
        "NLTK loads and walks",
        "<= 1.1",
        in_turn(timed(plan_ours), timed(plan_nltk)),
        rounds=5,
    ),
    "merge": Row(
        "merge of 1.6 GB in 8 shards, s",
        "cat, tee, sha256sum, sync",
        "<= 1.0",
        in_turn(timed(merge_ours), timed(merge_cat)),
    ),
    "merge-memory": Row(
        "merge of 40,000 images, peak MB",
        "of 4,000, as many bytes",
        "<= 1.2",
        in_turn(merge_peak("many"), merge_peak("run")),
        rounds=1,
        warm=False,
    ),
    "read": Row(
        "random read from a release, images/s",
        "a folder of PNG files, Pillow",
        ">= 1.8",
        in_turn(reading("release"), reading("png")),
        rounds=9,
        warm=False,
    ),
    "input": Row(
        "input of efficientnet-lite0, images/s",
        "timm's loader, a folder of PNG files",
        ">= 1.5",
        in_turn(loading("release", "efficientnet-lite0"), loading("timm", "efficientnet-lite0")),
        rounds=5,
        warm=False,
    ),
    "features": Row(
        "features of efficientnet-lite0, images/s",
        "timm's loader and network, a folder of PNG files",
        ">= 1.0",
        in_turn(measuring("features", "reading"), measuring("timms", "reading")),
        rounds=5,
        warm=False,
    ),
    "neighbours": Row(
        "ten nearest of each of 262,040 vectors, s",
        "scikit-learn, all pairs (a 32nd of them, times 32)",
        "<= 0.5",
        in_turn(measuring("neighbours"), measuring("brute")),
        rounds=1,
        warm=False,
    ),
    "measure-memory": Row(
        "measure of 20,000 images and as many, peak MB",
        "their features as float32",
        "<= 6.0",
        in_turn(measuring("measure"), measuring("arrays")),
        rounds=1,
        warm=False,
    ),
    "busy": Row(
        "a model paced like an H100, s",
        OWN_TIME,
        "<= 1.02",
        in_turn(generation("paced"), own_time("paced")),
        rounds=1,
        warm=False,
    ),
    "few-steps": Row(
        "a few-step model, 26 images/s, four shards, s",
        OWN_TIME,
        "<= 1.05",
        in_turn(generation("few_steps"), own_time("few_steps")),
        rounds=1,
        warm=False,
    ),
    "generate": Row(
        "small XL pipeline, 256x256, images/s",
        LOOP,
        ">= 1.3",
        generation("real"),
        rounds=1,
        warm=False,
    ),
    "tiny": Row(
        "built-in random pipeline, 64x64, images/s",
        LOOP,
        ">= 1.0",
        generation("tiny"),
        rounds=1,
        warm=False,
    ),
    "start": Row(
        "start of a task: ten images, s",
        "the same in plain diffusers",
        "<= 1.1",
        in_turn(
            generation("start", "whole_seconds"), generation("start_diffusers", "whole_seconds")
        ),
        rounds=7,
        warm=False,
    ),
    "status": Row(
        "status of 50,000 shards, s",
        "ls -l of the same folders",
        "<= 1.5",
        in_turn(
            timed(lambda folder: output_of(PYTHON, "-m", "sdwn", "status", folder / "finished")),
            timed(
                lambda folder: output_of(
                    "ls", "-l", folder / "finished/shards", folder / "finished/tasks"
                )
            ),
        ),
    ),
    "browse": Row(
        "browse 262,040 images: start to first page, s (less than 2)",
        "NLTK loads and walks",
        "<= 0.8",
        in_turn(browsing("open", "seconds"), timed(plan_nltk)),
        warm=False,
    ),
    "search": Row(
        "search as one types, ms a letter",
        "SQLite's LIKE over the same texts",
        "<= 0.5",
        in_turn(browsing("search"), browsing("like")),
        warm=False,
    ),
    "tune": Row(
        "tuner: share of the best speed",
        "best of 500 simulated cards",
        ">= 0.98",
        in_turn(generation("tuner"), lambda _: 1.0),
        rounds=1,
        warm=False,
    ),
}


def prepare(folder: Path, names: set[str]) -> None:
    if names & {"merge", "merge-memory"}:
        make_shards(folder / "run")
    if "merge-memory" in names:
        make_shards(folder / "many", shards=80, size=40_000)
    if "status" in names:
        make_finished(folder / "finished")
    if names & {"browse", "search"}:
        output_of(PYTHON, Path(__file__).with_name("browsing.py"), "make", folder / "browsing")
    if names & {"read", "input", "features"}:
        (folder / "reading").mkdir()
        output_of(PYTHON, Path(__file__).with_name("reading.py"), "make", folder / "reading")
    if "measure-memory" in names:
        output_of(PYTHON, Path(__file__).with_name("measuring.py"), "make", folder / "measuring")


def measure(row: Row, folder: Path) -> tuple[float, float, float]:
    """Return the median of our figures, of theirs, and of their ratios."""
    if row.warm:
        row.pair(folder)
    pairs = [row.pair(folder) for _ in range(row.rounds)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ours, theirs, statistics.median(a / b for a, b in pairs)


def main(names: list[str]) -> None:
    began, machine, console = time.perf_counter(), machine_text(PACKAGES), Console()
    shown, lines = Table(*HEAD), []
    with tempfile.TemporaryDirectory(prefix="sdwn-bench-") as name:
        folder = Path(name)
        prepare(folder, set(names or ROWS))
        for row in (ROWS[name] for name in names or ROWS):
            ours, theirs, ratio = measure(row, folder)
            elapsed = time.perf_counter() - began
            console.print(f"{elapsed:.0f} s: {row.what}: {ratio:.3f}, {row.to_reach}", style="dim")
            figures = f"{ours:.4g}", row.peer, f"{theirs:.4g}", f"{ratio:.3f}", row.to_reach
            lines.append((row.what, *figures))
            shown.add_row(*lines[-1], style=None if row.reached(ratio) else "bold red")
        console.print(shown)
        if not names:
            growth = growth_section(folder)
            minutes = (time.perf_counter() - began) / 60
            table = markdown(HEAD, lines)
            PAGE.write_text(
                TEXT.format(
                    machine=machine,
                    minutes=minutes,
                    table=table,
                    growth=growth,
                    turn=IMAGES_A_TURN,
                    real=REAL_TURNS,
                    tiny=TINY_TURNS,
                )
            )


if __name__ == "__main__":
    main(sys.argv[1:])
