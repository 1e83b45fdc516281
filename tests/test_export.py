from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import unquote

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sdwn.cli.release import export_command, import_command
from sdwn.config import RunConfig
from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import FORMATS, ExportOptions, export, path_name
from sdwn.exchange.import_images import FORMATS as IMPORT_FORMATS
from sdwn.generation.task import generate
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Concept, make_plan, parse_table, write_plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import StagedFolder, build
from sdwn.releases.writer import Origin, write_release
from sdwn.storage.codecs import EXCHANGED
from sdwn.storage.columns import to_columns
from sdwn.storage.shards import write_images
from sdwn.wordnet.corpus import Synset, WordNet

from conftest import interrupt_at, noise_config

# Pixels and prompt of each image, by wnid and number.
Images = dict[tuple[str, int], tuple[bytes, str]]
Reader = Callable[[Path], Images]


def released(root: Path, catalog: tuple[Synset, ...], config: RunConfig) -> Release:
    """Make a release of many small parts."""
    plan = make_plan(config, catalog)
    paths = RunPaths(root)
    write_plan(plan, paths)
    generate(root, range(len(plan.shards)))
    return merge([paths], ReleasePaths(paths.release), MergeOptions(part_bytes=1))


# In the paper's catalog: they hold words by which datasets parts a folder of files into splits.
SPLIT_WORDS = """test.n.06 boat_train.n.01 bullet_train.n.01 car_train.n.01 epicyclic_train.n.01
    freight_train.n.01 hospital_train.n.01 mail_train.n.01 passenger_train.n.01 subway_train.n.01
    test_bed.n.01 test_equipment.n.01 test_paper.n.02 test_range.n.01 test_rocket.n.01
    test_room.n.01 test_tube.n.01 train.n.01 train_set.n.01 testing_ground.n.01 test_pilot.n.01
    test-tube_baby.n.01 contest.n.01 value.n.03 devil.n.02 trainer.n.02""".split()


@pytest.fixture(scope="module")
def dogs(wordnet: WordNet) -> tuple[Synset, ...]:
    """More synsets than one unit of the layouts with folders has, and such names."""
    below = sorted(wordnet.below("dog.n.01"), key=lambda synset: synset.wnid)
    some = [*below[: 110 - len(SPLIT_WORDS)], *map(wordnet.synset, SPLIT_WORDS)]
    return tuple(sorted(some, key=lambda synset: synset.wnid))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, dogs: tuple[Synset, ...]) -> Release:
    return released(tmp_path_factory.mktemp("release"), dogs, noise_config(images_per_synset=2))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, dogs: tuple[Synset, ...]) -> Release:
    config = noise_config(images_per_synset=2, storage={"codec": "raw"})
    few = dogs[:6]
    return released(tmp_path_factory.mktemp("raw"), few, config)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hub"))


def truth(release: Release) -> Images:
    rows = release.metadata.to_pylist()
    return {
        (row["wnid"], row["number"]): (release.array(row).tobytes(), row.get("prompt") or "")
        for row in rows
    }


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def number(path: str) -> int:
    return int(Path(path).stem.rpartition("_")[2])


def read_folders(root: Path) -> Images:
    found: Images = {}
    for folder in (path for path in root.iterdir() if path.is_dir()):
        lines = (folder / f"{folder.name}.txt").read_text().splitlines()
        prompt, synset, wnid = (line.partition(": ")[2] for line in lines)
        assert folder.name in (path_name(synset), wnid)
        for path in folder.glob(f"{folder.name}_*"):
            found[wnid, number(path.name)] = pixels(Image.open(path)), prompt
    return found


def synset_rows(root: Path) -> tuple[Concept, ...]:
    if ReleasePaths(root).manifest.exists():
        return tuple(Release(root).concepts.values())
    return tuple(parse_table((root / "synsets.csv").read_text()))


def prompts(root: Path) -> dict[str, str]:
    return {row.wnid: row.prompt for row in synset_rows(root)}


def read_torchvision(root: Path) -> Images:
    from torchvision.datasets import ImageFolder

    dataset, texts = ImageFolder(str(root)), prompts(root)
    return {
        (dataset.classes[label], number(path)): (pixels(image), texts[dataset.classes[label]])
        for (path, _), (image, label) in zip(dataset.samples, dataset, strict=True)
    }


