"""Every file and folder name: of runs, releases, evaluations, caches and shipped configs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdwn.errors import UsageError

# Names a folder of the node's own disk that weights are copied to once.
STAGE_VARIABLE = "SDWN_STAGE_WEIGHTS"
# Notes of a task that status tells: out of memory, other code than when it was submitted, and
# no GPU though one was given, and a disk that failed for a while.
LOWERED = ".lowered.txt"
CHANGED = ".changed.txt"
NO_GPU = ".no-gpu.txt"
WAITED = ".waited.txt"

# As RunPaths writes them: five digits, or more without a leading zero.
SHARD_NUMBER = re.compile(r"[0-9]{5}|[1-9][0-9]{5,8}")
TASK_NAME = re.compile(r"(?P<job>[^.]+)\.(?P<rank>[0-9]+)(\.r(?P<start>[0-9]+))?\.json")
# What a task leaves when it starts again, and when it has loaded its model.
RESTART_NAME = re.compile(r"(?P<job>[^.]+)\.[0-9]+\.r(?P<start>[0-9]+)\.(json|started\.txt)")
PIECE_NAME = re.compile(r"([0-9]{6,9})-([0-9]{6,9})\.h5")


def cache_folder() -> Path:
    """Name the user's cache: ``$SDWN_CACHE``, ``$XDG_CACHE_HOME/sdwn``, or ``~/.cache/sdwn``."""
    if named := os.environ.get("SDWN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdwn"


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of a run folder; of an evaluation's work, whose shards are tables, too."""

    root: Path
    shard_suffix: str = ".h5"

    @property
    def plan(self) -> Path:
        """Settings, digests and counts."""
        return self.root / "plan.json"

    @property
    def synsets(self) -> Path:
        """The plan's table of synsets, prompts and shards."""
        return self.root / "synsets.csv"

    @property
    def lock(self) -> Path:
        """Which weights its images are made with."""
        return self.root / "lock.json"

    @property
    def shards(self) -> Path:
        """Folder of finished shards."""
        return self.root / "shards"

    @property
    def pieces(self) -> Path:
        """Folder of the pieces of unfinished shards."""
        return self.root / "pieces"

    @property
    def jobs(self) -> Path:
        """Folder of what submitit keeps of each job: script, pickles, logs."""
        return self.root / "jobs"

    @property
    def tasks(self) -> Path:
        """Folder of what each process of a task says of itself."""
        return self.root / "tasks"

    @property
    def pilot(self) -> RunPaths:
        """The small run that ``sdwn pilot`` makes."""
        return RunPaths(self.root / "pilot")

    @property
    def probe(self) -> RunPaths:
        """The folder of ``sdwn doctor --probe``'s job."""
        return RunPaths(self.root / "probe")

    @property
    def question(self) -> Path:
        """The question to a pilot or a tuning, in its own folder, until its answer is taken."""
        return self.root / "question.json"

    @property
    def token(self) -> Path:
        """What the login node writes for a compute node to see, in the probe's own folder."""
        return self.root / "token.txt"

    @property
    def speed(self) -> Path:
        """How fast the pilot's device was, in the pilot's own folder."""
        return self.root / "speed.json"

    @property
    def answers(self) -> Path:
        """What the pilot says of the run, or the probe of its node, in its own folder."""
        return self.root / "answers.json"

    @property
    def contact_sheet(self) -> Path:
        """The pilot's images as one picture."""
        return self.root / "contact-sheet.png"

    @property
    def submissions(self) -> Path:
        """Journal of submissions, a JSON object a line."""
        return self.root / "submissions.jsonl"

    @property
    def submitting(self) -> Path:
        """Held by the command that submits."""
        return self.root / ".submitting.lock"

    @property
    def release(self) -> Path:
        """Where ``sdwn run`` and ``submit --then merge`` put the release."""
        return self.root / "release"

    def shard(self, index: int) -> Path:
        """Name a finished shard."""
        return self.shards / f"{index:05d}{self.shard_suffix}"

    def shard_index(self, name: str) -> int | None:
        """Read a shard's index from its file's name; None if that is no finished shard's.

        >>> run = RunPaths(Path("run"))
        >>> run.shard_index("00012.h5"), run.shard_index(".00012.h5.tmp"), run.shard_index("12.h5")
        (12, None, None)
        """
        number = name.removesuffix(self.shard_suffix)
        return int(number) if number != name and SHARD_NUMBER.fullmatch(number) else None

    def shard_pieces(self, index: int) -> Path:
        """Name the folder of a shard's pieces."""
        return self.pieces / f"{index:05d}"

    def piece(self, index: int, start: int, stop: int) -> Path:
        """Name a piece: the images ``start`` up to ``stop`` of a shard."""
        return self.shard_pieces(index) / f"{start:06d}-{stop:06d}.h5"

    def task(self, job: str, rank: int, start: int = 0) -> Path:
        """Name the record of a process of a task that was requeued ``start`` times."""
        return self.tasks / f"{job}.{rank}{f'.r{start}' if start else ''}.json"

    def task_names(self) -> set[str]:
        """List what tasks wrote of themselves, by name: records and notes."""
        return _files(self.tasks)

    def note(self, job: str, rank: int, kind: str) -> Path:
        """Name a note of a process: ``LOWERED``, ``CHANGED``, ``NO_GPU`` or ``WAITED``."""
        return self.tasks / f"{job}.{rank}{kind}"

    def done_shards(self) -> set[int]:
        """List the finished shards, from their names alone."""
        found = map(self.shard_index, _files(self.shards))
        return {index for index in found if index is not None}

    def piece_ranges(self, index: int) -> list[tuple[int, int]]:
        """List the image ranges of a shard's pieces, from their names alone."""
        matches = (PIECE_NAME.fullmatch(name) for name in _files(self.shard_pieces(index)))
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def started_shards(self) -> list[int]:
        """List the shards that have a folder of pieces."""
        if not self.pieces.is_dir():
            return []
        names = (path.name for path in self.pieces.iterdir())
        return sorted(int(name) for name in names if SHARD_NUMBER.fullmatch(name))


@dataclass(frozen=True, slots=True)
class ReleasePaths:
    """The files of a release folder."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What the release holds, and from where."""
        return self.root / "manifest.json"

    @property
    def metadata(self) -> Path:
        """A row an image."""
        return self.root / "metadata.parquet"

    @property
    def synsets(self) -> Path:
        """The plan's table of synsets."""
        return self.root / "synsets.csv"

    @property
    def missing(self) -> Path:
        """The synsets that an unfinished run had not made."""
        return self.root / "missing.csv"

    @property
    def skipped(self) -> Path:
        """The files of an import that could not be taken, and why."""
        return self.root / "skipped.csv"

    @property
    def card(self) -> Path:
        """The dataset card."""
        return self.root / "README.md"

    @property
    def sums(self) -> Path:
        """Checksums as ``sha256sum -c`` reads them."""
        return self.root / "SHA256SUMS"

    @property
    def evaluations(self) -> Path:
        """Folder of everything derived later."""
        return self.root / "evaluations"

    def part(self, number: int) -> Path:
        """Name a numbered part."""
        return self.root / f"images-{number:05d}.h5"

    def evaluation(self, name: str) -> EvaluationPaths:
        """Name an evaluation's folder."""
        return EvaluationPaths(self.evaluations / name)


@dataclass(frozen=True, slots=True)
class EvaluationPaths:
    """The files of one evaluation of a release."""

    root: Path

    @property
    def predictions(self) -> Path:
        """A row a classified image."""
        return self.root / "predictions.parquet"

    @property
    def work(self) -> RunPaths:
        """Where images are judged: the plan of it, shards of predictions, jobs, their journal."""
        return work_paths(self.root / "work")

    @property
    def evaluation(self) -> Path:
        """The figures."""
        return self.root / "evaluation.json"

    def table(self, name: str) -> Path:
        """Name a table as CSV: figures, histogram, classes, groups, confusions or synsets."""
        return self.root / f"{name}.csv"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    def figure(self, name: str, extension: str) -> Path:
        """Name a figure for print: histogram, groups or map, as png or svg."""
        return self.root / "figures" / f"{name}.{extension}"


@dataclass(frozen=True, slots=True)
class ComparisonPaths:
    """The files of a comparison of evaluations."""

    root: Path

    @property
    def comparison(self) -> Path:
        """The figures."""
        return self.root / "comparison.json"

    @property
    def classes(self) -> Path:
        """A row a class."""
        return self.root / "classes.csv"

    @property
    def groups(self) -> Path:
        """A row a group and pair."""
        return self.root / "groups.csv"

    def figure(self, name: str, extension: str) -> Path:
        """Name a figure for print: histogram, groups or classes-N, as png or svg."""
        return self.root / "figures" / f"{name}.{extension}"

    @property
    def page(self) -> Path:
        """The page."""
        return self.root / "comparison.html"


def work_paths(root: Path) -> RunPaths:
    """Name the files of an evaluation's work folder, whose shards are tables."""
    return RunPaths(root, ".parquet")


def _files(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


_PACKAGE = Path(__file__).resolve().parent
# A wheel carries them inside the package, a checkout has them at its top.
_FOLDERS = {
    "config": (_PACKAGE / "_shipped/configs", _PACKAGE.parent / "configs"),
    "groups": (_PACKAGE / "_shipped/configs/groups", _PACKAGE.parent / "configs/groups"),
    "profile": (_PACKAGE / "_shipped/profiles", _PACKAGE.parent / "slurm/profiles"),
}


def shipped_file(kind: Literal["config", "groups", "profile"], name: str) -> Path:
    """Find a config, profile or groups file.

    Raises:
        UsageError: there is none; the shipped ones are listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = _shipped(kind)
    if name in shipped:
        return shipped[name]
    raise UsageError(
        f"no {kind} {name!r}: expected a file, or one of those shipped: {', '.join(shipped)}"
    )


def _shipped(kind: str) -> dict[str, Path]:
    for folder in _FOLDERS[kind]:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}
