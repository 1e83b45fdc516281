"""What arXiv 2211.01777 published, under the names that the same figures have here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sdwn.evaluation.metrics import ClassResult
from sdwn.wordnet.taxonomy import Taxonomy

SOURCE = "arXiv:2211.01777"
NOTE = (
    "The paper counts 861 ImageNet classes by name; by wnid the same catalog holds 862, since "
    "Cardigan the dog (n02113186) and cardigan the jacket (n02963159) differ only in case."
)

FIGURES: dict[str, float] = {
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
# Classes with none right, by the synset that they lie below.
NONE_CORRECT = {"animal.n.01": 162}
CORRECT = {"greenhouse.n.01": 10, "black-footed_ferret.n.01": 0, "leafhopper.n.01": 0}


def beside(classes: Iterable[ClassResult], taxonomy: Taxonomy) -> dict[str, Any]:
    """Put what the paper says of subtrees and of single classes beside what was found here.

    ``ours`` is None for a class without images.
    """
    rows = {row.wnid: row for row in classes}
    return {
        **FIGURES,
        "source": SOURCE,
        "note": NOTE,
        "groups": [_group(name, rows, taxonomy) for name in NONE_CORRECT],
        "named_classes": [_class(name, rows, taxonomy) for name in CORRECT],
    }


def _group(name: str, rows: dict[str, ClassResult], taxonomy: Taxonomy) -> dict[str, Any]:
    root = taxonomy.find(name)
    none = [wnid for wnid, row in rows.items() if not row.correct]
    ours = sum(taxonomy.is_below(wnid, root) for wnid in none)
    counted = {"none_correct_classes": NONE_CORRECT[name], "ours": ours}
    return {"wnid": root, "synset": name, **counted}


def _class(name: str, rows: dict[str, ClassResult], taxonomy: Taxonomy) -> dict[str, Any]:
    wnid = taxonomy.find(name)
    row = rows.get(wnid)
    counted = {"correct": CORRECT[name], "ours": row.correct if row else None}
    return {"wnid": wnid, "synset": name, **counted}