def loaded(root: Path, *arguments: Any, **options: Any) -> Any:
    import datasets

    options["cache_dir"] = str(root.parent / "cache")
    return datasets.load_dataset(*arguments, split="train", **options)


def read_imagefolder(root: Path) -> Images:
    from datasets import Image as ImageFeature

    found, texts = loaded(root, "imagefolder", data_dir=str(root)), prompts(root)
    assert loaded(root, str(root)).features == found.features, "without naming the layout"
    names = found.features["label"].names
    paths = [row["path"] for row in found.cast_column("image", ImageFeature(decode=False))["image"]]
    return {
        (names[row["label"]], number(path)): (pixels(row["image"]), texts[names[row["label"]]])
        for path, row in zip(paths, found, strict=True)
    }


def read_named_folders(root: Path) -> Images:
    from datasets import Image as ImageFeature

    found = loaded(root, "imagefolder", data_dir=str(root))
    assert loaded(root, str(root)).features == found.features, "without naming the layout"
    names, texts = found.features["label"].names, prompts(root)
    wnids = {path_name(row.synset): row.wnid for row in synset_rows(root)}
    paths = [row["path"] for row in found.cast_column("image", ImageFeature(decode=False))["image"]]
    wnid_of = [wnids[names[row["label"]]] for row in found]
    return {
        (wnid, number(path)): (pixels(row["image"]), texts[wnid])
        for wnid, path, row in zip(wnid_of, paths, found, strict=True)
    }


KINDS = ("webp", "png", "jpg")


def read_webdataset(root: Path) -> Images:
    import webdataset as wds

    urls = sorted(str(path) for path in root.glob("*.tar"))
    found: Images = {}
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    labelled = all(sample["json"]["imagenet_class"] >= 0 for sample in samples)
    classes = (root / "classes.txt").read_text().splitlines()
    for sample in samples:
        row = sample["json"]
        image = next(sample[name] for name in KINDS if name in sample)
        assert classes[sample["cls"]] == path_name(row["wnid"])
        assert sample["cls"] == row["cls"]
        assert row["cls"] == row["imagenet_class"] or not labelled
        assert sample["txt"] == (row.get("prompt") or "")
        assert number(sample["__key__"]) == row["number"]
        found[row["wnid"], row["number"]] = pixels(image), sample["txt"]
    if len({next(name for name in sample if name in KINDS) for sample in samples}) == 1:
        assert len(loaded(root, str(root))) == len(samples), "as a hub's reader finds them"
    return found


def by_row(dataset: Any) -> Images:
    return {
        (row["wnid"], row["number"]): (pixels(row["image"]), row.get("prompt") or "")
        for row in dataset
    }


def read_parquet(root: Path) -> Images:
    found = by_row(loaded(root, str(root)))
    files = str(root / "data/train-*.parquet")
    assert by_row(loaded(root, "parquet", data_files=files)) == found
    return found


def read_release(root: Path) -> Images:
    assert verify(root) == []
    return truth(Release(root))


READERS: list[tuple[str, Reader]] = [
    ("folders", read_folders),
    ("folders", read_named_folders),
    ("imagefolder", read_torchvision),
    ("imagefolder", read_imagefolder),
    ("webdataset", read_webdataset),
    ("parquet", read_parquet),
    ("release", read_release),
]
# One for each layout, the quickest.
QUICK = [one for one in READERS if one[1] not in (read_named_folders, read_imagefolder)]
SLOW = [pytest.param(*one, marks=pytest.mark.model) for one in READERS if one not in QUICK]
PART_BYTES = {"webdataset": 4000, "parquet": 4000, "release": 4000}


def small(layout: str, **changes: Any) -> ExportOptions:
    return ExportOptions(layout, part_bytes=PART_BYTES.get(layout), **changes)


@pytest.mark.parametrize(("layout", "read"), [*QUICK, *SLOW])
def test_other_libraries_read_every_image(
    release: Release, tmp_path: Path, layout: str, read: Reader
) -> None:
    told = list[int]()
    done = export(release, tmp_path / "out", small(layout), told.append)
    assert read(tmp_path / "out") == truth(release)
    assert sum(told) == len(release)
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert done == {
        "format": layout,
        "images": len(release),
        "synsets": len(release.present),
        "bytes": size,
        "path": str(tmp_path / "out"),
        "splits": {},
    }
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]


