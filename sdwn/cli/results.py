"""The commands that evaluate, measure, compare and show releases."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table
from typer import Argument, Option

from sdwn.cli import console, options
from sdwn.cli.console import Result
from sdwn.errors import UsageError, command, counted, duration, some
from sdwn.io import atomic, csv_text, write_text
from sdwn.paths import ComparisonPaths, RunPaths

if TYPE_CHECKING:
    from sdwn.config import EvaluationConfig

PAGE, PICTURES = ".html", {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}


def evaluate_command(
    release: options.ReleaseFolder,
    site: dict[str, str],
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    all_: Annotated[
        bool, Option("--all", help="Also concepts that are no ImageNet class.")
    ] = False,
    groups: Annotated[str | None, Option(help="YAML file of NAME: SYNSET lines.")] = None,
    embedding: Annotated[Path | None, Option(help="Word vectors for the map, as GloVe's.")] = None,
    profile: options.MaybeProfile = None,
    wait: options.Wait = False,
    retries: options.Retries = 2,
) -> Result:
    """Classify a release's images; write figures and tables.

    By a timm model. The same command resumes after a kill; what is classified stays.
    """
    from sdwn.workflow.submitting import evaluation_settings

    given = {"images": "all" if all_ else None, "groups": groups, "embedding": embedding}
    config = evaluation_settings(release, model, checkpoint, given, console.say)
    return make_or_submit_results(release, config, profile, site, wait, retries)


def make_or_submit_results(
    release: Path,
    chosen: EvaluationConfig | str,
    profile: str | None,
    site: dict[str, str],
    wait: bool,
    retries: int,
) -> Result:
    """Classify or encode a release here or by tasks; return how these stand unless all is done."""
    from sdwn.workflow import submitting
    from sdwn.workflow.status import next_for_release

    encoded = isinstance(chosen, str)
    if profile is None:
        if site.keys() - {"batch_size"} or wait:
            raise typer.BadParameter("--wait and the profile's options need --profile")
        found = make_results_here(release, chosen, site.get("batch_size"))
    else:
        # Here is no retry: the same command continues.
        how = submitting.SubmitOptions(wait, retries, command="the same command")
        profiles = submitting.evaluation_profiles(profile, site)
        found = submitting.make_results_by_tasks(release, chosen, profiles, how, console)
    if "work" in found:
        what, shards = "encoded" if encoded else "classified", counted(found["shards"], "shard")
        lines = [f"{what}: {found['done']:,} of {shards}"]
        if found["job_ids"]:
            tasks = counted(found["submitted"], "task")
            lines.append(f"submitted {tasks}: {console.job_names(found['job_ids'])}")
        step = command("status", found["work"], "--watch")
        return Result(found, *lines, *found["failures"], next_=step)
    if not encoded:
        return Result(found, evaluation_rows(found), next_=next_for_release(release))
    rows = {
        "features": found["path"],
        "images": f"{found['images']:,}, {found['dimensions']:,} numbers each",
        "size": decimal(found["bytes"]),
    }
    return Result(found, rows, next_=command("measure", release, "--features", found["features"]))


def make_results_here(
    release: Path, chosen: EvaluationConfig | str, batch_size: str | None = None
) -> dict[str, Any]:
    """Classify or encode a release in this process with a progress bar; return what there is."""
    from sdwn.batches import parse_batch_size
    from sdwn.evaluation.evaluate import make_results, open_image_plan

    opened = options.open_release(release)
    size = None if batch_size is None else parse_batch_size(batch_size, "--batch-size")
    work, plan = open_image_plan(opened, chosen)
    with console.progress(plan.doing, plan.images) as bar:
        return make_results(opened, work, plan, bar.advance, console.say, size)


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


def release_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return a release's counts as rows."""
    statuses = found.get("statuses")
    return {
        "release": found["release"],
        "images": found["images"],
        "missing images": found.get("missing_images"),
        "statuses": statuses and ", ".join(f"{n:,} {status}" for status, n in statuses.items()),
        f"{found['unit']}s": found["synsets"],
        "ImageNet classes": found.get("imagenet_classes"),
        "size": decimal(found["bytes"]),
    }


