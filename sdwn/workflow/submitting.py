"""Submission of a run, an evaluation or features, followed to its end: checks and stages.

::

    plan_run      config and WordNet ─▶ plan.json
                                           │
    submit_run    unfinished shards ◀──────┘
                      │
                      ▼
                  checks (stages possible, weights locked, doctor) ─▶ arrays
                                                                        │
                  merge, evaluate, report: each behind the one before ◀─┘
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sdwn.config import EvaluationConfig, RunConfig, validated
from sdwn.errors import QueueFullError, SdwnError, UsageError, command
from sdwn.evaluation import evaluate
from sdwn.io import OnMessage, ignore
from sdwn.jobs import journal, submit
from sdwn.jobs.journal import Journal, is_unreachable, live_jobs, open_journal, unfinished_shards
from sdwn.jobs.logs import failure
from sdwn.jobs.profile import ClusterProfile, LaterStage, load_profile, overridden, stage_profile
from sdwn.jobs.scheduler import Job, JobState, Live, cannot_start
from sdwn.jobs.submit import OnLook, WorkOrder, submission_lock, submit_once
from sdwn.models.families import require_usable
from sdwn.models.lock import ensure_lock
from sdwn.models.weights import convert_once, source
from sdwn.paths import RunPaths
from sdwn.planning.plan import WHOLE, Plan, Slice, make_plan, write_plan
from sdwn.prediction.plan import ImagePlan, PredictionPlan
from sdwn.preflight.doctor import check_run
from sdwn.preflight.estimate import estimate, estimate_rows
from sdwn.preflight.prefetch import lock_found_classifier
from sdwn.releases.release import Release
from sdwn.wordnet.catalog import Catalog, describe, read_catalog
from sdwn.wordnet.corpus import WordNet, shared_wordnet
from sdwn.workflow import later_stages
from sdwn.workflow.status import FAILURES_SHOWN, images_done, read_stages

# Shards that a GPU classifies in turn, the classifier loaded once.
SHARDS_PER_TASK = 8


class ProgressBar(Protocol):
    """Display of one long piece of work."""

    def advance(self, number: int) -> None:
        """Show that so much more is done."""

    def look(self, live: Live) -> None:
        """Show the jobs that wait or run."""


class Display(Protocol):
    """Display of long work; the command line's is the module ``sdwn.cli.console``."""

    def say(self, message: str) -> None:
        """Show a message."""

    def progress(
        self, what: str, total: int | None = None, unit: str = "images", start: int = 0
    ) -> AbstractContextManager[ProgressBar]:
        """Show work under way, and how much of ``total`` is done, if that is known."""


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Options of a submission.

    ``wait`` follows the tasks to the end, and submits what failed up to ``retries`` times again.
    ``then`` are the stages to queue behind them; ``resume`` adds those that failed before.
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


def plan_run(
    config: RunConfig, run: Path, display: Display, share: Slice = WHOLE
) -> tuple[Plan, RunPaths]:
    """Read WordNet and write a run's plan, or a slice of it, unless the same plan is there."""
    begun = RunPaths(run).begun
    require_usable(config, begun=begun)
    plan, wordnet = plan_catalog(config, display, share)
    if plan.table["negative_prompt"].null_count < len(plan.table):
        require_usable(config, begun=begun, rows_negative=True)
    return plan, store_plan(plan, run, wordnet, display)


def plan_catalog(
    config: RunConfig, display: Display, share: Slice = WHOLE
) -> tuple[Plan, WordNet | None]:
    """Plan the concepts of a config's catalog; return WordNet too, where some are its synsets."""
    wordnet, table = None, config.catalog.table
    with display.progress(f"reading {table.name if table else 'WordNet'}"):
        if table:
            catalog = Catalog(describe(config.catalog), ())
        else:
            catalog = read_catalog(config.catalog, shared_wordnet())
        plan = make_plan(config, catalog, share, display.say)
        if plan.table["wnid"].null_count < len(plan.table):
            wordnet = shared_wordnet()
    return plan, wordnet


def store_plan(plan: Plan, run: Path, wordnet: WordNet | None, display: Display) -> RunPaths:
    """Write a plan into its run's folder, and lock the run to the weights that are here."""
    config, paths = plan.config, RunPaths(run)
    new = write_plan(plan, paths, display.say, wordnet)
    display.say(f"{'planned' if new else 'planned already'}: {run}")
    with display.progress("looking for the weights"):
        locked = ensure_lock(paths, plan)
    states = {"elsewhere": "no such folder on this machine", "hub": "not downloaded yet"}
    states["file"] = "not converted yet"
    state = f"revision {locked.revision}" if locked else states.get(source(config.model))
    if state:
        display.say(f"model: {config.model.name} ({state})")
    return paths


def _convert_and_lock(paths: RunPaths, plan: Plan, display: Display) -> None:
    if source(plan.config.model) == "file" and not paths.lock.exists():
        with display.progress("converting the weights to diffusers format"):
            convert_once(plan.config.model)
    ensure_lock(paths, plan)


