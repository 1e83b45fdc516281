"""The plan of a judging: which images of a release, by which classifier, cut into shards."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.config import EvaluationConfig, validated
from sdwn.errors import IntegrityError, SdwnError, UsageError, command, shell
from sdwn.io import file_sha256, read_json, refuse_links, write_text
from sdwn.paths import EvaluationPaths, RunPaths, work_paths
from sdwn.planning.plan import Shard

if TYPE_CHECKING:
    from sdwn.releases.release import Release

FORMAT = "sdwn-judging"
FORMAT_VERSION = 1
# Under a minute of an A100 with the paper's classifier: so much a killed task loses.
IMAGES_PER_SHARD = 2048


@dataclass(frozen=True)
class Judging:
    """Everything that decides which predictions come out, and how they are dealt out.

    ``release`` is its digest, ``images`` how many of it are judged. ``chosen`` also says what
    figures to make of them.
    """

    release: str
    chosen: EvaluationConfig
    checkpoint_sha256: str | None
    images: int
    images_per_shard: int

    @property
    def stage(self) -> str:
        """What its shards are made by."""
        return "judge"

    @property
    def name(self) -> str:
        """The evaluation's own: of the model, the weights if they are a user's, the images."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.chosen.model).strip(".")
        weights = f"-{self.checkpoint_sha256[:8]}" if self.checkpoint_sha256 else ""
        return name + weights + "-all" * (self.chosen.images == "all")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what decides the predictions; how they are cut into shards does not."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "release": self.release,
            "model": self.chosen.model,
            "checkpoint_sha256": self.checkpoint_sha256,
            "selection": self.chosen.images,
            "images": self.images,
        }

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, by rows of the judged images, in order; the last may be shorter."""
        size = self.images_per_shard
        starts = range(0, self.images, size)
        return tuple(
            Shard(index, start, min(start + size, self.images))
            for index, start in enumerate(starts)
        )

    @property
    def own_shards(self) -> tuple[Shard, ...]:
        """All of them: a judging has no slices."""
        return self.shards

    @property
    def own_images(self) -> int:
        """Number of judged images."""
        return self.images

    def shard_images(self, shard: Shard) -> int:
        """Count a shard's images."""
        return shard.stop - shard.start

    def done(self, paths: RunPaths) -> set[int]:
        """List the finished shards; all are, once the predictions lie in one file."""
        from sdwn.prediction.predictions import judging_of

        if judging_of(evaluation_of(paths).predictions) == self.digest:
            return set(range(len(self.shards)))
        return paths.done_shards()

    def command(self, paths: RunPaths) -> str:
        """Give the command that evaluates like this."""
        chosen = self.chosen
        words: list[object] = ["--model", chosen.model]
        for name in ("checkpoint", "groups", "embedding"):
            if value := getattr(chosen, name):
                words += [f"--{name}", value]
        words += ["--all"] * (chosen.images == "all")
        return command("evaluate", release_of(paths), *words)


def evaluation_of(work: RunPaths) -> EvaluationPaths:
    """Name the evaluation that a work folder lies in."""
    return EvaluationPaths(work.root.absolute().parent)


def release_of(work: RunPaths) -> Path:
    """Name the release that a work folder lies in: wherever that was moved to."""
    return evaluation_of(work).root.parent.parent


def judged_images(release: Release, judging: Judging, shard: Shard | None = None) -> Release:
    """Take a judging's images of a release, or a shard's, in order."""
    chosen = release.subset(imagenet=True) if judging.chosen.images == "imagenet" else release
    return chosen if shard is None else chosen.subset(rows=range(shard.start, shard.stop))


def plan_judging(release: Release, chosen: EvaluationConfig) -> Judging:
    """Plan to judge a release.

    Raises:
        SdwnError: it has no such images.
        UsageError: there is no such checkpoint, or no such file of word vectors.
    """
    chosen = _with_absolute_paths(chosen)
    weights = file_sha256(chosen.checkpoint) if chosen.checkpoint else None
    planned = Judging(release.digest, chosen, weights, 0, IMAGES_PER_SHARD)
    images = len(judged_images(release, planned))
    if not images:
        raise SdwnError(
            f"{release.paths.root}: none of its synsets is an ImageNet-1k class; judge its images "
            "by the classes that lie near in WordNet with --all, or plan a catalog such as "
            "sdwn-26204 or imagenet-1k"
        )
    return replace(planned, images=images)


