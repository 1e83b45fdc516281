"""evaluation.json: its format, and reading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sdwn.errors import IntegrityError
from sdwn.evaluation.metrics import METRICS
from sdwn.io import read_json, refuse_links
from sdwn.paths import EvaluationPaths, ReleasePaths

FORMAT = "sdwn-evaluation"
FORMAT_VERSION = 2
# Predictions that are sound are kept: it takes seconds.
AGAIN = "evaluate the release again"


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 over all that a record says but its own ``digest``."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def evaluations(paths: ReleasePaths) -> dict[str, float]:
    """Map the name of each evaluation of a release to when it was made, as files count time."""
    found = sorted(paths.evaluations.glob("*/evaluation.json"))
    return {path.parent.name: path.stat().st_mtime for path in found}


def read_evaluation(paths: EvaluationPaths) -> dict[str, Any]:
    """Read the record of an evaluation, checked against its own digest.

    Raises:
        IntegrityError: the file is damaged or altered, or of an earlier or a later version; or
            a link leads out of it.
    """
    every = paths.root.parent
    refuse_links(every if every.is_symlink() else paths.root)
    try:
        found = read_json(paths.evaluation)
    except IntegrityError as error:
        raise IntegrityError(f"{error}; {AGAIN}") from None
    if found.get("format") != FORMAT:
        raise IntegrityError(f"{paths.evaluation}: not of {FORMAT}; {AGAIN}")
    if found.get("format_version") != FORMAT_VERSION:
        raise IntegrityError(
            f"{paths.evaluation}: expected {FORMAT} {FORMAT_VERSION}, found version "
            f"{found.get('format_version')}, of another sdwn; {AGAIN}"
        )
    if found.get("digest") != digest(found):
        raise IntegrityError(
            f"{paths.evaluation}: altered since it was written (its digest is another); {AGAIN}"
        )
    return found


def summary(paths: EvaluationPaths, record: dict[str, Any]) -> dict[str, Any]:
    """Give the main figures, and the evaluation's name and path."""
    figures = record["figures"]
    return {
        **{metric.name: figures[metric.name] for metric in METRICS},
        "images_judged": record["images_judged"],
        "evaluation": paths.root.name,
        "path": str(paths.evaluation),
    }
