"""The pages of a release over HTTP, from a real server: what is given, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import html
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from sdwn.browser import pages, server
from sdwn.browser.library import Library
from sdwn.browser.server import ANY_HOST, listen
from sdwn.errors import SdwnError
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.io import content_digest
from sdwn.measures.record import score_table
from sdwn.paths import ReleasePaths
from sdwn.releases.release import Release
from sdwn.reports.comparison import compare_evaluations, open_sides, pair_in_words
from sdwn.wordnet.corpus import WordNet

from conftest import Sdwn, wait_until
from drawn import draw_features, draw_scores, evaluation, noise_release, predictions
from served import served

ZEBRA, TABBY, PUG, CORGI = "n02391049", "n02123045", "n02110958", "n02113023"
CLASSES = (ZEBRA, TABBY, PUG, CORGI)
# What is larger than a disk block, so that flipping a byte stays inside one image.
LARGE = {"height": 48, "width": 320, "num_inference_steps": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> tuple[Path, Path]:
    """Two releases of the same classes but one, evaluated; the second one of raw pixels.

    The first has features, and scores that come from them.
    """
    folder = tmp_path_factory.mktemp("browse")
    one = noise_release(folder / "one", wordnet, CLASSES, generation=LARGE)
    two = noise_release(
        folder / "two", wordnet, CLASSES[1:], storage={"codec": "raw"}, images_per_synset=5
    )
    for seed, release in enumerate((one, two)):
        evaluation(release, predictions(release, seed=seed))
    scores = np.linspace(15, 35, len(one))
    draw_features(one, np.random.default_rng(0).normal(size=(len(one), 4)), clip_score=scores)
    groups = [None if row % 10 > 2 else row // 10 for row in range(len(one))]
    draw_scores(one, duplicate_group=groups, duplicate_of_better=[g is not None for g in groups])
    return one.paths.root, two.paths.root


@contextlib.contextmanager
def visiting(*libraries: Library, **options: Any) -> Iterator[httpx.Client]:
    """Serve releases, and give a client of the server."""
    with served(*libraries, **options) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def site(roots: tuple[Path, Path]) -> Iterator[httpx.Client]:
    with visiting(*map(Library, roots)) as client:
        yield client


@pytest.fixture(scope="module")
def release(roots: tuple[Path, Path]) -> Release:
    return Release(roots[0])


def copied(root: Path, folder: Path) -> Path:
    """Copy a release, for a test that damages it."""
    return Path(shutil.copytree(root, folder / "copied"))


def damage(root: Path, wnid: str, number: int) -> None:
    """Flip a byte in the middle of an image."""
    row = next(row for row in Release(root).rows(wnid) if row["number"] == number)
    with (root / row["part"]).open("r+b") as file:
        file.seek(row["offset"] + row["bytes"] // 2)
        (byte,) = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte ^ 255]))


PAGES = (
    *("/", "/?q=zebra", "/?show=wrong&order=rate", "/?q=%00%ff%F0%9F%A6%93*\"'NEAR("),
    *(f"/concepts/{ZEBRA}", f"/concepts/{ZEBRA}?show=right", f"/concepts/{ZEBRA}/3"),
    *("/tree", f"/tree/{CORGI}", "/map", "/about", "/compare", f"/compare/{PUG}"),
)
SCORED = (
    "/?by=clip_score&clip_score=20..30&order=-clip_score",
    f"/concepts/{ZEBRA}?duplicate_of_better=no&order=clip_score",
    f"/concepts/{ZEBRA}/1?show=duplicates&similar=drawn",
)


@pytest.mark.parametrize("address", [*PAGES, *SCORED])
def test_every_page_is_given_with_its_guards(site: httpx.Client, address: str) -> None:
    answer = site.get(address)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "</html>" in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    head = site.head(address)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]
    assert answer.headers["content-encoding"] == "gzip"
    plain = site.get(address, headers={"Accept-Encoding": "identity"})
    assert (plain.content, "content-encoding" in plain.headers) == (answer.content, False)


def text_of(answer: httpx.Response) -> str:
    """Return what a page says, without its tags, on one line."""
    assert answer.status_code == 200
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", answer.text)).split())


def test_addresses_of_earlier_versions_lead_to_the_same_pages(site: httpx.Client) -> None:
    for page in (ZEBRA, f"{ZEBRA}/3"):
        assert site.get(f"/synsets/{page}").text == site.get(f"/concepts/{page}").text


def test_a_page_is_titled_with_the_release_and_its_model(site: httpx.Client) -> None:
    title = re.search("<title>(.*)</title>", site.get(f"/concepts/{ZEBRA}").text)
    assert title is not None
    assert title[1].startswith("zebra · imagenet-1k")
    assert title[1].endswith(", builtin:noise")


def test_a_search_offers_what_lies_below_a_hypernym(site: httpx.Client) -> None:
    for words in ("dog", "Dogs", "dog.n.01", "domestic_dog", "n02084071"):
        answer = site.get("/", params={"q": words})
        assert "below dog.n.01: 2 synsets" in text_of(answer)
        assert 'href="/?below=n02084071"' in answer.text
    below = site.get("/?below=n02084071")
    assert f"/concepts/{CORGI}" in below.text
    assert f"/concepts/{ZEBRA}" not in below.text
    # Also where no text has the word, or only one like it.
    for words, offer in (("canid", "canine.n.02: 2"), ("felid", "feline.n.01: 1")):
        assert f"below {offer} synset" in text_of(site.get("/", params={"q": words}))
    for words in ("zebra", "do", "xyzzy"):
        assert "below" not in text_of(site.get("/", params={"q": words})).partition("Download")[0]


def test_a_definition_that_is_the_prompt_is_said_once(site: httpx.Client, release: Release) -> None:
    definition = release.concepts[ZEBRA].definition
    assert release.concepts[ZEBRA].prompt == definition
    page = text_of(site.get(f"/concepts/{ZEBRA}"))
    assert (page.count(definition), "the definition" in page) == (1, True)
    image = site.get(f"/concepts/{ZEBRA}/3").text.partition("<details>")[0]
    assert image.count(definition) == 1


def test_a_comparison_begins_with_the_sentence_of_sdwn_compare(
    site: httpx.Client, roots: tuple[Path, Path]
) -> None:
    sides = open_sides([*map(str, roots)])
    (pair,) = compare_evaluations(sides)["pairs"]
    better, figures = pair_in_words(pair)
    told = text_of(site.get("/compare"))
    assert better in told
    assert figures[1:] in told
    with visiting(Library(roots[0]), Library(roots[0])) as same:
        assert f"{roots[0]} and {roots[0]} do not clearly differ" in text_of(same.get("/compare"))


def test_a_comparison_without_a_common_classifier_says_what_to_do(
    roots: tuple[Path, Path], tmp_path: Path
) -> None:
    for evaluations in (0, 1):
        root = copied(roots[1], tmp_path / str(evaluations))
        shutil.rmtree(root / "evaluations")
        if evaluations:
            evaluation(Release(root), predictions(Release(root)), "other", model="another")
        with visiting(Library(roots[0]), Library(root)) as site:
            told = text_of(site.get("/compare"))
        assert "evaluate both by the same model" in told
        assert f"by drawn and by {('none', 'another')[evaluations]}; " in told


def test_htmx_gets_the_results_alone(site: httpx.Client) -> None:
    whole = site.get("/?q=zebra")
    part = site.get("/?q=zebra&show=", headers={"HX-Request": "true", "HX-Trigger": "search"})
    assert "</html>" not in part.text
    assert ZEBRA in part.text
    assert TABBY not in part.text
    assert part.headers["hx-replace-url"] == "/?q=zebra"
    assert "hx-request" in whole.headers["vary"].lower()
    back = {"HX-Request": "true", "HX-History-Restore-Request": "true"}
    assert site.get("/?q=zebra", headers=back).text == whole.text


def test_images_are_given_as_they_are_stored(site: httpx.Client, release: Release) -> None:
    for row in release.rows(ZEBRA)[:3]:
        address = f"/images/{ZEBRA}/{row['number']}"
        answer = site.get(address)
        assert answer.headers["content-type"] == "image/webp"
        assert hashlib.sha256(answer.content).hexdigest() == row["sha256"]
        again = site.get(address, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == answer.headers["etag"]
        assert "content-disposition" not in answer.headers
        saved = site.get(address, params={"download": ""})
        assert saved.content == answer.content
        name = f'attachment; filename="zebra.n.01-{row["number"]}.webp"'
        assert saved.headers["content-disposition"] == name
    partly = site.get(address, headers={"Range": "bytes=10-19"})
    assert (partly.status_code, partly.content) == (200, answer.content), "ranges are not offered"


def test_raw_pixels_come_as_png(site: httpx.Client, roots: tuple[Path, Path]) -> None:
    answer = site.get(f"/other/images/{PUG}/1?download")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"].endswith('filename="pug.n.01-1.png"')
    other = Release(roots[1])
    shown = Image.open(io.BytesIO(answer.content))
    assert shown.tobytes() == other.image(other.rows(PUG)[1]).tobytes()


@pytest.mark.parametrize(("query", "side"), [("", 192), ("?size=192", 192), ("?size=384", 320)])
def test_thumbnails_are_small_and_kept(
    site: httpx.Client, release: Release, query: str, side: int
) -> None:
    address = f"/thumbnails/{ZEBRA}/2{query}"
    answer = site.get(address)
    assert answer.headers["content-type"] == "image/webp"
    shown = Image.open(io.BytesIO(answer.content))
    assert shown.size == (side, round(48 * side / 320)), "small ones are not made larger"
    assert answer.headers["cache-control"].startswith("private, max-age=")
    tag = answer.headers["etag"]
    assert release.rows(ZEBRA)[2]["sha256"] in tag
    for given in (tag, f'"x", {tag}', f"W/{tag}"):
        assert site.get(address, headers={"If-None-Match": given}).status_code == 304
    assert site.get(address, headers={"If-None-Match": '"x"'}).status_code == 200


def zip_of(content: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert archive.testzip() is None
    return archive


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_synset_comes_as_a_zip(site: httpx.Client, release: Release) -> None:
    answer = site.get(f"/zips/{ZEBRA}")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == 'attachment; filename="zebra.n.01.zip"'
    archive = zip_of(answer.content)
    rows = table(archive.read("metadata.csv").decode())
    assert set(archive.namelist()) == {"metadata.csv", *(row["file"] for row in rows)}
    for row, recorded in zip(rows, release.rows(ZEBRA), strict=True):
        assert row["file"] == f"zebra.n.01-{recorded['number']}.webp"
        assert hashlib.sha256(archive.read(row["file"])).hexdigest() == recorded["sha256"]
        assert {key: row[key] for key in ("seed", "prompt", "status")} == {
            key: str(recorded[key]) for key in ("seed", "prompt", "status")
        }
        assert row["right"] in ("yes", "no")
        assert 0 < float(row["top1_probability"]) <= 1
        assert (row["top1"] == "zebra") == (row["right"] == "yes")
    assert site.get(f"/zips/{ZEBRA}").content == answer.content, "to the byte"
    head = site.head(f"/zips/{ZEBRA}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-disposition"] == answer.headers["content-disposition"]


def test_a_search_comes_as_a_list(site: httpx.Client, release: Release) -> None:
    every = table(site.get("/list.csv").text)
    assert len(every) == len(release)
    wrong = table(site.get("/list.csv?show=wrong").text)
    assert wrong == [row for row in every if row["right"] == "no" and row["status"] == "ok"]
    assert 0 < len(wrong) < len(every)
    zebras = table(site.get("/list.csv?q=zebra&page=7").text)
    assert [int(row["number"]) for row in zebras] == list(range(10)), "all pages of it"
    assert {(row["wnid"], row["synset"]) for row in zebras} == {(ZEBRA, "zebra.n.01")}
    for row in zebras:
        assert (row["top1_wnid"] == ZEBRA) == (row["right"] == "yes") == (row["top1"] == "zebra")
    assert site.get("/list.csv?show=x").status_code == 400


def test_downloads_carry_the_scores(site: httpx.Client, release: Release) -> None:
    expected = {(row["id"], row["number"]): row for row in score_table(release).to_pylist()}
    archive = zip_of(site.get(f"/zips/{ZEBRA}").content)
    listed = table(site.get("/list.csv?duplicate_of_better=yes&order=-clip_score").text)
    assert [float(row["clip_score"]) for row in listed] == sorted(
        (float(row["clip_score"]) for row in listed), reverse=True
    )
    assert {row["duplicate_of_better"] for row in listed} == {"yes"}
    for row in [*listed, *table(archive.read("metadata.csv").decode())]:
        known = expected[row["id"], int(row["number"])]
        assert float(row["clip_score"]) == pytest.approx(known["clip_score"], abs=1e-6)
        assert row["duplicate_group"] == (
            "" if known["duplicate_group"] is None else str(known["duplicate_group"])
        )
        assert "nearest_real" not in row


def test_the_form_of_a_score_is_a_link_to_the_same_view(site: httpx.Client) -> None:
    form = site.get("/?by=clip_score&least=20&most=2.5e1&order=name")
    link = site.get("/?by=clip_score&clip_score=20..2.5e1&order=name")
    assert form.text == link.text
    assert "CLIP score: 20 to 2.5e1" in text_of(link)
    assert site.get("/?by=clip_score&least=&most=").text == site.get("/?by=clip_score").text
    for wrong in ("/?clip_score=high", "/?by=clip_score&least=x", "/?nearest_real=..", "/?by=x"):
        assert site.get(wrong).status_code == 400, wrong


def test_an_image_shows_its_scores_its_duplicates_and_what_is_like_it(site: httpx.Client) -> None:
    page = text_of(site.get(f"/concepts/{ZEBRA}/1"))
    assert "a duplicate that can goyes" in page
    assert "Duplicates of it" in page
    assert "Duplicates of it" not in text_of(site.get(f"/concepts/{ZEBRA}/5"))
    asked, plain = (
        site.get(f"/concepts/{ZEBRA}/5{query}").text for query in ("?similar=drawn", "")
    )
    assert asked.count("<img") > plain.count("<img") == 1
    assert site.get(f"/concepts/{ZEBRA}/5?similar=unknown").text.count("<img") == 1
    group = re.search(r'href="(/\?duplicate_group=[^"]+)"', site.get(f"/concepts/{ZEBRA}/1").text)
    assert group is not None
    assert "1 synset, 3 images" in text_of(site.get(group[1]))


def test_an_import_is_shown_without_what_nobody_recorded(tmp_path: Path) -> None:
    formula = '=HYPERLINK("http://example.org", "zebra")'
    for number, kind in enumerate(("png", "jpeg")):
        picture = tmp_path / f"pictures/one/{number}.{kind}"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (9, 200, 9)).save(picture, kind)
    (tmp_path / "pictures/one/prompt.txt").write_text(f"prompt: {formula}\nwnid: {ZEBRA}\n")
    root = ReleasePaths(tmp_path / "imported")
    import_images(list_source(tmp_path / "pictures"), root, ImportOptions("folders"))
    with visiting(Library(root.root)) as site:
        for address in (*PAGES[:11], f"/concepts/{ZEBRA}/1"):
            wanted = 404 if address in (f"/tree/{CORGI}", f"/concepts/{ZEBRA}/3") else 200
            assert site.get(address).status_code == wanted, address
        assert site.get("/compare").status_code == 404
        assert site.get(f"/other/images/{ZEBRA}/0").status_code == 404
        kinds = {site.get(f"/images/{ZEBRA}/{n}").headers["content-type"] for n in (0, 1)}
        assert kinds == {"image/png", "image/jpeg"}
        archive = zip_of(site.get(f"/zips/{ZEBRA}").content)
        rows = table(archive.read("metadata.csv").decode())
        assert [row["prompt"] for row in rows] == [f"'{formula}"] * 2, "not to be worked out"
        assert {(row["seed"], row["right"], row["top1"]) for row in rows} == {("", "", "")}
        assert sorted(row["file"][-4:] for row in rows) == [".jpg", ".png"]
        listed = table(site.get("/list.csv").text)
        assert [(row["number"], row["right"]) for row in listed] == [("0", ""), ("1", "")]
        assert "not evaluated" in site.get("/").text.lower()


def test_a_synset_of_many_images_is_shown_a_page_at_a_time(
    roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "IMAGES_A_PAGE", 4)
    with visiting(*map(Library, roots)) as site:
        for address in (f"/concepts/{PUG}", f"/compare/{PUG}"):
            first, last = site.get(address).text, site.get(f"{address}?page=3").text
            assert f"{address}?page=2" in first
            assert site.get(f"{address}?page=99").text == last, "there are no more"
            assert 'value="3" min="1" max="3"' in last
            assert f"/thumbnails/{PUG}/3" in first
            assert f"/thumbnails/{PUG}/4" not in first
            assert f"/thumbnails/{PUG}/9" in last


def test_a_damaged_image_shows_as_such_and_takes_nothing_down(
    roots: tuple[Path, Path], tmp_path: Path
) -> None:
    root = copied(roots[0], tmp_path)
    damage(root, ZEBRA, 4)
    with visiting(Library(root)) as site:
        for size in ("192", "384"):
            small = site.get(f"/thumbnails/{ZEBRA}/4?size={size}")
            assert (small.status_code, small.headers["content-type"]) == (200, "image/svg+xml")
            assert ">damaged</text>" in small.text
            assert small.headers["cache-control"] == "no-store"
            assert "etag" not in small.headers
        large = site.get(f"/images/{ZEBRA}/4")
        assert (large.status_code, large.headers["content-type"]) == (200, "image/svg+xml")
        saved = site.get(f"/images/{ZEBRA}/4?download")
        assert saved.status_code == 500
        assert "damaged at byte" in saved.text
        assert "Traceback" not in saved.text
        assert site.get(f"/concepts/{ZEBRA}").status_code == 200
        assert "damaged" in site.get(f"/concepts/{ZEBRA}/4").text
        archive = zip_of(site.get(f"/zips/{ZEBRA}").content)
        assert "zebra.n.01 4: " in archive.read("DAMAGED.txt").decode()
        numbers = [row["number"] for row in table(archive.read("metadata.csv").decode())]
        assert numbers == [str(number) for number in range(10) if number != 4]
        assert site.get(f"/thumbnails/{ZEBRA}/5").headers["content-type"] == "image/webp"
        damage(root, ZEBRA, 4)
        mended = site.get(f"/thumbnails/{ZEBRA}/4")
        assert mended.headers["content-type"] == "image/webp", "what is damaged is not kept"


def test_pages_of_a_forged_evaluation_say_so(roots: tuple[Path, Path], tmp_path: Path) -> None:
    root = copied(roots[0], tmp_path)
    path = ReleasePaths(root).evaluation("drawn").evaluation
    record = {**json.loads(path.read_text()), "classes": [{}], "figures": {}}
    path.write_text(json.dumps({**record, "digest": content_digest(record)}))
    with visiting(Library(root)) as site:
        for address in ("/map", "/about"):
            answer = site.get(address)
            assert answer.status_code == 500
            assert "evaluations: damaged: " in answer.text
            assert "evaluate the release again" in answer.text
        assert site.get("/").status_code == 200


def test_an_image_that_its_disk_does_not_give_is_shown_as_damaged(
    roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with visiting(Library(roots[0])) as site:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", failing)
            small = site.get(f"/thumbnails/{ZEBRA}/4")
            assert (small.status_code, small.headers["content-type"]) == (200, "image/svg+xml")
            archive = zip_of(site.get(f"/zips/{ZEBRA}").content)
            assert "its disk fails" in archive.read("DAMAGED.txt").decode()
        again = site.get(f"/thumbnails/{ZEBRA}/4")
        assert again.headers["content-type"] == "image/webp"


def test_a_release_that_is_taken_away_is_shown_as_far_as_it_was_read(
    roots: tuple[Path, Path], tmp_path: Path
) -> None:
    root = copied(roots[0], tmp_path)
    with visiting(Library(root)) as site:
        assert site.get("/").status_code == 200
        shutil.rmtree(root)
        for address in (*PAGES[:7], f"/thumbnails/{ZEBRA}/4", f"/zips/{ZEBRA}", "/list.csv"):
            assert site.get(address).status_code == 200, address


NOWHERE = (
    *(
        "/etc/passwd",
        "/concepts",
        "/concepts/",
        f"/concepts/{ZEBRA}/",
        "/images",
        "/tree/n00000000",
    ),
    *(
        "/concepts/n00000000",
        "/concepts/zebra.n.01",
        f"/concepts/{ZEBRA}/10",
        f"/concepts/{ZEBRA}/-1",
    ),
    *(f"/images/{ZEBRA}/{number}" for number in ("x", "1.0", "01", "+1", "٣", "%0a1", "1%00")),
    *(f"/images/{ZEBRA}/{'9' * length}" for length in (9, 10, 20, 5000)),
    *("/zips/n00000000", "/zips/", "/compare/n00000000", f"/compare/{ZEBRA}"),
    *("/assets/", "/assets/nothing.js", "/assets/browse.css/", "/robots.txt", "/favicon.ico"),
    *("/manifest.json", "/metadata.parquet", "/images/manifest.json/0", "/other", "/other/"),
    *("/docs", "/openapi.json", "//", "//example.org/", "/%2f%2fexample.org"),
)
OUTSIDE = (
    *("/../../../../etc/passwd", "/assets/../../../../etc/passwd", "/./../etc/passwd"),
    *("/assets/..%2f..%2f..%2fetc%2fpasswd", "/assets/%2e%2e/%2e%2e/etc/passwd"),
    *("/assets/%252e%252e%252fpasswd", "/assets/..%5c..%5cetc%5cpasswd", "/assets/..\\passwd"),
    *("/assets//etc/passwd", "/assets/%2fetc%2fpasswd", "/assets/%00", "/assets/browse.css%00"),
    *("/images/..%2f..%2f..%2fetc%2fpasswd/0", "/images/../../etc/0", "/images/%2fetc/0"),
    *("/concepts/..%2fmanifest.json", "/zips/..%2f..%2fetc%2fpasswd", "/tree/%c0%ae%c0%ae"),
    *("/zips/%2e%2e%2fx", "/images/\uff0e\uff0e\u2215etc/0", "/%", "/%zz", "/\x7f"),
)


@pytest.mark.parametrize("path", [*NOWHERE, *OUTSIDE])
def test_no_path_reaches_a_file(site: httpx.Client, path: str) -> None:
    status, body = asked_raw(site, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n")
    assert status in (400, 404), body
    assert b"root:" not in body
    assert b"Traceback" not in body
    if status == 404:
        assert b"</html>" in body


def asked_raw(site: httpx.Client, head: str) -> tuple[int, bytes]:
    """Send a request as it is written, which no client would, and read the answer."""
    place = site.base_url.host, site.base_url.port or 0
    with socket.create_connection(place, timeout=10) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        with connection.makefile("rb") as stream:
            content = stream.read()
    first, _, rest = content.partition(b"\r\n")
    return int(first.split()[1]), rest.partition(b"\r\n\r\n")[2]


def test_what_is_too_large_or_no_http_is_refused(site: httpx.Client) -> None:
    host = "Host: localhost\r\n"
    long = "x" * 1_000_000
    for head in (
        f"GET /{long} HTTP/1.1\r\n{host}",
        f"GET / HTTP/1.1\r\n{host}Cookie: {long}\r\n",
        f"GET / HTTP/1.1\r\n{host}" + "".join(f"X-{n}: {long[:900]}\r\n" for n in range(1000)),
        "nonsense\r\n",
        "GET / HTTP/1.1\r\n",
        f"GET / HTTP/1.1\r\n{host}Host: example.org\r\n",
        f"GET / HTTP/1.1\r\n{host}Content-Length: -1\r\n",
    ):
        # Some are refused while they are still being sent.
        with contextlib.suppress(ConnectionError):
            assert asked_raw(site, head)[0] == 400, head[:100]
    assert site.get("/", params={"q": "x" * 40_000}).status_code == 200
    assert asked_raw(site, f"GET /?q=%ff%fe%00%ed%a0%80 HTTP/1.1\r\n{host}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"])
def test_nothing_can_be_sent(site: httpx.Client, method: str) -> None:
    for path in ("/", f"/concepts/{ZEBRA}", "/list.csv", "/assets/browse.css"):
        answer = site.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "</html>" in answer.text


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("/?show=best", "match pattern &#39;^(all|right|wrong"),
        ("/?page=0", "should be greater than or equal to 1"),
        ("/?below=<script>alert(1)</script>", "match pattern &#39;^n[0-9]{8}$"),
        ("/?order=%00", "match pattern &#39;^(best|name"),
        (f"/concepts/{ZEBRA}?show=x", "match pattern &#39;^(all|right"),
        ("/compare?page=-1", "should be greater than or equal to 1"),
        (f"/thumbnails/{ZEBRA}/0?size=99999", "expected 192 or 384"),
    ],
)
def test_a_view_that_is_none_is_told(site: httpx.Client, query: str, expected: str) -> None:
    answer = site.get(query)
    assert answer.status_code == 400
    assert expected in answer.text
    assert "<script>alert" not in answer.text


@pytest.mark.parametrize(
    ("host", "code"),
    [
        *((host, 200) for host in ("localhost", "localhost:1", "127.0.0.1:9999", "[::1]:8642")),
        *((host, 400) for host in ("example.org", "localhost.example.org", "127.0.0.1.nip.io")),
        *((host, 400) for host in ("", "localhost@example.org", "10.0.0.1:80", "2130706433")),
    ],
)
def test_another_name_for_this_machine_is_refused(site: httpx.Client, host: str, code: int) -> None:
    status, body = asked_raw(site, f"GET /about HTTP/1.1\r\nHost: {host}\r\n")
    assert status == code, body


TOKEN = "s3cret-s3cret-s3cret"


@pytest.fixture(scope="module")
def locked(roots: tuple[Path, Path]) -> Iterator[httpx.Client]:
    with visiting(Library(roots[0]), token=TOKEN, hosts=ANY_HOST) as client:
        yield client


@pytest.mark.parametrize(
    "address", [*PAGES[:8], f"/images/{ZEBRA}/0", f"/zips/{ZEBRA}", "/list.csv", "/x"]
)
def test_without_the_token_nothing_is_given(locked: httpx.Client, address: str) -> None:
    locked.cookies.clear()
    join = "&" if "?" in address else "?"
    for attempt in ("", f"{join}token=", f"{join}token={TOKEN[:-1]}", f"{join}token=%ff%00é"):
        answer = locked.get(address + attempt)
        assert answer.status_code == 403
        assert "Open the whole address" in answer.text
        assert "zebra" not in answer.text
        assert "set-cookie" not in answer.headers
        assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["a/assets/x?", "a/assets/", "a#/assets/", "a?/assets/", "/assets/"]
)
def test_no_name_of_the_host_opens_the_gate(locked: httpx.Client, host: str) -> None:
    for path in ("/", "/list.csv", f"/images/{ZEBRA}/0"):
        status, body = asked_raw(locked, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n")
        assert status in (400, 403), body


def test_the_token_becomes_a_cookie_and_leaves_the_address(locked: httpx.Client) -> None:
    locked.cookies.clear()
    assert locked.get("/assets/browse.css").status_code == 200, "the refusal has a style"
    entered = locked.get(f"/concepts/{ZEBRA}?token={TOKEN}&show=right")
    assert entered.status_code == 303
    assert entered.headers["location"] == f"/concepts/{ZEBRA}?show=right"
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/" in cookie
    assert locked.get("/").status_code == 200
    assert locked.get("/", headers={"Host": "node7.cluster.example:80"}).status_code == 200
    (name,) = locked.cookies
    locked.cookies.clear()
    assert locked.get("/", headers={"Cookie": f"{name}={TOKEN}x"}).status_code == 403
    for wrong in (b"\xff\xfe", b'"' + TOKEN.encode(), b"=; ="):
        assert locked.get("/", headers={"Cookie": name.encode() + b"=" + wrong}).status_code == 403


def test_the_token_leads_to_no_other_machine(locked: httpx.Client) -> None:
    for path in ("//example.org/", "/\\example.org", "///example.org/%2f.."):
        status, _ = asked_raw(locked, f"GET {path}?token={TOKEN} HTTP/1.1\r\nHost: a\r\n")
        answer = locked.get(f"{path}?token={TOKEN}")
        assert status == answer.status_code == 303
        assert answer.headers["location"].startswith("/")
        assert not answer.headers["location"].startswith(("//", "/\\"))


def test_who_goes_away_in_the_middle_disturbs_nobody(
    site: httpx.Client, roots: tuple[Path, Path]
) -> None:
    place = site.base_url.host, site.base_url.port or 0
    for path in (f"/zips/{ZEBRA}", "/list.csv", "/", f"/images/{ZEBRA}/0") * 5:
        connection = socket.create_connection(place)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        connection.recv(100)
        # Not a farewell but a reset, as of a laptop that was shut.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    assert site.get("/").status_code == 200
    assert zip_of(site.get(f"/zips/{ZEBRA}").content).namelist()


def test_more_connections_than_there_is_room_for_stop_nobody(
    roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 10)
    with visiting(Library(roots[1])) as site:
        place = site.base_url.host, site.base_url.port or 0
        with contextlib.ExitStack() as opened:
            for _ in range(12):
                opened.enter_context(socket.create_connection(place)).sendall(b"GET / HT")
            wait_until(lambda: site.get("/about").status_code == 503)
        wait_until(lambda: site.get("/about").status_code == 200)


def test_a_folder_whose_name_is_no_text_is_shown(roots: tuple[Path, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(roots[0], tmp_path / os.fsdecode(b"caf\xe9")))
    with visiting(Library(root)) as site:
        for address in (f"/concepts/{ZEBRA}", f"/concepts/{ZEBRA}/3", "/about"):
            answer = site.get(address)
            assert (answer.status_code, "caf?" in answer.text) == (200, True), address


def test_an_error_in_a_page_is_one_sentence_there_and_a_line_in_the_log(
    roots: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    library = Library(roots[0])
    del library.collection  # a fault of our own
    with visiting(library) as site:
        answer = site.get(f"/concepts/{ZEBRA}")
        assert answer.status_code == 500
        assert "the error is in the terminal" in answer.text
        assert "AttributeError" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert site.get("/assets/browse.css").status_code == 200
        place = site.base_url.host, site.base_url.port
        with contextlib.closing(http.client.HTTPConnection(*place)) as connection:
            for _ in range(3):  # the server does not hang up
                connection.request("GET", f"/concepts/{ZEBRA}")
                assert connection.getresponse().read() == answer.content
                time.sleep(0.05)
    assert caplog.text.count("AttributeError") == 4


def test_pages_load_what_is_served_beside_them(site: httpx.Client) -> None:
    named = re.findall(r'(?:src|href)="(/assets/[^"]+)"', site.get("/map").text)
    assert len(named) == 5
    for address in named:
        answer = site.get(address)
        assert answer.status_code == 200
        assert re.search("javascript|css|svg", answer.headers["content-type"])
        assert answer.headers["cache-control"] == "private, max-age=60"


def test_a_port_is_the_one_asked_for_or_the_next_free_one() -> None:
    with listen("127.0.0.1", 0, token=False) as first:
        taken = rf"port {first.port} is taken; leave --port away"
        with pytest.raises(SdwnError, match=taken), listen("127.0.0.1", first.port, token=False):
            pass
        with listen("127.0.0.1", None, False) as one, listen("127.0.0.1", None, False) as other:
            assert 8642 <= one.port < other.port
            assert one.token is None
            # Without its protocol, asyncio would let small answers wait for 40 ms.
            assert one.socket.proto == socket.IPPROTO_TCP
            assert one.url == f"http://127.0.0.1:{one.port}/"
    for host, told in (("no such host", "no name or address"), ("192.0.2.1", "cannot listen at")):
        with pytest.raises(SdwnError, match=told), listen(host, 0, token=False):
            pass


def test_off_loopback_there_is_always_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("0.0.0.0", 0, token=False) as everywhere, listen("::1", 0, True) as asked:
        assert everywhere.hosts == ANY_HOST
        assert everywhere.token is not None
        assert len(everywhere.token) >= 40
        assert everywhere.url.startswith(f"http://{socket.gethostname()}:{everywhere.port}/?token=")
        assert asked.token is not None
        assert asked.token != everywhere.token
        assert asked.url == f"http://[::1]:{asked.port}/?token={asked.token}"
        assert everywhere.tunnel is None


def test_this_machine_is_known_by_the_address_that_was_asked_for(
    roots: tuple[Path, Path],
) -> None:
    with listen("127.0.1.1", 0, token=False) as found:
        assert "127.0.1.1" in found.hosts
        assert "127.0.1.1" in found.url
        assert found.token is None
        hosts = found.hosts
    with visiting(Library(roots[0]), hosts=hosts) as site:
        assert asked_raw(site, "GET /about HTTP/1.1\r\nHost: 127.0.1.1:80\r\n")[0] == 200
        assert asked_raw(site, "GET /about HTTP/1.1\r\nHost: 127.0.1.2\r\n")[0] == 400


def test_the_way_in_is_told_where_it_is_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "SLURM_JOB_ID", "SLURM_SUBMIT_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "ada")
    node = socket.gethostname()
    with listen("127.0.0.1", 0, token=False) as found:
        forwarded = f"-L {found.port}:127.0.0.1:{found.port}"
        assert found.tunnel is None
        monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 5000 10.0.0.2 22")
        assert found.tunnel == f"ssh -N {forwarded} ada@{node}"
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_SUBMIT_HOST", "login1")
        assert found.tunnel == f"ssh -N -J ada@login1 {forwarded} ada@{node}"


@contextlib.contextmanager
def started(sdwn: Sdwn, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start the command at any port; a test that fails leaves no server behind."""
    process = sdwn.start("browse", *arguments, "--port", "0")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.process