def features_command(
    release: options.ReleaseFolder,
    site: dict[str, str],
    model: Annotated[
        str,
        Option(help="dinov2, efficientnet-lite0, any timm model, clip:FOLDER or clip:ORG/NAME."),
    ] = "dinov2",
    profile: options.MaybeProfile = None,
    wait: options.Wait = False,
    retries: options.Retries = 2,
) -> Result:
    """Encode a release's images, for all measures of them.

    One vector an image, kept with the release. The same command resumes after a kill; what is
    encoded stays, also in a release that grows out of this one.
    """
    return make_or_submit_results(release, model, profile, site, wait, retries)


def measure_command(
    release: options.ReleaseFolder,
    reference: Annotated[Path | None, Option(help="A release of real images.")] = None,
    features: options.FeaturesName = None,
    images: Annotated[int, Option(min=10, help="Most images that are compared.")] = 10_000,
) -> Result:
    """Measure likeness, variety and truth to the prompts.

    By features that sdwn features made. With --reference, figures are of the classes that both
    releases have, and of as many images a class.
    """
    from sdwn.measures.measure import measure_release

    opened = options.open_release(release)
    other = options.open_release(reference) if reference else None
    with console.progress("measuring") as bar:
        paths, found = measure_release(opened, other, features, images, bar.note)
    return _measured(found, paths.record, release)


def _measured(found: dict[str, Any], path: Path, release: Path) -> Result:
    """Return what a command measured and recorded; the classes stand in their table alone."""
    from sdwn.measures.record import figure_rows
    from sdwn.workflow.status import next_for_release

    left_out = found["classes_left_out"].items()
    more = (f"{len(names):,} of {side}: {some(names, 3)}" for side, names in left_out if names)
    rows: dict[str, Any] = {**figure_rows(found), "classes": len(found["classes"])}
    rows |= {"left out": "; ".join(more) or None, "record": str(path)}
    values = {name: value for name, value in found.items() if name != "classes"}
    return Result({**values, "path": str(path)}, rows, next_=next_for_release(release))


def transfer_command(
    release: options.ReleaseFolder,
    test: Annotated[Path, Option(metavar="REAL", help="A release of real images to test on.")],
    train: Annotated[
        Path | None, Option(metavar="REAL", help="Real images to train on, for comparison.")
    ] = None,
    features: options.FeaturesName = None,
    seed: Annotated[int, Option(min=0, help="Which images are drawn for the curve.")] = 0,
) -> Result:
    """Train on a release, test on real images.

    A linear probe on features learns from 1, 2, 5 ... images a class. Make the features of all
    releases first, with sdwn features.
    """
    from sdwn.measures.transfer import measure_transfer

    named = {"synthetic": release, "real": train, "test": test}
    releases = {which: options.open_release(one) for which, one in named.items() if one}
    with console.progress("training probes") as bar:
        paths, found = measure_transfer(releases, features, seed, bar.note)
    return _measured(found, paths.record, release)


def query_command(
    release: options.ReleaseFolder,
    sql: Annotated[str, Argument(metavar="SELECT", help="The question, as one argument.")],
    evaluation: options.EvaluationName = None,
    as_csv: Annotated[bool, Option("--csv", help="Print all rows as CSV.")] = False,
    as_json: options.AsJson = False,
) -> Result:
    """Ask in SQL what is known of a release's images.

    Tables: images, predictions, scores (a row an image each), synsets. SQL is DuckDB's;
    DESCRIBE images lists its columns. Nothing is written, and no other file can be read.
    """
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json: choose one")
    from sdwn.measures.query import open_database

    with console.progress("reading the tables"):
        database = open_database(options.open_release(release), sql, evaluation)
    if not (as_csv or as_json):
        wide = console.stdout.width if console.stdout.is_terminal else console.LONGEST_LINE
        return Result({}, database.draw(sql, wide))
    columns, rows = database.answer(sql)
    if as_json:
        return Result({"columns": columns, "rows": list(rows)})
    return Result({}, csv_text(columns, (row.values() for row in rows)))


