"""Submitting a run, and the stages behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdwn.cli import terminal, texts
from sdwn.cli.steps_following import complete_run, goes_on, told_to_user
from sdwn.errors import command

if TYPE_CHECKING:
    from sdwn.jobs.profile import ClusterProfile, LaterStage
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Whether to follow the tasks, how often to try again meanwhile, and what comes after.

    ``force``: whatever the doctor says. ``again`` is the command that goes on with all of it;
    empty: ``retry`` with the same options. ``resume``: later stages that failed come after, too.
    """

    wait: bool = False
    retries: int = 2
    then: tuple[LaterStage, ...] = ()
    force: bool = False
    again: str = ""
    resume: bool = False


def submit_options(
    wait: bool, retries: int, then: str | None, force: bool, resume: bool = False
) -> SubmitOptions:
    """Read the options that ``submit`` and ``retry`` share."""
    if then is None:
        return SubmitOptions(wait, retries, (), force, resume=resume)
    from sdwn.workflow.later_stages import parse_stages

    return SubmitOptions(wait, retries, parse_stages(then), force)


def show_script(
    paths: RunPaths, made: Plan, todo: list[int], chosen: ClusterProfile, as_json: bool
) -> None:
    """Print the script that would be submitted; what it would take goes beside it, to stderr."""
    from sdwn.jobs import cluster
    from sdwn.jobs.site import max_array_size
    from sdwn.preflight.estimate import estimate

    tasks: Sequence[tuple[int, ...]] = cluster.cut(todo, chosen)
    arrays, script = [(tasks, len(tasks))], ""
    if chosen.executor == "slurm":
        now = tasks[: chosen.max_submit_jobs]
        arrays = cluster.arrays(now, max_array_size(), chosen.array_parallelism)
    if todo:
        first, at_once = arrays[0]
        own = chosen.model_copy(update={"array_parallelism": at_once})
        script = cluster.script(len(first), paths.jobs, own)
    takes = estimate(paths, made, todo, chosen)
    if todo and not as_json:
        terminal.say_values(texts.estimate_rows(takes))
        if len(arrays) > 1 or len(arrays[0][0]) < len(tasks):
            terminal.say(texts.arrays_line(arrays, len(tasks)))
    found = {"submitted": 0, "shards": len(todo), "job_ids": [], "script": script}
    found["arrays"] = [len(part) for part, _ in arrays]
    found["estimate"] = takes.as_dict()
    terminal.result(found, as_json, text=script or "# nothing to submit\n")


def submit_run(
    paths: RunPaths, made: Plan, chosen: ClusterProfile, options: SubmitOptions
) -> dict[str, Any]:
    """Submit what is unfinished, and the stages behind it; if asked, follow all to the end."""
    from sdwn.jobs.journal import note_later
    from sdwn.jobs.submit import require_visible, submit_once
    from sdwn.models.lock import ensure
    from sdwn.preflight.estimate import estimate
    from sdwn.preflight.prefetch import lock_classifier
    from sdwn.workflow import later_stages as chain

    todo = unfinished_shards(paths, made)
    if options.resume:
        options = replace(options, then=_stages_to_resume(paths, chosen, bool(todo), options.wait))
    if options.then:
        chain.require_possible(paths, made, options.then, chosen, options.wait)
        note_later(paths, options.then)
    if todo:
        ensure(paths, made)
    evaluated = "evaluate" in options.then
    if not options.force:
        require_visible(paths, todo)
        if todo or evaluated:
            require_sound(paths, made, chosen, options.then, anything=bool(todo))
    if evaluated:
        lock_classifier(paths, made.config)
    if todo:
        terminal.say("\n".join(texts.submitting_lines(estimate(paths, made, todo, chosen))))
    _say_nothing_to_submit(paths, made, todo, options)
    remaining = 0
    if options.wait:
        jobs = complete_run(paths, made, chosen, options.retries, _again(paths, options))
    else:
        jobs, remaining = submit_once(paths, made, chosen, terminal.say)
    found: dict[str, Any] = {
        "submitted": len(jobs),
        "shards": len({index for job in jobs for index in job.indices}),
        "remaining": remaining,
        "job_ids": [job.id for job in jobs],
    }
    if options.then and remaining:
        terminal.say(f"{', '.join(options.then)} would start too early and is not submitted")
    elif options.then:
        found["then"] = _chained(paths, made, chosen, options)
    elif jobs and not remaining and not options.wait:
        _say_too_early(paths)
    return found


