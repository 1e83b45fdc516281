"""The commands that write, check and read releases: merge, verify, regenerate, export, import."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal
from typer import Argument, Option

from sdwn.cli import console, options
from sdwn.cli.evaluate import evaluate_here, evaluation_rows
from sdwn.errors import UsageError, command, counted
from sdwn.io import atomic, strays
from sdwn.paths import ReleasePaths, RunPaths

if TYPE_CHECKING:
    from sdwn.releases.merge import MergeOptions

# Files left out of an import that are named on the terminal; the release names all.
SKIPPED_SHOWN = 20


def merge_command(
    runs: options.Runs,
    release: Annotated[Path, Option(help="The folder to write the release to.")],
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
    from sdwn.releases.merge import MergeOptions
    from sdwn.workflow.status import next_for_release

    how = MergeOptions(int(part_size * 1e9), allow_missing, decode=check == "full")
    found = merge_runs(runs, release, how)
    rows = release_rows(found)
    if evaluate_:
        from sdwn.workflow.evaluate_release import with_classifier

        _, plan = options.open_run(runs[0])
        config = with_classifier(plan.config.evaluation, model, checkpoint)
        evaluated = evaluate_here(release, config)
        found, rows = with_evaluation(found, evaluated), {**rows, **evaluation_rows(evaluated)}
    console.result(found, as_json, rows, next_=next_for_release(release))


def merge_runs(runs: list[Path], release: Path, how: MergeOptions) -> dict[str, Any]:
    """Merge runs into a release with a progress bar; return its counts."""
    from sdwn.planning.plan import read_plan
    from sdwn.releases.merge import merge, merged_summary

    paths = [RunPaths(run) for run in runs]
    with console.progress("merging", read_plan(paths[0]).images) as bar:
        return merged_summary(merge(paths, ReleasePaths(release), how, bar.advance))


def release_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return a release's counts as rows."""
    statuses = found.get("statuses")
    return {
        "release": found["release"],
        "images": found["images"],
        "missing images": found.get("missing_images"),
        "statuses": statuses and ", ".join(f"{n:,} {status}" for status, n in statuses.items()),
        "synsets": found["synsets"],
        "ImageNet classes": found.get("imagenet_classes"),
        "size": decimal(found["bytes"]),
    }


def with_evaluation(merged: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """Return both results as one; ``images`` stays the release's."""
    return {**evaluated, "evaluated_images": evaluated["images"], **merged}


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
    from sdwn.releases.release import Release
    from sdwn.workflow.status import next_for_release

    opened = Release(release)
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
    console.result(values, as_json, text, rows, next_=step)
    if problems:
        raise typer.Exit(1)


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
    from sdwn.releases.release import Release

    if save is not None:
        options.require_savable(save, release, (".png",))
    with console.progress("regenerating the image"):
        found, image = regenerate(Release(release), synset, number, model, tolerance)
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
    console.result(asdict(found), as_json, rows)
    if found.verdict == "different":
        raise typer.Exit(1)


def export_command(
    release: options.ReleaseFolder,
    dest: Annotated[Path, Argument(metavar="DEST", help="The folder to write.")],
    format_: Annotated[
        Literal["folders", "imagefolder", "webdataset", "parquet", "release"],
        Option("--format", help="release: a smaller one, of the chosen images."),
    ],
    only: Annotated[
        Path | None, Option(help="Only what a list of synsets or images names.")
    ] = None,
    below: Annotated[str | None, Option(help="Only this synset or wnid, and those below.")] = None,
    imagenet: Annotated[bool, Option("--imagenet", help="Only ImageNet-1k classes.")] = False,
    status: Annotated[
        str | None, Option(help="Only images of this status: ok leaves out black ones.")
    ] = None,
    sample: Annotated[
        str | None, Option(metavar="SHARE", help="Only this share of the synsets, as 1%.")
    ] = None,
    codec: Annotated[
        Literal["stored", "png", "webp", "jpeg"] | None,
        Option(help="stored: bytes as they are; png, webp: lossless; jpeg: smaller."),
    ] = None,
    quality: Annotated[
        int | None, Option(min=1, max=100, help="Of jpeg, default 95; makes webp lossy.")
    ] = None,
    part_size: Annotated[
        float | None,
        Option(metavar="GB", min=0, help="Minimum size of a file, in GB."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a release in another format.

    All of it, or the images that the options choose: --only takes a list of synsets, or a table
    with the columns wnid and number. Files have at least 1 GB (webdataset), 0.5 GB (parquet) or
    4 GB (release). The same command resumes after a kill.
    """
    from sdwn.exchange.export import ExportOptions, export, select_listed
    from sdwn.releases.release import Release

    opened = Release(release)
    if only is not None:
        opened = select_listed(opened, only)
    if below is not None or imagenet or status is not None:
        opened = opened.subset(below=below, imagenet=imagenet, status=status)
    if sample is not None:
        opened = opened.sample(parse_share(sample))
    codec = codec or ("jpeg" if quality else "stored")
    part_bytes = None if part_size is None else int(part_size * 1e9)
    how = ExportOptions(format_, codec, quality, part_bytes)
    with console.progress("exporting", len(opened)) as bar:
        found = export(opened, dest, how, bar.advance)
    kinds = sorted(set(opened.metadata["codec"].to_pylist()))
    if format_ == "webdataset" and codec == "stored" and len(kinds) > 1:
        console.say(
            f"the tars hold images of several kinds ({', '.join(kinds)}): Hugging Face datasets "
            "takes only tars of one kind; for it export with: --codec png, or --codec jpeg"
        )
    rows = {name: value for name, value in found.items() if name != "bytes"}
    rows["size"] = decimal(found["bytes"])
    step = command("browse", dest) if format_ == "release" else None
    console.result(found, as_json, rows, next_=step)


def parse_share(text: str) -> float:
    """Read a share, in percent or as a fraction; a bare 1 may have been meant as either.

    >>> parse_share("1%"), parse_share("0.25")
    (0.01, 0.25)
    """
    number, percent, _ = text.partition("%")
    with suppress(ValueError):
        value = float(number) / 100 if percent else float(number)
        if 0 < value < 1 or (value == 1 and percent):
            return value
    raise UsageError(f"--sample {text}: expected a share such as 1% or 0.01, up to 100%")


def import_command(
    source: Annotated[Path, Argument(metavar="SOURCE", help="The folder of images.")],
    release: Annotated[Path, Argument(metavar="RELEASE", help="The folder of the new release.")],
    format_: Annotated[
        Literal["folders", "imagefolder"],
        Option("--format", help="folders: beside a text file; imagefolder: by wnid."),
    ],
    origin: Annotated[str | None, Option(help="For the card: where the images are from.")] = None,
    licence: Annotated[str | None, Option(help="For the card: the licence, as cc-by-4.0.")] = None,
    follow_links: Annotated[bool, Option("--follow-links", help="Also out of SOURCE.")] = False,
    part_size: options.PartSize = 4.0,
    as_json: options.AsJson = False,
) -> None:
    """Make a release of image files as they are.

    In the format folders, a text file of prompt, synset and wnid lies beside the images. Files
    that are no readable image are left out and named.
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
    values = {
        **found.release.manifest.model_dump(
            include={"images", "synsets", "imagenet_classes", "bytes"}
        ),
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
