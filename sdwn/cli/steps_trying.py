"""Trying before a run: tuning, the pilot, the doctor, each perhaps by a short job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdwn.cli import terminal, texts
from sdwn.cli.steps_following import goes_on, told_to_user

if TYPE_CHECKING:
    from sdwn.config import RunConfig
    from sdwn.devices.profiles import GpuProfile
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.jobs.submit import Watch
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import Plan
    from sdwn.preflight.findings import Finding


@contextmanager
def trial(what: str, again: str = "") -> Iterator[tuple[Callable[[Path], None], Watch]]:
    """Show that short jobs are at work; on Ctrl-C say how to end them, or take them up again."""
    from sdwn.paths import RunPaths

    folders: list[Path] = []
    try:
        with terminal.working(what):
            yield folders.append, told_to_user()
    except KeyboardInterrupt:
        for folder in folders:
            if live := goes_on(RunPaths(folder)):
                terminal.say(live + again)
        raise


AGAIN = "; take it up again with the same command"


def tune_elsewhere(
    settings: RunConfig, chosen: ClusterProfile, kinds: list[str]
) -> list[GpuProfile]:
    """Tune by short jobs under a profile."""
    from sdwn.jobs.submit import require_fit
    from sdwn.preflight.short_jobs import tune_elsewhere

    require_fit(settings, chosen)
    wanted = [kind.strip() for kind in kinds if kind.strip()]
    with trial("measuring", AGAIN) as (told, watch):
        return tune_elsewhere(settings, chosen, wanted, told, watch)


def examined(paths: RunPaths, made: Plan, chosen: ClusterProfile, probe: bool) -> list[Finding]:
    """Examine a run; with a probe, ask a compute node too, unless no job could start."""
    from sdwn.preflight.doctor import can_start, examine
    from sdwn.preflight.findings import unverified
    from sdwn.preflight.node_checks import with_node

    with terminal.working("looking"):
        found = examine(paths, made, chosen)
    if not probe:
        return found
    if not can_start(found):
        return with_node(found, [unverified("node", "not asked, for no job could start")])
    return with_node(found, probed(paths, made, chosen))


def probed(paths: RunPaths, made: Plan, chosen: ClusterProfile) -> list[Finding]:
    """Ask a compute node what it sees of a run."""
    from sdwn.errors import SdwnError
    from sdwn.preflight.findings import problem
    from sdwn.preflight.node_checks import check_node
    from sdwn.preflight.short_jobs import run_probe

    with trial("asking a compute node") as (told, watch):
        try:
            return check_node(run_probe(paths, chosen, told, watch), made, chosen)
        except SdwnError as error:
            return [problem("node", str(error))]


def say_findings(found: list[Finding], as_json: bool) -> bool:
    """Print what was found; tell whether anything would stop the run."""
    from dataclasses import asdict

    from sdwn.preflight.findings import problems

    values = {"ok": not problems(found), "findings": [asdict(finding) for finding in found]}
    terminal.result(values, as_json, text=texts.findings_text(found))
    return bool(problems(found))
