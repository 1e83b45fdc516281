"""Following tasks to their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdwn import terminal

if TYPE_CHECKING:
    from sdwn.cluster import Job
    from sdwn.dealt import Dealt
    from sdwn.files import RunPaths
    from sdwn.profiles import ClusterProfile
    from sdwn.scheduler import JobState
    from sdwn.submission import Watch


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
