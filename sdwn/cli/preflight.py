"""The commands before a run: plan, extend, sweep, prefetch, tune, pilot, doctor, selftest."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from sdwn.cli import console, options
from sdwn.cli.console import Result
from sdwn.cli.run import look_at_cells
from sdwn.errors import SdwnError, UsageError, command, counted, duration
from sdwn.io import uncollected, write_text
from sdwn.paths import RunPaths, shipped_file

if TYPE_CHECKING:
    from sdwn.jobs.profile import ClusterProfile
    from sdwn.planning.plan import Plan
    from sdwn.preflight.trials import TrialCallbacks

# Of the doctor's findings, and of what a self-test says of a check.
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "unverified": "cyan"}
COLOURS |= {"failed": "red", "not proven": "cyan"}


def _findings(found: Iterable[tuple[str, str, str]]) -> Table:
    lines = ((Text(how, COLOURS[how]), Text(what, "bold"), text) for how, what, text in found)
    return console.columns(lines)


@uncollected()
def plan_command(
    config: options.Config,
    run: options.Run,
    profile: options.MaybeProfile = None,
    set_: options.Override = None,
    slice_: Annotated[
        str | None, Option("--slice", metavar="N/M", help="Only this share of the shards, as 2/3.")
    ] = None,
) -> Result:
    """Write a run's plan, and estimate what it takes.

    Reads the config, its table of prompts, and WordNet if concepts are of it. A
    folder that holds the same plan is left as it is.
    """
    from sdwn.planning.plan import WHOLE, parse_slice
    from sdwn.workflow.plans import plan_run

    chosen = options.open_profile(profile, {}) if profile else None
    share = WHOLE if slice_ is None else parse_slice(slice_)
    plan, paths = plan_run(options.open_config(config, set_), run, console, share)
    return _planned(plan, paths, chosen, profile)


def extend_command(
    release: options.ReleaseFolder,
    run: options.Run,
    set_: options.Override = None,
    only: Annotated[Path | None, Option(help="Only what a list of ids or synsets names.")] = None,
) -> Result:
    """Plan a run of the images that a release lacks.

    Images that are there stay. --set asks for more of each synset, or for the
    synsets of a catalog; without it, what an incomplete release lacks is planned.
    Merging the run writes the larger release.
    """
    from sdwn.workflow.plans import plan_extension

    return _planned(*plan_extension(options.open_release(release), run, set_ or [], only, console))


def sweep_command(
    sweep: Annotated[str, Argument(metavar="SWEEP", help="A sweep's file, or a shipped one.")],
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The sweep's folder.")],
    set_: options.Override = None,
) -> Result:
    """Plan runs of one config that differ in some settings.

    Each is a cell, a run in a folder of its own. More values in the file add cells. Commands that
    take a run or its release take the sweep's folder too, and do all cells.
    """
    from sdwn.workflow.plans import plan_sweep

    found = plan_sweep(shipped_file("config", sweep), folder, tuple(set_ or ()), console)
    table, step, _ = look_at_cells(folder)
    values = {"cells": [cell.model_dump() for cell in found.cells]}
    return Result(values, table, next_=step)


def _planned(
    plan: Plan, paths: RunPaths, chosen: ClusterProfile | None = None, profile: str | None = None
) -> Result:
    """Return what a plan holds and takes, and the next command."""
    from sdwn.models.families import prompt_lengths
    from sdwn.models.weights import find_folder
    from sdwn.planning.plan import plan_summary, sample_prompts
    from sdwn.planning.tables import SCHEMA
    from sdwn.preflight.estimate import estimate, estimate_rows
    from sdwn.workflow.status import next_command, run_status

    counts = {**plan_summary(plan), "run": str(paths.root)}
    takes = estimate(paths, plan, [shard.index for shard in plan.assigned_shards], chosen)

    def rows() -> dict[str, Any]:
        prompts, before, table = plan.prompts, plan.extends, plan.table
        lengths = prompt_lengths(find_folder(plan.config), plan.config, prompts)  # takes a second
        classes = f"{counts['imagenet_classes']:,}"
        if counts["imagenet_names"] != counts["imagenet_classes"]:
            classes += f" ({counts['imagenet_names']:,} different names)"
        each, wnids = table["images"].unique().to_pylist(), table["wnid"].drop_null()
        number = f"{min(each):,}" if len(each) == 1 else f"{min(each):,} to {max(each):,}"
        known = ""
        if plan.unit == "concept" and len(wnids):
            known = f"; {len(wnids):,} with a synset ({len(wnids.unique()):,} different)"
        several = f"{len(prompts):,} different" if len(prompts) != len(plan.concepts) else None
        own = [f"{one.name} ({one.type})" for one in table.schema if one.name not in SCHEMA.names]
        return {
            "catalog": plan.catalog,
            "extends": before and f"{before.release}, whose {before.images:,} images stay",
            f"{plan.unit}s": f"{len(plan.concepts):,}" + known,
            "own columns": ", ".join(own) or None,
            "images": f"{plan.images:,}, {number} a {plan.unit}",
            "ImageNet classes": f"{classes}, {counted(counts['imagenet_images'], 'image')}",
            "shards": f"{len(plan.shards):,} of {counts['images_per_shard']:,} images",
            "slice": counts.get("slice"),
            "digest": plan.digest[:12],
            "prompts": several,
            "sample prompts": sample_prompts(plan),
            "cut prompts": [str(one) for one in lengths] or None,
            **estimate_rows(takes),
        }

    step = next_command(paths, plan, run_status(paths, plan), profile)
    return Result({**counts, "estimate": takes.as_dict()}, rows, next_=step)


def prefetch_command(
    target: Annotated[
        str, Argument(metavar="CONFIG|RUN", help="A config, or the folder of a planned run.")
    ],
    folder: Annotated[Path | None, Option(help="Where tasks find weights; default: cache.")] = None,
    classifier: Annotated[bool, Option(help="Get the classifier too.")] = True,
    features: Annotated[
        str | None, Option(metavar="MODEL", help="Get this encoder of sdwn features too.")
    ] = None,
    set_: options.Override = None,
) -> Result:
    """Download weights, classifier and WordNet where the network is.

    A planned run is locked to the weights' commit. Afterwards no network is needed.
    """
    from sdwn.models.families import prompt_lengths
    from sdwn.preflight.prefetch import prefetch
    from sdwn.workflow.status import next_command, run_status

    paths, folder, cut = RunPaths(Path(target)), folder and folder.absolute(), list[str]()
    if paths.plan.exists():
        if set_:
            raise UsageError(f"--set changes a config, and {target} is planned already")
        _, plan = options.open_run(paths.root)
        found = prefetch(plan.config, folder, classifier, paths)
        there = found["folder"] and Path(found["folder"])
        cut = [str(one) for one in prompt_lengths(there, plan.config, plan.prompts)]
        step = next_command(paths, plan, run_status(paths, plan))
    else:
        found = prefetch(options.open_config(target, set_), folder, classifier)
        other = ["--set", f"model.name={folder}"] * (folder is not None)
        step = command("plan", target, "RUN", *other)
    if features:
        from sdwn.prediction.pretrained import encoder_file

        try:
            found["encoder"] = str(encoder_file(features, download=True))
        except SdwnError as error:
            found["problems"].append(str(error))
    problems = found["problems"] or None
    rows = {**found, "cut prompts": cut or None, "problems": problems}
    return Result(found, rows, next_=None if problems else step, failed=bool(problems))


@contextmanager
def _short_jobs(what: str) -> Iterator[TrialCallbacks]:
    """Show short jobs at work; on Ctrl-C say how to end them and to come back to them."""
    from sdwn.preflight.trials import TrialCallbacks
    from sdwn.workflow.submitting import leaving_advice, watch_jobs

    folders: list[Path] = []
    try:
        with console.progress(what) as bar:
            yield TrialCallbacks(folders.append, watch_jobs(bar, console.say), bar.note)
    except KeyboardInterrupt:
        for folder in folders:
            if live := leaving_advice(RunPaths(folder)):
                console.say(f"{live}; resume with the same command")
        raise


def tune_command(
    config: options.Config,
    site: dict[str, str],
    profile: options.MaybeProfile = None,
    gpus: Annotated[
        str | None, Option(metavar="KINDS", help="Kinds of GPU, as v100,a100: a job each.")
    ] = None,
    set_: options.Override = None,
) -> Result:
    """Measure the best batch size of a GPU.

    Every later task on this kind of GPU uses it.
    """
    if profile is None and (gpus or site):
        raise typer.BadParameter("--gpus and the profile's options need --profile")
    from sdwn.devices.tuning import tuning_table
    from sdwn.models.families import require_usable
    from sdwn.preflight.trials import tune_by_jobs, tune_device

    settings = options.open_config(config, set_)
    require_usable(settings)
    if profile is None:
        with console.progress("measuring") as bar:
            found = [tune_device(settings, bar.note)]
    else:
        chosen = options.open_profile(profile, site, settings)
        kinds = [kind.strip() for kind in (gpus or "").split(",") if kind.strip()]
        with _short_jobs("measuring") as callbacks:
            found = tune_by_jobs(settings, chosen, kinds, callbacks)
    shown: list[Any] = []
    for one in found:
        work, tuning, rows = one.workload, one.tuning, tuning_table(one.tuning)
        probes = Table(*rows[0], box=None)
        for row in rows:
            probes.add_row(*("" if value is None else str(value) for value in row.values()))
        slicing = ", decoded one by one" if one.vae_slicing else ""
        shown += [
            f"{work.device}, {work.memory_gb} GB: {work.model}, {work.width}x{work.height}",
            probes,
            f"batch size {tuning.batch_size}{slicing}: every later task of this kind takes it",
            {"profile": str(one.path), "curve": str(one.curve)},
        ]
    values = {"profiles": [one.as_dict() for one in found]}
    return Result(values, *shown, next_=command("plan", config, "RUN"))


def pilot_command(
    run: options.Run, site: dict[str, str], profile: options.Profile = "local"
) -> Result:
    """Make 20 images, and predict what the run takes.

    A short job under the profile makes them; they are images of the run. With
    speed options, it also makes them without, and compares.
    """
    from sdwn.preflight.trials import run_pilot
    from sdwn.workflow.status import next_command, run_status

    paths, plan = options.open_run(run)
    chosen = options.open_profile(profile, site, plan.config)
    with _short_jobs("making the pilot's images") as callbacks:
        found = run_pilot(paths, plan, chosen, callbacks)
    speed = f"{found['images_per_second']:.3g} images/s with {found['batch_size']} a batch"
    loading = f"loading takes {duration(found['loading_seconds'])}"
    made = f"{found['images']} of {counted(found['synsets'], plan.unit)}"
    price = None
    if "difference_rms" in found:
        price = f"{found['plain_images_per_second']:.3g} images/s; pixels differ by "
        price += f"{found['difference_rms']:.2g} RMS at most, by {found['difference_largest']} in "
        price += "one place (of 255)"
    black = f"{found['nsfw']} flagged, {found['nan']} NaN, {found['redone']} retried in fp32"
    rows = {
        "device": f"{found['device']}, {found['memory_gb']} GB",
        "speed": f"{speed} ({found['batch_source']}); {loading}",
        "without options": price,
        "peak memory": f"{found['peak_gb']:.2f} GB",
        "images": f"{made}: {black}, {found['truncated']} prompts cut short",
        "size": f"{decimal(found['bytes_per_image'])} an image",
        "contact sheet": found["contact_sheet"],
        "the run": f"{found['run_images']:,} images, {decimal(found['run_bytes'])}, "
        f"{counted(found['run_tasks'], 'task')} of {duration(3600 * found['hours_per_task'])}",
        "device time": duration(3600 * found["device_hours"]),
        "wall time": f"{duration(3600 * found['hours'])}, if all tasks that may run at once do",
        "warning": found["warning"],
    }
    return Result(found, rows, next_=next_command(paths, plan, run_status(paths, plan), profile))


def doctor_command(
    run: options.Run,
    site: dict[str, str],
    profile: options.Profile = "local",
    probe: Annotated[bool, Option("--probe", help="Check a node too, by a short job.")] = False,
) -> Result:
    """Find what would stop a run or slow it.

    Checks profile, site, disk, weights and classifier; with --probe also a compute node.
    """
    from sdwn.preflight.doctor import check_run, problems
    from sdwn.preflight.trials import check_node_by_job
    from sdwn.workflow.status import next_command, run_status

    paths, plan = options.open_run(run)
    chosen = options.open_profile(profile, site)
    with console.progress("checking"):
        found = check_run(paths, plan, chosen)
    if probe:
        with _short_jobs("checking a compute node") as callbacks:
            found = check_node_by_job(paths, chosen, found, callbacks)
    table = _findings((one.verdict, one.subject, one.text) for one in found)
    stopped = bool(problems(found))
    values = {"ok": not stopped, "findings": [asdict(finding) for finding in found]}
    step = None if stopped else next_command(paths, plan, run_status(paths, plan), profile)
    return Result(values, table, next_=step, failed=stopped)


def selftest_command(
    site: dict[str, str],
    profile: options.MaybeProfile = None,
    model: Annotated[
        str | None, Option(help="A hub name or folder; default: Stable Diffusion 1.4.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Fewer steps, no speed options.")] = False,
    out: Annotated[Path, Option(metavar="FOLDER", help="The folder for selftest.json.")] = Path(
        "selftest"
    ),
    page: Annotated[
        Path | None, Option(metavar="FILE", help="Also write a page; CARD becomes the GPU's name.")
    ] = None,
) -> Result:
    """Check and measure a machine: images, memory, tasks, speed.

    Each line shows what was found and what was expected. Without Stable
    Diffusion 1.4's weights (sdwn prefetch paper) they are random: speed and
    memory are the same. Without a GPU, small models are used, and what needs a
    GPU is "not proven". Exits with 1 if a check failed.
    """
    if profile is None and site:
        raise typer.BadParameter("the profile's options need --profile")
    from sdwn.preflight.selftest import card_name, self_test, self_test_by_job, self_test_page

    folder = out.absolute()
    # The checks bring about what it warns of.
    logging.getLogger("sdwn").setLevel(logging.ERROR)
    if profile is None:
        with console.progress("testing") as bar:
            found = self_test(folder, model, quick, bar.note)
    else:
        chosen = options.open_profile(profile, site)
        with _short_jobs("testing") as callbacks:
            found = self_test_by_job(model, quick, chosen, callbacks)
        write_text(folder / "selftest.json", json.dumps(found, indent=2) + "\n")
    if page is not None:
        page = page.with_name(page.name.replace("CARD", card_name(found)))
        write_text(page, self_test_page(found))
    rows = []
    for one in found["checks"]:
        expected = f" (expected: {one['expected']})" if one["expected"] else ""
        rows.append((one["outcome"], one["check"], one["found"] + expected))
    weights = "random weights" if found["random_weights"] else "its own weights"
    outcomes = [outcome for outcome, *_ in rows]
    counts = (f"{outcomes.count(how)} {how}" for how in ("ok", "failed", "not proven"))
    what = f"{', '.join(counts)}; {found['device']}, {found['model']} with {weights}"
    written = {"record": out / "selftest.json", "page": page}
    return Result(found, what, _findings(rows), written, failed=not found["ok"])
