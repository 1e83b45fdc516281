"""The terminal: results on stdout; progress, messages and errors on stderr."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live as Redrawn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sdwn.errors import duration, some

if TYPE_CHECKING:
    from sdwn.jobs.scheduler import Job, Live

stderr = Console(stderr=True, highlight=False, emoji=False)
stdout = Console(highlight=False, emoji=False)

REPORT_SECONDS = 60  # between lines of progress in a log, where a bar cannot move
LONGEST_LINE = 100_000  # in a pipe or a file

# Of what a person reads: a sentence, names with values, or a table.
Part = str | Mapping[str, Any] | RenderableType

# File names, records and logs may hold what steers a terminal: its title, its clipboard, its past.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def without_controls(text: str) -> str:
    """Return a text with control characters written as escapes."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def literal(text: str) -> Text:
    """Return a text without markup or control characters."""
    return Text(without_controls(text))


def say(message: str) -> None:
    """Print a message for the user on stderr."""
    stderr.print(literal(message), soft_wrap=True)


def fail(message: str, traceback: bool = False) -> None:
    """Print an error, with its traceback if wanted."""
    if traceback:
        stderr.print_exception()
    stderr.print(Text("error: ", "red") + literal(message), soft_wrap=True)


# --- Results -------------------------------------------------------------------------------------
class Result:
    """The result of a command.

    ``values`` are what ``--json`` prints, as one object and nothing else; ``shown`` is what a
    person reads instead, or functions that return it, and then the ``next_`` command. One that
    has ``failed`` exits with 1.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *shown: Part | Callable[[], Part],
        next_: str | None = None,
        failed: bool = False,
    ) -> None:
        self.values, self.shown, self.next, self.failed = values, shown, next_, failed

    def show(self) -> None:
        """Print what a person reads."""
        for one in self.shown:
            part = one() if callable(one) else one
            if not isinstance(part, Mapping):
                show(part)
            elif (table := columns(part.items())).row_count:
                show(table)

    def print(self, as_json: bool) -> None:
        """Print it as JSON, or for a person with the next command."""
        if as_json:
            escaped = (sys.stdout.encoding or "utf-8").lower() != "utf-8"
            sys.stdout.write(json.dumps(self.values, ensure_ascii=escaped) + "\n")
            return
        self.show()
        if self.next is not None:
            # One line, however long: a terminal that wraps it lets people copy it whole.
            stdout.print(Text("next: ", "bold") + literal(self.next), soft_wrap=True)


def show(part: str | RenderableType, console: Console | None = None) -> None:
    """Print a part of a result; what is a text, to the letter."""
    console = console or stdout
    if isinstance(part, str):
        console.file.write(without_controls(part) + "\n" * (not part.endswith("\n")))
    elif console.is_terminal:
        console.print(part)
    else:
        drawn = io.StringIO()
        Console(file=drawn, width=LONGEST_LINE, highlight=False, emoji=False).print(part)
        console.file.write("".join(f"{x.rstrip()}\n" for x in drawn.getvalue().splitlines()))


def columns(lines: Iterable[Sequence[Any]]) -> Table:
    """Return lines of cells as columns, the first bold; skip a line whose last cell is None."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for line in lines:
        if line[-1] is not None:
            cells = [cell if isinstance(cell, Text) else Text(_readable(cell)) for cell in line]
            if not isinstance(line[0], Text):
                cells[0].stylize("bold")
            table.add_row(*cells)
    for column in table.columns:
        column.overflow = "fold"
    return table


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_readable, value)) or "none"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return without_controls(str(value))


# --- Work under way ------------------------------------------------------------------------------
def progress_text(
    done: float, total: float, unit: str, per_second: float, seconds_left: float | None = None
) -> str:
    """Return how much of a work is done, its speed, and the time that is left.

    >>> progress_text(260, 400, "images", 3.6, 38.9)
    '260/400 images (65 %), 3.6 images/s, about 39 s left'
    """
    if unit == "bytes":
        count, speed = f"{decimal(int(done))}/{decimal(int(total))}", decimal(int(per_second))
    else:
        count, speed = f"{done:,}/{total:,} {unit}", f"{per_second:,.3g} {unit}"
        if per_second >= 1000:
            speed = f"{per_second:,.0f} {unit}"
    parts = [f"{count} ({int(100 * done / total)} %)" if total else count]
    parts += [f"{speed}/s"] * bool(per_second)
    if seconds_left:
        parts.append(f"about {duration(seconds_left)} left")
    return ", ".join(parts)


def job_names(ids: Sequence[str]) -> str:
    """Return how jobs are named: by their ids, an array's by its own, as in jobs 7, 9."""
    arrays = list(dict.fromkeys(one.partition("_")[0] for one in ids))
    return f"job{'s' * (len(arrays) > 1)} {some(arrays, 3)}"


class WorkBar:
    """A display of long work, its jobs and its time; in a log it is a line a minute."""

    def __init__(self, what: str, total: int | None, unit: str, start: int) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._start = self._done = start
        self._jobs: dict[Job, None] = {}
        self._live: Live = {}
        self._note = ""
        self._began = self._reported = time.monotonic()
        self._spinner = Spinner("dots")

    def advance(self, number: int) -> None:
        """Count on."""
        self._done += number
        self._report()

    def look(self, live: Live) -> None:
        """Show the jobs that wait or run now; those that were there before have ended."""
        new = not self._jobs and bool(live)
        self._jobs.update(dict.fromkeys(live))
        self._live = live
        self._report(new)

    def note(self, text: str) -> None:
        """Show what is tried just now, as a batch size."""
        self._note = text
        self._report()

    def _report(self, now: bool = False) -> None:
        if not stderr.is_terminal and (now or time.monotonic() - self._reported >= REPORT_SECONDS):
            self._reported = time.monotonic()
            say(f"{self._what}: {'; '.join(self._facts())}")

    def _facts(self) -> list[str]:
        facts, seconds = list[str](), time.monotonic() - self._began
        if self._total is not None:
            # Work that was there already has no speed.
            rate = (self._done - self._start) / seconds if seconds > 1 else 0.0
            left = (self._total - self._done) / rate if rate else None
            done = min(self._done, self._total)
            facts.append(progress_text(done, self._total, self._unit, rate, left))
        if self._jobs:
            from sdwn.jobs.scheduler import PENDING, UNKNOWN, reason_in_words

            counts = Counter[str]()
            for one in self._live.values():
                why = f"queued ({reason_in_words(one.reason)})" if one.reason else "queued"
                counts[{PENDING: why, UNKNOWN: "unknown"}.get(one.state, "running")] += 1
            counts["ended"] = len(self._jobs) - len(self._live)
            named = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
            facts.append(f"{job_names([job.id for job in self._jobs])}: {named}")
        return [*facts, *[self._note] * bool(self._note), f"{duration(seconds)} elapsed"]

    def __rich__(self) -> RenderableType:
        """Return what a terminal shows."""
        *facts, elapsed = self._facts()
        bar = ProgressBar(self._total, self._done, width=30) if self._total else self._spinner
        head = Table.grid(padding=(0, 2, 0, 0))
        head.add_row(self._what, bar, elapsed)
        return Group(head, *(literal(f"  {fact}") for fact in facts))


@contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "images", start: int = 0
) -> Iterator[WorkBar]:
    """Show work under way, and how much of ``total`` is done, if that is known."""
    bar = WorkBar(what, total, unit, start)
    redrawn = Redrawn(bar, console=stderr, refresh_per_second=4, transient=total is None)
    with redrawn if stderr.is_terminal else nullcontext():
        yield bar
