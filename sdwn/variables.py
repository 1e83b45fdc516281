"""Environment variables that hold numbers."""

from __future__ import annotations

import os

from sdwn.errors import UsageError


def seconds(variable: str, default: float) -> float:
    """Read a number of seconds from the environment.

    >>> seconds("NOT_SET_ANYWHERE", 5.0)
    5.0

    Raises:
        UsageError: it holds something else.
    """
    found = os.environ.get(variable, str(default))
    try:
        if (value := float(found)) >= 0:
            return value
    except ValueError:
        pass
    raise UsageError(f"{variable}: expected seconds, 0 or more, found {found!r}")
