"""Every file and folder name: of runs, releases, evaluations, caches and shipped configs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdwn.errors import UsageError

# The variable that names a folder of the node's own disk, to copy weights to once.
STAGE_VARIABLE = "SDWN_STAGE_WEIGHTS"
# Notes of a task that status shows.
LOWERED = ".lowered.txt"  # a smaller batch, for memory ran out
CHANGED = ".changed.txt"  # other code than when it was submitted
NO_GPU = ".no-gpu.txt"  # none is found though one was given
WAITED = ".waited.txt"  # a disk failed for a while
NOTES = {"lowered": LOWERED, "changed_code": CHANGED, "without_gpu": NO_GPU, "waited": WAITED}

# What is measured from features, each in a folder of this name below evaluations.
Measured = Literal["measures", "transfer", "duplicates"]

# As RunPaths writes them: five digits, or more without a leading zero.
SHARD_NUMBER = re.compile(r"[0-9]{5}|[1-9][0-9]{5,8}")
TASK_NAME = re.compile(r"(?P<job>[^.]+)\.(?P<rank>[0-9]+)(\.r(?P<start>[0-9]+))?\.json")
# What a task leaves when it starts again, and when it has loaded its model.
RESTART_NAME = re.compile(r"(?P<job>[^.]+)\.[0-9]+\.r(?P<start>[0-9]+)\.(json|started\.txt)")
PIECE_NAME = re.compile(r"([0-9]{6,9})-([0-9]{6,9})\.h5")


def cache_folder() -> Path:
    """Return the user's cache: ``$SDWN_CACHE``, ``$XDG_CACHE_HOME/sdwn`` or ``~/.cache/sdwn``."""
    if named := os.environ.get("SDWN_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdwn"


class _Below:
    """A file or folder of a fixed name below the ``root`` of the object that it is read from."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, paths: Any, owner: type) -> Path:
        return Path(paths.root, self.name)


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of a run folder, or of an evaluation's work, whose shards are tables."""

    root: Path
    shard_suffix: str = ".h5"

    plan = _Below("plan.json")  # settings, digests, counts
    concepts = _Below("concepts.parquet")  # concepts, prompts, the user's own columns
    synsets = _Below("synsets.csv")  # the concepts of a plan of version 1
    taxonomy = _Below("taxonomy.parquet")  # what is above the synsets and ImageNet's classes
    lock = _Below("lock.json")  # which weights the images are made with
    shards = _Below("shards")  # finished shards
    pieces = _Below("pieces")  # partial shards, a folder for each shard
    jobs = _Below("jobs")  # submitit's script, pickles and logs of each job
    tasks = _Below("tasks")  # what each process of a task wrote about itself
    submissions = _Below("submissions.jsonl")  # the journal, a JSON object a line
    submitting = _Below(".submitting.lock")  # held by the command that submits
    release = _Below("release")  # where `sdwn run` and `submit --then merge` put the release
    # Only in the folder of a pilot, a tuning or a check of a node:
    question = _Below("question.json")  # until the answer was read
    speed = _Below("speed.json")  # of the pilot's device
    answers = _Below("answers.json")  # of the pilot about the run, or what a node found
    contact_sheet = _Below("contact-sheet.png")  # the pilot's images in one
    # Only in the folder of a sweep, beside its cells' runs:
    sweep = _Below("sweep.json")  # the cells, and what differs in them
    comparison = _Below("comparison")  # by `sdwn compare`

    @property
    def pilot(self) -> RunPaths:
        """Folder of the small run that ``sdwn pilot`` makes."""
        return RunPaths(self.root / "pilot")

    @property
    def node_check(self) -> RunPaths:
        """Folder of the job of ``sdwn doctor --probe``."""
        return RunPaths(self.root / "probe")

    def shard(self, index: int) -> Path:
        """Return a finished shard's path."""
        return self.shards / f"{index:05d}{self.shard_suffix}"

    def shard_pieces(self, index: int) -> Path:
        """Return the folder of a shard's partial shards."""
        return self.pieces / f"{index:05d}"

    def piece(self, index: int, start: int, stop: int) -> Path:
        """Return the path of a partial shard: images ``start`` up to ``stop`` of the shard."""
        return self.shard_pieces(index) / f"{start:06d}-{stop:06d}.h5"

    def task(self, job: str, rank: int, start: int = 0) -> Path:
        """Return the path of a process's record, of a task that was requeued ``start`` times."""
        return self.tasks / f"{job}.{rank}{f'.r{start}' if start else ''}.json"

    def task_names(self) -> set[str]:
        """List the names of what tasks wrote about themselves: records and notes."""
        return _names(self.tasks)

    def note(self, job: str, rank: int, kind: str) -> Path:
        """Return a process's note: ``LOWERED``, ``CHANGED``, ``NO_GPU`` or ``WAITED``."""
        return self.tasks / f"{job}.{rank}{kind}"

    def done_shards(self) -> set[int]:
        """List the finished shards, from their names alone."""
        tables = (name for name in _names(self.shards) if name.endswith(self.shard_suffix))
        numbers = (name.removesuffix(self.shard_suffix) for name in tables)
        return {int(number) for number in numbers if SHARD_NUMBER.fullmatch(number)}

    def piece_ranges(self, index: int) -> list[tuple[int, int]]:
        """List the image ranges of a shard's partial shards, from their names alone."""
        matches = (PIECE_NAME.fullmatch(name) for name in _names(self.shard_pieces(index)))
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def started_shards(self) -> list[int]:
        """List the shards that have partial shards."""
        return sorted(int(name) for name in _names(self.pieces) if SHARD_NUMBER.fullmatch(name))

    @property
    def begun(self) -> bool:
        """True once there are images."""
        return bool(self.done_shards() or self.started_shards())


@dataclass(frozen=True, slots=True)
class ReleasePaths:
    """The files of a release folder."""

    root: Path

    manifest = _Below("manifest.json")  # what the release holds, and from where
    metadata = _Below("metadata.parquet")  # a row an image
    synsets = _Below("synsets.csv")  # the plan's table of synsets, of version 1
    taxonomy = _Below("taxonomy.parquet")  # what is above them and ImageNet's classes
    missing = _Below("missing.csv")  # the synsets that an unfinished run had not made
    skipped = _Below("skipped.csv")  # files that an import left out, and why
    card = _Below("README.md")  # the dataset card
    sums = _Below("SHA256SUMS")  # checksums as ``sha256sum -c`` reads them
    evaluations = _Below("evaluations")  # everything that is computed later

    @property
    def name(self) -> str:
        """The folder's name; of one that is called release, in its run's folder, the run's."""
        folder = self.root.resolve()
        return folder.parent.name if folder.name == "release" else folder.name

    def concepts(self, number: int) -> Path:
        """Return the path of the concepts of a release's plan."""
        return self.root / f"concepts{f'-{number}' if number else ''}.parquet"

    def part(self, number: int) -> Path:
        """Return the path of a part of the images."""
        return self.root / f"images-{number:05d}.h5"

    def evaluation(self, name: str) -> EvaluationPaths:
        """Return the files of the evaluation of this name."""
        return EvaluationPaths(self.evaluations / name)

    def features(self, name: str) -> ResultPaths:
        """Return the files of the features of this name."""
        return ResultPaths(self.evaluations / "features" / name)

    def measured(self, kind: Measured, name: str) -> MeasurePaths:
        """Return the files of what was measured from features, and is called so."""
        return MeasurePaths(self.evaluations / kind / name)


@dataclass(frozen=True, slots=True)
class ResultPaths:
    """The files of what was computed of a release, or of several, in a folder of its own."""

    root: Path

    features = _Below("features.parquet")  # a row an image, by one encoder
    earlier = _Below("earlier.parquet")  # rows of the release that this one was made from
    references = _Below("references.bib")  # what is to be cited

    @property
    def work(self) -> RunPaths:
        """Folder of the plan of predictions or features, shards, jobs and their journal."""
        return work_paths(self.root / "work")

    def table(self, name: str, extension: str = "csv") -> Path:
        """Return the path of a table, such as figures, classes or groups; tex is for LaTeX."""
        return self.root / f"{name}.{extension}"

    def figure(self, name: str, extension: str) -> Path:
        """Return the path of a figure for print, such as histogram or map: png, svg or pdf."""
        return self.root / "figures" / f"{name}.{extension}"


class EvaluationPaths(ResultPaths):
    """The files of one evaluation of a release."""

    predictions = _Below("predictions.parquet")  # a row a classified image
    evaluation = _Below("evaluation.json")  # the figures
    report = _Below("report.html")


class MeasurePaths(ResultPaths):
    """The files of what one command measured from features."""

    record = _Below("record.json")  # the figures
    scores = _Below("scores.parquet")  # those of each image
    page = _Below("page.html")


class ComparisonPaths(ResultPaths):
    """The files of a comparison of evaluations; of a sweep, its table ``cells`` has a row each."""

    comparison = _Below("comparison.json")  # the figures
    page = _Below("comparison.html")


def work_paths(root: Path) -> RunPaths:
    """Return the files of an evaluation's or features' work folder, whose shards are tables."""
    return RunPaths(root, ".parquet")


def release_above(folder: Path) -> Path:
    """Return the release that a folder of an evaluation or of features lies in, or was copied to.

    >>> [str(release_above(Path(f"/out/{x}"))) for x in ("evaluations/features/a/work", "copy")]
    ['/out', '/out']
    """
    above = folder.absolute().parents
    return next((one.parent for one in above if one.name == "evaluations"), above[0])


def _names(folder: Path) -> set[str]:
    if not folder.exists():  # a file there is an error
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


# A wheel carries the shipped files inside the package, a checkout has them at its top.
_SHIPPED = Path(__file__).resolve().parent / "_shipped"
_FOLDERS = {"config": "configs", "groups": "configs/groups", "profile": "slurm/profiles"}


def shipped_file(kind: Literal["config", "groups", "profile"], name: str) -> Path:
    """Find a config, profile or groups file: a user's, or one that is shipped, by its name."""
    path = Path(name)
    if path.is_file():
        return path
    top = _SHIPPED if _SHIPPED.is_dir() else _SHIPPED.parent.parent
    shipped = {path.stem: path for path in sorted(Path(top, _FOLDERS[kind]).glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    known = ", ".join(shipped)
    raise UsageError(f"no {kind} {name!r}: expected a file, or one of those shipped: {known}")
