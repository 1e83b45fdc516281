"""Results as a person reads them, in the place of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sdwn.cli.terminal import print_values, stdout, values_text

if TYPE_CHECKING:
    from sdwn.devices.profiles import GpuProfile
    from sdwn.preflight.estimate import Cost, Estimate
    from sdwn.preflight.findings import Finding
    from sdwn.preflight.short_jobs import Answers
    from sdwn.workflow.status import RunStatus

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "unverified": "cyan"}
# Of an image; what nobody judged has none.
SIGNS = {"right": "right", "wrong": "wrong", "black": "black"}


def plan_text(counts: dict[str, Any], found: Estimate) -> str:
    """Show a plan's counts and what making it takes."""
    return values_text({**counts, **estimate_rows(found)})


def estimate_rows(found: Estimate) -> dict[str, str]:
    """Lay an estimate out: a row for each device, and what each figure rests on."""
    rows = {
        "to make": f"{_number(found.images, 'image')}, {_tasks(found)}",
        "to store": f"{decimal(found.bytes)} ({found.bytes_source})",
        **{f"on {cost.speed.device}": _cost_text(cost) for cost in found.costs},
    }
    if found.unknown:
        rows["time"] = f"unknown: {found.unknown}"
    return rows | {
        f"warning, {cost.speed.device}": cost.warning for cost in found.costs if cost.warning
    }


def arrays_line(arrays: Sequence[tuple[Sequence[object], int]], tasks: int) -> str:
    """Return how tasks are cut into arrays, of which the script is the first one's.

    >>> arrays_line([("abc", 2), ("de", 1)], 7)
    '2 arrays (the script is of the first): 3 tasks, 2 at once; 2 tasks, 1 at once; 2 tasks later'
    """
    each = [f"{_number(len(part), 'task')}, {at_once} at once" for part, at_once in arrays]
    later = tasks - sum(len(part) for part, _ in arrays)
    each += [f"{_number(later, 'task')} later"] * bool(later)
    return f"{_number(len(arrays), 'array')} (the script is of the first): {'; '.join(each)}"


def submitting_lines(found: Estimate) -> list[str]:
    """Tell in a line what is being submitted, and what to beware of in others."""
    takes = "; ".join(
        f"about {_clock(3600 * cost.hours_per_task)} each, {_device_hours(cost)} "
        f"({cost.speed.speed_source})"
        for cost in found.costs
    )
    takes = takes or f"time unknown: {found.unknown}"
    warnings = [f"warning: {cost.warning}" for cost in found.costs if cost.warning]
    return [f"submitting {_tasks(found)}, {decimal(found.bytes)}: {takes}", *warnings]


def _tasks(found: Estimate) -> str:
    gpus = f", {found.devices_per_task} GPUs each" if found.devices_per_task > 1 else ""
    return f"{_number(found.tasks, 'task')} for {_number(found.shards, 'shard')}{gpus}"


def _cost_text(cost: Cost) -> str:
    speed = cost.speed
    # One at a time, it is the device time once more.
    several = cost.hours < 0.999 * cost.device_hours
    wall = f", {_clock(3600 * cost.hours)} in all" if several else ""
    return (
        f"{_clock(3600 * cost.hours_per_task)} a task, {_device_hours(cost)}{wall}; "
        f"{speed.images_per_second:.3g} images/s ({speed.speed_source}), "
        f"loading {_clock(speed.loading_seconds)} ({speed.loading_source})"
    )


def _device_hours(cost: Cost) -> str:
    return f"{cost.device_hours:.3g} {'device' if cost.speed.device == 'cpu' else 'GPU'}-hours"


def status_rows(found: RunStatus) -> dict[str, Any]:
    """Lay a run's status out for a person."""
    gpus = [
        f"{_number(one.processes, 'process', 'es')} on {name}: {one.images_per_second:.3g} images/s"
        + (f", the last ends in {_clock(one.seconds_left)}" if one.seconds_left else "")
        for name, one in found.gpus.items()
    ]
    then = [f"{stage}: {state}" for stage, state in found.then.items()]
    rows = {**found.as_dict(), "gpus": gpus, "then": then}
    left = rows.pop("seconds_left")
    # A terminal of 24 lines shows all of it.
    rows = {name: value for name, value in rows.items() if value not in ([], {})}
    if found.shards_running:
        rows["time_left"] = "not known yet" if left is None else _clock(left)
    return rows


def tuning_text(profile: GpuProfile) -> str:
    """Show a measured GPU profile: a table of what was tried, and where it is kept."""
    from sdwn.devices.tuning import table

    rows = table(profile.tuning)
    shown = Table(*rows[0], box=None)
    for row in rows:
        shown.add_row(*("" if value is None else str(value) for value in row.values()))
    work = profile.workload
    title = f"{work.device}, {work.memory_gb} GB: {work.model}, {work.width}x{work.height}"
    slicing = ", decoded one by one" if profile.vae_slicing else ""
    lines = [
        f"batch size {profile.tuning.batch_size}{slicing}: every later task of this kind takes it",
        f"profile  {profile.path}",
        f"curve    {profile.curve}",
    ]
    with stdout.capture() as captured:
        stdout.print(title, shown, *lines, sep="\n", soft_wrap=True, markup=False)
    return captured.get()


