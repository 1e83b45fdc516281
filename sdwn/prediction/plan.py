"""Plans of predictions and features: which images of a release, by which model, cut into shards.

One lies in ``evaluations/NAME/work/plan.json`` of the release (of features, in
``evaluations/features/NAME/work``), beside the shards of its table, until these are merged.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from sdwn.config import EvaluationConfig, Section, later_setting
from sdwn.errors import IntegrityError, SdwnError, command, shell
from sdwn.io import Format, content_digest, file_sha256, read_json, refuse_links, write_text
from sdwn.paths import RunPaths, release_above, work_paths
from sdwn.planning.plan import Shard

if TYPE_CHECKING:
    import pyarrow as pa

    from sdwn.releases.release import Release

# Under a minute of an A100 with the paper's classifier: so much a killed task loses.
IMAGES_PER_SHARD = 2048


class ImagePlan(Section):
    """Everything that decides a table with a row an image, and how it is cut into shards."""

    release: str  # its digest
    checkpoint_sha256: str | None  # of the weights, where these are a user's own
    images: int  # of the release that are in the table
    images_per_shard: Annotated[int, Field(gt=0)]

    FORMAT: ClassVar[Format]
    stage: ClassVar[str]  # makes its shards
    doing: ClassVar[str]  # the same in words
    verb: ClassVar[str]  # the command
    result: ClassVar[str]  # what the command writes in the end
    table_name: ClassVar[str]
    options: ClassVar[Any] = ()  # further words of the command

    if TYPE_CHECKING:

        @property
        def model(self) -> str:
            """The model by name, or its folder."""

    @property
    def name(self) -> str:
        """The table's folder: named by the model, and the weights if they are a user's."""
        folder = r"^local-dir:(.*/)?|(?<=^clip):/(.*/)?"
        name = re.sub(rf"{folder}|[^A-Za-z0-9._-]+", "-", self.model).strip(".-")
        return name + (f"-{self.checkpoint_sha256[:8]}" if self.checkpoint_sha256 else "")

    @property
    def identity(self) -> dict[str, Any]:
        """The values that decide the table; how it is cut into shards does not."""
        names = {"release", "checkpoint_sha256", "images"}
        return {"model": self.model, **self.model_dump(include=names)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over :attr:`identity`."""
        return content_digest(self.identity)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, by rows of the table, in order; the last may be shorter."""
        bounds = pairwise([*range(0, self.images, self.images_per_shard), self.images])
        return tuple(Shard(i, start, stop, stop - start) for i, (start, stop) in enumerate(bounds))

    @property
    def assigned_shards(self) -> tuple[Shard, ...]:
        """All shards: such a plan has no slices."""
        return self.shards

    @property
    def assigned_images(self) -> int:
        """Number of images of all shards."""
        return self.images

    def images_of(self, release: Release) -> Release:
        """Select the images of a release that are in the table, in order."""
        return release

    def table_file(self, work: RunPaths) -> Path:
        """Return the path of the table that the shards are merged into."""
        return work.root.absolute().with_name(f"{self.table_name}.parquet")

    def done(self, paths: RunPaths) -> set[int]:
        """List the finished shards; all are, once the table lies in one file."""
        from sdwn.prediction.table import plan_digest_of  # pyarrow

        if plan_digest_of(self.table_file(paths)) == self.digest:
            return set(range(len(self.shards)))
        return paths.done_shards()

    def command(self, paths: RunPaths) -> str:
        """Return the command that resumes it."""
        release = release_above(paths.root)
        return command(self.verb, release, "--model", self.model, *self.options)


class PredictionPlan(ImagePlan):
    """The plan of predictions; ``evaluation`` also says what figures to make of them."""

    evaluation: EvaluationConfig
    class_names: tuple[str, ...] = later_setting(())  # where the classes are not ImageNet's

    FORMAT = Format(
        "sdwn-prediction-plan", 2, "evaluate the release again", {1: dict}, "sdwn-judging"
    )
    stage, doing, table_name = "judge", "classifying", "predictions"
    verb, result = "evaluate", "evaluation"

    @property
    def model(self) -> str:
        """The classifier by name, or its folder."""
        return self.evaluation.model

    @property
    def name(self) -> str:
        """The evaluation's folder: of the model, the weights if they are a user's, the images."""
        return super().name + "-all" * (self.evaluation.images == "all")

    @property
    def identity(self) -> dict[str, Any]:
        """The values that decide the predictions."""
        names = self.model_dump(include={"class_names"})
        return {**super().identity, "selection": self.evaluation.images, **names}

    @property
    def options(self) -> list[object]:
        """Further words of the command that evaluates like this."""
        words: list[object] = []
        for name in ("checkpoint", "groups", "embedding"):
            if value := getattr(self.evaluation, name):
                words += [f"--{name}", value]
        return words + ["--all"] * (self.evaluation.images == "all")

    def images_of(self, release: Release) -> Release:
        """Select the images of a release that are classified, in order."""
        labelled = release.labelled_by(self.class_names)
        return labelled.subset(imagenet=self.evaluation.images == "imagenet")


class FeaturePlan(ImagePlan):
    """The features of all images of a release, by the encoder ``model``."""

    model: str

    FORMAT = Format("sdwn-feature-plan", 1, "make the features again")
    stage, doing, table_name = "encode", "encoding", "features"
    verb = result = "features"


P = TypeVar("P", bound=ImagePlan)


def is_image_work(folder: Path) -> bool:
    """Return whether a folder is the work of an evaluation or of features, and no run."""
    plan, (old, new) = work_paths(folder).plan, (PredictionPlan.FORMAT, FeaturePlan.FORMAT)
    names = (old.name, old.former, new.name)
    remedy = "restore it, or plan the run into a new folder, or evaluate the release again"
    return plan.exists() and read_json(plan, remedy).get("format") in names


def open_prediction_plan(
    release: Release, chosen: EvaluationConfig
) -> tuple[RunPaths, PredictionPlan]:
    """Plan the predictions for a release and write the plan into its folder, or find it there."""
    # A task finds the files that are named wherever it starts.
    given = {"checkpoint": chosen.checkpoint, "embedding": chosen.embedding}
    files: dict[str, Any] = {name: path.absolute() for name, path in given.items() if path}
    # What is no file here is the name of shipped groups.
    if chosen.groups is not None and Path(chosen.groups).is_file():
        files["groups"] = str(Path(chosen.groups).absolute())
    file = files.get("checkpoint")
    if chosen.model.startswith("local-dir:"):
        files["model"] = f"local-dir:{Path(chosen.model.partition(':')[2]).absolute()}"
    if file or "model" in files:
        from sdwn.prediction.pretrained import find_classifier  # torch and timm

        file = find_classifier(chosen.model, file)
    chosen = chosen.model_copy(update=files)
    none = f"{release.paths.root}: none of its {release.unit}s"
    names = require_labels(release.metadata, chosen, none)
    labelled = release.labelled_by(names).subset(imagenet=chosen.images == "imagenet")
    values = {"images": len(labelled), "class_names": names, "evaluation": chosen}
    return _store(PredictionPlan, release, file, values)


def open_feature_plan(release: Release, model: str) -> tuple[RunPaths, FeaturePlan]:
    """Plan the features of a release and write the plan into its folder, or find it there."""
    from sdwn.prediction.pretrained import encoder_file, own_folder  # torch and timm

    file, folder = encoder_file(model), own_folder(model)
    if folder:  # a task finds it wherever it starts
        model = f"{model.partition(':')[0]}:{folder}"
    values = {"images": len(release), "model": model}
    return _store(FeaturePlan, release, file if folder else None, values)


def _store(
    kind: type[P], release: Release, weights: Path | None, values: dict[str, Any]
) -> tuple[RunPaths, P]:
    """Make and write a plan, unless it is there; what is finished for another one is removed."""
    values |= {"release": release.digest, "checkpoint_sha256": weights and file_sha256(weights)}
    plan = kind(images_per_shard=IMAGES_PER_SHARD, **values)
    of_name = release.paths.features if kind is FeaturePlan else release.paths.evaluation
    work = of_name(plan.name).work
    refuse_links(release.paths.evaluations)
    found: ImagePlan | None = None
    with suppress(IntegrityError):
        found = read_image_plan(work)
    if found is not None and found.digest == plan.digest:
        # What is finished was cut as that plan says.
        plan = plan.model_copy(update={"images_per_shard": found.images_per_shard})
    elif work.root.exists():  # of this release as it was before
        if count_live_tasks(work):
            raise SdwnError(
                f"{work.root}: tasks are live there that are {plan.doing} the release as it was "
                f"before; end them with: {command('cancel', work.root)}"
            )
        shutil.rmtree(work.root)
    content = {**plan.FORMAT.head(), "digest": plan.digest, **plan.model_dump(mode="json")}
    write_text(work.plan, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return work, plan


def require_labels(rows: pa.Table, chosen: EvaluationConfig, none: str) -> tuple[str, ...]:
    """Refuse to evaluate images or concepts of which no prediction would be right or wrong.

    ``none`` begins the message: where, and that there is none of what. The names of a classifier's
    own classes are returned.
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
            f"{none} is a synset, or has a label that is an ImageNet-1k class; plan a table with a "
            "column label, wnid or synset, or do without an evaluation (sdwn submit, sdwn merge)"
        )
    if chosen.images == "imagenet" and rows["imagenet_class"].null_count == len(rows):
        raise SdwnError(
            f"{none} is an ImageNet-1k class; classify images by the classes near in WordNet with "
            "--all (in a config, evaluation.images: all), or plan a catalog such as imagenet-1k"
        )
    return ()