def submit_run(  # noqa: PLR0912
    paths: RunPaths, plan: Plan, profile: ClusterProfile, options: SubmitOptions, display: Display
) -> dict[str, Any]:
    """Submit what is unfinished, and the stages behind it; follow all to the end if wanted.

    Returns:
        Counts and ids of what was submitted, as ``--json`` prints them.
    """
    say = display.say
    record = open_journal(paths)
    todo = shards_to_submit(paths, plan, record, say)
    if options.resume and (again := later_stages.unfinished_stages(paths, bool(todo))):
        if profile.executor == "local" and not options.wait:
            retry = command("retry", paths.root, "--wait")
            say(f"not done yet: {', '.join(again)}; resume with: {retry}")
        else:
            say(f"queued again behind the shards: {', '.join(again)}")
            options = replace(options, then=again)
    if options.then:
        later_stages.require_chain(paths, plan, options.then, profile, options.wait)
        journal.note_later(paths, options.then)
    if todo:
        _convert_and_lock(paths, plan, display)
    takes, evaluated = estimate(paths, plan, todo, profile), "evaluate" in options.then
    if not options.force:
        submit.require_visible(paths, record.submissions, todo)
        checked = todo or evaluated
        found = check_run(paths, plan, profile, options.then, takes) if checked else []
        # Where nothing is left to make, only what would stop the evaluation counts. A controller
        # that does not answer is waited for.
        found = [one for one in found if todo or one.subject == "classifier"]
        texts = [(one.verdict, f"{one.subject}: {one.text}") for one in found]
        for verdict, text in texts:
            if verdict == "warning":
                say(f"warning: {text}")
        stopping = [
            text for verdict, text in texts if verdict == "problem" and text[:6] != "slurm:"
        ]
        if stopping:
            raise SdwnError("\n".join([*stopping, "submit all the same with: --force"]))
    if evaluated:
        lock_found_classifier(paths, plan.config)
    if todo:
        say("\n".join(f"{name}: {text}" for name, text in estimate_rows(takes).items()))
    elif not (options.then or options.command):
        left = {shard.index for shard in plan.assigned_shards} - plan.done(paths)
        why = f"all {len(plan.assigned_shards):,} shards are finished"
        if left:
            why = f"jobs that wait or run are making the last {len(left):,} shards"
        say(f"nothing to submit: {why}")
    order, remaining = WorkOrder(paths, plan, later_stages.RUN_STAGES, profile), 0
    if options.wait:
        jobs = follow_to_end(order, options, display)
    else:
        jobs, remaining = submit_once(order, say)
    counts: dict[str, Any] = {
        "submitted": len(jobs),
        "shards": len({index for job in jobs for index in job.indices}),
        "remaining": remaining,
        "job_ids": [job.id for job in jobs],
    }
    if options.wait and options.resume and not options.then:
        options = replace(options, then=_await_stages(paths, display))
    if options.then and remaining:
        say(f"{', '.join(options.then)} would start too early and is not submitted")
    elif options.then:
        counts["then"] = _submit_stages(order, plan, options, display)
    return counts


def _await_stages(paths: RunPaths, display: Display) -> tuple[LaterStage, ...]:
    """Wait for later stages that an earlier command queued; return those that were in vain."""
    live = {one.job for one in read_stages(paths).values() if one.live and one.job}
    if live:
        with display.progress("following the later stages") as bar:
            submit.follow(paths, watch_jobs(bar, display.say), live)
    return later_stages.unfinished_stages(paths, anew=False)


def shards_to_submit(paths: RunPaths, plan: Plan, record: Journal, say: OnMessage) -> list[int]:
    """List the shards to submit; report other code than at the last submission, and lost lines."""
    if replaced := submit.replaced_plan(paths, record.submissions, plan):
        raise UsageError(replaced)
    if changed := submit.changed_code(record.submissions):
        say(changed)
    journal.report_damage(paths, record, say)
    return journal.unheld_shards(paths, plan, live_jobs(paths, record.submissions))


def _submit_stages(
    order: WorkOrder, plan: Plan, options: SubmitOptions, display: Display
) -> dict[str, str]:
    """Submit the later stages, follow them to the end if wanted; return their job ids."""
    paths, profile, stages, jobs = order.paths, order.profile, options.then, dict[str, Job]()
    # One process of this machine does not wait for another.
    parts = [stages] if profile.executor == "slurm" else [(stage,) for stage in stages]
    try:
        for part in parts:
            with display.progress(", ".join(part) if options.wait else "submitting") as bar:
                with submission_lock(paths, display.say):
                    jobs |= later_stages.submit_chain(paths, plan, part, profile, display.say)
                while options.wait:
                    # Another command may queue them anew.
                    with submission_lock(paths, ignore):
                        found = read_stages(paths)
                    states = [found[stage] for stage in part if stage in found]
                    if not (left := {one.job for one in states if one.live and one.job}):
                        later_stages.require_done(paths, part)
                        break
                    submit.follow(paths, watch_jobs(bar, display.say), left)
    except QueueFullError as error:
        again = options.resume_command(paths)
        display.say(f"{error}; queue the later stages when there is room, with: {again}")
    except KeyboardInterrupt:
        rest = f"queue the rest with: {options.resume_command(paths)}"
        advice = leaving_advice(paths)
        display.say(f"{advice}; {rest}" if advice else rest)
        raise
    return {stage: job.id for stage, job in jobs.items()}


