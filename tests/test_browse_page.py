"""The pages of sdwn browse in a real browser, by hand, by keys, and without scripts."""

from __future__ import annotations

import csv
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sdwn.browser.library import BESIDE, Library, View
from sdwn.paths import ReleasePaths
from sdwn.planning.tables import as_table, write_concepts
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from conftest import Sdwn, hide_wordnet
from drawn import draw_features, draw_scores, evaluation, noise_release, predictions
from opened import NARROW, Opened, opened
from served import served

pytestmark = pytest.mark.browser

# It closes whatever it may stand in: an attribute, a title, a script, a comment.
HOSTILE = "</title></script><script>window.hacked = 1</script><!-- '\"><img src=x onerror=hacked=1>"
# Right to left, with a mark that would turn what follows.
TURNED = "\N{RIGHT-TO-LEFT OVERRIDE}\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}" * 3
ZEBRA, TABBY, PUG, BANJO = "n02391049", "n02123045", "n02110958", "n02787622"
# Synsets with odd names: what they are called is not WordNet's.
ODD = "n02123159"
CAT = "n02121808"
ROOTS = ("domestic_cat.n.01", "hound.n.01")
IMAGES = 6


# A part of a pixel, which nobody sees; what is called good begins below 0.1.
UNSEEN = 0.001
# How much of the page moved since it was opened, as browsers measure it.
SHIFTS = """new Promise((done) => {
  let sum = 0;
  const add = (list) => list.getEntries().forEach((one) => { sum += one.value; });
  new PerformanceObserver(add).observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(sum), 100);
})"""


@dataclass
class Site:
    """A release that is served, with another beside it."""

    url: str
    library: Library

    def go(self, found: Opened, address: str) -> Any:
        """Open one of its pages."""
        found.page.goto(self.url + address)
        return found.page


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> tuple[Path, Path]:
    """Noise of animals, most of them classes, and a banjo; and some of it again, otherwise made."""
    folder = tmp_path_factory.mktemp("browse")
    # In an order that stays, so that every run of the test draws the same predictions.
    below = sorted(synset.wnid for root in ROOTS for synset in wordnet.below(root))
    wnids = [ZEBRA, PUG, BANJO, CAT, *below]
    common = {"images_per_synset": IMAGES, "prompt": f"{{lemma}}, {{definition}} {HOSTILE}"}
    one = _release(folder / "one", wordnet, wnids, **common)
    two = _release(folder / "two", wordnet, wnids[::4], seed=7, **common)
    scored = Release(one)
    numbers = np.array(scored.metadata["number"])
    likeness = 20 + np.random.default_rng(0).random(len(scored))
    vectors = np.random.default_rng(0).normal(size=(len(scored), 4))
    draw_features(scored, vectors, clip_score=likeness)
    draw_scores(scored, duplicate_group=[0 if n == 2 else None for n in numbers])
    rename(one, ODD, f"{HOSTILE}, {TURNED}, {'long' * 75}")
    return one, two


def _release(folder: Path, wordnet: WordNet, wnids: list[str], **changes: Any) -> Path:
    catalog = {"name": "imagenet-1k", "roots": ["cat.n.01", *ROOTS], "only": wnids}
    release = noise_release(folder, wordnet, wnids, catalog=catalog, **changes)
    evaluation(release, predictions(release, seed=changes.get("seed", 0)), model="drawn-model")
    return release.paths.root


def rename(root: Path, wnid: str, lemmas: str) -> None:
    """Give a synset of a release other lemmas and another definition."""
    concepts = Release(root).concepts
    changed = {"lemmas": lemmas, "label": lemmas.partition(", ")[0].replace("_", " ")}
    concepts[wnid] = replace(concepts[wnid], **changed, definition=f"{TURNED} {lemmas}")
    write_concepts(ReleasePaths(root).concepts(0), as_table(tuple(concepts.values())))


@pytest.fixture(scope="module")
def site(roots: tuple[Path, Path]) -> Iterator[Site]:
    libraries = [Library(root) for root in roots]
    with served(*libraries) as url:
        yield Site(url, libraries[0])


