"""Word vectors of names, out of a text file as GloVe and word2vec write them."""

from __future__ import annotations

import codecs
import gzip
import itertools
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sdwn.errors import UsageError

Vector = NDArray[np.float32]

EXPECTED = "expected a word and its numbers a line, as GloVe and word2vec write them as text"
# No line of a vector file is as long; a binary file may be one line.
LONGEST_LINE = 1 << 20
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x93NUMPY": "a NumPy array",
    codecs.BOM_UTF16_LE: "text in UTF-16; save it in UTF-8",
    codecs.BOM_UTF16_BE: "text in UTF-16; save it in UTF-8",
}


def vectors(path: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Vector]:
    """Find a vector for each key of ``names``, given its lemmas, the best first.

    A lemma of several words is looked up as one, joined by ``_`` or ``-``, else it is the mean
    of its words; a spelling that is not there is looked up in lower case. Keys of which no lemma
    is found are left out. Only vectors that may be needed are kept while the file, which may be
    gzipped, goes by.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    wanted = {spelling for lemmas in names.values() for spelling in _spellings(lemmas)}
    known = read_vectors(path, wanted)
    found = {key: _first(lemmas, known) for key, lemmas in names.items()}
    return {key: vector for key, vector in found.items() if vector is not None}


def joined(lemma: str) -> list[str]:
    """List the ways in which a lemma may stand in a file as one word.

    >>> joined("Maltese dog")
    ['Maltese_dog', 'maltese_dog', 'Maltese-dog', 'maltese-dog']
    >>> joined("tabby")
    ['tabby']
    """
    words = lemma.replace("_", " ").split()
    return (
        [way for sign in "_-" for way in _cases(sign.join(words))] if words[1:] else _cases(lemma)
    )


def words(lemma: str) -> list[str]:
    """Take a lemma apart, the genitive's ending dropped.

    >>> words("black-footed_ferret"), words("carpenter's kit")
    (['black', 'footed', 'ferret'], ['carpenter', 'kit'])
    """
    parts = (part.removesuffix("'s") for part in re.split(r"[\s_-]+", lemma))
    return [part for part in parts if part]


def _cases(word: str) -> list[str]:
    return list(dict.fromkeys((word, word.lower())))


def _spellings(lemmas: Iterable[str]) -> Iterator[str]:
    for lemma in lemmas:
        yield from joined(lemma)
        for word in words(lemma):
            yield from _cases(word)


def _first(lemmas: Iterable[str], known: Mapping[str, Vector]) -> Vector | None:
    for lemma in lemmas:
        for way in joined(lemma):
            if way in known:
                return known[way]
        parts = [_any(_cases(word), known) for word in words(lemma)]
        whole = [part for part in parts if part is not None]
        if whole and len(whole) == len(parts):
            mean: Vector = np.mean(whole, axis=0, dtype=np.float32)
            return mean
    return None


def _any(ways: Iterable[str], known: Mapping[str, Vector]) -> Vector | None:
    return next((known[way] for way in ways if way in known), None)


def read_vectors(path: Path, wanted: Collection[str]) -> dict[str, Vector]:
    """Read the vectors of these words; a word that stands twice counts once.

    A first line of two numbers, as word2vec writes it, is skipped. Vectors of zeros are none.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    found: dict[str, Vector] = {}
    keys = {word.encode() for word in wanted}
    with _lines(path) as lines:
        numbered = enumerate(_bounded(path, lines), start=1)
        length, start = _length(path, numbered)
        for number, line in itertools.chain(start, numbered):
            # No copy of the numbers unless they are wanted: there are gigabytes of them.
            end = line.find(b" ")
            if (word := line[:end]) not in keys:
                continue
            fields, where = line[end:].split(), f"{path}: line {number}"
            if len(fields) > length:
                # GloVe has words with spaces; they are not the ones looked for.
                continue
            if len(fields) < length:
                what = f"expected {length} numbers, found {len(fields)}"
                raise UsageError(f"{where}: {what}; is it whole?")
            found[word.decode()] = _numbers(where, fields)
            keys.discard(word)
    return {word: vector for word, vector in found.items() if vector.any()}


def _length(path: Path, lines: Iterator[tuple[int, bytes]]) -> tuple[int, list[tuple[int, bytes]]]:
    """Tell how many numbers a word has, and give back the lines that were read for it."""
    first = 1, next(lines, (1, b""))[1].removeprefix(codecs.BOM_UTF8)
    fields = first[1].split()
    header = len(fields) == 2 and all(field.isdigit() for field in fields)
    if header:
        first = next(lines, (2, b""))
    where, rest = f"{path}: line {first[0]}", first[1].partition(b" ")[2].split()
    length = int(fields[1]) if header else len(rest)
    if length < 2 or len(rest) != length:
        raise UsageError(f"{where}: {EXPECTED}, found {_shown(first[1])}")
    _numbers(where, rest)
    return length, [first]


def _numbers(where: str, fields: Sequence[bytes]) -> Vector:
    try:
        with np.errstate(over="ignore"):  # what is too large is told below
            vector = np.array([float(field) for field in fields], np.float32)
    except ValueError:
        raise UsageError(f"{where}: {EXPECTED}, found {_shown(b' '.join(fields))}") from None
    if not np.isfinite(vector).all():
        raise UsageError(f"{where}: expected finite numbers, found some that are not")
    return vector


@contextmanager
def _lines(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, gzipped or not, and tell errors of reading it in one line."""
    try:
        with path.open("rb") as file:
            head = file.peek(6)[:6]
            for magic, kind in _OTHER_KINDS.items():
                if head.startswith(magic):
                    raise UsageError(f"{path}: {EXPECTED}, found {kind}")
            if head.startswith(b"\x1f\x8b"):
                with gzip.open(file) as unpacked:
                    yield unpacked  # type: ignore[misc]  # it reads bytes
            else:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: word vectors cannot be read: {reason}") from None


def _bounded(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise UsageError(f"{path}: {EXPECTED}, found a line of more than a megabyte")
        yield line


def _shown(line: bytes) -> str:
    line = line.strip()
    text = line[:40].decode("utf-8", "replace")
    if not line:
        return "nothing"
    if "\ufffd" in text or not text.isprintable():
        return "bytes that are no text; save binary vectors as text first"
    return repr(text)
