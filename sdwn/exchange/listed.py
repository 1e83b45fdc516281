"""The images of a release that a CSV file lists."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sdwn.errors import UsageError
from sdwn.releases.release import Release

# A spreadsheet writes its country's separator.
SEPARATORS = ",;\t"
NAMED = 3
_NUMBER = re.compile(r"[0-9]{1,10}")

# An image's wnid and number; without a number, all of the synset.
Key = tuple[str, int | None]


def listed(release: Release, path: Path) -> Release:
    """Take the images that a CSV file lists, in the release's order, each once.

    The columns ``wnid`` and ``number`` count; without ``number`` whole synsets are taken.

    Raises:
        UsageError: the file is no such list, lists nothing, or an image that is not there.
    """
    wanted = read_list(path)
    here = _keys(release, with_numbers=wanted[0][1] is not None)
    chosen, present = dict.fromkeys(wanted), set(here)
    if absent := [key for key in chosen if key not in present]:
        raise UsageError(
            f"{path}: {release.paths.root} has no {_named(absent)}; take what it lacks off the list"
        )
    return release.subset(rows=np.array([key in chosen for key in here], dtype=bool))


def read_list(path: Path) -> list[Key]:
    """Read which images a CSV file lists; at least one.

    Raises:
        UsageError: the file cannot be read, has no such columns, or lists nothing.
    """
    try:
        # Spreadsheets put a byte order mark in front.
        found = list(_read(path, path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise UsageError(f"{path}: expected a CSV file: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: expected a CSV file in UTF-8: {error}") from None
    if not found:
        raise UsageError(f"{path}: lists no image; expected a line for each, below the header")
    return found


def _read(path: Path, text: str) -> Iterator[Key]:
    header = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=header.count))
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
    names = [wnid if number is None else f"{wnid} {number}" for wnid, number in keys[:NAMED]]
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(names) + more
