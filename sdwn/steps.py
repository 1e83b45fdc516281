"""What commands share: each step of the job, with what a person sees of it meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn import terminal
from sdwn.errors import UsageError

if TYPE_CHECKING:
    from sdwn.cluster import Job
    from sdwn.config import RunConfig
    from sdwn.dealt import Dealt
    from sdwn.exchange.export import ExportOptions
    from sdwn.exchange.intake import ImportOptions
    from sdwn.files import RunPaths
    from sdwn.findings import Finding
    from sdwn.gpus import GpuProfile
    from sdwn.merge import MergeOptions
    from sdwn.plan import Plan
    from sdwn.profiles import ClusterProfile, LaterStage
    from sdwn.regenerate import Comparison, Wanted
    from sdwn.release import Release
    from sdwn.scheduler import JobState
    from sdwn.submission import Watch


# Files left out of an import that are named on the terminal; all stand in the release.
TOLD = 20


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Whether to follow the tasks, how often to try again meanwhile, and what comes after.

    ``force``: whatever the doctor says.
    """

    wait: bool = False
    retries: int = 2
    then: tuple[LaterStage, ...] = ()
    force: bool = False


def submit_options(wait: bool, retries: int, then: str | None, force: bool) -> SubmitOptions:
    """Read the options that ``submit`` and ``retry`` share."""
    if then is None:
        return SubmitOptions(wait, retries, (), force)
    from sdwn.chain import parse_stages

    return SubmitOptions(wait, retries, parse_stages(then), force)


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
    from sdwn.live import unreachable

    silent = False

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal silent
        if unreachable(live) and not silent:
            terminal.say("the SLURM controller does not answer; waiting for it")
        silent = unreachable(live)

    return watch


def plan_run(
    config: str, run: Path, overrides: list[str] | None, slice_: str | None = None
) -> tuple[Plan, RunPaths]:
    """Read WordNet and write a run's plan, or a slice of it, unless the same stands there."""
    from sdwn.catalog import read_catalog
    from sdwn.files import RunPaths
    from sdwn.lock import ensure
    from sdwn.plan import make_plan, write_plan
    from sdwn.slices import WHOLE, parse_slice
    from sdwn.weights import is_hub_name
    from sdwn.wordnet import shared_wordnet

    share = WHOLE if slice_ is None else parse_slice(slice_)
    settings = open_config(config, overrides)
    with terminal.working("reading WordNet"):
        catalog = read_catalog(settings.catalog, shared_wordnet())
    made, paths = make_plan(settings, catalog, share), RunPaths(run)
    new = write_plan(made, paths)
    terminal.say(f"{'planned' if new else 'planned already'}: {run}")
    with terminal.working("looking for the weights"):
        locked = ensure(paths, made)
    if locked is not None:
        terminal.say(f"its weights are {locked.model.name} at {locked.revision}")
    elif is_hub_name(settings.model):
        terminal.say(f"its weights are not here yet; before submitting: sdwn prefetch {run}")
    return made, paths


def open_dealt(folder: Path) -> tuple[RunPaths, Dealt]:
    """Read what a folder's tasks work on: a run's plan, or the plan of an evaluation's work."""
    from sdwn.files import work_paths
    from sdwn.judging.judging import is_work, read_judging

    if not is_work(folder):
        return open_run(folder)
    paths = work_paths(folder)
    return paths, read_judging(paths)


def open_run(run: Path) -> tuple[RunPaths, Plan]:
    """Read a run's plan."""
    from sdwn.files import RunPaths
    from sdwn.plan import read_plan

    paths = RunPaths(run)
    return paths, read_plan(paths)


def prefetched(
    target: str, overrides: list[str] | None, folder: Path | None, classify: bool
) -> dict[str, Any]:
    """Get what a config, or a run that is planned, needs of the network."""
    from sdwn.files import RunPaths
    from sdwn.prefetch import fetch_extras, fetch_for_config, fetch_for_run

    paths, folder = RunPaths(Path(target)), folder and folder.absolute()
    if not paths.plan.exists():
        settings = open_config(target, overrides)
        found = fetch_for_config(settings, folder)
        if folder is not None:
            terminal.say(f"plan with it: sdwn plan {target} RUN --set model.name={folder}")
    elif overrides:
        raise UsageError(f"--set changes a config, and {target} is planned already")
    else:
        _, made = open_run(paths.root)
        settings, found = made.config, fetch_for_run(paths, made, folder)
    return {
        "model": settings.model.name,
        "revision": found.revision if found else None,
        "folder": str(found.folder) if found else None,
        **({"lock": str(paths.lock)} if paths.lock.exists() else {}),
        **fetch_extras(settings.evaluation if classify else None),
    }


