"""The report of an evaluation: one self-contained HTML page, and figures for print."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdwn.errors import IntegrityError, SdwnError, command
from sdwn.evaluation.metrics import metrics_shown
from sdwn.evaluation.record import evaluation_mismatch, evaluations, read_evaluation
from sdwn.io import file_sha256, write_text
from sdwn.paths import EvaluationPaths
from sdwn.prediction.table import read_predictions
from sdwn.releases.release import Release
from sdwn.reports.chart_data import ACCENT, PAPER, map_circles
from sdwn.reports.charts import report_charts
from sdwn.reports.figures import write_report_figures
from sdwn.reports.images import Album, class_sheets
from sdwn.reports.page import render

GALLERY_CLASSES, GALLERY_IMAGES = 12, 20
CONFUSIONS, CONFUSION_PIXELS = 32, 72
MODELS = {"paper": "the paper's vision transformer"}
# Synsets that are no class, shown with the most and the least of what chance does not explain.
SYNSETS = 12
# The page's sections: each is the template of its name.
SECTIONS = (
    ("figures", "Figures"),
    ("groups", "Groups"),
    ("map", "Map"),
    ("extremes", "None correct, all correct"),
    ("confusions", "Confusions"),
    ("wordnet", "By WordNet"),
    ("gallery", "Gallery"),
    ("classes", "Classes"),
    ("settings", "Settings and provenance"),
)
# Those that the page has where no synset is a class.
WITHOUT_CLASSES = ("wordnet", "settings")

Rows = list[dict[str, Any]]


def write_report(release: Release, name: str | None = None) -> Path:
    """Write an evaluation's page and figures, by default the latest's; return the page's path.

    Raises:
        SdwnError: there is no such evaluation, it is of other images, or its predictions are not
            those that its figures were made of.
    """
    found = evaluations(release.paths)
    if not found:
        advice = command("evaluate", release.paths.root)
        raise SdwnError(f"{release.paths.root}: not evaluated yet; run: {advice}")
    if name is None:
        name = max(found, key=found.__getitem__)
    if name not in found:
        raise SdwnError(f"no evaluation {name!r}; there is {', '.join(found)}")
    paths = release.paths.evaluation(name)
    evaluation = read_evaluation(paths)
    if foreign := evaluation_mismatch(release, paths, evaluation):
        raise IntegrityError(foreign)
    write_report_figures(evaluation, paths)
    synsets = _read_synsets(paths, evaluation["synsets_sha256"])
    predictions = read_predictions(paths.predictions, release.manifest.most_rows)
    write_text(paths.report, report_page(release, evaluation, predictions.table, synsets))
    return paths.report


def _read_synsets(paths: EvaluationPaths, expected_sha256: str) -> list[dict[str, str]]:
    """Read the table of synsets; none where somebody removed it, for the page does without."""
    table = paths.table("synsets")
    if not table.is_file():
        return []
    if file_sha256(table) != expected_sha256:
        raise IntegrityError(
            f"{table}: altered since it was written; remove it, or evaluate the release again"
        )
    return list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))


def report_page(
    release: Release,
    evaluation: dict[str, Any],
    predictions: pa.Table,
    synsets: Sequence[dict[str, str]] = (),
) -> str:
    """Render the page as HTML that needs nothing but itself; ``synsets`` are synsets.csv's rows."""
    classes = _ranked_classes(release, evaluation)
    album = Album(release, [row["wnid"] for row in classes], predictions)
    best, worst = best_and_worst(classes, GALLERY_CLASSES)
    any_correct = any(row["correct"] for row in classes)
    figures, manifest = evaluation["figures"], release.manifest
    model, images = evaluation["classifier"]["model"], [row["images"] for row in classes]
    return render(
        "report.html",
        {
            # In words and numbers
            "evaluation": evaluation,
            "model": MODELS.get(model, model),
            "figures": figures,
            "metrics": metrics_shown,
            "without_black": figures["without_black"],
            "paper": evaluation.get("paper"),
            "manifest": manifest,
            "settings": manifest.settings,
            "sections": [one for one in SECTIONS if classes or one[0] in WITHOUT_CLASSES],
            "notice": manifest.notice,
            "no_width": any(ends and ends[0] == ends[1] for ends in figures["intervals"].values()),
            "uneven": (min(images), max(images)) if len(set(images)) > 1 else None,
            # In lists and images
            "classes": classes,
            "styles": [style for style, _ in map_circles(evaluation)] if evaluation["map"] else [],
            "extremes": (
                ("No image correct", [row for row in classes if not row["correct"]]),
                ("All images correct", [row for row in classes if row["correct"] == row["images"]]),
            ),
            "confusions": [_confusion(album, row) for row in evaluation["confusions"][:CONFUSIONS]],
            "galleries": (
                ("Recognised best" if any_correct else "First classes", _gallery(album, best)),
                ("Recognised worst" if any_correct else "Last classes", _gallery(album, worst)),
            ),
            "synsets": _other_synsets(release, predictions, synsets, {r["wnid"] for r in classes}),
            "data": {
                "charts": report_charts(evaluation),
                "colours": {"--chart": ACCENT, "--chart-paper": PAPER},
                "classes": {row["wnid"]: _card(album, row) for row in classes},
                "sheets": class_sheets(album, [row["wnid"] for row in classes]),
            },
        },
    )


