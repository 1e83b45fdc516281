"""Pages of one release, self-contained HTML: the report of an evaluation, and its duplicates."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sdwn.evaluation.class_map import map_circles, map_labels, recognition_rank
from sdwn.evaluation.metrics import metrics_shown
from sdwn.evaluation.record import as_recorded, open_evaluation
from sdwn.io import write_text
from sdwn.measures.duplicates import Duplicates
from sdwn.measures.record import MEASURES, all_records
from sdwn.releases.release import Release, image_name
from sdwn.reports.figures import write_report_files
from sdwn.reports.page import Album, render, thumbnail
from sdwn.wordnet.corpus import class_lemmas, class_name

# Of those recognised best, typical ones and those recognised worst, each.
GALLERY_CLASSES, GALLERY_IMAGES = 8, 20
CONFUSIONS, CONFUSION_PIXELS = 32, 144
# So many pairs of duplicates; of equal pixels one for each image that is kept.
PAIRS = 48
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
# Those that the page has where no synset is a class, and those that need WordNet.
WITHOUT_CLASSES = ("measures", "transfer", "wordnet", "settings")
BY_WORDNET = ("groups", "map", "wordnet")
# Of a class, what its card on the page shows.
CARD = ("name", "synset", "group", "images", "correct", "correct_top5", "black", "prompt")

Rows = list[dict[str, Any]]


def write_report(release: Release, name: str | None = None) -> Path:
    """Write an evaluation's page and figures, by default the latest's; return the page's path."""
    paths, release, evaluation, predictions = open_evaluation(release, name)
    records = all_records(release)
    drawn = write_report_files(paths, release, evaluation, records)
    with as_recorded(paths.evaluation, paths.table("synsets")):
        ranked = sorted(evaluation["classes"], key=recognition_rank)
        wnids = [row["wnid"] for row in ranked]
        album = Album(release, wnids, predictions)
        classes = [
            {
                **row,
                "name": class_name(row["wnid"]),
                "lemmas": ", ".join(class_lemmas(row["wnid"])),
                "prompt": album.prompt(row["wnid"]),
            }
            for row in ranked
        ]
        confusions = list[dict[str, Any]]()
        for pair in evaluation["confusions"][:CONFUSIONS]:
            wnid, predicted = pair["wnid"], pair["predicted_wnid"]
            image = next((one for one in album[wnid] if one["predicted"] == predicted), None)
            source = image and thumbnail(release, image, CONFUSION_PIXELS)
            both = {"name": class_name(wnid), "predicted": class_name(predicted)}
            confusions.append({**pair, **both, "source": source})
        measured: dict[str, dict[str, Mapping[str, Any]]] = {"measures": {}, "transfer": {}}
        for (kind, of), record in records.items():
            measured["transfer" if kind == "transfer" else "measures"][f"{kind}-{of}"] = record
        absent = {section for section, found in measured.items() if not found}
        absent |= set() if release.has_tree else set(BY_WORDNET)
        absent |= set() if classes else SECTIONS.keys() - WITHOUT_CLASSES
        figures, model = evaluation["figures"], evaluation["classifier"]["model"]
        images = sorted({row["images"] for row in classes})
        values = {
            "sections": {one: title for one, title in SECTIONS.items() if one not in absent},
            # In words and numbers
            "evaluation": evaluation,
            "model": MODELS.get(model, model),
            "own": not release.has_tree,
            "figures": figures,
            "metrics": metrics_shown,
            "manifest": release.manifest,
            "unit": release.unit,
            "no_width": any(ends and ends[0] == ends[1] for ends in figures["intervals"].values()),
            "uneven": images if len(images) > 1 else None,
            # In lists and images
            "drawn": drawn,
            "classes": classes,
            "names": {row["wnid"]: row["name"] for row in classes},
            "by_wnid": {row["wnid"]: row for row in classes},
            "circles": map_circles(evaluation) if evaluation["map"] else [],
            "labels": map_labels(evaluation) if evaluation["map"] else [],
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
            "synsets": _other_synsets(release, predictions, paths.table("synsets"), {*wnids}),
            "data": {
                "classes": {
                    row["wnid"]: {
                        **{key: row[key] for key in CARD},
                        "marks": [image["correct"] for image in album[row["wnid"]]],
                    }
                    for row in classes
                },
                "sheets": album.sheets(wnids),
            },
        }
        page = render("report.html", values, ("card.js", "class_map.js", "map.js", "tables.js"))
    write_text(paths.report, page)
    return paths.report