def read_image_plan(work: RunPaths) -> ImagePlan:
    """Read the plan of a work folder, checked against its own digest."""
    kind = FeaturePlan if work.root.absolute().parents[1].name == "features" else PredictionPlan
    with kind.FORMAT.reading(work.plan) as content:
        beside = ("digest", *kind.FORMAT.head())
        plan = kind.model_validate({n: x for n, x in content.items() if n not in beside})
        if plan.digest == content["digest"]:
            return plan
    raise IntegrityError(f"{work.plan}: changed: its digest no longer fits; {kind.FORMAT.remedy}")


def open_planned_release(work: RunPaths) -> tuple[Release, ImagePlan]:
    """Open what a task works on: the plan, and the release, checked to be the planned one."""
    from sdwn.releases.release import Release  # pyarrow

    plan, release = read_image_plan(work), Release(release_above(work.root))
    refuse_links(release.paths.evaluations)
    if release.digest != plan.release:
        raise IntegrityError(
            f"{release.paths.root}: expected the release {plan.release[:12]} that this was "
            f"planned for, found {release.digest[:12]}; {plan.FORMAT.remedy}: {plan.command(work)}"
        )
    return release, plan


def count_live_tasks(work: RunPaths) -> int:
    """Count the tasks of a work folder that still wait or run; SdwnError if SLURM is silent."""
    from sdwn.jobs.journal import is_unreachable, live_jobs  # submitit

    live = live_jobs(work)
    if is_unreachable(live):
        raise SdwnError(
            f"{work.root}: SLURM does not say whether its tasks still run; ask where it answers, "
            f"or, if none does, remove them: {shell('rm', '-r', work.root)}"
        )
    return len(live)
