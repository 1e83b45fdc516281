"""Exports in the hands of those who train: each row of the table in docs/training.md, for real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import chdir
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdwn
import torch
from sdwn.exchange.export import ExportOptions, export
from sdwn.releases.release import Release
from sdwn.releases.splits import split_images
from sdwn.wordnet.corpus import WordNet
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor
from webdataset.tariterators import tar_file_expander

from conftest import FEW, REPOSITORY
from drawn import noise_release

pytestmark = pytest.mark.model

PAGE = REPOSITORY / "docs/training.md"
SHARES = {"train": 0.8, "val": 0.2}
WORKS = ("load", "stream", "shuffle", "split", "labels", "prompts")
# What a cell of the table has where nothing works, or is needed.
NONE = "\N{EN DASH}"
# Batches of so many images.
BATCH = 10


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    """Thirteen synsets, of which five are ImageNet classes, of ten images each."""
    folder = tmp_path_factory.mktemp("release")
    return noise_release(folder, wordnet, (), catalog=FEW)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def exports(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The release in two splits and, where that means something, in a random order."""

    @cache
    def exported(layout: str) -> Path:
        root = tmp_path_factory.mktemp(layout) / "out"
        seed = 1 if layout in ("webdataset", "parquet") else None
        size = 6_000 if seed else None
        export(release, root, ExportOptions(layout, "png", None, size, seed, SHARES))
        return root

    return exported


def expected(release: Release, split: str, column: str) -> list[Any]:
    """The values of a column in a split."""
    inside = split_images(release, SHARES) == list(SHARES).index(split)
    return [
        value
        for value, is_in in zip(release.metadata[column].to_pylist(), inside, strict=True)
        if is_in
    ]


def classes(release: Release) -> list[str]:
    return sorted(release.metadata["wnid"].unique().to_pylist())


def labels(release: Release, split: str) -> list[int]:
    known = classes(release)
    return sorted(known.index(wnid) for wnid in expected(release, split, "wnid"))


def mixed(release: Release, first: list[int]) -> bool:
    """Whether the first batch is of many classes."""
    return len(set(first)) > len(classes(release)) // 3


# --- The commands of the page --------------------------------------------------------------------
def commands(program: str) -> Iterator[list[str]]:
    """The arguments of the page's commands that call a program."""
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if program in words:
                yield words[words.index(program) + 1 :]


def values(arguments: list[str]) -> dict[str, str]:
    """Options that take a value, by name."""
    pairs = pairwise(arguments)
    return {one[2:].replace("-", "_"): two for one, two in pairs if one.startswith("--")}


# --- Each row of the table: what works, with the library itself ----------------------------------
def torch_reads_the_release(release: Release, _: Path) -> set[str]:
    rows = np.flatnonzero(split_images(release, SHARES) == 0)
    train = sdwn.ReleaseDataset(release.subset(rows=rows), pil_to_tensor)
    loader = DataLoader(train, BATCH, shuffle=True, num_workers=2)
    found = [label for _, batch in loader for label in batch.tolist()]
    assert sorted(found) == labels(release, "train")
    prompts = sdwn.ReleaseDataset(release, labels="prompt")
    assert prompts[3][1] == release.row(3)["prompt"]
    return {"load", "shuffle", "split", "labels", "prompts"}


def torchvision_reads_folders(release: Release, root: Path) -> set[str]:
    from torchvision.datasets import ImageFolder

    for split in SHARES:
        dataset = ImageFolder(root / split, pil_to_tensor)
        found = [label for _, batch in DataLoader(dataset, BATCH, shuffle=True) for label in batch]
        assert sorted(map(int, found)) == labels(release, split)
        assert dataset.classes == classes(release)
    return {"load", "shuffle", "split", "labels"}


