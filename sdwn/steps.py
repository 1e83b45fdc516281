"""What commands share: each step of the job, with what a person sees of it meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn import terminal
from sdwn.errors import UsageError

if TYPE_CHECKING:
    from sdwn.cluster import Job
    from sdwn.config import EvaluationConfig, RunConfig
    from sdwn.exchange.export import ExportOptions
    from sdwn.exchange.intake import ImportOptions
    from sdwn.files import RunPaths
    from sdwn.gpus import GpuProfile
    from sdwn.merge import MergeOptions
    from sdwn.plan import Plan
    from sdwn.profiles import ClusterProfile
    from sdwn.regenerate import Comparison, Wanted
    from sdwn.release import Release
    from sdwn.scheduler import JobState
    from sdwn.submission import Watch


# Files left out of an import that are named on the terminal; all stand in the release.
TOLD = 20


def open_config(config: str, overrides: list[str] | None) -> RunConfig:
    """Read a config file, or a shipped one, with overrides."""
    from sdwn.config import load_config
    from sdwn.shipped import find

    return load_config(find("config", config), tuple(overrides or ()))


def open_profile(name: str, site: dict[str, str]) -> ClusterProfile:
    """Read a site's profile, or a shipped one, with flags in the place of its fields."""
    from sdwn.profiles import load_profile

    return load_profile(name, site)


def tune_elsewhere(
    settings: RunConfig, chosen: ClusterProfile, kinds: list[str]
) -> list[GpuProfile]:
    """Tune by short jobs under a profile."""
    from sdwn.submission import require_fit
    from sdwn.trials import tune_elsewhere

    require_fit(settings, chosen)
    wanted = [kind.strip() for kind in kinds if kind.strip()]
    with trial("measuring") as (told, watch):
        return tune_elsewhere(settings, chosen, wanted, told, watch)


@contextmanager
def trial(what: str) -> Iterator[tuple[Callable[[Path], None], Watch]]:
    """Show that short jobs are at work, and tell how to end them when nobody waits any more."""
    folders: list[Path] = []
    try:
        with terminal.working(what):
            yield folders.append, silence_told()
    except KeyboardInterrupt:
        for folder in folders:
            terminal.say(f"the job goes on without you; end it with: sdwn cancel {folder}")
        raise


def silence_told() -> Watch:
    """Give a watch that says once when the controller does not answer."""
    from sdwn.submission import unreachable

    silent = False

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal silent
        if unreachable(live) and not silent:
            terminal.say("the SLURM controller does not answer; waiting for it")
        silent = unreachable(live)

    return watch


def plan_run(config: str, run: Path, overrides: list[str] | None) -> tuple[Plan, RunPaths]:
    """Read WordNet and write a run's plan, unless the same stands there."""
    from sdwn.catalog import read_catalog
    from sdwn.files import RunPaths
    from sdwn.plan import make_plan, write_plan
    from sdwn.wordnet import shared_wordnet

    settings = open_config(config, overrides)
    with terminal.working("reading WordNet"):
        catalog = read_catalog(settings.catalog, shared_wordnet())
    made, paths = make_plan(settings, catalog), RunPaths(run)
    new = write_plan(made, paths)
    terminal.say(f"{'planned' if new else 'planned already'}: {run}")
    return made, paths


def open_run(run: Path) -> tuple[RunPaths, Plan]:
    """Read a run's plan."""
    from sdwn.files import RunPaths
    from sdwn.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def show_script(paths: RunPaths, todo: list[int], chosen: ClusterProfile, as_json: bool) -> None:
    """Print the script that would be submitted."""
    from sdwn import cluster

    script = ""
    if todo:
        script = cluster.script(len(cluster.cut(todo, chosen)), paths.jobs, chosen)
    found = {"submitted": 0, "shards": len(todo), "job_ids": [], "script": script}
    terminal.result(found, as_json, text=script or "# nothing to submit\n")


def start(
    paths: RunPaths, made: Plan, todo: list[int], chosen: ClusterProfile, retries: int | None
) -> list[Job]:
    """Submit shards; with a number of retries, follow the run to the end."""
    from sdwn.submission import submit_shards

    if retries is None:
        return submit_shards(paths, todo, chosen)
    return complete_run(paths, made, chosen, retries)


def say_submitted(jobs: list[Job], todo: list[int], as_json: bool) -> None:
    """Print what was submitted."""
    ids = [job.id for job in jobs]
    terminal.result({"submitted": len(ids), "shards": len(todo), "job_ids": ids}, as_json)


def complete_run(paths: RunPaths, made: Plan, chosen: ClusterProfile, retries: int) -> list[Job]:
    """Submit a run's shards and follow them to the end."""
    from sdwn.status import images_done
    from sdwn.submission import complete

    start = images_done(paths, made)
    seen, tell_silence = start, silence_told()

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal seen
        done = images_done(paths, made)
        advance(done - seen)
        seen = done
        tell_silence(live)

    try:
        with terminal.progress("generate", made.images, "images", start) as advance:
            return complete(paths, made, chosen, watch, retries)
    except KeyboardInterrupt:
        terminal.say(
            f"the tasks go on without you; see: sdwn status {paths.root}; follow them again "
            f"with: sdwn submit {paths.root} --wait; end them with: sdwn cancel {paths.root}"
        )
        raise


