"""Selection of a release's images by a CSV file or a list of synsets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from sdwn.errors import UsageError
from sdwn.io import canonical, read_list
from sdwn.releases.release import Release

# How many of the absent images, and how much of each name, a message shows.
SHOWN_NAMES, SHOWN_CHARACTERS = 3, 40

_NUMBER = re.compile(r"[0-9]{1,10}")
_SYNSET = re.compile(r"n[0-9]{8}|\S+\.n\.[0-9]+")


def select_listed(release: Release, path: Path) -> Release:
    """Select the images that a file lists, in the release's order, each once.

    A table's columns ``wnid`` and ``number`` count. Without ``number``, and in a list of one
    synset a line, whole synsets are taken.

    Raises:
        UsageError: the file is not such a list, is empty, or lists an image that is not there.
    """
    by_name = {canonical(row.synset): wnid for wnid, row in release.synsets.items()}
    # An image's wnid and number; without a number, all of the synset. In the file's order.
    chosen = dict[tuple[str, int | None], None]()
    for line in read_list(path):
        if line.line == 1 and not _SYNSET.fullmatch(line.name):
            raise UsageError(
                f"{path}: expected the columns wnid and number, or wnid alone, in the first line, "
                "or one synset a line, as n02391049 or zebra.n.01; "
                f"found {line.name[:80]!r}"
            )
        if line.number is not None and not _NUMBER.fullmatch(line.number):
            raise UsageError(
                f"{line.where}: number: expected a whole number from 0, found {line.number[:40]!r}"
            )
        name = canonical(line.name)
        number = None if line.number is None else int(line.number)
        chosen[by_name.get(name, name), number] = None
    if not chosen:
        raise UsageError(f"{path}: lists no image; expected a line for each, below the header")
    wnids = [canonical(wnid) for wnid in release.metadata["wnid"].to_pylist()]
    numbers: list[int | None] = [None] * len(wnids)
    if next(iter(chosen))[1] is not None:
        numbers = release.metadata["number"].to_pylist()
    here = list(zip(wnids, numbers, strict=True))
    present = set(here)
    if absent := [key for key in chosen if key not in present]:
        more = f" and {len(absent) - SHOWN_NAMES} more" if len(absent) > SHOWN_NAMES else ""
        raise UsageError(
            f"{path}: {release.paths.root} has no {', '.join(map(_shown, absent[:SHOWN_NAMES]))}"
            f"{more}; take what it lacks off the list"
        )
    return release.subset(rows=np.array([key in chosen for key in here], dtype=bool))


def _shown(key: tuple[str, int | None]) -> str:
    r"""Write an image's or a synset's name as a line that cannot control a terminal.

    >>> _shown(("n02391049", 10)), _shown(("a\x1b[2Jb\nc", None))
    ('n02391049 10', "'a\\x1b[2Jb\\nc'")
    """
    wnid, number = key
    name = wnid[:SHOWN_CHARACTERS] if wnid.isprintable() else repr(wnid[:SHOWN_CHARACTERS])
    return name if number is None else f"{name} {number}"