@pytest.fixture(scope="module")
def wide(browser: Any, site: Site) -> Iterator[Opened]:
    """A window as on a large screen, for the tests that only go from page to page."""
    found = opened(browser, f"{site.url}/about", "h1")
    yield found
    assert found.complaints == []
    assert {url for url in found.requests if not url.startswith(site.url)} == set()
    found.page.close()


PAGES = (
    *("/?q=qqq", f"/?below={ZEBRA}", "/map", "/about", f"/concepts/{ODD}", "/tree/n02121620"),
    *("/?by=clip_score&order=clip_score", f"/concepts/{ZEBRA}/2?similar=drawn&order=clip_score"),
    *("/compare", f"/compare/{ZEBRA}"),
)


def shown(page: Any) -> list[str]:
    """The names of the cards."""
    return list(page.locator(".hit strong").all_inner_texts())


def rows(page: Any) -> list[str]:
    """What the rows of a list say."""
    return list(page.locator(".rows li").all_inner_texts())


def searched(page: Any) -> str:
    """What the address asks for."""
    return str(page.evaluate("location.pathname + location.search"))


def test_a_narrow_dark_screen_shows_every_page_whole(browser: Any, site: Site) -> None:
    options = {"color_scheme": "dark", "has_touch": True, "is_mobile": True, "viewport": NARROW}
    found = opened(browser, f"{site.url}/about", "h1", **options)
    for address in PAGES:
        page = site.go(found, address)
        assert found.overflow <= 0, address
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        images = page.locator("main img")
        assert all(images.evaluate_all("found => found.map((image) => image.alt)")), address
        assert page.locator("h1").count() == 1, address
    page = site.go(found, "/map")
    page.wait_for_selector("#class-map[data-ready]")
    circle = page.locator("#class-map a[data-name=banjo]")
    circle.scroll_into_view_if_needed()
    circle.tap()
    assert page.locator("#circle h2").inner_text() == "banjo"
    assert searched(page) == "/map", "a finger first chooses, the card's link opens"
    assert found.complaints == []
    found.page.close()


def test_results_come_as_one_types(wide: Opened, site: Site) -> None:
    from playwright.sync_api import expect

    page = site.go(wide, "/")
    page.evaluate("window.same = true")
    page.locator("#q").press_sequentially("zebr", delay=20)
    expect(page.locator("#said")).to_contain_text("“zebr”")
    assert shown(page)[0] == "zebra"
    assert len(page.locator("#said").inner_text()) > 10
    assert searched(page) == "/?q=zebr"
    assert page.title().startswith("zebr · ")
    page.locator("#q").fill("zbera")
    expect(page.locator(".found")).to_contain_text("Shown for “zebra”")
    assert shown(page)[0] == "zebra"
    page.locator("#q").fill("")
    expect(page.locator(".found")).not_to_contain_text("“")
    assert searched(page) == "/"
    assert page.evaluate("window.same && document.activeElement.id") == "q"


def test_filters_stay_while_one_types_and_go_back(wide: Opened, site: Site) -> None:
    from playwright.sync_api import expect

    page = site.go(wide, "/?q=hound")
    before = shown(page)
    page.get_by_role("link", name="✗ incorrect").click()
    expect(page.locator(".chip[aria-current]")).to_contain_text("✗ incorrect")
    assert page.evaluate("document.activeElement.id") == "only-wrong"
    assert searched(page) == "/?q=hound&show=wrong"
    told = page.locator("#only-wrong .quiet").inner_text()
    assert f", {told} images" in page.locator(".found").inner_text()
    listed = page.request.get(f"{site.url}/list.csv?q=hound&show=wrong").text()
    assert int(told) == len(listed.splitlines()) - 1
    kinds = ("right", "wrong", "unjudged")
    counts = [int(page.locator(f"#only-{kind} .quiet").inner_text()) for kind in kinds]
    assert sum(counts) == int(page.locator("#only-all .quiet").inner_text())
    assert set(
        page.locator(".hit img").evaluate_all("all => all.map(i => i.alt.split(', ').at(-1))")
    ) == {"incorrect"}
    page.locator("#q").fill("zebra")
    expect(page.locator("#said")).to_contain_text("“zebra”")
    assert searched(page) == "/?q=zebra&show=wrong"
    page.go_back()
    expect(page.locator("#q")).to_have_value("hound")
    page.wait_for_load_state()
    assert shown(page) == before


