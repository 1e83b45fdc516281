"""The later stages of a run or an evaluation, as tasks that wait for its arrays.

::

    array 1 --+
    array 2 --+-- afterany --> merge -- afterok --> evaluate -- afterok --> report
    array 3 --+

Merge waits for all arrays, whatever comes of them, and refuses a run that is incomplete.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from sdwn import checkout
from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.errors import SdwnError, UsageError, command
from sdwn.generation.task import GENERATE
from sdwn.io import OnMessage
from sdwn.jobs import journal
from sdwn.jobs.profile import ClusterProfile, LaterStage, stage_profile
from sdwn.jobs.scheduler import PENDING, Job
from sdwn.jobs.submit import Stages, end_live, submit_array
from sdwn.jobs.task import ArrayTask, Stage
from sdwn.models.lock import require_classifier
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Plan, ShardedWork, read_plan
from sdwn.prediction.plan import require_labels
from sdwn.workflow.status import DONE, LATER, WAITING, read_stages, stage_states

log = logging.getLogger(__name__)


def merge_run(run: Path, _: Sequence[int], __: TaskOptions) -> None:
    """Merge a run into its own release."""
    from sdwn.evaluation.evaluate import keep_computed
    from sdwn.releases.merge import merge, merged_summary

    paths = RunPaths(run)
    release = merge([paths], ReleasePaths(paths.release), carry=keep_computed)
    log.info("merged: %s", json.dumps(merged_summary(release)))


def evaluate_run(run: Path, _: Sequence[int], options: TaskOptions = NO_OPTIONS) -> None:
    """Classify a run's own release as its config says."""
    from sdwn.evaluation.evaluate import evaluate
    from sdwn.releases.release import Release

    paths = RunPaths(run)
    config = read_plan(paths).config
    require_classifier(paths, config)
    found = evaluate(Release(paths.release), config.evaluation, batch_size=options.batch_size)
    log.info("evaluated: %s", json.dumps(found))


def report_run(run: Path, _: Sequence[int], __: TaskOptions) -> None:
    """Write the report of a run's own release."""
    from sdwn.releases.release import Release
    from sdwn.reports.report import write_report

    log.info("report: %s", write_report(Release(RunPaths(run).release), None))


# What may follow a run's shards, in the order in which they run: submit --then picks from here.
LATER_STAGES: dict[LaterStage, Stage] = {
    "merge": Stage("merge", merge_run),
    "evaluate": Stage("evaluate", evaluate_run),
    "report": Stage("report", report_run),
}
# All stages in the journal of a run.
RUN_STAGES: Stages = {stage.name: stage for stage in (GENERATE, *LATER_STAGES.values())}


def parse_stages(text: str | None) -> tuple[LaterStage, ...]:
    """Read a list of later stages; they run in their own order, however they are given.

    >>> parse_stages("evaluate, merge"), parse_stages(None)
    (('merge', 'evaluate'), ())
    """
    names = set() if text is None else {name.strip() for name in text.split(",")}
    if unknown := names - LATER_STAGES.keys():
        expected = f"expected some of {', '.join(LATER_STAGES)}"
        raise UsageError(f"--then {text}: {expected}, found {sorted(unknown)[0]!r}")
    return tuple(stage for stage in LATER_STAGES if stage in names)


def require_chain(
    paths: RunPaths, plan: Plan, stages: Sequence[LaterStage], profile: ClusterProfile, wait: bool
) -> None:
    """Refuse a chain of stages that lacks its input, or a command to link it."""
    release = ReleasePaths(paths.release)
    if "merge" in stages and not plan.slice.whole:
        raise UsageError(
            f"--then merge: {paths.root} has the slice {plan.slice} of its plan; merge all of them "
            "when they are done, with: sdwn merge RUN RUN ... --release RELEASE"
        )
    if profile.executor == "local" and not wait:
        raise UsageError("--then: processes of this machine need --wait, which links them")
    if "evaluate" in stages:
        none = f"--then evaluate: {paths.root}: none of its {plan.unit}s"
        require_labels(plan.table, plan.config.evaluation, none)
    if stages[0] != "merge" and not release.manifest.exists():
        raise UsageError(f"--then {stages[0]}: {release.root} is no release yet; add merge")
    if stages[0] == "report" and not release.evaluations.is_dir():
        raise UsageError("--then report: nothing is evaluated yet; add evaluate")


