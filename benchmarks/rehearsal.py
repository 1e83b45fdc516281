"""The whole job on the test cluster: 26,204 synsets, 262,040 images, disturbed while it runs.

``python benchmarks/rehearsal.py`` plans ``configs/rehearsal.yaml``, submits it as arrays, lets
tasks be preempted and killed, a node be lost and the controller be away, then merges, verifies
and prints what it took; where all of it is as it must be, ``benchmarks/rehearsal.md`` says so too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disturbances import FEW, MANY, Disturber, Event, cluster, schedule
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from sdwn.jobs.task import TaskRecord, read_record
from sdwn.paths import RunPaths
from shared import Row, exactly, machine_text, markdown, output_of, print_rows

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "rehearsal.yaml"
PROFILE = HERE.parent / "slurm" / "profiles" / "testbed.yaml"
RESULT = HERE / "rehearsal.md"

SHARDS_PER_TASK = 4
# What is sampled goes to disk every second, and into the task's record after every batch.
ENVIRONMENT = {"SDWN_FLUSH_SECONDS": "1", "SDWN_REPORT_SECONDS": "0"}
# How SLURM says that a task was disturbed.
DISTURBED = ("PREEMPTED", "FAILED", "NODE_FAIL")
RETRIES = 20
MADE_AGAIN = 5
MINUTES = 45
TIMED = {"plan": "plan", "submit": "generation", "merge": "merge", "verify": "verify"}
PACKAGES = ("torch", "diffusers", "transformers", "h5py", "submitit")

IMAGES, SYNSETS = 262_040, 26_204

PAGE = """\
# The rehearsal: 262,040 images on a cluster that is disturbed

Written by `make rehearsal`: [configs/rehearsal.yaml](../configs/rehearsal.yaml), the paper's
catalog through the small built-in pipeline, planned, submitted as arrays to the
[test cluster](../slurm/testbed/README.md) of four nodes, disturbed while it ran, merged, verified.
The pictures are coloured blobs; what is rehearsed is that none of them is lost.

{machine}.

{measured}

*Images sampled* are the sum of what the tasks' own records say, which a task writes here after
every batch, at each start anew. *Work redone* is what of them is not in the release:
it was not yet on disk when its task died. The batch that was under way then is in no record; each
task that did not end by itself lost one of 100 images at most. What a task that starts again takes
to load the model is not counted; it is in the images/s. *Sampled again and equal*, by
`sdwn regenerate`, are images that a second or later attempt at their shard made. Peak memory is
the kernel's mark of the process.

## What happened

{events}
"""


@dataclass(frozen=True, slots=True)
class Form:
    """All of it, or a short trial of this script on the synsets below one."""

    below: str | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings that the plan overrides."""
        if self.below is None:
            return ()
        small = ("catalog.name=null", f"catalog.roots=[{self.below}]")
        return (*small, "storage.images_per_shard=200")

    @property
    def disturbances(self) -> dict[str, int]:
        """The number of disturbances of each kind."""
        return MANY if self.below is None else FEW

    def expected(self, whole: int, planned: int) -> int:
        """Return what the published dataset has, or of a trial what was planned."""
        return whole if self.below is None else planned


