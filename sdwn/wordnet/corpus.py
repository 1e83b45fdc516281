"""WordNet 3.0 on this machine, catalogs of synsets, and the lists of ImageNet's classes.

WordNet is found without NLTK and read by NLTK alone. The classes come from timm's own tables, and
timm is not imported, which would import torch.
"""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.config import PAPER_CATALOG, CatalogConfig
from sdwn.errors import SdwnError, UsageError, some
from sdwn.io import read_list, reading, uncollected

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Synset as NltkSynset
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

log = logging.getLogger(__name__)

# wnids are the offsets of this version.
VERSION = "3.0"
# What NLTK opens, but lexnames, and how the last line of some begins.
PARTS = ("noun", "verb", "adj", "adv")
FILES = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in PARTS)
FILES += ("cntlist.rev", "index.sense", *(f"{part}.exc" for part in PARTS))
LAST = {"data.noun": b"\n15300051 ", "index.noun": b"\nzyrian "}
THREE_WAYS = (
    "on a machine with network: python -m nltk.downloader wordnet; "
    "on Debian or Ubuntu: apt-get install wordnet-base wordnet-sense-index; "
    "elsewhere: unpack WordNet 3.0 and set WNSEARCHDIR to its dict folder"
)
SYSTEM_FOLDERS = (
    "/usr/share/wordnet",  # Debian, Ubuntu
    "/usr/share/wordnet-3.0/dict",  # Fedora
    "/usr/local/WordNet-3.0/dict",  # the installer of Princeton
)


@dataclass(frozen=True, slots=True)
class Synset:
    """A noun synset."""

    wnid: str  # n and its 8-digit WordNet 3.0 offset
    name: str
    lemmas: tuple[str, ...]
    definition: str
    parents: tuple[str, ...] = ()  # wnids right above it, sorted; of an instance, its classes


class WordNet:
    """An open WordNet 3.0: noun synsets by name or wnid, and those below them."""

    def __init__(self, reader: WordNetCorpusReader) -> None:
        self._reader = reader
        self._read: dict[str, Synset] = {}

    def synset(self, identifier: str) -> Synset:
        """Find a noun synset by name (``dog.n.01``) or wnid (``n02084071``)."""
        return self._read.get(identifier) or self._record(self._find(identifier))

    def named(self, text: str) -> Synset:
        """Find a noun synset as `synset` does, or by a lemma that no other noun synset has."""
        if re.search(r"\.[a-z]\.[^.]*\Z|^n[0-9]{8}$", text):
            return self.synset(text)
        found = [self._record(one) for one in self._reader.synsets(text.replace(" ", "_"), "n")]
        if len(found) == 1:
            return found[0]
        senses = "".join(f"\n  {one.name}: {one.definition}" for one in found)
        several = f"{len(found)} nouns of this name; write one of these instead:{senses}"
        raise UsageError(f"{text}: {several if found else 'WordNet has no such noun'}")

    def below(self, root: str) -> Iterator[Synset]:
        """Yield every synset below a root, without it and instances, in no order that stays."""
        start = self._find(root)
        seen, stack = {start.offset()}, [start]
        while stack:
            for child in stack.pop().hyponyms():
                if child.offset() not in seen:
                    seen.add(child.offset())
                    stack.append(child)
                    yield self._record(child)

    def _find(self, identifier: str) -> NltkSynset:
        from nltk.corpus.reader.wordnet import WordNetError

        synset = None
        with suppress(WordNetError, ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the error below says more
            if re.fullmatch(r"n[0-9]{8}", identifier):
                synset = self._reader.synset_from_pos_and_offset("n", int(identifier[1:]))
            # NLTK counts senses below 1 from the end, and takes whatever int() does.
            elif re.search(r"\.0*[1-9][0-9]*\Z", identifier):
                synset = self._reader.synset(identifier)
        if synset is None:
            same = [one.name() for one in self._reader.synsets(identifier.partition(".")[0], "n")]
            expected = "expected a noun synset such as dog.n.01 or its wnid such as n02084071"
            hint = f"; WordNet has {', '.join(same)}" if same else ""
            raise UsageError(f"{identifier}: no such synset in WordNet {VERSION}; {expected}{hint}")
        if synset.pos() != "n":
            raise UsageError(f"{identifier}: not a noun; only noun synsets have a wnid")
        return synset

    def _record(self, synset: NltkSynset) -> Synset:
        above = {*synset.hypernyms(), *synset.instance_hypernyms()}
        found = Synset(
            wnid=f"n{synset.offset():08d}",
            name=synset.name(),
            lemmas=tuple(synset.lemma_names()),
            definition=synset.definition(),
            parents=tuple(sorted(f"n{parent.offset():08d}" for parent in above)),
        )
        return self._read.setdefault(found.wnid, found)


@cache
@uncollected()
def open_wordnet() -> WordNet:
    """Open WordNet 3.0, once a process: NLTK's, a system folder's, or by NLTK's downloader."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    try:
        corpus = require_corpus()
    except SdwnError:
        before = socket.getdefaulttimeout()
        # A firewall that swallows packets must not hang a planner.
        socket.setdefaulttimeout(20)
        with suppress(OSError, ValueError):
            nltk.download("wordnet", quiet=True)
        socket.setdefaulttimeout(before)
        corpus = require_corpus()

    class Reader(WordNetCorpusReader):  # type: ignore[misc]  # NLTK has no types
        """NLTK's reader, without other languages and with a stand-in for lexnames."""

        def open(self, file: str) -> Any:
            if file != "lexnames":
                return super().open(file)
            # Debian's packages leave it out: 45 lexicographer files, whose names nobody asks.
            return io.StringIO("".join(f"{number:02d}\tfile\t1\n" for number in range(45)))

        def map_wn(self, version: str = "wordnet") -> None:
            """Skip the map to other languages' WordNets, which costs a second load."""

    # NLTK opens no corpus outside its own data path.
    nltk.data.path.append(str(corpus))
    if corpus.suffix == ".zip":
        root = nltk.data.ZipFilePathPointer(str(corpus), "wordnet/")
    else:
        root = nltk.data.FileSystemPathPointer(str(corpus))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no multilingual data: none is needed
        return WordNet(Reader(root, None))


def require_corpus() -> Path:
    """Find a whole WordNet 3.0 on this machine, a folder or a zip, without the network."""
    named = filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep))
    own = (f"{sys.prefix}{folder}" for folder in ("", "/share", "/lib"))
    shared = ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")
    nltk_folders = (*named, *(f"{top}/nltk_data" for top in (Path.home(), *own, *shared)))
    names = ("corpora/wordnet", "corpora/wordnet.zip")
    candidates = (f"{folder}/{name}" for folder in nltk_folders for name in names)
    # The two variables of wn(1WN).
    home = os.environ.get("WNHOME")
    folders = (os.environ.get("WNSEARCHDIR"), home and f"{home}/dict", *SYSTEM_FOLDERS)
    passed: list[str] = []
    for corpus in map(Path, (*candidates, *filter(None, folders))):
        if not os.access(corpus, os.R_OK):
            continue
        if (reason := _fault(corpus)) is None:
            for other in passed:
                log.warning("%s: passed over for %s", other, corpus)
            return corpus
        passed.append(f"{corpus} {reason}")
    found = "; ".join(passed) or "found no WordNet"
    raise SdwnError(f"expected WordNet {VERSION} (wnids are its offsets), {found}; {THREE_WAYS}")


