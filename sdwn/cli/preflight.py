"""The commands that measure and check before a run: tune, pilot, doctor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from typer import Option

from sdwn.cli import console
from sdwn.cli.folders import open_run
from sdwn.cli.options import (
    AsJson,
    Config,
    Override,
    Profile,
    Run,
    open_config,
    open_profile,
    with_site,
)
from sdwn.errors import duration

if TYPE_CHECKING:
    from sdwn.preflight.trials import TrialCallbacks

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "unverified": "cyan"}


@contextmanager
def short_jobs(what: str, advice: str = "") -> Iterator[TrialCallbacks]:
    """Show that short jobs are running; on Ctrl-C say how to end them, and ``advice``."""
    from sdwn.paths import RunPaths
    from sdwn.preflight.trials import TrialCallbacks
    from sdwn.workflow.following import leaving_advice, queue_watch

    folders: list[Path] = []
    try:
        with console.working(what):
            yield TrialCallbacks(folders.append, queue_watch(console.say))
    except KeyboardInterrupt:
        for folder in folders:
            if live := leaving_advice(RunPaths(folder)):
                console.say(live + advice)
        raise


SAME_COMMAND = "; resume with the same command"


@with_site
def tune_command(
    config: Config,
    site: dict[str, str],
    profile: Annotated[str | None, Option(help="Profile to measure under; default: here.")] = None,
    gpus: Annotated[str | None, Option(help="Kinds of GPU, as v100,a100: a job on each.")] = None,
    set_: Override = None,
    as_json: AsJson = False,
) -> None:
    """Measure the best batch size of a GPU.

    Every later task on this kind of GPU uses it.
    """
    if profile is None and (gpus or site):
        raise typer.BadParameter("--gpus and the profile's options need --profile")
    from sdwn.devices.tuning import tuning_table
    from sdwn.jobs.submit import require_fit
    from sdwn.models.families import require_usable

    settings = open_config(config, set_)
    require_usable(settings)
    if profile is None:
        from sdwn.preflight.trials import tune_device

        with console.working("measuring"):
            found = [tune_device(settings)]
    else:
        from sdwn.preflight.trials import tune_by_jobs

        chosen = open_profile(profile, site)
        require_fit(settings, chosen)
        kinds = [kind.strip() for kind in (gpus or "").split(",") if kind.strip()]
        with short_jobs("measuring", SAME_COMMAND) as callbacks:
            found = tune_by_jobs(settings, chosen, kinds, callbacks)
    shown: list[str | Table] = []
    for one in found:
        work, tuning, rows = one.workload, one.tuning, tuning_table(one.tuning)
        probes = Table(*rows[0], box=None)
        for row in rows:
            probes.add_row(*("" if value is None else str(value) for value in row.values()))
        slicing = ", decoded one by one" if one.vae_slicing else ""
        shown += [
            f"{work.device}, {work.memory_gb} GB: {work.model}, {work.width}x{work.height}\n",
            probes,
            f"batch size {tuning.batch_size}{slicing}: every later task of this kind takes it\n"
            f"profile  {one.path}\ncurve    {one.curve}\n",
        ]
    console.result({"profiles": [one.as_dict() for one in found]}, as_json, *shown)


@with_site
def pilot_command(
    run: Run, site: dict[str, str], profile: Profile = "local", as_json: AsJson = False
) -> None:
    """Make 20 images, and predict what the run takes.

    On the real target, by a short job under the profile.
    """
    from sdwn.jobs.submit import require_fit
    from sdwn.models.families import require_usable
    from sdwn.preflight.trials import run_pilot

    paths, plan = open_run(run)
    chosen = open_profile(profile, site)
    require_fit(plan.config, chosen)
    require_usable(plan.config)
    with short_jobs("making the pilot's images", SAME_COMMAND) as callbacks:
        found = run_pilot(paths, plan, chosen, callbacks)
    speed = f"{found.images_per_second:.3g} images/s with {found.batch_size} a batch"
    black = f"{found.nsfw} flagged, {found.nan} NaN, {found.redone} retried in fp32"
    rows = {
        "device": f"{found.device}, {found.memory_gb} GB",
        "speed": f"{speed} ({found.batch_source}); loading takes {duration(found.loading_seconds)}",
        "peak memory": f"{found.peak_gb:.2f} GB",
        "images": f"{found.images}: {black}, {found.truncated} prompts cut short",
        "size": f"{decimal(found.bytes_per_image)} an image",
        "contact sheet": found.contact_sheet,
        "the run": f"{found.run_images:,} images, {decimal(found.run_bytes)}, "
        f"{found.run_tasks:,} tasks of {duration(3600 * found.hours_per_task)}",
        "device time": duration(3600 * found.device_hours),
        "wall time": f"{duration(3600 * found.hours)}, if all tasks that may run at once do",
        "warning": found.warning,
    }
    console.result(asdict(found), as_json, console.rows(rows))


@with_site
def doctor_command(
    run: Run,
    site: dict[str, str],
    profile: Profile = "local",
    probe: Annotated[bool, Option("--probe", help="Check a node too, by a short job.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find what would stop a run or slow it.

    Checks profile, site, disk, weights and classifier; with --probe also a compute node.
    """
    from sdwn.preflight.doctor import check_run
    from sdwn.preflight.findings import problems
    from sdwn.preflight.trials import probe_run

    paths, plan = open_run(run)
    chosen = open_profile(profile, site)
    with console.working("looking"):
        found = check_run(paths, plan, chosen)
    if probe:
        with short_jobs("checking a compute node") as callbacks:
            found = probe_run(paths, plan, chosen, found, callbacks)
    lines = [
        f"[{COLOURS[one.verdict]}]{one.verdict.ljust(10)}[/]  "
        f"[bold]{one.subject.ljust(10)}[/bold]  {console.escape(one.text)}"
        for one in found
    ]
    values = {"ok": not problems(found), "findings": [asdict(finding) for finding in found]}
    console.result(values, as_json, Text.from_markup("\n".join(lines), emoji=False))
    if not values["ok"]:
        raise typer.Exit(1)
