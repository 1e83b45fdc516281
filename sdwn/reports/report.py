"""The report of an evaluation: one self-contained HTML page, and figures for print."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdwn.errors import IntegrityError
from sdwn.evaluation.metrics import metrics_shown
from sdwn.evaluation.record import open_evaluation
from sdwn.io import file_sha256, write_text
from sdwn.measures.record import MEASURES, Records, all_records
from sdwn.releases.release import Release
from sdwn.reports.circles import map_circles, map_labels, recognition_rank
from sdwn.reports.figures import Drawn, write_report_figures
from sdwn.reports.page import Album, render
from sdwn.reports.paper import write_paper_files
from sdwn.wordnet.imagenet import class_lemmas, class_name

# Of those recognised best, typical ones and those recognised worst, each.
GALLERY_CLASSES, GALLERY_IMAGES = 8, 20
CONFUSIONS, CONFUSION_PIXELS = 32, 144
MODELS = {"paper": "the paper's vision transformer"}
# The page's sections: each is the template of its name.
SECTIONS = {
    "figures": "Figures",
    "groups": "Groups",
    "measures": "Measures",
    "transfer": "Use for training",
    "map": "Map",
    "gallery": "Gallery",
    "confusions": "Confusions",
    "extremes": "None correct, all correct",
    "classes": "Classes",
    "wordnet": "By WordNet",
    "settings": "Settings and provenance",
}
# Those that the page has where no synset is a class.
WITHOUT_CLASSES = ("measures", "transfer", "wordnet", "settings")

Rows = list[dict[str, Any]]


def write_report(release: Release, name: str | None = None) -> Path:
    """Write an evaluation's page and figures, by default the latest's; return the page's path."""
    paths, release, evaluation, predictions = open_evaluation(release, name)
    # Somebody may have removed it: the page does without.
    table, synsets = paths.table("synsets"), list[dict[str, str]]()
    if table.is_file():
        if file_sha256(table) != evaluation["synsets_sha256"]:
            raise IntegrityError(
                f"{table}: altered since it was written; remove it, or evaluate the release again"
            )
        synsets = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    records = all_records(release)
    figures = write_report_figures(evaluation, paths, records)
    write_paper_files(paths, release, evaluation, records)
    page = report_page(release, evaluation, predictions, figures, synsets, records)
    write_text(paths.report, page)
    return paths.report