@pytest.mark.parametrize(("layout", "read"), QUICK)
def test_a_subset_is_exported_alone(
    release: Release, tmp_path: Path, layout: str, read: Reader
) -> None:
    some = release.sample(0.3).subset(rows=np.arange(0, len(release.sample(0.3)), 3))
    export(some, tmp_path / "out", small(layout))
    assert read(tmp_path / "out") == truth(some)
    card = (tmp_path / "out/README.md").read_text()
    assert f"{len(some)} synthetic images of {len(some.present)} WordNet synsets" in card
    assert "30% of the synsets, chosen images" in card
    listed = prompts(tmp_path / "out")
    whole = release.concepts if layout == "release" else {row.wnid for row in some.present}
    assert set(listed) == set(whole)


@pytest.mark.parametrize("splits", [{}, {"val": 0.5, "train": 0.5}])
@pytest.mark.parametrize("layout", [name for name in FORMATS if name != "release"])
def test_the_examples_of_the_card_run(
    release: Release,
    tmp_path: Path,
    layout: str,
    splits: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export(release.subset(rows=range(9)), tmp_path / "out", small(layout, splits=splits))
    card = (tmp_path / "out/README.md").read_text()
    examples = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    assert examples
    monkeypatch.chdir(tmp_path / "out")
    for example in examples:
        found: dict[str, Any] = {}
        exec(example, found)  # as a reader would paste it
        assert found["image"].size == (16, 8)


@pytest.mark.parametrize("layout", ["folders", "webdataset"])
def test_stored_bytes_stay_as_they_are(release: Release, tmp_path: Path, layout: str) -> None:
    some = release.subset(rows=range(20))
    export(some, tmp_path / "out", small(layout))
    found = {hashlib.sha256(payload).hexdigest() for payload in payloads(tmp_path / "out", "webp")}
    assert found == set(some.metadata["sha256"].to_pylist())


def payloads(root: Path, extension: str) -> Iterator[bytes]:
    """Give the image files of an export, whatever its layout; all have this extension."""
    for path in sorted(root.rglob("*")):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                yield from (
                    tar.extractfile(one).read()  # type: ignore[union-attr]
                    for one in tar
                    if one.name.endswith(f".{extension}")
                )
        elif path.suffix == ".parquet":
            images = pq.read_table(path)["image"].to_pylist()
            assert all(image["path"].endswith(f".{extension}") for image in images)
            yield from (image["bytes"] for image in images)
        elif path.suffix == f".{extension}":
            yield path.read_bytes()


@pytest.mark.parametrize(("layout", "read"), QUICK[:-1])
def test_raw_images_become_png(raw: Release, tmp_path: Path, layout: str, read: Reader) -> None:
    export(raw, tmp_path / "out", small(layout))
    assert read(tmp_path / "out") == truth(raw)
    assert len(list(payloads(tmp_path / "out", "png"))) == len(raw)
    assert "| encoding | png, lossless |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("codec", "quality", "extension", "said"),
    [
        ("png", None, "png", "png, lossless, anew from webp"),
        ("webp", None, "webp", "webp, lossless"),
        ("webp", 40, "webp", "webp, quality 40, anew from webp"),
        ("jpeg", None, "jpg", "jpeg, quality 95, anew from webp"),
        ("jpeg", 20, "jpg", "jpeg, quality 20, anew from webp"),
    ],
)
def test_images_are_encoded_as_asked(
    release: Release,
    tmp_path: Path,
    codec: str,
    quality: int | None,
    extension: str,
    said: str,
) -> None:
    some = release.subset(rows=range(20))
    export(some, tmp_path / "out", small("parquet", codec=codec, quality=quality))
    assert f"| encoding | {said} |" in (tmp_path / "out/README.md").read_text()
    found = list(payloads(tmp_path / "out", extension))
    assert [Image.open(io.BytesIO(one)).format for one in found] == [codec.upper()] * len(some)
    before = [release.image(row) for row in sorted_rows(some)]
    after = [Image.open(io.BytesIO(one)).convert("RGB") for one in found]
    if "lossless" in said:
        assert list(map(pixels, after)) == list(map(pixels, before))
    else:
        assert 0 < error(before, after) < (5 if "95" in said else 40)