def _with_absolute_paths(chosen: EvaluationConfig) -> EvaluationConfig:
    """Make the files that are named findable by a task, which may start elsewhere."""
    groups = chosen.groups
    # What is no file here is the name of shipped groups.
    if groups is not None and Path(groups).is_file():
        groups = str(Path(groups).absolute())
    files = {
        "checkpoint": _absolute(chosen.checkpoint, "checkpoint file"),
        "embedding": _absolute(chosen.embedding, "file of word vectors"),
    }
    return chosen.model_copy(update={"groups": groups, **files})


def _absolute(path: Path | None, what: str) -> Path | None:
    if path is not None and not path.is_file():
        raise UsageError(f"{path}: no such {what}")
    return path and path.absolute()


def open_judging(release: Release, chosen: EvaluationConfig) -> tuple[RunPaths, Judging]:
    """Plan to judge a release, and write the plan into its folder; or go on with the same one.

    Raises:
        SdwnError: nothing is to be judged, or tasks of another judging live there.
        IntegrityError: a link among the evaluations would lead out of the release.
    """
    refuse_links(release.paths.evaluations)
    planned = plan_judging(release, chosen)
    work = release.paths.evaluation(planned.name).work
    if work.plan.exists():
        found = _readable(work)
        if found is None or found.digest != planned.digest:
            _clear(work)
        else:
            # What is finished was cut as that plan says.
            planned = replace(planned, images_per_shard=found.images_per_shard)
    write_text(work.plan, _text(planned))
    return work, planned


def _readable(work: RunPaths) -> Judging | None:
    try:
        return read_judging(work)
    except IntegrityError:
        return None


def _clear(work: RunPaths) -> None:
    """Remove what is left of another judging: of this release as it was before."""
    if live_tasks(work):
        raise SdwnError(
            f"{work.root}: tasks are live there that judge the release as it was before; "
            f"end them with: {command('cancel', work.root)}"
        )
    shutil.rmtree(work.root)


def _text(judging: Judging) -> str:
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "digest": judging.digest,
        "release": judging.release,
        "checkpoint_sha256": judging.checkpoint_sha256,
        "images": judging.images,
        "images_per_shard": judging.images_per_shard,
        "evaluation": judging.chosen.model_dump(mode="json"),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_judging(work: RunPaths) -> Judging:
    """Read the plan of a work folder, checked against its own digest.

    Raises:
        IntegrityError: there is none, it was altered, or is of a later version.
    """
    content = read_json(work.plan)
    version = content.get("format"), content.get("format_version")
    if version != (FORMAT, FORMAT_VERSION):
        raise IntegrityError(f"{work.plan}: expected {FORMAT} {FORMAT_VERSION}, found {version}")
    try:
        judging = Judging(
            release=str(content["release"]),
            chosen=validated(EvaluationConfig, content["evaluation"], source=str(work.plan)),
            checkpoint_sha256=content["checkpoint_sha256"],
            images=int(content["images"]),
            images_per_shard=int(content["images_per_shard"]),
        )
        sound = judging.digest == content["digest"] and judging.images_per_shard > 0
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise IntegrityError(f"{work.plan}: damaged: {error}; {_ADVICE}") from None
    if not sound:
        raise IntegrityError(f"{work.plan}: changed: its digest no longer fits; {_ADVICE}")
    return judging


_ADVICE = "evaluate the release again"


def is_work(folder: Path) -> bool:
    """Tell whether a folder is the work of an evaluation, and no run."""
    plan = work_paths(folder).plan
    return plan.exists() and read_json(plan).get("format") == FORMAT


def open_planned(work: RunPaths) -> tuple[Release, Judging]:
    """Open what a task works on: the plan, and the release that it was made for.

    Raises:
        IntegrityError: another release stands there now.
    """
    from sdwn.releases.release import Release

    judging, release = read_judging(work), Release(release_of(work))
    refuse_links(release.paths.evaluations)
    if release.digest != judging.release:
        raise IntegrityError(
            f"{release.paths.root}: expected the release {judging.release[:12]} that this was "
            f"planned for, found {release.digest[:12]}; {_ADVICE}: {judging.command(work)}"
        )
    return release, judging


def live_tasks(work: RunPaths) -> int:
    """Count the tasks of a work folder that still wait or run.

    Raises:
        SdwnError: the scheduler that they were given to does not answer.
    """
    from sdwn.jobs.live import live_jobs, unreachable  # what knows schedulers: seldom needed here

    live = live_jobs(work)
    if unreachable(live):
        raise SdwnError(
            f"{work.root}: SLURM does not say whether the tasks that were submitted for it still "
            f"run; ask where it answers, or, if none does, remove them: "
            f"{shell('rm', '-r', work.root)}"
        )
    return len(live)