def duplicates_command(
    release: options.ReleaseFolder,
    against: Annotated[
        Path | None, Option(metavar="REAL", help="Also find copies of this release's images.")
    ] = None,
    features: options.FeaturesName = None,
) -> Result:
    """Find copies among the images, exact and near.

    Images with equal pixels are exact duplicates. Near ones have features of a similarity of at
    least 0.97; 0.945 where their perceptual hashes differ in at most 14 of 64 bits, 0.6 where in at
    most 2. Black images are left out. Writes a page of pairs, pairs.csv, and scores of each image.
    """
    from sdwn.measures.duplicates import find_duplicates
    from sdwn.measures.record import figure_rows
    from sdwn.reports.report import write_duplicates_page

    opened = options.open_release(release)
    reference = options.open_release(against) if against else None
    with console.progress("looking for duplicates"):
        found = find_duplicates(opened, reference, features)
        write_duplicates_page(opened, reference, found)
    rows: dict[str, Any] = figure_rows(found.content)
    rows["black, not compared"] = found.content["black_left_out"] or None
    rows["page"] = str(found.paths.page)
    where = ("--format", "release", "--where", "NOT duplicate_of_better")
    step = command("export", release, "DEST", *where) if found.content["groups_found"] else None
    return Result({**found.content, "path": rows["page"]}, rows, next_=step)


def compare_command(
    which: Annotated[
        list[str],
        Argument(metavar="RELEASE...", help="LABEL=RELEASE, RELEASE/evaluations/NAME, or a sweep."),
    ],
    out: Annotated[
        Path | None, Option(help="Folder of the page; default: comparison, in a sweep's.")
    ] = None,
    evaluation: Annotated[
        str | None, Option(help="Evaluation's name; default: the latest that all have.")
    ] = None,
    by: Annotated[
        str | None, Option(metavar="MEASURE", help="Of a sweep: what ranks cells; default: top-1.")
    ] = None,
) -> Result:
    """Compare evaluated releases, models, or a sweep's cells.

    Each with the first, by class and by group, with paired tests; cells with the best one.
    """
    if len(which) == 1 and options.kind_of(Path(which[0])) == "sweep":
        found = compare_sweep(Path(which[0]), out, evaluation, by)
        return Result(found, found["words"], {**found["lacking"], "page": found["path"]})
    if by is not None:
        raise typer.BadParameter("--by needs a sweep")
    from sdwn.evaluation.metrics import metrics_shown
    from sdwn.reports import comparison

    sides = comparison.open_sides(which, evaluation)
    if out is None:
        raise typer.BadParameter("--out is needed: the folder to write the page and tables to")
    paths = ComparisonPaths(out)
    for side in sides:
        if side.release.paths.root.resolve() in (out.resolve(), *out.resolve().parents):
            raise UsageError(f"--out {out}: it lies in {side.release}; choose another folder")
    with console.progress("comparing"):
        compared = comparison.compare_evaluations(sides)
        comparison.write_comparison(compared, sides, paths)
    figures, rows, shown = [], dict[str, str](), metrics_shown("compared")
    for side in compared["sides"]:
        numbers = {name: x for name, x in side["figures"].items() if isinstance(x, int | float)}
        figures.append({"name": side["name"], **numbers})
        rows[side["name"]] = ", ".join(f"{one.label} {one.text(numbers)}" for one in shown)
    pairs = []
    for pair in compared["pairs"]:
        kept = {name: pair[name] for name in ("first", "second", "rate")}
        pairs.append({**kept, "verdict": ": ".join(comparison.pair_in_words(pair))})
    kept = {name: compared[name] for name in ("classes_in_common", "settings", "measures")}
    found = {"sides": figures, **kept, "pairs": pairs, "path": str(paths.page)}
    rows["classes in common"] = f"{found['classes_in_common']:,}"
    for row in found["settings"]:
        values = ("not set" if value is None else str(value) for value in row["values"])
        rows[comparison.setting_words(row["setting"])] = ", ".join(values)
    return Result(found, *(pair["verdict"] for pair in pairs), {**rows, "page": found["path"]})


