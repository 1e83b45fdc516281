"""What the pages of `sdwn browse` are made of: synsets, predictions, WordNet's tree, views."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sdwn.browser.collection import Entry, ImageView
from sdwn.browser.library import BESIDE, KINDS, ORDERS, PAGE, PREVIEW, Library, View
from sdwn.browser.pages import url
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.record import read_evaluation
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.generation.batching import NoiseSampler, Sample
from sdwn.generation.task import make_shards
from sdwn.io import content_digest
from sdwn.measures.record import SCORES, score_table
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Concept, ImageSpec, make_plan, write_plan
from sdwn.prediction.table import open_features
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet, class_wnids, read_catalog
from sdwn.wordnet.taxonomy import Taxonomy

from conftest import hide_wordnet, noise_config
from drawn import draw_features, draw_scores, evaluation, predictions

ZEBRA, TABBY, CORGI, PUG = "n02391049", "n02123045", "n02113023", "n02110958"
DOG, NILE, RIVER, CANINE = "n02084071", "n09371360", "n09411430", "n02083346"
# Few classes of ImageNet: laying out five for a map would import sklearn.
NAMED = (ZEBRA, TABBY, CORGI, PUG, DOG, NILE)
SYNSETS, EACH = 52, 4


class Blackens(NoiseSampler):
    """Finds something in the last image of each dog."""

    def sample(self, specs: Sequence[ImageSpec]) -> list[Sample]:
        samples = super().sample(specs)
        return [
            replace(sample, status="nsfw")
            if (spec.concept.wnid, spec.number) == (DOG, 3)
            else sample
            for spec, sample in zip(specs, samples, strict=True)
        ]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    """More synsets than a page shows; all judged, and in an older evaluation only the classes."""
    folder = tmp_path_factory.mktemp("zoo")
    below = sorted(synset.wnid for synset in wordnet.below("carnivore.n.01"))
    others = [wnid for wnid in below if wnid not in (*NAMED, *class_wnids())]
    (folder / "list.txt").write_text("\n".join([*NAMED, *others[: SYNSETS - len(NAMED)]]))
    config = noise_config(catalog={"file": folder / "list.txt"}, images_per_synset=EACH)
    plan, run = make_plan(config, read_catalog(config.catalog, wordnet)), RunPaths(folder / "run")
    write_plan(plan, run, wordnet=wordnet)
    make_shards(run, plan, plan.shards, Blackens(config))
    release = merge([run], ReleasePaths(folder / "zoo"))
    chances = {ZEBRA: 1.0, PUG: 0.0}
    every = predictions(release, lambda wnid: chances.get(wnid, 0.5), every=True)
    evaluation(release, every, "whole", EvaluationConfig(images="all"), model="vit")
    aged(evaluation(release, predictions(release, seed=1), "classes").evaluation)
    numbers = np.array(release.metadata["number"])
    vectors = np.random.default_rng(0).normal(size=(len(release), 8))
    draw_features(release, vectors, clip_score=clip_scores(len(release)))
    draw_scores(
        release,
        # The first two images of each synset are the same.
        duplicate_group=[row // EACH if row % EACH < 2 else None for row in range(len(release))],
        duplicate_of_better=numbers == 1,
    )
    return release


def clip_scores(count: int) -> list[float | None]:
    """Scores of which one in seven is not known, and the first is a round number."""
    drawn = np.random.default_rng(0).normal(25, 4, count).astype(np.float32).tolist()
    return [None if row % 7 == 3 else drawn[row] if row else 25.0 for row in range(count)]


def aged(path: Path) -> None:
    os.utime(path, (0, 0))


@pytest.fixture(scope="module")
def library(zoo: Release) -> Library:
    return Library(zoo.paths.root)


@pytest.fixture
def copied(zoo: Release, tmp_path: Path) -> ReleasePaths:
    return ReleasePaths(Path(shutil.copytree(zoo.paths.root, tmp_path / "copied")))


def record_rows(library: Library) -> list[dict[str, Any]]:
    """All that is recorded of each image, and of its prediction."""
    rows = library.release.metadata.to_pylist()
    predictions = library.predictions
    assert predictions is not None
    path = library.release.paths.evaluation(predictions.name).predictions
    said = {(row["wnid"], row["number"]): row for row in table_rows(path)}
    return [{**row, **said.get((row["wnid"], row["number"]), {})} for row in rows]


def table_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


# The collection and what was said of it


def test_synsets_are_those_with_images_by_name_and_hold_what_the_tables_say(
    library: Library, zoo: Release
) -> None:
    rows = zoo.metadata.to_pylist()
    synsets = library.collection.entries
    assert [entry.concept.synset for entry in synsets] == sorted({row["synset"] for row in rows})
    assert [entry.position for entry in synsets] == list(range(SYNSETS))
    for entry in synsets:
        own, planned = [row for row in rows if row["wnid"] == entry.id], zoo.concepts[entry.id]
        assert library.collection.by_id[entry.id] is entry
        assert ", ".join(entry.lemmas) == planned.lemmas.replace("_", " ")
        assert entry.concept.definition == planned.definition
        assert entry.concept.imagenet_class == planned.imagenet_class
        assert {entry.prompt} == {row["prompt"] for row in own}
        assert entry.images == len(own)
        assert entry.black == sum(row["status"] == "nsfw" for row in own)
        found = [(image.number, zoo.row(image.row)) for image in library.images(entry.id)]
        assert found == [(row["number"], row) for row in sorted(own, key=lambda r: r["number"])]
    assert RIVER not in library.collection.by_id
    assert Entry(0, Concept("mine", prompts=("one", "two")), 2, 0).prompt is None, "of several"


def test_an_image_carries_what_the_classifier_said(library: Library) -> None:
    for row in record_rows(library):
        image = library.image(row["wnid"], row["number"])
        assert image is not None
        assert (image.entry.concept.synset, image.status) == (row["synset"], row["status"])
        assert [guess.wnid for guess in image.top5] == [class_wnids()[i] for i in row["top5"]]
        assert [guess.probability for guess in image.top5] == row["top5_probability"]
        assert image.rank == row["label_rank"]
        assert image.correct == (None if row["label_rank"] is None else row["label_rank"] == 0)
        assert image.subtree_probability == row["subtree_probability"]
        assert image.state == expected_state(row)
    assert library.image(DOG, EACH) is None


def expected_state(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return "black"
    if row["label_rank"] is None:
        return "other"
    return "wrong" if row["label_rank"] else "right"


def test_a_guess_is_named_as_people_do(library: Library) -> None:
    image = library.image(ZEBRA, 0)
    assert image is not None
    assert image.top5[0].name == "zebra"


def test_the_newest_evaluation_is_taken_or_the_one_that_is_named(
    library: Library, zoo: Release
) -> None:
    assert library.evaluations == ["whole", "classes"]
    assert library.refused == {}
    predictions = library.predictions
    assert predictions is not None
    assert (predictions.name, predictions.model) == ("whole", "vit")
    older = Library(zoo.paths.root, "classes")
    assert older.predictions is not None
    assert older.predictions.name == "classes"
    assert np.count_nonzero(older.predictions.best < 0) == EACH * (SYNSETS - 4)
    dog = older.image(DOG, 0)
    assert dog is not None
    assert (dog.top5, dog.state) == ((), "unjudged")
    with pytest.raises(UsageError, match="no evaluation 'new'; there is whole, classes"):
        Library(zoo.paths.root, "new")


@pytest.mark.parametrize("show", ["right", "wrong"])
def test_right_and_wrong_are_as_many_as_the_evaluation_counts(
    library: Library, zoo: Release, show: str
) -> None:
    record = read_evaluation(zoo, zoo.paths.evaluation("whole"))
    correct = sum(row["correct"] for row in record["classes"])
    images = record["figures"]["images"]
    expected = correct if show == "right" else images - correct
    assert 0 < library.select(View(show=show)).total_images == expected


def test_what_is_damaged_or_of_another_release_is_not_offered_and_says_why(
    copied: ReleasePaths,
) -> None:
    whole, classes = copied.evaluation("whole"), copied.evaluation("classes")
    shutil.copytree(classes.root, copied.evaluation("sound").root)
    forged = Path(
        shutil.copytree(classes.root, copied.evaluation("forged").root), "evaluation.json"
    )
    record = {n: x for n, x in json.loads(forged.read_text()).items() if n != "groups"}
    forged.write_text(json.dumps({**record, "digest": content_digest(record)}))
    whole.evaluation.write_text(whole.evaluation.read_text().replace('"vit"', '"wit"'))
    classes.predictions.write_bytes(classes.predictions.read_bytes()[:-1])
    library = Library(copied.root)
    assert library.evaluations == ["sound"]
    assert library.predictions is not None
    assert library.refused["forged"].startswith(f"{forged}: damaged: KeyError: 'groups'; evaluate")
    assert "altered since it was written" in library.refused["whole"]
    assert "changed (its SHA-256 is not the recorded one)" in library.refused["classes"]
    with pytest.raises(IntegrityError, match="altered since it was written"):
        Library(copied.root, "whole")
    copied.manifest.write_text(copied.manifest.read_text() + "\n")
    library = Library(copied.root)
    assert (library.evaluations, library.predictions, library.groups) == ([], None, {})
    assert "of another release; evaluate the release again" in library.refused["sound"]
    assert library.select(View(q="zebra")).total_images == EACH


# The tree


@pytest.fixture(scope="module")
def above(zoo: Release, wordnet: WordNet) -> dict[str, set[str]]:
    """Map each synset to the release's synsets at or below it, by NLTK."""
    taxonomy, found = Taxonomy(), dict[str, set[str]]()
    for entry in zoo.present:
        for wnid in taxonomy.above(entry.id):
            found.setdefault(wnid, set()).add(entry.id)
    return found


