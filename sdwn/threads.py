"""Work on many things in threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def in_threads(
    use: Callable[[Given], Result], given: Iterable[Given], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Call a function on each of many things in threads, so many ahead; results in order.

    >>> list(in_threads(abs, [-3, 1, -2], threads=2, ahead=1))
    [3, 1, 2]
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for one in given:
            waiting.append(pool.submit(use, one))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
