"""Text files that users write, as Windows, spreadsheets and ImageNet's tools save them."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdwn.errors import UsageError

# A spreadsheet writes its country's separator.
SEPARATORS = ",;\t"

_SYNSET = re.compile(r"\bn[0-9]{8}\b|\.n\.[0-9]")


@dataclass(frozen=True, slots=True)
class Listed:
    """A synset, or one image of it, that a line of a list names."""

    path: Path
    line: int
    name: str
    number: str | None = None

    @property
    def where(self) -> str:
        """The file and the line, for messages."""
        return f"{self.path}, line {self.line}"


def canonical(name: str) -> str:
    """Return a name as composed Unicode (NFC): Macs write an é as two characters."""
    return unicodedata.normalize("NFC", name)


def decode_text(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 where a byte order mark says so; the mark is dropped.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig")


def read_text(path: Path) -> str:
    """Read a text file, see :func:`decode_text`; line ends stay as they are.

    Raises:
        UsageError: it cannot be read, or is no such text.
    """
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected text in UTF-8, save it as such: {error}") from None


def read_list(path: Path) -> Iterator[Listed]:
    """Read a list of synsets: a table with the column ``wnid`` or ``synset``, or one a line.

    In a table the column ``number`` may name images. In a line other words may follow, as in
    ``n01440764 tench, Tinca tinca``; ``#`` begins a comment.

    Raises:
        UsageError: the file cannot be read, or a line names no synset or several.
    """
    text = read_text(path)
    header = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=header.count))
    try:
        columns = [cell.strip().lower() for cell in next(lines, [])]
        key = next((name for name in ("wnid", "synset") if name in columns), None)
        if key is None:
            yield from _lines(path, text)
            return
        places = [columns.index(name) for name in (key, "number") if name in columns]
        for cells in lines:
            if any(cell.strip() for cell in cells):
                if max(places) >= len(cells):
                    expected = f"expected {max(places) + 1} cells or more, found {len(cells)}"
                    raise UsageError(f"{path}, line {lines.line_num}: {expected}")
                yield Listed(path, lines.line_num, *(cells[place].strip() for place in places))
    except csv.Error as error:
        raise UsageError(f"{path}: expected a CSV file: {error}") from None


def _lines(path: Path, text: str) -> Iterator[Listed]:
    for number, line in enumerate(text.splitlines(), start=1):
        name, *words = re.split(r"[\s,;]+", line.partition("#")[0].strip(), maxsplit=1)
        found = Listed(path, number, name)
        if words and _SYNSET.search(words[0]):
            raise UsageError(f"{found.where}: expected one synset a line, found several")
        if words and words[0].isdecimal():
            # Whole synsets would be taken where one image was meant.
            raise UsageError(
                f"{found.where}: found a number behind {name!r}; a table of images needs a first "
                "line such as wnid,number"
            )
        if name:
            yield found
