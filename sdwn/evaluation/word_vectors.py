"""Word vectors of names, from a text file in the format of GloVe or word2vec."""

from __future__ import annotations

import codecs
import gzip
import itertools
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
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


def find_vectors(path: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Vector]:
    """Find a vector for each key of ``names``, given its lemmas, the best first.

    A lemma of several words is looked up as one, joined by ``_`` or ``-``, else it is the mean
    of its words; a spelling that is not there is looked up in lower case. Keys without a
    known lemma are left out. Only vectors that may be needed are kept while the file, which may be
    gzipped, goes by.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    wanted = {
        spelling
        for lemmas in names.values()
        for lemma in lemmas
        for spelling in (
            *joined_spellings(lemma),
            *(case for word in words_of(lemma) for case in _cases(word)),
        )
    }
    known = read_vectors(path, wanted)

    def first(spellings: Sequence[str]) -> Vector | None:
        return next((known[word] for word in spellings if word in known), None)

    found: dict[str, Vector] = {}
    for key, lemmas in names.items():
        for lemma in lemmas:
            vector = first(joined_spellings(lemma))
            if vector is None:
                parts = [first(_cases(word)) for word in words_of(lemma)]
                whole = [part for part in parts if part is not None]
                if not whole or len(whole) < len(parts):
                    continue
                vector = np.mean(whole, axis=0, dtype=np.float32)
            found[key] = vector
            break
    return found


def joined_spellings(lemma: str) -> list[str]:
    """List the ways in which a lemma may stand in a file as one word.

    >>> joined_spellings("Maltese dog")
    ['Maltese_dog', 'maltese_dog', 'Maltese-dog', 'maltese-dog']
    >>> joined_spellings("tabby")
    ['tabby']
    """
    words = lemma.replace("_", " ").split()
    if not words[1:]:
        return _cases(lemma)
    return [spelling for sign in "_-" for spelling in _cases(sign.join(words))]


def words_of(lemma: str) -> list[str]:
    """Split a lemma into words, the genitive's ending dropped.

    >>> words_of("black-footed_ferret"), words_of("carpenter's kit")
    (['black', 'footed', 'ferret'], ['carpenter', 'kit'])
    """
    parts = (part.removesuffix("'s") for part in re.split(r"[\s_-]+", lemma))
    return [part for part in parts if part]


def _cases(word: str) -> list[str]:
    return list(dict.fromkeys((word, word.lower())))


def read_vectors(path: Path, wanted: Collection[str]) -> dict[str, Vector]:
    """Read the vectors of these words; a word that stands twice counts once.

    A first line of two numbers, as word2vec writes it, is skipped. Vectors of zeros are none.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    found: dict[str, Vector] = {}
    keys = {word.encode() for word in wanted}
    with _open_lines(path) as lines:
        numbered = enumerate(lines, start=1)
        length, first = _read_length(path, numbered)
        for number, line in itertools.chain([first], numbered):
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


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterator[bytes]]:
    """Open a file, gzipped or not, as lines of bounded length; errors are one line."""

    def bounded(file: IO[bytes]) -> Iterator[bytes]:
        while line := file.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise UsageError(f"{path}: {EXPECTED}, found a line of more than a megabyte")
            yield line

    try:
        with path.open("rb") as file:
            head = file.peek(6)[:6]
            for magic, kind in _OTHER_KINDS.items():
                if head.startswith(magic):
                    raise UsageError(f"{path}: {EXPECTED}, found {kind}")
            if head.startswith(b"\x1f\x8b"):
                with gzip.open(file) as unpacked:
                    yield bounded(unpacked)  # type: ignore[arg-type]  # it reads bytes
            else:
                yield bounded(file)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: word vectors cannot be read: {reason}") from None


def _read_length(path: Path, lines: Iterator[tuple[int, bytes]]) -> tuple[int, tuple[int, bytes]]:
    """Read how many numbers a word has; return it with the first word's line, not its header."""
    number, line = 1, next(lines, (1, b""))[1].removeprefix(codecs.BOM_UTF8)
    fields = line.split()
    header = len(fields) == 2 and all(field.isdigit() for field in fields)
    if header:
        number, line = next(lines, (2, b""))
    where, rest = f"{path}: line {number}", line.partition(b" ")[2].split()
    length = int(fields[1]) if header else len(rest)
    if length < 2 or len(rest) != length:
        raise UsageError(f"{where}: {EXPECTED}, found {_shown(line)}")
    _numbers(where, rest)
    return length, (number, line)


def _numbers(where: str, fields: Sequence[bytes]) -> Vector:
    try:
        with np.errstate(over="ignore"):  # what is too large is refused below
            vector = np.array([float(field) for field in fields], np.float32)
    except ValueError:
        raise UsageError(f"{where}: {EXPECTED}, found {_shown(b' '.join(fields))}") from None
    if not np.isfinite(vector).all():
        raise UsageError(f"{where}: expected finite numbers, found some that are not")
    return vector


def _shown(line: bytes) -> str:
    line = line.strip()
    text = line[:40].decode("utf-8", "replace")
    if not line:
        return "nothing"
    if "\ufffd" in text or not text.isprintable():
        return "bytes that are no text; save binary vectors as text first"
    return repr(text)
