"""Groups of classes by WordNet subtree: their file, and the table made of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sdwn import paths as shipped
from sdwn.errors import UsageError
from sdwn.evaluation.metrics import Group, group_figures, read_groups, smallest_groups
from sdwn.wordnet.corpus import Synset, WordNet, class_wnids
from sdwn.wordnet.taxonomy import Taxonomy

COUNTS = ("images", "correct", "correct_top5", "black")


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "groups.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_shipped_groups_hold_as_many_classes_as_the_file_says(
    wordnet: WordNet, paper: tuple[Synset, ...]
) -> None:
    groups = read_groups(None, Taxonomy())
    text = shipped.shipped_file("groups", "default").read_text()
    said = dict(re.findall(r"^([a-z ]+): .*?# +([0-9]+, +[0-9]+)", text, re.MULTILINE))
    assert said.keys() == {group.name for group in groups}
    catalog = {synset.wnid for synset in paper}
    for group in groups:
        below = {group.wnid, *(synset.wnid for synset in wordnet.below(group.wnid))}
        held = below & set(class_wnids())
        assert [len(held), len(held & catalog)] == [int(n) for n in said[group.name].split(",")]
        assert held & catalog, "a group without classes of the paper is no good default"


def test_any_synset_can_be_a_group_and_a_name_any_line(tmp_path: Path, wordnet: WordNet) -> None:
    text = '"Möbel, 家具; <b>": n03405725\n"=1+1": hound.n.01\n'
    assert read_groups(written(tmp_path, text), Taxonomy()) == (
        Group("Möbel, 家具; <b>", "n03405725", "furniture.n.01"),
        Group("=1+1", "n02087551", "hound.n.01"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of group names to synsets, found NoneType"),
        ("- dog.n.01", "expected a mapping of group names to synsets, found list"),
        ("{}", "expected at least one group, as in animals: animal.n.01"),
        ("dogs: dog.n.1000", "dogs: dog.n.1000: no such synset in WordNet 3.0"),
        ("dogs: run.v.01", "dogs: run.v.01: not a noun"),
        ("dogs: n00000001", "dogs: n00000001: no such synset"),
        ("dogs:", "dogs: None: no such synset"),
        ("dogs: dog.n.01\ndogs: hound.n.01", 'found duplicate key "dogs"'),
        ("dogs: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    tmp_path: Path, wordnet: WordNet, text: str, message: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as error:
        read_groups(path, Taxonomy())
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_groups_that_are_not_there_name_those_that_are(wordnet: WordNet) -> None:
    with pytest.raises(UsageError, match=r"no groups 'mine': expected a file, .* shipped: default"):
        read_groups("mine", Taxonomy())


def test_a_class_has_the_colour_of_its_smallest_group(tmp_path: Path, wordnet: WordNet) -> None:
    text = "animals: animal.n.01\ndogs: dog.n.01\nthe same: dog.n.01\nmammals: mammal.n.01\n"
    groups = read_groups(written(tmp_path, text), Taxonomy())
    names = ("beagle.n.01", "tabby.n.01", "leafhopper.n.01", "greenhouse.n.01")
    wnids = {name: wordnet.synset(name).wnid for name in names}
    found = smallest_groups(groups, wnids.values(), Taxonomy())
    assert [found[wnid] for wnid in wnids.values()] == ["dogs", "mammals", "animals", None]


def test_the_table_by_hand(tmp_path: Path, wordnet: WordNet) -> None:
    groups = read_groups(
        written(tmp_path, "animals: animal.n.01\ndogs: dog.n.01\nhouses: building.n.01\n"),
        Taxonomy(),
    )
    counts = {"beagle.n.01": (4, 4, 4, 0), "tabby.n.01": (4, 0, 1, 1), "banjo.n.01": (4, 4, 4, 0)}
    classes = [
        {"wnid": wordnet.synset(name).wnid, **dict(zip(COUNTS, four, strict=True))}
        for name, four in counts.items()
    ]
    animals, dogs, houses = group_figures(groups, classes, 4, Taxonomy())
    assert (animals["classes"], animals["images"], animals["black_images"]) == (2, 8, 1)
    assert (animals["mean_correct"], animals["std_correct"]) == (2, 2)
    assert (animals["any_correct"], animals["all_correct"]) == (0.5, 0.5)
    assert (animals["none_correct_classes"], animals["all_correct_classes"]) == (1, 1)
    assert (animals["top1_percent"], animals["top5_percent"]) == (50, 62.5)
    assert animals["intervals"] == {"mean_correct": [0, 4]}
    assert (dogs["classes"], dogs["mean_correct"], dogs["intervals"]["mean_correct"]) == (
        1,
        4,
        None,
    )
    assert (houses["classes"], houses["images"], houses["mean_correct"]) == (0, 0, None)
    assert houses["none_correct_classes"] == 0
