"""The record of an evaluation, ``evaluation.json``, and its tables: built and read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import UndefinedError

from sdwn import __version__
from sdwn.config import PAPER_CATALOG, EvaluationConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError, command, first_line
from sdwn.evaluation import metrics
from sdwn.evaluation.class_map import build_class_map
from sdwn.evaluation.metrics import METRICS, ClassResult
from sdwn.io import Format, content_digest, csv_text, file_sha256, now, refuse_links, write_text
from sdwn.paths import EvaluationPaths, ReleasePaths
from sdwn.prediction.table import Predictions
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import CLASSES, class_wnids
from sdwn.wordnet.taxonomy import Taxonomy


def _with_plain_names(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade a record of version 2."""
    found = {**content, "images_without_wnid": 0, **FORMAT.head()}
    found["images_classified"] = found.pop("images_judged", None)
    found["classifier"] = dict(content.get("classifier", {}))
    found["classifier"]["predicted_on"] = found["classifier"].pop("judged_on", [])
    # The digest of a record that was altered stays one that does not fit.
    if content.get("digest") == content_digest(content):
        found["digest"] = content_digest(found)
    return found


# The remedy takes seconds: predictions that are undamaged are kept.
FORMAT = Format("sdwn-evaluation", 3, "evaluate the release again", {2: _with_plain_names})
# What use of a record of another shape raises; `UndefinedError` in a template.
FORGED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError)
# More of them stand in confusions.csv.
MOST_CONFUSIONS = 100

# The columns of the CSV tables; the first figure of a row is its path in evaluation.json.
CSV_COLUMNS = {
    "figures": "figure value low high without_black paper",
    "histogram": "correct classes",
    "groups": "name wnid synset classes images mean_correct mean_correct_low mean_correct_high "
    "std_correct any_correct all_correct none_correct_classes all_correct_classes top1_percent "
    "top5_percent black_images",
    "classes": "wnid synset lemmas group images correct correct_top5 black subtree_probability "
    "distance miss_distance",
    "confusions": "wnid synset predicted_wnid predicted_synset times images",
    # What was classified, and what of WordNet the classifier knows around it.
    "synsets": "wnid synset images scope_wnid scope_synset scope_steps scope_classes chance "
    "subtree_probability inside distance miss_distance least_distance",
}

# arXiv 2211.01777, under the names that the same figures have here.
PAPER_FIGURES: dict[str, float] = {
    "images": 8610,
    "classes": 861,
    "images_per_class": 10,
    "mean_correct": 4.16,
    "std_correct": 3.74,
    "any_correct": 0.73,
    "all_correct": 0.14,
    # What any_correct leaves; the paper prints the 73 %.
    "none_correct": 0.27,
}
PAPER_ORIGIN = {
    "source": "arXiv:2211.01777",
    "note": "The paper counts 861 ImageNet classes by name; by wnid the same catalog holds 862, "
    "since Cardigan the dog (n02113186) and cardigan the jacket (n02963159) differ only in case.",
}
# Classes with none correct, by the synset that they lie below; and single classes.
PAPER_NONE_CORRECT = {"animal.n.01": 162}
PAPER_CORRECT = {"greenhouse.n.01": 10, "black-footed_ferret.n.01": 0, "leafhopper.n.01": 0}


