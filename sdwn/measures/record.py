"""Records of measures: figures, and a table of every image's scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn import __version__, io
from sdwn.errors import IntegrityError, UsageError, command
from sdwn.evaluation.metrics import intervals, read_groups
from sdwn.evaluation.record import evaluations, open_evaluation
from sdwn.paths import Measured, MeasurePaths
from sdwn.prediction import table as image_tables
from sdwn.releases.release import Release, wnids_or_labels
from sdwn.storage.columns import read_parquet, write_parquet

log = logging.getLogger(__name__)

FORMATS: dict[Measured, io.Format] = {
    "measures": io.Format("sdwn-measures", 1, "measure the release again"),
    "transfer": io.Format("sdwn-transfer", 1, "run sdwn transfer again"),
    "duplicates": io.Format("sdwn-duplicates", 1, "look for duplicates again"),
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
        value=float(value), low=low, high=high, images=images, reference_images=reference_images
    )


def mean_figure(value: float, totals: NDArray[Any], counts: NDArray[Any], *images: Any) -> Figure:
    """Return a mean with its bootstrap interval over classes, by the total and count of each."""
    columns = {"total": totals, "count": counts}
    ends = intervals(columns, lambda means: {"mean": means["total"] / means["count"]})["mean"]
    return make_figure(value, ends, *images)


class Measure(NamedTuple):
    """A figure's words: its key in records, its label on pages, how it is written."""

    name: str
    label: str
    best: str | None  # high, low, or None where neither is better
    digits: int = 2
    unit: str = ""

    @property
    def heading(self) -> str:
        """The label with the unit, for the head of a row or a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, figure: Figure) -> str:
        """Write a figure as ``0.50 (0.40 to 0.60) %``."""
        numbers = (figure["value"], figure["low"], figure["high"])
        value, *ends = [f"{one:,.{self.digits}f}" for one in numbers if one is not None]
        between = f" ({' to '.join(ends)})" if ends else ""
        return f"{value}{between} {self.unit}".rstrip()


# By kind and name.
Records = Mapping[tuple[Measured, str], Mapping[str, Any]]

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


def open_reference(features: image_tables.Features, reference: Release) -> image_tables.Features:
    """Read the features of a reference release by the same encoder as these."""
    found = image_tables.open_features(reference, features.name)
    same = image_tables.settings_of(features.encoder) == image_tables.settings_of(found.encoder)
    if not same or found.vectors.shape[1] != features.vectors.shape[1]:
        again = command("features", reference.paths.root, "--model", features.encoder["model"])
        raise UsageError(
            f"{reference}: its features {features.name} are of another encoder, or of other "
            f"weights or settings; make them again: {again}"
        )
    return found


def class_of_images(images: pa.Table) -> tuple[list[str], NDArray[np.int64]]:
    """Return the classes of images, each once and sorted, and each image's index there.

    A class is a wnid, without one a label, without that a concept's id.
    """
    return image_tables.unique_names(pc.coalesce(wnids_or_labels(images), images["id"]))


def figures_of_parts(
    release: Release,
    classes: Sequence[str],
    compute: Callable[[NDArray[np.int64]], Mapping[str, Figure]],
    on_message: io.OnMessage,
) -> dict[str, Any]:
    """Compute the figures of each group of WordNet and of each class, as records have them.

    ``compute`` takes the indices of some of the classes.
    """
    groups = dict[str, NDArray[np.int64]]()
    if release.has_tree:
        tree, wnids = release.taxonomy, {*release.metadata["wnid"].unique().to_pylist()}
        for group in read_groups(None, tree):
            held = [one in wnids and tree.is_below(one, group.wnid) for one in classes]
            groups |= {group.name: np.flatnonzero(held)} if any(held) else {}
    found = dict[str, Any]()
    each = {one: np.array([at]) for at, one in enumerate(classes)}
    for part, indices in {"groups": groups, "classes": each}.items():
        on_message(f"the {part}")
        found[part] = [{"name": n, "figures": compute(which)} for n, which in indices.items()]
    return found


def write_record(
    kind: Measured,
    release: Release,
    features: image_tables.Features,
    reference: Release | None,
    content: Mapping[str, Any],
) -> MeasurePaths:
    """Write a command's record and its tables into its folder of the release; return its files.

    ``content`` has ``figures`` by name, and may have lists of a ``name`` with ``figures`` of its
    own: ``groups``, ``classes``, ``curve``. Each is also a CSV table, a row a figure.
    """
    # A folder's name may have 255 bytes.
    beside = f"--{reference.paths.name[:60]}-{reference.digest[:8]}" if reference else ""
    paths = release.paths.measured(kind, features.name + beside)
    io.refuse_links(release.paths.evaluations)
    # A kill before the new ones are written must not leave an earlier run's beside this record.
    paths.scores.unlink(missing_ok=True)
    record = {
        **FORMATS[kind].head(),
        "created": io.now(),
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
        io.write_text(paths.table(name), io.csv_text(("name", "measure", *columns), lines))
    record["digest"] = io.content_digest(record)
    io.write_text(paths.record, json.dumps(record, indent=2) + "\n")
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
    """Read the records of a release by kind and name, of each kind the latest last.

    One that is damaged, altered or of another release is named in the log and left out.
    """
    found, folder = dict[tuple[Measured, str], dict[str, Any]](), release.paths.evaluations
    for kind, written in FORMATS.items():
        of_kind = list[tuple[tuple[Measured, str], dict[str, Any]]]()
        for path in sorted(folder.glob(f"{kind}/*/record.json")):
            try:
                io.refuse_links(folder)
                record = written.read_sealed(path)
                if record.get("release") != release.digest:
                    raise IntegrityError(f"{path}: of another release; {written.remedy}")
                of_kind.append(((kind, path.parent.name), record))
            except IntegrityError as error:
                log.warning("%s", error)
        found.update(sorted(of_kind, key=lambda one: str(one[1].get("created"))))
    return found


# --- Scores of images --------------------------------------------------------------------------
FLOAT = pa.float32()


class Score(NamedTuple):
    """A score of an image: its column, its words for people, and whether more is better."""

    name: str
    label: str
    best: str | None  # high, low, or None where neither is
    made_by: str  # the command; after its name comes the release, then the rest
    type: Any = FLOAT


_BESIDE_REAL, _AGAINST = "measure --reference REAL", "duplicates --against REAL"
# In the order of the table. A new one is a row here.
SCORES = {
    one.name: one
    for one in (
        Score("correct", "classified correctly", "high", "evaluate", pa.bool_()),
        Score("correct_top5", "among the five best classes", "high", "evaluate", pa.bool_()),
        Score("label_probability", "probability of its class", "high", "evaluate"),
        Score("subtree_probability", "probability of its synset or near it", "high", "evaluate"),
        Score("confidence", "probability of the best class", "high", "evaluate"),
        Score("clip_score", "CLIP score", "high", "features --model clip:MODEL"),
        Score("similarity_within", "similarity to its class's other images", "low", "measure"),
        Score("nearest_real", "similarity to its class's nearest real image", None, _BESIDE_REAL),
        Score("duplicate_group", "group of duplicates", None, "duplicates", pa.int32()),
        Score("duplicate_of_better", "a duplicate that can go", "low", "duplicates", pa.bool_()),
        Score("nearest_reference", "similarity to the nearest reference image", "low", _AGAINST),
    )
}


def write_scores(path: Path, images: pa.Table, columns: Mapping[str, Any]) -> None:
    """Write scores of images, by name, for the rows of a release's metadata."""
    found = {name: pa.array(values, SCORES[name].type) for name, values in columns.items()}
    table = pa.table({**{name: images[name] for name in image_tables.IMAGE_KEY}, **found})
    write_parquet(path, table)