def pilot_text(found: Answers) -> str:
    """Show a pilot's answers: what it saw, then what follows for the run."""
    slow = f"{found.images_per_second:.3g} images/s with {found.batch_size} a batch"
    black = f"{found.nsfw} flagged, {found.nan} NaN, {found.redone} redone in float32"
    values = {
        "device": f"{found.device}, {found.memory_gb} GB",
        "speed": f"{slow} ({found.batch_source}); loading takes {_clock(found.loading_seconds)}",
        "peak memory": f"{found.peak_gb:.2f} GB",
        "images": f"{found.images}: {black}, {found.truncated} prompts cut short",
        "size": f"{decimal(found.bytes_per_image)} an image",
        "contact sheet": found.contact_sheet,
        "the run": f"{found.run_images:,} images, {decimal(found.run_bytes)}, "
        f"{found.run_tasks:,} tasks of {_clock(3600 * found.hours_per_task)}",
        "device time": _clock(3600 * found.device_hours),
        "wall time": f"{_clock(3600 * found.hours)}, if all tasks that may run at once do",
    }
    if found.warning:
        values["warning"] = found.warning
    return values_text(values)


def findings_text(findings: Sequence[Finding]) -> str:
    """Show what was found, a line each."""
    with stdout.capture() as captured:
        for found in findings:
            verdict = f"[{COLOURS[found.verdict]}]{found.verdict.ljust(10)}[/]"
            text = f"{verdict}  [bold]{found.subject.ljust(10)}[/bold]  {escape(found.text)}"
            stdout.print(text, soft_wrap=True)
    return captured.get()


def evaluation_text(found: dict[str, Any]) -> str:
    """Show an evaluation's main figures with their units."""
    from sdwn.evaluation.metrics import metrics_shown

    return values_text(
        {
            "images classified": found["images_judged"],
            "of classes": f"{found['images']:,} images of {found['classes']:,} ImageNet-1k classes",
            **{metric.label: metric.text(found) for metric in metrics_shown("terminal")},
            "evaluation": found["evaluation"],
            "path": found["path"],
        }
    )


def comparison_text(found: dict[str, Any]) -> str:
    """Show what follows of a comparison, and the main figures of each side."""
    from sdwn.evaluation.metrics import metrics_shown

    rows = {
        side["name"]: ", ".join(
            f"{metric.label} {metric.text(side)}" for metric in metrics_shown("compared")
        )
        for side in found["sides"]
    }
    common = {"classes in common": found["classes_in_common"]}
    settings = {row["setting"]: ", ".join(map(str, row["values"])) for row in found["settings"]}
    said = {f"verdict {n}": pair["verdict"] for n, pair in enumerate(found["pairs"], start=1)}
    return values_text({**rows, **common, **settings, **said, "path": found["path"]})


def sheet_text(found: dict[str, Any]) -> str:
    """Show a synset: what is known of it, then a row an image."""
    rows = {
        found["synset"]: found["wnid"],
        "lemmas": ", ".join(found["lemmas"]) or "unknown",
        "definition": found["definition"] or "unknown",
        "prompt": found["prompt"] or "unknown, or one for each image",
        "above": " > ".join(found["above"]) or "unknown",
        "images": _number(found["images"], "image") + f", {found['black']} of them black",
        "right": _share_right(found),
        "again": found["regenerate"] or "imported: how they were made is not recorded",
    }
    if "path" in found:
        rows["sheet"] = found["path"]
    shown = Table("image", "seed", "status", "taken for", "", "", box=None)
    for shot in found["shots"]:
        shown.add_row(*map(Text, _shot_cells(shot)))
    with stdout.capture() as captured:
        print_values({printable(name): printable(value) for name, value in rows.items()})
        stdout.print("", shown, sep="\n", soft_wrap=True)
    return captured.get()


def _share_right(found: dict[str, Any]) -> str:
    if found["evaluation"] is None:
        return "not evaluated yet"
    by = f"by {found['model']}"
    if found["evaluation"] != found["model"]:
        by += f" ({found['evaluation']})"
    return f"{found['right']} of {found['judged']}, {by}" if found["judged"] else f"no class, {by}"


def _shot_cells(shot: dict[str, Any]) -> list[str]:
    best = (shot["top5"] or [None])[0]
    seen = [printable(best["name"]), f"{100 * best['probability']:.0f} %"] if best else ["", ""]
    seed = "" if shot["seed"] is None else str(shot["seed"])
    said, share = SIGNS.get(shot["state"], ""), shot["subtree_probability"]
    if shot["state"] == "other" and share is not None:
        said = f"{100 * share:.0f} % at or below it"
    return [str(shot["number"]), seed, shot["status"], *seen, said]


def printable(text: str) -> str:
    r"""Take out of a text what a terminal would obey or not show.

    >>> printable("a\x1b[2Jb\nc\u202e")
    'a [2Jb c '
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _number(count: int, what: str, plural: str = "s") -> str:
    return f"{count:,} {what}{'' if count == 1 else plural}"


def _clock(seconds: float) -> str:
    """Give a time as people read it.

    >>> [_clock(seconds) for seconds in (4.2, 90, 5400, 900_000)]
    ['4 s', '1:30 min', '1:30 h', '250:00 h']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds) if seconds < 3600 else round(seconds / 60)
    return f"{whole // 60}:{whole % 60:02d} {'min' if seconds < 3600 else 'h'}"