def _ranked_classes(release: Release, evaluation: dict[str, Any]) -> Rows:
    """Return the classes with their names and prompts, the best first.

    Many have all or none correct: of these the one with the most probability on its subtree.
    """

    def rank(row: dict[str, Any]) -> tuple[float, float, float, str]:
        images, probability = row["images"], row["subtree_probability"] or 0
        return -row["correct"] / images, -row["correct_top5"] / images, -probability, row["wnid"]

    found = []
    for row in sorted(evaluation["classes"], key=rank):
        synset = release.synsets[row["wnid"]]
        lemmas = synset.lemmas.replace("_", " ")
        names = {"synset": synset.synset, "lemmas": lemmas, "name": lemmas.partition(", ")[0]}
        found.append({**row, **names, "prompt": synset.prompt})
    return found


def best_and_worst(rows: Rows, most: int) -> tuple[Rows, Rows]:
    """Pick the best and the worst, none twice, from a list with the best first.

    >>> best_and_worst([{"n": n} for n in range(5)], 2)
    ([{'n': 0}, {'n': 1}], [{'n': 4}, {'n': 3}])
    """
    half = min(most, (len(rows) + 1) // 2)
    return rows[:half], rows[half:][-most:][::-1]


def _card(album: Album, row: dict[str, Any]) -> dict[str, Any]:
    """Return what a class's card on the page says."""
    kept = ("name", "synset", "group", "images", "correct", "black", "prompt")
    marks = "".join(str(int(image.correct)) for image in album[row["wnid"]])
    return {**{key: row[key] for key in kept}, "top5": row["correct_top5"], "marks": marks}


def _gallery(album: Album, classes: Rows) -> Rows:
    return [{**row, "gallery": album.gallery(row["wnid"], GALLERY_IMAGES)} for row in classes]


def _confusion(album: Album, row: dict[str, Any]) -> dict[str, Any]:
    image = album.first_classified_as(row["wnid"], row["predicted_wnid"])
    names = {"name": album.name(row["wnid"]), "predicted": album.name(row["predicted_wnid"])}
    source = album.thumbnail(image, 2 * CONFUSION_PIXELS) if image else None
    return {**row, **names, "source": source}


def _other_synsets(
    release: Release,
    predictions: pa.Table,
    synsets: Sequence[dict[str, str]],
    classes: set[str],
) -> tuple[tuple[str, Rows], ...]:
    """Return the synsets that are no class and recognised best and worst, with an image each."""
    rows: Rows = [
        {
            **row,
            "subtree_probability": float(row["subtree_probability"]),
            "chance": float(row["chance"]),
        }
        for row in synsets
        if row["wnid"] not in classes and row["subtree_probability"]
    ]
    # The one farthest above chance first.
    rows.sort(key=lambda row: (row["chance"] - row["subtree_probability"], row["wnid"]))
    best, worst = best_and_worst(rows, SYNSETS)
    album = Album(release, [row["wnid"] for row in (*best, *worst)], predictions)
    for row in (*best, *worst):
        wnid = row["wnid"]
        # Many a synset is not what its name says first: tiger.n.01 is a fierce person.
        row["name"], row["prompt"] = album.name(wnid), release.synsets[wnid].prompt
        row["source"] = album.thumbnail(album[wnid][0], 2 * CONFUSION_PIXELS)
    return tuple(
        (f"No class themselves: recognised {how}", rows)
        for how, rows in (("best", best), ("worst", worst))
    )
