"""The commands of releases: those that write, check and read them; that measure and show them."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal
from rich.table import Table
from typer import Argument, Option

from sdwn.cli import console, options
from sdwn.cli.sweep import each_cell
from sdwn.errors import IntegrityError, UsageError, command, counted, duration, some
from sdwn.io import atomic, csv_text, strays, write_text
from sdwn.paths import ComparisonPaths, ReleasePaths, RunPaths

if TYPE_CHECKING:
    from sdwn.config import EvaluationConfig
    from sdwn.releases.merge import MergeOptions

# Files left out of an import that are named on the terminal; the release names all.
SKIPPED_SHOWN = 20
PAGE, PICTURES = ".html", (".png", ".jpg", ".webp")


@each_cell
def merge_command(
    runs: options.Runs,
    release: Annotated[Path | None, Option(help="Its folder; default: release, in RUN.")] = None,
    evaluate_: Annotated[bool, Option("--evaluate", help="Then evaluate it.")] = False,
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    check: Annotated[
        Literal["quick", "full"], Option(help="quick: every image's checksum; full: decode it too.")
    ] = "quick",
    allow_missing: Annotated[
        bool, Option("--allow-missing", help="Merge runs that are not finished, too.")
    ] = False,
    part_size: options.PartSize = 4.0,
    as_json: options.AsJson = False,
) -> None:
    """Check every shard and write the release.

    The same command resumes after a kill.
    """
    if (model or checkpoint) and not evaluate_:
        raise typer.BadParameter("--model and --checkpoint need --evaluate")
    if release is None:
        if len(runs) > 1:
            raise typer.BadParameter("several runs need --release")
        release = RunPaths(runs[0]).release
    from sdwn.releases.merge import MergeOptions
    from sdwn.workflow.status import next_for_release

    how = MergeOptions(int(part_size * 1e9), allow_missing, decode=check == "full")
    found = merge_runs(runs, release, how)
    rows = release_rows(found)
    if evaluate_:
        from sdwn.workflow.submitting import with_classifier

        _, plan = options.open_run(runs[0])
        config = with_classifier(plan.config.evaluation, model, checkpoint)
        evaluated = evaluate_here(release, config)
        found, rows = with_evaluation(found, evaluated), {**rows, **evaluation_rows(evaluated)}
    console.result(found, as_json, rows, next_=next_for_release(release))


def merge_runs(runs: list[Path], release: Path, how: MergeOptions) -> dict[str, Any]:
    """Merge runs into a release with a progress bar; return its counts."""
    from sdwn.evaluation.evaluate import keep_computed
    from sdwn.planning.plan import read_plan
    from sdwn.releases.merge import merge, merged_summary

    paths, into = [RunPaths(run) for run in runs], ReleasePaths(release)
    plan = read_plan(paths[0])
    images = plan.images + (plan.extends.images if plan.extends else 0)
    with console.progress("merging", images) as bar:
        return merged_summary(merge(paths, into, how, bar.advance, keep_computed))


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


def with_evaluation(merged: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """Return both results as one; ``images`` stays the release's."""
    return {**evaluated, "evaluated_images": evaluated["images"], **merged}


@each_cell
def verify_command(
    release: options.ReleaseFolder,
    check: Annotated[
        Literal["quick", "full"], Option(help="quick: tables and sizes; full: every image.")
    ] = "full",
    as_json: options.AsJson = False,
) -> None:
    """Check a release against its own record.

    Names what is damaged, missing or extra.
    """
    from sdwn.evaluation.verify import verify
    from sdwn.workflow.status import next_for_release

    opened = options.open_release(release)
    with console.progress("verifying", opened.manifest.bytes, "bytes") as bar:
        problems = verify(release, check == "quick", bar.advance)
    left = [str(path.relative_to(opened.paths.root)) for path in strays(opened.paths.root)]
    found = {"images": len(opened), "ok": not problems, "problems": problems}
    values = {**found, "left_by_desktop_or_server": left}
    images = counted(len(opened), "image")
    text = f"the release is as its record says: {images}"
    if problems:
        text = f"{counted(len(problems), 'problem')} in a release of {images}"
    rows = {"problems": problems or None, "files of a desktop or server": left or None}
    step = None if problems else next_for_release(release)
    console.result(values, as_json, text, rows, next_=step, failed=bool(problems))


