"""Errors that a user can act on; the command line alone turns them into exit codes."""

import shlex


class SdwnError(Exception):
    """Work that failed; the message says what was expected, what was found, what to do."""

    exit_code = 1


class UsageError(SdwnError):
    """A command, config or profile that asks for something impossible."""

    exit_code = 2


class IntegrityError(SdwnError):
    """A file that is not what its record says: missing, cut short, altered or foreign."""


class MisplacedError(IntegrityError):
    """A whole file in the place of another: of another shard, or foreign, of another plan.

    ``plan_digest`` is its own plan's, empty where it names none.
    """

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


def shell(*words: object) -> str:
    """Write a command for a message as a shell reads it, whatever a path holds.

    >>> shell("rm", "my run/$1.h5")
    "rm 'my run/$1.h5'"
    """
    return shlex.join(map(str, words))


def command(*words: object) -> str:
    """Write a command of sdwn for a message.

    >>> command("cancel", "my run")
    "sdwn cancel 'my run'"
    """
    return shell("sdwn", *words)


def first_line(error: Exception) -> str:
    """Return an error's class name and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no reason given'}"