def _fault(corpus: Path) -> str | None:
    """Return why a corpus cannot be used; None where it can."""
    try:
        folder = zipfile.Path(corpus, "wordnet/") if corpus.suffix == ".zip" else corpus
        for name in FILES:
            # Read whole, which checks the CRC of what is in a zip.
            content = (folder / name).read_bytes()
            if name == "data.noun":
                version = re.search(rb"Word[nN]et ([0-9.]+\+?) Copyright", content[:4096])
                found = version[1].decode() if version else "of no known version"
                if found != VERSION:
                    return f"holds WordNet {found}"
            if LAST.get(name, b"") not in content[-4096:] or not content.endswith(b"\n"):
                return f"is damaged: {name} is cut short"
    except (OSError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        return f"is incomplete: {error}"
    except (zipfile.BadZipFile, zlib.error) as error:
        return f"is damaged: {error}"
    return None


# --- Classes of ImageNet --------------------------------------------------------------------------
CLASSES = 1000
# timm's other lists, by their number of classes: parts of ImageNet-21k.
LARGER = {
    11221: "imagenet21k_miil",
    11821: "imagenet12k",
    21841: "imagenet22k",
    21842: "imagenet22k_ms",
    21843: "imagenet21k_goog",
}


@cache
def class_wnids(classes: int = CLASSES) -> tuple[str, ...]:
    """List the wnids of a classifier's classes in order; their number identifies the list."""
    if classes not in (CLASSES, *LARGER):
        known = ", ".join(map(str, (CLASSES, *LARGER)))
        raise SdwnError(f"no list of {classes} ImageNet classes; known are those of {known}")
    return tuple(_timm_table(f"{LARGER.get(classes, 'imagenet')}_synsets.txt"))


@cache
def class_index() -> dict[str, int]:
    """Map each wnid of ImageNet-1k to its class index, 0 to 999."""
    return {wnid: index for index, wnid in enumerate(class_wnids())}


@cache
def _class_lemmas() -> dict[str, list[str]]:
    rows = (line.partition("\t") for line in _timm_table("imagenet_synset_to_lemma.txt"))
    return {wnid: lemmas.split(", ") for wnid, _, lemmas in rows}


def class_lemmas(wnid: str) -> list[str]:
    """List an ImageNet class's lemmas as people write them; the wnid where timm knows none."""
    return _class_lemmas().get(wnid, [wnid])


def class_name(wnid: str) -> str:
    """Return the first lemma of an ImageNet class; the wnid itself where timm's table has none."""
    return class_lemmas(wnid)[0]


@cache
def classes_by_name() -> dict[str, list[str]]:
    """Map the names of ImageNet-1k's classes, in lower case, to the wnids that have them."""
    found: dict[str, list[str]] = {}
    for wnid in class_wnids():
        lemmas = ", ".join(class_lemmas(wnid)).lower()
        for name in {lemmas, *lemmas.split(", ")}:
            found.setdefault(name, []).append(wnid)
    return found


def _timm_table(name: str) -> list[str]:
    """Return the lines of a file of timm's."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        raise SdwnError("the ImageNet classes come from timm, which is missing: pip install timm")
    path = Path(spec.origin).parent / "data/_info" / name
    with reading(path, "install timm again: pip install --force-reinstall timm"):
        return path.read_text(encoding="utf-8").splitlines()


# --- Catalogs of synsets --------------------------------------------------------------------------
ROOT = "object.n.01"
# Those that have a name.
CATALOGS: dict[str, Callable[[WordNet], Iterable[Synset]]] = {
    PAPER_CATALOG: lambda wordnet: published(wordnet.below(ROOT)),
    "closure": lambda wordnet: wordnet.below(ROOT),
    "imagenet-1k": lambda wordnet: map(wordnet.synset, class_wnids()),
}


@uncollected()
def read_catalog(config: CatalogConfig, wordnet: WordNet) -> tuple[Synset, ...]:
    """Collect the synsets that a config asks for, in the order of their wnids."""
    found = {synset.wnid: synset for synset in _collect(config, wordnet)}
    if config.only:
        only = {synset.wnid: synset for synset in map(wordnet.named, config.only)}
        for wnid, synset in only.items():
            if wnid not in found:
                whole = describe(config.model_copy(update={"only": ()}))
                raise UsageError(f"only: {synset.name} ({wnid}) is not in the catalog {whole}")
        found = only
    if not found:
        raise UsageError(f"the catalog {describe(config)} holds no synset")
    return tuple(found[wnid] for wnid in sorted(found))


def describe(config: CatalogConfig) -> str:
    """Return a catalog's name in words, as "closure + below dog.n.01"."""
    parts = [some(config.synsets, 3), config.name, *(f"below {root}" for root in config.roots)]
    files = {"list": config.file, "table": config.table}
    parts += [f"{kind} {file.name}" for kind, file in files.items() if file]
    chosen = f" ({len(config.only)} chosen)" if config.only else ""
    return " + ".join(filter(None, parts)) + chosen


def _collect(config: CatalogConfig, wordnet: WordNet) -> Iterator[Synset]:
    unclear = []
    for text in config.synsets:
        try:
            yield wordnet.named(text)
        except UsageError as error:
            unclear.append(str(error))
    if unclear:
        raise UsageError("\n".join(["catalog.synsets:", *unclear]))
    for part in config.name.split("+") if config.name else ():
        if (name := part.strip()) not in CATALOGS:
            known = ", ".join(CATALOGS)
            raise UsageError(f"unknown catalog {name!r}; valid: {known}, joined with +")
        yield from CATALOGS[name](wordnet)
    for root in config.roots:
        yield from wordnet.below(root)
    for line in read_list(config.file) if config.file else ():
        try:
            yield wordnet.synset(line.name)
        except UsageError as error:
            raise UsageError(f"{line.where}: {error}") from None


def published(synsets: Iterable[Synset]) -> list[Synset]:
    """Apply the rule that gives the published 26,204 of the 29,580 synsets.

    One synset for each first lemma, case kept: the one of the lowest sense number. First
    lemmas with a ``.`` or a ``/``, which cannot name a folder, are dropped. Consistent with
    every count in arXiv 2211.01777, whose code is not public.
    """
    kept: dict[str, Synset] = {}
    for synset in sorted(synsets, key=lambda one: int(one.name.rsplit(".", 1)[1])):
        if not re.search("[./]", synset.lemmas[0]):
            kept.setdefault(synset.lemmas[0], synset)
    return list(kept.values())


if __name__ == "__main__":
    try:
        open_wordnet()
    except SdwnError as error:
        sys.exit(f"error: {error}")
