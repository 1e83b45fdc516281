"""evaluation.json: its format, and reading it."""

from __future__ import annotations

from typing import Any

from sdwn.errors import IntegrityError
from sdwn.files import EvaluationPaths, read_json

FORMAT = "sdwn-evaluation"
FORMAT_VERSION = 2

# The main figures, in the order in which they are shown.
KEYS = (
    "images",
    "classes",
    "images_per_class",
    "top1_percent",
    "top5_percent",
    "mean_correct",
    "std_correct",
    "any_correct",
    "all_correct",
    "none_correct",
    "black_images",
)
_IN_FIGURES = (*KEYS, "statuses", "histogram", "intervals", "without_black")
_KINDS = {
    "release": str,
    "selection": str,
    "predictions_sha256": str,
    "classifier": dict,
    "figures": dict,
    "groups": list,
    "classes": list,
    "confusions": list,
    "wordnet": dict,
}


def read_evaluation(paths: EvaluationPaths) -> dict[str, Any]:
    """Read the record of an evaluation.

    Raises:
        IntegrityError: the file is damaged, or of an earlier or a later version.
    """
    found = read_json(paths.evaluation)
    if found.get("format") == FORMAT and found.get("format_version") != FORMAT_VERSION:
        raise IntegrityError(
            f"{paths.evaluation}: expected {FORMAT} {FORMAT_VERSION}, found version "
            f"{found.get('format_version')}, of another sdwn; evaluate the release again"
        )
    if found.get("format") != FORMAT or (damage := _damage(found)):
        what = f"not of {FORMAT}" if found.get("format") != FORMAT else f"damaged: {damage}"
        raise IntegrityError(f"{paths.evaluation}: {what}; remove {paths.root} and evaluate again")
    return found


def _damage(found: dict[str, Any]) -> str | None:
    for name, kind in _KINDS.items():
        if not isinstance(found.get(name), kind):
            return f"expected {name} as {kind.__name__}, found {type(found.get(name)).__name__}"
    missing = [name for name in _IN_FIGURES if name not in found["figures"]]
    return f"figures without {missing[0]}" if missing else None


def summary(paths: EvaluationPaths, record: dict[str, Any]) -> dict[str, Any]:
    """Give the main figures, and the evaluation's name and path."""
    figures = record["figures"]
    return {
        **{key: figures[key] for key in KEYS},
        "images_judged": record["images_judged"],
        "evaluation": paths.root.name,
        "path": str(paths.evaluation),
    }