def error(before: list[Image.Image], after: list[Image.Image]) -> float:
    """Give the mean difference in grey: of noise, colours keep little at half their size."""
    grey = [
        np.array([np.asarray(one.convert("L"), "i4") for one in some]) for some in (before, after)
    ]
    return float(np.abs(grey[0] - grey[1]).mean())


def sorted_rows(release: Release) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = release.metadata.to_pylist()
    return sorted(rows, key=lambda row: (row["wnid"], row["number"]))


def test_a_lower_quality_makes_smaller_files(release: Release, tmp_path: Path) -> None:
    sizes = []
    for quality in (95, 50, 5):
        options = ExportOptions("folders", codec="jpeg", quality=quality)
        export(release.sample(0.1), tmp_path / str(quality), options)
        sizes.append(sum(map(len, payloads(tmp_path / str(quality), "jpg"))))
    assert sizes[0] > sizes[1] > sizes[2]


def test_records_say_what_the_files_hold(release: Release, tmp_path: Path) -> None:
    some = release.subset(rows=range(8))
    export(some, tmp_path / "out", ExportOptions("parquet", codec="png"))
    rows = pq.read_table(next(tmp_path.glob("out/data/*"))).to_pylist()
    for row, before in zip(rows, sorted_rows(some), strict=True):
        assert row["sha256"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()
        for name in ("wnid", "synset", "number", "seed", "status", "prompt", "width"):
            assert row[name] == before[name]
        index = before["imagenet_class"]
        assert row["imagenet_class"] == (-1 if index is None else index)
        assert row["text"] == row["prompt"]
        assert not {"part", "row", "offset", "bytes", "codec", "task_run"} & set(row)


def test_files_hold_whole_synsets_and_name_their_number(release: Release, tmp_path: Path) -> None:
    options = ExportOptions("parquet", part_bytes=20_000)
    export(release, tmp_path / "parquet", options)
    files = sorted((tmp_path / "parquet/data").iterdir())
    assert len(files) > 2
    names = [f"train-{index:05d}-of-{len(files):05d}.parquet" for index in range(len(files))]
    assert [path.name for path in files] == names
    wnids = [set(pq.read_table(path)["wnid"].to_pylist()) for path in files]
    assert sum(map(len, wnids)) == len(set[str]().union(*wnids)) == len(release.present)
    export(release, tmp_path / "one", ExportOptions("parquet"))
    metadata = pq.ParquetFile(next(tmp_path.glob("one/data/*"))).metadata
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert groups == [100, 100, 20]


def test_parts_made_smaller_by_a_codec_are_as_large_as_asked(raw: Release, tmp_path: Path) -> None:
    # Raw, a synset's two images have 768 bytes; as JPEG of low quality about twice 650.
    export(raw, tmp_path / "out", ExportOptions("parquet", "jpeg", quality=1, part_bytes=1200))
    assert len(list(tmp_path.glob("out/data/*"))) == len(raw.present)


def test_tars_are_the_same_every_time(release: Release, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export(release, tmp_path / name, small("webdataset"))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    with tarfile.open(tmp_path / "first/sdwn-000000.tar") as tar:
        assert {(one.mtime, one.uid, one.gid, one.uname) for one in tar} == {(0, 0, 0, "")}


def contents(root: Path) -> dict[str, bytes]:
    """Read all files but those that say when they were written."""
    dated = (
        {"manifest.json", "README.md", "SHA256SUMS"} if (root / "manifest.json").exists() else ()
    )
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in dated]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.parametrize("layout", FORMATS)
def test_a_killed_export_goes_on_where_it_was(
    release: Release, tmp_path: Path, layout: str
) -> None:
    export(release, tmp_path / "undisturbed", small(layout))
    with pytest.raises(KeyboardInterrupt):
        export(release, tmp_path / "out", small(layout), interrupt_at(150))
    unfinished = tmp_path / ".out.unfinished"
    lines = (unfinished / ".journal.jsonl").read_text().splitlines()[1:]
    assert lines
    assert not (tmp_path / "out").exists()
    before = inodes(unfinished)
    (unfinished / ".sdwn-000001.tar.elsewhere-1-0.tmp").write_bytes(b"half")
    if layout in ("folders", "imagefolder"):
        last = max(unfinished.rglob("*.webp"), key=lambda path: path.stat().st_mtime_ns)
        last.write_bytes(b"half")
    told = list[int]()
    export(release, tmp_path / "out", small(layout), told.append)
    assert sum(told) == len(release)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not unfinished.exists()
    if layout not in ("folders", "imagefolder"):
        after = inodes(tmp_path / "out")
        names = [json.loads(line)["name"] for line in lines]
        assert [after[name] for name in names] == [before[name] for name in names]


def inodes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_ino for path in root.rglob("*")}


