"""The commands that measure a release and look at it: evaluate, compare, report, show, browse."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from sdwn.cli import console, options
from sdwn.errors import UsageError, command, counted
from sdwn.io import atomic, write_text
from sdwn.paths import ComparisonPaths

if TYPE_CHECKING:
    from sdwn.config import EvaluationConfig

PAGE, PICTURES = ".html", (".png", ".jpg", ".webp")


@options.with_site
def evaluate_command(
    release: options.ReleaseFolder,
    site: dict[str, str],
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    all_: Annotated[bool, Option("--all", help="Also synsets that are no ImageNet class.")] = False,
    groups: Annotated[str | None, Option(help="YAML file of NAME: SYNSET lines.")] = None,
    embedding: Annotated[Path | None, Option(help="Word vectors for the map, as GloVe's.")] = None,
    profile: options.MaybeProfile = None,
    wait: options.Wait = False,
    retries: options.Retries = 2,
    as_json: options.AsJson = False,
) -> None:
    """Classify a release's images; write figures and tables.

    By a timm model. The same command resumes after a kill; what is classified stays.
    """
    if profile is None and (site.keys() - {"batch_size"} or wait):
        raise typer.BadParameter("--wait and the profile's options need --profile")
    from sdwn.workflow import evaluate_release
    from sdwn.workflow.status import next_for_release
    from sdwn.workflow.submitting import SubmitOptions

    given = {"images": "all" if all_ else None, "groups": groups, "embedding": embedding}
    config = evaluate_release.evaluation_settings(release, model, checkpoint, given, console.say)
    if profile is None:
        found = evaluate_here(release, config, site.get("batch_size"))
    else:
        # An evaluation has no retry: the same command continues.
        how = SubmitOptions(wait, retries, command="the same command")
        profiles = evaluate_release.evaluation_profiles(profile, site)
        found = evaluate_release.evaluate_by_tasks(release, config, profiles, how, console)
    if "work" not in found:
        step = next_for_release(release)
        console.result(found, as_json, evaluation_rows(found), next_=step)
        return
    # Tasks were submitted.
    lines = [f"classified: {found['done']:,} of {counted(found['shards'], 'shard')}"]
    if found["job_ids"]:
        tasks = counted(found["submitted"], "task")
        lines.append(f"submitted {tasks}: {console.job_names(found['job_ids'])}")
    step = command("status", found["work"], "--watch")
    console.result(found, as_json, *lines, *found["failures"], next_=step)


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
    with console.progress("classifying", plan.images) as bar:
        return evaluate_planned(opened, work, plan, bar.advance, console.say, size)


def evaluation_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's main figures as rows, with their units."""
    from sdwn.evaluation.metrics import metrics_shown

    metrics = {metric.label: metric.text(found) for metric in metrics_shown("terminal")}
    return {
        "images classified": found["images_judged"],
        "of classes": f"{found['images']:,} images of {found['classes']:,} ImageNet-1k classes",
        **(metrics if found["images"] else {}),
        "evaluation": found["path"],
    }