def test_the_command_with_a_token_ends_by_sigterm(sdwn: Sdwn, roots: tuple[Path, Path]) -> None:
    with started(sdwn, roots[0], "--token") as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert "?token=" in url
        with httpx.Client(follow_redirects=True) as client:
            assert client.get(url.partition("?")[0]).status_code == 403
            answer = client.get(url)
            assert (answer.status_code, "token" in str(answer.url)) == (200, False)
        process.terminate()
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "Ctrl-C ends it" in log
        assert "Traceback" not in log


def test_what_cannot_be_served_is_told_in_a_line(sdwn: Sdwn, roots: tuple[Path, Path]) -> None:
    with listen("127.0.0.1", 0, token=False) as taken:
        failed = sdwn("browse", roots[0], "--port", taken.port, code=1)
        assert f"port {taken.port} is taken" in failed.stderr
    assert "no release here" in sdwn("browse", "nowhere", code=1).stderr
    for wrong, code in ((("--evaluation", "x"), 2), (("nowhere",), 1)):
        failed = sdwn("browse", roots[0], *wrong, "--port", "0", code=code)
        assert failed.stderr.count("\n") == 1, failed.stderr


def memory_bytes(pid: int) -> int:
    """What a process holds in memory, but for files that the system may drop."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(
        next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]
    )


def visit(place: tuple[str, int], stop: Callable[[], bool], seed: int) -> tuple[int, list[str]]:
    """Look around until it is time; return how many answers there were, and what went wrong."""
    addresses = [
        *(f"/thumbnails/{wnid}/{n}?size={s}" for wnid in CLASSES for n in range(10) for s in SIZES),
        *(f"/images/{ZEBRA}/{n}" for n in (0, 1, 2)),
        *PAGES,
        *("/?q=zeb", "/?q=corgy", "/?q=dog+cat", f"/zips/{PUG}", "/list.csv"),
    ]
    count, wrong = 0, list[str]()
    # Python's own client: with one that does more, the crowd takes longer than the server.
    with contextlib.closing(http.client.HTTPConnection(*place, timeout=60)) as connection:
        while not (count and stop()):
            address = addresses[(seed * 7 + count * 11) % len(addresses)]
            connection.request("GET", address)
            answer = connection.getresponse()
            content = answer.read()
            count += 1
            if answer.status != 200 or not content:
                wrong.append(f"{address}: {answer.status}")
    return count, wrong


SIZES = (192, 384)


def crowded(
    sdwn: Sdwn, roots: tuple[Path, Path], folder: Path, seconds: float
) -> tuple[int, list[int]]:
    """Have 50 clients look around releases, an image damaged, and interrupt it in a download.

    Returns:
        How many answers there were, and the bytes that the server held meanwhile.
    """
    root = copied(roots[0], folder)
    damage(root, TABBY, 3)
    with started(sdwn, root, roots[1], "--json") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert (told["pid"], told["release"]) == (process.pid, str(root))
        assert (told["images"], told["synsets"], told["evaluation"]) == (40, 4, "drawn")
        place, held = ("127.0.0.1", told["port"]), list[int]()
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(50) as crowd:
            visits = [
                crowd.submit(visit, place, lambda: time.monotonic() > end, seed)
                for seed in range(50)
            ]
            while time.monotonic() < end:
                time.sleep(seconds / 20)
                held.append(memory_bytes(process.pid))
            found = [one.result() for one in visits]
        assert [line for _, wrong in found for line in wrong] == []
        with socket.create_connection(place) as slow:
            # What is not read must not keep the server.
            slow.sendall(f"GET /zips/{ZEBRA} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            slow.recv(10)
            process.send_signal(signal.SIGINT)
            printed, log = process.communicate(timeout=20)
        assert (process.returncode, printed, log) == (0, "", "")
        return sum(count for count, _ in found), held


@pytest.mark.process
def test_fifty_clients_at_once_until_it_is_interrupted(
    sdwn: Sdwn, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    answers, held = crowded(sdwn, roots, tmp_path, 1)
    assert answers >= 50
    assert held


@pytest.mark.long
def test_fifty_clients_for_a_minute_take_no_more_memory(
    sdwn: Sdwn, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    _, held = crowded(sdwn, roots, tmp_path, 60)
    # Small pictures are kept and threads started in the beginning; nothing grows after.
    assert max(held[10:]) <= 1.05 * max(held[3:10])


def test_nothing_of_a_release_is_ever_written(roots: tuple[Path, Path], tmp_path: Path) -> None:
    root = copied(roots[0], tmp_path)
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = stamps(root)
    with visiting(Library(root)) as site:
        for address in (*PAGES[:11], f"/zips/{ZEBRA}", "/list.csv", f"/images/{ZEBRA}/0"):
            assert site.get(address).status_code == 200
    assert stamps(root) == before
    for path in [*root.rglob("*"), root]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def stamps(root: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}