def test_an_unfinished_export_of_something_else_is_begun_anew(
    release: Release, tmp_path: Path
) -> None:
    def interrupt(_: int) -> None:
        if list(tmp_path.glob(".out.unfinished/*.tar")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(release, tmp_path / "out", small("webdataset"), interrupt)
    some = release.sample(0.5)
    export(some, tmp_path / "out", small("webdataset", codec="png"))
    assert read_webdataset(tmp_path / "out") == truth(some)


def one_each(root: Path, synsets: Iterable[Synset]) -> Release:
    """Make a release of one small image a synset."""
    storage = {"images_per_shard": 2000}
    config = noise_config(
        images_per_synset=1, generation={"height": 8, "width": 8}, storage=storage
    )
    return released(root, tuple(synsets), config)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, paper: tuple[Synset, ...]) -> Release:
    return one_each(tmp_path_factory.mktemp("catalog"), paper)


@pytest.mark.long
@pytest.mark.parametrize("layout", FORMATS)
def test_every_name_of_the_paper_is_loaded(catalog: Release, tmp_path: Path, layout: str) -> None:
    expected = truth(catalog)
    assert len(expected) == 26_204
    export(catalog, tmp_path / "out", ExportOptions(layout))
    for name, read in READERS:
        if name == layout:
            assert read(tmp_path / "out") == expected


@given(
    st.lists(
        st.sampled_from("train test val dev eval a B . _ - 1".split()), min_size=1, max_size=12
    )
)
def test_no_name_holds_a_word_of_a_split(words: list[str]) -> None:
    name = "".join(words)
    held = re.split(r"[-._ 0-9]", path_name(name))
    assert not {"train", "test", "val", "dev", "eval"} & set(held)
    assert unquote(path_name(name)) == name


