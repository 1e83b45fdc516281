"""What a person sees: results on stdout; progress, messages and errors on stderr."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import markup
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdwn.errors import SdwnError

# Set by --debug: errors come with their traceback.
debug = False

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

INTERRUPTED = 130
REPORT_SECONDS = 60


# File names, records and logs may hold what steers a terminal: its title, its clipboard, its past.
STEERING = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
# But for colours, which our own text has.
BUT_COLOURS = r"(?!\x1b\[[0-9;]*m)" + STEERING


def plain(text: str, steering: str = STEERING) -> str:
    r"""Return a text with what steers a terminal written out.

    >>> print(plain("a name\x1b]0;title\x07"))
    a name\x1b]0;title\x07
    """
    return re.sub(steering, lambda found: ascii(found[0])[1:-1], text)


def escape(text: str) -> str:
    """Return a text as rich prints it to the letter."""
    return markup.escape(plain(text))


def say(message: str) -> None:
    """Tell the user something."""
    stderr.print(escape(message), soft_wrap=True)


def say_values(values: dict[str, Any]) -> None:
    """Tell the user names and values, a line each."""
    stderr.print(_lines(values), soft_wrap=True)


def result(values: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """Print a command's result: one JSON object, or text for a person."""
    if as_json:
        escaped = (sys.stdout.encoding or "utf-8").lower() != "utf-8"
        sys.stdout.write(json.dumps(values, ensure_ascii=escaped) + "\n")
    elif text is not None:
        sys.stdout.write(plain(text, BUT_COLOURS))
    else:
        print_values(values)


def print_values(values: dict[str, Any]) -> None:
    """Print names and values, a line each."""
    stdout.print(_lines(values), soft_wrap=True)


def _lines(values: dict[str, Any]) -> str:
    width = max(len(key) for key in values)
    return "\n".join(
        f"[bold]{escape(key.replace('_', ' ').ljust(width))}[/bold]  {escape(_readable(value))}"
        for key, value in values.items()
    )


def values_text(values: dict[str, Any]) -> str:
    """Give names and values as they are printed."""
    with stdout.capture() as captured:
        print_values(values)
    return captured.get()


def _readable(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{_readable(number)} {name}" for name, number in value.items()) or "none"
    if isinstance(value, list):
        return "\n  ".join(map(str, value)) or "none"
    return _readable_scalar(value)


def _readable_scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def live() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show values that change, in place."""
    from rich.live import Live

    with Live(console=stderr, transient=True) as view:
        yield lambda values: view.update(_lines(values), refresh=True)


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

    Counting begins at ``start``; the function that is given advances it.
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
        said = began = time.monotonic()

        def advance(number: int) -> None:
            nonlocal said
            bar.advance(task, number)
            done, now = int(bar.tasks[0].completed), time.monotonic()
            count = _count(done, total, unit)
            # Work that was there already has no speed.
            rate = (done - start) / (now - began) if now - began > 1 else 0
            if rate and unit != "bytes":
                count += f", {rate:,.1f}/s"
            bar.update(task, count=count)
            if bar.disable and now - said >= REPORT_SECONDS:
                say(f"{what}: {count}")
                said = now

        advance(0)
        yield advance


def _count(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{decimal(done)}/{decimal(total)}"
    return f"{done:,}/{total:,} {unit}"


def guarded(command: Callable[[], None]) -> int:
    """Run a command; turn its error into one message and an exit code."""
    try:
        command()
    except SdwnError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except SystemExit as ended:
        # typer turns an interruption into an exit, without a word.
        if ended.code == INTERRUPTED:
            return _fail("interrupted", INTERRUPTED)
        raise
    except OSError as error:
        return _fail(str(error), 1)
    except UnicodeEncodeError as error:
        name = f"{error.object:.200}".strip()
        return _fail(f"{name!r}: a name that is no UTF-8; rename the file or folder", 1)
    return 0


def _fail(message: str, code: int) -> int:
    if debug:
        stderr.print_exception()
    stderr.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    return code
