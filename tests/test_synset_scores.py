"""WordNet's distances and scopes against NLTK's own, and what is computed with them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.corpus.reader.wordnet import Synset as NltkSynset
from sdwn.errors import SdwnError
from sdwn.evaluation.metrics import confusion_pairs, score_synsets, summarise_scores
from sdwn.wordnet.corpus import LARGER, Synset, WordNet, class_index, class_wnids, open_wordnet
from sdwn.wordnet.taxonomy import Taxonomy, nearest_subtrees

# Classes, what lies above and below them, and what is far from all.
NAMES = ("tabby.n.01", "cat.n.01", "robin.n.01", "dog.n.01", "puppy.n.01", "library.n.01")
LABELS = [class_index()[wnid] for wnid in ("n02123045", "n02088364", "n03642806", "n01558993")]


@pytest.fixture(scope="module")
def taxonomy(wordnet: WordNet) -> Taxonomy:
    return Taxonomy()


def nltks(wordnet: WordNet, wnid: str) -> NltkSynset:
    return wordnet._reader.synset_from_pos_and_offset("n", int(wnid[1:]))


def test_distances_are_nltks(
    wordnet: WordNet, taxonomy: Taxonomy, paper: tuple[Synset, ...]
) -> None:
    drawn = random.Random(0)
    for synset in drawn.sample(paper, 150):
        wnid = drawn.choice(class_wnids())
        expected = nltks(wordnet, synset.wnid).shortest_path_distance(nltks(wordnet, wnid))
        assert taxonomy.distance(synset.wnid, wnid) == expected, (synset.name, wnid)
        assert taxonomy.distance(wnid, synset.wnid) == expected


def test_scopes_of_known_synsets(wordnet: WordNet, taxonomy: Taxonomy) -> None:
    names = {name: wordnet.synset(name).wnid for name in ("robin.n.01", "dog.n.01", "tabby.n.01")}
    found = nearest_subtrees(taxonomy, names.values(), class_wnids())
    robin, dog, tabby = (found[wnid] for wnid in names.values())
    # ImageNet has only the American robin, another synset below thrush.
    assert (taxonomy.synset(robin.wnid).name, robin.steps) == ("thrush.n.03", 1)
    assert (dog.wnid, dog.steps, len(dog.classes)) == (names["dog.n.01"], 0, 118)
    assert tabby.classes == (class_index()[names["tabby.n.01"]],)


def test_a_list_of_more_classes_makes_scopes_smaller(wordnet: WordNet, taxonomy: Taxonomy) -> None:
    robin = wordnet.synset("robin.n.01").wnid
    classes = class_wnids(21843)
    found = nearest_subtrees(taxonomy, [robin], classes)[robin]
    assert (found.wnid, [classes[i] for i in found.classes]) == (robin, [robin])


def test_lists_of_more_classes_are_timms() -> None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    for size in (1000, *LARGER):
        names = ImageNetInfo(infer_imagenet_subset({"num_classes": size})).label_names()
        assert class_wnids(size) == tuple(names)
    with pytest.raises(SdwnError, match="no list of 37 ImageNet classes; known are those of 1000,"):
        class_wnids(37)


def table(rows: list[tuple[str, int, float | None]]) -> pa.Table:
    """Make predictions of (wnid, best class, probability of the scope)."""
    index = class_index()
    return pa.table(
        {
            "wnid": [wnid for wnid, *_ in rows],
            "imagenet_class": pa.array([index.get(wnid) for wnid, *_ in rows], pa.int16()),
            "top5": pa.array([[best, 0, 1, 2, 3] for _, best, _ in rows], pa.list_(pa.int16())),
            "subtree_probability": pa.array([mass for *_, mass in rows], pa.float32()),
        }
    )


@st.composite
def drawn_rows(draw: st.DrawFn) -> list[tuple[str, int, float]]:
    wnids = [open_wordnet().synset(name).wnid for name in NAMES]
    row = st.tuples(st.sampled_from(wnids), st.sampled_from(LABELS), st.floats(0, 1, width=32))
    return draw(st.lists(row, min_size=1, max_size=30))


def hypernyms(synset: NltkSynset) -> Iterator[NltkSynset]:
    yield from (one for path in synset.hypernym_paths() for one in path)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@settings(max_examples=40, deadline=None)
@given(drawn_rows())
def test_scores_agree_with_a_plain_reference(rows: list[tuple[str, int, float]]) -> None:
    wordnet = open_wordnet()
    found = score_synsets(table(rows), Taxonomy(), class_wnids())
    assert [row["wnid"] for row in found] == sorted({wnid for wnid, *_ in rows})
    for row in found:
        own = [(best, mass) for wnid, best, mass in rows if wnid == row["wnid"]]
        synset = nltks(wordnet, row["wnid"])
        seen = [nltks(wordnet, class_wnids()[best]) for best, _ in own]
        steps = [synset.shortest_path_distance(one) for one in seen]
        top = nltks(wordnet, row["scope_wnid"])
        assert row["images"] == len(own)
        assert row["subtree_probability"] == pytest.approx(
            mean([mass for _, mass in own]), abs=1e-6
        )
        assert row["inside"] == sum(top in hypernyms(one) for one in seen)
        assert row["distance"] == pytest.approx(mean(steps))
        misses = [count for count in steps if count]
        assert row["miss_distance"] == (pytest.approx(mean(misses)) if misses else None)
        assert row["least_distance"] <= min(steps)


def test_the_nearest_class_is_found_also_where_it_is_a_hypernym(wordnet: WordNet) -> None:
    least = {"tabby.n.01": 0, "cat.n.01": 2, "dog.n.01": 1}
    rows = [(wordnet.synset(name).wnid, 0, 0.5) for name in least]
    found = {row["wnid"]: row for row in score_synsets(table(rows), Taxonomy(), class_wnids())}
    for name, steps in least.items():
        synset = wordnet.synset(name)
        nearest = min(
            nltks(wordnet, synset.wnid).shortest_path_distance(nltks(wordnet, wnid))
            for wnid in class_wnids()
        )
        assert found[synset.wnid]["least_distance"] == nearest == steps


def test_summaries_by_hand(wordnet: WordNet) -> None:
    dog, robin = wordnet.synset("dog.n.01").wnid, wordnet.synset("robin.n.01").wnid
    beagle, tabby = class_index()["n02088364"], class_index()["n02123045"]
    rows = [(dog, beagle, 0.75), (dog, tabby, 0.25), (robin, beagle, 0.0), (robin, tabby, 0.5)]
    found = summarise_scores(score_synsets(table(rows), Taxonomy(), class_wnids()))
    own, nearest = found["own"], found["nearest"]
    assert (own["synsets"], own["images"], own["subtree_probability"]) == (1, 2, 0.5)
    assert (own["chance"], own["inside_percent"]) == (0.118, 50)
    assert set(own["intervals"].values()) == {None}
    assert (nearest["subtree_probability"], nearest["inside_percent"]) == (0.25, 0)
    assert (
        summarise_scores(score_synsets(table(rows[:2]), Taxonomy(), class_wnids()))["nearest"]
        is None
    )


def test_a_probability_that_is_not_known_is_none_and_no_nan(wordnet: WordNet) -> None:
    dog = wordnet.synset("dog.n.01").wnid
    found = score_synsets(table([(dog, 0, 0.5), (dog, 0, None)]), Taxonomy(), class_wnids())
    assert found[0]["subtree_probability"] is None
    own: dict[str, Any] = summarise_scores(found)["own"] or {}
    assert (own["subtree_probability"], own["intervals"]["subtree_probability"]) == (None, None)


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1))
def test_confusions_agree_with_a_plain_reference(pairs: list[tuple[int, int]]) -> None:
    names = class_wnids()
    found = confusion_pairs(
        table([(names[label], best, 0.5) for label, best in pairs]), class_wnids()
    )
    wrong = Counter((names[label], names[best]) for label, best in pairs if label != best)
    images = Counter(names[label] for label, _ in pairs)
    assert {(row["wnid"], row["predicted_wnid"]): row["times"] for row in found} == wrong
    assert all(row["images"] == images[row["wnid"]] for row in found)
    order = [(-row["times"], row["wnid"], row["predicted_wnid"]) for row in found]
    assert order == sorted(order)