def _say_nothing_to_submit(
    paths: RunPaths, made: Plan, todo: list[int], options: SubmitOptions
) -> None:
    """Return why nothing is submitted: all shards are finished, or jobs are making the rest."""
    if todo or options.then or options.again:
        return
    left = {shard.index for shard in made.own_shards} - made.done(paths)
    why = f"all {len(made.own_shards):,} shards are finished"
    advice = f"merge them with: {command('merge', paths.root, '--release', 'RELEASE')}"
    if left:
        why = f"jobs that wait or run are making the last {len(left):,} shards"
        advice = f"see: {command('status', paths.root)}"
    terminal.say(f"nothing to submit: {why}; {advice}")


def _stages_to_resume(
    paths: RunPaths, chosen: ClusterProfile, anew: bool, wait: bool
) -> tuple[LaterStage, ...]:
    """List the later stages to submit again; say so, or what is needed for it."""
    from sdwn.workflow.later_stages import unfinished_stages

    stages = unfinished_stages(paths, anew)
    if stages and chosen.executor == "local" and not wait:
        names = ", ".join(stages)
        again = command("retry", paths.root, "--wait")
        terminal.say(f"not done yet: {names}; go on with: {again}")
        return ()
    if stages:
        terminal.say(f"behind the shards, again: {', '.join(stages)}")
    return stages


def require_sound(
    paths: RunPaths,
    made: Plan,
    chosen: ClusterProfile,
    then: tuple[LaterStage, ...],
    *,
    anything: bool,
) -> None:
    """Say what the doctor warns of, and refuse a run that something would stop.

    Where nothing is left to make, only what would stop its evaluation counts.

    Raises:
        SdwnError: with every problem, a line each.
    """
    from sdwn.errors import SdwnError
    from sdwn.preflight.doctor import examine

    found = examine(paths, made, chosen, then)
    found = [finding for finding in found if anything or finding.subject == "classifier"]
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
    from sdwn.jobs.live import unfinished
    from sdwn.jobs.submit import changed_code, require_same_plan

    require_same_plan(paths, made)
    if changed := changed_code(paths):
        terminal.say(changed)
    say_unreadable(paths)
    return unfinished(paths, made)


def say_unreadable(paths: RunPaths) -> None:
    """Return which lines of the journal are lost; what they said may be known otherwise."""
    from sdwn.jobs.journal import unreadable

    if lines := unreadable(paths):
        numbers = ", ".join(map(str, lines))
        terminal.say(f"{paths.submissions}: cannot be read in line {numbers}: cut short or damaged")


def _chained(
    paths: RunPaths, made: Plan, chosen: ClusterProfile, options: SubmitOptions
) -> dict[str, str]:
    """Submit the later stages; if asked, follow them to the end."""
    from sdwn.errors import QueueFullError
    from sdwn.jobs.cluster import Job
    from sdwn.jobs.submit import alone, follow
    from sdwn.workflow import later_stages as chain

    stages, jobs = options.then, dict[str, Job]()
    # One process of this machine does not wait for another.
    parts = [stages] if chosen.executor == "slurm" else [(stage,) for stage in stages]
    try:
        with terminal.working(", ".join(stages) if options.wait else "submitting"):
            for part in parts:
                with alone(paths, terminal.say):
                    jobs |= chain.submit_chain(paths, made, part, chosen, terminal.say)
                if options.wait:
                    while left := chain.followed(paths, part):
                        follow(paths, told_to_user(), left)
                    chain.require_done(paths, part)
    except QueueFullError as error:
        terminal.say(f"{error}; queue what comes after later, with: {_again(paths, options)}")
    except KeyboardInterrupt:
        live = goes_on(paths)
        rest = f"queue the rest with: {_again(paths, options)}"
        terminal.say(f"{live}; {rest}" if live else rest)
        raise
    return {stage: job.id for stage, job in jobs.items()}


def _say_too_early(paths: RunPaths) -> None:
    """Say of stages that wait for an earlier submission that they don't wait for this one."""
    from sdwn.workflow.later_stages import WAITING, stages_that

    if early := stages_that(paths, WAITING):
        told = ", ".join(f"{stage} (job {job.id})" for stage, job in early.items())
        again = command("retry", paths.root, "--then", ",".join(early))
        terminal.say(f"{told} will start too early, without these tasks; to change that: {again}")


def _again(paths: RunPaths, options: SubmitOptions) -> str:
    if options.again:
        return options.again
    # Under the profile of the run, which retry knows.
    words: list[object] = ["--then", ",".join(options.then)] * bool(options.then)
    words += ["--wait", "--retries", options.retries] * options.wait
    return command("retry", paths.root, *words, *["--force"] * options.force)