def test_each_node_counts_the_set_of_synsets_at_or_below_it(
    library: Library, above: dict[str, set[str]], wordnet: WordNet
) -> None:
    tree, rows = library.tree, record_rows(library)
    assert tree is not None
    for wnid, below in above.items():
        node, own = tree.node(wnid), [row for row in rows if row["wnid"] in below]
        assert node is not None
        assert (node.concepts, node.images) == (len(below), EACH * len(below))
        judged = [row["label_rank"] for row in own if row["label_rank"] is not None]
        assert (node.labelled, node.correct) == (len(judged), judged.count(0))
        assert node.black == sum(row["status"] == "nsfw" for row in own)
        assert node.rate == (judged.count(0) / len(judged) if judged else None)
        assert node.parents == wordnet.synset(wnid).parents
        names = [child.label for child in map(tree.node, node.children) if child]
        assert names == sorted(names)
        assert set(node.children) == {one for one in above if wnid in wordnet.synset(one).parents}
        assert node.definition == wordnet.synset(wnid).definition
        found = {
            entry.id for entry in library.collection.entries if tree.below(wnid)[entry.position]
        }
        assert found == below
    assert tree.node("n00007846") is None
    assert not tree.below("n00007846").any()
    # Two ways lead to the dog, and an instance lies below what it is one of.
    assert {CANINE, "n01317541"} == set(wordnet.synset(DOG).parents)
    assert above[RIVER] == {NILE}


