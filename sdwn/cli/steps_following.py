"""Following tasks to their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdwn.cli import terminal
from sdwn.errors import SdwnError, command

if TYPE_CHECKING:
    from sdwn.jobs.cluster import Job
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.jobs.scheduler import JobState
    from sdwn.jobs.submit import Watch
    from sdwn.paths import RunPaths
    from sdwn.planning.work import Dealt


def told_to_user() -> Watch:
    """Return a watch that says once when the controller is silent, and what waits in vain."""
    from sdwn.jobs.live import unreachable
    from sdwn.jobs.stuck import cannot_start

    silent, told = False, set[str]()

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal silent, told
        if unreachable(live) and not silent:
            terminal.say("the SLURM controller does not answer; waiting for it")
        silent = unreachable(live)
        stuck = {} if silent else cannot_start(live)
        for reason in stuck.keys() - told:
            terminal.say(stuck[reason])
        told = set(stuck)

    return watch


def goes_on(paths: RunPaths) -> str | None:
    """Return that a run's jobs go on without this command; None if there are none."""
    from sdwn.jobs.live import live_jobs

    if not live_jobs(paths):
        return None
    # A tuning has no plan, of which status could tell.
    see = f"see: {command('status', paths.root)}; " if paths.plan.exists() else ""
    end = command("cancel", paths.root)
    return f"the tasks go on without you; {see}end them with: {end}"


def complete_run(
    paths: RunPaths,
    made: Dealt,
    chosen: ClusterProfile,
    retries: int,
    again: str = "the same command",
) -> list[Job]:
    """Submit all shards that are left and follow them to the end.

    ``again`` is the command that goes on under the same profile, for whoever leaves.
    """
    from sdwn.jobs.submit import Onlooker, complete
    from sdwn.workflow.status import images_done, shortage

    start = images_done(paths, made)
    seen, tell = start, told_to_user()

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal seen
        done = images_done(paths, made)
        advance(done - seen)
        seen = done
        tell(live)

    try:
        with terminal.progress(made.stage, made.own_images, "images", start) as advance:
            return complete(paths, made, chosen, retries, Onlooker(watch, terminal.say, again))
    except SdwnError as error:
        if short := shortage(paths, made, str(error)):
            raise SdwnError(f"{error}; {short}") from error
        raise
    except KeyboardInterrupt:
        if live := goes_on(paths):
            terminal.say(f"{live}; follow them again with: {again}")
        raise
