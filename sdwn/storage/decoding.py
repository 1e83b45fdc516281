"""Decode images in threads as they pass, to find those that no program could show."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from sdwn.errors import IntegrityError
from sdwn.storage.images import decode

# Images that may wait for each thread: more would only take memory.
WAITING = 8


class Decoding:
    """A pool of threads; Pillow's decoders leave Python's lock to others."""

    def __init__(self) -> None:
        self._threads = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, "decode")
        self._running: deque[Future[str | None]] = deque()
        self._problems: list[str] = []

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, name: str, payload: bytes, codec: str, width: int, height: int) -> None:
        """Have an image decoded; ``name`` is what it is called if that fails."""
        self._running.append(self._pool.submit(_problem, name, payload, codec, width, height))
        if len(self._running) > WAITING * self._threads:
            self._take()

    def problems(self) -> list[str]:
        """Wait for all images and name those that cannot be decoded, in their order."""
        while self._running:
            self._take()
        return self._problems

    def _take(self) -> None:
        problem = self._running.popleft().result()
        if problem is not None:
            self._problems.append(problem)


def _problem(name: str, payload: bytes, codec: str, width: int, height: int) -> str | None:
    try:
        decode(payload, codec, width, height)
    except IntegrityError as error:
        return f"{name}: {error}"
    return None
