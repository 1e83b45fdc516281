"""WordNet's nouns read from its own file, a line each: NLTK takes seconds to load them all."""

from __future__ import annotations

import re

from sdwn.errors import SdwnError
from sdwn.wordnet.corpus_files import THREE_WAYS, VERSION, look, read

# wndb(5WN): what lies above, as @, or @i of an instance; each with its place and kind of word.
_HYPERNYM = re.compile(rb" @i? ([0-9]{8}) n ")
_WNID = re.compile(r"n([0-9]{8})")
_EXAMPLE = re.compile(r'".*?"')


class Nouns:
    """The nouns of WordNet 3.0 by wnid, which is a place in the file: each is read when asked for.

    Of a wnid that WordNet has not, everything is empty. Threads may share it.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __contains__(self, wnid: str) -> bool:
        return bool(self._columns(wnid))

    def parents(self, wnid: str) -> tuple[str, ...]:
        """Give the wnids right above a synset, sorted; of an instance, what it is one of."""
        found = _HYPERNYM.findall(self._columns(wnid))
        return tuple(sorted({f"n{offset.decode()}" for offset in found}))

    def lemmas(self, wnid: str) -> tuple[str, ...]:
        """Give a synset's lemmas, words joined by ``_``."""
        columns = self._columns(wnid).decode("utf-8", "replace").split()
        # Their count is hexadecimal, and each is followed by a number.
        return tuple(columns[4 : 4 + 2 * int(columns[3], 16) : 2]) if columns else ()

    def definition(self, wnid: str) -> str:
        """Give a synset's gloss without its examples."""
        columns = self._columns(wnid)
        if not columns:
            return ""
        start = int(wnid[1:]) + len(columns) + 1
        gloss = self._data[start : self._data.find(b"\n", start)].decode("utf-8", "replace")
        return _EXAMPLE.sub("", gloss).strip().strip("; ")

    def _columns(self, wnid: str) -> bytes:
        """Give what stands before the gloss in a synset's line."""
        match = _WNID.fullmatch(wnid)
        if match is None:
            return b""
        start, data = int(match[1]), self._data
        if not data.startswith(b"\n%s " % match[1].encode(), start - 1):
            return b""
        return data[start : data.find(b"|", start)]


def open_nouns() -> Nouns:
    """Open WordNet 3.0's nouns where they lie on this machine; nothing is fetched.

    Raises:
        SdwnError: there is no whole WordNet 3.0.
    """
    corpus, passed = look()
    if corpus is None:
        found = "; ".join(passed) or "found none on this machine"
        raise SdwnError(f"expected WordNet {VERSION}, {found}; {THREE_WAYS}")
    return Nouns(read(corpus, "data.noun"))
