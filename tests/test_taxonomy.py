"""What lies above what, from taxonomy.parquet: it is what NLTK reads, and stands in for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sdwn.browser.library import Library
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import ExportOptions, export
from sdwn.io import file_sha256
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import write_plan
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.storage.columns import write_parquet
from sdwn.wordnet.corpus import WordNet, class_wnids
from sdwn.wordnet.taxonomy import (
    SCHEMA,
    Taxonomy,
    nearest_subtrees,
    open_taxonomy,
    read_taxonomy,
    taxonomy_table,
)

from conftest import FEW, REPOSITORY, PlanRun, Sdwn, hide_wordnet
from drawn import evaluation, predictions

DOG, CANINE, DOMESTIC, ENTITY = "n02084071", "n02083346", "n01317541", "n00001740"


@pytest.fixture(scope="module")
def table(wordnet: WordNet) -> pa.Table:
    return taxonomy_table((synset.wnid for synset in wordnet.below("animal.n.01")), wordnet)


def test_it_says_what_nltk_says_of_the_plans_synsets_the_classes_and_all_above(
    table: pa.Table, wordnet: WordNet, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a", table)
    assert read_taxonomy(tmp_path / "a").equals(table)
    taxonomy = open_taxonomy(tmp_path / "a")
    assert table.num_rows > 4000
    for wnid in table["wnid"].to_pylist():
        synset = wordnet.synset(wnid)
        assert taxonomy.synset(synset.name) == taxonomy.synset(wnid) == synset
    below = (synset.wnid for synset in wordnet.below("animal.n.01"))
    assert {*class_wnids(), *below} <= set(table["wnid"].to_pylist())
    assert taxonomy.synset(ENTITY).parents == ()
    assert set(taxonomy.synset(DOG).parents) == {CANINE, DOMESTIC}


def test_instances_lie_below_what_they_are_one_of(wordnet: WordNet) -> None:
    nile = wordnet.synset("nile.n.01")
    found = Taxonomy(taxonomy_table([nile.wnid], wordnet))
    assert found.synset(nile.wnid).parents == (wordnet.synset("river.n.01").wnid,)
    assert found.is_below(nile.wnid, wordnet.synset("stream.n.01").wnid)


@pytest.mark.parametrize(
    "wnid", ["", "n", "dog", "n00000000", "n02084072", "n99999999", "02084071", "n02084071 ", "n²"]
)
def test_what_is_no_noun_is_not_in_it(table: pa.Table, wnid: str) -> None:
    for taxonomy in (Taxonomy(), Taxonomy(table)):
        with pytest.raises(UsageError, match="no such synset"):
            taxonomy.above(wnid)


def test_what_it_lacks_is_looked_up_in_the_corpus(wordnet: WordNet) -> None:
    small, corpus = Taxonomy(taxonomy_table([DOG], wordnet)), Taxonomy()
    puppy = wordnet.synset("puppy.n.01").wnid
    assert small.synset("puppy.n.1") == small.synset("puppy.n.01") == wordnet.synset(puppy)
    assert small.above(puppy) == corpus.above(puppy)
    # A classifier of more classes than ImageNet-1k's.
    classes = class_wnids(11821)
    assert nearest_subtrees(small, [DOG, puppy], classes) == nearest_subtrees(
        corpus, [DOG, puppy], classes
    )


def test_a_plan_writes_it_again_only_where_it_lacks_or_is_damaged(
    planned: PlanRun, wordnet: WordNet
) -> None:
    paths, plan = planned()
    written = paths.taxonomy.stat()
    before = paths.plan.read_bytes()
    assert not write_plan(plan, paths, wordnet=wordnet)
    assert paths.taxonomy.stat().st_mtime_ns == written.st_mtime_ns
    for spoil in (Path.unlink, lambda path: path.write_bytes(b"PAR1 and no more")):
        spoil(paths.taxonomy)
        assert not write_plan(plan, paths, wordnet=wordnet)
        assert read_taxonomy(paths.taxonomy).num_rows > 1000
    assert paths.plan.read_bytes() == before


def test_without_wordnet_a_run_is_merged_evaluated_browsed_subset_and_compared(
    generated: PlanRun, sdwn: Sdwn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = {"roots": ["corgi.n.01", "wild_dog.n.01", "fox.n.01"]}
    paths, _ = generated(catalog=catalog, images_per_synset=1)
    hide_wordnet(monkeypatch, tmp_path)
    release = merge([paths], ReleasePaths(paths.release))
    assert release.paths.taxonomy.name in {file.file for file in release.manifest.files}
    assert verify(release.paths.root) == []
    dogs = release.subset(below="dog.n.01")
    assert 0 < len(dogs) < len(release)
    every = EvaluationConfig(images="all")
    evaluation(release, predictions(release, every=True), "one", every)
    library = Library(release.paths.root, "one")
    assert library.tree is not None
    node = library.tree.node(DOG)
    assert node is not None
    assert node.images == len(dogs)
    assert set(node.parents) <= {CANINE, DOMESTIC}
    export(dogs, tmp_path / "dogs", ExportOptions("release"))
    smaller = Release(tmp_path / "dogs")
    assert verify(smaller.paths.root) == []
    assert len(smaller.subset(below="dog.n.01")) == len(smaller) == len(dogs)
    evaluation(smaller, predictions(smaller), "one")
    sdwn("compare", release.paths.root, smaller.paths.root, "--out", tmp_path / "compared")
    with pytest.raises(SdwnError, match=r"banjo\.n\.9: not among the synsets of taxonomy.*WNSEARC"):
        release.subset(below="banjo.n.9")


def test_an_import_writes_it_and_an_old_release_does_without(
    sdwn: Sdwn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(REPOSITORY / "tests/files/release", tmp_path / "old")
    old = Release(tmp_path / "old")
    assert not old.paths.taxonomy.exists()
    assert len(old.subset(below="entity.n.01")) == len(old)
    export(old, tmp_path / "folders", ExportOptions("folders"))
    sdwn("import", "folders", "taken", "--format", "folders")
    export(old, tmp_path / "copy", ExportOptions("release"))
    hide_wordnet(monkeypatch, tmp_path)
    taken = Release(tmp_path / "taken")
    assert verify(taken.paths.root) == verify(tmp_path / "copy") == []
    assert len(taken.subset(below="entity.n.01")) == len(old)
    with pytest.raises(SdwnError, match="found no WordNet"):
        Release(tmp_path / "copy").subset(below="entity.n.01")


ROWS = {
    "wnid": ["n00000001", "n00000002"],
    "name": ["a.n.01", "b.n.01"],
    "lemmas": [["a"], ["b"]],
    "definition": ["an a", "a b"],
    "parents": [[], ["n00000001"]],
}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": [None, "b.n.01"]}, "expected all values"),
        ({"lemmas": [["a"], [None]]}, "expected all values"),
        ({"lemmas": [1, 2]}, "lemmas|list"),
        ({"parents": [[], ["n00000003"]]}, "and of all above them"),
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    path = tmp_path / "taxonomy.parquet"
    pq.write_table(pa.table({**ROWS, **changed}), path)
    with pytest.raises(IntegrityError, match=rf"{path}: damaged: .*({told}).*remove it"):
        open_taxonomy(path)


def test_a_circle_of_hypernyms_is_gone_round_once(tmp_path: Path) -> None:
    circle = [["n00000002"], ["n00000001"]]
    write_parquet(tmp_path / "circle", pa.table({**ROWS, "parents": circle}, SCHEMA))
    assert open_taxonomy(tmp_path / "circle").above("n00000001") == {
        "n00000001": 0,
        "n00000002": 1,
    }


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(4000)])
def test_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "taxonomy.parquet").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"taxonomy\.parquet: damaged.*remove it"):
        open_taxonomy(tmp_path / "taxonomy.parquet")


def test_a_release_with_a_damaged_one_says_so_wherever_it_is_asked(
    generated: PlanRun, tmp_path: Path
) -> None:
    paths, _ = generated(catalog=FEW)
    damaged = RunPaths(Path(shutil.copytree(paths.root, tmp_path / "damaged")))
    damaged.taxonomy.write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=r"damaged/taxonomy\.parquet: damaged"):
        merge([damaged], ReleasePaths(damaged.release))
    release = merge([paths], ReleasePaths(paths.release))
    content = release.paths.taxonomy.read_bytes()
    release.paths.taxonomy.write_bytes(content[: len(content) // 2])
    assert any(problem.startswith("taxonomy.parquet: ") for problem in verify(release.paths.root))
    library = Library(release.paths.root)
    assert library.tree is None
    assert "taxonomy.parquet: damaged" in str(library.tree_missing)
    with pytest.raises(IntegrityError, match=r"taxonomy\.parquet"):
        release.subset(below="dog.n.01")
    with pytest.raises(IntegrityError, match=r"taxonomy\.parquet"):
        export(Release(release.paths.root), tmp_path / "smaller", ExportOptions("release"))
    release.paths.taxonomy.unlink()
    release.paths.taxonomy.symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="link"):
        Release(release.paths.root).subset(below="dog.n.01")


def test_verify_names_one_that_is_damaged_under_its_own_checksum(
    generated: PlanRun, tmp_path: Path
) -> None:
    paths, _ = generated(catalog=FEW)
    release = merge([paths], ReleasePaths(paths.release))
    before, known = release.digest, file_sha256(release.paths.taxonomy)
    table = read_taxonomy(release.paths.taxonomy)
    write_parquet(release.paths.taxonomy, table.slice(1))
    size = release.paths.taxonomy.stat().st_size
    manifest = json.loads(release.paths.manifest.read_text())
    for record in manifest["files"]:
        if record["file"] == "taxonomy.parquet":
            record |= {"bytes": size, "sha256": file_sha256(release.paths.taxonomy)}
    sums = release.paths.sums.read_text().replace(known, file_sha256(release.paths.taxonomy))
    release.paths.manifest.write_text(json.dumps(manifest))
    digest = file_sha256(release.paths.manifest)
    release.paths.sums.write_text(sums.replace(before, digest))
    (problem,) = verify(release.paths.root)
    assert problem.startswith("taxonomy.parquet: damaged: ")
    assert "expected all values of synsets and of all above them" in problem