def score_table(
    release: Release, evaluation: str | None = None, predicted: bool = True
) -> pa.Table:
    """Return all scores of a release's images, or of a subset's, a row an image in their order.

    Null where nothing is known; where several commands computed a score, the latest counts. A
    damaged file is named in the log and left out, but an evaluation's that is named is refused.
    """
    images, paths = release.metadata.select(image_tables.IMAGE_KEY), release.paths
    columns = {name: pa.nulls(len(images), one.type) for name, one in SCORES.items()}
    readers = list[Callable[[], pa.Table]]()
    if predicted and (evaluation is not None or evaluations(paths)):
        readers.append(lambda: prediction_scores(open_evaluation(release, evaluation)[-1]))
    files = [paths.features(name).features for name in image_tables.feature_names(paths)]
    files.sort(key=lambda path: path.stat().st_mtime)
    files += [paths.measured(*kind_and_name).scores for kind_and_name in all_records(release)]
    readers += [partial(_read_scores, release, path) for path in files if path.exists()]
    for number, read in enumerate(readers):
        try:
            table = read()
        except IntegrityError as error:
            if evaluation is not None and number == 0:
                raise
            log.warning("left out: %s", error)
            continue
        # Equal tables are the rule, and looking for each image takes a third of a second.
        if not table.select(image_tables.IMAGE_KEY).equals(images):
            rows = image_tables.find_by_key(images, table, image_tables.IMAGE_KEY)
            table = table.take(pa.array(rows, mask=rows < 0))
        for name in SCORES.keys() & {*table.column_names}:
            # Features of an encoder that is no CLIP have a column of its score as well.
            if table[name].null_count < len(table):
                columns[name] = table[name]
    return pa.table({**{name: images[name] for name in image_tables.IMAGE_KEY}, **columns})


def prediction_scores(predictions: pa.Table) -> pa.Table:
    """Return the scores of a table of predictions, a row an image of it."""
    best = pc.list_element(predictions["top5_probability"], 0)
    rank = predictions["label_rank"]
    correct = {"correct": pc.equal(rank, 0), "correct_top5": pc.less(rank, image_tables.TOP)}
    kept = (*image_tables.IMAGE_KEY, "label_probability", "subtree_probability")
    return pa.table({**{name: predictions[name] for name in kept}, **correct, "confidence": best})


def _read_scores(release: Release, path: Path) -> pa.Table:
    """Read the scores in a file of them, or of features, without the vectors."""
    io.refuse_links(release.paths.evaluations)
    key, most = image_tables.IMAGE_KEY, release.manifest.most_rows
    table = read_parquet(path, most, columns=[*key, *SCORES])
    if not {*key} <= {*table.column_names}:
        raise IntegrityError(f"{path}: damaged: no table of scores; make it again")
    return table
