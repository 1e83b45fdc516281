"""The commands on a release as a whole and on its images: merge, verify, regenerate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from sdwn.cli import console
from sdwn.cli.evaluate import evaluate_here
from sdwn.cli.folders import open_run, require_savable
from sdwn.cli.options import AsJson, Checkpoint, Model, PartSize, ReleaseFolder, Runs, SynsetName

if TYPE_CHECKING:
    from sdwn.releases.merge import MergeOptions


def merge_command(
    runs: Runs,
    release: Annotated[Path, Option(help="The folder to write the release to.")],
    part_size: PartSize = 4.0,
    check: Annotated[
        Literal["quick", "full"],
        Option(help="quick: structure, counts, every image's checksum; full: decode it too."),
    ] = "quick",
    allow_missing: Annotated[
        bool, Option("--allow-missing", help="Merge runs that are not finished, too.")
    ] = False,
    evaluate_: Annotated[bool, Option("--evaluate", help="Then evaluate it.")] = False,
    model: Model = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Check every shard and write the release.

    The same command resumes after a kill.
    """
    if (model or checkpoint) and not evaluate_:
        raise typer.BadParameter("--model and --checkpoint need --evaluate")
    from sdwn.releases.merge import MergeOptions

    options = MergeOptions(int(part_size * 1e9), allow_missing, decode=check == "full")
    found = merge_runs(runs, release, options)
    if evaluate_:
        from sdwn.workflow.evaluate_release import with_classifier

        _, plan = open_run(runs[0])
        config = with_classifier(plan.config.evaluation, model, checkpoint)
        found = with_evaluation(found, evaluate_here(release, config))
    console.result(found, as_json)


def merge_runs(runs: list[Path], release: Path, options: MergeOptions) -> dict[str, Any]:
    """Merge runs into a release with a progress bar; return its counts."""
    from sdwn.paths import ReleasePaths, RunPaths
    from sdwn.planning.plan import read_plan, setting_differences
    from sdwn.releases.merge import merge, merged_summary

    paths = [RunPaths(run) for run in runs]
    first, *others = [read_plan(path).config.evaluation.model_dump(mode="json") for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if found := setting_differences(first, other, (f"in {runs[0]}", f"in {path.root}")):
            console.say(
                f"the runs' evaluations have other settings ({'; '.join(found)}); the release "
                f"takes those of {runs[0]}"
            )
    with console.progress("merge", read_plan(paths[0]).images, unit="images") as advance:
        return merged_summary(merge(paths, ReleasePaths(release), options, advance))


def with_evaluation(merged: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """Return both results as one; ``images`` stays the release's."""
    return {**evaluated, "evaluated_images": evaluated["images"], **merged}


def verify_command(
    release: ReleaseFolder,
    check: Annotated[
        Literal["quick", "full"],
        Option(help="quick: tables, structure, sizes; full: every byte and image."),
    ] = "full",
    as_json: AsJson = False,
) -> None:
    """Check a release against its own record.

    Names what is damaged, missing or extra.
    """
    from sdwn.evaluation.verify import verify
    from sdwn.io import strays
    from sdwn.releases.release import Release

    opened = Release(release)
    with console.progress("verify", opened.manifest.bytes, unit="bytes") as advance:
        problems = verify(release, check == "quick", advance)
    left = [str(path.relative_to(opened.paths.root)) for path in strays(opened.paths.root)]
    found = {"images": len(opened), "ok": not problems, "problems": problems}
    console.result({**found, "left_by_desktop_or_server": left}, as_json)
    if problems:
        raise typer.Exit(1)


def regenerate_command(
    release: ReleaseFolder,
    synset: SynsetName,
    number: Annotated[int, Argument(metavar="NUMBER", help="The image's number, from 0.")],
    model: Annotated[str | None, Option(help="Name or folder now; default: as recorded.")] = None,
    tolerance: Annotated[
        float,
        Option(
            min=0, max=255, help="Largest difference (RMS, in 8-bit steps) that is the same image."
        ),
    ] = 4.0,
    save: Annotated[Path | None, Option(help="Write the new image as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Regenerate an image, and compare the two."""
    from sdwn.generation.regenerate import regenerate
    from sdwn.io import atomic
    from sdwn.releases.release import Release

    if save is not None:
        require_savable(save, release, (".png",))
    with console.working("regenerating the image"):
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
        "changed since": found.reasons,
    }
    console.result(asdict(found), as_json, console.rows(rows))
    if found.verdict == "different":
        raise typer.Exit(1)
