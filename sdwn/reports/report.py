"""An evaluation becomes one self-contained HTML page, and figures for print."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdwn.errors import IntegrityError, SdwnError, command
from sdwn.evaluation.metrics import metrics_shown
from sdwn.evaluation.record import evaluations, read_evaluation
from sdwn.evaluation.verify import evaluation_mismatch
from sdwn.io import file_sha256, write_text
from sdwn.paths import EvaluationPaths
from sdwn.prediction.table import read_predictions
from sdwn.releases.release import Release
from sdwn.reports import thumbnails
from sdwn.reports.album import Album
from sdwn.reports.charts import charts
from sdwn.reports.figures import write_figures
from sdwn.reports.page import render
from sdwn.reports.palette import ACCENT, PAPER, circles

GALLERY_CLASSES = 12
GALLERY_PICTURES = 20
CONFUSIONS = 32
CONFUSION_PIXELS = 72
JUDGES = {"paper": "the paper's vision transformer"}
# Synsets that are no class, shown with the most and the least of what chance does not explain.
SYNSETS = 12
# What stands in the page where no synset is a class.
WITHOUT_CLASSES = ("wordnet", "settings")
SECTIONS = (
    ("figures", "Figures"),
    ("groups", "Groups"),
    ("map", "Map"),
    ("extremes", "None right, all right"),
    ("confusions", "Confusions"),
    ("wordnet", "By WordNet"),
    ("gallery", "Gallery"),
    ("classes", "Classes"),
    ("settings", "Settings and provenance"),
)


def write_report(release: Release, name: str | None = None) -> Path:
    """Write an evaluation's page and figures, by default the latest's; return the page's path.

    Raises:
        SdwnError: there is no such evaluation, it is of other images, or its predictions are not
            those that its figures were made of.
    """
    paths = _choose(release, name)
    evaluation = read_evaluation(paths)
    if foreign := evaluation_mismatch(release, paths, evaluation):
        raise IntegrityError(foreign)
    write_figures(evaluation, paths)
    synsets = _synsets(paths, evaluation["synsets_sha256"])
    predictions = read_predictions(paths.predictions, release.manifest.most_rows)
    found = page(release, evaluation, predictions.table, synsets)
    write_text(paths.report, found)
    return paths.report


def _choose(release: Release, name: str | None) -> EvaluationPaths:
    found = evaluations(release.paths)
    if not found:
        advice = command("evaluate", release.paths.root)
        raise SdwnError(f"{release.paths.root}: not evaluated yet; run: {advice}")
    if name is None:
        name = max(found, key=found.__getitem__)
    if name not in found:
        raise SdwnError(f"no evaluation {name!r}; there is {', '.join(found)}")
    return release.paths.evaluation(name)


def _synsets(paths: EvaluationPaths, expected_sha256: str) -> list[dict[str, str]]:
    """Read the table of synsets; none where somebody took it away, for the page does without."""
    table = paths.table("synsets")
    if not table.is_file():
        return []
    if file_sha256(table) != expected_sha256:
        raise IntegrityError(
            f"{table}: altered since it was written; remove it, or evaluate the release again"
        )
    return list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))


def page(
    release: Release,
    evaluation: dict[str, Any],
    predictions: pa.Table,
    synsets: Sequence[dict[str, str]] = (),
) -> str:
    """Write the page as HTML that needs nothing but itself; ``synsets`` are synsets.csv's rows."""
    classes = _classes(release, evaluation)
    album = Album(release, [row["wnid"] for row in classes], predictions)
    values = {
        **_told(release, evaluation),
        **_shown(evaluation, classes, album),
        "synsets": _others(release, predictions, _no_classes(synsets, classes)),
    }
    return render("report.html", values)


