"""The plan of predictions: which images of a release, by which classifier, cut into shards.

It lies in ``evaluations/NAME/work/plan.json`` of the release, beside the shards of predictions,
until these are merged.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sdwn.config import EvaluationConfig, Section, later_setting, validated
from sdwn.errors import IntegrityError, SdwnError, UsageError, command, shell
from sdwn.io import Format, file_sha256, read_json, refuse_links, write_text
from sdwn.paths import EvaluationPaths, RunPaths, work_paths
from sdwn.planning.plan import Shard

if TYPE_CHECKING:
    import pyarrow as pa

    from sdwn.releases.release import Release

FORMAT = Format(
    "sdwn-prediction-plan",
    2,
    "evaluate the release again",
    {1: lambda old: {**old, "format": "sdwn-prediction-plan", "format_version": 2}},
    former="sdwn-judging",
)
# Under a minute of an A100 with the paper's classifier: so much a killed task loses.
IMAGES_PER_SHARD = 2048


class PredictionPlan(Section):
    """Everything that decides which predictions come out, and how they are cut into shards.

    ``release`` is its digest, ``images`` how many of it are classified. ``evaluation`` also says
    what figures to make of them. The names are those of the file.
    """

    release: str
    checkpoint_sha256: str | None
    images: int
    images_per_shard: Annotated[int, Field(gt=0)]
    evaluation: EvaluationConfig
    class_names: tuple[str, ...] = later_setting(())  # where the classes are not ImageNet's

    @property
    def stage(self) -> str:
        """The stage that makes its shards."""
        return "judge"

    @property
    def name(self) -> str:
        """The evaluation's own: of the model, the weights if they are a user's, the images."""
        name = re.sub(r"^local-dir:(.*/)?|[^A-Za-z0-9._-]+", "-", self.evaluation.model).strip(".-")
        weights = f"-{self.checkpoint_sha256[:8]}" if self.checkpoint_sha256 else ""
        return name + weights + "-all" * (self.evaluation.images == "all")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what decides the predictions; how they are cut into shards does not."""
        identity = {
            "release": self.release,
            "model": self.evaluation.model,
            "checkpoint_sha256": self.checkpoint_sha256,
            "selection": self.evaluation.images,
            "images": self.images,
            **self.model_dump(include={"class_names"}),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, by rows of the classified images, in order; the last may be shorter."""
        starts = range(0, self.images, self.images_per_shard)
        stops = (*starts[1:], self.images)
        return tuple(
            Shard(index, start, stop, stop - start)
            for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
        )

    @property
    def assigned_shards(self) -> tuple[Shard, ...]:
        """All shards: such a plan has no slices."""
        return self.shards

    @property
    def assigned_images(self) -> int:
        """Number of images of all shards."""
        return self.images

    def images_of(self, release: Release) -> Release:
        """Select the images of a release that are classified, in order."""
        labelled = release.labelled_by(self.class_names)
        return labelled.subset(imagenet=self.evaluation.images == "imagenet")

    def done(self, paths: RunPaths) -> set[int]:
        """List the finished shards; all are, once the predictions lie in one file."""
        from sdwn.prediction.table import plan_digest_of  # pyarrow

        if plan_digest_of(evaluation_of(paths).predictions) == self.digest:
            return set(range(len(self.shards)))
        return paths.done_shards()

    def command(self, paths: RunPaths) -> str:
        """Return the command that evaluates like this."""
        words: list[object] = ["--model", self.evaluation.model]
        for name in ("checkpoint", "groups", "embedding"):
            if value := getattr(self.evaluation, name):
                words += [f"--{name}", value]
        words += ["--all"] * (self.evaluation.images == "all")
        return command("evaluate", release_of(paths), *words)


def evaluation_of(work: RunPaths) -> EvaluationPaths:
    """Return the evaluation that a work folder lies in."""
    return EvaluationPaths(work.root.absolute().parent)


def release_of(work: RunPaths) -> Path:
    """Return the release that a work folder lies in: wherever that was moved to."""
    return evaluation_of(work).root.parent.parent


def is_prediction_work(folder: Path) -> bool:
    """Return whether a folder is the work of an evaluation, and no run."""
    plan = work_paths(folder).plan
    return plan.exists() and read_json(plan).get("format") in (FORMAT.name, FORMAT.former)


def open_prediction_plan(
    release: Release, chosen: EvaluationConfig
) -> tuple[RunPaths, PredictionPlan]:
    """Plan the predictions for a release and write the plan into its folder, or find it there."""
    refuse_links(release.paths.evaluations)
    # A task finds the files that are named wherever it starts.
    files: dict[str, object] = {}
    for name, what in (("checkpoint", "checkpoint file"), ("embedding", "file of word vectors")):
        if path := getattr(chosen, name):
            if not path.is_file():
                raise UsageError(f"{path}: no such {what}")
            files[name] = path.absolute()
    # What is no file here is the name of shipped groups.
    if chosen.groups is not None and Path(chosen.groups).is_file():
        files["groups"] = str(Path(chosen.groups).absolute())
    file = chosen.checkpoint
    if chosen.model.startswith("local-dir:"):
        from sdwn.prediction.pretrained import find_classifier  # torch and timm

        files["model"] = f"local-dir:{Path(chosen.model.partition(':')[2]).absolute()}"
        file = find_classifier(chosen.model, file)
    chosen = chosen.model_copy(update=files)
    none = f"{release.paths.root}: none of its {release.unit}s"
    names = require_labels(release.metadata, chosen, none)
    labelled = release.labelled_by(names).subset(imagenet=chosen.images == "imagenet")
    plan = PredictionPlan(
        release=release.digest,
        checkpoint_sha256=file_sha256(file) if file else None,
        images=len(labelled),
        class_names=names,
        images_per_shard=IMAGES_PER_SHARD,
        evaluation=chosen,
    )
    work = release.paths.evaluation(plan.name).work
    if work.plan.exists():
        try:
            found = read_prediction_plan(work)
        except IntegrityError:
            found = None
        if found is not None and found.digest == plan.digest:
            # What is finished was cut as that plan says.
            plan = found.model_copy(update={"evaluation": chosen})
        elif count_live_tasks(work):
            raise SdwnError(
                f"{work.root}: tasks are live there that classify the release as it was before; "
                f"end them with: {command('cancel', work.root)}"
            )
        else:
            shutil.rmtree(work.root)  # of this release as it was before
    content = {**FORMAT.head(), "digest": plan.digest, **plan.model_dump(mode="json")}
    write_text(work.plan, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return work, plan


def require_labels(rows: pa.Table, chosen: EvaluationConfig, none: str) -> tuple[str, ...]:
    """Refuse to evaluate images or concepts of which no prediction would be right or wrong.

    ``none`` begins the message: where, and that there is none of what. Where the classes are the
    classifier's own and not ImageNet's, their names are returned.
    """
    if ":" in chosen.model:  # of the hub or a folder
        from sdwn.prediction.pretrained import own_classes  # torch and timm
        from sdwn.releases.release import label_rows

        if names := own_classes(chosen.model):
            if label_rows(rows, names)["wnid"].null_count == len(rows):
                raise SdwnError(
                    f"{none} has a label that is a class of {chosen.model}, which knows: "
                    f"{shorten(', '.join(names), 200)}; take another model, or a table with these"
                )
            return names
    if rows["wnid"].null_count == len(rows):
        raise SdwnError(
            f"{none} is a synset, or has a label that is an ImageNet-1k class: there is nothing to "
            "compare predictions with; plan a table with a column label, wnid or synset, or do "
            "without an evaluation (sdwn submit, then sdwn merge)"
        )
    if chosen.images == "imagenet" and rows["imagenet_class"].null_count == len(rows):
        raise SdwnError(
            f"{none} is an ImageNet-1k class; classify images by the classes that lie near in "
            "WordNet with --all (in a config, evaluation.images: all), or plan a catalog such as "
            "sdwn-26204 or imagenet-1k"
        )
    return ()


def read_prediction_plan(work: RunPaths) -> PredictionPlan:
    """Read the plan of a work folder, checked against its own digest."""
    content = FORMAT.read(work.plan)
    digest = content.pop("digest", None)
    fields = {name: value for name, value in content.items() if name not in FORMAT.head()}
    try:
        plan = validated(PredictionPlan, fields, source=str(work.plan))
    except UsageError as error:
        raise IntegrityError(f"{error}; {FORMAT.remedy}") from None
    if plan.digest != digest:
        raise IntegrityError(f"{work.plan}: changed: its digest no longer fits; {FORMAT.remedy}")
    return plan


def open_planned_release(work: RunPaths) -> tuple[Release, PredictionPlan]:
    """Open what a task works on: the plan, and the release, checked to be the planned one."""
    from sdwn.releases.release import Release  # pyarrow

    plan, release = read_prediction_plan(work), Release(release_of(work))
    refuse_links(release.paths.evaluations)
    if release.digest != plan.release:
        raise IntegrityError(
            f"{release.paths.root}: expected the release {plan.release[:12]} that this was "
            f"planned for, found {release.digest[:12]}; {FORMAT.remedy}: {plan.command(work)}"
        )
    return release, plan


def count_live_tasks(work: RunPaths) -> int:
    """Count the tasks of a work folder that still wait or run; SdwnError if SLURM is silent."""
    from sdwn.jobs.journal import is_unreachable, live_jobs  # submitit

    live = live_jobs(work)
    if is_unreachable(live):
        raise SdwnError(
            f"{work.root}: SLURM does not say whether the tasks that were submitted for it still "
            f"run; ask where it answers, or, if none does, remove them: "
            f"{shell('rm', '-r', work.root)}"
        )
    return len(live)
