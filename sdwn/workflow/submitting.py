"""Submission of a run, an evaluation or features, followed to its end: checks and stages.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.config import EvaluationConfig, validated
from sdwn.errors import QueueFullError, SdwnError, UsageError, command
from sdwn.evaluation import evaluate
from sdwn.generation.task import GENERATE
from sdwn.io import OnMessage, code_version, ignore
from sdwn.jobs import journal, submit
from sdwn.jobs.journal import Journal, is_unreachable, live_jobs, open_journal, unfinished_shards
from sdwn.jobs.profile import ClusterProfile, LaterStage, load_profile, overridden, stage_profile
from sdwn.jobs.scheduler import PENDING, Job, Live, cannot_start
from sdwn.jobs.task import ArrayTask, Stage
from sdwn.models.lock import ensure_lock, require_classifier
from sdwn.models.weights import convert_once, source
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import WHOLE, Plan, read_plan
from sdwn.prediction.plan import ImagePlan, require_labels
from sdwn.preflight.doctor import Finding, check_run
from sdwn.preflight.estimate import estimate, estimate_rows
from sdwn.preflight.prefetch import lock_found_classifier
from sdwn.releases.release import Release
from sdwn.workflow import status
from sdwn.workflow.plans import Display, ProgressBar

log = logging.getLogger(__name__)

# Shards that a GPU classifies in turn, the classifier loaded once.
SHARDS_PER_TASK = 8


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Options of a submission.

    ``then`` are the stages to queue behind the shards; ``resume`` adds those that failed before.
    ``force`` submits whatever the doctor finds. ``command`` continues with all of it after an
    interruption; empty: ``retry`` with the same options.
    """

    wait: bool = False
    retries: int = 2
    then: tuple[LaterStage, ...] = ()
    force: bool = False
    command: str = ""
    resume: bool = False

    def resume_command(self, paths: RunPaths) -> str:
        """Return the command that continues after an interruption."""
        if self.command:
            return self.command
        # Under the profile of the run, which retry knows.
        words: list[object] = ["--then", ",".join(self.then)] * bool(self.then)
        words += ["--wait", "--retries", self.retries] * self.wait
        return command("retry", paths.root, *words, *["--force"] * self.force)


def submit_run(  # noqa: PLR0912
    paths: RunPaths, plan: Plan, profile: ClusterProfile, options: SubmitOptions, display: Display
) -> dict[str, Any]:
    """Submit what is unfinished, and the stages behind it; return what ``--json`` prints."""
    say = display.say
    record = open_journal(paths)
    todo = shards_to_submit(paths, plan, record, say)
    if options.resume and (again := unfinished_stages(paths, bool(todo))):
        if profile.executor == "local" and not options.wait:
            retry = command("retry", paths.root, "--wait")
            say(f"not done yet: {', '.join(again)}; resume with: {retry}")
        else:
            say(f"queued again behind the shards: {', '.join(again)}")
            options = replace(options, then=again)
    if options.then:
        require_chain(paths, plan, options.then, profile, options.wait)
        journal.note_later(paths, options.then)
    if todo:
        if source(plan.config.model) == "file" and not paths.lock.exists():
            with display.progress("converting the weights to diffusers format"):
                convert_once(plan.config.model)
        ensure_lock(paths, plan)
    takes, evaluated = estimate(paths, plan, todo, profile), "evaluate" in options.then
    if not options.force and (todo or evaluated):
        submit.require_visible(paths, record.submissions, set(todo))
        found = check_run(paths, plan, profile, options.then)
        # Where nothing is left to make, only what would stop the evaluation counts.
        _refuse_problems([one for one in found if todo or one.subject == "classifier"], say)
    if evaluated:
        lock_found_classifier(paths, plan.config)
    if todo:
        say("\n".join(f"{name}: {text}" for name, text in estimate_rows(takes).items()))
    elif not (options.then or options.command):
        why = f"all {len(plan.assigned_shards):,} shards are finished"
        if left := len(unfinished_shards(paths, plan)):
            why = f"jobs that wait or run are making the last {left:,} shards"
        say(f"nothing to submit: {why}")
    order, remaining = submit.WorkOrder(paths, plan, RUN_STAGES, profile), 0
    if options.wait:
        jobs = follow_to_end(order, options, display)
    else:
        jobs, remaining = submit.submit_once(order, say)
    counts: dict[str, Any] = {
        "submitted": len(jobs),
        "shards": len({index for job in jobs for index in job.indices}),
        "remaining": remaining,
        "job_ids": [job.id for job in jobs],
    }
    if options.wait and options.resume and not options.then:
        # What an earlier command queued, and what of it was in vain.
        _await_stages(paths, "following the later stages", display)
        options = replace(options, then=unfinished_stages(paths, anew=False))
    if options.then and remaining:
        say(f"{', '.join(options.then)} would start too early and is not submitted")
    elif options.then:
        counts["then"] = _submit_stages(order, options, display)
    return counts


