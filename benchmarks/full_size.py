"""Stable Diffusion 1.4 at full size, weights random, through the real command line.

``python benchmarks/full_size.py [FOLDER]`` builds the model's exact architecture, plans, makes,
merges and verifies one image of it, and prints what was measured; FOLDER is kept and its model
reused. It shows that the real model loads, fits and runs, not what its pictures look like.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from safetensors import safe_open
from sdwn.models.full_size import save_full_size
from sdwn.releases.release import Release
from shared import Row, exactly, print_rows

# The safety checker's follows from its published files: 303,981,588 of 4 bytes, or of 2, and a
# header of 55 kB make their 1,215,981,830 and 608,018,440 bytes.
PUBLISHED = {
    "unet": 859_520_964,
    "vae": 83_653_863,
    "text_encoder": 123_060_480,
    "safety_checker": 303_981_588,
}

CONFIG = """\
catalog:
  name: closure
  only: [dog.n.01]
images_per_synset: 1
model:
  name: model
generation:
  height: 512
  width: 512
  num_inference_steps: 2
  precision: fp32
  safety_checker: true
storage:
  codec: webp
  images_per_shard: 1
"""


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def half_parameters(folder: Path) -> int:
    """Count the fp16 parameters that are on disk."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        total += sum(math.prod(one.get_shape()) for one in slices if one.get_dtype() == "F16")
    return total


class Stage(NamedTuple):
    """A command's time, and its answer."""

    seconds: float
    answer: dict[str, Any]


def sdwn(folder: Path, *arguments: object) -> Stage:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "sdwn", *map(str, arguments), "--json"]
    Console(stderr=True).print(escape(" ".join(command[1:])), style="dim", soft_wrap=True)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"sdwn {arguments[0]} ended with {done.returncode}: {done.stdout}")
    return Stage(time.perf_counter() - start, json.loads(done.stdout))


def adopt_orphans() -> None:
    """Let this process be told of the tasks that ``sdwn submit`` leaves behind."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def peak_memory() -> int:
    """Return the most that one process below this one ever held, in bytes.

    Linux counts what this process held when it started them as theirs; a task holds more.
    """
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def make_image(folder: Path) -> tuple[list[Row], Path]:
    """Plan, submit, merge and verify one image of the model; return what each took."""
    (folder / "config.yaml").write_text(CONFIG)
    # A new one each time: what is finished already would not be made again.
    work = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    run, release = work / "run", work / "release"
    cpus = len(os.sched_getaffinity(0))
    alone = ("--profile", "local", "--array-parallelism", 1, "--cpus-per-task", cpus)
    plan = sdwn(folder, "plan", "config.yaml", run)
    submit = sdwn(folder, "submit", run, *alone, "--wait", "--retries", 0)
    peak, least = peak_memory(), 4 * sum(PUBLISHED.values())
    merge = sdwn(folder, "merge", run, "--release", release)
    verify = sdwn(folder, "verify", release)
    rows = [
        Row("seconds, plan", f"{plan.seconds:.1f}"),
        Row("seconds, load and sample", f"{submit.seconds:.1f}"),
        Row("CPUs of the task", str(cpus)),
        Row("seconds, merge, verify", f"{merge.seconds + verify.seconds:.1f}"),
        Row("peak memory of the task", decimal(peak), f"> {decimal(least)}", peak > least),
        exactly("images verified", verify.answer["images"], 1),
        exactly("problems verify found", verify.answer["problems"], []),
    ]
    return rows, release


def image_rows(folder: Path) -> list[Row]:
    """Look at what the release holds."""
    release = Release(folder)
    row, (session,) = release.row(0), release.manifest.made_on
    pixels = np.asarray(release.image(0))
    spread = float(pixels.std())
    settings = (release.manifest.settings or {})["generation"]
    return [
        exactly("pipeline", session["pipeline"], "StableDiffusionPipeline"),
        exactly("scheduler", session["scheduler"], "PNDMScheduler"),
        exactly("precision", session["precision"], "fp32"),
        Row("steps", str(settings["num_inference_steps"])),
        Row("device", session["device"]),
        exactly("image", f"{row['synset']} {row['number']}", "dog.n.01 0"),
        exactly("its status", row["status"], "ok"),
        exactly("its shape", pixels.shape, (512, 512, 3)),
        Row("its deviation, of 255", f"{spread:.1f}", "> 1", spread > 1),
        Row(f"its bytes, {row['codec']}", f"{row['bytes']:,}"),
    ]


def model_rows(model: Path) -> list[Row]:
    """Count parameters and bytes in the files."""
    rows = [
        exactly(f"{name} parameters", f"{half_parameters(model / name):,}", f"{published:,}")
        for name, published in PUBLISHED.items()
    ]
    size = sum(path.stat().st_size for path in weight_files(model))
    return [*rows, Row("bytes of fp16 weights", f"{size:,}")]


def build_rows(model: Path) -> list[Row]:
    start = time.perf_counter()
    if not save_full_size(model, torch.device("cpu")):
        return [Row("seconds, building", "built before")]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        Row("seconds, building", f"{seconds:.1f}"),
        Row("peak memory of building", decimal(peak)),
    ]


def check(folder: Path) -> int:
    """Do all of it in a folder and return the exit code."""
    model = folder / "model"
    rows = [*build_rows(model), *model_rows(model)]
    made, release = make_image(folder)
    rows += [*made, *image_rows(release)]
    wrong = print_rows(rows, "Stable Diffusion 1.4, random weights")
    if wrong:
        Console(stderr=True).print(f"not as expected: {', '.join(wrong)}", style="red")
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    adopt_orphans()
    if arguments:
        folder = Path(arguments[0]).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return check(folder)
    with tempfile.TemporaryDirectory(prefix="sdwn-full-size-") as name:
        return check(Path(name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
