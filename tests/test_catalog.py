from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdwn.config import CatalogConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.evaluation.metrics import read_groups
from sdwn.wordnet import corpus
from sdwn.wordnet.corpus import (
    Synset,
    WordNet,
    class_index,
    describe,
    read_catalog,
    require_corpus,
)
from sdwn.wordnet.taxonomy import Taxonomy

from conftest import hide_wordnet


def names(catalog: tuple[Synset, ...]) -> set[str]:
    return {synset.name for synset in catalog}


def imagenet(catalog: tuple[Synset, ...]) -> int:
    return sum(synset.wnid in class_index() for synset in catalog)


def test_the_papers_catalog_has_the_published_counts(paper: tuple[Synset, ...]) -> None:
    assert len(paper) == 26_204
    assert imagenet(paper) == 862
    first = {s.lemmas[0].casefold() for s in paper if s.wnid in class_index()}
    assert len(first) == 861
    assert {"dog.n.01", "cat.n.01", "person.n.01"} <= names(paper)


def test_the_papers_catalog_names_each_synset_once_and_as_a_folder(
    paper: tuple[Synset, ...],
) -> None:
    lemmas = [synset.lemmas[0] for synset in paper]
    assert len(set(lemmas)) == len(lemmas)
    assert not [lemma for lemma in lemmas if "." in lemma or "/" in lemma]


def test_glosses_may_be_shared(paper: tuple[Synset, ...]) -> None:
    glosses = Counter(synset.definition for synset in paper)
    assert sum(count for count in glosses.values() if count > 1) == 153


@pytest.mark.parametrize(
    ("name", "synsets", "classes"),
    [
        ("closure", 29_580, 958),
        ("imagenet-1k", 1000, 1000),
        ("closure+imagenet-1k", 29_622, 1000),
    ],
)
def test_other_catalogs(wordnet: WordNet, name: str, synsets: int, classes: int) -> None:
    catalog = read_catalog(CatalogConfig(name=name), wordnet)
    assert (len(catalog), imagenet(catalog)) == (synsets, classes)


def test_a_wnid_is_the_noun_offset_of_wordnet_3_0(wordnet: WordNet) -> None:
    dog = wordnet.synset("dog.n.01")
    assert dog.wnid == "n02084071"
    assert dog.definition.startswith("a member of the genus Canis")
    assert wordnet.synset("n02084071") == dog


def test_synsets_by_lemma_name_or_wnid(wordnet: WordNet) -> None:
    config = CatalogConfig(synsets=("zebra", "electric guitar", "dog.n.01", "n02084071"))
    catalog = read_catalog(config, wordnet)
    assert names(catalog) == {"zebra.n.01", "electric_guitar.n.01", "dog.n.01"}
    assert describe(config) == "zebra, electric guitar, dog.n.01 and 1 more"


def test_a_lemma_of_several_synsets_is_refused_with_their_definitions(wordnet: WordNet) -> None:
    with pytest.raises(
        UsageError, match=r"crane\.n\.04: lifts and moves(.|\n)*crane\.n\.05: large"
    ):
        read_catalog(CatalogConfig(synsets=("crane",)), wordnet)
    with pytest.raises(UsageError, match=r"crane: (.|\n)*xyzzy: WordNet has no such noun"):
        read_catalog(CatalogConfig(synsets=("crane", "zebra", "xyzzy")), wordnet)


