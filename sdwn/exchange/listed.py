"""The images of a release that a CSV file lists."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import TextIO

import numpy as np

from sdwn.errors import UsageError
from sdwn.releases.release import Release

# A spreadsheet writes its country's separator.
SEPARATORS = ",;\t"
NAMED = 3
# Of what is no wnid.
LONGEST = 40
_NUMBER = re.compile(r"[0-9]{1,10}")

# An image's wnid and number; without a number, all of the synset.
Key = tuple[str, int | None]


def listed(release: Release, path: Path) -> Release:
    """Take the images that a CSV file lists, in the release's order, each once.

    The columns ``wnid`` and ``number`` count; without ``number`` whole synsets are taken.

    Raises:
        UsageError: the file is no such list, lists nothing, or an image that is not there.
    """
    chosen = read_list(path)
    here = _keys(release, with_numbers=next(iter(chosen))[1] is not None)
    present = set(here)
    if absent := [key for key in chosen if key not in present]:
        raise UsageError(
            f"{path}: {release.paths.root} has no {_named(absent)}; take what it lacks off the list"
        )
    return release.subset(rows=np.array([key in chosen for key in here], dtype=bool))


def read_list(path: Path) -> Collection[Key]:
    """Read which images a CSV file lists, each once, in its order; at least one.

    Raises:
        UsageError: the file cannot be read, has no such columns, or lists nothing.
    """
    try:
        # Spreadsheets put a byte order mark in front.
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = dict.fromkeys(_read(path, file))
    except OSError as error:
        raise UsageError(f"{path}: expected a CSV file: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: expected a CSV file in UTF-8: {error}") from None
    if not found:
        raise UsageError(f"{path}: lists no image; expected a line for each, below the header")
    return found.keys()


def _read(path: Path, file: TextIO) -> Iterator[Key]:
    header = file.readline()
    lines = csv.reader(chain([header], file), delimiter=max(SEPARATORS, key=header.count))
    names = [name.strip().lower() for name in next(lines, [])]
    if "wnid" not in names:
        raise UsageError(
            f"{path}: expected the columns wnid and number, or wnid alone, in the first line; "
            f"found {header.strip()[:80]!r}"
        )
    wnid = names.index("wnid")
    number = names.index("number") if "number" in names else None
    for line in lines:
        if any(cell.strip() for cell in line):
            where = f"{path}, line {lines.line_num}"
            yield _cell(line, wnid, where), _number(line, number, where)


def _number(line: list[str], column: int | None, where: str) -> int | None:
    if column is None:
        return None
    text = _cell(line, column, where)
    if not _NUMBER.fullmatch(text):
        raise UsageError(f"{where}: number: expected a whole number from 0, found {text[:40]!r}")
    return int(text)


def _cell(line: list[str], column: int, where: str) -> str:
    if column >= len(line):
        raise UsageError(f"{where}: expected {column + 1} cells or more, found {len(line)}")
    return line[column].strip()


def _keys(release: Release, with_numbers: bool) -> list[Key]:
    wnids = release.metadata["wnid"].to_pylist()
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
