"""Submission of a run, followed to its end: plan, checks, shards, and the stages behind them.

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

from sdwn.config import RunConfig
from sdwn.errors import QueueFullError, SdwnError, UsageError, command
from sdwn.io import OnMessage, ignore
from sdwn.jobs.journal import (
    Journal,
    is_unreachable,
    live_jobs,
    note_later,
    open_journal,
    report_damage,
    unheld_shards,
)
from sdwn.jobs.profile import ClusterProfile, LaterStage
from sdwn.jobs.scheduler import Job, JobState, Live, cannot_start
from sdwn.jobs.submit import (
    Callbacks,
    OnLook,
    WorkOrder,
    changed_code,
    complete,
    follow,
    replaced_plan,
    require_visible,
    submission_lock,
    submit_once,
)
from sdwn.models.families import require_usable
from sdwn.models.lock import ensure_lock
from sdwn.models.weights import source
from sdwn.paths import RunPaths
from sdwn.planning.plan import WHOLE, Plan, Slice, make_plan, write_plan
from sdwn.preflight.doctor import check_run
from sdwn.preflight.estimate import estimate, estimate_rows
from sdwn.preflight.prefetch import lock_found_classifier
from sdwn.wordnet.catalog import read_catalog
from sdwn.wordnet.corpus import shared_wordnet
from sdwn.workflow import later_stages
from sdwn.workflow.status import images_done, read_stages


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
    require_usable(config)
    with display.progress("reading WordNet"):
        wordnet = shared_wordnet()
        catalog = read_catalog(config.catalog, wordnet)
    plan, paths = make_plan(config, catalog, share), RunPaths(run)
    new = write_plan(plan, paths, display.say, wordnet)
    display.say(f"{'planned' if new else 'planned already'}: {run}")
    with display.progress("looking for the weights"):
        locked = ensure_lock(paths, plan)
    states = {"elsewhere": "no such folder on this machine", "hub": "not downloaded yet"}
    state = f"revision {locked.revision}" if locked else states.get(source(config.model))
    if state:
        display.say(f"model: {config.model.name} ({state})")
    return plan, paths


def submit_run(  # noqa: PLR0912
    paths: RunPaths,
    plan: Plan,
    profile: ClusterProfile,
    options: SubmitOptions,
    display: Display,
) -> dict[str, Any]:
    """Submit what is unfinished, and the stages behind it; follow all to the end if wanted.

    Returns:
        Counts and ids of what was submitted, as ``--json`` prints them.
    """
    say = display.say
    journal = open_journal(paths)
    todo = shards_to_submit(paths, plan, journal, say)
    if options.resume and (again := later_stages.unfinished_stages(paths, bool(todo))):
        if profile.executor == "local" and not options.wait:
            retry = command("retry", paths.root, "--wait")
            say(f"not done yet: {', '.join(again)}; resume with: {retry}")
        else:
            say(f"queued again behind the shards: {', '.join(again)}")
            options = replace(options, then=again)
    if options.then:
        later_stages.require_chain(paths, plan, options.then, profile, options.wait)
        note_later(paths, options.then)
    if todo:
        ensure_lock(paths, plan)
    takes, evaluated = estimate(paths, plan, todo, profile), "evaluate" in options.then
    if not options.force:
        require_visible(paths, journal.submissions, todo)
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
    if options.then and remaining:
        say(f"{', '.join(options.then)} would start too early and is not submitted")
    elif options.then:
        counts["then"] = _submit_stages(order, plan, options, display)
    return counts


def shards_to_submit(paths: RunPaths, plan: Plan, journal: Journal, say: OnMessage) -> list[int]:
    """List the shards to submit; report other code than at the last submission, and lost lines."""
    if replaced := replaced_plan(paths, journal.submissions, plan):
        raise UsageError(replaced)
    if changed := changed_code(journal.submissions):
        say(changed)
    report_damage(paths, journal, say)
    return unheld_shards(paths, plan, live_jobs(paths, journal.submissions))


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
                    follow(paths, watch_jobs(bar, display.say), left)
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
    what = {"generate": "making images", "judge": "classifying"}.get(work.stage, work.stage)

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal seen
        done = images_done(paths, work)
        bar.advance(done - seen)
        seen = done
        watch_queue(live)

    try:
        with display.progress(what, work.assigned_images, start=start) as bar:
            watch_queue = watch_jobs(bar, display.say)
            return complete(order, options.retries, Callbacks(watch, display.say, resume))
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