def compare_sweep(
    folder: Path, out: Path | None = None, evaluation: str | None = None, by: str | None = None
) -> dict[str, Any]:
    """Compare a sweep's cells; return what is known of them, and the page's path."""
    from sdwn.reports.comparison import compare_cells

    paths = ComparisonPaths(out or RunPaths(folder).comparison)
    with console.progress("comparing"):
        found = compare_cells(options.run_folders(folder), evaluation, paths, by)
    return {**found, "path": str(paths.page)}


def report_command(
    release: options.ReleaseFolder, evaluation: options.EvaluationName = None
) -> Result:
    """Write an evaluation's page and its figures.

    The page is one HTML file, figures are PNG, SVG and PDF, tables LaTeX.
    """
    from sdwn.reports.report import write_report

    with console.progress("writing the report"):
        path = write_report(options.open_release(release), evaluation)
    return Result({"path": str(path)}, {"report": str(path)}, next_=command("browse", release))


def show_command(
    release: options.ReleaseFolder,
    synsets: Annotated[
        list[str] | None,
        Argument(metavar="SYNSET", help="By name, wnid or lemma; default: the whole release."),
    ] = None,
    evaluation: options.EvaluationName = None,
    best: Annotated[
        int | None, Option(min=1, help="A grid of so many images, surest first.")
    ] = None,
    worst: Annotated[int | None, Option(min=1, help="The same, least sure first.")] = None,
    open_: Annotated[bool, Option("--open", help="Open its sheet in the browser.")] = False,
    save: Annotated[Path | None, Option(help="Write it to FILE: .html, .png, or .pdf.")] = None,
) -> Result:
    """Show a concept's images, a grid, or a release's contents.

    Without SYNSET: plan, model, versions, hosts, licence, checksum, and what was computed. With
    several, or --best or --worst, a grid; surest means by the evaluation's classifier.
    """
    if best or worst or len(synsets or ()) > 1:
        if save is None or open_ or bool(best) + bool(worst) + bool(synsets) > 1:
            raise typer.BadParameter("draw a grid with --save, of SYNSETs, --best or --worst alone")
        options.require_savable(save, release, (".png", ".pdf"))
        from sdwn.reports.figures import write_grid

        with console.progress("drawing the grid"):
            opened = options.open_release(release)
            count = write_grid(opened, synsets or (), best or -(worst or 0), evaluation, save)
        return Result({"path": str(save), "images": count}, {"grid": str(save)})
    if not synsets:
        if open_ or save or evaluation:
            raise typer.BadParameter("--open, --save and --evaluation need a SYNSET")
        return _contents(release)
    from sdwn.browser.library import Library
    from sdwn.browser.pages import sheet_page, sheet_picture, sheet_record
    from sdwn.exchange.export import path_name

    if save is not None:
        options.require_savable(save, release, (PAGE, *PICTURES))
    with console.progress("opening the release"):
        library = Library(release, evaluation)
    for name, reason in library.refused.items():
        console.say(f"the evaluation {name} is not shown: {reason}")
    entry = library.collection.by_id[library.release.find_one(synsets[0])]
    found = sheet_record(library, entry)
    if save is None and open_:
        # A folder that only its owner may read; it stays, for the browser reads it later.
        save = Path(tempfile.mkdtemp(prefix="sdwn-"), f"{path_name(entry.concept.name)}{PAGE}")
    if save is not None:
        if save.suffix.lower() == PAGE:
            write_text(save, sheet_page(library, entry))
        else:
            with atomic(save) as temporary:
                sheet_picture(library, entry).save(temporary, PICTURES[save.suffix.lower()])
        found["path"] = str(save)
        if open_ and not webbrowser.open(save.absolute().as_uri()):
            console.say(f"no browser here to open it in; copy it to where there is one: {save}")
    return Result(found, sheet_rows(found), "", sheet_table(found))


