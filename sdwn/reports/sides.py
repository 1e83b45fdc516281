"""What is compared: releases and evaluations, as a person names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.groups import is_line
from sdwn.evaluation.record import evaluations, read_evaluation
from sdwn.evaluation.verify import prediction_problems
from sdwn.prediction.table import read_predictions
from sdwn.releases.release import Release
from sdwn.reports.compare import Side


def open_sides(arguments: Sequence[str], evaluation: str | None = None) -> list[Side]:
    """Open what is to be compared.

    Args:
        arguments: releases, or folders of evaluations in them, each with a name of its own
            where wanted: ``guided=RELEASE``, ``vit=RELEASE/evaluations/NAME``.
        evaluation: which of a release's evaluations; by default the latest of the first
            release that all of them have.

    Raises:
        SdwnError: there is no such release or evaluation.
    """
    named = [_named(argument) for argument in arguments]
    names = _distinct([name for name, _ in named])
    chosen = evaluation or _shared([path for _, path in named])
    return [_open(name, path, chosen) for name, (_, path) in zip(names, named, strict=True)]


def _named(argument: str) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    # A folder's own name may hold the sign.
    if not equals or not name or Path(argument).exists():
        path, name = argument, ""
    if name and not is_line(name):
        raise UsageError(f"{argument!r}: expected a line of text before =, found {name!r}")
    folder = Path(path)
    return name or _own_name(folder), folder


def _own_name(folder: Path) -> str:
    if _is_evaluation(folder):
        return f"{_own_name(folder.resolve().parent.parent)} by {folder.name}"
    whole = folder.resolve()
    # The release of a run lies in a folder of that name in the run's.
    return whole.parent.name if whole.name == "release" else whole.name


def _distinct(names: Sequence[str]) -> list[str]:
    """Number what would have one name.

    >>> _distinct(["a", "b", "a"])
    ['a', 'b', 'a (3)']
    >>> _distinct(["a", "a", "a (2)"])
    ['a', 'a (2)', 'a (2) (3)']
    """
    found: list[str] = []
    for place, name in enumerate(names, start=1):
        found.append(name if name not in found else f"{name} ({place})")
    return found


def _is_evaluation(folder: Path) -> bool:
    return folder.resolve().parent.name == "evaluations"


def _shared(folders: Sequence[Path]) -> str | None:
    """Choose the evaluation that all releases have; None where each is named already."""
    releases = [Release(folder) for folder in folders if not _is_evaluation(folder)]
    if not releases:
        return None
    each = [evaluations(release.paths) for release in releases]
    common = set.intersection(*map(set, each))
    if not common:
        had = "; ".join(
            f"{release}: {', '.join(found) or 'none'}"
            for release, found in zip(releases, each, strict=True)
        )
        raise UsageError(
            f"no evaluation that all of them have ({had}); evaluate them by the same model, "
            "with: sdwn evaluate RELEASE --model MODEL"
        )
    return max(common, key=lambda name: each[0][name])


def _open(name: str, folder: Path, evaluation: str | None) -> Side:
    if _is_evaluation(folder):
        release, evaluation = Release(folder.resolve().parent.parent), folder.resolve().name
    else:
        release = Release(folder)
    assert evaluation is not None
    paths = release.paths.evaluation(evaluation)
    if not paths.evaluation.is_file():
        had = ", ".join(evaluations(release.paths)) or "none"
        raise UsageError(f"{release}: no evaluation {evaluation!r}; there is {had}")
    record = read_evaluation(paths)
    for problem in prediction_problems(release, paths, record):
        raise IntegrityError(problem)
    found = read_predictions(paths.predictions, release.manifest.most_rows)
    return Side(name, release, record, found.table)