def examined(paths: RunPaths, made: Plan, chosen: ClusterProfile, probe: bool) -> list[Finding]:
    """Examine a run; with a probe, ask a compute node too, unless no job could start."""
    from sdwn.doctor import can_start, examine
    from sdwn.findings import unverified
    from sdwn.node_checks import with_node

    with terminal.working("looking"):
        found = examine(paths, made, chosen)
    if not probe:
        return found
    if not can_start(found):
        return with_node(found, [unverified("node", "not asked, for no job could start")])
    return with_node(found, probed(paths, made, chosen))


def probed(paths: RunPaths, made: Plan, chosen: ClusterProfile) -> list[Finding]:
    """Ask a compute node what it sees of a run."""
    from sdwn.errors import SdwnError
    from sdwn.findings import problem
    from sdwn.node_checks import check_node
    from sdwn.trials import run_probe

    with trial("asking a compute node") as (told, watch):
        try:
            return check_node(run_probe(paths, chosen, told, watch), made, chosen)
        except SdwnError as error:
            return [problem("node", str(error))]


def say_findings(found: list[Finding], as_json: bool) -> bool:
    """Print what was found; tell whether anything would stop the run."""
    from dataclasses import asdict

    from sdwn.findings import problems

    values = {"ok": not problems(found), "findings": [asdict(finding) for finding in found]}
    terminal.result(values, as_json, text=terminal.findings_text(found))
    return bool(problems(found))


def show_script(
    paths: RunPaths, made: Plan, todo: list[int], chosen: ClusterProfile, as_json: bool
) -> None:
    """Print the script that would be submitted; what it would take goes beside it, to stderr."""
    from sdwn import cluster
    from sdwn.estimates import estimate

    script = ""
    if todo:
        script = cluster.script(len(cluster.cut(todo, chosen)), paths.jobs, chosen)
    takes = estimate(paths, made, todo, chosen)
    if todo and not as_json:
        terminal.say_estimate(takes)
    found = {"submitted": 0, "shards": len(todo), "job_ids": [], "script": script}
    found["estimate"] = takes.as_dict()
    terminal.result(found, as_json, text=script or "# nothing to submit\n")


def say_submitting(paths: RunPaths, made: Plan, todo: list[int], chosen: ClusterProfile) -> None:
    """Say what is about to be submitted, and what it will take."""
    from sdwn.estimates import estimate

    if todo:
        terminal.say_submitting(estimate(paths, made, todo, chosen))


def submit_run(
    paths: RunPaths, made: Plan, chosen: ClusterProfile, options: SubmitOptions
) -> dict[str, Any]:
    """Submit what is unfinished, and the stages behind it; if asked, follow all to the end."""
    from sdwn import chain
    from sdwn.lock import ensure
    from sdwn.submission import submit_once

    if options.then:
        chain.require_possible(paths, made, options.then, chosen, options.wait)
    todo = unfinished_shards(paths, made)
    if todo:
        ensure(paths, made)
    if todo and not options.force:
        require_sound(paths, made, chosen)
    say_submitting(paths, made, todo, chosen)
    if options.wait:
        jobs, remaining = complete_run(paths, made, chosen, options.retries), 0
    else:
        jobs, remaining = submit_once(paths, made, chosen, terminal.say)
    found: dict[str, Any] = {
        "submitted": len(jobs),
        "shards": len({index for job in jobs for index in job.indices}),
        "remaining": remaining,
        "job_ids": [job.id for job in jobs],
    }
    if remaining:
        terminal.say(
            f"SLURM takes no more of your jobs now: {remaining} shards remain; run the same "
            "command again when some have ended, or let --wait feed the queue"
        )
    elif options.then:
        found["then"] = _chained(paths, made, chosen, options)
    if remaining and options.then:
        terminal.say(f"{', '.join(options.then)} would start too early and is not submitted")
    return found


