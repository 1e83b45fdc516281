"""The commands that measure what was drawn correctly: evaluate, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sdwn.cli import console
from sdwn.cli.options import (
    AsJson,
    Checkpoint,
    EvaluationName,
    Model,
    ReleaseFolder,
    Retries,
    Wait,
    with_site,
)
from sdwn.errors import UsageError

if TYPE_CHECKING:
    from sdwn.config import EvaluationConfig


@with_site
def evaluate_command(
    release: ReleaseFolder,
    site: dict[str, str],
    model: Model = None,
    checkpoint: Checkpoint = None,
    all_: Annotated[bool, Option("--all", help="Also synsets that are no ImageNet class.")] = False,
    groups: Annotated[
        str | None, Option(help="YAML file, NAME: SYNSET a line, or a shipped one's name.")
    ] = None,
    embedding: Annotated[
        Path | None, Option(help="Text file of word vectors, as GloVe's, for the map of classes.")
    ] = None,
    profile: Annotated[str | None, Option(help="Profile for array tasks; default: here.")] = None,
    wait: Wait = False,
    retries: Retries = 2,
    as_json: AsJson = False,
) -> None:
    """Classify a release's images; write figures and tables.

    By a timm model. The same command resumes after a kill; what is classified stays.
    """
    if profile is None and (site.keys() - {"batch_size"} or wait):
        raise typer.BadParameter("--wait and the profile's options need --profile")
    from sdwn.workflow.evaluate_release import (
        evaluate_by_tasks,
        evaluation_profiles,
        evaluation_settings,
    )
    from sdwn.workflow.following import SubmitOptions

    given = {"images": "all" if all_ else None, "groups": groups, "embedding": embedding}
    config = evaluation_settings(release, model, checkpoint, given, console.say)
    if profile is None:
        found = evaluate_here(release, config, site.get("batch_size"))
    else:
        # An evaluation has no retry: the same command continues.
        options = SubmitOptions(wait, retries, command="the same command")
        profiles = evaluation_profiles(profile, site)
        found = evaluate_by_tasks(release, config, profiles, options, console)
    # Tasks may have been submitted only, or no class is of ImageNet.
    if found.get("mean_correct") is None:
        console.result(found, as_json)
    else:
        console.result(found, as_json, console.rows(evaluation_rows(found)))


def evaluate_here(
    release: Path, config: EvaluationConfig, batch_size: str | None = None
) -> dict[str, Any]:
    """Classify a release in this process with a progress bar; return the main figures."""
    from sdwn.batches import parse_batch_size
    from sdwn.evaluation.evaluate import evaluate_planned
    from sdwn.prediction.plan import open_prediction_plan
    from sdwn.releases.release import Release

    opened = Release(release)
    work, plan = open_prediction_plan(opened, config)
    size = None if batch_size is None else parse_batch_size(batch_size, "--batch-size")
    with console.progress("evaluate", plan.images, unit="images") as advance:
        return evaluate_planned(opened, work, plan, advance, console.say, size)


def evaluation_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's main figures as rows, with their units."""
    from sdwn.evaluation.metrics import metrics_shown

    return {
        "images classified": found["images_judged"],
        "of classes": f"{found['images']:,} images of {found['classes']:,} ImageNet-1k classes",
        **{metric.label: metric.text(found) for metric in metrics_shown("terminal")},
        "evaluation": found["evaluation"],
        "path": found["path"],
    }


def compare_command(
    which: Annotated[
        list[str],
        Argument(
            metavar="RELEASE...",
            help="Evaluated releases, or RELEASE/evaluations/NAME; LABEL=... names one.",
        ),
    ],
    out: Annotated[Path, Option(help="The folder to write the page and tables to.")],
    evaluation: Annotated[
        str | None, Option(help="Which evaluation, by name; default: the latest that all have.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare evaluated releases or models in pairs.

    Each with the first, by class and by group, with paired tests.
    """
    from sdwn.evaluation.metrics import metrics_shown
    from sdwn.paths import ComparisonPaths
    from sdwn.reports.comparison import (
        compare_evaluations,
        open_sides,
        pair_in_words,
        setting_words,
        write_comparison,
    )

    paths = ComparisonPaths(out)
    sides = open_sides(which, evaluation)
    for side in sides:
        if side.release.paths.root.resolve() in (out.resolve(), *out.resolve().parents):
            raise UsageError(f"--out {out}: it lies in {side.release}; choose another folder")
    with console.working("comparing"):
        comparison = compare_evaluations(sides)
        write_comparison(comparison, sides, paths)
    figures = [
        {"name": side["name"]}
        | {name: value for name, value in side["figures"].items() if isinstance(value, int | float)}
        for side in comparison["sides"]
    ]
    pairs = [
        {
            **{key: pair[key] for key in ("first", "second", "rate")},
            "verdict": ": ".join(pair_in_words(pair)),
        }
        for pair in comparison["pairs"]
    ]
    found = {
        "sides": figures,
        "classes_in_common": comparison["classes_in_common"],
        "settings": comparison["settings"],
        "pairs": pairs,
        "path": str(paths.page),
    }
    rows = {
        side["name"]: ", ".join(
            f"{metric.label} {metric.text(side)}" for metric in metrics_shown("compared")
        )
        for side in figures
    }
    rows["classes in common"] = found["classes_in_common"]
    rows |= {
        setting_words(row["setting"]): ", ".join(
            "not set" if value is None else str(value) for value in row["values"]
        )
        for row in found["settings"]
    }
    rows |= {f"result {n}": pair["verdict"] for n, pair in enumerate(pairs, start=1)}
    console.result(found, as_json, console.rows({**rows, "path": found["path"]}))


def report_command(
    release: ReleaseFolder,
    evaluation: EvaluationName = None,
    as_json: AsJson = False,
) -> None:
    """Write an evaluation's page and its figures.

    The page is one HTML file, the figures are PNG and SVG.
    """
    from sdwn.releases.release import Release
    from sdwn.reports.report import write_report

    with console.working("writing the report"):
        path = write_report(Release(release), evaluation)
    console.result({"path": str(path)}, as_json)