HOSTILE = ("../../evil.n.01", "..", ".hidden.n.01", "read/write_head.n.01", "Lo/Ovral.n.01")
HOSTILE += ("back\\slash.n.01", "new\nline.n.01", "-rf", "~", "ünïcødé.n.01", "x" * 300)
HOSTILE += ("x" * 300 + "y", "a b;$(touch c)'\".n.01", "%2F", "con:*?.n.01", "synsets.csv.n.01")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Synsets of hostile names; two also with wnids that are."""
    wnids = ["../n0", "n.1", *(f"n{index:08d}" for index in range(2, len(HOSTILE)))]
    synsets = tuple(
        Synset(wnid, name, ("lemma",), f"a thing\ncalled {index}")
        for index, (wnid, name) in enumerate(zip(wnids, HOSTILE, strict=True))
    )
    config = noise_config(images_per_synset=2)
    return released(tmp_path_factory.mktemp("hostile"), synsets, config)


@pytest.mark.parametrize("layout", FORMATS)
def test_no_name_leads_out_of_the_export(hostile: Release, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "deep/down/out"
    target.parent.mkdir(parents=True)
    export(hostile, target, small(layout))
    assert [path for path in tmp_path.rglob("*") if target not in (path, *path.parents)] == [
        tmp_path / "deep",
        tmp_path / "deep/down",
    ]
    pictures = {pixels for pixels, _ in truth(hostile).values()}
    if layout == "release":
        assert read_release(target) == truth(hostile)
    else:
        found = [pixels(Image.open(io.BytesIO(one))) for one in payloads(target, "webp")]
        assert len(found) == len(hostile)
        assert set(found) == pictures
    if layout == "webdataset":
        assert read_webdataset(target) == truth(hostile)
    if layout == "imagefolder":
        assert len(read_torchvision_classes(target)) == len(HOSTILE)
    if layout == "folders":
        texts = [path.read_text() for path in target.glob("*/*.txt")]
        assert len(texts) == len(HOSTILE)
        assert all(len(text.splitlines()) == 3 for text in texts)


def read_torchvision_classes(root: Path) -> list[str]:
    from torchvision.datasets import ImageFolder

    return list(ImageFolder(str(root)).classes)


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("README.md", "synsets.csv"), ["%52EADME.md", "%73ynsets.csv"]),
        (("a.n.01", "a.n.01"), ["n00000000", "n00000001"]),
    ],
)
def test_no_two_synsets_share_a_folder_and_none_is_called_as_a_file_beside_it(
    tmp_path: Path, names: tuple[str, str], folders: list[str]
) -> None:
    synsets = tuple(
        Synset(f"n0000000{index}", name, ("a",), "a thing") for index, name in enumerate(names)
    )
    release = released(tmp_path / "run", synsets, noise_config())
    for layout, read in (("folders", read_folders), ("imagefolder", read_torchvision)):
        export(release, tmp_path / layout, ExportOptions(layout))
        assert read(tmp_path / layout) == truth(release)
    found = (path.name for path in (tmp_path / "folders").iterdir() if path.is_dir())
    assert sorted(found) == folders


@given(st.lists(st.text(max_size=400) | st.sampled_from(HOSTILE), unique=True, max_size=8))
def test_a_file_name_is_one_harmless_component(names: list[str]) -> None:
    found = [path_name(name) for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        assert name not in ("", ".", "..")
        assert name[0] not in ".-~"
        assert not set(name) & set("/\\\0\n:*?\"'<>| $;&")
        assert name.isascii()
        assert len(name) <= 200


def test_usual_names_stay_as_they_are() -> None:
    for name in ("dog.n.01", "n02084071", "jack-o'-lantern.n.02".replace("'", ""), "a_b.n.10"):
        assert path_name(name) == name
    assert path_name("") == "%"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "folders", "quality": 80}, "stored has no quality"),
        ({"format": "folders", "codec": "png", "quality": 80}, "png has no quality"),
        ({"format": "release", "codec": "png"}, "keeps its images as they are"),
        ({"format": "folders", "part_bytes": 10}, "has a file for each image"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportOptions(**options)


def test_the_commands_offer_every_format_and_codec() -> None:
    """A command's choices are written out, for its help costs no import of the formats."""
    hints = get_type_hints(export_command)
    assert set(get_args(hints["format_"])) == set(FORMATS)
    codecs, _none = get_args(hints["codec"])
    assert set(get_args(codecs)) == {"stored", *EXCHANGED}
    assert set(get_args(get_type_hints(import_command)["format_"])) == set(IMPORT_FORMATS)