def timm_loads(name: str, root: Path | None, split: str, training: bool, **keys: Any) -> list[int]:
    """The labels that timm's own loader yields, in its order."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset(
        name, root=root and str(root), split=split, is_training=training, batch_size=BATCH, **keys
    )
    loader = create_loader(
        dataset,
        (3, 8, 8),
        BATCH,
        is_training=training,
        num_workers=2 * training,
        use_prefetcher=False,
    )
    return [int(label) for _, batch in loader for label in batch]


def timm_reads_folders(release: Release, root: Path) -> set[str]:
    names = str(root / "classes.txt")
    for split in SHARES:
        assert sorted(timm_loads("", root, split, False, class_map=names)) == labels(release, split)
    assert mixed(release, timm_loads("", root, "train", True)[:BATCH])
    return {"load", "shuffle", "split", "labels"}


def timm_reads_tars(release: Release, root: Path) -> set[str]:
    for split in SHARES:
        assert sorted(timm_loads("wds/", root, split, False)) == labels(release, split)
    found = timm_loads("wds/", root, "train", True)
    # Workers repeat a few, so that each has as many batches.
    assert set(found) == set(labels(release, "train"))
    assert mixed(release, found[:BATCH])
    # Of the record: what is of no class is left out.
    only = timm_loads("wds/", root, "val", False, target_key="imagenet_class")
    known = [index for index in expected(release, "val", "imagenet_class") if index is not None]
    assert sorted(only) == sorted(known)
    return {"stream", "shuffle", "split", "labels"}


def timm_reads_tables(release: Release, root: Path) -> set[str]:
    for split in SHARES:
        found = timm_loads(f"hfds/{root}", None, split, False, target_key="cls")
        assert sorted(found) == labels(release, split)
    assert mixed(release, timm_loads(f"hfds/{root}", None, "train", True, target_key="cls")[:BATCH])
    count = len(labels(release, "val"))
    streamed = timm_loads(f"hfids/{root}", None, "val", False, target_key="cls", num_samples=count)
    assert sorted(streamed) == labels(release, "val")
    return {"load", "stream", "shuffle", "split", "labels"}


def webdataset_reads_tars(release: Release, root: Path) -> set[str]:
    import webdataset as wds

    for split in SHARES:
        urls = sorted(map(str, root.glob(f"sdwn-{split}-*.tar")))
        assert len(urls) > 1
        pipeline = (
            wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls", "txt")
        )
        samples = list(pipeline)
        assert mixed(release, [label for _, label, _ in samples[:BATCH]]), "without a buffer"
        assert sorted(label for _, label, _ in samples) == labels(release, split)
        assert sorted(text for _, _, text in samples) == sorted(expected(release, split, "prompt"))
    shuffled = (
        wds.WebDataset(urls, shardshuffle=10, seed=1).shuffle(100).decode("pil").to_tuple("cls")
    )
    assert sorted(label for (label,) in shuffled) == labels(release, "val")
    return {"stream", "shuffle", "split", "labels", "prompts"}


def open_clip_reads_tars(release: Release, root: Path) -> set[str]:
    """By the command of the page, for the tars that there are."""
    import open_clip
    from open_clip_train import data as reader
    from open_clip_train.params import parse_args

    # open_clip asks for webdataset up to 0.2.86; later ones mark a tar's end with an empty sample.
    reader.tar_file_expander = partial(tar_file_expander, eof_value=None)
    (arguments,) = commands("open_clip_train.main")
    last = {one: len(list(root.glob(f"sdwn-{one}-*"))) - 1 for one in SHARES}
    args = parse_args(
        [
            re.sub(
                r"(\w+)-{0+\.\.\d+}", lambda m: f"{m[1]}-{{000000..{last[m[1]]:06d}}}", one
            ).replace("TARS/", f"{root}/")
            for one in arguments
        ]
    )
    args.batch_size, args.workers, args.seed = BATCH, 2, 1
    args.distributed, args.world_size, args.rank = False, 1, 0
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = reader.get_data(args, (pil_to_tensor, pil_to_tensor), tokenizer=tokenizer)
    texts = {tuple(tokenizer(text)[0].tolist()) for text in release.metadata["prompt"].to_pylist()}
    for split in SHARES:
        batches = list(data[split].dataloader)
        found = [tuple(row.tolist()) for _, tokens in batches for row in tokens]
        assert set(found) <= texts
        assert all(images.shape[1:] == (3, 8, 16) for images, _ in batches)
    assert data["train"].dataloader.num_samples > 0, "counted in sizes.json"
    assert len({tuple(row.tolist()) for row in batches[0][1]}) > 4, "a batch of many prompts"
    return {"stream", "shuffle", "split", "prompts"}


def by_datasets(root: Path, **options: Any) -> Any:
    from datasets import load_dataset

    return load_dataset(str(root), **options)


def read_splits(release: Release, root: Path, label: str, text: str | None) -> Any:
    """Load and stream with datasets, compare labels and prompts; return what is loaded."""
    loaded, streamed = by_datasets(root), by_datasets(root, streaming=True)
    for split in SHARES:
        assert loaded[split][0][image_column(loaded)].size == (16, 8)
        assert sorted(loaded[split][label]) == labels(release, split)
        if text:
            assert sorted(loaded[split][text]) == sorted(expected(release, split, "prompt"))
    # One of them: the library waits a second or two at the end of each stream.
    rows = list(streamed["val"].shuffle(seed=1, buffer_size=50))
    assert sorted(row[label] for row in rows) == labels(release, "val")
    return loaded["train"]


def image_column(loaded: Any) -> str:
    return "image" if "image" in loaded["train"].column_names else "png"


def datasets_reads_image_folders(release: Release, root: Path) -> set[str]:
    train = read_splits(release, root, "label", None)
    assert train.features["label"].names == classes(release)
    return {"load", "stream", "shuffle", "split", "labels"}


def datasets_reads_folders(release: Release, root: Path) -> set[str]:
    names = sorted(release.metadata["synset"].unique().to_pylist())
    loaded = by_datasets(root)
    for split in SHARES:
        assert loaded[split].features["label"].names == names
        found = [names[label] for label in loaded[split]["label"]]
        assert sorted(found) == sorted(expected(release, split, "synset"))
    assert len(list(by_datasets(root, streaming=True)["val"])) == len(found)
    return {"load", "stream", "shuffle", "split", "labels"}


def datasets_reads_tars(release: Release, root: Path) -> set[str]:
    assert mixed(release, read_splits(release, root, "cls", "txt")["cls"][:BATCH])
    return {"load", "stream", "shuffle", "split", "labels", "prompts"}


def datasets_reads_tables(release: Release, root: Path) -> set[str]:
    train = read_splits(release, root, "cls", "text")
    assert train.features["cls"].names == classes(release)
    assert mixed(release, train["cls"][:BATCH]), "without a buffer"
    known = [-1 if one is None else one for one in expected(release, "train", "imagenet_class")]
    assert sorted(train["imagenet_class"]) == sorted(known)
    torched = train.select_columns(["image", "cls"]).with_format("torch")
    images, indices = next(iter(DataLoader(torched, BATCH, num_workers=2))).values()
    assert images.shape == (BATCH, 3, 8, 16)
    assert indices.dtype == torch.int64
    return {"load", "stream", "shuffle", "split", "labels", "prompts"}


def diffusers_reads_tables(release: Release, root: Path) -> set[str]:
    # As train_text_to_image_lora.py does it: the columns by their default names, then a transform.
    (arguments,) = commands("train_text_to_image_lora.py")
    assert values(arguments)["dataset_name"] == "TABLES"
    dataset = by_datasets(root)
    assert {"image", "text"} <= set(dataset["train"].column_names)
    prepared = (
        dataset["train"]
        .shuffle(seed=1)
        .with_transform(
            lambda rows: {
                "pixel_values": [pil_to_tensor(image.convert("RGB")) for image in rows["image"]],
                "captions": rows["text"],
            }
        )
    )
    batches = list(DataLoader(prepared, BATCH, num_workers=0))
    found = [caption for batch in batches for caption in batch["captions"]]
    assert sorted(found) == sorted(expected(release, "train", "prompt"))
    return {"load", "shuffle", "split", "prompts"}


READERS: dict[tuple[str, str], Callable[[Release, Path], set[str]]] = {
    ("release", "torch"): torch_reads_the_release,
    ("imagefolder", "torchvision"): torchvision_reads_folders,
    ("imagefolder", "timm"): timm_reads_folders,
    ("imagefolder", "datasets"): datasets_reads_image_folders,
    ("folders", "datasets"): datasets_reads_folders,
    ("webdataset", "webdataset"): webdataset_reads_tars,
    ("webdataset", "timm"): timm_reads_tars,
    ("webdataset", "open_clip"): open_clip_reads_tars,
    ("webdataset", "datasets"): datasets_reads_tars,
    ("parquet", "datasets"): datasets_reads_tables,
    ("parquet", "timm"): timm_reads_tables,
    ("parquet", "diffusers"): diffusers_reads_tables,
}


def table() -> dict[tuple[str, str], set[str]]:
    """The page's table: what works, by format and library."""
    text = PAGE.read_text().partition("| format | library |")[2].partition("\n\n")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 2 + len(WORKS) for row in cells)
    return {
        (row[0], row[1]): {name for name, cell in zip(WORKS, row[2:], strict=True) if cell != NONE}
        for row in cells
    }


