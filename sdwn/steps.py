"""What commands share: each step of the job, with what a person sees of it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn import terminal

if TYPE_CHECKING:
    from sdwn.cluster import Job
    from sdwn.config import EvaluationConfig, RunConfig
    from sdwn.files import RunPaths
    from sdwn.gpus import GpuProfile
    from sdwn.plan import Plan
    from sdwn.profiles import ClusterProfile
    from sdwn.scheduler import JobState
    from sdwn.submission import Watch


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
    from sdwn.wordnet import open_wordnet

    settings = open_config(config, overrides)
    with terminal.working("reading WordNet"):
        catalog = read_catalog(settings.catalog, open_wordnet())
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


def merge_runs(runs: list[Path], release: Path, part_bytes: int | None) -> dict[str, Any]:
    """Merge runs into a release."""
    from sdwn.files import ReleasePaths, RunPaths
    from sdwn.merge import PART_BYTES, merge, merged_summary
    from sdwn.plan import read_plan

    paths = [RunPaths(run) for run in runs]
    with terminal.progress("merge", read_plan(paths[0]).images, unit="images") as advance:
        merged = merge(paths, ReleasePaths(release), part_bytes or PART_BYTES, advance)
    return merged_summary(merged)


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