def _contents(folder: Path) -> Result:
    """Return what a release is made of."""
    from sdwn.reports.contents import release_contents
    from sdwn.workflow.status import next_for_release

    with console.progress("reading the release"):
        found = release_contents(options.open_release(folder))
    made_with = {name: some(values, 8) for name, values in found["made_with"].items()}
    named = {name: made_with.pop(name, None) for name in ("model", "revision", "device", "host")}
    plans = []
    for plan in found["plans"]:
        how, images = plan["generation"], counted(plan["images"], "image")
        plans.append(
            f"{plan['digest'][:12]}: {images} of {plan['catalog']}, "
            f"{how['width']}x{how['height']}, {counted(how['num_inference_steps'], 'step')}, "
            f"guidance {how['guidance_scale']:g}, seed {plan['seed']}"
        )
    joules, seconds = found["energy_joules"], found["device_seconds"]
    rows = {
        **release_rows(found),
        "plan": plans or None,
        **named,
        "versions": ", ".join(f"{name} {value}" for name, value in made_with.items()) or None,
        "images from": found["started"],
        "merged" if plans else "imported": f"{found['created']}, by sdwn {found['sdwn']}",
        "device time": seconds and duration(seconds),
        "energy": joules and f"{joules / 3.6e6:,.2f} kWh",
        "kills survived": found["resumed"],
        "source": found["source"],
        "licence": found["licence"],
        "SHA-256": f"{found['sha256']} (manifest.json, which has those of all files)",
    }
    computed = ("evaluations", "features", "measures", "transfer", "duplicates")
    rows |= {name: ", ".join(found[name]) or None for name in computed}
    return Result(found, found["name"], rows, next_=next_for_release(folder))


def sheet_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return a concept's facts as rows."""
    correct = "not evaluated yet"
    if found["evaluation"] is not None:
        other = f" ({found['evaluation']})" if found["evaluation"] != found["model"] else ""
        counts = f"{found['right']:,} of {found['judged']:,}"
        correct = counts if found["judged"] else "no ImageNet class"
        correct += f", by {found['model']}{other}"
    several = "\n".join(found["prompts"])
    prompt = found["prompt"] or several or "not recorded, or one for each image"
    return {
        found["synset"] or found["label"]: found["id"],
        "lemmas": ", ".join(found["lemmas"]) or None,
        "definition": found["definition"] or None,
        "prompt": "the definition" if prompt == found["definition"] else prompt,
        "negative prompt": found["negative_prompt"],
        "above": " > ".join(found["above"]) or None,
        "images": counted(found["images"], "image") + f", {found['black']} of them black",
        "correct": correct,
        "regenerate": found["regenerate"] or "imported: how they were made is not recorded",
        "sheet": found.get("path"),
    }


def sheet_table(found: dict[str, Any]) -> Table:
    """Return a table of a concept's images: seed, status, best class, whether it is correct."""
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
    other: Annotated[Path | None, Argument(help="A release of the same concepts.")] = None,
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
        Result(found, listening.url).print(as_json)
        sys.stdout.flush()  # whoever started the command may read it from a pipe
        if not as_json:
            if listening.tunnel:
                console.say(f"first, on your own machine, run: {listening.tunnel}")
            if listening.tunnel and not listening.token:
                console.say("other users of this machine can open it too; --token keeps them out")
            for name, reason in here.refused.items():
                console.say(f"the evaluation {name} is not shown: {reason}")
            if here.tree_missing and here.release.has_tree:
                console.say(f"without WordNet's tree: {here.tree_missing}")
            console.say("Ctrl-C ends it")
        for library in filter(None, (here, there)):
            library.warm()
        serve(app, listening)