def test_roots_and_lists_join(wordnet: WordNet, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("# mine\nbanana.n.02\n\nn02084071  # dog.n.01\nbanana.n.02\n")
    config = CatalogConfig(roots=("corgi.n.01", "wolf.n.01"), file=listed)
    catalog = read_catalog(config, wordnet)
    assert {"pembroke.n.01", "timber_wolf.n.01", "banana.n.02", "dog.n.01"} <= names(catalog)
    assert "corgi.n.01" not in names(catalog), "a root is not counted"
    assert [s.wnid for s in catalog] == sorted({s.wnid for s in catalog})


@pytest.mark.parametrize(
    "text",
    [
        "n02084071 dog, domestic dog, Canis familiaris\nn07753592 banana\n",
        "n02084071\tdog\nn07753592\tbanana\n",
        "n02084071 1 dog\nbanana.n.02 # the fruit\n",
        "synset,wnid,number\nx,n02084071,3\nx,n07753592,0\nx,n02084071,4\n",
        "synset;shard\ndog.n.01;0\nbanana.n.02;1\n",
    ],
    ids=["LOC_synset_mapping", "words", "map_clsloc", "list", "semicolons"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_are_read_as_windows_and_imagenet_write_them(
    wordnet: WordNet, tmp_path: Path, text: str, encoding: str, end: str
) -> None:
    path, mark = tmp_path / "list.txt", "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + text.replace("\n", end)).encode(encoding))
    assert names(read_catalog(CatalogConfig(file=path), wordnet)) == {"dog.n.01", "banana.n.02"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog.n.01\ndogg.n.01\n", r"list\.txt, line 2: dogg\.n\.01: no such synset"),
        (b"dog.n.01, cat.n.01\n", r"list\.txt, line 1: expected one synset a line, found several"),
        (b"number,wnid\n1,n02084071\n2\n", r"list\.txt, line 3: expected 2 cells or more, found 1"),
        (b"dog.n.01\nz\xe8bre\n", r"list\.txt: expected text in UTF-8, save it as such"),
    ],
)
def test_what_is_wrong_in_a_list_is_told_by_its_line(
    wordnet: WordNet, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_catalog(CatalogConfig(file=tmp_path / "list.txt"), wordnet)


DOGS = (
    *("dog.n.01", "frump.n.01", "dog.n.03", "cad.n.01"),
    *("frank.n.02", "pawl.n.01", "andiron.n.01"),
)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text("0123456789+-_ \u0660\u0661", max_size=3), st.integers(-9, 9).map(str)))
def test_a_sense_is_a_number_from_1_as_it_is_written(wordnet: WordNet, sense: str) -> None:
    if re.fullmatch("0*[1-7]", sense):
        assert wordnet.synset(f"dog.n.{sense}").name == DOGS[int(sense) - 1]
    else:
        with pytest.raises(UsageError, match="no such synset"):
            wordnet.synset(f"dog.n.{sense}")


@pytest.mark.parametrize("name", ["dog.n.0", "dog.n.00", "dog.n.000", "dog.n.-1", "dog.n.-5"])
def test_senses_below_1_are_no_synsets_wherever_one_is_named(
    wordnet: WordNet, tmp_path: Path, name: str
) -> None:
    (tmp_path / "list.txt").write_text(f"{name}\n")
    (tmp_path / "groups.yaml").write_text(f"dogs: {name}\n")
    asked: list[Callable[[], object]] = [
        lambda: read_catalog(CatalogConfig(roots=(name,)), wordnet),
        lambda: read_catalog(CatalogConfig(name="closure", only=(name,)), wordnet),
        lambda: read_catalog(CatalogConfig(file=tmp_path / "list.txt"), wordnet),
        lambda: read_groups(str(tmp_path / "groups.yaml"), Taxonomy()),
        lambda: list(wordnet.below(name)),
    ]
    for ask in asked:
        with pytest.raises(UsageError, match=rf"{name}: no such synset"):
            ask()


def test_only_keeps_what_the_catalog_has(wordnet: WordNet) -> None:
    config = CatalogConfig(roots=("corgi.n.01",), only=("Pembroke",))
    assert names(read_catalog(config, wordnet)) == {"pembroke.n.01"}
    with pytest.raises(UsageError, match=r"only: dog.n.01 \(n02084071\) is not in the catalog"):
        read_catalog(CatalogConfig(roots=("corgi.n.01",), only=("dog.n.01",)), wordnet)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"roots": ["dog.n.99"]}, r"no such synset.*WordNet has dog.n.01, frump.n.01, dog.n.03"),
        ({"roots": ["unheardof.n.01"]}, "unheardof.n.01: no such synset in WordNet 3.0"),
        ({"roots": ["n99999999"]}, "n99999999: no such synset"),
        ({"roots": ["run.v.01"]}, "run.v.01: not a noun"),
        ({"roots": ["dog"]}, "dog: no such synset"),
        ({"roots": [""]}, "no such synset"),
        ({"name": "imagenet-22k"}, "unknown catalog 'imagenet-22k'; valid: sdwn-26204, closure"),
        ({"roots": ["pembroke.n.01"]}, "below pembroke.n.01 holds no synset"),
        ({"file": "/nowhere/list.txt"}, "/nowhere/list.txt: cannot be read"),
    ],
)
def test_a_wrong_catalog_is_explained(
    wordnet: WordNet, config: dict[str, object], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        read_catalog(CatalogConfig.model_validate(config), wordnet)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine where no WordNet is installed and the downloader reaches nobody."""
    hide_wordnet(monkeypatch, tmp_path)
    return monkeypatch


SYSTEM_FOLDERS = tuple(map(Path, corpus.SYSTEM_FOLDERS))


def system_wordnet() -> Path:
    found = [folder for folder in SYSTEM_FOLDERS if (folder / "data.noun").exists()]
    if not found:
        pytest.skip("no system WordNet here: it came from NLTK's downloader")
    return found[0]


def test_without_wordnet_the_three_ways_are_told(alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(SdwnError) as error:
        corpus.open_wordnet()
    message = str(error.value)
    assert "found no WordNet" in message
    for way in ("nltk.downloader wordnet", "apt-get install wordnet-base", "WNSEARCHDIR"):
        assert way in message


def test_another_wordnet_is_refused_by_name(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(
        "  14 WordNet 3.1 Copyright 2011 by Princeton University.\n"
    )
    alone.setenv("WNSEARCHDIR", str(tmp_path))
    with pytest.raises(SdwnError, match=r"expected WordNet 3\.0.*holds WordNet 3\.1"):
        corpus.open_wordnet()


@pytest.mark.parametrize(
    ("variable", "folder"), [("WNHOME", "dict"), ("NLTK_DATA", "corpora/wordnet")]
)
def test_wordnet_is_found_through_its_own_variable_and_nltks(
    alone: pytest.MonkeyPatch, tmp_path: Path, variable: str, folder: str
) -> None:
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / folder).symlink_to(system_wordnet())
    alone.setenv(variable, str(tmp_path))
    assert corpus.open_wordnet().synset("dog.n.01").wnid == "n02084071"


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def proxys_page(corpora: Path) -> None:
    (corpora / "wordnet.zip").write_text("<html>403 Forbidden</html>")


def broken_download(corpora: Path) -> None:
    cut(corpora / "wordnet.zip", 5_000_000)


def flipped_bits(corpora: Path) -> None:
    with (corpora / "wordnet.zip").open("r+b") as file:
        file.seek(3_000_000)
        file.write(bytes(100))


def another_zip(corpora: Path) -> None:
    with zipfile.ZipFile(corpora / "wordnet.zip", "w") as packed:
        packed.writestr("README", "no WordNet")


def unpacked(corpora: Path) -> Path:
    with zipfile.ZipFile(corpora / "wordnet.zip") as packed:
        packed.extractall(corpora)
    return corpora / "wordnet"


DAMAGE: dict[Callable[[Path], object], str] = {
    proxys_page: "wordnet.zip is damaged: File is not a zip file",
    broken_download: "wordnet.zip is damaged: File is not a zip file",
    flipped_bits: "wordnet.zip is damaged",
    another_zip: "wordnet.zip is incomplete",
    lambda corpora: (unpacked(corpora) / "index.noun").unlink(): "wordnet is incomplete",
    lambda corpora: (unpacked(corpora) / "noun.exc").write_bytes(b""): "noun.exc is cut short",
    lambda corpora: cut(unpacked(corpora) / "data.noun", 15_000_000): "data.noun is cut short",
    lambda corpora: cut(unpacked(corpora) / "index.noun", 4_000_000): "index.noun is cut short",
    lambda corpora: (corpora / "wordnet").mkdir(): "wordnet is incomplete",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordNet as NLTK downloads it."""
    archive = tmp_path_factory.mktemp("packed") / "wordnet.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name in corpus.FILES:
            file.write(system_wordnet() / name, f"wordnet/{name}")
    return archive


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_wordnet_is_passed_over_by_name_for_a_whole_one(
    damage: Callable[[Path], object],
    packed: Path,
    alone: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    corpora = tmp_path / "first/corpora"
    corpora.mkdir(parents=True)
    shutil.copy(packed, corpora)
    damage(corpora)
    if (corpora / "wordnet").exists():
        (corpora / "wordnet.zip").unlink()
    alone.setenv("NLTK_DATA", str(tmp_path / "first"))
    with pytest.raises(SdwnError) as error:
        require_corpus()
    assert DAMAGE[damage] in str(error.value)
    (tmp_path / "second/corpora").mkdir(parents=True)
    shutil.copy(packed, tmp_path / "second/corpora")
    alone.setenv("NLTK_DATA", f"{tmp_path}/first{os.pathsep}{tmp_path}/second")
    assert require_corpus() == tmp_path / "second/corpora/wordnet.zip"
    (told,) = caplog.messages
    assert DAMAGE[damage] in told
    assert "second/corpora/wordnet.zip" in told
