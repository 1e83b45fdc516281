"""Errors that a user can act on, and how messages write commands, counts and durations.

Only the command line turns an error into an exit code.
"""

import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class SdwnError(Exception):
    """Work that failed; the message says what was expected, what was found, what to do."""

    exit_code = 1


class UsageError(SdwnError):
    """A command, config or profile that asks for something impossible."""

    exit_code = 2


class IntegrityError(SdwnError):
    """A file that is not what its record says: missing, cut short, altered or foreign."""


class MisplacedError(IntegrityError):
    """An undamaged file of another shard, or of the plan ``plan_digest`` (empty: it names none)."""

    def __init__(self, message: str, plan_digest: str) -> None:
        super().__init__(message)
        self.plan_digest = plan_digest


class DiskError(SdwnError):
    """A disk that is full, read-only or failing: perhaps only for a moment."""


class QueueFullError(SdwnError):
    """The scheduler takes no more jobs of this user for now."""


class NoAnswerError(SdwnError):
    """The scheduler did not answer; whether it did what was asked is not known."""


class OutOfMemoryError(SdwnError):
    """The device has no room for this batch."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a library that comes with an extra of this package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        advice = shell("pip", "install", f"sdwn[{extra}]")
        raise UsageError(f"{library} is not installed; install it with: {advice}") from None


def shell(*words: object) -> str:
    """Write a command for a message as a shell reads it, whatever a path holds.

    >>> shell("rm", "my run/$1.h5", Path("-run"))
    "rm 'my run/$1.h5' ./-run"
    """
    return shlex.join(
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in words
    )


def command(*words: object) -> str:
    """Write a command of sdwn for a message."""
    return shell("sdwn", *words)


def counted(count: int, noun: str, plural: str = "s") -> str:
    """Return a count with its noun, as 1,200 processes."""
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def some(names: Sequence[str], most: int, count: int | None = None) -> str:
    """Name at most so many things, and count the rest of them all, or of ``count``.

    >>> some(["a", "b", "c"], 2), some(["a", "b"], 2), some(["a", "b"], 2, 1000)
    ('a, b and 1 more', 'a, b', 'a, b and 998 more')
    """
    more = (len(names) if count is None else count) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def first_lines(lines: Sequence[str], most: int, count: int | None = None) -> list[str]:
    """Return at most so many lines, and one that counts the rest, as `some` does."""
    more = (len(lines) if count is None else count) - most
    return [*lines[:most]] + [f"and {more:,} more"] * (more > 0)


def duration(seconds: float) -> str:
    """Return a duration as people read it, in one unit or two.

    >>> [duration(seconds) for seconds in (4.2, 90, 4800, 3600, 9_000_000)]
    ['4 s', '1 min 30 s', '1 h 20 min', '1 h', '2,500 h']
    """
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    units = ("min", "s") if round(seconds) < 3600 else ("h", "min")
    large, small = divmod(round(seconds if units[1] == "s" else seconds / 60), 60)
    return f"{large:,} {units[0]}" + f" {small} {units[1]}" * (small > 0)


def plain_message(error: BaseException) -> str:
    """Return an error's message; of the system's, the path and what is wrong with it."""
    if isinstance(error, OSError) and (path := error.filename2 or error.filename):
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        return f"{path}: {'expected a folder, found a file' if is_file else error.strerror}"
    return str(error)


def first_line(error: Exception) -> str:
    """Return what an error says first: pydantic's first mistake, or its class and first line."""
    if callable(mistakes := getattr(error, "errors", None)):
        first = mistakes()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200] if lines else 'no reason given'}"
