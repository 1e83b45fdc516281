from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import tempfile
import webbrowser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sdwn.browser.library import Library
from sdwn.browser.pages import sheet_page
from sdwn.errors import UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.generation.task import generate
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import make_plan, write_plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import Synset, WordNet

import drawn
from conftest import Sdwn, noise_config

ZEBRA, CRANE_BIRD, CRANE_MACHINE = "n02391049", "n02012849", "n03126707"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    """Three classes of ten images, judged: of the zebra's more than half are right."""
    wnids = (ZEBRA, CRANE_BIRD, CRANE_MACHINE)
    made = drawn.noise_release(tmp_path_factory.mktemp("run"), wordnet, wnids)
    drawn.evaluation(made, drawn.predictions(made, lambda _: 0.7))
    return made


@pytest.mark.parametrize("name", ["zebra", "zebra.n.01", ZEBRA, "Zebra"])
def test_a_synset_is_shown_by_name_wnid_or_lemma(sdwn: Sdwn, release: Release, name: str) -> None:
    root = release.paths.root
    found = sdwn.json("show", root, name)
    assert (found["wnid"], found["synset"], found["lemmas"]) == (ZEBRA, "zebra.n.01", ["zebra"])
    assert found["definition"] in found["prompt"]
    assert (found["above"][-1], found["imagenet_class"]) == ("equine", 340)
    assert (found["evaluation"], found["model"]) == ("drawn", "drawn")
    assert [shot["number"] for shot in found["shots"]] == list(range(10))
    rows = {row["number"]: row for row in release.rows(ZEBRA)}
    predicted = {row["number"]: row for row in drawn_rows(release)}
    for shot in found["shots"]:
        assert shot["seed"] == rows[shot["number"]]["seed"]
        rank = predicted[shot["number"]]["label_rank"]
        assert (shot["rank"], shot["right"]) == (rank, rank == 0)
        assert len(shot["top5"]) == 5
        assert shot["state"] == ("right" if rank == 0 else "wrong")
    assert found["right"] == sum(shot["right"] for shot in found["shots"])
    assert found["judged"] == found["images"] == 10


def drawn_rows(release: Release) -> list[dict[str, Any]]:
    table = drawn.predictions(release, lambda _: 0.7)
    return [row for row in table.to_pylist() if row["wnid"] == ZEBRA]


def test_people_read_a_table_and_the_command_that_makes_an_image_again(
    sdwn: Sdwn, release: Release
) -> None:
    root = release.paths.root
    found, shown = sdwn.json("show", root, "zebra"), sdwn("show", root, "zebra").stdout
    assert re.search(r"zebra\.n\.01 +n02391049", shown)
    assert found["definition"] in shown
    assert re.search(rf"correct +{found['right']} of 10, by drawn\n", shown)
    for shot in found["shots"]:
        best = shot["top5"][0]
        word = "correct" if shot["right"] else "incorrect"
        row = rf"{shot['number']} +{shot['seed']} +ok +{re.escape(best['name'])} +\d+ % +{word}"
        assert re.search(row, shown)
    (command,) = re.findall(r"regenerate +(sdwn regenerate .*) NUMBER\n", shown)
    again = sdwn.json(*shlex.split(command)[1:], 3)
    assert (again["synset"], again["number"], again["verdict"]) == ("zebra.n.01", 3, "equal")


def test_what_names_no_synset_or_several_is_refused(sdwn: Sdwn, release: Release) -> None:
    root = release.paths.root
    refused = sdwn("show", root, "crane", code=2).stderr
    assert "'crane' is ambiguous: crane.n.04, crane.n.05" in refused
    assert "did you mean zebra or" in sdwn("show", root, "zebbra", code=2).stderr
    assert (
        "no evaluation 'x'; there is drawn"
        in sdwn(*("show", root, "zebra", "--evaluation", "x"), code=2).stderr
    )
    inside = root / "sheet.html"
    assert "it lies in the release" in sdwn("show", root, "zebra", "--save", inside, code=2).stderr
    assert verify(root, quick=True) == []