def _best_typical_worst(rows: Rows) -> dict[str, Rows]:
    """Pick rows of a list with the best first, none twice."""
    most = min(GALLERY_CLASSES, -(-len(rows) // 3))
    middle = max(most, (len(rows) - most) // 2)
    picked = {
        "Recognised best": rows[:most],
        "Typical, around the median": rows[middle : middle + most],
        "Recognised worst": rows[middle + most :][-most:][::-1],
    }
    return {how: few for how, few in picked.items() if few}


def _other_synsets(
    release: Release, predictions: pa.Table, table: Path, classes: set[str]
) -> dict[str, Rows]:
    """Return synsets that are no class: recognised best, typical and worst, with an image each."""
    # Somebody may have removed the table: the page does without.
    text = table.read_text(encoding="utf-8") if table.is_file() else ""
    rows: Rows = [
        {**row, **{name: float(row[name]) for name in ("subtree_probability", "chance")}}
        for row in csv.DictReader(io.StringIO(text))
        if row["wnid"] not in classes and row["subtree_probability"]
    ]
    # The one farthest above chance first.
    rows.sort(key=lambda row: (row["chance"] - row["subtree_probability"], row["wnid"]))
    picked = _best_typical_worst(rows)
    shown = [row for few in picked.values() for row in few]
    album = Album(release, [row["wnid"] for row in shown], predictions)
    for row in shown:
        image = album[row["wnid"]][0]
        row["name"] = release.concepts[image["id"]].label or row["synset"]
        # Many a synset is not what its name says first: tiger.n.01 is a fierce person.
        row["prompt"] = image["prompt"]
        row["source"] = thumbnail(release, image, CONFUSION_PIXELS)
    return picked


# --- Duplicates --------------------------------------------------------------------------------
def write_duplicates_page(release: Release, reference: Release | None, found: Duplicates) -> None:
    """Write the page beside the record: pairs with their pictures, the most similar first."""
    kinds = found.pairs["kind"]
    kept = found.pairs.filter(pc.equal(kinds, "exact")).group_by("row", use_threads=False)
    kept = kept.aggregate([("other", "min"), ("other", "count")])
    kept = kept.rename_columns(["row", "other", "copies"]).sort_by([("copies", "descending")])
    tables = {
        "exact": ("Equal pixels", kept, release),
        "near": ("Near duplicates", found.pairs.filter(pc.equal(kinds, "near")), release),
    }
    if reference is not None:
        others = found.pairs.filter(pc.ends_with(kinds, "reference"))
        tables["reference"] = (f"In {reference.paths.name}", others, reference)

    def picture(of: Release, row: int) -> dict[str, Any]:
        return {"name": image_name(of.row(row)), "source": thumbnail(of, row)}

    values = {
        **found.content,
        "release": release,
        "reference": reference,
        "features": found.features,
        "sections": {name: title for name, (title, *_) in tables.items()},
        "counts": {name: len(pairs) for name, (_, pairs, _) in tables.items()},
        "shown": {
            name: [
                (pair, picture(release, pair["row"]), picture(side, pair["other"]))
                for pair in pairs.slice(0, PAIRS).to_pylist()
            ]
            for name, (_, pairs, side) in tables.items()
        },
    }
    write_text(found.paths.page, render("duplicates.html", values, ()))