@dataclass(frozen=True, slots=True)
class Stage:
    """A command's answer, its time, and the most memory that it held."""

    answer: dict[str, Any]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The measurements of a rehearsal."""

    stages: dict[str, Stage]
    made_again: list[Stage]
    events: list[Event]
    records: list[TaskRecord]
    ends: Counter[str]
    release_bytes: int
    seconds: float

    @property
    def images(self) -> int:
        """Images planned."""
        return int(self.stages["plan"].answer["images"])

    @property
    def sampled(self) -> int:
        """Images that were sampled, kept or lost, in whole batches."""
        return sum(record.first_images + record.images for record in self.records)

    @property
    def redone(self) -> tuple[float, float]:
        """The share of images sampled more than once: in whole batches, and at most."""
        lost = self.sampled - self.images
        largest = max(record.batch_size for record in self.records)
        under_way = largest * (self.ends.total() - self.ends["COMPLETED"])
        return lost / self.images, (lost + under_way) / self.images


def say(text: str) -> None:
    Console(stderr=True).print(escape(text), style="dim", soft_wrap=True)


class Command:
    """A command of ``sdwn`` at work; its answer goes to a file, so that nobody has to read on."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        command = [sys.executable, "-m", "sdwn", *map(str, arguments), "--json"]
        say(" ".join(command[2:]))
        self._name, self._answer = str(arguments[0]), folder / f"{arguments[0]}.json"
        self._began = time.monotonic()
        with self._answer.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=folder, stdout=file)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.runs:
            self.process.terminate()
            self.process.wait()

    @property
    def runs(self) -> bool:
        """True while it is at work; it is left to :meth:`end` to learn how it ended."""
        if self.process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> Stage:
        """Wait for its end; the peak is the kernel's own mark of the process."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode:
            raise SystemExit(f"sdwn {self._name} ended with {self.process.returncode}")
        seconds = time.monotonic() - self._began
        return Stage(json.loads(self._answer.read_text()), seconds, usage.ru_maxrss * 1024)


def run(folder: Path, *arguments: object) -> Stage:
    with Command(folder, *arguments) as command:
        return command.end()


def site(folder: Path) -> Path:
    """Write the test cluster's profile, with this rehearsal's environment."""
    path = folder / "site.yaml"
    path.write_text(f"{PROFILE.read_text()}\nenvironment: {json.dumps(ENVIRONMENT)}\n")
    return path


def generate(
    folder: Path, disturber: Disturber, form: Form, shards: int
) -> tuple[Stage, list[Event]]:
    """Submit, and disturb until the last shard is finished."""
    paths = RunPaths(folder / "run")
    options = ("--shards-per-task", SHARDS_PER_TASK, "--wait", "--retries", RETRIES)
    events = list[Event]()
    with Command(folder, "submit", paths.root, "--profile", site(folder), *options) as submit:

        def progress() -> float | None:
            return len(paths.done_shards()) / shards if submit.runs else None

        for event in disturber.disturb(schedule(form.disturbances), progress):
            say(f"{event.seconds:5.0f} s, {event.progress:4.0%} done: {event.what}")
            events.append(event)
        return submit.end(), events


def rehearse(folder: Path, testbed: Path, form: Form) -> Rehearsal:
    """Do the whole job."""
    began = time.monotonic()
    paths, release = RunPaths(folder / "run"), folder / "release"
    planned = run(folder, "plan", CONFIG, paths.root, *(f"--set={one}" for one in form.overrides))
    disturber = Disturber(testbed, paths)
    submitted, events = generate(folder, disturber, form, planned.answer["shards"])
    stages = {
        "plan": planned,
        "submit": submitted,
        "status": run(folder, "status", paths.root),
        "merge": run(folder, "merge", paths.root, "--release", release),
        "verify": run(folder, "verify", release),
    }
    return Rehearsal(
        stages,
        list(made_again(folder, release)),
        events,
        [read_record(path) for path in sorted(paths.tasks.glob("*.json"))],
        ends(),
        sum(path.stat().st_size for path in release.rglob("*") if path.is_file()),
        time.monotonic() - began,
    )


def made_again(folder: Path, release: Path) -> Iterator[Stage]:
    """Sample some images again: of those that were not made at the first attempt, if there are."""
    from sdwn.releases.release import Release

    table = Release(release).metadata.select(["wnid", "number", "attempt"]).to_pylist()
    random.Random(0).shuffle(table)
    for row in sorted(table, key=lambda row: row["attempt"] == 1)[:MADE_AGAIN]:
        yield run(folder, "regenerate", release, row["wnid"], row["number"])


def ends() -> Counter[str]:
    """Count how tasks ended, as SLURM's accounting knows it; a requeued one ends more than once."""
    command = "sacct --noheader --allocations --parsable2 --duplicates --format=JobName,State"
    told = subprocess.run(command.split(), check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = (line.split("|") for line in told.splitlines() if line.strip())
    return Counter(state.split()[0] for name, state in rows if name.startswith("sdwn-"))


def result_rows(found: Rehearsal, form: Form) -> list[Row]:
    planned, verified = found.stages["plan"].answer, found.stages["verify"].answer
    equal = sum(stage.answer["verdict"] == "equal" for stage in found.made_again)
    statuses = found.stages["merge"].answer["statuses"]
    return [
        exactly("images verified", verified["images"], form.expected(IMAGES, found.images)),
        exactly("synsets", planned["synsets"], form.expected(SYNSETS, planned["synsets"])),
        exactly("problems that verify found", len(verified["problems"]), 0),
        exactly("images sampled again and equal", equal, MADE_AGAIN),
        Row("images by status", ", ".join(f"{n:,} {name}" for name, n in statuses.items() if n)),
    ]


def disturbance_rows(found: Rehearsal, form: Form) -> list[Row]:
    happened = Counter(event.kind for event in found.events)
    rows = [exactly(f"disturbances: {k}", happened[k], n) for k, n in form.disturbances.items()]
    restarts = found.stages["status"].answer["restarts"]
    redone, most = found.redone
    return [
        *rows,
        Row("tasks", tasks_text(found)),
        ends_row(found.ends, form),
        Row("restarts by SLURM", f"{restarts:,}", "> 0", restarts > 0),
        Row("images sampled", f"{found.sampled:,}", f">= {found.images:,}", redone >= 0),
        Row("work redone", f"{redone:.2%}, at most {most:.2%} with the batches under way"),
    ]


def ends_row(ends: Counter[str], form: Form) -> Row:
    """Return the row of how tasks ended; a trial's may end before they are hit."""
    told = ", ".join(f"{count} {end.lower()}" for end, count in ends.most_common())
    hit = all(ends[end] for end in DISTURBED) or form.below is not None
    return Row("ends of tasks", told, "some of each kind", hit)


def tasks_text(found: Rehearsal) -> str:
    jobs = found.stages["submit"].answer["job_ids"]
    first = math.ceil(found.stages["plan"].answer["shards"] / SHARDS_PER_TASK)
    arrays = len({job.partition("_")[0] for job in jobs})
    again = len(jobs) - first
    return f"{first}, and {again} submitted again, in {arrays} arrays"


def speed_rows(found: Rehearsal) -> list[Row]:
    generation = found.stages["submit"].seconds
    speeds = [speed for record in found.records if (speed := record.images_per_second)]
    rows = [Row(f"seconds, {t}", f"{found.stages[s].seconds:.0f}") for s, t in TIMED.items()]
    minutes = found.seconds / 60
    return [
        Row("images/s over the generation", f"{found.images / generation:.0f}"),
        Row("images/s of a task while it samples, median", f"{statistics.median(speeds):.0f}"),
        *rows,
        Row("minutes, all", f"{minutes:.1f}", f"< {MINUTES}", minutes < MINUTES),
    ]


def size_rows(found: Rehearsal) -> list[Row]:
    task = max(record.peak_bytes for record in found.records)
    size = found.release_bytes
    return [
        Row("peak memory of a task", decimal(task)),
        Row("peak memory of merge", decimal(found.stages["merge"].peak_bytes)),
        Row("size of the release", f"{decimal(size)}, {size / found.images:.0f} bytes an image"),
    ]


def page(rows: list[Row], events: list[Event], machine: str) -> str:
    """Write what stands in the repository."""
    shown = [[row.what, row.measured, row.expected] for row in rows]
    told = [[f"{e.seconds:.0f} s", f"{e.progress:.0%}", e.what] for e in events]
    return PAGE.format(
        machine=machine,
        measured=markdown(["what", "measured", "to be"], shown),
        events=markdown(["after", "of the shards done", "what happened"], told),
    )


def check(folder: Path, form: Form) -> int:
    """Do all of it in a folder and return the exit code."""
    os.environ.update(SDWN_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    with cluster() as testbed:
        machine = machine_text(PACKAGES, output_of("sinfo", "--version").strip())
        found = rehearse(folder, testbed, form)
    rows = [*result_rows(found, form), *disturbance_rows(found, form)]
    rows += [*speed_rows(found), *size_rows(found)]
    if wrong := print_rows(rows, "Rehearsal", machine):
        Console(stderr=True).print(f"not as expected: {', '.join(wrong)}", style="red")
        return 1
    if form.below is None:
        RESULT.write_text(page(rows, found.events, machine))
    return 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, help="an empty folder to work in, which is kept")
    parser.add_argument("--keep", action="store_true", help="keep the folder that is made for it")
    parser.add_argument(
        "--below", metavar="SYNSET", help="a short trial on the synsets below one, as bird.n.01"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    # What was started is stopped then, too.
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.alarm(2 * 60 * MINUTES)
    folder = options.dir or Path(tempfile.mkdtemp(prefix="sdwn-rehearsal-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return check(folder.resolve(), Form(options.below))
    except KeyboardInterrupt:
        return 130
    finally:
        if options.keep or options.dir:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