def _refuse_problems(found: Sequence[Finding], say: OnMessage) -> None:
    stopping = []
    for one in found:
        if one.verdict == "warning":
            say(f"warning: {one.subject}: {one.text}")
        # A controller that does not answer is waited for.
        elif one.verdict == "problem" and one.subject != "slurm":
            stopping.append(f"{one.subject}: {one.text}")
    if stopping:
        raise SdwnError("\n".join([*stopping, "submit all the same with: --force"]))


def shards_to_submit(paths: RunPaths, plan: Plan, record: Journal, say: OnMessage) -> list[int]:
    """List the shards to submit; report other code than was submitted last, and lost lines."""
    if replaced := submit.replaced_plan(paths, record.submissions, plan):
        raise UsageError(replaced)
    submit.report_changed_code(record.submissions, say)
    journal.report_damage(paths, record, say)
    return journal.unheld_shards(paths, plan, live_jobs(paths, record.submissions))


def _submit_stages(
    order: submit.WorkOrder, options: SubmitOptions, display: Display
) -> dict[str, str]:
    """Submit the later stages, follow them to the end if wanted; return their job ids."""
    paths, profile, stages, jobs = order.paths, order.profile, options.then, dict[str, Job]()
    # One process of this machine does not wait for another.
    parts = [stages] if profile.executor == "slurm" else [(stage,) for stage in stages]
    try:
        for part in parts:
            with submit.submission_lock(paths, display.say):
                # The first behind all live arrays, each other behind the one before.
                before = ""
                for name in part:
                    site, stage = stage_profile(profile, name), LATER_STAGES[name]
                    jobs[name] = submit_behind(order, stage, site, display.say, before)
                    before = f"afterok:{jobs[name].id}"
            if options.wait:
                _await_stages(paths, ", ".join(part), display)
                found = status.stage_states(paths, open_journal(paths), {})
                for name in part:
                    if (text := found[name].text) != status.DONE:
                        again = command("retry", paths.root, "--wait")
                        raise SdwnError(f"{name} {text}; resume with: {again}")
    except QueueFullError as error:
        again = options.resume_command(paths)
        display.say(f"{error}; queue the later stages when there is room, with: {again}")
    except KeyboardInterrupt:
        rest = f"queue the rest with: {options.resume_command(paths)}"
        display.say("; ".join(filter(None, [leaving_advice(paths), rest])))
        raise
    return {stage: job.id for stage, job in jobs.items()}


def _await_stages(paths: RunPaths, what: str, display: Display) -> None:
    """Follow the later stages to their end, also where another command queues them anew."""

    def live() -> set[Job]:
        with submit.submission_lock(paths, ignore):
            return {one.job for one in status.read_stages(paths).values() if one.live and one.job}

    with display.progress(what) as bar:
        while left := live():
            submit.follow(paths, watch_jobs(bar, display.say), left)


# --- The stages behind the shards -----------------------------------------------------------------
def merge_run(run: Path, _: Sequence[int], __: TaskOptions) -> None:
    """Merge a run into its own release."""
    from sdwn.releases.merge import merge, merged_summary

    paths = RunPaths(run)
    release = merge([paths], ReleasePaths(paths.release), carry=evaluate.keep_computed)
    log.info("merged: %s", json.dumps(merged_summary(release)))


def evaluate_run(run: Path, _: Sequence[int], options: TaskOptions = NO_OPTIONS) -> None:
    """Classify a run's own release as its config says."""
    paths = RunPaths(run)
    config = read_plan(paths).config
    require_classifier(paths, config)
    release = Release(paths.release)
    work, plan = evaluate.open_image_plan(release, config.evaluation)
    found = evaluate.make_results(release, work, plan, batch_size=options.batch_size)
    log.info("evaluated: %s", json.dumps(found))


def report_run(run: Path, _: Sequence[int], __: TaskOptions) -> None:
    """Write the report of a run's own release."""
    from sdwn.reports.report import write_report

    log.info("report: %s", write_report(Release(RunPaths(run).release), None))


# What may follow a run's shards, in the order in which they run: submit --then picks from here.
LATER_STAGES: dict[LaterStage, Stage] = {
    "merge": Stage("merge", merge_run),
    "evaluate": Stage("evaluate", evaluate_run),
    "report": Stage("report", report_run),
}
# All stages in the journal of a run.
RUN_STAGES: submit.Stages = {stage.name: stage for stage in (GENERATE, *LATER_STAGES.values())}


