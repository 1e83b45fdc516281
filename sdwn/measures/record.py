"""The record of what one command measured: figures of all images, of groups and of classes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn import __version__
from sdwn.errors import IntegrityError, UsageError, command
from sdwn.evaluation.metrics import read_groups
from sdwn.io import Format, OnMessage, content_digest, csv_text, now, refuse_links, write_text
from sdwn.paths import Measured, MeasurePaths
from sdwn.prediction.table import Features, open_features, settings_of
from sdwn.releases.release import Release, wnids_or_labels

log = logging.getLogger(__name__)

# Characters of a reference's name in a folder's, whose name may have 255 bytes.
LONGEST_NAME = 60

FORMATS: dict[Measured, Format] = {
    "measures": Format("sdwn-measures", 1, "measure the release again"),
    "transfer": Format("sdwn-transfer", 1, "run sdwn transfer again"),
    "duplicates": Format("sdwn-duplicates", 1, "look for duplicates again"),
}


class Figure(TypedDict):
    """A value with its 95 % interval (None without one), and the numbers of images behind it."""

    value: float
    low: float | None
    high: float | None
    images: int
    reference_images: int | None


def make_figure(
    value: float, ends: Sequence[float] | None, images: int, reference_images: int | None = None
) -> Figure:
    """Return a figure with the ends of its interval, None without one."""
    low, high = ends or (None, None)
    return Figure(
        value=float(value),
        low=low,
        high=high,
        images=images,
        reference_images=reference_images,
    )


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure's words: its key in records, its label on pages, how it is written.

    ``best`` is ``high``, ``low`` or None: which values are better.
    """

    name: str
    label: str
    best: str | None
    digits: int = 2
    unit: str = ""

    @property
    def heading(self) -> str:
        """The label with the unit, for the head of a row or a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, figure: Figure | None) -> str:
        """Write a figure with its interval and unit; a dash where there is none.

        >>> MEASURES["coverage"].text({"value": 0.5, "low": 0.4, "high": 0.6,
        ...     "images": 10, "reference_images": 10})
        '0.50 (0.40 to 0.60)'
        """
        if figure is None:
            return "\u2013"
        value, low, high = (
            None if figure[end] is None else f"{figure[end]:,.{self.digits}f}"
            for end in ("value", "low", "high")
        )
        ends = f" ({low} to {high})" if low is not None and high is not None else ""
        return f"{value}{ends} {self.unit}".rstrip()


# By kind and name.
Records = Mapping[tuple[str, str], Mapping[str, Any]]

# In the order of the pages. A new measure is a row here, and its function.
MEASURES = {
    one.name: one
    for one in (
        Measure("frechet_distance", "Fréchet distance", "low"),
        Measure("kernel_distance", "kernel distance", "low", 4),
        Measure("cmmd", "CMMD", "low", 3),
        Measure("density", "density", "high"),
        Measure("coverage", "coverage", "high"),
        Measure("vendi", "Vendi score", "high", 1),
        Measure("vendi_within", "Vendi score within a class", "high"),
        Measure("similarity_within", "similarity within a class", "low", 3),
        Measure("clip_score", "CLIP score", "high", 1),
        Measure("transfer_accuracy", "accuracy on real images", "high", 1, "%"),
        Measure("transfer_top5", "top-5 accuracy on real images", "high", 1, "%"),
        Measure("real_accuracy", "accuracy if trained on real images", None, 1, "%"),
        Measure("real_top5", "top-5 accuracy if trained on real images", None, 1, "%"),
        Measure("chance", "accuracy by chance", None, 1, "%"),
        Measure("exact_duplicates", "images that repeat another's pixels", "low", 0),
        Measure("near_duplicates", "images that nearly repeat another", "low", 0),
        Measure("near_reference", "images near one of the reference", "low", 0),
    )
}


def open_reference(features: Features, reference: Release) -> Features:
    """Read the features of a reference release by the same encoder as these."""
    found = open_features(reference, features.name)
    ours, theirs = settings_of(features.encoder), settings_of(found.encoder)
    differ = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    differ += ["dimensions"] * (found.vectors.shape[1] != features.vectors.shape[1])
    if differ:
        again = command("features", reference.paths.root, "--model", features.encoder["model"])
        raise UsageError(
            f"{reference}: its features {features.name} are of another encoder "
            f"({', '.join(differ)} differ); make them again with the same weights: {again}"
        )
    return found


def class_of_images(images: pa.Table) -> tuple[list[str], NDArray[np.int64]]:
    """Return the classes of images, each once and sorted, and each image's index there.

    ``images`` are rows of a release's metadata. The class is the wnid, without one the label,
    without that the concept's id.
    """
    every = pc.coalesce(wnids_or_labels(images), images["id"])
    names, index = np.unique(np.asarray(every.to_pylist(), dtype=str), return_inverse=True)
    return names.tolist(), index


def groups_of_classes(release: Release, classes: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return which of the classes each group of WordNet holds, for the groups that hold some."""
    if not release.has_tree:
        return {}
    tree, wnids = release.taxonomy, set(release.metadata["wnid"].unique().to_pylist())
    held = {
        group.name: np.array([one in wnids and tree.is_below(one, group.wnid) for one in classes])
        for group in read_groups(None, tree)
    }
    return {name: which for name, which in held.items() if which.any()}


