"""Images of a release, read and decoded and made ready in threads while a model runs.

Threads, not processes: reading, checking, decoding and resizing all leave Python's lock to
others, so that they scale as processes do; but nothing is imported again, copied between
processes, forked beside torch's own threads, or left behind by a signal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torchvision.io  # noqa: F401 - the faster decoder
from PIL import Image

from sdwn.io import in_threads
from sdwn.releases.release import LOCATION, Release
from sdwn.storage.images import Pixels

Prepare = Callable[[Image.Image], Pixels]
Row = dict[str, Any]

# Images that each thread may have ready beside those of the next batches.
WAITING = 4
# Records are taken out of the table by so many: all at once would be a gigabyte.
AT_ONCE = 256

COLUMNS = ("wnid", "synset", "number", "status", "imagenet_class")


def cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def prepared(
    release: Release, prepare: Prepare, workers: int, ahead: int
) -> Iterator[tuple[Row, Pixels]]:
    """Give each image's record and its pixels as ``prepare`` makes them, in order.

    So many images ahead of the one that is taken are made ready by ``workers`` threads; without
    any, each when it is taken.

    Raises:
        IntegrityError: an image is damaged; the message names it.
    """

    def ready(row: Row) -> tuple[Row, Pixels]:
        return row, prepare(release.image(row))

    if workers == 0:
        yield from map(ready, _rows(release))
    else:
        yield from in_threads(ready, _rows(release), workers, ahead + WAITING * workers)


def _rows(release: Release) -> Iterator[Row]:
    chosen = release.metadata.select([*COLUMNS, *LOCATION])
    for batch in chosen.to_batches(max_chunksize=AT_ONCE):
        yield from batch.to_pylist()
