"""Order and splits of exports: which images are in which split, and that no format differs."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sdwn.errors import UsageError
from sdwn.exchange.export import ExportOptions, export
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.generation.task import generate
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Concept, make_plan, write_plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.releases.splits import split_images
from sdwn.wordnet.corpus import WordNet, class_wnids

from conftest import Sdwn, interrupt_at, noise_config
from drawn import noise_release

SPLITS = {"train": 0.7, "val": 0.2, "test": 0.1}
# Several files each; in the folders, a file is an image.
PART_BYTES = {"webdataset": 20_000, "parquet": 20_000}
# The images of each split, in order, each by its concept's id and its number.
Members = dict[str, list[tuple[str, int]]]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    """Twelve ImageNet classes of ten images each."""
    return noise_release(tmp_path_factory.mktemp("release"), wordnet, class_wnids()[150:162])


def images_of(ids: dict[str, int], label: str = "") -> Any:
    """A stand-in of a release of so many images of each concept, of a class each or of one."""
    rows = [(id_, number) for id_, count in ids.items() for number in range(count)]
    names, numbers = zip(*rows, strict=True)
    return stand_in({id_: Concept(id_, label) for id_ in ids}, names, numbers)


def stand_in(concepts: dict[str, Concept], ids: Sequence[str], numbers: Sequence[int]) -> Any:
    images = pa.table({"id": pa.array(ids), "number": pa.array(numbers, pa.uint32())})

    class StandIn(SimpleNamespace):
        def __len__(self) -> int:
            return len(images)

    return StandIn(metadata=images, concepts=concepts)


def members(release: Any, shares: dict[str, float]) -> dict[tuple[str, int], str]:
    names, found = list(shares), split_images(release, shares).tolist()
    images = release.metadata
    keys = zip(images["id"].to_pylist(), images["number"].to_pylist(), strict=True)
    return {key: names[split] for key, split in zip(keys, found, strict=True)}


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(max_size=5), st.integers(1, 30), min_size=60, max_size=60),
    st.floats(0.2, 0.5),
    st.integers(1, 20),
)
def test_each_class_is_divided_as_asked_and_growth_moves_no_image(
    counts: dict[str, int], share: float, more: int
) -> None:
    shares = {"train": 1 - share, "val": share}
    found = members(images_of(counts), shares)
    for id_, count in counts.items():
        in_val = sum(found[id_, number] == "val" for number in range(count))
        assert np.floor(count * share) <= in_val <= np.ceil(count * share)
        # The rule: image n is in val where floor((n + 1) p + u) > floor(n p + u), for one u.
        steps = np.cumsum([found[id_, number] == "val" for number in range(count)])
        lowest = np.max(steps - np.arange(1, count + 1) * share)
        highest = np.min(steps + 1 - np.arange(1, count + 1) * share)
        assert max(lowest, 0) <= min(highest, 1) + 1e-9
    larger = {id_: count + more for id_, count in counts.items()}
    grown = members(images_of(larger | {"a new one": 9}), shares)
    assert found.items() <= grown.items()


@settings(max_examples=40)
@given(st.permutations(range(200)), st.integers(150, 200))
def test_a_subset_in_any_order_has_the_same_splits(order: list[int], count: int) -> None:
    whole = images_of({f"n{index:08d}": 10 for index in range(20)})
    some = whole.metadata.take(pa.array(order[:count])).to_pydict()
    subset = stand_in(whole.concepts, some["id"], some["number"])
    assert members(subset, SPLITS).items() <= members(whole, SPLITS).items()


@given(st.integers(1, 60), st.floats(0.1, 0.5), st.integers(1, 3))
@settings(max_examples=40)
def test_a_class_of_many_rows_is_divided_as_one(rows: int, share: float, each: int) -> None:
    """Rows of a table that share a label, further rows and further images of them."""
    shares = {"val": share, "train": 1 - share}

    def split(rows: int, each: int) -> dict[tuple[str, int], str]:
        return members(images_of({f"row {index}": each for index in range(rows)}, "fox"), shares)

    try:
        found = split(rows, each)
    except UsageError:  # so few that a split is empty
        assert rows * each * share < 3
        return
    in_val = sum(one == "val" for one in found.values())
    assert abs(in_val - rows * each * share) < (1 if each == 1 else 4)
    assert found.items() <= split(rows + 5, each + 2).items()


def test_many_splits_are_each_as_large_as_asked() -> None:
    shares = {"a": 0.1, "b": 0.2, "rest": 0.4, "c": 0.25, "d": 0.05}
    many = Counter(members(images_of({str(index): 20 for index in range(100)}), shares).values())
    assert many == {name: round(share * 2000) for name, share in shares.items()}
    # Of one image each there is nothing to divide: each is drawn with the probability asked for.
    single = Counter(members(images_of({str(index): 1 for index in range(4000)}), shares).values())
    for name, share in shares.items():
        assert single[name] == pytest.approx(4000 * share, abs=100)


def test_a_further_split_takes_its_images_from_the_largest() -> None:
    images = images_of({str(index): 10 for index in range(50)})
    two = members(images, {"train": 0.9, "val": 0.1})
    three = members(images, {"train": 0.8, "val": 0.1, "test": 0.1})
    assert {key for key, split in two.items() if split == "val"} == {
        key for key, split in three.items() if split == "val"
    }


def exported(root: Path, layout: str) -> Members:
    """Read which images an export has in each split, in their order, from its files alone."""
    found: Members = {}
    if layout == "webdataset":
        for path in sorted(root.glob("*.tar")):
            with tarfile.open(path) as tar:
                rows = [json.load(tar.extractfile(one)) for one in tar if one.name.endswith("json")]  # type: ignore[arg-type]
            split = path.name.split("-")[1] if path.name.count("-") == 2 else "train"
            found.setdefault(split, []).extend((row["id"], row["number"]) for row in rows)
    elif layout == "parquet":
        for path in sorted(root.glob("data/*")):
            rows = pq.read_table(path, columns=["id", "number"]).to_pylist()
            split = path.name.partition("-")[0]
            found.setdefault(split, []).extend((row["id"], row["number"]) for row in rows)
    else:
        wnids = dict(zip(*pq_columns(root), strict=True))
        for path in sorted(root.glob("*/*/*.webp")):
            name, _, number = path.stem.rpartition("_")
            found.setdefault(path.parts[-3], []).append((wnids[name], int(number)))
    return found


def pq_columns(root: Path) -> tuple[list[str], list[str]]:
    lines = [line.split(",") for line in (root / "synsets.csv").read_text().splitlines()[1:]]
    wnids = [line[0] for line in lines]
    return [*wnids, *(line[1] for line in lines)], [*wnids, *wnids]


@pytest.mark.parametrize("layout", ["folders", "imagefolder", "webdataset", "parquet"])
def test_every_format_has_the_same_splits(release: Release, tmp_path: Path, layout: str) -> None:
    options = ExportOptions(layout, part_bytes=PART_BYTES.get(layout), splits=SPLITS)
    done = export(release, tmp_path / "out", options)
    found = exported(tmp_path / "out", layout)
    expected = members(release, SPLITS)
    assert {key: split for split, keys in found.items() for key in keys} == expected
    assert done["splits"] == {
        name: {"images": len(found[name]), "synsets": len({id_ for id_, _ in found[name]})}
        for name in SPLITS
    }
    assert {name: len(keys) for name, keys in found.items()} == {"train": 84, "val": 24, "test": 12}


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_shuffled_files_mix_all_classes_and_hold_each_image_once(
    release: Release, tmp_path: Path, layout: str
) -> None:
    orders = []
    for name, seed in (("a", 1), ("same", 1), ("other", 2)):
        options = ExportOptions(layout, part_bytes=PART_BYTES[layout], shuffle=seed)
        export(release, tmp_path / name, options)
        orders.append(exported(tmp_path / name, layout)["train"])
    assert orders[0] == orders[1] != orders[2]
    every = sorted(members(release, SPLITS))
    assert sorted(orders[0]) == sorted(orders[2]) == every
    # Of 120 images of 12 classes, the first 24 are of two classes in the order of the catalog.
    assert len({id_ for id_, _ in orders[0][:24]}) > 6
    said = (tmp_path / "a/README.md").read_text()
    assert "in a random order" in said
    assert "(seed 1)" in said


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_shuffled_export_in_splits_resumes(release: Release, tmp_path: Path, layout: str) -> None:
    options = ExportOptions(layout, part_bytes=20_000, shuffle=5, splits=SPLITS)
    export(release, tmp_path / "undisturbed", options)
    with pytest.raises(KeyboardInterrupt):
        export(release, tmp_path / "out", options, interrupt_at(70))
    kept = {path.name: path.stat().st_ino for path in files(tmp_path / ".out.unfinished")}
    told = list[int]()
    export(release, tmp_path / "out", options, told.append)
    assert sum(told) == len(release)
    assert kept
    after = {path.name: path.stat().st_ino for path in files(tmp_path / "out")}
    assert kept.items() <= after.items()
    for path in files(tmp_path / "undisturbed"):
        again = tmp_path / "out" / path.relative_to(tmp_path / "undisturbed")
        assert again.read_bytes() == path.read_bytes()


def files(root: Path) -> Iterator[Path]:
    yield from (path for path in root.rglob("*") if path.suffix in (".tar", ".parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "folders", "shuffle": 1},
            "in no order: .* shuffle when you train",
        ),
        (
            {"format": "imagefolder", "shuffle": 0},
            "in no order: .* shuffle when you train",
        ),
        ({"format": "release", "shuffle": 0}, "in one set: leave out .* split and shuffle"),
        ({"format": "release", "splits": SPLITS}, "in one set: leave out .* split and shuffle"),
        ({"format": "release", "resize": 8}, "keeps its images as they are"),
        ({"format": "parquet", "splits": {"a": 0.5, "b": 0.4}}, "1 together, found a=0.5, b=0.4"),
        ({"format": "parquet", "splits": {"../a": 0.5, "b": 0.5}}, "names of letters"),
        ({"format": "parquet", "splits": {"": 1}}, "names of letters"),
    ],
)
def test_splits_and_orders_that_mean_nothing_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ExportOptions(**options)


def test_an_empty_split_is_refused_and_leaves_nothing(release: Release, tmp_path: Path) -> None:
    options = ExportOptions("parquet", splits={"train": 0.9999, "val": 0.0001})
    with pytest.raises(UsageError, match="split val gets none of 120 images; give it"):
        export(release, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_shares_and_says_what_each_split_has(
    release: Release, sdwn: Sdwn, tmp_path: Path
) -> None:
    root, options = release.paths.root, ("--format", "webdataset", "--split", "train=80%, val=0.2")
    said = sdwn("export", root, "out", *options, "--shuffle", 7)
    assert "split train" in said.stdout + said.stderr
    found = json.loads((tmp_path / "out/_info.json").read_text())["splits"]
    assert {name: one["num_samples"] for name, one in found.items()} == {"train": 96, "val": 24}
    for wrong in ("a=0.9", "a=0.9,b=0.2", "a", "a=0.9,b=x", "a=0.5,a=0.5", "", "../a=0.5,b=0.5"):
        refused = sdwn("export", root, "no", "--format", "parquet", "--split", wrong, code=2)
        assert "expected" in refused.stderr


@pytest.mark.parametrize("codec", ["png", "webp", "jpeg"])
def test_images_encoded_anew_say_that_a_model_made_them(
    release: Release, tmp_path: Path, codec: str
) -> None:
    for name, as_codec in (("kept", "stored"), ("anew", codec)):
        quality = 90 if codec == "webp" and name == "anew" else None
        some = release.subset(rows=range(5))
        export(some, tmp_path / name, ExportOptions("parquet", as_codec, quality))
    kept, anew = (
        [row["image"]["bytes"] for row in pq.read_table(tmp_path / name / "data").to_pylist()]
        for name in ("kept", "anew")
    )
    assert {hashlib.sha256(one).hexdigest() for one in kept} == set(
        release.metadata["sha256"].to_pylist()[:5]
    )
    for payload in anew:
        described = Image.open(io.BytesIO(payload)).getxmp()["xmpmeta"]["RDF"]["Description"]
        assert described["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    said = [(tmp_path / name / "README.md").read_text() for name in ("kept", "anew")]
    assert ["trainedAlgorithmicMedia" in text for text in said] == [False, True]


@pytest.mark.parametrize("codec", ["stored", "jpeg"])
def test_images_are_shrunk_to_a_shorter_side_and_never_enlarged(
    release: Release, tmp_path: Path, codec: str
) -> None:
    for side, expected in ((4, (8, 4)), (8, (16, 8)), (100, (16, 8))):
        options = ExportOptions("parquet", codec=codec, resize=side)
        export(release, tmp_path / str(side), options)
        rows = pq.read_table(tmp_path / str(side) / "data").to_pylist()
        kinds = {Image.open(io.BytesIO(row["image"]["bytes"])).format for row in rows}
        assert kinds == {{"stored": "WEBP", "jpeg": "JPEG"}[codec]}
        assert {Image.open(io.BytesIO(row["image"]["bytes"])).size for row in rows} == {expected}
        assert {(row["width"], row["height"]) for row in rows} == {expected}
        card = (tmp_path / str(side) / "README.md").read_text()
        assert ("shorter side at most 4 pixels (Lanczos)" in card) == (side == 4)


def test_photographs_that_are_encoded_anew_are_not_said_to_be_made(
    release: Release, tmp_path: Path
) -> None:
    export(release.subset(rows=range(20)), tmp_path / "photos", ExportOptions("imagefolder"))
    imported = ReleasePaths(tmp_path / "imported")
    import_images(list_source(tmp_path / "photos"), imported, ImportOptions("imagefolder", 10**9))
    export(Release(imported.root), tmp_path / "out", ExportOptions("parquet", "png"))
    rows = pq.read_table(tmp_path / "out/data").to_pylist()
    assert len(rows) == 20
    assert all("xmp" not in Image.open(io.BytesIO(row["image"]["bytes"])).info for row in rows)
    assert "trainedAlgorithmicMedia" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("head", "values", "classes", "cls"),
    [
        ("label", ["a fox", "", "b"], ["a%20fox", "b"], [0, -1, 1]),
        ("source", ["x", "y", "z"], None, None),
        # A column of the user's own of this name stays as it is.
        ("cls", ["x", "y", "z"], None, ["x", "y", "z"]),
    ],
)
def test_images_of_no_class_have_the_label_minus_one(
    tmp_path: Path,
    wordnet: WordNet,
    head: str,
    values: list[str],
    classes: list[str] | None,
    cls: list[Any] | None,
) -> None:
    lines = [f"row-{index},text {index},{value}" for index, value in enumerate(values)]
    (tmp_path / "rows.csv").write_text("\n".join([f"id,prompt,{head}", *lines]))
    config = noise_config(catalog={"table": tmp_path / "rows.csv"}, images_per_synset=1)
    plan, run = make_plan(config), RunPaths(tmp_path / "run")
    write_plan(plan, run, wordnet=wordnet)
    generate(run.root, range(len(plan.shards)))
    release = merge([run], ReleasePaths(run.release), MergeOptions())
    for layout in ("webdataset", "parquet"):
        export(release, tmp_path / layout, ExportOptions(layout))
        listed = tmp_path / layout / "classes.txt"
        assert (listed.read_text().splitlines() if listed.exists() else None) == classes
    table = pq.read_table(tmp_path / "parquet/data")
    assert (table["cls"].to_pylist() if "cls" in table.column_names else None) == cls
    assert table["imagenet_class"].to_pylist() == [-1] * 3
    with tarfile.open(tmp_path / "webdataset/sdwn-000000.tar") as tar:
        members = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    rows = [json.loads(text) for name, text in members.items() if name.endswith("json")]
    assert [row.get("cls") for row in rows] == (cls or [None] * 3)
    tagged = [int(text) for name, text in members.items() if name.endswith(".cls")]
    assert tagged == (cls if classes else [])