def unfinished_stages(paths: RunPaths, anew: bool) -> tuple[LaterStage, ...]:
    """List the later stages that were noted and ended without success, or never began.

    With ``anew``, shards are submitted again: stages that wait now would start too early, and
    belong to them.
    """
    found = read_stages(paths)
    failed = {stage for stage, one in found.items() if one.text != DONE and not one.live}
    if failed or anew:
        failed |= {stage for stage, one in found.items() if one.text.startswith(WAITING)}
    return tuple(stage for stage in LATER_STAGES if stage in failed)


def submit_chain(
    paths: RunPaths,
    plan: Plan,
    stages: Sequence[LaterStage],
    profile: ClusterProfile,
    on_message: OnMessage,
) -> dict[str, Job]:
    """Submit later stages, the first behind all live arrays, each other behind the one before.

    Stages that wait from an earlier submission are taken back: they would start too early. One
    that runs continues, and the first waits for it.
    """
    jobs: dict[str, Job] = {}
    before = ""
    for name in stages:
        site = stage_profile(profile, name)
        jobs[name] = submit_behind(paths, plan, LATER_STAGES[name], site, on_message, before)
        before = f"afterok:{jobs[name].id}"
    return jobs


def submit_behind(  # noqa: PLR0913, PLR0917
    paths: RunPaths,
    work: ShardedWork,
    stage: Stage,
    profile: ClusterProfile,
    on_message: OnMessage,
    dependency: str = "",
) -> Job:
    """Submit a stage with this dependency, by default behind all live tasks of a folder.

    ``profile`` is what that job asks for. Jobs that have nothing left to do are not waited for,
    as they may be held.
    """
    before: list[str] = []
    left = set(journal.unfinished_shards(paths, work))
    submissions = [] if dependency else journal.read_journal(paths)
    for submission, jobs in journal.find_jobs(paths, submissions).by_submission:
        if not jobs or submission.executor == "local":
            continue
        if journal.is_unreachable(jobs):
            raise SdwnError("SLURM does not answer; run the same command again when it does")
        job, state = next(iter(jobs.items()))
        if submission.stage in LATER and state.state == PENDING:
            on_message(f"{submission.stage}, which waited as job {job.id}, is queued anew")
            if denied := end_live(paths, submission, jobs):
                raise SdwnError(denied)
        elif submission.stage in LATER or any(left.intersection(job.indices) for job in jobs):
            before.append(job.id.partition("_")[0])
    dependency = dependency or (f"afterany:{':'.join(before)}" if before else "")
    if dependency and profile.executor == "slurm":
        # Without the second option, a stage behind one that failed waits for ever.
        options = {"dependency": dependency, "kill-on-invalid-dep": "yes"}
        profile = profile.model_copy(update={"sbatch": {**profile.sbatch, **options}})
    task = ArrayTask(stage, str(paths.root.absolute()), (), work.digest, checkout.code())
    (made,) = submit_array(paths, [task], profile, on_message)
    return made


def require_done(paths: RunPaths, stages: Sequence[LaterStage]) -> None:
    """Fail where a stage that was followed to its end did not succeed."""
    found = stage_states(paths, journal.open_journal(paths), {})
    for stage in stages:
        text = found[stage].text if stage in found else "not submitted"
        if text != DONE:
            again = command("retry", paths.root, "--wait")
            raise SdwnError(f"{stage} {text}; resume with: {again}")