def merge_runs(
    runs: list[Path], release: Path, options: MergeOptions | None = None
) -> dict[str, Any]:
    """Merge runs into a release."""
    from sdwn.files import ReleasePaths, RunPaths
    from sdwn.merge import MergeOptions, merge, merged_summary
    from sdwn.plan import read_plan

    paths = [RunPaths(run) for run in runs]
    with terminal.progress("merge", read_plan(paths[0]).images, unit="images") as advance:
        merged = merge(paths, ReleasePaths(release), options or MergeOptions(), advance)
    return merged_summary(merged)


def verify_release(release: Path, quick: bool) -> dict[str, Any]:
    """Hold a release against its own record."""
    from sdwn.release import Release
    from sdwn.verify import verify

    opened = Release(release)
    with terminal.progress("verify", opened.manifest.bytes, unit="bytes") as advance:
        problems = verify(release, quick, advance)
    return {"images": len(opened), "ok": not problems, "problems": problems}


def share(text: str) -> float:
    """Read a share, in percent or as a fraction; a bare 1 may have been meant as either.

    >>> share("1%"), share("0.25")
    (0.01, 0.25)
    """
    number, percent, _ = text.partition("%")
    try:
        value = float(number) / 100 if percent else float(number)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1 or (value == 1 and not percent):
        raise UsageError(f"--sample {text}: expected a share such as 1% or 0.01, up to 100%")
    return value


def chosen(
    release: Release, sample: str | None, below: str | None, imagenet: bool, status: str | None
) -> Release:
    """Take the images of a release that the options ask for; without any, all of it."""
    if below is not None or imagenet or status is not None:
        release = release.subset(below=below, imagenet=imagenet, status=status)
    return release if sample is None else release.sample(share(sample))


def export_release(release: Release, dest: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a release's images in another format."""
    from sdwn.exchange.export import export

    with terminal.progress("export", len(release), unit="images") as advance:
        return export(release, dest, options, advance)


def import_release(source: Path, release: Path, options: ImportOptions) -> dict[str, Any]:
    """Make a release of pictures, and name those that were left out."""
    from sdwn.exchange.intake import count_pictures, import_pictures
    from sdwn.files import ReleasePaths

    with terminal.working("looking for pictures"):
        count = count_pictures(source)
    with terminal.progress("import", count, unit="files") as advance:
        found = import_pictures(source, ReleasePaths(release), options, advance)
    for name, reason in found.skipped[:TOLD]:
        terminal.say(f"left out: {name}: {reason}")
    if len(found.skipped) > TOLD:
        more = len(found.skipped) - TOLD
        terminal.say(f"left out: {more} more, see {found.release.paths.skipped}")
    manifest = found.release.manifest
    counts = manifest.model_dump(include={"images", "synsets", "imagenet_classes", "bytes"})
    return {**counts, "skipped": len(found.skipped), "release": str(release)}


def _require_savable(save: Path, release: Path) -> None:
    if not save.parent.is_dir():
        raise UsageError(f"--save {save}: expected a file in a folder that exists")
    if save.is_symlink() or (save.exists() and not save.is_file()):
        raise UsageError(f"--save {save}: expected a file or nothing there, found something else")
    if release.resolve() in save.resolve().parents:
        raise UsageError(f"--save {save}: it lies in the release; choose another place")


def regenerated(release: Path, wanted: Wanted, save: Path | None) -> Comparison:
    """Make an image again, and compare."""
    from sdwn.files import atomic
    from sdwn.regenerate import regenerate
    from sdwn.release import Release

    if save is not None:
        _require_savable(save, release)
    with terminal.working("making the image again"):
        found, image = regenerate(Release(release), wanted)
    if save is not None:
        with atomic(save) as temporary:
            image.save(temporary, "PNG")
    return found


def classifier(
    default: EvaluationConfig, model: str | None, checkpoint: Path | None
) -> EvaluationConfig:
    """Choose a classifier: the one asked for, or the default."""
    if model or checkpoint:
        return type(default)(model=model or default.model, checkpoint=checkpoint)
    return default


def evaluate_release(release: Path, chosen: EvaluationConfig) -> dict[str, Any]:
    """Classify a release's ImageNet classes."""
    from sdwn.evaluate import evaluate, images_to_classify
    from sdwn.release import Release

    opened = Release(release)
    with terminal.progress("evaluate", images_to_classify(opened), unit="images") as advance:
        return evaluate(opened, chosen, advance)


def joined(merged: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """Put both results into one; ``images`` stays the release's."""
    return {**evaluated, "evaluated_images": evaluated["images"], **merged}


def report_on(release: Path, evaluation: str | None) -> Path:
    """Write an evaluation's report."""
    from sdwn.release import Release
    from sdwn.report import write_report

    with terminal.working("writing the report"):
        return write_report(Release(release), evaluation)