def regenerate_command(
    release: options.ReleaseFolder,
    synset: options.SynsetName,
    number: Annotated[int, Argument(metavar="NUMBER", help="The image's number, from 0.")],
    save: Annotated[Path | None, Option(help="Write the new image as PNG.")] = None,
    model: Annotated[str | None, Option(help="Name or folder now; default: as recorded.")] = None,
    tolerance: Annotated[
        float, Option(min=0, max=255, help="Largest RMS difference, in 8-bit steps, still equal.")
    ] = 4.0,
    as_json: options.AsJson = False,
) -> None:
    """Regenerate an image, and compare the two."""
    from sdwn.generation.regenerate import regenerate

    if save is not None:
        options.require_savable(save, release, (".png",))
    with console.progress("regenerating the image"):
        found, image = regenerate(options.open_release(release), synset, number, model, tolerance)
    if save is not None:
        with atomic(save) as temporary:
            image.save(temporary, "PNG")
    rows = {
        "image": f"{found.synset}, number {found.number}",
        "result": found.verdict,
        "difference": f"root mean square {found.rms:.3g}, largest {found.largest}, in 8-bit steps; "
        f"up to {found.tolerance:g} (root mean square) is the same image",
        "batch": f"{found.batch_size} images, this one at position {found.place}",
        "status": found.status,
        "changed since": found.reasons or None,
        "saved": save and str(save),
    }
    console.result(asdict(found), as_json, rows, failed=found.verdict == "different")