class Page(HTMLParser):
    """A page's tags with their attributes, its references, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._read = "", True
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._read = tag != "style"

    def handle_data(self, data: str) -> None:
        self.text += data if self._read else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(source: str | None) -> Image.Image:
    assert source is not None
    kind, _, content = source.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_a_saved_sheet_is_one_file_with_the_pictures(sdwn: Sdwn, release: Release) -> None:
    found = sdwn.json("show", release.paths.root, "zebra", "--save", "zebra.html")
    assert found["path"] == "zebra.html"
    shown = Page((sdwn.folder / "zebra.html").read_text(encoding="utf-8"))
    images = shown.all("img")
    assert [picture(one["src"]).size for one in images] == [(16, 8)] * 10
    for one, shot in zip(images, found["shots"], strict=True):
        words = (one["alt"] or "").split(", ")
        assert words[:2] == ["zebra.n.01", f"image {shot['number']}"]
        assert words[-1] == ("correct" if shot["right"] else "incorrect")
    policy = next(one["content"] or "" for one in shown.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    for _, attributes in shown.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), "nothing is asked for"
    assert not shown.all("script")
    text = " ".join(shown.text.split())
    for expected in (found["definition"], found["prompt"], found["regenerate"], "340"):
        assert str(expected) in text
    assert f"{found['right']} of 10 correct" in text


def test_a_sheet_of_many_images_says_what_is_left_out(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdwn.browser.pages.SHEET_IMAGES", 4)
    library = Library(release.paths.root)
    shown = Page(sheet_page(library, library.collection.by_id[ZEBRA]))
    assert [(one["alt"] or "").split(", ")[1] for one in shown.all("img")] == [
        f"image {number}" for number in range(4)
    ]
    text = " ".join(shown.text.split())
    assert "the first 4 images; the other 6 are left out of this file" in text
    assert f"sdwn browse {release.paths.root}" in text


def test_a_sheet_is_saved_of_a_folder_whose_name_is_no_text(sdwn: Sdwn, release: Release) -> None:
    root = Path(shutil.copytree(release.paths.root, sdwn.folder / os.fsdecode(b"caf\xe9")))
    sdwn("show", root, "zebra", "--save", "sheet.html")
    assert "caf?" in (sdwn.folder / "sheet.html").read_text(encoding="utf-8")


@pytest.mark.process
def test_a_sheet_opens_in_the_browser_or_says_where_it_lies(
    sdwn: Sdwn, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    without = sdwn("show", release.paths.root, "zebra", "--open")
    (first,) = tmp_path.glob("sdwn-*/zebra.n.01.html")
    assert f"no browser here to open it in; copy it to where there is one: {first}" in (
        " ".join(without.stderr.split())
    )
    assert first.parent.stat().st_mode & 0o077 == 0, "others on the machine cannot read it"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    monkeypatch.setenv("DISPLAY", ":7")
    webbrowser.register(
        "own", None, webbrowser.GenericBrowser([str(browser), "%s"]), preferred=True
    )
    found = sdwn.json("show", release.paths.root, "zebra", "--open", "--save", "own.html")
    assert (tmp_path / "opened").read_text().strip() == (tmp_path / "own.html").as_uri()
    assert found["path"] == "own.html"


def test_a_damaged_image_and_one_without_evaluation_have_their_places(
    sdwn: Sdwn, release: Release
) -> None:
    root = Path(shutil.copytree(release.paths.root, sdwn.folder / "copy"))
    shutil.rmtree(root / "evaluations")
    row = next(row for row in release.rows(ZEBRA) if row["number"] == 4)
    with (root / row["part"]).open("r+b") as part:
        part.seek(row["offset"])
        part.write(bytes(row["bytes"]))
    found = sdwn.json("show", root, "zebra", "--save", "sheet.html")
    assert (found["evaluation"], found["judged"]) == (None, 0)
    assert {shot["state"] for shot in found["shots"]} == {"unjudged"}
    assert "not evaluated yet" in sdwn("show", root, "zebra").stdout
    shown = Page((sdwn.folder / "sheet.html").read_text(encoding="utf-8"))
    assert len(shown.all("img")) == 9
    assert "Image 4 is damaged" in shown.text


HOSTILE = "<script>alert(1)</script>"
PROMPT = f"\x1b[2J\x1b]0;owned\x07[bold]red[/bold] \u202egnp.exe {HOSTILE} \"'&" + "long " * 60


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Release:
    synset = Synset("n00000001", f"{HOSTILE}.n.01", (HOSTILE, "x" * 300, "[red]lemma"), PROMPT)
    plan = make_plan(noise_config(images_per_synset=1), (synset,))
    paths = RunPaths(tmp_path_factory.mktemp("hostile"))
    write_plan(plan, paths)
    generate(paths.root, [0])
    return merge([paths], ReleasePaths(paths.release), MergeOptions())


def test_no_name_or_prompt_is_obeyed(sdwn: Sdwn, hostile: Release) -> None:
    root = hostile.paths.root
    shown = sdwn("show", root, "n00000001", "--save", "sheet.html").stdout
    assert "[bold]red[/bold]" in shown
    assert "[red]lemma" in shown
    assert not [letter for letter in shown if not letter.isprintable() and letter != "\n"]
    html = Page((sdwn.folder / "sheet.html").read_text(encoding="utf-8"))
    assert not html.all("script")
    assert HOSTILE in html.text
    assert json.loads(sdwn("show", root, "n00000001", "--json").stdout)["prompt"].startswith("\x1b")


@pytest.mark.browser
def test_a_sheet_fits_narrow_and_dark_screens_and_breaks_no_rule(
    release: Release, hostile: Release, tmp_path: Path, browser: Any
) -> None:
    shown, said = browser.new_page(), list[str]()
    shown.on("console", lambda message: said.append(message.text))
    shown.on("request", lambda request: said.append(request.url))
    for opened, name in ((release, ZEBRA), (hostile, "n00000001")):
        path = tmp_path / f"{name}.html"
        library = Library(opened.paths.root)
        path.write_text(sheet_page(library, library.collection.by_id[name]), encoding="utf-8")
        shown.goto(path.as_uri())
        broken = "[...document.images].filter(one => !one.naturalWidth).length"
        assert shown.evaluate(broken) == 0
        for width in (320, 1280):
            shown.set_viewport_size({"width": width, "height": 800})
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            if folder := os.environ.get("SDWN_SCREENSHOTS"):
                shown.screenshot(path=f"{folder}/{name}-{width}.png", full_page=True)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = shown.evaluate(ground)
    shown.emulate_media(color_scheme="dark")
    assert shown.evaluate(ground) != light
    assert [one for one in said if not one.startswith(("file:", "data:"))] == []
    shown.close()


def test_a_name_that_several_synsets_have_is_refused_in_python_too(release: Release) -> None:
    with pytest.raises(UsageError, match="ambiguous"):
        release.find_one("crane")
    assert release.find_one("zebra") == ZEBRA


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A release of pictures, whose records have no seed and no prompt."""
    (tmp_path / "photographs" / ZEBRA).mkdir(parents=True)
    for number, colour in enumerate(("red", "black")):
        path = tmp_path / "photographs" / ZEBRA / f"phone_{number}.png"
        Image.new("RGB", (30, 20), colour).save(path)
    target = ReleasePaths(tmp_path / "real")
    import_images(list_source(tmp_path / "photographs"), target, ImportOptions("imagefolder"))
    return target.root