# --- From predictions to the record ------------------------------------------------------------
def build_record(
    release: Release,
    paths: EvaluationPaths,
    predictions: pa.Table,
    classifier_record: dict[str, Any],
    chosen: EvaluationConfig,
) -> dict[str, Any]:
    """Turn the predictions in ``paths.predictions`` into a record and tables; return the record."""
    # By a classifier's own classes there is nothing of WordNet: no group, score or map.
    taxonomy = release.taxonomy if release.has_tree else None
    of_synsets = predictions.filter(pc.is_valid(predictions["wnid"]))
    labelled = predictions.filter(pc.is_valid(predictions["imagenet_class"]))
    figures, per_class = metrics.measure(labelled)
    wnids = [row["wnid"] for row in per_class]
    synset_of = (lambda wnid: taxonomy.synset(wnid).name) if taxonomy else str
    scores, of_groups = list[dict[str, Any]](), list[dict[str, Any]]()
    group_of, places = dict[str, str | None](), None
    if taxonomy:
        known = class_wnids(classifier_record.get("classes", CLASSES))
        scores = metrics.score_synsets(of_synsets, taxonomy, known)
        groups = metrics.read_groups(chosen.groups, taxonomy)
        of_groups = metrics.group_figures(groups, per_class, figures["images_per_class"], taxonomy)
        group_of = metrics.smallest_groups(groups, wnids, taxonomy)
        places = build_class_map(release, wnids, chosen.embedding) if wnids else None
    score_of = {score["wnid"]: score for score in scores}
    confusions = metrics.confusion_pairs(labelled, release.classes)
    for pair in confusions:
        pair["synset"] = synset_of(pair["wnid"])
        pair["predicted_synset"] = synset_of(pair["predicted_wnid"])
    scored = ("subtree_probability", "distance", "miss_distance")
    record = {
        **FORMAT.head(),
        "created": now(),
        "sdwn": __version__,
        "release": release.digest,
        "plan_digest": release.manifest.plan_digest,
        "catalog": release.manifest.name,
        "selection": "all" if len(labelled) < len(predictions) else "imagenet",
        "images_classified": len(predictions),
        # These have no score. Of a classifier's own classes most have no prediction either.
        "images_without_wnid": len(predictions if taxonomy else release) - len(of_synsets),
        "predictions_sha256": file_sha256(paths.predictions),
        "classifier": classifier_record,
        "figures": figures,
        "groups": of_groups,
        "classes": [
            {
                **row,
                "synset": synset_of(row["wnid"]),
                "group": group_of.get(row["wnid"]),
                **{name: score_of.get(row["wnid"], {}).get(name) for name in scored},
            }
            for row in per_class
        ],
        "confusions": confusions[:MOST_CONFUSIONS],
        "wordnet": metrics.summarise_scores(scores),
        "map": places,
    }
    if not places:
        record["map_missing"] = "nothing here is a class of ImageNet-1k"
    if taxonomy and release.manifest.name == PAPER_CATALOG:
        record["paper"] = _paper_beside(per_class, taxonomy)
    rows = {
        "figures": list(_figure_rows(record)),
        "histogram": [{"correct": k, "classes": n} for k, n in enumerate(figures["histogram"])],
        "classes": [
            {**row, "lemmas": ", ".join(taxonomy.synset(row["wnid"]).lemmas if taxonomy else ())}
            for row in record["classes"]
        ],
        "confusions": confusions,
    }
    if taxonomy:
        rows["synsets"], rows["groups"] = scores, []
        for row in of_groups:
            low, high = row["intervals"]["mean_correct"] or (None, None)
            rows["groups"].append({**row, "mean_correct_low": low, "mean_correct_high": high})
    for name, found in rows.items():
        head = CSV_COLUMNS[name].split()
        cells = ([row.get(column) for column in head] for row in found)
        write_text(paths.table(name), csv_text(head, cells))
    record["synsets_sha256"] = file_sha256(paths.table("synsets")) if taxonomy else None
    record["digest"] = content_digest(record)
    # Last, for it is what says that an evaluation is there.
    write_text(paths.evaluation, json.dumps(record, indent=2) + "\n")
    return record


def _paper_beside(classes: Sequence[ClassResult], taxonomy: Taxonomy) -> dict[str, Any]:
    """List the paper's figures beside those found here; ``ours`` is None without images."""
    correct_of, groups, named = {row["wnid"]: row["correct"] for row in classes}, [], []
    for synset, count in PAPER_NONE_CORRECT.items():
        root = taxonomy.synset(synset).wnid
        ours = sum(not n and taxonomy.is_below(wnid, root) for wnid, n in correct_of.items())
        groups.append({"wnid": root, "synset": synset, "none_correct_classes": count, "ours": ours})
    for synset, count in PAPER_CORRECT.items():
        wnid = taxonomy.synset(synset).wnid
        row = {"wnid": wnid, "synset": synset, "correct": count, "ours": correct_of.get(wnid)}
        named.append(row)
    return {**PAPER_FIGURES, **PAPER_ORIGIN, "groups": groups, "named_classes": named}