def compare_command(
    which: Annotated[
        list[str],
        Argument(metavar="RELEASE...", help="LABEL=RELEASE, or RELEASE/evaluations/NAME."),
    ],
    out: Annotated[Path, Option(help="The folder to write the page and tables to.")],
    evaluation: Annotated[
        str | None, Option(help="Evaluation's name; default: the latest that all have.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare evaluated releases or models in pairs.

    Each with the first, by class and by group, with paired tests.
    """
    from sdwn.evaluation.metrics import metrics_shown
    from sdwn.reports import comparison

    paths, sides = ComparisonPaths(out), comparison.open_sides(which, evaluation)
    for side in sides:
        if side.release.paths.root.resolve() in (out.resolve(), *out.resolve().parents):
            raise UsageError(f"--out {out}: it lies in {side.release}; choose another folder")
    with console.progress("comparing"):
        compared = comparison.compare_evaluations(sides)
        comparison.write_comparison(compared, sides, paths)
    figures = [
        {"name": side["name"]}
        | {name: value for name, value in side["figures"].items() if isinstance(value, int | float)}
        for side in compared["sides"]
    ]
    pairs = [
        {
            **{key: pair[key] for key in ("first", "second", "rate")},
            "verdict": ": ".join(comparison.pair_in_words(pair)),
        }
        for pair in compared["pairs"]
    ]
    found = {
        "sides": figures,
        "classes_in_common": compared["classes_in_common"],
        "settings": compared["settings"],
        "pairs": pairs,
        "path": str(paths.page),
    }
    rows = {
        side["name"]: ", ".join(
            f"{metric.label} {metric.text(side)}" for metric in metrics_shown("compared")
        )
        for side in figures
    }
    rows["classes in common"] = f"{found['classes_in_common']:,}"
    for row in found["settings"]:
        values = ("not set" if value is None else str(value) for value in row["values"])
        rows[comparison.setting_words(row["setting"])] = ", ".join(values)
    sentences = [pair["verdict"] for pair in pairs]
    console.result(found, as_json, *sentences, {**rows, "page": found["path"]})


def report_command(
    release: options.ReleaseFolder,
    evaluation: options.EvaluationName = None,
    as_json: options.AsJson = False,
) -> None:
    """Write an evaluation's page and its figures.

    The page is one HTML file, the figures are PNG and SVG.
    """
    from sdwn.releases.release import Release
    from sdwn.reports.report import write_report

    with console.progress("writing the report"):
        path = write_report(Release(release), evaluation)
    step = command("browse", release)
    console.result({"path": str(path)}, as_json, {"report": str(path)}, next_=step)


def show_command(
    release: options.ReleaseFolder,
    synset: options.SynsetName,
    evaluation: options.EvaluationName = None,
    open_: Annotated[bool, Option("--open", help="Open its sheet in the browser.")] = False,
    save: Annotated[Path | None, Option(help="Write its sheet to FILE.html or FILE.png.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show a synset: its images and their classification."""
    from sdwn.browser.library import Library
    from sdwn.browser.sheet import sheet_page, sheet_picture, sheet_record
    from sdwn.exchange.formats import path_name

    if save is not None:
        options.require_savable(save, release, (PAGE, *PICTURES))
    with console.progress("opening the release"):
        library = Library(release, evaluation)
    for name, reason in library.refused.items():
        console.say(f"the evaluation {name} is not shown: {reason}")
    entry = library.find(synset)
    found = sheet_record(library, entry)
    if save is None and open_:
        # A folder that only its owner may read; it stays, for the browser reads it later.
        folder = Path(tempfile.mkdtemp(prefix="sdwn-"))
        save = folder / f"{path_name(entry.synset)}{PAGE}"
    if save is not None:
        if save.suffix.lower() == PAGE:
            write_text(save, sheet_page(library, entry))
        else:
            with atomic(save) as temporary:
                form = {".jpg": "JPEG"}.get(save.suffix.lower(), save.suffix[1:].upper())
                sheet_picture(library, entry).save(temporary, form)
        found["path"] = str(save)
        if open_ and not webbrowser.open(save.absolute().as_uri()):
            console.say(f"no browser here to open it in; copy it to where there is one: {save}")
    console.result(found, as_json, sheet_rows(found), "", sheet_table(found))


def sheet_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return a synset's facts as rows."""
    if found["evaluation"] is None:
        correct = "not evaluated yet"
    else:
        other = found["evaluation"] != found["model"]
        by = f"by {found['model']}" + f" ({found['evaluation']})" * other
        counts = f"{found['right']:,} of {found['judged']:,}"
        correct = f"{counts}, {by}" if found["judged"] else f"no ImageNet class, {by}"
    return {
        found["synset"]: found["wnid"],
        "lemmas": ", ".join(found["lemmas"]) or None,
        "definition": found["definition"] or None,
        "prompt": "the definition"
        if found["prompt"] and found["prompt"] == found["definition"]
        else found["prompt"] or "not recorded, or one for each image",
        "above": " > ".join(found["above"]) or None,
        "images": counted(found["images"], "image") + f", {found['black']} of them black",
        "correct": correct,
        "regenerate": found["regenerate"] or "imported: how they were made is not recorded",
        "sheet": found.get("path"),
    }


def sheet_table(found: dict[str, Any]) -> Table:
    """Return a table of a synset's images: seed, status, best class, whether it is correct."""
    table = Table("image", "seed", "status", "classified as", "", "", box=None)
    states = {"right": "correct", "wrong": "incorrect", "black": "black"}
    for image in found["shots"]:
        best = (image["top5"] or [None])[0]
        seen = [best["name"], f"{100 * best['probability']:.0f} %"] if best else ["", ""]
        seed = "" if image["seed"] is None else str(image["seed"])
        state, share = states.get(image["state"], ""), image["subtree_probability"]
        if image["state"] == "other" and share is not None:
            state = f"{100 * share:.0f} % at or below it"
        cells = [str(image["number"]), seed, image["status"], *seen, state]
        table.add_row(*map(console.literal, cells))
    return table


def browse_command(
    release: options.ReleaseFolder,
    other: Annotated[Path | None, Argument(help="A release of the same synsets.")] = None,
    evaluation: options.EvaluationName = None,
    port: Annotated[int | None, Option(min=0, max=65535, help="Default: 8642 or next.")] = None,
    host: Annotated[str, Option(help="Address to listen at; others need the token.")] = "127.0.0.1",
    token: Annotated[bool, Option("--token", help="Require the token that is printed.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Look through a release in the browser.

    Search, WordNet's tree, each image and its classification. Ctrl-C ends it.
    """
    from sdwn.browser.library import Library
    from sdwn.browser.server import listen, make_app, serve

    with listen(host, port, token) as listening:
        with console.progress("opening the release"):
            here = Library(release, evaluation)
            there = Library(other, evaluation) if other else None
        app = make_app(here, there, token=listening.token, hosts=listening.hosts)
        # Who asks before the server runs waits in the queue of its port.
        found = {
            "url": listening.url,
            "port": listening.port,
            "pid": os.getpid(),
            "tunnel": listening.tunnel,
            "release": here.root,
            "images": len(here.release),
            "synsets": len(here.collection),
            "evaluation": here.predictions.name if here.predictions else None,
        }
        console.result(found, as_json, listening.url)
        sys.stdout.flush()  # whoever started the command may read it from a pipe
        if not as_json:
            if listening.tunnel:
                console.say(f"first, on your own machine, run: {listening.tunnel}")
                if not listening.token:
                    console.say(
                        "other users of this machine can open it too; --token keeps them out"
                    )
            for name, reason in here.refused.items():
                console.say(f"the evaluation {name} is not shown: {reason}")
            if here.tree_missing:
                console.say(f"without WordNet's tree: {here.tree_missing}")
            console.say("Ctrl-C ends it")
        for library in filter(None, (here, there)):
            library.warm()
        serve(app, listening)