def test_a_node_has_a_name_for_people_and_wordnets(library: Library) -> None:
    tree = library.tree
    assert tree is not None
    named = {node.label: node.name for node in tree.nodes([DOG, RIVER, "n00015388"])}
    assert named == {"dog": "dog.n.01", "river": "river.n.01", "animal": "animal.n.01"}


def test_the_root_is_the_lowest_that_holds_all_and_breadcrumbs_begin_there(
    library: Library, above: dict[str, set[str]], wordnet: WordNet
) -> None:
    tree = library.tree
    assert tree is not None
    whole = {wnid for wnid, below in above.items() if len(below) == SYNSETS}
    lowest = [w for w in whole if not any(w in wordnet.synset(other).parents for other in whole)]
    assert [tree.root] == lowest
    way = [node.wnid for node in tree.path(DOG)]
    assert (way[0], way[-1]) == (tree.root, DOG)
    assert all(up in wordnet.synset(down).parents for up, down in pairwise(way))
    # By canine it would be four steps more.
    assert [node.label for node in tree.path(DOG)][-3:-1] == ["animal", "domestic animal"]
    assert [node.wnid for node in tree.path(tree.root)] == [tree.root]
    assert tree.path("n00001740")[0].wnid == "n00001740"
    assert tree.path("n00007846") == []


