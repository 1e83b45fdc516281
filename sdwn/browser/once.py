"""A value made when it is first asked for, so that opening a release does not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Calls ``make`` once, whichever thread asks first; others wait for it.

    >>> made = Once(lambda: print("made") or 3)
    >>> made() + made()
    made
    6
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        """Give the value."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]