def report_page(  # noqa: PLR0913, PLR0917
    release: Release,
    evaluation: Mapping[str, Any],
    predictions: pa.Table,
    drawn: Drawn,
    synsets: Sequence[Mapping[str, str]] = (),
    records: Records | None = None,
) -> str:
    """Render the page as HTML that needs nothing but itself."""
    ranked, own = sorted(evaluation["classes"], key=recognition_rank), not release.has_tree
    wnids = [row["wnid"] for row in ranked]
    album, on_map = Album(release, wnids, predictions), evaluation["map"]
    classes = [
        {
            **row,
            "name": class_name(row["wnid"]),
            "lemmas": ", ".join(class_lemmas(row["wnid"])),
            "prompt": album.prompt(row["wnid"]),
        }
        for row in ranked
    ]
    figures, manifest = evaluation["figures"], release.manifest
    model, images = evaluation["classifier"]["model"], {row["images"] for row in classes}
    confusions = []
    for pair in evaluation["confusions"][:CONFUSIONS]:
        wnid, predicted = pair["wnid"], pair["predicted_wnid"]
        image = next((one for one in album[wnid] if one["predicted"] == predicted), None)
        source = image and album.thumbnail(image, CONFUSION_PIXELS)
        names = {"name": class_name(wnid), "predicted": class_name(predicted)}
        confusions.append({**pair, **names, "source": source})
    measured: dict[str, dict[str, Mapping[str, Any]]] = {"measures": {}, "transfer": {}}
    for (kind, name), record in (records or {}).items():
        measured["transfer" if kind == "transfer" else "measures"][f"{kind}-{name}"] = record
    card = ("name", "synset", "group", "images", "correct", "correct_top5", "black", "prompt")
    return render(
        "report.html",
        {
            "sections": {
                anchor: title
                for anchor, title in SECTIONS.items()
                if (classes or anchor in WITHOUT_CLASSES)
                and not (own and anchor in ("groups", "map", "wordnet"))
                and measured.get(anchor, True)
            },
            # In words and numbers
            "evaluation": evaluation,
            "model": MODELS.get(model, model),
            "own": own,
            "figures": figures,
            "metrics": metrics_shown,
            "without_black": figures["without_black"],
            "paper": evaluation.get("paper"),
            "manifest": manifest,
            "unit": release.unit,
            "settings": manifest.settings,
            "notice": manifest.notice,
            "no_width": any(ends and ends[0] == ends[1] for ends in figures["intervals"].values()),
            "uneven": sorted(images) if len(images) > 1 else None,
            # In lists and images
            "drawn": drawn,
            "classes": classes,
            "names": {row["wnid"]: row["name"] for row in classes},
            "by_wnid": {row["wnid"]: row for row in classes},
            "circles": map_circles(evaluation) if on_map else [],
            "labels": map_labels(evaluation) if on_map else [],
            "measured": measured,
            "all_measures": MEASURES,
            "class_words": {
                one.wnid or one.label or one.id: class_name(one.wnid)
                if one.wnid and one.imagenet_class is not None
                else one.name
                for one in release.present
            },
            "extremes": {
                "No image correct": [row for row in classes if not row["correct"]],
                "All images correct": [row for row in classes if row["correct"] == row["images"]],
            },
            "confusions": confusions,
            "galleries": {
                how: [{**row, "gallery": album.gallery(row["wnid"], GALLERY_IMAGES)} for row in few]
                for how, few in _best_typical_worst(classes).items()
            },
            "synsets": _other_synsets(release, predictions, synsets, set(wnids)),
            "data": {
                "classes": {
                    row["wnid"]: {
                        **{key: row[key] for key in card},
                        "marks": [image["correct"] for image in album[row["wnid"]]],
                    }
                    for row in classes
                },
                "sheets": album.sheets(wnids),
            },
        },
        ("card.js", "class_map.js", "map.js", "tables.js"),
    )


def _best_typical_worst(rows: Rows) -> dict[str, Rows]:
    """Pick rows of a list with the best first, none twice.

    >>> found = _best_typical_worst([{"n": n} for n in range(30)])
    >>> [[row["n"] for row in rows][:2] for rows in found.values()]
    [[0, 1], [11, 12], [29, 28]]
    """
    most = min(GALLERY_CLASSES, -(-len(rows) // 3))
    middle = max(most, (len(rows) - most) // 2)
    picked = {
        "Recognised best": rows[:most],
        "Typical, around the median": rows[middle : middle + most],
        "Recognised worst": rows[middle + most :][-most:][::-1],
    }
    return {how: few for how, few in picked.items() if few}


def _other_synsets(
    release: Release, predictions: pa.Table, synsets: Sequence[Mapping[str, str]], classes: set[str]
) -> dict[str, Rows]:
    """Return synsets that are no class: recognised best, typical and worst, with an image each."""
    numbers = ("subtree_probability", "chance")
    rows: Rows = [
        {**row, **{name: float(row[name]) for name in numbers}}
        for row in synsets
        if row["wnid"] not in classes and row["subtree_probability"]
    ]
    # The one farthest above chance first.
    rows.sort(key=lambda row: (row["chance"] - row["subtree_probability"], row["wnid"]))
    picked = _best_typical_worst(rows)
    album = Album(release, [row["wnid"] for few in picked.values() for row in few], predictions)
    for row in (row for few in picked.values() for row in few):
        image = album[row["wnid"]][0]
        row["name"] = release.concepts[image["id"]].label or row["synset"]
        # Many a synset is not what its name says first: tiger.n.01 is a fierce person.
        row["prompt"] = image["prompt"]
        row["source"] = album.thumbnail(image, CONFUSION_PIXELS)
    return picked
