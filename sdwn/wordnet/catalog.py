"""Catalogs of synsets: the published rule, whole subtrees, ImageNet-1k, lists, and their unions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sdwn.config import PAPER_CATALOG, CatalogConfig
from sdwn.errors import UsageError, some
from sdwn.io import read_list, uncollected
from sdwn.wordnet.corpus import Synset, WordNet
from sdwn.wordnet.imagenet import class_wnids

ROOT = "object.n.01"


@dataclass(frozen=True, slots=True)
class Catalog:
    """Synsets in the order of their wnids, and a text that says where they come from."""

    name: str
    synsets: tuple[Synset, ...]


@uncollected()
def read_catalog(config: CatalogConfig, wordnet: WordNet) -> Catalog:
    """Collect the synsets that a config asks for."""
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
    return Catalog(describe(config), tuple(found[wnid] for wnid in sorted(found)))


def describe(config: CatalogConfig) -> str:
    """Return a catalog's name in words.

    >>> describe(CatalogConfig(name="closure", roots=("dog.n.01",)))
    'closure + below dog.n.01'
    """
    parts = [some(config.synsets, 3)] if config.synsets else []
    parts += [config.name] if config.name else []
    parts += [f"below {root}" for root in config.roots]
    parts += [f"list {config.file.name}"] if config.file else []
    parts += [f"table {config.table.name}"] if config.table else []
    return " + ".join(parts) + (f" ({len(config.only)} chosen)" if config.only else "")


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
        name = part.strip()
        if name == PAPER_CATALOG:
            yield from published(wordnet.below(ROOT))
        elif name == "closure":
            yield from wordnet.below(ROOT)
        elif name == "imagenet-1k":
            yield from map(wordnet.synset, class_wnids())
        else:
            known = f"{PAPER_CATALOG}, closure, imagenet-1k"
            raise UsageError(f"unknown catalog {name!r}; valid: {known}, joined with +")
    for root in config.roots:
        yield from wordnet.below(root)
    if config.file:
        for line in read_list(config.file):
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
