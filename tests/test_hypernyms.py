"""WordNet's nouns, read without NLTK: what it reads must be what NLTK reads."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from sdwn.errors import SdwnError
from sdwn.wordnet import corpus_files as wordnet_files
from sdwn.wordnet.catalog import Catalog
from sdwn.wordnet.corpus import Synset, WordNet
from sdwn.wordnet.corpus_files import FILES, look
from sdwn.wordnet.hypernyms import Nouns, open_nouns


@pytest.fixture(scope="module")
def nouns() -> Nouns:
    return open_nouns()


def read(nouns: Nouns, wnid: str) -> tuple[tuple[str, ...], str, list[str]]:
    return nouns.lemmas(wnid), nouns.definition(wnid), list(nouns.parents(wnid))


def by_nltk(wordnet: WordNet, synset: Synset) -> tuple[tuple[str, ...], str, list[str]]:
    return synset.lemmas, synset.definition, wordnet.hypernyms(synset.wnid)


def test_it_reads_what_nltk_reads_of_every_synset_of_the_catalog_and_all_above(
    nouns: Nouns, paper: Catalog, wordnet: WordNet
) -> None:
    left = {synset.wnid for synset in paper.synsets}
    seen = set[str]()
    while left:
        seen |= left
        for wnid in left:
            assert wnid in nouns
            assert read(nouns, wnid) == by_nltk(wordnet, wordnet.synset(wnid))
        left = {parent for wnid in left for parent in nouns.parents(wnid)} - seen
    assert len(seen) > 27_000
    assert nouns.parents("n00001740") == ()


def test_instances_have_what_they_are_one_of(nouns: Nouns, wordnet: WordNet) -> None:
    nile = wordnet.synset("nile.n.01")
    assert read(nouns, nile.wnid) == by_nltk(wordnet, nile)
    assert nouns.parents(nile.wnid) == (wordnet.synset("river.n.01").wnid,)


@pytest.mark.parametrize(
    "wnid", ["", "n", "dog", "n00000000", "n02084072", "n99999999", "02084071", "n02084071 ", "n²"]
)
def test_of_what_is_no_noun_all_is_empty(nouns: Nouns, wnid: str) -> None:
    assert wnid not in nouns
    assert read(nouns, wnid) == ((), "", [])


def test_it_reads_the_archive_that_nltk_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nouns: Nouns
) -> None:
    found, _ = look()
    assert found is not None
    corpora = tmp_path / "nltk_data/corpora"
    corpora.mkdir(parents=True)
    with zipfile.ZipFile(corpora / "wordnet.zip", "w") as archive:
        for name in FILES:
            archive.write(found / name, f"wordnet/{name}")
    without_wordnet(monkeypatch, tmp_path)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk_data"))
    assert read(open_nouns(), "n02084071") == read(nouns, "n02084071")


def test_where_there_is_no_wordnet_it_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_wordnet(monkeypatch, tmp_path)
    with pytest.raises(SdwnError, match=r"expected WordNet 3.0, found none.*WNSEARCHDIR"):
        open_nouns()


def without_wordnet(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Hide what this machine has."""
    monkeypatch.setattr(wordnet_files, "SYSTEM_FOLDERS", ())
    for name in ("WNSEARCHDIR", "WNHOME", "NLTK_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
