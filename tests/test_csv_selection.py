from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from sdwn.browser.library import Library, View
from sdwn.browser.pages import image_list
from sdwn.errors import UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import ExportOptions, export, select_listed
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from conftest import Sdwn
from drawn import noise_release

ZEBRA, GONDOLA, CORGI = "n02391049", "n03447447", "n02113023"

Images = list[tuple[str, int]]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    wnids = (ZEBRA, GONDOLA, CORGI)
    return noise_release(tmp_path_factory.mktemp("run"), wordnet, wnids, images_per_synset=3)


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


def held(release: Release) -> Images:
    return sorted((row["wnid"], row["number"]) for row in release.metadata.to_pylist())


@pytest.mark.parametrize(
    "text",
    [
        f"wnid,number\n{ZEBRA},2\n{CORGI},0\n",
        f"wnid,number\r\n{CORGI},0\r\n\r\n{ZEBRA},2",
        f'synset,wnid,note,number\nzebra.n.01,{ZEBRA},\'=1+1,2\nx,{CORGI},"a,\nb",0\n',
        f" WNID ; Number \n{ZEBRA} ; 2;\n{CORGI};0\n;\n",
        f"number\twnid\n2\t{ZEBRA}\n00\t{CORGI}\n2\t{ZEBRA}\n",
    ],
    ids=["plain", "windows", "more columns", "semicolons", "tabs"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_takes_its_images_once(
    release: Release, tmp_path: Path, text: str, encoding: str
) -> None:
    some = select_listed(release, write(tmp_path, text, encoding))
    assert held(some) == [(CORGI, 0), (ZEBRA, 2)]
    rows = [(row["part"], row["row"]) for row in some.metadata.to_pylist()]
    assert rows == sorted(rows), "in the release's order, whatever the list's"


@pytest.mark.parametrize(
    "text",
    [
        f"synset,wnid\nzebra,{ZEBRA}\n",
        "synset\nzebra.n.01\n",
        f"{ZEBRA} zebra, striped horse\r\n",
        f"{ZEBRA}\tzebra\n",
        f"# of the zoo\n{ZEBRA} 340 zebra\n",
        "zebra.n.01\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_synsets_takes_whole_ones(
    release: Release, tmp_path: Path, text: str, encoding: str
) -> None:
    some = select_listed(release, write(tmp_path, text, encoding))
    assert held(some) == [(ZEBRA, number) for number in range(3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no image; expected a line for each"),
        ("name\nzebra\n", "has no 'name'; .* a column id or wnid or .* and number, or one synset"),
        (f"{ZEBRA},2\n{CORGI},0\n", "line 1: found a number behind .* such as wnid,number"),
        (f"{CORGI}\n{ZEBRA} {GONDOLA}\n", "line 2: expected one synset a line, found several"),
        ("wnid,number\n\n", "lists no image; expected a line for each, below the header"),
        (f"wnid,number\n{ZEBRA},two\n", f"has no '{ZEBRA} two'; take"),
        (f"wnid,number\n{ZEBRA},{'9' * 5000}\n", f"has no '{ZEBRA} 9+'; take"),
        (f"wnid,number\n{ZEBRA},1_0\n", f"has no '{ZEBRA} 1_0'; take"),
        (f"wnid,number\n{ZEBRA},1\n{ZEBRA},\n", f"has no '{ZEBRA} '; take"),
        (f"wnid,number\n{ZEBRA}\n", "line 2: expected 2 cells or more, found 1"),
        ("wnid\nzebra\n", "has no 'zebra'; take what it lacks off the list"),
        ('wnid\n"zebra\n\x1b[2J"\n', r"has no 'zebra\\n\\x1b\[2J'; take what it lacks"),
        (f"wnid\n{'z' * 100_000}\n", "has no 'z{40}'; take what it lacks"),
        (f"wnid,number\n{ZEBRA},1\n{ZEBRA},3\n", f"has no '{ZEBRA} 3'; take"),
        (
            "wnid,number\n" + "".join(f"n0,{number}\n" for number in range(9, 0, -1)),
            "has no 'n0 9', 'n0 8', 'n0 7' and 6 more; take",
        ),
        (f'wnid\n"{"n" * 200_000}"\n', "expected a CSV file: field larger"),
    ],
)
def test_what_is_no_list_of_the_release_is_refused_in_a_line(
    release: Release, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=rf"list\.csv.*{message}") as refused:
        select_listed(release, write(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_what_is_no_text_is_refused_in_a_line(release: Release, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected text in UTF-8, .* can't decode"):
        select_listed(release, write(tmp_path, "wnid\nzèbre\n", "latin-1"))
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        select_listed(release, tmp_path / "none.csv")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        select_listed(release, tmp_path)


def test_a_list_goes_with_the_other_choices(sdwn: Sdwn, release: Release, tmp_path: Path) -> None:
    path = write(tmp_path, f"wnid,number\n{ZEBRA},0\n{ZEBRA},2\n{CORGI},1\n")
    root = release.paths.root
    whole = sdwn.json("export", root, "small", "--format", "release", "--only", path)
    assert (whole["images"], whole["synsets"]) == (3, 2)
    assert verify(tmp_path / "small") == []
    assert Release(tmp_path / "small").manifest.selection == "chosen images"
    below = ("--below", "equine.n.01", "--status", "ok", "--imagenet")
    some = sdwn.json("export", root, "some", "--format", "imagefolder", "--only", path, *below)
    assert (some["images"], some["synsets"]) == (2, 1)
    names = sorted(file.name for file in (tmp_path / "some" / ZEBRA).iterdir())
    assert [name.rpartition("_")[2] for name in names] == ["0.webp", "2.webp"]
    half = ("--sample", "50%", "--format", "release")
    sampled = sdwn.json("export", root, "half", "--only", path, *half)
    assert (sampled["images"], sampled["synsets"]) == (2, 1), "half of the synsets that are listed"
    assert held(Release(tmp_path / "half")) == [(ZEBRA, 0), (ZEBRA, 2)]
    manifest = Release(tmp_path / "half").manifest
    assert manifest.selection == "chosen images, 50% of the synsets"
    write(tmp_path, f"wnid\n{GONDOLA}\n")
    none = sdwn("export", root, "no", "--format", "parquet", "--only", path, *below, code=2)
    assert "no image to export; choose a larger subset" in none.stderr
    write(tmp_path, f"wnid,number\n{GONDOLA},7\n")
    refused = sdwn("export", root, "no", "--format", "parquet", "--only", path, code=2)
    assert f"list.csv: {root} has no '{GONDOLA} 7'; take what it lacks off" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_the_table_of_metadata_is_a_list(release: Release, tmp_path: Path) -> None:
    """What pandas or a spreadsheet writes of it is taken as it is."""
    rows = release.metadata.to_pylist()[::2]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    some = select_listed(release, tmp_path / "list.csv")
    assert some.metadata.to_pylist() == rows


def test_the_list_of_a_search_is_a_list(release: Release, tmp_path: Path) -> None:
    """What ``sdwn browse`` gives for a view, page by page or not."""
    library = Library(release.paths.root)
    text = "".join(image_list(library, library.all_images(View(q="corgi zebra"))))
    some = select_listed(release, write(tmp_path, text))
    assert held(some) == [(wnid, number) for wnid in (CORGI, ZEBRA) for number in range(3)]


def test_a_killed_export_of_a_list_goes_on(release: Release, tmp_path: Path) -> None:
    options = ExportOptions("webdataset", part_bytes=1)
    path = write(tmp_path, f"wnid,number\n{ZEBRA},1\n{GONDOLA},0\n{CORGI},2\n")

    def interrupt(_: int) -> None:
        if list(tmp_path.glob(".out.unfinished/*.tar")):
            raise KeyboardInterrupt

    def begun() -> list[str]:
        lines = (tmp_path / ".out.unfinished/.journal.jsonl").read_text().splitlines()[1:]
        return [json.loads(line)["name"] for line in lines]

    with pytest.raises(KeyboardInterrupt):
        export(select_listed(release, path), tmp_path / "out", options, interrupt)
    (name,) = begun()
    before = (tmp_path / ".out.unfinished" / name).stat().st_ino
    export(select_listed(release, path), tmp_path / "out", options)
    assert (tmp_path / "out" / name).stat().st_ino == before, "what was finished stays"
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
