"""Following tasks to their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdwn import terminal
from sdwn.errors import command

if TYPE_CHECKING:
    from sdwn.files import RunPaths
    from sdwn.jobs.cluster import Job
    from sdwn.jobs.profiles import ClusterProfile
    from sdwn.jobs.scheduler import JobState
    from sdwn.jobs.submission import Watch
    from sdwn.planning.dealt import Dealt


def silence_told() -> Watch:
    """Give a watch that says once when the controller does not answer."""
    from sdwn.jobs.live import unreachable

    silent = False

    def watch(live: dict[Job, JobState]) -> None:
        nonlocal silent
        if unreachable(live) and not silent:
            terminal.say("the SLURM controller does not answer; waiting for it")
        silent = unreachable(live)

    return watch


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
    from sdwn.jobs.submission import Onlooker, complete
    from sdwn.runs.status import images_done

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
            return complete(paths, made, chosen, retries, Onlooker(watch, terminal.say, again))
    except KeyboardInterrupt:
        if not paths.submissions.exists():
            raise  # nothing was submitted yet
        terminal.say(
            f"the tasks go on without you; see: {command('status', paths.root)}; follow them "
            f"again with: {again}; end them with: {command('cancel', paths.root)}"
        )
        raise