def test_a_release_of_before_there_was_a_taxonomy_has_the_same_tree(
    copied: ReleasePaths, library: Library
) -> None:
    copied.taxonomy.unlink()
    old, new = Library(copied.root).tree, library.tree
    assert old is not None
    assert new is not None
    assert old.root == new.root
    assert [old.node(wnid) for wnid in (*NAMED, old.root)] == [
        new.node(wnid) for wnid in (*NAMED, new.root)
    ]


def test_without_taxonomy_and_wordnet_all_but_the_tree_is_there(
    copied: ReleasePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied.taxonomy.unlink()
    hide_wordnet(monkeypatch, tmp_path)
    library = Library(copied.root)
    assert library.tree is None
    assert "expected WordNet 3.0 (wnids are its offsets), found no" in str(library.tree_missing)
    assert library.select(View(q="dog", show="ok")).total_concepts
    with pytest.raises(UsageError, match=r"below=n02084071: expected WordNet 3\.0"):
        library.select(View(below=DOG))


# Views


def everything(library: Library, view: View) -> list[ImageView]:
    """Collect what all pages of a view show."""
    first = library.select(view)
    numbers = range(1, first.pages + 1)
    pages = [library.select(view.model_copy(update={"page": page})) for page in numbers]
    hits = [hit for page in pages for hit in page.hits]
    assert len({entry.id for entry, *_ in hits}) == len(hits) == first.total_concepts
    images = [image for *_, previews in hits for image in previews]
    assert len(images) == first.total_images == sum(count for _, count, _ in hits)
    assert images == list(library.all_images(view))
    return images


TAKEN = {
    "all": lambda row: True,
    "right": lambda row: row["label_rank"] == 0,
    "wrong": lambda row: bool(row["label_rank"]),
    "black": lambda row: row["status"] == "nsfw",
    "ok": lambda row: row["status"] == "ok",
    "unjudged": lambda row: row["label_rank"] is None,
    "duplicates": lambda row: row["number"] < 2,
}


@pytest.mark.parametrize("show", KINDS)
def test_a_view_shows_the_images_that_it_says(library: Library, show: str) -> None:
    rows = [row for row in record_rows(library) if TAKEN[show](row)]
    assert rows
    rows.sort(key=lambda row: (row["synset"], row["number"]))
    expected = [(row["wnid"], row["number"]) for row in rows]
    images = everything(library, View(show=show))
    assert [(image.entry.id, image.number) for image in images] == expected
    some = library.images(DOG, View(show=show))
    assert [image.number for image in some] == [number for wnid, number in expected if wnid == DOG]


def test_filters_hold_together(library: Library) -> None:
    def wnids(**changes: Any) -> set[str]:
        return {image.entry.id for image in everything(library, View(**changes))}

    assert wnids(imagenet=True) == {ZEBRA, TABBY, CORGI, PUG}
    assert wnids(below=DOG, imagenet=True) == {CORGI, PUG}
    assert wnids(below=DOG, imagenet=True, show="right") <= {CORGI}
    assert wnids(below=RIVER) == {NILE}
    assert wnids(below="n00007846") == set()
    assert library.groups["animals"] == "n00015388"
    assert wnids(group="animals", q="river") == set()
    assert NILE not in wnids(group="animals")
    assert wnids(below=DOG, q="welsh") >= {CORGI}


def test_images_that_were_taken_for_a_class(library: Library) -> None:
    rows = record_rows(library)
    taken = Counter(class_wnids()[row["top5"][0]] for row in rows)
    wnid = taken.most_common(1)[0][0]
    images = everything(library, View(seen=wnid))
    assert len(images) == taken[wnid]
    assert all(image.top5[0].wnid == wnid for image in images)


def test_orders(library: Library) -> None:
    def names(order: str, **changes: Any) -> list[str]:
        images = everything(library, View(order=order, **changes))
        return list(dict.fromkeys(image.entry.id for image in images))

    classes = names("rate", imagenet=True)
    assert (classes[0], classes[-1]) == (PUG, ZEBRA)
    assert names("-rate")[0] == ZEBRA
    # What was not judged is last either way.
    assert set(names("rate")[:4]) == set(names("-rate")[:4]) == set(classes)
    by_name = names("name", q="dog")
    assert names("best", q="dog")[0] == DOG
    assert by_name == sorted(by_name, key=lambda wnid: entry_name(library, wnid))
    assert names("name") == names("best") == names("images")


def scored(library: Library, name: str, show: str = "all") -> dict[tuple[str, int], Any]:
    """Every image's value of a score that is not null, from the table of all scores."""
    table = score_table(library.release).to_pylist()
    rows = zip(record_rows(library), table, strict=True)
    return {
        (row["wnid"], row["number"]): one[name]
        for row, one in rows
        if one[name] is not None and TAKEN[show](row)
    }


INSIDE: dict[tuple[str, str], Callable[[Any], bool]] = {
    ("clip_score", "25.."): lambda value: value >= 25,
    ("clip_score", "..25"): lambda value: value < 25,
    ("clip_score", "2e1..25.0"): lambda value: 20 <= value < 25,
    ("clip_score", ".."): lambda value: True,
    ("correct_top5", "yes"): lambda value: value,
    ("duplicate_of_better", "no"): lambda value: not value,
    ("duplicate_group", "7..8"): lambda value: value == 7,
}


@pytest.mark.parametrize(("score", "span"), INSIDE)
def test_a_score_leaves_the_images_in_a_span(library: Library, score: str, span: str) -> None:
    found = scored(library, score)
    expected = {key for key, value in found.items() if INSIDE[score, span](value)}
    images = everything(library, View.parse({score: span}))
    assert {(image.entry.id, image.number) for image in images} == expected
    assert 0 < len(expected) <= len(found)


@pytest.mark.parametrize("score", ["clip_score", "duplicate_of_better", "duplicate_group"])
def test_the_spans_that_are_offered_say_how_many_images_they_leave(
    library: Library, score: str
) -> None:
    narrowed = {"show": "right", "correct_top5": "yes"}
    # The span that is chosen already leaves the others their images.
    spans = library.select(View.parse({**narrowed, "by": score, score: ".."})).spans
    for span, images in spans.items():
        assert library.select(View.parse({**narrowed, score: span})).total_images == images
    assert sum(spans.values()) == len(scored(library, score, "right"))
    assert library.select(View(by="nearest_real")).spans == {}, "which no image here has"


def test_concepts_go_by_the_mean_of_a_score_and_their_images_by_it(library: Library) -> None:
    scores = scored(library, "clip_score")
    of_concept: dict[str, list[float]] = {}
    for (wnid, _), value in scores.items():
        of_concept.setdefault(wnid, []).append(value)
    for order, sign in (("-clip_score", -1), ("clip_score", 1)):
        images = everything(library, View(order=order))
        means = [np.mean(of_concept[id_]) for id_ in dict.fromkeys(i.entry.id for i in images)]
        assert np.all(np.diff(means) * sign >= 0)
        for entry in library.collection.entries:
            found = library.images(entry.id, View(order=order))
            values = [scores.get((entry.id, image.number)) for image in found]
            known = [value for value in values if value is not None]
            assert values == [*sorted(known, reverse=sign < 0), *[None] * (EACH - len(known))]


def test_scores_are_offered_in_the_order_of_their_table(library: Library) -> None:
    assert list(library.scores) == [
        *("correct", "correct_top5", "label_probability", "subtree_probability", "confidence"),
        *("clip_score", "duplicate_group", "duplicate_of_better"),
    ]


def test_the_score_of_classifying_orders_as_the_rate_does(library: Library) -> None:
    rates = library.values("correct")
    expected = [
        correct / of if of else np.nan
        for correct, of in map(library.tally, library.collection.entries)
    ]
    np.testing.assert_array_equal(rates, expected)


def test_images_beside_an_image_are_its_duplicates_and_those_of_near_features(
    library: Library,
) -> None:
    vectors = open_features(library.release).vectors.astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in (0, 5, 200):
        expected = [one for one in np.argsort(-vectors @ vectors[row]) if one != row][:BESIDE]
        found = library.similar(row, "drawn")
        assert [image.row for image, _ in found] == expected
        likeness = [similarity for _, similarity in found]
        np.testing.assert_allclose(likeness, vectors[expected] @ vectors[row], atol=1e-3)
        twin = {0: [1], 1: [0]}.get(row % EACH, [])
        assert [image.row % EACH for image, _ in library.duplicates(row)] == twin


def test_a_release_without_scores_offers_none(imported: Release) -> None:
    library = Library(imported.paths.root)
    assert (library.scores, library.features) == ({}, [])
    assert library.duplicates(0) == []
    with pytest.raises(UsageError, match=r"clip_score=20\.\.: no such score of these images"):
        library.select(View.parse({"clip_score": "20.."}))
    assert library.select(View(order="clip_score")).total_concepts == 2


def entry_name(library: Library, wnid: str) -> str:
    entry = library.collection.by_id[wnid]
    return entry.concept.synset


def test_pages_have_so_many_synsets_and_the_last_is_shown_for_one_beyond(library: Library) -> None:
    first, last = library.select(View()), library.select(View(page=9))
    assert (len(first.hits), first.page, first.pages) == (PAGE, 1, 2)
    assert (len(last.hits), last.page, last.pages) == (SYNSETS - PAGE, 2, 2)
    nothing = library.select(View(q="qqqqqqq", page=3))
    assert (nothing.hits, nothing.total_images, nothing.page, nothing.pages) == ([], 0, 1, 1)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(group="toys"), "group='toys': no such group; there is animals, "),
        (View(seen=DOG), f"seen={DOG}: expected a class that is evaluated"),
    ],
)
def test_what_there_is_not_is_explained(library: Library, view: View, message: str) -> None:
    for ask in (library.select, library.all_images):
        with pytest.raises(UsageError, match=message):
            ask(view)