def test_groups_and_orders_are_chosen(wide: Opened, site: Site) -> None:
    from playwright.sync_api import expect

    page = site.go(wide, "/")
    page.select_option("#group", "cats")
    page.wait_for_url("**/?group=cats")
    expect(page.locator(".found")).not_to_contain_text("page 1")
    cats = shown(page)
    assert "tabby" in cats
    assert "zebra" not in cats
    page.select_option("#order", "-rate")
    page.wait_for_url("**/?group=cats&order=-rate")
    rates = page.locator(".hit .rate").all_inner_texts()
    right = [int(found[1]) for text in rates if (found := re.match(r"\s*(\d+) of", text))]
    assert right == sorted(right, reverse=True)
    assert sorted(shown(page)) == sorted(cats)
    page.select_option("#order", "shuffled")
    page.wait_for_url("**/?group=cats&order=shuffled")
    shuffled = shown(page)
    assert sorted(shuffled) == sorted(cats) != shuffled
    page.reload()
    assert shown(page) == shuffled


def test_a_score_filters_and_orders(wide: Opened, site: Site) -> None:
    from playwright.sync_api import expect

    page = site.go(wide, "/?q=cat")
    page.select_option("#by", "clip_score")
    page.wait_for_url("**/?q=cat&by=clip_score")
    spans = page.get_by_role("navigation", name="CLIP score")
    every = [int(told) for told in spans.locator(".quiet").all_inner_texts()]
    assert sum(every) == int(page.locator("#only-all .quiet").inner_text())
    span = spans.get_by_role("link").nth(2)
    span.click()
    expect(page.locator(".found")).to_contain_text(f", {every[2]} images")
    assert "&clip_score=" in searched(page)
    page.get_by_role("spinbutton", name="from").fill("20.25")
    page.keyboard.press("Enter")
    expect(page.locator(".removable")).to_contain_text("CLIP score: 20.25 and more")
    page.select_option("#order", "-clip_score")
    page.wait_for_url("**order=-clip_score**")
    page.locator(".hit a").first.click()
    told = page.locator(".image").get_by_text("CLIP score:").all_inner_texts()
    values = [float(one.partition(": ")[2]) for one in told]
    assert min(values) >= 20.2
    assert values == sorted(values, reverse=True)
    count = page.locator(".image").count()
    page.locator(".image a").first.click()
    for rank in range(1, count + 1):
        expect(page.locator(".up")).to_contain_text(f"{rank} of {count}")
        page.keyboard.press("j")
    page.get_by_role("link", name="by drawn").click()
    similar = page.locator(".strip").last.locator("li")
    assert similar.count() == BESIDE
    similar.first.locator("a").click()
    assert page.locator("h1").count() == 1


def test_a_page_is_asked_for_by_its_number(wide: Opened, site: Site) -> None:
    from playwright.sync_api import expect

    page = site.go(wide, "/?order=name")
    first = shown(page)
    page.get_by_label("Page", exact=True).fill("2")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?order=name&page=2")
    expect(page.locator(".found")).to_contain_text("page 2 of")
    assert set(shown(page)).isdisjoint(first)
    page.go_back()
    expect(page.locator(".found")).to_contain_text("page 1 of")
    assert shown(page) == first