def test_an_imported_synset_is_shown_like_any(sdwn: Sdwn, imported: Path) -> None:
    found = sdwn.json("show", imported, "zebra", "--save", "sheet.html")
    assert [(shot["seed"], shot["prompt"]) for shot in found["shots"]] == [(None, None)] * 2
    shown = Page((sdwn.folder / "sheet.html").read_text(encoding="utf-8"))
    assert [picture(one["src"]).size for one in shown.all("img")] == [(30, 20)] * 2
    assert "seed" not in shown.text
    assert "None" not in shown.text + sdwn("show", imported, "zebra").stdout


@pytest.mark.parametrize("name", ["zebra.png", "zebra.JPG", "zebra.webp"])
def test_a_sheet_is_a_picture_where_its_name_says_so(
    sdwn: Sdwn, release: Release, imported: Path, name: str
) -> None:
    for root in (release.paths.root, imported):
        assert sdwn.json("show", root, "zebra", "--save", name)["path"] == name
        with Image.open(sdwn.folder / name) as drawn:
            expected = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}
            assert drawn.format == expected[Path(name).suffix.lower()]
            colours = [drawn.convert("RGB").getpixel((x, 60)) for x in range(0, drawn.width, 5)]
            assert len(set(colours)) > 2
    red, black = (drawn_colour(sdwn.folder / name, column) for column in (0, 1))
    assert red[0] > 240
    assert max(black) < 10


def drawn_colour(path: Path, column: int) -> tuple[int, ...]:
    with Image.open(path) as drawn:
        colour = drawn.convert("RGB").getpixel((column * 160 + 80, 24 + 40))
    assert isinstance(colour, tuple)
    return colour


def test_a_damaged_image_leaves_its_cell_grey(sdwn: Sdwn, imported: Path) -> None:
    part = next(imported.glob("images-*.h5"))
    content = part.read_bytes()
    part.write_bytes(content.replace(b"\x89PNG", b"\x00PNG", 1))
    sdwn("show", imported, "zebra", "--save", "sheet.png")
    assert drawn_colour(sdwn.folder / "sheet.png", 0) == (128, 128, 128)


@pytest.mark.parametrize("name", ["zebra.pdf", "zebra", "zebra.csv", "zebra.html.gz"])
def test_a_name_of_another_format_is_refused(sdwn: Sdwn, release: Release, name: str) -> None:
    refused = sdwn("show", release.paths.root, "zebra", "--save", name, code=2).stderr
    assert f"--save {name}: expected a file name that ends in .html or .png" in refused
    assert not (sdwn.folder / name).exists()
    again = ("regenerate", release.paths.root, "zebra", 0, "--save", "zebra.jpg")
    assert "ends in .png" in sdwn(*again, code=2).stderr