def _told(release: Release, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Gather what the page says in words and numbers."""
    manifest, images = release.manifest, [row["images"] for row in evaluation["classes"]]
    settings, intervals = manifest.settings, evaluation["figures"]["intervals"]
    sections = [one for one in SECTIONS if images or one[0] in WITHOUT_CLASSES]
    return {
        "evaluation": evaluation,
        "judge": JUDGES.get(evaluation["classifier"]["model"], evaluation["classifier"]["model"]),
        "figures": evaluation["figures"],
        "metrics": metrics_shown,
        "bright": evaluation["figures"]["without_black"],
        "paper": evaluation.get("paper"),
        "manifest": manifest,
        "settings": settings,
        "sections": sections,
        "notice": manifest.notice,
        "flat": any(ends and ends[0] == ends[1] for ends in intervals.values()),
        "uneven": (min(images), max(images)) if len(set(images)) > 1 else None,
        "black_means": (
            "A black image is one that the safety checker blackened, or that the model gave as NaN."
            if settings
            else "A black image is one whose pixels are all zero."
        ),
    }


def _shown(
    evaluation: dict[str, Any], classes: list[dict[str, Any]], album: Album
) -> dict[str, Any]:
    """Gather what the page shows: classes, pictures, figures."""
    best, worst = ends(classes, GALLERY_CLASSES)
    some_right = any(row["correct"] for row in classes)
    return {
        "classes": classes,
        "styles": [style for style, _ in circles(evaluation)] if evaluation["map"] else [],
        "extremes": (
            ("No image right", [row for row in classes if not row["correct"]]),
            ("All images right", [row for row in classes if row["correct"] == row["images"]]),
        ),
        "confusions": [_confusion(album, row) for row in evaluation["confusions"][:CONFUSIONS]],
        "galleries": (
            ("Recognised best" if some_right else "First classes", _gallery(album, best)),
            ("Recognised worst" if some_right else "Last classes", _gallery(album, worst)),
        ),
        "data": {
            "charts": charts(evaluation),
            "colours": {"--chart": ACCENT, "--chart-paper": PAPER},
            "classes": {row["wnid"]: _card(album, row) for row in classes},
            "sheets": thumbnails.sheets(album, [row["wnid"] for row in classes]),
        },
    }


def _classes(release: Release, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the classes with their names and prompts, the best first."""
    rows = sorted(evaluation["classes"], key=_place)
    return [{**row, **_names(release, row["wnid"])} for row in rows]


def _place(row: dict[str, Any]) -> tuple[float, float, float, str]:
    """Rank a class by what is right; of the many with all or none right, by the surest."""
    images, sure = row["images"], row["subtree_probability"] or 0
    return -row["correct"] / images, -row["correct_top5"] / images, -sure, row["wnid"]


def _names(release: Release, wnid: str) -> dict[str, str]:
    row = release.synsets[wnid]
    lemmas = row.lemmas.replace("_", " ")
    name = lemmas.partition(", ")[0]
    return {"synset": row.synset, "lemmas": lemmas, "name": name, "prompt": row.prompt}


Rows = list[dict[str, Any]]


def ends(rows: Rows, most: int) -> tuple[Rows, Rows]:
    """Pick the best and the worst, none twice, from a list with the best first.

    >>> ends([{"n": n} for n in range(5)], 2)
    ([{'n': 0}, {'n': 1}], [{'n': 4}, {'n': 3}])
    """
    half = min(most, (len(rows) + 1) // 2)
    return rows[:half], rows[half:][-most:][::-1]


def _card(album: Album, row: dict[str, Any]) -> dict[str, Any]:
    """Gather what a class's card on the page says."""
    kept = ("name", "synset", "group", "images", "correct", "black", "prompt")
    right = "".join(str(int(picture.right)) for picture in album[row["wnid"]])
    return {**{key: row[key] for key in kept}, "top5": row["correct_top5"], "right": right}


def _gallery(album: Album, classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "pictures": [
                thumbnails.shown(album, row["synset"], one)
                for one in album[row["wnid"]][:GALLERY_PICTURES]
            ],
        }
        for row in classes
    ]


def _confusion(album: Album, row: dict[str, Any]) -> dict[str, Any]:
    one = album.taken_for(row["wnid"], row["predicted_wnid"])
    drawn = thumbnails.thumbnail(album.release, one, 2 * CONFUSION_PIXELS) if one else None
    names = {"name": album.name(row["wnid"]), "predicted": album.name(row["predicted_wnid"])}
    return {**row, **names, "source": drawn}


def _no_classes(
    synsets: Sequence[dict[str, str]], classes: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Give the synsets that are no class, the one farthest above chance first."""
    labelled = {row["wnid"] for row in classes}
    rows = [
        {
            **row,
            "subtree_probability": float(row["subtree_probability"]),
            "chance": float(row["chance"]),
        }
        for row in synsets
        if row["wnid"] not in labelled and row["subtree_probability"]
    ]
    return sorted(rows, key=lambda row: (row["chance"] - row["subtree_probability"], row["wnid"]))


def _others(
    release: Release, predictions: pa.Table, rows: list[dict[str, Any]]
) -> tuple[tuple[str, list[dict[str, Any]]], ...]:
    """Gather the synsets that are no class and that are seen best and worst, with a picture."""
    best, worst = ends(rows, SYNSETS)
    album = Album(release, [row["wnid"] for row in (*best, *worst)], predictions)
    return (
        ("No class themselves: seen best", [_other(album, row) for row in best]),
        ("No class themselves: seen least", [_other(album, row) for row in worst]),
    )


def _other(album: Album, row: dict[str, Any]) -> dict[str, Any]:
    pictures = album[row["wnid"]]
    drawn = thumbnails.thumbnail(album.release, pictures[0], 2 * CONFUSION_PIXELS)
    # Many a synset is not what its name says first: tiger.n.01 is a fierce person.
    prompt = album.release.synsets[row["wnid"]].prompt
    return {**row, "name": album.name(row["wnid"]), "prompt": prompt, "source": drawn}