WNIDS = st.none() | st.integers(0, 10**8 - 1).map("n{:08d}".format)
VIEWS = st.builds(
    View,
    q=st.text(max_size=50).map(lambda text: View.parse({"q": text}).q),
    show=st.sampled_from(tuple(KINDS)),
    group=st.none() | st.sampled_from(["animals", "Möbel & <b>"]),
    imagenet=st.booleans(),
    below=WNIDS,
    seen=WNIDS,
    order=st.sampled_from(tuple(ORDERS)),
    by=st.none() | st.sampled_from(tuple(SCORES)),
    page=st.integers(1, 10**9 - 1),
)
SPANS = st.sampled_from(["yes", "no", "..", "-1..", "..0.5", "1e-3..2"])


def parsed(address: str) -> View:
    return View.parse(dict(parse_qsl(urlsplit(address).query)))


@settings(max_examples=25, deadline=None)
@given(VIEWS, st.dictionaries(st.sampled_from(tuple(SCORES)), SPANS, max_size=3))
def test_every_view_is_one_address(view: View, spans: dict[str, str]) -> None:
    view = view.model_copy(update=spans)
    assert parsed(url(**view.parameters())) == view
    black = view.model_copy(update={"show": "black", "page": 1})
    assert parsed(url(**view.parameters(show="black"))) == black
    for name in spans:
        assert parsed(url(**view.parameters(**{name: None}))).model_extra == {
            other: span for other, span in spans.items() if other != name
        }


