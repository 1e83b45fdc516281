"""Layouts of folders: which synset each picture shows, and what its prompt was."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sdwn.errors import UsageError
from sdwn.exchange.pictures import Tree, UnfitError, shown
from sdwn.io import canonical, decode_text

if TYPE_CHECKING:
    from sdwn.wordnet.corpus import Synset

MOST_TEXT_BYTES = 64 * 2**10

_WNID = re.compile(r"\bn[0-9]{8}(?![0-9A-Za-z])")
_OFFSET = re.compile(r"\b[0-9]{8}\b")
# WordNet's names have no other characters; NLTK prints them as Synset('dog.n.01').
_NAME = re.compile(r"(?<![\w.'/-])(?:Synset\(['\"])?([\w.'/-]+\.n\.(?!00)[0-9]{2})\b(?:['\"]\))?")
_FIELD = re.compile(r"^[ \t]*(prompt|synset|wnid)[ \t]*[:=][ \t]*", re.IGNORECASE | re.MULTILINE)

Find = Callable[[str], "Synset"]


@dataclass(frozen=True, slots=True)
class Label:
    """A synset and its prompt, None where unknown; ``stem`` is how its pictures' names start."""

    synset: Synset
    prompt: str | None = None
    stem: str = ""


Labelled = Iterator[tuple[str, Label | str]]


def image_folder(tree: Tree) -> Labelled:
    """Give each picture its label by its nearest folder, or else its own name; or why not."""
    find = _finder()

    @cache
    def label(wnid: str) -> Label | str:
        try:
            return Label(find(wnid))
        except UnfitError as error:
            return str(error)

    for name in tree.pictures:
        wnid = _wnid(PurePosixPath(tree.root.name, name))
        yield name, label(wnid) if wnid else "no folder's name, nor its own, starts with a wnid"


def _wnid(path: PurePosixPath) -> str | None:
    """Find a wnid that a folder's name, or else the file's, starts with.

    >>> _wnid(PurePosixPath("train/n02084071-dog/a/b.jpg")), _wnid(PurePosixPath("n02121620_b.jpg"))
    ('n02084071', 'n02121620')
    """
    starts = (re.match(r"n[0-9]{8}(?![0-9])", name) for name in (*path.parts[-2::-1], path.name))
    return next((start[0] for start in starts if start), None)


def folders(tree: Tree) -> Labelled:
    """Give each picture its label by the text beside it; or why it has none."""
    beside: dict[str, dict[str, str]] = defaultdict(dict)
    for text in tree.texts:
        beside[str(PurePosixPath(text).parent)].setdefault(stem(text), text)
    owners = {name: _owner(name, beside) for name in tree.pictures}
    labels = _labels(tree, sorted({text for text in owners.values() if text}))
    for name, owner in owners.items():
        yield name, labels[owner] if owner else "no text beside it belongs to it"


def _owner(name: str, beside: Mapping[str, Mapping[str, str]]) -> str | None:
    texts = beside.get(str(PurePosixPath(name).parent), {})
    if len(texts) == 1:
        return next(iter(texts.values()))
    return next((texts[base] for base in _bases(stem(name)) if base in texts), None)


def _bases(name: str) -> Iterator[str]:
    """Yield a name, and what is left of it without a number at its end, the longest first.

    >>> list(_bases("dog.n.01_12"))
    ['dog.n.01_12', 'dog.n.01_1', 'dog.n.01_', 'dog.n.01']
    """
    yield name
    start = len(name.rstrip("0123456789"))
    yield from (name[:stop] for stop in range(len(name) - 1, start - 1, -1))
    if start < len(name) and name[:start].endswith(("_", "-", " ")):
        yield name[: start - 1]


def stem(name: str) -> str:
    """Return a file's name, composed, without folder and ending; a synset's sense is no ending.

    >>> stem("a/dog.n.01.png"), stem("dog.n.01_2")
    ('dog.n.01', 'dog.n.01_2')
    """
    return canonical(re.sub(r"\.[A-Za-z]\w*\Z", "", PurePosixPath(name).name))


def _labels(tree: Tree, texts: Iterable[str]) -> dict[str, Label | str]:
    """Read texts: a label of each, or why it gives none."""
    find = _finder()
    labels: dict[str, Label | str] = {}
    for text in texts:
        try:
            labels[text] = Label(*_parse(_read(tree, text), find), stem(text))
        except UnfitError as error:
            labels[text] = f"{shown(text)}: {error}"
    return labels


def _read(tree: Tree, name: str) -> str:
    try:
        text = decode_text(tree.read(name, MOST_TEXT_BYTES))
    except OSError as error:
        raise UnfitError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise UnfitError("expected UTF-8 text") from None
    if "\0" in text:
        raise UnfitError("expected UTF-8 text, found a zero byte")
    return text


def _parse(text: str, find: Find) -> tuple[Synset, str]:
    """Read synset and prompt; whatever names a synset there must name the same one."""
    prompt, rest = _fields(text)
    wnids = set(_WNID.findall(rest)) or {f"n{offset}" for offset in _OFFSET.findall(rest)}
    named = {name: find(name) for name in sorted({*wnids, *_NAME.findall(rest)})}
    if not named:
        raise UnfitError("expected a synset such as dog.n.01 or a wnid such as n02084071")
    synset, *others = named.values()
    if any(other.wnid != synset.wnid for other in others):
        meant = ", ".join(f"{name} is {found.name} {found.wnid}" for name, found in named.items())
        raise UnfitError(f"expected one synset, found several: {meant}")
    return synset, prompt


def _fields(text: str) -> tuple[str, str]:
    """Part the prompt from the rest, by labels if there are any."""
    head, *pairs = _FIELD.split(text)
    fields = [(key.lower(), value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)]
    prompts = [value.strip() for key, value in fields if key == "prompt"]
    others = [value for key, value in fields if key != "prompt"]
    if prompts and others:
        return "\n".join(prompts), "\n".join((head, *others))
    left = text
    for pattern in (_FIELD, _NAME, _WNID if _WNID.search(text) else _OFFSET):
        left = pattern.sub(" ", left)
    return " ".join(left.split()), text


def _finder() -> Find:
    from sdwn.wordnet.corpus import shared_wordnet  # NLTK's seconds are for those who import

    wordnet = shared_wordnet()

    def find(identifier: str) -> Synset:
        try:
            return wordnet.synset(identifier)
        except UsageError as error:
            raise UnfitError(str(error).partition(";")[0]) from None

    return find
