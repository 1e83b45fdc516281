"""The commands that write, check and exchange releases."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal
from typer import Argument, Option

from sdwn.cli import console, options
from sdwn.cli.console import Result
from sdwn.cli.results import evaluation_rows, make_results_here, release_rows
from sdwn.errors import IntegrityError, UsageError, command, counted
from sdwn.io import atomic, csv_text, strays, write_text
from sdwn.paths import ReleasePaths, RunPaths

if TYPE_CHECKING:
    from sdwn.config import EvaluationConfig
    from sdwn.releases.merge import MergeOptions

# Files left out of an import that are named on the terminal; the release names all.
SKIPPED_SHOWN = 20


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
) -> Result:
    """Check every shard and write the release.

    The same command resumes after a kill.
    """
    if (model or checkpoint) and not evaluate_:
        raise typer.BadParameter("--model and --checkpoint need --evaluate")
    if release is None and len(runs) > 1:
        raise typer.BadParameter("several runs need --release")
    from sdwn.releases.merge import MergeOptions
    from sdwn.workflow.status import next_for_release
    from sdwn.workflow.submitting import with_classifier

    release, config = release or RunPaths(runs[0]).release, None
    if evaluate_:
        _, plan = options.open_run(runs[0])
        config = with_classifier(plan.config.evaluation, model, checkpoint)
    how = MergeOptions(int(part_size * 1e9), allow_missing, decode=check == "full")
    found, rows = merge_runs(runs, release, how, config)
    return Result(found, rows, next_=next_for_release(release))


def merge_runs(
    runs: list[Path], release: Path, how: MergeOptions, config: EvaluationConfig | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge runs into a release, evaluate it if wanted; return its counts, and as rows."""
    from sdwn.evaluation.evaluate import keep_computed
    from sdwn.planning.plan import read_plan
    from sdwn.releases.merge import merge, merged_summary

    paths, into = [RunPaths(run) for run in runs], ReleasePaths(release)
    plan = read_plan(paths[0])
    images = plan.images + (plan.extends.images if plan.extends else 0)
    with console.progress("merging", images) as bar:
        found = merged_summary(merge(paths, into, how, bar.advance, keep_computed))
    rows = release_rows(found)
    if config is not None:
        evaluated = make_results_here(release, config)
        # The images stay the release's.
        found = {**evaluated, "evaluated_images": evaluated["images"], **found}
        rows |= evaluation_rows(evaluated)
    return found, rows


def verify_command(
    release: options.ReleaseFolder,
    check: Annotated[
        Literal["quick", "full"], Option(help="quick: tables and sizes; full: every image.")
    ] = "full",
) -> Result:
    """Check a release against its own record.

    Names what is damaged, missing or extra.
    """
    from sdwn.evaluation.verify import verify
    from sdwn.workflow.status import next_for_release

    opened = options.open_release(release)
    with console.progress("verifying", opened.manifest.bytes, "bytes") as bar:
        problems = verify(release, check == "quick", bar.advance)
    left = [str(path.relative_to(opened.paths.root)) for path in strays(opened.paths.root)]
    values = {"images": len(opened), "ok": not problems, "problems": problems}
    values["left_by_desktop_or_server"] = left
    images, step = counted(len(opened), "image"), None
    text = f"{counted(len(problems), 'problem')} in a release of {images}"
    if not problems:
        text, step = f"the release is as its record says: {images}", next_for_release(release)
    rows = {"problems": problems or None, "files of a desktop or server": left or None}
    return Result(values, text, rows, next_=step, failed=bool(problems))


def regenerate_command(
    release: options.ReleaseFolder,
    synset: Annotated[str, Argument(metavar="SYNSET", help="By name, wnid or lemma.")],
    number: Annotated[int, Argument(metavar="NUMBER", help="The image's number, from 0.")],
    save: Annotated[Path | None, Option(help="Write the new image as PNG.")] = None,
    model: Annotated[str | None, Option(help="Name or folder now; default: as recorded.")] = None,
    tolerance: Annotated[
        float, Option(min=0, max=255, help="Largest RMS difference, in 8-bit steps, still equal.")
    ] = 4.0,
) -> Result:
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
    return Result(asdict(found), rows, failed=found.verdict == "different")


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
) -> Result:
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
    parts = [one.partition("=") for one in split.split(",")] if split is not None else []
    splits = {name.strip(): parse_share(share, "--split") for name, _, share in parts}
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
    return Result(found, rows, next_=step)


def parse_share(text: str, option: str = "--sample") -> float:
    """Read a share, in percent or as a fraction; a bare 1 may have been meant as either."""
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
) -> Result:
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
    return Result(found, rows | {"size": decimal(found["bytes"])})


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
) -> Result:
    """Make a release of image files as they are.

    In the format folders, a text file of prompt, synset and wnid lies beside the images; in
    imagefolder, their folder's name begins with a wnid, or is their label. Files that are no
    readable image are left out and named.
    """
    from sdwn.exchange.import_images import ImportOptions, import_images, list_source
    from sdwn.workflow.status import next_for_release

    how = ImportOptions(format_, int(part_size * 1e9), origin, licence)
    with console.progress("looking for images"):
        folder = list_source(source, follow_links)
    with console.progress("importing", len(folder), "files") as bar:
        found = import_images(folder, ReleasePaths(release), how, bar.advance)
    for name, reason in found.skipped[:SKIPPED_SHOWN]:
        console.say(f"left out: {name}: {reason}")
    if (more := len(found.skipped) - SKIPPED_SHOWN) > 0:
        console.say(f"left out: {more:,} more, see {found.release.paths.skipped}")
    manifest = found.release.manifest
    values = {
        **manifest.model_dump(include={"images", "imagenet_classes", "bytes"}),
        "synsets": manifest.concepts,
        "unit": found.release.unit,
        "skipped": len(found.skipped),
        "ignored_folders": folder.ignored,
        "release": str(release),
    }
    ignored = ", ".join(f"{count:,} {name}" for name, count in folder.ignored.items())
    rows = release_rows(values) | {"left out": len(found.skipped) or None}
    rows["ignored folders"] = ignored or None
    return Result(values, rows, next_=next_for_release(release))