# --- Following -----------------------------------------------------------------------------------
def watch_jobs(bar: ProgressBar, say: OnMessage) -> OnLook:
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


def follow_to_end(order: WorkOrder, options: SubmitOptions, display: Display) -> list[Job]:
    """Submit all shards that are left and follow them to the end."""
    paths, work = order.paths, order.work
    start, resume = images_done(paths, work), options.resume_command(paths)
    seen = start
    what = {"generate": "making images"}.get(work.stage, getattr(work, "doing", work.stage))

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal seen
        done = images_done(paths, work)
        bar.advance(done - seen)
        seen = done
        watch_queue(live)

    try:
        with display.progress(what, work.assigned_images, start=start) as bar:
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
        file = known.get(name)
        path = Path(file) if isinstance(file, str) else Path()
        if path.is_absolute() and not path.is_file() and not given[name]:
            say(f"the run's {name}, {file}, is not here: the default is used")
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

    What its ``stages`` say of ``evaluate`` is for the tasks, of ``report`` for the job behind them.
    A flag of ``site`` is for the tasks, whatever the profile says of them.
    """
    profile = load_profile(name, site)
    staged = stage_profile(profile, "evaluate").model_dump(mode="json", exclude_defaults=True)
    fields = {"shards_per_task": SHARDS_PER_TASK, **staged}
    tasks = overridden(fields, site, source=f"profile {name} to evaluate")
    return tasks, stage_profile(profile, "report")


def evaluate_by_tasks(
    release: Path,
    chosen: EvaluationConfig | str,
    profiles: tuple[ClusterProfile, ClusterProfile],
    options: SubmitOptions,
    display: Display,
) -> dict[str, Any]:
    """Do by array tasks what `evaluate` does here; write the end, or queue a job that writes it.

    Returns:
        The evaluation's main figures, or what features there are; or how the tasks stand.
    """
    say, opened, (profile, behind) = display.say, Release(release), profiles
    work, plan = evaluate.open_image_plan(opened, chosen)
    if "%" in str(work.root.absolute()):
        raise UsageError(
            f"{work.root}: SLURM and submitit read % in a path as a placeholder; move the release "
            "to a folder whose path has none"
        )
    order = WorkOrder(work, plan, evaluate.IMAGE_STAGES, profile)
    if not evaluate.has_table(opened, work, plan, say):
        with evaluate.removed_if_empty(work):
            from sdwn.prediction.encoder import encoder_file  # torch and timm
            from sdwn.prediction.pretrained import find_classifier

            option = "--features "
            if isinstance(plan, PredictionPlan):
                evaluate.require_evaluable(plan.evaluation, lambda: opened.taxonomy)
                option = "--set evaluation.model="
                file = find_classifier(plan.model, plan.evaluation.checkpoint)
            else:
                file = encoder_file(plan.model)
            if file is None:
                say(
                    f"the weights of {plan.model} are not here: each task would download them; "
                    f"before that: sdwn prefetch CONFIG {option}{plan.model}"
                )
        if options.wait:
            follow_to_end(order, options, display)
        elif unfinished_shards(work, plan) or live_jobs(work):
            return _submit_tasks(order, plan, behind, say)
    with display.progress(f"writing the {plan.result}"):
        return evaluate.write_results(opened, work, plan, say)


def _submit_tasks(
    order: WorkOrder, plan: ImagePlan, behind: ClusterProfile, say: OnMessage
) -> dict[str, Any]:
    """Submit what is neither finished nor live, and the job behind; return how all stands."""
    work, submissions = order.paths, journal.read_journal(order.paths)
    if changed := submit.changed_code(submissions):
        say(changed)
    lost = journal.failed_shards(work, plan, submissions, live_jobs(work, submissions))[
        :FAILURES_SHOWN
    ]
    failures = [f"shard {index}: {failure(work, index, submissions)}" for index in lost]
    jobs, remaining = submit_once(order, say)
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
    if order.profile.executor == "slurm" and not remaining:
        found["then"] = {}
        with submission_lock(work, say):
            # Of the jobs here, only the one that concludes has no shards.
            waiting = [job for job in live_jobs(work) if not job.indices]
            try:
                if jobs or not waiting:
                    waiting = [
                        later_stages.submit_behind(work, plan, evaluate.CONCLUDE, behind, say)
                    ]
                found["then"] = {"conclude": waiting[0].id}
            except QueueFullError as error:
                say(str(error))
    if job := found.get("then", {}).get("conclude"):
        see = command("status", work.root)
        say(f"job {job} writes the {plan.result} when all have ended; see: {see}")
    elif not remaining:
        say(f"when all have ended, run the same command again: it writes the {plan.result}")
    return found