def figures_of_parts(
    release: Release,
    classes: Sequence[str],
    compute: Callable[[NDArray[np.int64]], Mapping[str, Figure]],
    on_message: OnMessage,
) -> dict[str, Any]:
    """Compute the figures of each group and of each class, as records have them.

    ``compute`` takes the indices of some of the classes.
    """
    held = groups_of_classes(release, classes)
    parts = {"groups": {one: np.flatnonzero(which) for one, which in held.items()}}
    parts["classes"] = {one: np.array([at]) for at, one in enumerate(classes)}
    found = dict[str, Any]()
    for part, indices in parts.items():
        on_message(f"the {part}")
        found[part] = [{"name": n, "figures": compute(which)} for n, which in indices.items()]
    return found


def write_record(
    kind: Measured,
    release: Release,
    features: Features,
    reference: Release | None,
    content: Mapping[str, Any],
) -> MeasurePaths:
    """Write a command's record and its tables into its folder of the release; return its files.

    ``content`` has at least ``figures``, a :class:`Figure` by name; lists of a ``name`` with
    ``figures`` of its own where there are some, as ``groups``, ``classes`` and ``curve``;
    ``absent``, the reason of each measure without a figure; and ``settings``. The figures and each
    list are also a CSV table, a row a figure.
    """
    beside = ""
    if reference is not None:
        beside = f"--{reference.paths.name[:LONGEST_NAME]}-{reference.digest[:8]}"
    paths = release.paths.measured(kind, features.name + beside)
    refuse_links(release.paths.evaluations)
    # A kill before the new ones are written must not leave an earlier run's beside this record.
    paths.scores.unlink(missing_ok=True)
    record = {
        **FORMATS[kind].head(),
        "created": now(),
        "sdwn": __version__,
        "release": release.digest,
        "features": {"name": features.name, "encoder": dict(features.encoder)},
        "reference": reference and {"name": reference.paths.name, "release": reference.digest},
        **content,
    }
    every = {"figures": [{"name": "all", "figures": content["figures"]}]}
    every |= {name: content[name] for name in ("groups", "classes", "curve") if content.get(name)}
    columns = [*Figure.__annotations__]
    for name, rows in every.items():
        lines = (
            (row["name"], measure, *(figure[column] for column in columns))
            for row in rows
            for measure, figure in row["figures"].items()
        )
        write_text(paths.table(name), csv_text(("name", "measure", *columns), lines))
    record["digest"] = content_digest(record)
    write_text(paths.record, json.dumps(record, indent=2) + "\n")
    return paths


def figure_rows(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a record's figures by label, each with its images, and why others are absent."""
    rows = dict[str, str]()
    beside = "tested on" if "curve" in record else "compared with"
    for name, measure in MEASURES.items():
        if figure := record["figures"].get(name):
            sides = (figure["images"], figure["reference_images"])
            counts = f", {beside} ".join(f"{one:,}" for one in sides if one)
            rows[measure.label] = f"{measure.text(figure)}; images: {counts}"
            if other := record.get("reference_figures", {}).get(name):
                rows[measure.label] += f"; of the reference itself {measure.text(other)}"
        elif reason := record.get("absent", {}).get(name):
            rows[measure.label] = f"\u2013 {reason}"
    return rows


def all_records(release: Release) -> Records:
    """Read all records of a release, by kind and name."""
    return {
        (kind, name): record
        for kind in get_args(Measured)
        for name, record in read_records(release, kind).items()
    }


def read_records(release: Release, kind: Measured) -> dict[str, dict[str, Any]]:
    """Read a release's records of a kind by name, the latest last.

    One that is damaged, altered or of another release is named in the log and left out.
    """
    found: list[tuple[str, Path, dict[str, Any]]] = []
    remedy, digest = FORMATS[kind].remedy, release.digest
    for path in sorted(release.paths.evaluations.glob(f"{kind}/*/record.json")):
        try:
            refuse_links(release.paths.evaluations)
            record = FORMATS[kind].read(path)
            if record.get("digest") != content_digest(record):
                raise IntegrityError(f"{path}: altered since it was written; {remedy}")
            if record.get("release") != digest:
                raise IntegrityError(f"{path}: of another release; {remedy}")
            found.append((str(record.get("created")), path, record))
        except IntegrityError as error:
            log.warning("%s", error)
    return {path.parent.name: record for _, path, record in sorted(found, key=lambda one: one[:2])}
