"""What is wrong with the evaluations that lie in a release."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdwn.errors import IntegrityError, command
from sdwn.evaluation.record import evaluations, read_evaluation
from sdwn.io import file_sha256
from sdwn.paths import EvaluationPaths
from sdwn.prediction.table import disagreements, read_predictions
from sdwn.releases.release import Release


def evaluation_problems(release: Release) -> Iterator[str]:
    """Name what is wrong with the predictions of a release's evaluations.

    Raises:
        IntegrityError: the release's own tables are damaged.
    """
    for name in evaluations(release.paths):
        paths = release.paths.evaluation(name)
        try:
            yield from problems_of(release, paths, read_evaluation(paths))
        except IntegrityError as error:
            yield str(error)


def problems_of(
    release: Release, paths: EvaluationPaths, record: Mapping[str, Any]
) -> Iterator[str]:
    """Name what is wrong with the predictions of one evaluation, whose record is sound.

    Raises:
        IntegrityError: they cannot be read.
    """
    if foreign := not_its_own(release, paths, record):
        yield foreign
    else:
        found = read_predictions(paths.predictions, release.manifest.most_rows)
        images = release.subset(imagenet=True) if record["selection"] == "imagenet" else release
        differ = disagreements(found.table, images.metadata)
        yield from (f"{paths.predictions}: {problem}" for problem in differ)


def not_its_own(release: Release, paths: EvaluationPaths, record: Mapping[str, Any]) -> str | None:
    """Say why an evaluation is not of this release, or its predictions not those of its figures."""
    if record["release"] != release.digest:
        return f"{paths.evaluation}: of another release; {_again(release, record)}"
    if not paths.predictions.is_file():
        return f"{paths.predictions}: missing; {_again(release, record)}"
    if file_sha256(paths.predictions) != record["predictions_sha256"]:
        return (
            f"{paths.predictions}: changed (its SHA-256 is not the recorded one); "
            f"{_again(release, record)}"
        )
    return None


def _again(release: Release, record: Mapping[str, Any]) -> str:
    classifier = record["classifier"]
    words = ["--model", classifier["model"]]
    # Where a user's own checkpoint lies now only the user knows.
    words += ["--checkpoint", "FILE"] * (classifier["weights"] == "checkpoint")
    words += ["--all"] * (record["selection"] == "all")
    return f"evaluate again with: {command('evaluate', release.paths.root, *words)}"