def export_command(
    release: options.ReleaseFolder,
    dest: Annotated[Path, Argument(metavar="DEST", help="The folder to write.")],
    format_: Annotated[
        Literal["folders", "imagefolder", "webdataset", "parquet", "release"],
        Option("--format", help="release: a smaller one, of the chosen images."),
    ],
    only: Annotated[
        Path | None, Option(help="Only what a list of concepts or images names.")
    ] = None,
    below: Annotated[str | None, Option(help="Only this synset or wnid, and those below.")] = None,
    imagenet: Annotated[bool, Option("--imagenet", help="Only ImageNet-1k classes.")] = False,
    status: Annotated[
        str | None, Option(help="Only images of this status: ok leaves out black ones.")
    ] = None,
    sample: Annotated[
        str | None, Option(metavar="SHARE", help="Only this share of the concepts, as 1%.")
    ] = None,
    where: Annotated[
        str | None, Option(metavar="CONDITION", help="Only images that fulfil it, in SQL.")
    ] = None,
    per_synset: Annotated[
        int | None, Option(metavar="N", min=1, help="At most N images of each concept.")
    ] = None,
    order_by: Annotated[
        str | None, Option(metavar="EXPR", help="The first N by this, as 'clip_score DESC'.")
    ] = None,
    short: Annotated[
        Path | None, Option(metavar="FILE.csv", help="Write the concepts with fewer than N.")
    ] = None,
    evaluation: options.EvaluationName = None,
    codec: Annotated[
        Literal["stored", "png", "webp", "jpeg"] | None,
        Option(help="stored: bytes as they are; png, webp: lossless; jpeg: smaller."),
    ] = None,
    quality: Annotated[
        int | None, Option(min=1, max=100, help="Of jpeg, default 95; makes webp lossy.")
    ] = None,
    resize: Annotated[int | None, Option(min=1, help="Most pixels of the shorter side.")] = None,
    split: Annotated[str | None, Option(help="Divide each class, as train=0.9,val=0.1.")] = None,
    shuffle: Annotated[int | None, Option(min=0, help="Seed of a random order.")] = None,
    part_size: Annotated[
        float | None, Option(metavar="GB", min=0, max=1e6, help="Minimum size of a file, in GB.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a release in another format.

    All of it, or the images that the options choose: --only takes a list of concepts, or a table
    with the columns id (or wnid, synset, label) and number; --where and --order-by are SQL over
    the columns of the metadata and all scores (docs/measures.md). Files have at least 1 GB
    (webdataset), 0.5 GB (parquet) or 4 GB (release). The same command resumes after a kill.
    """
    from sdwn.exchange.export import ExportOptions, export, select_listed

    opened = options.open_release(release)
    if only is not None:
        opened = select_listed(opened, only)
    if below is not None or imagenet or status is not None:
        opened = opened.subset(below=below, imagenet=imagenet, status=status)
    if sample is not None:
        opened = opened.sample(parse_share(sample))
    if per_synset is None and (order_by or short):
        raise typer.BadParameter("--order-by and --short need --per-synset")
    if short is not None:
        options.require_savable(short, release, (".csv",), "--short")
    lacking = list[tuple[Any, int]]()
    if where is not None or per_synset is not None:
        from sdwn.measures.query import choose

        every = counted(len(opened), "image")
        opened, lacking = choose(opened, where, per_synset, order_by, evaluation)
        if not len(opened):
            raise UsageError(f"0 of {every} fulfil --where {where}")
    codec = codec or ("jpeg" if quality else "stored")
    part_bytes = None if part_size is None else int(part_size * 1e9)
    splits = {} if split is None else parse_splits(split)
    how = ExportOptions(format_, codec, quality, part_bytes, shuffle, splits, resize)
    with console.progress("exporting", len(opened)) as bar:
        found = export(opened, dest, how, bar.advance)
    kinds = sorted(set(opened.metadata["codec"].to_pylist()))
    if format_ == "webdataset" and codec == "stored" and len(kinds) > 1:
        console.say(
            f"the tars hold images of several kinds ({', '.join(kinds)}): Hugging Face datasets "
            "takes only tars of one kind; for it export with: --codec png, or --codec jpeg"
        )
    rows = {"format": format_, "images": found["images"], f"{opened.unit}s": found["synsets"]}
    rows |= {"path": found["path"], "size": decimal(found["bytes"])}
    for name, has in found["splits"].items():
        concepts = counted(has["synsets"], opened.unit)
        rows[f"split {name}"] = f"{counted(has['images'], 'image')} of {concepts}"
    step = command("browse", dest) if format_ == "release" else None
    if per_synset is not None:
        found["short"] = rows[f"{opened.unit}s with fewer than {per_synset}"] = len(lacking)
    if short is not None:
        head = ("id", "wnid", "synset", "have", "wanted")
        lines = ((one.id, one.wnid, one.synset, have, per_synset) for one, have in lacking)
        write_text(short, csv_text(head, lines))
        if lacking and opened.manifest.plans:
            more = f"images_per_synset={2 * max(one.images for one, _ in lacking)}"
            step = command("extend", release, "RUN", "--only", short, "--set", more)
    console.result(found, as_json, rows, next_=step)


def parse_splits(text: str) -> dict[str, float]:
    """Read the shares of splits by their names.

    >>> parse_splits("train=0.9,val=10%")
    {'train': 0.9, 'val': 0.1}
    """
    parts = [one.partition("=") for one in text.split(",")]
    return {name.strip(): parse_share(share, "--split") for name, _, share in parts}


def parse_share(text: str, option: str = "--sample") -> float:
    """Read a share, in percent or as a fraction; a bare 1 may have been meant as either.

    >>> parse_share("1%"), parse_share("0.25")
    (0.01, 0.25)
    """
    number, percent, _ = text.partition("%")
    with suppress(ValueError):
        value = float(number) / 100 if percent else float(number)
        if 0 < value < 1 or (value == 1 and percent):
            return value
    raise UsageError(f"{option} {text}: expected a share such as 1% or 0.01, up to 100%")


def push_command(
    release: options.ReleaseFolder,
    name: Annotated[str, Argument(metavar="ORG/NAME", help="The data set's name on the hub.")],
    format_: Annotated[
        Literal["parquet", "webdataset", "release"] | None,
        Option("--format", help="Of a release; default: parquet, exported beside it."),
    ] = None,
    private: Annotated[bool, Option("--private", help="Make the data set private.")] = False,
    replace: Annotated[bool, Option("--replace", help="Delete what else is in it.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Upload a release to the Hugging Face hub.

    RELEASE may be a folder of sdwn export too, for any format and choice of images. The same
    command resumes after a kill; at the end the files are compared with those that the hub lists.
    """
    from sdwn.evaluation.verify import verify
    from sdwn.exchange.push import HubDataset, export_to_push, push

    opened = options.open_release(release) if options.kind_of(release) == "release" else None
    if opened is None and (format_ or not ReleasePaths(release).card.is_file()):
        expected = "expected a release, or, without --format, a folder that sdwn export wrote"
        raise UsageError(f"{release}: {expected}")
    folder, hub = release, HubDataset(name, private, console.say)
    if opened is not None:
        with console.progress("verifying", opened.manifest.bytes, "bytes") as bar:
            problems = verify(release, format_ != "release", bar.advance)
        if problems:
            raise IntegrityError("\n".join([f"{release} is damaged: not pushed", *problems]))
        if format_ != "release":
            with console.progress("exporting", len(opened)) as bar:
                folder = export_to_push(opened, format_ or "parquet", bar.advance)
    found = push(folder, hub, replace)
    rows = {name: found[name] for name in ("url", "commit", "files", "path")}
    console.result(found, as_json, rows | {"size": decimal(found["bytes"])})


def import_command(
    source: Annotated[Path, Argument(metavar="SOURCE", help="The folder of images.")],
    release: Annotated[Path, Argument(metavar="RELEASE", help="The folder of the new release.")],
    format_: Annotated[
        Literal["folders", "imagefolder"],
        Option("--format", help="folders: beside a text file; imagefolder: by folder."),
    ],
    origin: Annotated[str | None, Option(help="For the card: where the images are from.")] = None,
    licence: Annotated[str | None, Option(help="For the card: the licence, as cc-by-4.0.")] = None,
    follow_links: Annotated[bool, Option("--follow-links", help="Also out of SOURCE.")] = False,
    part_size: options.PartSize = 4.0,
    as_json: options.AsJson = False,
) -> None:
    """Make a release of image files as they are.

    In the format folders, a text file of prompt, synset and wnid lies beside the images; in
    imagefolder, their folder's name begins with a wnid, or is their label. Files that are no
    readable image are left out and named.
    """
    from sdwn.exchange.import_images import ImportOptions, count_files, import_images
    from sdwn.workflow.status import next_for_release

    how = ImportOptions(format_, int(part_size * 1e9), origin, licence, follow_links)
    with console.progress("looking for images"):
        count = count_files(source, follow_links)
    with console.progress("importing", count, "files") as bar:
        found = import_images(source, ReleasePaths(release), how, bar.advance)
    for name, reason in found.skipped[:SKIPPED_SHOWN]:
        console.say(f"left out: {name}: {reason}")
    if (more := len(found.skipped) - SKIPPED_SHOWN) > 0:
        console.say(f"left out: {more:,} more, see {found.release.paths.skipped}")
    for label, wnids in found.unclear.items():
        console.say(f"{label}: of no ImageNet class, for several are called so: {', '.join(wnids)}")
    values = {
        **found.release.manifest.model_dump(include={"images", "imagenet_classes", "bytes"}),
        "synsets": found.release.manifest.concepts,
        "unit": found.release.unit,
        "skipped": len(found.skipped),
        "ignored_folders": found.ignored,
        "release": str(release),
    }
    ignored = ", ".join(f"{count:,} {name}" for name, count in found.ignored.items())
    rows = {
        **release_rows(values),
        "left out": len(found.skipped) or None,
        "ignored folders": ignored or None,
    }
    console.result(values, as_json, rows, next_=next_for_release(release))


@options.with_site
@each_cell
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
    as_json: options.AsJson = False,
) -> None:
    """Classify a release's images; write figures and tables.

    By a timm model. The same command resumes after a kill; what is classified stays.
    """
    from sdwn.workflow import submitting
    from sdwn.workflow.status import next_for_release

    given = {"images": "all" if all_ else None, "groups": groups, "embedding": embedding}
    config = submitting.evaluation_settings(release, model, checkpoint, given, console.say)
    if found := evaluate_or_submit(release, config, profile, site, wait, retries, as_json):
        console.result(found, as_json, evaluation_rows(found), next_=next_for_release(release))


def evaluate_or_submit(
    release: Path,
    chosen: EvaluationConfig | str,
    profile: str | None,
    site: dict[str, str],
    wait: bool,
    retries: int,
    as_json: bool,
) -> dict[str, Any] | None:
    """Classify or encode a release here or by tasks; print how these stand unless all is done."""
    if profile is None:
        if site.keys() - {"batch_size"} or wait:
            raise typer.BadParameter("--wait and the profile's options need --profile")
        return evaluate_here(release, chosen, site.get("batch_size"))
    from sdwn.workflow import submitting

    # Here is no retry: the same command continues.
    how = submitting.SubmitOptions(wait, retries, command="the same command")
    profiles = submitting.evaluation_profiles(profile, site)
    found = submitting.evaluate_by_tasks(release, chosen, profiles, how, console)
    if "work" not in found:
        return found
    what = "encoded" if isinstance(chosen, str) else "classified"
    lines = [f"{what}: {found['done']:,} of {counted(found['shards'], 'shard')}"]
    if found["job_ids"]:
        tasks = counted(found["submitted"], "task")
        lines.append(f"submitted {tasks}: {console.job_names(found['job_ids'])}")
    step = command("status", found["work"], "--watch")
    console.result(found, as_json, *lines, *found["failures"], next_=step)
    return None


def evaluate_here(
    release: Path, chosen: EvaluationConfig | str, batch_size: str | None = None
) -> dict[str, Any]:
    """Classify or encode a release in this process with a progress bar; return what there is."""
    from sdwn.batches import parse_batch_size
    from sdwn.evaluation.evaluate import evaluate

    opened = options.open_release(release)
    size = None if batch_size is None else parse_batch_size(batch_size, "--batch-size")
    doing, count = "encoding", len(opened)
    if not isinstance(chosen, str):
        doing, count = "classifying", len(opened.subset(imagenet=chosen.images == "imagenet"))
    with console.progress(doing, count) as bar:
        return evaluate(opened, chosen, bar.advance, console.say, size)


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
    as_json: options.AsJson = False,
) -> None:
    """Compare evaluated releases, models, or a sweep's cells.

    Each with the first, by class and by group, with paired tests; cells with the best one.
    """
    if len(which) == 1 and options.kind_of(Path(which[0])) == "sweep":
        found = compare_sweep(Path(which[0]), out, evaluation, by)
        console.result(found, as_json, found["words"], {**found["lacking"], "page": found["path"]})
        return
    if by is not None:
        raise typer.BadParameter("--by needs a sweep")
    if out is None:
        raise typer.BadParameter("--out is needed: the folder to write the page and tables to")
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
        "measures": compared["measures"],
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


def compare_sweep(
    folder: Path, out: Path | None = None, evaluation: str | None = None, by: str | None = None
) -> dict[str, Any]:
    """Compare a sweep's cells; return what is known of them, and the page's path."""
    from sdwn.reports.sweep import compare_cells

    paths = ComparisonPaths(out or RunPaths(folder).comparison)
    with console.progress("comparing"):
        found = compare_cells(options.run_folders(folder), evaluation, paths, by)
    return {**found, "path": str(paths.page)}


@each_cell
def report_command(
    release: options.ReleaseFolder,
    evaluation: options.EvaluationName = None,
    as_json: options.AsJson = False,
) -> None:
    """Write an evaluation's page and its figures.

    The page is one HTML file, figures are PNG, SVG and PDF, tables LaTeX.
    """
    from sdwn.reports.report import write_report

    with console.progress("writing the report"):
        path = write_report(options.open_release(release), evaluation)
    step = command("browse", release)
    console.result({"path": str(path)}, as_json, {"report": str(path)}, next_=step)


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
    as_json: options.AsJson = False,
) -> None:
    """Show a concept's images, a grid, or a release's contents.

    Without SYNSET: plan, model, versions, hosts, licence, checksum, and what was computed. With
    several, or --best or --worst, a grid; surest means by the evaluation's classifier.
    """
    if best or worst or len(synsets or ()) > 1:
        if save is None or open_ or bool(best) + bool(worst) + bool(synsets) > 1:
            raise typer.BadParameter("draw a grid with --save, of SYNSETs, --best or --worst alone")
        options.require_savable(save, release, (".png", ".pdf"))
        from sdwn.reports.paper import write_grid

        with console.progress("drawing the grid"):
            opened = options.open_release(release)
            count = write_grid(opened, synsets or (), best or -(worst or 0), evaluation, save)
        console.result({"path": str(save), "images": count}, as_json, {"grid": str(save)})
        return
    if not synsets:
        if open_ or save or evaluation:
            raise typer.BadParameter("--open, --save and --evaluation need a SYNSET")
        show_contents(release, as_json)
        return
    (synset,) = synsets
    from sdwn.browser.library import Library, sheet_page, sheet_picture, sheet_record
    from sdwn.exchange.export import path_name

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
        save = folder / f"{path_name(entry.concept.name)}{PAGE}"
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