def test_one_goes_down_the_tree_and_searches_below(wide: Opened, site: Site) -> None:
    page = site.go(wide, "/tree")
    root = page.locator("h1").inner_text()
    numbers = [int(text) for text in page.locator(".tiles strong").all_inner_texts()[:2]]
    assert numbers == [len(site.library.collection), IMAGES * len(site.library.collection)]
    page = site.go(wide, f"/tree/{CAT}")
    images = [int(found) for found in re.findall(r"(\d+) images", " ".join(rows(page)))]
    assert images == sorted(images, reverse=True)
    page.get_by_role("link", name="name", exact=True).click()
    page.wait_for_url("**order=name")
    names = [row.partition("\n")[0].lower() for row in rows(page)]
    assert names == sorted(names)
    page = site.go(wide, "/tree/n02121620")
    assert page.locator(".crumbs a").first.inner_text() == root
    page.get_by_role("link", name=re.compile(r"^domestic cat\b")).click()
    page.wait_for_url("**/tree/n02121808")
    assert page.locator(".crumbs [aria-current]").inner_text() == "domestic cat"
    page.get_by_role("link", name="Search everything below").click()
    page.wait_for_url("**/?below=n02121808")
    assert "tabby" in shown(page)
    page.locator(".chip.removable").click()
    page.wait_for_url(f"{site.url}/")
    assert len(shown(page)) == 48


def test_keys_lead_everywhere(wide: Opened, site: Site) -> None:
    page = site.go(wide, "/?q=hound")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.press("ArrowDown")
    before = shown(page)
    at = "[...document.querySelectorAll('[data-grid] a')].indexOf(document.activeElement)"
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('.cards')).gridTemplateColumns.split(' ').length"
    )
    steps = [
        ("ArrowRight", 1),
        ("ArrowDown", columns + 1),
        ("ArrowLeft", columns),
        ("ArrowLeft", columns - 1),
    ]
    assert page.evaluate(at) == 0
    for key, expected in steps:
        page.keyboard.press(key)
        assert page.evaluate(at) == expected
    name = shown(page)[columns - 1]
    page.keyboard.press("Enter")
    page.wait_for_url("**/concepts/*")
    assert page.locator("h1").inner_text() == name
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url("**/concepts/*/0")
    page.keyboard.press("j")
    page.wait_for_url("**/concepts/*/1")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/concepts/*/0")
    page.keyboard.press("Escape")
    page.wait_for_url(re.compile(r"/concepts/n\d+#image-0$"))
    assert page.evaluate(at) == 0
    page.keyboard.press("Escape")
    page.wait_for_selector(".hit")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()
    assert shown(page) == before


def test_a_synsets_page_says_what_was_seen(wide: Opened, site: Site) -> None:
    page = site.go(wide, f"/concepts/{ZEBRA}")
    shots = site.library.images(ZEBRA)
    assert page.locator(".image").count() == len(shots) == IMAGES
    seeds = site.library.release.metadata["seed"]
    for shot, shown_as in zip(shots, page.locator(".image").all(), strict=True):
        text = shown_as.inner_text()
        guesses = shown_as.locator(".guesses li").all_inner_texts()
        for guess, line in zip(shot.top5, guesses, strict=True):
            assert line.startswith(guess.name)
            assert f"{100 * guess.probability:.1f} %" in line
        assert ("✓ correct" if shot.correct else "✗ incorrect") in text
        assert f"seed {seeds[shot.row]}" in text
        alt = shown_as.locator("img").get_attribute("alt")
        outcome = "correct" if shot.correct else "incorrect"
        seen = shot.top5[0].name
        assert alt == f"zebra.n.01, image {shot.number}, classified as {seen}, {outcome}"
    assert HOSTILE in page.locator(".made").inner_text()
    assert "sdwn regenerate" in page.locator(".command").inner_text()
    page = site.go(wide, f"/concepts/{TABBY}")
    assert {"domestic cat", "Persian cat"} <= set(page.locator(".near a").all_inner_texts())


def test_images_of_one_kind_are_gone_through_one_by_one(wide: Opened, site: Site) -> None:
    show = "wrong" if len(site.library.rows(ZEBRA, View(show="wrong"))) > 1 else "right"
    numbers = [shot.number for shot in site.library.images(ZEBRA, View(show=show))]
    assert 1 < len(numbers) < IMAGES
    page = site.go(wide, f"/concepts/{ZEBRA}?show={show}")
    page.locator(".image a").first.click()
    for number in numbers:
        page.wait_for_url(f"**/concepts/{ZEBRA}/{number}?show={show}")
        page.keyboard.press("j")
    page.keyboard.press("Escape")
    page.wait_for_url(f"**/concepts/{ZEBRA}?show={show}#image-{numbers[-1]}")
    other = next(shot.number for shot in site.library.images(ZEBRA) if shot.number not in numbers)
    page = site.go(wide, f"/concepts/{ZEBRA}/{other}?show={show}")
    assert f"{other + 1} of {IMAGES}" in page.locator(".up").inner_text()