def require_sound(paths: RunPaths, made: Plan, chosen: ClusterProfile) -> None:
    """Say what the doctor warns of, and refuse a run that something would stop.

    Raises:
        SdwnError: with every problem, a line each.
    """
    from sdwn.doctor import examine
    from sdwn.errors import SdwnError

    found = examine(paths, made, chosen)
    for finding in found:
        if finding.verdict == "warning":
            terminal.say(f"warning: {finding.subject}: {finding.text}")
    # A controller that does not answer is waited for.
    stopping = [one for one in found if one.verdict == "problem" and one.subject != "slurm"]
    if stopping:
        lines = [f"{finding.subject}: {finding.text}" for finding in stopping]
        raise SdwnError("\n".join([*lines, "submit all the same with: --force"]))


def unfinished_shards(paths: RunPaths, made: Plan) -> list[int]:
    """List the shards to submit, of the plan that was submitted before."""
    from sdwn.live import unfinished
    from sdwn.submission import changed_code, require_same_plan

    require_same_plan(paths, made)
    if changed := changed_code(paths):
        terminal.say(changed)
    return unfinished(paths, made)


def _chained(
    paths: RunPaths, made: Plan, chosen: ClusterProfile, options: SubmitOptions
) -> dict[str, str]:
    """Submit the later stages; if asked, follow them to the end."""
    from sdwn import chain
    from sdwn.cluster import Job
    from sdwn.errors import QueueFullError
    from sdwn.submission import alone, follow

    stages, jobs = options.then, dict[str, Job]()
    # One process of this machine does not wait for another.
    parts = [stages] if chosen.executor == "slurm" else [(stage,) for stage in stages]
    try:
        with terminal.working(", ".join(stages) if options.wait else "submitting"):
            for part in parts:
                with alone(paths, terminal.say):
                    jobs |= chain.submit_chain(paths, made, part, chosen, terminal.say)
                if options.wait:
                    follow(paths, silence_told())
                    chain.require_done(paths, part)
    except QueueFullError as error:
        terminal.say(f"{error}; queue what comes after later, with: {_again(paths, options)}")
    except KeyboardInterrupt:
        terminal.say(
            f"what was queued goes on without you; see: sdwn status {paths.root}; queue the rest "
            f"with: {_again(paths, options)}"
        )
        raise
    return {stage: job.id for stage, job in jobs.items()}


def _again(paths: RunPaths, options: SubmitOptions) -> str:
    return f"sdwn retry {paths.root} --then {','.join(options.then)}"


def complete_run(paths: RunPaths, made: Dealt, chosen: ClusterProfile, retries: int) -> list[Job]:
    """Submit all shards that are left and follow them to the end."""
    from sdwn.status import images_done
    from sdwn.submission import Onlooker, complete

    start = images_done(paths, made)
    seen, tell_silence = start, silence_told()

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal seen
        done = images_done(paths, made)
        advance(done - seen)
        seen = done
        tell_silence(live)

    try:
        with terminal.progress(made.stage, made.own_images, "images", start) as advance:
            return complete(paths, made, chosen, retries, Onlooker(watch, terminal.say))
    except KeyboardInterrupt:
        terminal.say(
            f"the tasks go on without you; see: sdwn status {paths.root}; follow them again "
            f"with: {made.again(paths)}; end them with: sdwn cancel {paths.root}"
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


def opened(root: Path, only: Path | None) -> Release:
    """Open a release, or only the images of it that a CSV file lists."""
    from sdwn.exchange.listed import listed
    from sdwn.release import Release

    release = Release(root)
    return release if only is None else listed(release, only)


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


def require_savable(save: Path, release: Path) -> None:
    """Refuse a place for a file that is none, or that lies in the release."""
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
        require_savable(save, release)
    with terminal.working("making the image again"):
        found, image = regenerate(Release(release), wanted)
    if save is not None:
        with atomic(save) as temporary:
            image.save(temporary, "PNG")
    return found


def report_on(release: Path, evaluation: str | None) -> Path:
    """Write an evaluation's report."""
    from sdwn.pages.report import write_report
    from sdwn.release import Release

    with terminal.working("writing the report"):
        return write_report(Release(release), evaluation)