def parse_stages(text: str | None) -> tuple[LaterStage, ...]:
    """Read a list of later stages; they run in their own order, however they are given."""
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
    if "merge" in stages and plan.slice != WHOLE:
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
    """List the later stages that were noted and did not succeed.

    With ``anew``, also those that wait: shards are submitted again, and they would start too early.
    """
    found = status.read_stages(paths)
    failed = {stage for stage, one in found.items() if one.text != status.DONE and not one.live}
    if failed or anew:
        failed |= {stage for stage, one in found.items() if one.text.startswith(status.WAITING)}
    return tuple(stage for stage in LATER_STAGES if stage in failed)


def submit_behind(
    order: submit.WorkOrder, stage: Stage, profile: ClusterProfile, say: OnMessage, behind: str = ""
) -> Job:
    """Submit a stage ``behind`` another, by default behind all live tasks of a folder.

    Stages that wait from an earlier submission are taken back: they would start too early. One that
    runs is waited for; jobs that have nothing left to do are not, as they may be held.
    """
    before: list[str] = []
    paths, work = order.paths, order.work
    left = set(journal.unfinished_shards(paths, work))
    submissions = [] if behind else journal.read_journal(paths)
    for submission, jobs in journal.find_jobs(paths, submissions).by_submission:
        if submission.executor == "local":
            continue
        if journal.is_unreachable(jobs):
            raise SdwnError("SLURM does not answer; run the same command again when it does")
        job, state = next(iter(jobs.items()))
        later = submission.stage in status.LATER
        if later and state.state == PENDING:
            say(f"{submission.stage}, which waited as job {job.id}, is queued anew")
            if denied := submit.end_live(paths, submission, jobs):
                raise SdwnError(denied)
        elif later or any(left.intersection(one.indices) for one in jobs):
            before.append(job.id.partition("_")[0])
    dependency = behind or (f"afterany:{':'.join(before)}" if before else "")
    if dependency and profile.executor == "slurm":
        # Without the second option, a stage behind one that failed waits for ever.
        options = {"dependency": dependency, "kill-on-invalid-dep": "yes"}
        profile = profile.model_copy(update={"sbatch": {**profile.sbatch, **options}})
    task = ArrayTask(stage, str(paths.root.absolute()), (), work.digest, code_version())
    (made,) = submit.submit_array(paths, [task], profile, say)
    return made


# --- Following -----------------------------------------------------------------------------------
def watch_jobs(bar: ProgressBar, say: OnMessage) -> submit.OnLook:
    """Return a watch that shows the jobs, and reports a silent controller and what cannot start."""
    silent, reported = False, set[str]()

    def watch(live: Live) -> None:
        nonlocal silent, reported
        if is_unreachable(live) and not silent:
            say("the SLURM controller does not answer; waiting for it")
        silent = is_unreachable(live)
        stuck = {} if silent else cannot_start(live)
        for reason in stuck.keys() - reported:
            say(stuck[reason])
        reported = set(stuck)
        bar.look(live)

    return watch


def follow_to_end(order: submit.WorkOrder, options: SubmitOptions, display: Display) -> list[Job]:
    """Submit all shards that are left and follow them to the end."""
    paths, work = order.paths, order.work
    start, resume = status.images_done(paths, work), options.resume_command(paths)
    seen = start

    def watch(live: Live) -> None:
        nonlocal seen
        done = status.images_done(paths, work)
        bar.advance(done - seen)
        seen = done
        watch_queue(live)

    try:
        with display.progress(work.doing, work.assigned_images, start=start) as bar:
            watch_queue = watch_jobs(bar, display.say)
            return submit.complete(order, options.retries, watch, display.say, resume)
    except KeyboardInterrupt:
        if advice := leaving_advice(paths):
            display.say(f"{advice}; follow them again with: {resume}")
        raise


def leaving_advice(paths: RunPaths) -> str | None:
    """Return how to see and end the jobs that outlive this command; None if there are none."""
    if not live_jobs(paths):
        return None
    # A tuning has no plan, which status needs.
    see = f"see: {command('status', paths.root)}; " if paths.plan.exists() else ""
    end = command("cancel", paths.root)
    return f"the tasks continue without this command; {see}end them with: {end}"