def test_what_else_was_taken_for_a_class(wide: Opened, site: Site) -> None:
    page = site.go(wide, f"/concepts/{PUG}")
    shots = site.library.images(PUG)
    seen = Counter(shot.top5[0].name for shot in shots if shot.top5)
    told = page.locator("dt", has_text="Classified as").locator("+ dd").inner_text()
    assert dict(re.findall(r"(?:^| · )(.+?) (\d+)(?= · |$)", told)) == {
        name: str(count) for name, count in seen.items()
    }
    page = site.go(wide, f"/concepts/{PUG}/0")
    guess = page.locator(".guesses a").first
    name = guess.inner_text()
    guess.click()
    page.wait_for_url("**/?seen=*")
    assert f"classified as {name}" in page.locator(".chip.removable").inner_text()
    alts = page.locator(".hit img").evaluate_all("all => all.map((image) => image.alt)")
    assert alts
    assert all(f", classified as {name}, " in alt for alt in alts)


def test_an_image_a_synset_and_a_search_are_taken_home(
    wide: Opened, site: Site, tmp_path: Path
) -> None:
    page = site.go(wide, f"/concepts/{ZEBRA}")
    with page.expect_download() as zipped:
        page.get_by_role("link", name="as a zip").click()
    zipped.value.save_as(tmp_path / "zebra.zip")
    with zipfile.ZipFile(tmp_path / "zebra.zip") as archive:
        assert sum(name.endswith(".webp") for name in archive.namelist()) == IMAGES
    page = site.go(wide, f"/concepts/{ZEBRA}/1")
    with page.expect_download() as one:
        page.get_by_role("link", name="as it is stored").click()
    one.value.save_as(tmp_path / one.value.suggested_filename)
    with Image.open(tmp_path / "zebra.n.01-1.webp") as image:
        assert image.size == (16, 8)
    page = site.go(wide, "/?q=zebra&show=wrong")
    page.get_by_text("Download", exact=True).click()
    assert f"sdwn export {site.library.root} " in page.locator(".download").inner_text()
    with page.expect_download() as found:
        page.get_by_role("link", name="as a list (CSV)").click()
    found.value.save_as(tmp_path / "list.csv")
    rows = list(csv.DictReader((tmp_path / "list.csv").open(encoding="utf-8")))
    wrong = [shot.number for shot in site.library.images(ZEBRA, View(show="wrong"))]
    assert [int(row["number"]) for row in rows if row["wnid"] == ZEBRA] == wrong


def test_a_command_is_copied(browser: Any, site: Site) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"{site.url}/concepts/{ZEBRA}/3")
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"sdwn regenerate {site.library.root} zebra.n.01 3"
    context.close()


def test_odd_names_stay_text(wide: Opened, site: Site) -> None:
    for address in (
        "/?q=hacked",
        f"/concepts/{ODD}",
        f"/concepts/{ODD}/0",
        "/?q=" + "%22%3E%3Cscript%3E",
    ):
        page = site.go(wide, address)
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[src=x]").count() == 0
    page = site.go(wide, f"/concepts/{ODD}")
    assert page.locator("h1").inner_text() == HOSTILE
    assert TURNED in page.locator("main").inner_text()
    assert page.title().startswith(HOSTILE)
    assert wide.overflow <= 0
    page.locator("#q").fill(HOSTILE)
    page.keyboard.press("Enter")
    page.wait_for_selector(".found")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#q").input_value() == HOSTILE