NAMES = st.sampled_from([*View.model_fields, "clip_score", "least", "most", "x"])
VALUES = st.text() | st.sampled_from(
    ["1", "0", "wrong", "rate", DOG, "n²", "-1", "clip_score", "1..", "no", "\u0661", "9" * 99]
)


@given(st.dictionaries(NAMES, VALUES))
def test_any_address_is_a_view_or_says_what_it_should_be(params: dict[str, str]) -> None:
    try:
        view = View.parse(params)
    except UsageError as error:
        said = str(error)
        named = said.partition(":")[0]
        told = (named in params or named == params.get("by")) and len(said) < 200
    else:
        told = True
        assert view.show in KINDS
        assert view.order in ORDERS
        assert 1 <= view.page < 10**9
        url(**view.parameters()).encode("ascii")
    assert told


# Releases of other kinds


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Pictures without prompts: many of one synset, one of them black."""
    source = tmp_path_factory.mktemp("bare") / "pictures"
    for wnid, count in ((DOG, 2 * PREVIEW), (ZEBRA, 1)):
        (source / wnid).mkdir(parents=True)
        for number in range(count):
            colour = (number, 9, 9) if number else (0, 0, 0)
            Image.new("RGB", (8, 8), colour).save(source / wnid / f"{3 * number}.png")
    target = ReleasePaths(source.parent / "imported")
    return import_images(list_source(source), target, ImportOptions("imagefolder")).release


def test_imported_pictures_can_be_browsed(imported: Release) -> None:
    library = Library(imported.paths.root)
    assert (library.predictions, library.evaluations, library.groups) == (None, [], {})
    dog = library.collection.by_id[DOG]
    assert (dog.prompt, dog.images, dog.black) == (None, 2 * PREVIEW, 1)
    page = library.select(View(q="dog"))
    ((entry, images, previews),) = page.hits
    assert (entry.id, images) == (DOG, 2 * PREVIEW)
    assert [image.number for image in previews] == [3 * n for n in range(PREVIEW)]
    assert len(list(library.all_images(View(q="dog")))) == page.total_images == 2 * PREVIEW
    assert {image.state for image in library.images(DOG)} == {"black", "unjudged"}
    image = library.image(DOG, 6)
    assert image is not None
    assert imported.row(image.row)["file"] == f"{DOG}/6.png"
    assert library.image(DOG, 5) is None
    assert library.select(View(show="unjudged")).total_images == 2 * PREVIEW + 1
    assert library.select(View(show="wrong")).total_images == 0
    assert library.tree is not None
    node = library.tree.node(library.tree.root)
    assert node is not None
    assert (node.label, node.images, node.rate) == ("placental", 2 * PREVIEW + 1, None)
    with pytest.raises(UsageError, match="expected a class that is evaluated"):
        library.select(View(seen=ZEBRA))
    assert [entry.concept.synset for entry, *_ in library.select(View(order="images")).hits] == [
        "dog.n.01",
        "zebra.n.01",
    ]
    assert library.select(View(order="rate")).total_concepts == 2


def test_threads_that_ask_at_once_get_what_one_gets(zoo: Release, library: Library) -> None:
    views = [View(q=q, show=show) for q in ("dog", "dgo", "small", "") for show in KINDS]
    expected = [library.select(view) for view in views]
    fresh = Library(zoo.paths.root)
    fresh.warm()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(fresh.select, views * 4)) == expected * 4
        assert fresh.tree is not None
        assert library.tree is not None
        assert list(pool.map(fresh.tree.path, [DOG] * 32)) == [library.tree.path(DOG)] * 32
