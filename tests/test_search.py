"""The search over a release: what is found for what people type, and that nothing breaks it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sdwn.browser.collection import Collection, SearchIndex
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.paths import ReleasePaths
from sdwn.wordnet.corpus import WordNet

SYNSETS = (
    *("dog.n.01", "frump.n.01", "cad.n.01", "kennel.n.01", "guide_dog.n.01", "hunting_dog.n.01"),
    *("golden_retriever.n.01", "labrador_retriever.n.01", "retriever.n.01", "fox.n.01"),
    *("zebra.n.01", "zebra_finch.n.01", "pedestrian_crossing.n.01", "glass.n.01", "glass.n.02"),
    *("spectacles.n.01", "wolf.n.01", "church.n.02", "pony.n.01", "fireman.n.04", "person.n.01"),
    *("saint_bernard.n.01", "cafe.n.01", "ax.n.01", "bus.n.01", "box.n.01", "brush.n.02"),
)
# As a list of synsets that was edited may have them.
LEMMAS = (
    "café",
    "ﬁne Straße",
    "喫茶店",
    "कैफ़े",
    'O\'Brien "quoted"',
    "<script>alert(1)</script>",
    "a NEAR b*",
)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Collection:
    source = tmp_path_factory.mktemp("searched") / "pictures"
    for place, name in enumerate(SYNSETS):
        folder = source / wordnet.synset(name).wnid
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (place, 8, 8)).save(folder / "0.png")
    target = ReleasePaths(source.parent / "imported")
    release = import_images(list_source(source), target, ImportOptions("imagefolder")).release
    table = pq.read_table(target.concepts(0))
    lemmas = table["lemmas"].to_pylist()
    lemmas[lemmas.index("cafe, coffeehouse, coffee_shop, coffee_bar")] = ", ".join(LEMMAS)
    at = table.column_names.index("lemmas")
    pq.write_table(table.set_column(at, "lemmas", pa.array(lemmas)), target.concepts(0))
    return Collection(release)


@pytest.fixture(scope="module")
def index(collection: Collection) -> SearchIndex:
    return SearchIndex(collection)


def names(index: SearchIndex, collection: Collection, text: str) -> list[str]:
    return [collection.entries[i].concept.synset for i in index.search(text)[0].tolist()]


@pytest.mark.parametrize(
    ("text", "best"),
    [
        # Called so, by an earlier lemma first; then begun so, in a lemma, in a gloss.
        ("dog", ["dog.n.01", "frump.n.01", "cad.n.01", "kennel.n.01"]),
        ("zebra", ["zebra.n.01", "zebra_finch.n.01", "pedestrian_crossing.n.01"]),
        ("ZEBRA_Fin", ["zebra_finch.n.01"]),
        ("retriever gold", ["golden_retriever.n.01", "labrador_retriever.n.01"]),
        ("glass", ["glass.n.01", "glass.n.02", "spectacles.n.01"]),
        ("glasses", ["spectacles.n.01", "glass.n.01", "glass.n.02"]),
        ("foxes", ["fox.n.01"]),
        ("ponies", ["pony.n.01"]),
        ("fire man", ["fireman.n.04"]),
        ("firemen", ["fireman.n.04"]),
        ("golden_retriever.n.01", ["golden_retriever.n.01"]),
        ("saint_bernard.n", ["saint_bernard.n.01"]),
        ("n02391049", ["zebra.n.01"]),
        ("N02099", ["golden_retriever.n.01", "labrador_retriever.n.01", "retriever.n.01"]),
        ("equine", ["zebra.n.01"]),
        ("striped african", ["zebra.n.01"]),
        # No synset has both: any will do.
        ("zebra pony", ["pony.n.01", "zebra.n.01", "zebra_finch.n.01"]),
        ("café", ["cafe.n.01"]),
        ("CAFE", ["cafe.n.01"]),
        ("fine strasse", ["cafe.n.01"]),
        ("喫茶", ["cafe.n.01"]),
        ("कैफ़े", ["cafe.n.01"]),
        ("o'brien", ["cafe.n.01"]),
        ("<script>", ["cafe.n.01"]),
        ("a near b*", ["cafe.n.01"]),
    ],
)
def test_what_is_called_so_comes_first(
    index: SearchIndex, collection: Collection, text: str, best: list[str]
) -> None:
    assert names(index, collection, text)[: len(best)] == best
    assert index.search(text)[1] is None


def test_a_lemmas_word_comes_before_a_glosss(index: SearchIndex, collection: Collection) -> None:
    found = names(index, collection, "dog")
    by_lemma, by_gloss = {"guide_dog.n.01", "hunting_dog.n.01"}, {"retriever.n.01"}
    assert max(map(found.index, by_lemma)) < min(map(found.index, by_gloss))


@pytest.mark.parametrize(
    ("text", "corrected", "best"),
    [
        ("zebre", "zebra", "zebra.n.01"),
        ("dgo", "dog", "dog.n.01"),
        ("goldn retreiver", "golden retriever", "golden_retriever.n.01"),
        ("labradro", "labrador", "labrador_retriever.n.01"),
        ("Spectcles", "spectacles", "spectacles.n.01"),
    ],
)
def test_typing_errors_are_forgiven_and_said(
    index: SearchIndex, collection: Collection, text: str, corrected: str, best: str
) -> None:
    assert index.search(text)[1] == corrected
    assert names(index, collection, text)[0] == best
    assert names(index, collection, text) == names(index, collection, corrected)


def test_each_letter_that_is_typed_finds_it_still(
    index: SearchIndex, collection: Collection
) -> None:
    for text in ("labrador retriever", "zebra finch", "spectacles"):
        wanted = names(index, collection, text)[0]
        for end in range(1, len(text) + 1):
            assert index.search(text[:end])[1] is None
            assert wanted in names(index, collection, text[:end])


def test_nothing_typed_is_everything_by_name(index: SearchIndex, collection: Collection) -> None:
    for text in ("", "  ", "\t\n"):
        assert names(index, collection, text) == [
            entry.concept.synset for entry in collection.entries
        ]


@pytest.mark.parametrize("text", ["qqqqqqqq", '"', "***", "😀", "x" * 10_000, "%", "\0", "犬"])
def test_what_is_nowhere_is_not_found(
    index: SearchIndex, collection: Collection, text: str
) -> None:
    assert names(index, collection, text) == []


SYNTAX = (
    *('"', "'", "*", "NEAR(dog fox, 2)", " AND ", " OR ", " NOT ", "lemmas:", "{said}", "^", "+"),
    *("\0", "dog", "zebre", "n02", ".n.01", "İ", "ß", "\u0301", "ﬁ", ";--", "a" * 999),
)


@settings(deadline=None)  # the first typing error imports what mends it
@given(st.text() | st.lists(st.sampled_from(SYNTAX), max_size=30).map("".join))
def test_any_text_is_safe(index: SearchIndex, text: str) -> None:
    found, corrected = index.search(text)
    positions = found.tolist()
    assert len(set(positions)) == len(positions)
    assert set(positions) <= set(range(len(SYNSETS)))
    if corrected is not None:
        assert index.search(corrected)[0].tolist() == positions
