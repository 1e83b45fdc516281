"""A release that grows: more images, more synsets, again and again, after kills; refusals."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sdwn.config import RunConfig
from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.evaluate import keep_computed
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import ExportOptions, export
from sdwn.generation.batching import NoiseSampler
from sdwn.generation.regenerate import regenerate
from sdwn.generation.task import generate
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Plan
from sdwn.prediction.table import Predictions
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.workflow.plans import plan_extension, plan_run

from conftest import NOISE, REPOSITORY, PlanRun, Sdwn, interrupt_at

CORGIS = {"roots": ["corgi.n.01"]}


class Silent:
    """A display that shows nothing."""

    def say(self, message: str) -> None:
        pass

    def progress(self, *_: Any, **__: Any) -> Any:
        import contextlib

        return contextlib.nullcontext(self)


def extended(
    release: Release, run: Path, *overrides: str, only: Path | None = None
) -> tuple[RunPaths, Plan]:
    plan, paths = plan_extension(release, run, overrides, only, Silent())
    return paths, plan


def grow(release: Release, run: Path, *overrides: str, only: Path | None = None) -> Release:
    """Extend a release, make the images in this process, and merge."""
    paths, plan = extended(release, run, *overrides, only=only)
    generate(paths.root, range(len(plan.shards)))
    return merge([paths], ReleasePaths(paths.release), carry=keep_computed)


def killed_after(batches: int) -> Any:
    """Returns a sampler's method that is interrupted behind so many batches."""
    sample, left = NoiseSampler.sample, [None] * batches

    def interrupted(self: NoiseSampler, specs: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return sample(self, specs)

    return interrupted


def images(release: Release) -> dict[tuple[str, int], tuple[str, int, str]]:
    """The records that make each image, and its content, by concept and number."""
    names = ("id", "number", "prompt", "seed", "sha256")
    columns = [release.metadata[name].to_pylist() for name in names]
    rows = list(zip(*columns, strict=True))
    assert len({row[:2] for row in rows}) == len(rows), "an image stands twice"
    return {(id_, number): rest for id_, number, *rest in rows}  # type: ignore[misc]


@pytest.fixture
def made(generated: PlanRun) -> Any:
    """Makes a run's release: ``made(images_per_synset=10)``."""

    def make(name: str = "first", **changes: Any) -> Release:
        paths, _ = generated(name, catalog=CORGIS, **changes)
        return merge([paths], ReleasePaths(paths.release))

    return make


def test_a_release_grown_after_kills_is_the_one_that_is_made_at_once(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, whole = made(images_per_synset=10), made("whole", images_per_synset=25)
    paths, plan = extended(first, tmp_path / "more", "images_per_synset=25")
    assert plan.images == 15 * len(first.concepts)
    with monkeypatch.context() as patch:
        patch.setattr(NoiseSampler, "sample", killed_after(1))
        with pytest.raises(KeyboardInterrupt):
            generate(paths.root, range(len(plan.shards)))
    generate(paths.root, range(len(plan.shards)))
    target = ReleasePaths(tmp_path / "grown")
    with pytest.raises(KeyboardInterrupt):
        merge([paths], target, MergeOptions(part_bytes=4000), interrupt_at(len(first)))
    grown = merge([paths], target, MergeOptions(part_bytes=4000))
    assert images(grown) == images(whole)
    assert verify(target.root) == []
    manifest = grown.manifest
    assert [one.images for one in manifest.plans] == [len(first), plan.images]
    assert (manifest.plan_digest, manifest.concepts) == (plan.digest, len(first.concepts))
    assert [one.images for one in grown.concepts.values()] == [25] * len(first.concepts)
    for path in first.paths.root.glob("images-*.h5"):
        assert (target.root / path.name).read_bytes() == path.read_bytes()
    assert len(merge([paths], target)) == len(grown)
    for number in (3, 20):
        assert regenerate(grown, "pembroke", number)[0].verdict == "equal"
    name = grown.row(len(first))["plan"]
    assert name == plan.digest
    assert grown.plan(name).concepts[0] == plan.concepts[0]
    assert grown.plan(name).config.images_per_synset == 25


def test_it_grows_again_by_a_list_by_other_synsets_and_in_other_shards(
    made: Any, tmp_path: Path
) -> None:
    first = made(images_per_synset=4)
    listing = tmp_path / "list.csv"
    listing.write_text("wnid\nn02113023\n")
    more = "images_per_synset=6", "storage.images_per_shard=3", "storage.codec=png"
    second = grow(first, tmp_path / "second", *more, only=listing)
    counts = {one.synset: one.images for one in second.concepts.values()}
    assert counts == {"pembroke.n.01": 6, "cardigan.n.02": 4}
    third = grow(second, tmp_path / "third", "catalog.roots=[spaniel.n.01]")
    assert len(third.concepts) > len(first.concepts)
    assert third.manifest.catalog == "below corgi.n.01 + below spaniel.n.01"
    assert {one.images for one in third.subset(below="spaniel.n.01").present} == {6}
    fourth = grow(third, tmp_path / "fourth", "images_per_synset=6")
    assert {one.images for one in fourth.concepts.values()} == {6}
    assert len(fourth.manifest.plans) == 4
    assert verify(fourth.paths.root) == []
    for release in (first, second, third):
        assert images(release).items() <= images(fourth).items()
    whole = images(made("whole", images_per_synset=6))
    pixels = {key: rest[:2] for key, rest in whole.items()}  # the codec has changed meanwhile
    assert {key: rest[:2] for key, rest in images(fourth).items() if key in whole} == pixels
    # A smaller release of it keeps each image's plan.
    target = tmp_path / "small"
    export(fourth.subset(below="corgi.n.01"), target, ExportOptions("release"))
    small = Release(target)
    assert verify(target) == []
    for row in (small.row(0), small.row(len(small) - 1)):
        assert regenerate(small, row["id"], row["number"])[0].verdict == "equal"


def test_a_release_of_version_1_grows(tmp_path: Path) -> None:
    old = Release(shutil.copytree(REPOSITORY / "tests/files/release", tmp_path / "old"))
    grown = grow(old, tmp_path / "more", "images_per_synset=3")
    assert verify(grown.paths.root) == []
    assert images(old).items() <= images(grown).items()
    assert len(grown) == 15
    for number in (1, 2):
        assert regenerate(grown, "pembroke", number)[0].verdict == "equal"
    # Its predictions come along; and again, for it was not classified since.
    again = grow(grown, tmp_path / "again", "images_per_synset=4")
    for release in (grown, again):
        kept = release.paths.evaluation("efficientnet-lite0").earlier
        sums = Predictions.read(kept, 99).table["sha256"].to_pylist()
        assert len(sums) == 4
        assert set(sums) < set(release.metadata["sha256"].to_pylist())


def test_what_an_incomplete_release_lacks_is_made(generated: PlanRun, tmp_path: Path) -> None:
    paths, plan = generated("first", catalog=CORGIS, storage={"images_per_shard": 5})
    paths.shard(0).unlink()
    target = ReleasePaths(tmp_path / "incomplete")
    first = merge([paths], target, MergeOptions(allow_missing=True))
    grown = grow(first, tmp_path / "rest")
    assert grown.manifest.missing is None
    assert len(grown) == plan.images
    assert verify(grown.paths.root) == []
    with pytest.raises(UsageError, match="has all these images; ask for more"):
        extended(grown, tmp_path / "none")


def test_a_merge_without_all_new_images_names_what_is_missing(made: Any, tmp_path: Path) -> None:
    first = made(images_per_synset=2)
    sizes = "storage.images_per_shard=3"
    paths, _ = extended(first, tmp_path / "more", "images_per_synset=5", sizes)
    generate(paths.root, [0])
    target = ReleasePaths(tmp_path / "grown")
    with pytest.raises(IntegrityError, match="shard 1 missing"):
        merge([paths], target)
    grown = merge([paths], target, MergeOptions(allow_missing=True))
    (missing,) = grown.missing
    assert (missing.id, missing.images) == (list(first.concepts)[1], 3)
    assert verify(target.root) == []
    assert len(grow(grown, tmp_path / "rest")) == 5 * len(first.concepts)


OTHERWISE = [
    ("seed=1", "seed: 0 there, 1 now"),
    ("model.name=builtin:tiny", 'model.name: "builtin:noise" there, "builtin:tiny" now'),
    ("generation.width=64", "generation.width: "),
    ("generation.negative_prompt=ugly", 'negative_prompt: not set there, "ugly" now'),
    ('prompt="a {lemma}"', 'prompt: "{definition}" there, "a {lemma}" now'),
]


def test_what_would_have_come_out_otherwise_is_refused(made: Any, tmp_path: Path) -> None:
    first = made(images_per_synset=2)
    for override, expected in OTHERWISE:
        with pytest.raises(UsageError) as refused:
            extended(first, tmp_path / "more", "images_per_synset=4", override)
        assert expected in str(refused.value)
        assert not (tmp_path / "more").exists()


def test_gaps_imports_and_unknown_names_are_refused(made: Any, tmp_path: Path) -> None:
    first, target = made(images_per_synset=3), tmp_path / "gaps"
    export(first.subset(rows=[0, 2, 3]), target, ExportOptions("release"))
    with pytest.raises(UsageError, match=r"pembroke\.n\.01: only 2 of the images 0 to 2 are there"):
        extended(Release(target), tmp_path / "more", "images_per_synset=4")
    imported = Release(REPOSITORY / "tests/files/imported")
    with pytest.raises(UsageError, match="was imported"):
        extended(imported, tmp_path / "more", "images_per_synset=4")
    listing = tmp_path / "list.txt"
    listing.write_text("dog.n.01\n")
    with pytest.raises(UsageError, match=r"list\.txt, line 1: dog\.n\.01"):
        extended(first, tmp_path / "more", "images_per_synset=4", only=listing)


def test_a_moved_release_is_named_anew_and_never_written_to(
    made: Any, tmp_path: Path, sdwn: Sdwn
) -> None:
    first = made(images_per_synset=2)
    paths, plan = extended(first, tmp_path / "more", "images_per_synset=3")
    generate(paths.root, range(len(plan.shards)))
    with pytest.raises(UsageError, match="choose a new folder"):
        merge([paths], first.paths)
    moved = first.paths.root.rename(tmp_path / "moved")
    with pytest.raises(
        UsageError, match="found none; if it was moved, say where with: sdwn extend RELEASE"
    ):
        merge([paths], ReleasePaths(tmp_path / "grown"))
    found = sdwn.json("extend", moved, paths.root)
    assert found["digest"] == plan.digest
    done = sdwn("merge", paths.root, "--release", "grown")
    assert f"sdwn evaluate {tmp_path}/grown" in done.stdout or "sdwn evaluate grown" in done.stdout
    assert len(Release(tmp_path / "grown")) == 3 * len(first.concepts)


def test_the_commands_extend_and_go_on(made: Any, tmp_path: Path, sdwn: Sdwn) -> None:
    first = made(images_per_synset=2)
    more = ("--set", "images_per_synset=3")
    done = sdwn("extend", first.paths.root, "more", *more)
    assert f"{first.manifest.images} images stay" in " ".join(done.stdout.split())
    assert "sdwn submit more --wait" in done.stdout
    assert sdwn.json("extend", first.paths.root, "more", *more)["images"] == len(first.concepts)


ROWS = """id,prompt,label,seed,images,price,tags
a,a zebra at dawn,zebra,7,3,5,x
b,a zebra at dawn,,,3,6,y
"""


def table_run(folder: Path, text: str, *overrides: str) -> Release:
    (folder / "rows.csv").write_text(text)
    content = {**NOISE, "catalog": {"table": str(folder / "rows.csv")}}
    config = RunConfig.model_validate(content)
    plan, paths = plan_run(config, folder / "first", Silent())
    generate(paths.root, range(len(plan.shards)))
    return merge([paths], ReleasePaths(paths.release))


def test_a_table_grows_by_rows_and_by_columns(tmp_path: Path) -> None:
    first = table_run(tmp_path, ROWS)
    assert first.unit == "concept"
    types = {name: str(first.metadata[name].type) for name in ("price", "tags")}
    assert types == {"price": "int64", "tags": "string"}
    assert first.row(0) | {"id": "a", "label": "zebra", "price": 5, "tags": "x"} == first.row(0)
    assert (first.row(3)["label"], first.row(3)["wnid"]) == ("", None)
    more = ROWS.replace("tags", "tags,lens").replace(",x", ",x,35").replace(",3,6,y", ",5,6,y,50")
    (tmp_path / "more.csv").write_text(more + "c,a dog,,,1,7,z,85\n")
    grown = grow(first, tmp_path / "second", f"catalog.table={tmp_path}/more.csv")
    assert verify(grown.paths.root) == []
    lenses = dict(zip(*(grown.metadata[name].to_pylist() for name in ("id", "lens")), strict=True))
    assert lenses == {"a": None, "b": 50, "c": 85}
    counts = Counter(grown.metadata["id"].to_pylist())
    assert counts == {"a": 3, "b": 5, "c": 1}
    assert images(first).items() <= images(grown).items()
    for index in range(len(grown)):
        row = grown.row(index)
        assert regenerate(grown, row["id"], row["number"])[0].verdict == "equal"
    for rows, expected in {
        "c,a cat,,,2,7,z,85": "c: prompts: ('a dog',) there, ('a cat',) now",
        "c,a dog,,1,2,7,z,85": "c: seed: None there, 1 now",
        "c,a dog,,,2,7.5,z,85": "column 'price': int64 there, double now",
    }.items():
        (tmp_path / "other.csv").write_text(more + rows + "\n")
        with pytest.raises(UsageError) as refused:
            extended(grown, tmp_path / "third", f"catalog.table={tmp_path}/other.csv")
        assert expected in str(refused.value)


def test_a_manifest_without_a_part_of_the_images_is_refused(tmp_path: Path) -> None:
    first = table_run(tmp_path, "id,prompt\na,a zebra\n")
    manifest = json.loads(first.paths.manifest.read_text())
    for name, key in (("files", "file"), ("plans", "digest")):
        altered = {**manifest, name: [{**one, key: "x"} for one in manifest[name]]}
        first.paths.manifest.write_text(json.dumps(altered))
        with pytest.raises(IntegrityError, match=f"lacks a {'part' if key == 'file' else 'plan'}"):
            extended(Release(first.paths.root), tmp_path / "odd", "images_per_synset=9")


def test_a_row_whose_own_seed_made_a_single_image_stays_single(tmp_path: Path) -> None:
    first = table_run(tmp_path, "id,prompt,seed,images\na,a zebra,7,1\nb,a dog,8,2\n")
    assert first.metadata["seed"].to_pylist()[0] == 7
    with pytest.raises(UsageError, match="a: its own seed 7 is that of a single image"):
        extended(first, tmp_path / "more", "images_per_synset=3")
    listing = tmp_path / "list.txt"
    listing.write_text("b\n")
    grown = grow(first, tmp_path / "more", "images_per_synset=3", only=listing)
    assert Counter(grown.metadata["id"].to_pylist()) == {"a": 1, "b": 3}