def test_each_row_of_the_table_has_its_reader() -> None:
    assert set(table()) == set(READERS)


@pytest.mark.parametrize(("layout", "library"), READERS)
def test_what_the_table_promises_works(
    release: Release, exports: Callable[[str], Path], layout: str, library: str
) -> None:
    # Libraries shuffle by torch's random state, which the tests before have changed.
    torch.manual_seed(0)
    root = release.paths.root if layout == "release" else exports(layout)
    assert READERS[layout, library](release, root) == table()[layout, library]


@pytest.fixture
def named(exports: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the exports by the names that the page gives them."""
    for name, layout in (("FOLDERS", "imagefolder"), ("TARS", "webdataset"), ("TABLES", "parquet")):
        (tmp_path / name).symlink_to(exports(layout))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_timm_trains_by_the_commands(release: Release, named: Path) -> None:
    found = list(map(values, commands("train.py")))
    assert len(found) == 3
    for given in found:
        root = Path(given["data_dir"]) if "data_dir" in given else None
        keys = {name: given[name] for name in ("class_map", "target_key") if name in given}
        assert given["train_split"] == "train"
        got = timm_loads(given.get("dataset", ""), root, given["val_split"], False, **keys)
        assert sorted(got) == labels(release, "val")
        assert max(got) < len((named / "FOLDERS/classes.txt").read_text().splitlines())


def test_the_example_in_python_runs(release: Release, tmp_path: Path) -> None:
    (tmp_path / "RELEASE").symlink_to(release.paths.root)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    with chdir(tmp_path):
        exec(block.replace("num_workers=8", "num_workers=0"), found)
    images, prompts = next(iter(found["loader"]))
    assert len(images) == len(prompts) == round(0.9 * len(release))
