"""A release of a table of prompts: its exports, the import of folders of classes, and its pages."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from sdwn.browser.library import Library, View
from sdwn.browser.pages import url
from sdwn.errors import UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import FORMATS, ExportOptions, export, path_name, select_listed
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.generation.task import generate
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import make_plan, write_plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from conftest import hide_wordnet, noise_config
from served import served

ZEBRA, ROWS = "n02391049", 1000
# Of the first a dataset's reader must not take the type from; the last is the id of another row.
LABELS = [None, "zebra", "Indigo_Bunting", "<b>bold</b>", "x" * 200, "test", "row-0"]
IDS = {3: "<i>", 4: "=1+1", 5: "..x y%41", 6: "README.md", 7: "é" * 70}


def row(index: int) -> dict[str, Any]:
    content = {
        "id": IDS.get(index, f"row-{index}"),
        # Each two rows have the same.
        "prompt": f"a {LABELS[index // 2 % 7]} <em>in</em> a field, take {index // 2}",
        "label": LABELS[index % len(LABELS)],
        "seed": index if index % 2 else None,
        "negative_prompt": "blurry" if index % 3 == 0 else None,
        "images": 2 if index == 1 else None,
        "source": None if index < 20 else f"model {index % 3}",
        "score": index / 4 if index % 5 else None,
        "good": index % 2 == 0,
        "tags": ["a", "b", "c"][: index % 4],
    }
    return {name: value for name, value in content.items() if value is not None}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    folder = tmp_path_factory.mktemp("table")
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps(row(index)) + "\n" for index in range(ROWS)))
    config = noise_config(
        catalog={"table": table}, images_per_synset=1, storage={"images_per_shard": 400}
    )
    plan, run = make_plan(config), RunPaths(folder / "run")
    write_plan(plan, run, wordnet=wordnet)
    generate(run.root, range(len(plan.shards)))
    return merge([run], ReleasePaths(folder / "release"), MergeOptions())


@pytest.fixture(scope="module")
def few(release: Release) -> Release:
    return release.subset(rows=range(40))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hub"))


def loaded(root: Path, *arguments: Any, **options: Any) -> Any:
    import datasets

    options["cache_dir"] = str(root.parent / "cache")
    return datasets.load_dataset(*arguments, split="train", **options)


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


# Exports


def test_parquet_gives_back_every_row_with_its_columns(release: Release, tmp_path: Path) -> None:
    assert verify(release.paths.root) == []
    export(release, tmp_path / "out", ExportOptions("parquet", part_bytes=100_000))
    found = loaded(tmp_path, str(tmp_path / "out"))
    types = {name: getattr(kind, "dtype", None) for name, kind in found.features.items()}
    assert (types["id"], types["score"], types["good"]) == ("string", "float64", "bool")
    assert (types["seed"], found.features["tags"].feature.dtype) == ("uint64", "string")
    images = {(one["id"], one["number"]): one for one in found}
    assert len(images) == len(found) == len(release) == ROWS + 1
    for index in range(ROWS):
        given = row(index)
        one = images[given["id"], 0]
        for name in ("id", "prompt", "label", "source", "score", "good", "tags"):
            assert one[name] == given.get(name, "" if name == "label" else None), name
        assert one["negative_prompt"] == given.get("negative_prompt", "")
        if "seed" in given and index != 1:
            assert one["seed"] == given["seed"]
        assert one["wnid"] == {"zebra": ZEBRA, "Indigo_Bunting": "n01537544"}.get(
            given.get("label")
        )
    whole = release.metadata.to_pylist()[::97]
    assert all(
        pixels(images[one["id"], one["number"]]["image"]) == pixels(release.image(one))
        for one in whole
    )


def test_tars_have_no_null_for_a_text(few: Release, tmp_path: Path) -> None:
    export(few, tmp_path / "out", ExportOptions("webdataset"))
    found = {
        (one["json"]["id"], one["json"]["number"]): one
        for one in loaded(tmp_path, str(tmp_path / "out"))
    }
    assert len(found) == len(few)
    for one in few.metadata.to_pylist():
        record = found[one["id"], one["number"]]["json"]
        assert record["source"] == (one["source"] or "")
        assert record["wnid"] == (one["wnid"] or "")
        assert (record["tags"], record["good"]) == (one["tags"], one["good"])
        assert found[one["id"], one["number"]]["txt"] == one["prompt"]


def test_folders_of_classes_are_shared_by_wnid_or_label(few: Release, tmp_path: Path) -> None:
    export(few, tmp_path / "out", ExportOptions("imagefolder"))
    expected = Counter[str]()
    for one in few.metadata.to_pylist():
        name = path_name(one["wnid"] or one["label"] or one["id"])
        # No label, but an id that others have as a label: those are another class.
        alone = not (one["wnid"] or one["label"]) and one["id"] == "row-0"
        expected[f"{name}%" if alone else name] += 1
        file = f"{path_name(one['id'])}_{one['number']}.webp"
        image = Image.open(tmp_path / "out" / (f"{name}%" if alone else name) / file)
        assert pixels(image) == pixels(few.image(one))
    assert {"row-0", "row-0%", ZEBRA, path_name("x" * 200)} <= set(expected)
    found = loaded(tmp_path, "imagefolder", data_dir=str(tmp_path / "out"))
    names = found.features["label"].names
    assert Counter(names[label] for label in found["label"]) == expected


def test_folders_are_called_by_id_where_names_repeat(few: Release, tmp_path: Path) -> None:
    export(few, tmp_path / "out", ExportOptions("folders"))
    folders = {path.name: path for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert set(folders) == {path_name(concept.id) for concept in few.present}
    text = (folders["row-1"] / "row-1.txt").read_text()
    assert text.splitlines() == [
        f"prompt: {row(1)['prompt']}",
        "synset: zebra.n.01",
        f"wnid: {ZEBRA}",
        "label: zebra",
        "id: row-1",
    ]
    alone = few.subset(rows=[0])
    export(alone, tmp_path / "one", ExportOptions("folders"))
    assert (tmp_path / "one/row-0/row-0_0.webp").is_file()
    table = list(csv.DictReader((tmp_path / "out/concepts.csv").open(newline="")))
    assert [line["id"] for line in table][:3] == ["row-0", "row-1", "row-2"]
    assert table[3] | {"label": "<b>bold</b>", "tags": '["a", "b", "c"]'} == table[3]
    assert table[4]["id"] == "'=1+1", "as text for a spreadsheet"


@pytest.mark.parametrize("layout", FORMATS)
def test_the_card_fits_a_table(
    few: Release, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(few, tmp_path / "out", ExportOptions(layout))
    card = (tmp_path / "out/README.md").read_text()
    assert f"{len(few)} synthetic images of {len(few.present)} concepts" in card
    assert "1 to 2 images of each concept" in card
    assert " concepts share a prompt with another one.\n" in card
    assert "| prompt | written for each concept |" in card
    if layout not in ("folders", "imagefolder"):
        assert "| `score` | a column of the table of prompts |" in card
    monkeypatch.chdir(tmp_path / "out")
    if layout == "imagefolder":  # as of synsets
        return
    for example in [block.split("```")[0] for block in card.split("```python\n")[1:]]:
        found: dict[str, Any] = {}
        exec(example, found)  # as a reader would paste it
        assert found["image"].size == (16, 8)


def test_a_smaller_release_keeps_ids_prompts_and_columns(few: Release, tmp_path: Path) -> None:
    export(few, tmp_path / "out", ExportOptions("release"))
    smaller = Release(tmp_path / "out")
    assert verify(smaller.paths.root) == []
    # All concepts of the plan stay, so that its images can be regenerated.
    assert smaller.concepts == few.concepts
    names = [
        "id",
        "number",
        "label",
        "plan",
        "prompt",
        "negative_prompt",
        "sha256",
        "score",
        "tags",
    ]
    assert smaller.metadata.select(names).equals(few.metadata.select(names))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("id,number\nrow-1,1\n", {"row-1"}),
        ("id\n'=1+1\n<i>\n", {"=1+1", "<i>"}),
        ("row-8\n", {"row-8"}),
        (f"wnid\n{ZEBRA}\n", {"row-1", "row-8", "row-15", "row-22", "row-29", "row-36"}),
        ("synset\nzebra.n.01\n", {"row-1", "row-8", "row-15", "row-22", "row-29", "row-36"}),
        ("label\nrow-0\n", {"README.md", "row-13", "row-20", "row-27", "row-34"}),
        ("row-0\n", {"row-0"}),
    ],
)
def test_images_are_chosen_by_id_wnid_synset_or_label(
    few: Release, tmp_path: Path, text: str, ids: set[str]
) -> None:
    (tmp_path / "list.csv").write_text(text)
    found = select_listed(few, tmp_path / "list.csv")
    assert {one["id"] for one in found.metadata.to_pylist()} == ids
    (tmp_path / "list.csv").write_text("label\nrow-1\n")
    with pytest.raises(UsageError, match=r"has no 'row-1'; .* a column id or wnid"):
        select_listed(few, tmp_path / "list.csv")


# Folders of classes

NAMES = ("Black-footed Albatross", "001.Laysan_Albatross", "crane", "King_Penguin", "test", "7")


def classes(root: Path) -> Path:
    for index, name in enumerate(NAMES):
        for number in range(2):
            path = root / ("val", "train")[number] / name / f"{name}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 5), (index, number, 9)).save(path)
    Image.new("RGB", (6, 5)).save(root / "stray.png")
    return root


def facts(release: Release) -> list[tuple[Any, ...]]:
    names = ("id", "label", "wnid", "synset", "imagenet_class", "number", "sha256")
    return sorted(tuple(one[name] for name in names) for one in release.metadata.to_pylist())


def test_folders_of_any_classes_come_in_and_out_unchanged_without_wordnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_wordnet(monkeypatch, tmp_path)
    source = classes(tmp_path / "birds")
    target = ReleasePaths(tmp_path / "first")
    found = import_images(list_source(source), target, ImportOptions("imagefolder"))
    first = found.release
    assert verify(first.paths.root) == []
    assert {(one.id, one.label) for one in first.present} == {(name, name) for name in NAMES}
    assert first.concepts["King_Penguin"].wnid == "n02056570"
    assert found.skipped == (
        ("stray.png", "it lies in no folder, and its own name starts with no wnid"),
    )
    for layout in ("imagefolder", "folders"):
        export(first, tmp_path / layout, ExportOptions(layout))
    # Of ImageNet's class, the folder is the wnid.
    shutil.rmtree(tmp_path / "imagefolder/n02056570")
    target = ReleasePaths(tmp_path / "second")
    exported = list_source(tmp_path / "imagefolder")
    again = import_images(exported, target, ImportOptions("imagefolder")).release
    assert facts(again) == [one for one in facts(first) if one[0] != "King_Penguin"]


def test_texts_of_concepts_come_back(few: Release, tmp_path: Path) -> None:
    export(few, tmp_path / "out", ExportOptions("folders"))
    target = ReleasePaths(tmp_path / "again")
    found = import_images(list_source(tmp_path / "out"), target, ImportOptions("folders"))
    assert found.skipped == ()
    assert facts(found.release) == facts(few)
    prompts = {one.id: one.prompts for one in found.release.present}
    assert prompts == {one.id: one.prompts for one in few.present}


# Pages


@pytest.fixture(scope="module")
def site(release: Release) -> Iterator[httpx.Client]:
    with served(Library(release.paths.root)) as address, httpx.Client(base_url=address) as client:
        yield client


def test_a_page_shows_a_row_with_its_own_columns_as_text(site: httpx.Client) -> None:
    for id_ in (*IDS.values(), "row-1", "row-0"):
        page = site.get(url("concepts", id_))
        assert page.status_code == 200
        assert "<b>bold" not in page.text
        assert "<em>in" not in page.text
        assert site.get(url("zips", id_)).headers["content-type"] == "application/zip"
        assert site.get(url("images", id_, 0)).status_code == 200
    page = site.get(url("concepts", "row-24", 0)).text.partition("<details>")[0]
    for name, value in {"source": "model 0", "score": "6.0", "Negative prompt": "blurry"}.items():
        assert re.search(f"<dt>.*{name}.*</dt><dd>.*{value}.*</dd>", page), name
    assert "tags" not in page, "it has none"


def test_all_rows_of_a_class_are_listed(site: httpx.Client, release: Release) -> None:
    own = [one for one in release.present if one.wnid == ZEBRA]
    library = Library(release.paths.root)
    assert library.select(View(below=ZEBRA)).total_concepts == len(own)
    assert f'href="/?below={ZEBRA}"' in site.get("/tree/n02374149").text, "equines"
    assert "Of its class" in site.get(url("concepts", own[0].id)).text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("row-77", {"row-77"}),
        ("=1+1", {"=1+1"}),
        ("field take 499", {"row-998", "row-999"}),
        ("ééé", {IDS[7]}),
    ],
)
def test_rows_are_found_by_id_label_and_prompt(release: Release, text: str, ids: set[str]) -> None:
    found = Library(release.paths.root).select(View(q=text)).hits
    assert {entry.id for entry, *_ in found[: len(ids)]} == ids


def test_a_release_without_wnids_has_no_tree(tmp_path: Path) -> None:
    source = classes(tmp_path / "birds")
    shutil.rmtree(source / "val/King_Penguin")
    shutil.rmtree(source / "train/King_Penguin")
    target = ReleasePaths(tmp_path / "release")
    library = Library(
        import_images(list_source(source), target, ImportOptions("imagefolder")).release.paths.root
    )
    assert (library.tree, library.groups) == (None, {})
    with served(library) as address, httpx.Client(base_url=address) as site:
        for page in ("/", url("concepts", "7"), "/about"):
            text = site.get(page).text
            assert "/tree" not in text
            assert "synset" not in text.partition("<main")[2]
        assert "none of its concepts is of a synset" in site.get("/tree").text
        assert site.get("/?below=n02084071").status_code == 400
