"""Find WordNet 3.0 on this machine and open it with NLTK."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nltk
from nltk.corpus.reader.wordnet import Synset as NltkSynset
from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError

from sdwn.errors import SdwnError, UsageError
from sdwn.wordnet import corpus_files as wordnet_files
from sdwn.wordnet.corpus_files import THREE_WAYS, VERSION

log = logging.getLogger(__name__)

# lexnames(5WN): the only file of the corpus that Debian's packages leave out.
LEXICOGRAPHER_FILES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()
PART_OF_SPEECH_NUMBERS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


@dataclass(frozen=True, slots=True)
class Synset:
    """A noun synset; ``wnid`` is ``n`` and its 8-digit WordNet 3.0 offset."""

    wnid: str
    name: str
    lemmas: tuple[str, ...]
    definition: str


class WordNet:
    """An open WordNet 3.0: noun synsets by name or wnid, and what lies below them."""

    def __init__(self, reader: WordNetCorpusReader) -> None:
        self._reader = reader

    def synset(self, identifier: str) -> Synset:
        """Find a noun synset by name (``dog.n.01``) or wnid (``n02084071``).

        Raises:
            UsageError: there is no such noun synset; the ones of the same lemma are named.
        """
        return _record(self._find(identifier))

    def below(self, root: str) -> Iterator[Synset]:
        """Yield every synset below a root by hyponyms, the root and instances not counted.

        NLTK's order changes with PYTHONHASHSEED; sort before use.
        """
        start = self._find(root)
        seen = {start.offset()}
        stack = [start]
        while stack:
            for child in stack.pop().hyponyms():
                if child.offset() not in seen:
                    seen.add(child.offset())
                    stack.append(child)
                    yield _record(child)

    def hypernyms(self, identifier: str) -> list[str]:
        """Give the wnids right above a synset, sorted; of an instance, what it is one of."""
        found = self._find(identifier)
        above = {*found.hypernyms(), *found.instance_hypernyms()}
        return sorted(f"n{synset.offset():08d}" for synset in above)

    def _find(self, identifier: str) -> NltkSynset:
        synset = None
        with contextlib.suppress(WordNetError, ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the error below says more
            if re.fullmatch(r"n[0-9]{8}", identifier):
                synset = self._reader.synset_from_pos_and_offset("n", int(identifier[1:]))
            # NLTK counts senses below 1 from the end, and takes whatever int() does.
            elif re.search(r"\.0*[1-9][0-9]*\Z", identifier):
                synset = self._reader.synset(identifier)
        if synset is None:
            raise UsageError(self._not_found(identifier))
        if synset.pos() != "n":
            raise UsageError(f"{identifier}: not a noun; only noun synsets have a wnid")
        return synset

    def _not_found(self, identifier: str) -> str:
        lemma = identifier.partition(".")[0]
        same = [synset.name() for synset in self._reader.synsets(lemma, pos="n")]
        expected = "expected a noun synset such as dog.n.01 or its wnid such as n02084071"
        hint = f"; WordNet has {', '.join(same)}" if same else ""
        return f"{identifier}: no such synset in WordNet {VERSION}; {expected}{hint}"


def _record(synset: NltkSynset) -> Synset:
    return Synset(
        wnid=f"n{synset.offset():08d}",
        name=synset.name(),
        lemmas=tuple(synset.lemma_names()),
        definition=synset.definition(),
    )


def open_wordnet() -> WordNet:
    """Open WordNet 3.0: from NLTK's data path, a system folder, or by NLTK's downloader.

    Raises:
        SdwnError: none of the three gives WordNet 3.0.
    """
    corpus, passed = wordnet_files.look(nltk.data.path)
    if corpus is None and _download():
        corpus, passed = wordnet_files.look(nltk.data.path)
    if corpus is None:
        found = "; ".join(passed) or "found no WordNet"
        raise SdwnError(
            f"expected WordNet {VERSION} (wnids are its offsets), {found}; {THREE_WAYS}"
        )
    for reason in passed:
        log.warning("%s: passed over for %s", reason, corpus)
    return WordNet(_read(corpus))


@cache
def shared_wordnet() -> WordNet:
    """Open WordNet once a process; errors as in :func:`open_wordnet`."""
    return open_wordnet()


def _download() -> bool:
    before = socket.getdefaulttimeout()
    # A firewall that swallows packets must not hang a planner.
    socket.setdefaulttimeout(20)
    try:
        return bool(nltk.download("wordnet", quiet=True))
    except (OSError, ValueError):
        return False
    finally:
        socket.setdefaulttimeout(before)


class _Reader(WordNetCorpusReader):  # type: ignore[misc]  # NLTK has no types
    """NLTK's reader, without other languages and with a stand-in for a missing lexnames."""

    def open(self, file: str) -> Any:
        try:
            return super().open(file)
        except OSError:
            if file != "lexnames":
                raise
            lines = (
                f"{number:02d}\t{name}\t{PART_OF_SPEECH_NUMBERS[name.split('.')[0]]}\n"
                for number, name in enumerate(LEXICOGRAPHER_FILES)
            )
            return io.StringIO("".join(lines))

    def map_wn(self, version: str = "wordnet") -> None:
        """Skip the map to other languages' WordNets, which costs a second load."""


def _read(corpus: Path) -> WordNetCorpusReader:
    # NLTK opens no corpus outside its own data path.
    nltk.data.path.append(str(corpus))
    if corpus.suffix == ".zip":
        root = nltk.data.ZipFilePathPointer(str(corpus), "wordnet/")
    else:
        root = nltk.data.FileSystemPathPointer(str(corpus))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no multilingual data: none is needed
        return _Reader(root, None)


if __name__ == "__main__":
    try:
        open_wordnet()
    except SdwnError as error:
        sys.exit(f"error: {error}")
