"""The terminal: results on stdout; progress, messages and errors on stderr."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import markup
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

stderr = Console(stderr=True, highlight=False, emoji=False)
stdout = Console(highlight=False, emoji=False)

# In a log, where a bar cannot move, progress is a line so often.
REPORT_SECONDS = 60

# File names, records and logs may hold what steers a terminal: its title, its clipboard, its past.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def without_controls(text: str) -> str:
    r"""Return a text with control characters written as escapes.

    >>> print(without_controls("a name\x1b]0;title\x07"))
    a name\x1b]0;title\x07
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def escape(text: str) -> str:
    """Return a text as rich prints it to the letter."""
    return markup.escape(without_controls(text))


def say(message: str) -> None:
    """Print a message for the user on stderr."""
    stderr.print(escape(message), soft_wrap=True)


def fail(message: str, code: int, traceback: bool) -> int:
    """Print an error, with its traceback if wanted, and return the exit code."""
    if traceback:
        stderr.print_exception()
    stderr.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    return code


def result(values: dict[str, Any], as_json: bool, *shown: str | RenderableType) -> None:
    """Print a command's result.

    Args:
        values: what ``--json`` prints as one object.
        as_json: print that, and nothing else.
        shown: texts, tables, :func:`rows`: what a person reads instead; default: the values.
    """
    if as_json:
        escaped = (sys.stdout.encoding or "utf-8").lower() != "utf-8"
        sys.stdout.write(json.dumps(values, ensure_ascii=escaped) + "\n")
        return
    for part in shown or (rows(values),):
        if isinstance(part, str):
            # A script, a log: to the letter, lines as long as they are.
            sys.stdout.write(without_controls(part))
        else:
            stdout.print(part, soft_wrap=True)


def rows(values: dict[str, Any]) -> Text:
    """Return names and values, a line each; None has no line.

    Numbers have thousands separators; ``bytes`` are a size.
    """
    shown = {name: value for name, value in values.items() if value is not None}
    width = max(map(len, shown), default=0)
    lines = []
    for name, value in shown.items():
        size = isinstance(value, int) and (name == "bytes" or name.endswith("_bytes"))
        text = decimal(value) if size else _readable(value)
        lines.append(f"[bold]{escape(name.replace('_', ' ').ljust(width))}[/bold]  {escape(text)}")
    return Text.from_markup("\n".join(lines), emoji=False)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        # Counts by name, or what each name has, as the job of a stage.
        pairs = (
            f"{name}: {one}" if isinstance(one, str) else f"{_readable(one)} {name}"
            for name, one in value.items()
        )
        return ", ".join(pairs) or "none"
    if isinstance(value, list):
        return "\n  ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say_rows(values: dict[str, Any]) -> None:
    """Print names and values on stderr, a line each."""
    stderr.print(rows(values), soft_wrap=True)


@contextmanager
def live() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show values that change, in place."""
    from rich.live import Live

    with Live(console=stderr, transient=True) as view:
        yield lambda values: view.update(rows(values), refresh=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is going on."""
    if stderr.is_terminal:
        with stderr.status(what):
            yield
    else:
        yield


@contextmanager
def progress(what: str, total: int, unit: str, start: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left on a terminal; in a log, a line a minute.

    Yields:
        The function that counts on, from ``start``.
    """
    bar = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total, completed=start, count="")
        reported = began = time.monotonic()

        def advance(number: int) -> None:
            nonlocal reported
            bar.advance(task, number)
            done, now = int(bar.tasks[0].completed), time.monotonic()
            # Work that was there already has no speed.
            rate = (done - start) / (now - began) if now - began > 1 else 0
            if unit == "bytes":
                count = f"{decimal(done)}/{decimal(total)}"
            else:
                count = f"{done:,}/{total:,} {unit}" + (f", {rate:,.1f}/s" if rate else "")
            bar.update(task, count=count)
            if bar.disable and now - reported >= REPORT_SECONDS:
                say(f"{what}: {count}")
                reported = now

        advance(0)
        yield advance