def test_nothing_jumps_while_pictures_come(browser: Any, site: Site) -> None:
    found = opened(browser, f"{site.url}/about", "h1")
    speed = found.page.context.new_cdp_session(found.page)
    for slower, address in ((1, "/?q=cat"), (20, "/?q=cat"), (20, f"/concepts/{ZEBRA}")):
        # A slow machine may draw a part of a page.
        speed.send("Emulation.setCPUThrottlingRate", {"rate": slower})
        page = site.go(found, address)
        page.wait_for_load_state("networkidle")
        assert page.evaluate(SHIFTS) < UNSEEN, (address, slower)
        assert page.locator("main img").first.evaluate("image => image.naturalWidth") > 0
    speed.send("Emulation.setCPUThrottlingRate", {"rate": 1})
    # A page that comes in pieces: the choices are there before the filters above them.
    page = site.go(found, "/?q=cat")
    top = "document.querySelector('.choices').getBoundingClientRect().top"
    after = page.evaluate(top)
    page.evaluate("document.getElementById('results').replaceChildren()")
    assert page.evaluate(top) == after
    found.page.close()


def test_the_map_is_a_way_in(wide: Opened, site: Site) -> None:
    page = site.go(wide, "/map")
    page.wait_for_selector("#class-map[data-ready]")
    classes = site.library.predictions.record["classes"] if site.library.predictions else []
    assert page.locator("#class-map a").count() == len(classes)
    name = page.locator("#circle h2")
    visited = {name.inner_text()}
    page.locator("#class-map a[tabindex='0']").focus()
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        visited.add(name.inner_text())
    assert len(visited) >= 3
    banjo = page.locator("#class-map a[data-name=banjo] circle").bounding_box()
    page.mouse.move(banjo["x"] + banjo["width"] / 2 + 3, banjo["y"] + banjo["height"] / 2)
    assert name.inner_text() == "banjo"
    assert page.locator("#circle img").evaluate("image => image.decode().then(() => true)")
    page.get_by_role("button", name="Zoom in").click()
    assert page.evaluate("document.getElementById('class-map').viewBox.baseVal.width") < 214
    page.get_by_role("button", name="Whole map").click()
    page.locator(".legend a", has_text="cats").click()
    page.wait_for_url("**/map?group=cats")
    page.wait_for_selector("#class-map[data-ready]")
    assert page.locator("#class-map g:not(.dim)").count() == 1
    page.locator("#class-map a[tabindex='0']").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/concepts/*")


def test_two_releases_stand_side_by_side(wide: Opened, site: Site) -> None:
    from playwright.sync_api import expect

    page = site.go(wide, "/compare")
    assert {"one", "two"} <= set(page.locator("h1").inner_text().split())
    found = page.locator(".rows li").all_inner_texts()
    tallies = [[int(n) for n in re.findall(r"(\d+) of", text)] for text in found]
    changes = [100 * (two - one) / IMAGES for one, two in filter(None, tallies)]
    # As in the report: the gains, then the losses, the largest of each first; then the rest.
    assert changes == sorted(changes, key=lambda one: (one <= 0, one == 0, -abs(one)))
    assert len({one > 0 for one in changes}) == 2
    first = page.locator(".rows li a").first
    assert first.locator(".difference").inner_text() == f"▲ +{changes[0]:.1f}"
    first.click()
    page.wait_for_url("**/compare/n*")
    expect(page.locator(".both > li")).to_have_count(IMAGES)
    expect(page.locator(".both img")).to_have_count(2 * IMAGES)
    sources = page.locator(".both img").evaluate_all(
        "all => all.map((image) => image.getAttribute('src'))"
    )
    assert all(
        source.startswith("/other/") == bool(place % 2) for place, source in enumerate(sources)
    )
    before = page.url
    page.keyboard.press("j" if page.locator("a[rel=next]").count() else "k")
    page.wait_for_url(lambda url: url != before)


