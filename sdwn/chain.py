"""The later stages as tasks of their own: what a run's arrays are followed by."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from sdwn import checkout
from sdwn.cluster import Job, Tell
from sdwn.errors import SdwnError, UsageError
from sdwn.files import ReleasePaths, RunPaths
from sdwn.joblogs import reason
from sdwn.journal import Submission, read_journal
from sdwn.live import Live, live_each
from sdwn.plan import Plan, read_plan
from sdwn.profiles import ClusterProfile, LaterStage, stage_profile
from sdwn.scheduler import cancel
from sdwn.submission import submit_array
from sdwn.task import ArrayTask

log = logging.getLogger(__name__)

STAGES: tuple[LaterStage, ...] = get_args(LaterStage)


def parse_stages(text: str) -> tuple[LaterStage, ...]:
    """Read a list of later stages; they run in their own order, however they are given.

    >>> parse_stages("evaluate, merge")
    ('merge', 'evaluate')

    Raises:
        UsageError: it names something else.
    """
    names = {name.strip() for name in text.split(",")}
    if unknown := names - set(STAGES):
        raise UsageError(
            f"--then {text}: expected some of {', '.join(STAGES)}, found {sorted(unknown)[0]!r}"
        )
    return tuple(stage for stage in STAGES if stage in names)


def require_possible(
    paths: RunPaths, stages: Sequence[LaterStage], profile: ClusterProfile, wait: bool
) -> None:
    """Refuse a chain that has no beginning, or nobody to link it.

    Raises:
        UsageError: a stage lacks what it works on.
    """
    if profile.executor == "local" and not wait:
        raise UsageError("--then: processes of this machine need --wait, which links them")
    if stages[0] != "merge" and not ReleasePaths(paths.release).manifest.exists():
        raise UsageError(f"--then {stages[0]}: {paths.release} is no release yet; add merge")
    if stages[0] == "report" and not ReleasePaths(paths.release).evaluations.is_dir():
        raise UsageError("--then report: nothing is evaluated yet; add evaluate")


def submit_chain(
    paths: RunPaths,
    plan: Plan,
    stages: Sequence[LaterStage],
    profile: ClusterProfile,
    tell: Tell,
) -> dict[str, Job]:
    """Submit later stages, the first behind all live arrays, each other behind the one before.

    Stages that wait from an earlier submission are taken back: they would start too early.
    """
    before = [array for array, stage in _live_arrays(paths) if stage not in STAGES]
    _take_back(paths)
    jobs: dict[str, Job] = {}
    for stage in stages:
        site = stage_profile(profile, stage)
        if before and site.executor == "slurm":
            site = _behind(site, before, "afterok" if jobs else "afterany")
        task = ArrayTask(stage, str(paths.root.absolute()), (), plan.digest, checkout.code())
        (jobs[stage],) = submit_array(paths, [task], site, tell)
        before = [jobs[stage].id]
    return jobs


def _behind(profile: ClusterProfile, arrays: Sequence[str], kind: str) -> ClusterProfile:
    # Without the second option, a stage behind one that failed waits for ever.
    options = {"dependency": f"{kind}:{':'.join(arrays)}", "kill-on-invalid-dep": "yes"}
    return profile.model_copy(update={"sbatch": {**profile.sbatch, **options}})


def _live_arrays(paths: RunPaths) -> list[tuple[str, str]]:
    return [
        (next(iter(jobs)).id.partition("_")[0], submission.stage)
        for submission, jobs in live_each(read_journal(paths))
        if jobs and submission.executor == "slurm"
    ]


def _take_back(paths: RunPaths) -> None:
    ids = [job for job, stage in _live_arrays(paths) if stage in STAGES]
    if ids:
        cancel("slurm", ids)


def states(paths: RunPaths, submissions: Sequence[Submission], live: Live) -> dict[str, str]:
    """Say of each later stage that was submitted how it stands."""
    last = {one.stage: one for one in submissions if one.stage in STAGES and one.jobs}
    return {
        stage: _state(paths, last[stage].jobs[0], stage, live) for stage in STAGES if stage in last
    }


def _state(paths: RunPaths, job: Job, stage: LaterStage, live: Live) -> str:
    if job in live:
        state = live[job]
        return f"{state.state.lower()} {f'({state.reason}) ' * bool(state.reason)}as job {job.id}"
    if done(paths, stage):
        return "done"
    if not (paths.jobs / job.id / f"{job.id}_0_log.err").exists():
        return f"never started: job {job.id} was cancelled, or the stage before it failed"
    return f"failed: {reason(paths, job)}"


def done(paths: RunPaths, stage: LaterStage) -> bool:
    """Tell whether a stage's result is there."""
    release = ReleasePaths(paths.release)
    if stage == "merge":
        return release.manifest.exists()
    name = "evaluation.json" if stage == "evaluate" else "report.html"
    return any(release.evaluations.glob(f"*/{name}"))


def require_done(paths: RunPaths, stages: Sequence[LaterStage]) -> None:
    """Fail where a stage that was followed to its end left nothing behind.

    Raises:
        SdwnError: with the last line of its log.
    """
    found = states(paths, read_journal(paths), {})
    for stage in stages:
        if not done(paths, stage):
            raise SdwnError(f"{stage} {found.get(stage, 'was not submitted')}")


def merge_run(run: Path, _: Iterable[int]) -> None:
    """Merge a run into its own release."""
    from sdwn.merge import merge, merged_summary

    paths = RunPaths(run)
    _say("merged", merged_summary(merge([paths], ReleasePaths(paths.release))))


def evaluate_run(run: Path, _: Iterable[int]) -> None:
    """Classify a run's own release as its config says."""
    from sdwn.evaluate import evaluate
    from sdwn.release import Release

    paths = RunPaths(run)
    _say("evaluated", evaluate(Release(paths.release), read_plan(paths).config.evaluation))


def report_run(run: Path, _: Iterable[int]) -> None:
    """Write the report of a run's own release."""
    from sdwn.release import Release
    from sdwn.report import write_report

    log.info("report: %s", write_report(Release(RunPaths(run).release), None))


def _say(what: str, found: dict[str, Any]) -> None:
    log.info("%s: %s", what, json.dumps(found))
