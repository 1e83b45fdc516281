"""Following a run's tasks to their end, with messages and progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sdwn.errors import SdwnError, command
from sdwn.io import OnMessage
from sdwn.jobs.journal import Journal, is_unreachable, live_jobs
from sdwn.jobs.profile import LaterStage
from sdwn.jobs.scheduler import Job, JobState, cannot_start
from sdwn.jobs.submit import Callbacks, OnLook, WorkOrder, complete
from sdwn.paths import RunPaths
from sdwn.workflow.status import images_done, shortage


class Display(Protocol):
    """Display of long work; the command line's is the module ``sdwn.cli.console``."""

    def say(self, message: str) -> None:
        """Show a message."""

    def working(self, what: str) -> AbstractContextManager[None]:
        """Show that something is going on."""

    def progress(
        self, what: str, total: int, unit: str, start: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Show how much is done; the function that is yielded counts on from ``start``."""


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """How to submit.

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


def queue_watch(say: OnMessage) -> OnLook:
    """Return a watch that reports, once, a silent controller and each job that can never start."""
    silent, reported = False, set[str]()

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal silent, reported
        if is_unreachable(live) and not silent:
            say("the SLURM controller does not answer; waiting for it")
        silent = is_unreachable(live)
        stuck = {} if silent else cannot_start(live)
        for reason in stuck.keys() - reported:
            say(stuck[reason])
        reported = set(stuck)

    return watch


def leaving_advice(paths: RunPaths) -> str | None:
    """Return how to see and end the jobs that outlive this command; None if there are none."""
    if not live_jobs(paths):
        return None
    # A tuning has no plan, which status needs.
    see = f"see: {command('status', paths.root)}; " if paths.plan.exists() else ""
    end = command("cancel", paths.root)
    return f"the tasks continue without this command; {see}end them with: {end}"


def report_damage(paths: RunPaths, journal: Journal, say: OnMessage) -> None:
    """Report the unreadable lines of the journal; the scheduler may still know their jobs."""
    if lines := journal.unreadable:
        numbers = ", ".join(map(str, lines))
        say(f"{paths.submissions}: cannot be read in line {numbers}: cut short or damaged")


def follow_to_end(order: WorkOrder, options: SubmitOptions, display: Display) -> list[Job]:
    """Submit all shards that are left and follow them to the end.

    Raises:
        SdwnError: shards are still missing; the message has the reason of the first.
    """
    paths, work = order.paths, order.work
    start, resume = images_done(paths, work), options.resume_command(paths)
    seen, watch_queue = start, queue_watch(display.say)

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal seen
        done = images_done(paths, work)
        advance(done - seen)
        seen = done
        watch_queue(live)

    try:
        what = "classify" if work.stage == "judge" else work.stage
        with display.progress(what, work.assigned_images, "images", start) as advance:
            return complete(order, options.retries, Callbacks(watch, display.say, resume))
    except SdwnError as error:
        if short := shortage(paths, work, str(error)):
            raise SdwnError(f"{error}; {short}") from error
        raise
    except KeyboardInterrupt:
        if advice := leaving_advice(paths):
            display.say(f"{advice}; follow them again with: {resume}")
        raise