def test_a_search_that_fails_says_so_and_can_be_tried_again(browser: Any, site: Site) -> None:
    from playwright.sync_api import expect

    found = opened(browser, f"{site.url}/?q=hound", ".hit")
    page, trouble = found.page, found.page.locator("#trouble")
    before = shown(page)
    page.route("**/?q=zebra*", lambda route: route.fulfill(status=500, body="<p>broken"))
    page.locator("#q").fill("zebra")
    expect(trouble).to_contain_text("error 500")
    assert shown(page) == before
    page.unroute("**/?q=zebra*")
    page.route("**/?q=tabby*", lambda route: route.abort())
    page.locator("#q").fill("tabby")
    expect(trouble).to_contain_text("still running?")
    page.unroute("**/?q=tabby*")
    page.locator("#q").fill("pug")
    expect(trouble).to_be_hidden()
    assert shown(page)[0] == "pug"
    found.page.close()


def test_without_scripts_links_and_forms_do(browser: Any, site: Site) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(f"{site.url}/?q=pug")
    page.locator("#q").fill("zebra")
    page.get_by_role("button", name="Search").click()
    assert shown(page)[0] == "zebra"
    page.get_by_role("link", name="✓ correct").click()
    assert "show=right" in page.url
    page.locator("#q").fill("cat")
    page.select_option("#order", "name")
    page.get_by_role("button", name="Show").click()
    assert "show=right" in page.url
    assert page.locator(".hit").count() > 1
    page.select_option("#by", "clip_score")
    page.get_by_role("button", name="Show").first.click()
    before = page.locator(".found").inner_text()
    page.get_by_role("spinbutton", name="to").fill("20.5")
    page.locator(".leaf").get_by_role("button", name="Show").click()
    assert page.locator(".found").inner_text() != before
    assert "show=right" in page.url
    page.locator(".hit a").first.click()
    page.get_by_label("Order").select_option("clip_score")
    page.get_by_role("button", name="Show").click()
    assert page.locator(".image").count() > 0
    page.goto(f"{site.url}/map")
    page.locator("summary").click()
    page.locator("details .names a", has_text="banjo").click()
    assert page.locator("h1").inner_text() == "banjo"
    page.close()


def test_an_import_that_nobody_judged_is_shown_too(
    browser: Any, sdwn: Sdwn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wnid in (ZEBRA, PUG):
        (tmp_path / "pictures" / wnid).mkdir(parents=True)
        for number in range(2):
            colour = (90 * number, 40, 200)
            Image.new("RGB", (20, 30), colour).save(tmp_path / "pictures" / wnid / f"{number}.png")
    sdwn("import", "pictures", "taken", "--format", "imagefolder")
    damaged = tmp_path / "taken" / "evaluations" / "mine" / "evaluation.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}")
    (tmp_path / "taken/taxonomy.parquet").unlink()  # as releases were before there was one
    hide_wordnet(monkeypatch, tmp_path)
    with served(Library(tmp_path / "taken")) as url:
        found = opened(browser, f"{url}/", ".hit")
        page = found.page
        assert sorted(shown(page)) == ["pug", "zebra"]
        assert "sdwn evaluate" in page.locator("#results").inner_text()
        assert page.get_by_role("link", name="correct", exact=False).count() == 0
        for address in (f"/concepts/{PUG}", f"/concepts/{PUG}/1", "/about"):
            page.goto(url + address)
            assert "regenerate" not in page.locator("main").inner_text()
        assert "The evaluation mine is not shown: " in page.locator("main").inner_text()
        page.goto(f"{url}/tree")
        assert "apt-get install wordnet-base" in page.locator("main").inner_text()
        page.goto(f"{url}/map")
        assert "There is no map" in page.locator("main").inner_text()
        assert found.complaints == []
        found.page.close()