# --- An evaluation by tasks ----------------------------------------------------------------------
def evaluation_settings(
    release: Path, model: str | None, checkpoint: Path | None, given: dict[str, Any], say: OnMessage
) -> EvaluationConfig:
    """Return the settings to evaluate a release: its run's config, replaced by the arguments.

    ``given`` has ``images``, ``groups`` and ``embedding``; None: as the config says.
    """
    opened = Release(release)
    recorded = opened.manifest.evaluation or {}
    # A later sdwn may have recorded more.
    known = {name: recorded[name] for name in EvaluationConfig.model_fields if name in recorded}
    for name in ("groups", "embedding"):
        path = Path(str(known.get(name)))
        if path.is_absolute() and not path.is_file() and not given[name]:
            say(f"the run's {name}, {path}, is not here: the default is used")
            del known[name]
    config = validated(EvaluationConfig, known, source=str(opened.paths.manifest))
    update = {name: value for name, value in given.items() if value is not None}
    chosen = with_classifier(config, model, checkpoint).model_copy(update=update)
    if chosen.checkpoint and not chosen.checkpoint.is_file() and checkpoint is None:
        raise UsageError(
            f"{chosen.checkpoint}: the run's config takes the classifier's weights from this file, "
            "and it is not here; give another with --checkpoint, or a model with --model"
        )
    origin = "from the run's config" if recorded else "the default"
    weights = f" with {chosen.checkpoint}" if chosen.checkpoint else ""
    by = "from the command line" if model or checkpoint else f"{origin}; another with --model"
    say(f"classifier: {chosen.model}{weights} ({by})")
    return chosen


def with_classifier(
    config: EvaluationConfig, model: str | None, checkpoint: Path | None
) -> EvaluationConfig:
    """Return settings with this classifier, if one is given; the config's own weights then go."""
    if not (model or checkpoint):
        return config
    return config.model_copy(update={"model": model or config.model, "checkpoint": checkpoint})


def evaluation_profiles(name: str, site: dict[str, str]) -> tuple[ClusterProfile, ClusterProfile]:
    """Read a profile for an evaluation or features: for the tasks, and for the job behind them.

    Its ``stages`` say so of ``evaluate`` and ``report``; a flag of ``site`` is for the tasks.
    """
    profile = load_profile(name, site)
    staged = stage_profile(profile, "evaluate").model_dump(mode="json", exclude_defaults=True)
    fields = {"shards_per_task": SHARDS_PER_TASK, **staged}
    tasks = overridden(fields, site, source=f"profile {name} to evaluate")
    return tasks, stage_profile(profile, "report")


def make_results_by_tasks(
    release: Path,
    chosen: EvaluationConfig | str,
    profiles: tuple[ClusterProfile, ClusterProfile],
    options: SubmitOptions,
    display: Display,
) -> dict[str, Any]:
    """Classify or encode a release by tasks; return what was written, or how the tasks stand."""
    say, opened, (profile, behind) = display.say, Release(release), profiles
    work, plan = evaluate.open_image_plan(opened, chosen)
    order = submit.WorkOrder(work, plan, evaluate.IMAGE_STAGES, profile)
    if not evaluate.has_table(opened, work, plan, say):
        if options.wait:
            follow_to_end(order, options, display)
        elif unfinished_shards(work, plan) or live_jobs(work):
            return _submit_tasks(order, plan, behind, say)
    with display.progress(f"writing the {plan.result}"):
        return evaluate.write_results(opened, work, plan, say)


def _submit_tasks(
    order: submit.WorkOrder, plan: ImagePlan, behind: ClusterProfile, say: OnMessage
) -> dict[str, Any]:
    """Submit what is neither finished nor live, and the job behind; return how all stands."""
    work, record = order.paths, open_journal(order.paths)
    submit.report_changed_code(record.submissions, say)
    failures = status.run_status(work, plan, record).failures
    jobs, remaining = submit.submit_once(order, say)
    live = live_jobs(work)
    found: dict[str, Any] = {
        plan.result: plan.name,
        "submitted": len(jobs),
        "shards": len(plan.assigned_shards),
        "done": len(plan.done(work)),
        "live": len({index for job in live for index in job.indices}),
        "remaining": remaining,
        "failures": failures,
        "job_ids": [job.id for job in jobs],
        "work": str(work.root),
    }
    if remaining:
        return found
    if order.profile.executor == "local":
        say(f"when all have ended, run the same command again: it writes the {plan.result}")
        return found
    with submit.submission_lock(work, say):
        # Of the jobs here, only the one that concludes has no shards.
        waiting = [job for job in live_jobs(work) if not job.indices]
        if jobs or not waiting:
            waiting = [submit_behind(order, evaluate.CONCLUDE, behind, say)]
    found["then"] = {"conclude": waiting[0].id}
    see = command("status", work.root)
    say(f"job {waiting[0].id} writes the {plan.result} when all have ended; see: {see}")
    return found