@pytest.mark.parametrize("layout", ["parquet", "release"])
def test_nothing_is_overwritten_and_nothing_empty_written(
    release: Release, tmp_path: Path, layout: str
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(UsageError, match="expected an empty folder or none, found other files"):
        export(release, tmp_path / "thesis", small(layout))
    with pytest.raises(UsageError, match="no image to export; choose a larger subset"):
        export(release.subset(status="nsfw"), tmp_path / "out", small(layout))
    with pytest.raises(UsageError, match="lies inside the release"):
        export(release, release.paths.root / "deep/out", small(layout))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter1.tex", "thesis"]
    assert verify(release.paths.root, quick=True) == []


@pytest.mark.parametrize("layout", ["folders", "release"])
def test_a_damaged_image_is_not_exported(release: Release, tmp_path: Path, layout: str) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    with h5py.File(root / "images-00003.h5", "r+") as file:
        file["blob"][int(file["offsets"][3]) + 40] ^= 16
    with pytest.raises(IntegrityError, match=r"images-00003\.h5.* damaged"):
        export(Release(root), tmp_path / "out", small(layout))
    assert not (tmp_path / "out").exists()


def test_images_of_a_plan_that_the_release_lacks_are_not_exported(
    raw: Release, tmp_path: Path
) -> None:
    copied = Release(shutil.copytree(raw.paths.root, tmp_path / "copied"))
    table = copied.metadata
    strange = pa.array(["f" * 64] * len(table)).dictionary_encode()
    at = table.column_names.index("plan")
    pq.write_table(table.set_column(at, "plan", strange), copied.paths.metadata)
    expected = rf"^images-00000\.h5: foreign: of plan {'f' * 12}, which its release does not list"
    with pytest.raises(IntegrityError, match=expected):
        export(Release(copied.paths.root), tmp_path / "out", ExportOptions("release"))
    assert not (tmp_path / "out").exists()


PHOTOS = ("n00000001", "n00000002", "n00000003")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Photographs of three synsets, one after the other, without prompts, sizes their own."""
    root = tmp_path_factory.mktemp("imported") / "release"
    rows, files = photographs()
    synsets = tuple(Concept(wnid, "", wnid, f"{wnid}.n.01") for wnid in PHOTOS)
    origin = Origin(
        {"origin": "import", "catalog": "photos"},
        imported=synsets,
        skipped=(("a.jpg", "cut short"),),
    )

    def write(path: Path, attributes: Any) -> str:
        sizes = [len(file) for file in files]
        return write_images(path, attributes, (to_columns(rows), sizes, []), files)

    def fill(staged: StagedFolder) -> None:
        write_release(staged, origin, [({}, write, "")])

    build(root, {}, fill)
    return Release(root)


def photographs() -> tuple[list[dict[str, Any]], list[bytes]]:
    rows, files = [], []
    for index in range(12):
        buffer, codec = io.BytesIO(), ("png", "jpeg")[index % 2]
        Image.new("RGB", (9 + index, 7), (index, 40, 20 * index)).save(buffer, codec)
        files.append(buffer.getvalue())
        digest = hashlib.sha256(files[-1]).digest()
        wnid = PHOTOS[index % 3]
        row = {"id": wnid, "wnid": wnid, "synset": f"{wnid}.n.01"}
        row |= {"number": index // 3, "status": "unknown"}
        row |= {"width": 9 + index, "height": 7, "codec": codec, "sha256": digest}
        rows.append({**row, "file": f"{index}.{codec}"})
    return rows, files


@pytest.mark.parametrize(("layout", "read"), QUICK)
def test_an_imported_release_is_exported_too(
    imported: Release, tmp_path: Path, layout: str, read: Reader
) -> None:
    export(imported, tmp_path / "out", small(layout))
    assert read(tmp_path / "out") == truth(imported)
    if layout == "release":
        found = Release(tmp_path / "out")
        assert (found.manifest.origin, found.manifest.settings) == ("import", None)
        assert found.manifest.skipped == 1
        assert found.paths.skipped.read_text() == imported.paths.skipped.read_text()


def test_a_smaller_release_says_what_it_is(release: Release, tmp_path: Path) -> None:
    some = release.subset(imagenet=True).sample(0.5)
    export(some, tmp_path / "half", ExportOptions("release"))
    half = Release(tmp_path / "half")
    assert half.manifest.selection == "ImageNet-1k classes, 50% of the synsets"
    assert half.manifest.plan_digest == release.manifest.plan_digest
    assert half.concepts == release.concepts
    assert half.metadata["sha256"].to_pylist() == some.metadata["sha256"].to_pylist()
    assert half.provenance(0)["task_run"] == some.provenance(0)["task_run"]
    export(half.sample(0.5), tmp_path / "quarter", ExportOptions("release"))
    quarter = Release(tmp_path / "quarter")
    assert quarter.manifest.selection == f"{half.manifest.selection}, 50% of the synsets"
    assert verify(quarter.paths.root) == []


def test_parts_of_a_smaller_release_are_as_large_as_asked(release: Release, tmp_path: Path) -> None:
    export(release, tmp_path / "out", ExportOptions("release", part_bytes=20_000))
    sizes: list[int] = []
    for part in sorted(tmp_path.glob("out/*.h5")):
        with h5py.File(part) as file:
            sizes.append(len(file["blob"]))
    assert len(sizes) > 1
    assert all(size >= 20_000 for size in sizes)


def test_what_a_run_had_not_made_stays_recorded(tmp_path: Path, dogs: tuple[Synset, ...]) -> None:
    plan = make_plan(noise_config(), dogs[:6])
    paths = RunPaths(tmp_path / "run")
    write_plan(plan, paths)
    generate(paths.root, [0, 2])
    incomplete = merge([paths], ReleasePaths(paths.release), MergeOptions(allow_missing=True))
    export(incomplete, tmp_path / "out", ExportOptions("release"))
    found = Release(tmp_path / "out")
    assert found.manifest.missing == incomplete.manifest.missing
    assert found.paths.missing.read_text() == incomplete.paths.missing.read_text()
    assert verify(found.paths.root) == []
