"""The report in a real browser: what it shows, that it asks for nothing, how it is used."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError
from sdwn.evaluation.record import read_evaluation
from sdwn.releases.release import Release
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet, class_index

from drawn import evaluation, noise_release, predictions
from opened import NARROW, WIDE, Opened, opened

pytestmark = pytest.mark.browser

# It closes whatever it may stand in: a title, a script, a comment, an attribute.
HOSTILE = "</title></script><script>window.hacked = 1</script><!-- '\"><img src=x onerror=hacked=1>"
MAP = "#class-map[data-ready]"
NAME = "efficientnet-lite0"


@dataclass
class Judged:
    """The record of an evaluation, and its page."""

    record: dict[str, Any]
    page: Path

    @property
    def classes(self) -> dict[str, dict[str, Any]]:
        return {row["wnid"]: row for row in self.record["classes"]}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Judged:
    """Noise of 40 classes in four groups, judged by chance."""
    folder = tmp_path_factory.mktemp("judged")
    roots = ("terrier.n.01", "finch.n.01", "owl.n.01", "stringed_instrument.n.01", "boat.n.01")
    wnids = [s.wnid for root in roots for s in wordnet.below(root) if s.wnid in class_index()]
    groups = folder / "groups.yaml"
    names = {"birds": "bird.n.01", HOSTILE: "dog.n.01", "boats": "boat.n.01", "fish": "fish.n.01"}
    groups.write_text(json.dumps(names))
    release = noise_release(folder / "run", wordnet, wnids, prompt=f"{{definition}} {HOSTILE}")
    chosen = EvaluationConfig(groups=str(groups))
    paths = evaluation(release, predictions(release), NAME, chosen, model=NAME, weights=HOSTILE)
    return Judged(read_evaluation(release, paths), write_report(release, NAME))


@pytest.fixture(scope="module")
def wide(browser: Any, judged: Judged) -> Iterator[Opened]:
    """The page as a large screen shows it, opened once for the tests that only use it."""
    found = opened(browser, judged.page, MAP)
    yield found
    found.page.close()


def test_it_opens_from_disk_without_an_error_or_a_request(wide: Opened, judged: Judged) -> None:
    assert wide.complaints == []
    others = [url for url in wide.requests if not url.startswith("data:")]
    assert others == [judged.page.as_uri()]
    histogram = judged.record["figures"]["histogram"]
    labels = wide.page.locator("[data-chart=histogram] text").all_text_contents()
    assert labels[: len(histogram)] == [str(correct) for correct in range(len(histogram))]
    shown = [group["name"] for group in judged.record["groups"] if group["classes"]]
    names = " ".join(wide.page.locator("[data-chart=groups] text").all_text_contents())
    assert len(shown) == 3
    assert all(name[:20] in names for name in shown)


def test_the_first_screen_shows_pictures_and_main_figures(wide: Opened, judged: Judged) -> None:
    pictures, headline = wide.page.locator(".first img"), wide.page.locator(".tiles li")
    assert pictures.count() == 3 * 3 * 5
    assert wide.page.locator(".first h3").all_inner_texts() == [
        "Recognised best",
        "Typical, around the median",
        "Recognised worst",
    ]
    assert headline.count() == 5
    wide.page.evaluate("scrollTo(0, 0)")
    for shown in (pictures.last, headline.last):
        box = shown.bounding_box()
        assert box["y"] + box["height"] <= WIDE["height"]
    # A figure stands in a card or in the table, not in both.
    labels = [label.lower() for label in wide.page.locator(".tiles .label").all_inner_texts()]
    rows = wide.page.locator("#figures tbody th").all_inner_texts()
    assert not [row for row in rows if any(row.lower().startswith(label) for label in labels)]


def test_contents_lead_to_every_section(wide: Opened) -> None:
    links = wide.page.locator("nav[aria-label=Contents] a")
    anchors = [
        href.removeprefix("#")
        for href in links.evaluate_all("a => a.map((x) => x.getAttribute('href'))")
    ]
    assert anchors == wide.page.locator("main > section").evaluate_all("s => s.map((x) => x.id)")


def test_a_printed_page_cuts_no_figure_and_leaves_nothing_out(browser: Any, judged: Judged) -> None:
    found = opened(browser, judged.page, MAP)
    found.page.emulate_media(media="print")
    cut = "all => all.filter((one) => getComputedStyle(one).breakInside !== 'avoid').length"
    for whole in ("figure", "article", "tr", ".map", ".tiles"):
        assert found.page.locator(whole).count() > 0
        assert found.page.locator(whole).evaluate_all(cut) == 0, whole
    table = found.page.locator(".scroll.tall")
    assert table.evaluate("e => e.scrollHeight - e.clientHeight") <= 1
    assert not found.page.locator("nav").is_visible()
    assert found.page.locator("#class-map text").first.is_visible()
    found.page.close()


def test_no_script_runs_but_the_pages_own(browser: Any, judged: Judged) -> None:
    found = opened(browser, judged.page, MAP)
    found.page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 2';"
        "document.body.append(s); fetch('http://127.0.0.1:9/').catch(() => {})"
    )
    assert found.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in said for said in found.complaints)
    found.page.close()


def test_hostile_names_and_prompts_stay_text(wide: Opened) -> None:
    assert wide.page.evaluate("window.hacked") is None
    assert wide.page.locator("img[src=x]").count() == 0
    prompts = wide.page.locator("#gallery article > p.quiet").all_inner_texts()
    assert {text.endswith(f" {HOSTILE}") for text in prompts} == {True}
    assert wide.page.locator("#groups tbody th").nth(1).inner_text() == HOSTILE
    assert HOSTILE in wide.page.locator("#settings").inner_text()
    assert HOSTILE in wide.page.locator(".legend").inner_text()


def test_pointing_at_a_circle_shows_its_class(wide: Opened, judged: Judged) -> None:
    page, card = wide.page, wide.page.locator("#map-card")
    first = card.locator("h3").inner_text()
    circles = page.locator("#class-map g:not(.dim) circle")
    assert circles.count() == len(judged.classes)
    page.locator("#class-map").scroll_into_view_if_needed()
    for at in range(0, circles.count(), 7):
        box = circles.nth(at).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
        page.wait_for_timeout(150)
        wnid = re.findall(r"n\d{8}", card.inner_text())[0]
        known = judged.classes[wnid]
        assert f"{known['correct']} of {known['images']}" in card.inner_text()
        assert card.locator(".sheet span").count() == known["images"]
        assert card.locator(".sheet .right").count() == known["correct"]
        picture = card.locator(".sheet span").first.evaluate("e => e.style.backgroundImage")
        assert picture.startswith('url("data:image/webp;base64,')
    assert card.locator("h3").inner_text() != first


def test_arrow_keys_and_the_search_go_to_a_class(wide: Opened, judged: Judged) -> None:
    page, name = wide.page, wide.page.locator("#map-card h3")
    page.locator("#map-find").fill("banjo")
    assert name.inner_text() == "banjo"
    page.locator("#class-map a[tabindex='0']").focus()
    visited = {name.inner_text()}
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        visited.add(name.inner_text())
    assert len(visited) >= 3


def test_the_legend_hides_and_shows_groups(wide: Opened, judged: Judged) -> None:
    from playwright.sync_api import expect

    page, circles = wide.page, wide.page.locator("#class-map g:not(.dim) circle")
    button = page.locator(".legend button", has_text="birds")
    everything = circles.count()
    birds = sum(row["group"] == "birds" for row in judged.record["classes"])
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    expect(circles).to_have_count(everything - birds)
    page.get_by_text("hide all").click()
    expect(circles).to_have_count(0)
    page.get_by_text("show all").click()
    expect(circles).to_have_count(everything)


def test_a_table_sorts_both_ways_and_filters(wide: Opened, judged: Judged) -> None:
    page = wide.page
    head = page.locator("#class-table thead th").nth(2)
    column = "#class-table tbody tr:not([hidden]) td:nth-child(3)"
    right = sorted(row["correct"] for row in judged.record["classes"])
    for order, expected in (("descending", right[::-1]), ("ascending", right)):
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == order
        assert list(map(int, page.locator(column).all_inner_texts())) == expected
    page.locator("#class-table thead button").first.click()
    assert head.get_attribute("aria-sort") is None
    names = page.locator("#class-table tbody th").all_inner_texts()
    assert names == sorted(names, key=str.lower)
    page.locator("[data-filter]").fill("owl birds")
    assert page.locator(column).count() == 1
    assert page.locator("[data-count]").inner_text() == f"1 of {len(right)} classes"
    page.locator("[data-filter]").fill("")
    assert page.locator(column).count() == len(right)


def test_what_has_no_value_stands_last_either_way(wide: Opened) -> None:
    miss = wide.page.locator("#class-table td:nth-child(8)")
    for order in ("descending", "ascending"):
        head = wide.page.locator("#class-table thead th").nth(7)
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        found = [text for text in miss.all_inner_texts() if text != "\N{EN DASH}"]
        assert 0 < len(found) < miss.count()
        assert miss.all_inner_texts()[: len(found)] == found
        assert found == sorted(found, key=float, reverse=order == "descending")
    assert "No class here is in: fish." in wide.page.locator("#groups").inner_text()


def test_a_name_opens_its_card_and_escape_closes_it(wide: Opened) -> None:
    page, dialog = wide.page, wide.page.locator("#dialog")
    name = page.locator("#confusions button.name").first
    name.press("Enter")
    assert dialog.locator("h3").inner_text() == name.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.className") == "name"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_only_downwards(browser: Any, judged: Judged, scheme: str) -> None:
    from playwright.sync_api import expect

    options = {"color_scheme": scheme, "has_touch": True, "is_mobile": True}
    found = opened(browser, judged.page, MAP, viewport=NARROW, **options)
    assert found.overflow == 0
    table = found.page.locator("#groups .scroll")
    assert table.evaluate("e => e.scrollWidth - e.clientWidth") > 0
    shadows = table.evaluate("e => getComputedStyle(e).backgroundAttachment")
    assert shadows == "local, local, scroll, scroll", "an edge with more behind it has a shadow"
    name = found.page.locator("#map-card h3")
    before = name.inner_text()
    circle = found.page.locator("#class-map g:not(.dim) circle").nth(9)
    circle.scroll_into_view_if_needed()
    box = circle.bounding_box()
    found.page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(name).not_to_have_text(before)
    assert found.complaints == []
    assert _contrast(found.page, "p.lead") > 4.5
    found.page.close()


def test_charts_follow_the_colour_scheme(browser: Any, judged: Judged) -> None:
    found = opened(browser, judged.page, MAP, color_scheme="light")
    tick = found.page.locator("[data-chart=histogram] text").first
    light = tick.evaluate("e => getComputedStyle(e).fill")
    found.page.emulate_media(color_scheme="dark")
    found.page.wait_for_timeout(200)
    dark = found.page.locator("[data-chart=histogram] text").first
    assert dark.evaluate("e => getComputedStyle(e).fill") != light
    assert found.complaints == []
    found.page.close()


def test_what_changed_since_the_figures_were_made_is_not_shown(
    judged: Judged, tmp_path: Path
) -> None:
    release = Release(shutil.copytree(judged.page.parents[2], tmp_path / "release"))
    paths = release.paths.evaluation(NAME)
    synsets = paths.table("synsets")
    synsets.write_text(synsets.read_text().replace(",", ";"))
    with pytest.raises(IntegrityError, match=r"synsets\.csv: damaged: KeyError"):
        write_report(release, NAME)
    synsets.unlink()
    table = pq.read_table(paths.predictions)
    pq.write_table(table.take(list(range(len(table)))[::-1]), paths.predictions)
    with pytest.raises(IntegrityError, match=r"changed .*; evaluate the release again"):
        write_report(release, NAME)


def test_without_javascript_the_figures_are_there(browser: Any, judged: Judged) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(judged.page.as_uri())
    assert "need JavaScript" in page.locator("body").inner_text()
    assert page.locator("#class-map circle").count() > 40
    assert page.locator("[data-chart=histogram] svg").is_visible()
    assert (
        f"{judged.record['figures']['mean_correct']:.2f}" in page.locator("#figures").inner_text()
    )
    page.close()


def test_pictures_have_words_and_the_map_says_where_places_come_from(wide: Opened) -> None:
    images = wide.page.locator("img")
    assert images.count() > 200
    assert all(images.evaluate_all("found => found.map((image) => image.alt)"))
    assert "WordNet path distance" in wide.page.locator("#map").inner_text()
    assert "builtin:noise has no text encoder" in wide.page.locator("#map").inner_text()


def _contrast(page: Any, selector: str) -> float:
    """WCAG's contrast of text against the page's ground."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    low, high = sorted((luminance(text), luminance(ground)))
    return (high + 0.05) / (low + 0.05)