def _figure_rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    figures = record["figures"]
    without, paper = figures["without_black"] or {}, record.get("paper") or {}
    for path, scalars in (
        ("figures", figures),
        ("figures.statuses", figures["statuses"]),
        *((f"wordnet.{kind}", summary or {}) for kind, summary in record["wordnet"].items()),
    ):
        for name, value in scalars.items():
            if isinstance(value, int | float):
                row: dict[str, Any] = {"figure": f"{path}.{name}", "value": value}
                if path == "figures":
                    row |= {"without_black": without.get(name), "paper": paper.get(name)}
                ends = scalars.get("intervals", {}).get(name) or (None, None)
                yield row | dict(zip(("low", "high"), ends, strict=True))


# --- Reading -----------------------------------------------------------------------------------
def evaluations(paths: ReleasePaths) -> list[str]:
    """List the names of a release's evaluations, the latest first, of equally old ones by name."""
    found = sorted(paths.evaluations.glob("*/evaluation.json"))
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in found]


@contextmanager
def as_recorded(*records: Path) -> Iterator[None]:
    """Turn an error over what records hold, as forged ones, into one that names their files."""
    try:
        yield
    except FORGED as error:
        names = " or ".join(map(str, records))
        raise IntegrityError(f"{names}: damaged: {first_line(error)}; {FORMAT.remedy}") from error


def open_evaluation(
    release: Release, name: str | None = None
) -> tuple[EvaluationPaths, Release, dict[str, Any], pa.Table]:
    """Open an evaluation, by default the latest: files, whole release, record, predictions."""
    if not (found := evaluations(release.paths)):
        advice = command("evaluate", release.paths.root)
        raise SdwnError(f"{release.paths.root}: not evaluated yet; run: {advice}")
    if (name := name or found[0]) not in found:
        raise UsageError(f"{release}: no evaluation {name!r}; there is {', '.join(sorted(found))}")
    paths = release.paths.evaluation(name)
    # Predictions are compared row by row with all images.
    release = Release(release.paths.root) if release.selection else release
    record = read_evaluation(release, paths)
    predictions = read_own_predictions(release, paths, record)
    labelled = release.labelled_by(predictions.network.get("class_names", ()))
    return paths, labelled, record, predictions.table


def read_own_predictions(
    release: Release, paths: EvaluationPaths, record: Mapping[str, Any] | None = None
) -> Predictions:
    """Read an evaluation's predictions, compared row by row with the release's images."""
    selection = (record or read_evaluation(release, paths)).get("selection")
    found = Predictions.read(paths.predictions, release.manifest.most_rows)
    images = release.labelled_by(found.network.get("class_names", ()))
    images = images.subset(imagenet=True) if selection == "imagenet" else images
    return found.keyed(paths.predictions, images.metadata)


def read_evaluation(release: Release, paths: EvaluationPaths) -> dict[str, Any]:
    """Read the record of an evaluation; refuse one of another release, or of other predictions."""
    every = paths.root.parent
    refuse_links(every if every.is_symlink() else paths.root)
    record = FORMAT.read_sealed(paths.evaluation)
    if record.get("release") != release.digest:
        problem = f"{paths.evaluation}: of another release"
    elif not paths.predictions.is_file():
        problem = f"{paths.predictions}: missing"
    elif file_sha256(paths.predictions) != record.get("predictions_sha256"):
        problem = f"{paths.predictions}: changed (its SHA-256 is not the recorded one)"
    else:
        return record
    raise IntegrityError(f"{problem}; {FORMAT.remedy}")


def main_figures(paths: EvaluationPaths, record: dict[str, Any]) -> dict[str, Any]:
    """Return each metric, and the evaluation's name and path."""
    return {
        **{metric.name: record["figures"][metric.name] for metric in METRICS},
        "images_judged": record["images_classified"],
        "evaluation": paths.root.name,
        "path": str(paths.evaluation),
    }
