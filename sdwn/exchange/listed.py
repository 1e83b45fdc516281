"""The images of a release that a file lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sdwn.errors import UsageError
from sdwn.io import canonical, read_list
from sdwn.releases.release import Release

NAMED = 3
# Of what is no wnid.
LONGEST = 40
_NUMBER = re.compile(r"[0-9]{1,10}")
_SYNSET = re.compile(r"n[0-9]{8}|\S+\.n\.[0-9]+")

# An image's wnid and number; without a number, all of the synset.
Key = tuple[str, int | None]


def listed(release: Release, path: Path) -> Release:
    """Select the images that a file lists, in the release's order, each once.

    A table's columns ``wnid`` and ``number`` count. Without ``number``, and in a list of one
    synset a line, whole synsets are taken.

    Raises:
        UsageError: the file is no such list, lists nothing, or an image that is not there.
    """
    wnids = {canonical(row.synset): wnid for wnid, row in release.synsets.items()}
    chosen = dict.fromkeys((wnids.get(name, name), number) for name, number in _read(path))
    if not chosen:
        raise UsageError(f"{path}: lists no image; expected a line for each, below the header")
    here = _keys(release, with_numbers=next(iter(chosen))[1] is not None)
    present = set(here)
    if absent := [key for key in chosen if key not in present]:
        raise UsageError(
            f"{path}: {release.paths.root} has no {_named(absent)}; take what it lacks off the list"
        )
    return release.subset(rows=np.array([key in chosen for key in here], dtype=bool))


def _read(path: Path) -> Iterator[Key]:
    for line in read_list(path):
        if line.line == 1 and not _SYNSET.fullmatch(line.name):
            raise UsageError(
                f"{path}: expected the columns wnid and number, or wnid alone, in the first line, "
                "or one synset a line, as n02391049 or zebra.n.01; "
                f"found {line.name[:80]!r}"
            )
        number = line.number
        if number is not None and not _NUMBER.fullmatch(number):
            expected = f"{line.where}: number: expected a whole number from 0"
            raise UsageError(f"{expected}, found {number[:40]!r}")
        yield canonical(line.name), None if number is None else int(number)


def _keys(release: Release, with_numbers: bool) -> list[Key]:
    wnids = [canonical(wnid) for wnid in release.metadata["wnid"].to_pylist()]
    numbers = release.metadata["number"].to_pylist() if with_numbers else [None] * len(wnids)
    return list(zip(wnids, numbers, strict=True))


def _named(keys: list[Key]) -> str:
    """Name the first few images or synsets.

    >>> _named([("n02391049", 10), ("n02391049", 11)])
    'n02391049 10, n02391049 11'
    >>> _named([(f"n{place}", None) for place in range(5)])
    'n0, n1, n2 and 2 more'
    """
    shown = [(_shown(wnid), number) for wnid, number in keys[:NAMED]]
    names = [wnid if number is None else f"{wnid} {number}" for wnid, number in shown]
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(names) + more


def _shown(wnid: str) -> str:
    r"""Write what a stranger's file calls a wnid as a line that a terminal only shows.

    >>> _shown("n02391049"), _shown("a\x1b[2Jb\nc")
    ('n02391049', "'a\\x1b[2Jb\\nc'")
    """
    return wnid[:LONGEST] if wnid.isprintable() else repr(wnid[:LONGEST])