def show_contents(folder: Path, as_json: bool) -> None:
    """Print what a release is made of."""
    from sdwn.reports.contents import release_contents
    from sdwn.workflow.status import next_for_release

    with console.progress("reading the release"):
        found = release_contents(options.open_release(folder))
    made_with = {name: some(values, 8) for name, values in found["made_with"].items()}
    named = {name: made_with.pop(name, None) for name in ("model", "revision", "device", "host")}
    plans = [
        f"{plan['digest'][:12]}: {counted(plan['images'], 'image')} of {plan['catalog']}, "
        f"{how['width']}x{how['height']}, {counted(how['num_inference_steps'], 'step')}, "
        f"guidance {how['guidance_scale']:g}, seed {plan['seed']}"
        for plan in found["plans"]
        for how in [plan["generation"]]
    ]
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
    console.result(found, as_json, found["name"], rows, next_=next_for_release(folder))


def sheet_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return a concept's facts as rows."""
    if found["evaluation"] is None:
        correct = "not evaluated yet"
    else:
        other = found["evaluation"] != found["model"]
        by = f"by {found['model']}" + f" ({found['evaluation']})" * other
        counts = f"{found['right']:,} of {found['judged']:,}"
        correct = f"{counts}, {by}" if found["judged"] else f"no ImageNet class, {by}"
    several = "\n".join(found["prompts"]) or "not recorded, or one for each image"
    return {
        found["synset"] or found["label"]: found["id"],
        "lemmas": ", ".join(found["lemmas"]) or None,
        "definition": found["definition"] or None,
        "prompt": "the definition"
        if found["prompt"] and found["prompt"] == found["definition"]
        else found["prompt"] or several,
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
            if here.tree_missing and here.release.has_tree:
                console.say(f"without WordNet's tree: {here.tree_missing}")
            console.say("Ctrl-C ends it")
        for library in filter(None, (here, there)):
            library.warm()
        serve(app, listening)
