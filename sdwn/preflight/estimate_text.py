"""An estimate as text: rows for a plan, a line for what is being submitted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal

from sdwn.errors import counted, duration
from sdwn.preflight.estimate import Cost, Estimate


def estimate_rows(found: Estimate) -> dict[str, str]:
    """Return a row for each device, with what each figure rests on."""
    rows = {
        "to make": f"{counted(found.images, 'image')}, {_tasks(found)}",
        "to store": f"{decimal(found.bytes)} ({found.bytes_source})",
    }
    for cost in found.costs:
        speed = cost.speed
        # Where tasks run one at a time, this is the device time once more.
        several = cost.hours < 0.999 * cost.device_hours
        rows[f"on {speed.device}"] = (
            f"{duration(3600 * cost.hours_per_task)} a task, {_device_hours(cost)}"
            + (f", {duration(3600 * cost.hours)} in all" if several else "")
            + f"; {speed.images_per_second:.3g} images/s ({speed.speed_source}), "
            f"loading {duration(speed.loading_seconds)} ({speed.loading_source})"
        )
    if found.unknown:
        rows["time"] = f"not known yet: {found.unknown}"
    for cost in found.costs:
        if cost.warning:
            rows[f"warning, {cost.speed.device}"] = cost.warning
    return rows


def submitting_lines(found: Estimate) -> list[str]:
    """Return a line on what is being submitted, then the warnings."""
    takes = "; ".join(
        f"about {duration(3600 * cost.hours_per_task)} each, {_device_hours(cost)} "
        f"({cost.speed.speed_source})"
        for cost in found.costs
    )
    takes = takes or f"time not known yet: {found.unknown}"
    warnings = [f"warning: {cost.warning}" for cost in found.costs if cost.warning]
    return [f"submitting {_tasks(found)}, {decimal(found.bytes)}: {takes}", *warnings]


def arrays_line(arrays: Sequence[tuple[Sequence[object], int]], tasks: int) -> str:
    """Return a line on how tasks are cut into arrays, of which the script is the first one's.

    Args:
        arrays: each array's tasks, and how many of them run at once.
        tasks: how many there are, those that come later included.

    >>> arrays_line([("abc", 2), ("de", 1)], 7)
    '2 arrays (the script is of the first): 3 tasks, 2 at once; 2 tasks, 1 at once; 2 tasks later'
    """
    each = [f"{counted(len(part), 'task')}, {at_once:,} at once" for part, at_once in arrays]
    later = tasks - sum(len(part) for part, _ in arrays)
    each += [f"{counted(later, 'task')} later"] * bool(later)
    return f"{counted(len(arrays), 'array')} (the script is of the first): {'; '.join(each)}"


def _tasks(found: Estimate) -> str:
    gpus = f", {found.devices_per_task} GPUs each" if found.devices_per_task > 1 else ""
    return f"{counted(found.tasks, 'task')} for {counted(found.shards, 'shard')}{gpus}"


def _device_hours(cost: Cost) -> str:
    hours = cost.device_hours
    number = f"{hours:,.0f}" if hours >= 1000 else f"{hours:.3g}"
    number = number if hours >= 0.01 else "under 0.01"
    return f"{number} {'device' if cost.speed.device == 'cpu' else 'GPU'}-hours"
