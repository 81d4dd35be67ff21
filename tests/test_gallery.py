"""The gallery's list of features, as cards and as a table, and its page in a real Chromium, opened from the disk."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from saev_dist.render.gallery import card, data_js, index_html
from tests.browsing import ACCENTED, Open, cards, check_close_up, dots, expected_within, in_order, wait_for_cards
from tests.pages import N_TOKENS, SHOWN, Gallery


@pytest.mark.parametrize("key", ["id", "freq", "mean", "max"])
def test_cards_are_sorted_as_asked(visit: Open, small: Gallery, key: str):
    page = visit(small)
    wait_for_cards(page, in_order(small, list(SHOWN), "max", descending=True))
    page.get_by_label("Sort").select_option(key)
    descending = key != "id"
    page.wait_for_function("key => new URLSearchParams(location.hash.slice(1)).get('sort') === key || key === 'max'", arg=key)
    wait_for_cards(page, in_order(small, list(SHOWN), key, descending))
    page.locator("#order").click()
    expect(page.locator("#order")).to_contain_text("ascending" if descending else "descending")
    wait_for_cards(page, in_order(small, list(SHOWN), key, not descending))


def test_a_close_up_shows_the_winning_patch_with_its_surroundings(visit: Open, small: Gallery):
    page = visit(small, "#ids=10")
    wait_for_cards(page, [10])
    frames = page.locator("#grid .close-up")
    expect(frames).to_have_count(4)
    for i, image in enumerate(small.views[10].images[:4]):
        check_close_up(frames.nth(i), 10, image)


def test_pointing_at_an_image_outlines_its_close_up_and_the_other_way_round(visit: Open, small: Gallery):
    page = visit(small, "#ids=10,11")
    wait_for_cards(page, [11, 10] if small.table.max_s[11] > small.table.max_s[10] else [10, 11])
    card = page.locator("#grid > li[data-feature='10']")
    close_ups, tiles = card.locator(".close-up"), card.locator(".tiles img")
    for pointed, i in ((tiles, 2), (close_ups, 1), (tiles, 0)):
        box = pointed.nth(i).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        expect(close_ups.nth(i)).to_have_class(re.compile("twin"))
        expect(tiles.nth(i)).to_have_class(re.compile("twin"))
        assert page.locator(".twin").count() == 2
    card.get_by_role("link").hover(position={"x": 3, "y": 3})
    expect(page.locator(".twin")).to_have_count(0)
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    expect(page.locator(".twin")).to_have_count(2)
    page.mouse.move(2, 2)
    expect(page.locator(".twin")).to_have_count(0)


def test_a_card_without_pictures_has_no_close_ups_and_says_nothing_of_them(small: Gallery):
    assert card(10, small.views[10].images, close_ups=False).close_ups == ()
    assert "close-ups of the patches" in index_html(small.facts)
    assert "close-ups of the patches" not in index_html(type(small.facts)(**(vars(small.facts) | {"dataset": ""})))


def test_search_finds_ids_whatever_the_filters_and_says_what_it_did_not_understand(visit: Open, small: Gallery):
    page = visit(small, "#show=dead&sort=id&order=asc")
    wait_for_cards(page, [7, 21])
    search = page.get_by_label("Search ids")
    search.fill("3, 10-12 55")
    wait_for_cards(page, [3, 10, 11, 12, 55])
    assert "3 of 60" not in page.get_by_role("status").inner_text()
    expect(page.get_by_role("status")).to_have_text("5 of 60 features")
    search.fill("#3 10 to 12, 55..56")
    wait_for_cards(page, [3, 10, 11, 12, 55, 56])
    page.evaluate("location.hash = '#ids=40-44&sort=id&order=asc'")  # while the search has the focus
    wait_for_cards(page, [40, 41, 42, 43, 44])
    expect(search).to_have_value("40-44")
    search.fill("3, 60, cat")
    wait_for_cards(page, [3])
    expect(page.locator("#ids-note")).to_contain_text("No feature 60, cat: ids are 0 to 59")
    expect(search).to_have_attribute("aria-invalid", "true")
    expect(visit(small, "#feature=60").locator("#ids-note")).to_contain_text("No feature 60: ids are 0 to 59")
    search.fill("999")
    expect(page.locator("#none")).to_be_visible()
    page.locator("#none").get_by_role("button").click()
    wait_for_cards(page, in_order(small, list(SHOWN), "id", descending=False))


def test_the_tools_are_there_however_the_window_grew(visit: Open, small: Gallery):
    """Folded where there is one column; where they stand beside the pictures nothing could unfold them."""
    page = visit(small)
    search = page.get_by_label("Search ids")
    expect(search).to_be_visible()
    page.set_viewport_size({"width": 600, "height": 800})
    expect(search).to_be_hidden()
    page.keyboard.press("/")
    expect(search).to_be_focused()
    page.set_viewport_size({"width": 500, "height": 800})
    expect(search).to_be_visible()
    page.reload()
    expect(search).to_be_hidden()
    page.set_viewport_size({"width": 1300, "height": 800})
    expect(search).to_be_visible()
    page.set_viewport_size({"width": 600, "height": 800})
    expect(search).to_be_hidden()
    page.evaluate("location.hash = '#feature=60'")  # an old link
    expect(page.locator("#ids-note")).to_be_visible()
    expect(page.locator("#ids-note")).to_contain_text("No feature 60")


def test_a_number_that_is_chosen_otherwise_is_no_longer_marked_as_wrong(visit: Open, small: Gallery):
    page = visit(small)
    field = page.locator("#max-to")
    field.fill("abc")
    expect(field).to_have_attribute("aria-invalid", "true")
    page.locator("#show").focus()
    page.evaluate("location.hash = '#max=..15'")
    expect(field).to_have_value("15")
    expect(field).not_to_have_attribute("aria-invalid", "true")


def test_enter_in_the_search_opens_the_first_found(visit: Open, small: Gallery):
    page = visit(small)
    page.keyboard.press("/")
    page.keyboard.type("13")
    wait_for_cards(page, [13])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Feature 13")).to_be_focused()


def test_filters_live_in_the_address_and_a_shared_address_shows_the_same(visit: Open, small: Gallery):
    page = visit(small)
    page.locator("#freq-from").fill("0.1")  # percent
    page.locator("#freq-to").fill("5")
    page.locator("#mean-from").fill("1")
    page.locator("#max-to").fill("15")
    expected = expected_within(small, freq=(0.001, 0.05), mean=(1, np.inf), max=(0, 15))
    assert 0 < len(expected) < len(SHOWN)
    wait_for_cards(page, in_order(small, expected, "max", descending=True))
    page.get_by_label("Sort").select_option("freq")
    wait_for_cards(page, in_order(small, expected, "freq", descending=True))
    address = "#" + page.url.split("#")[1]
    assert "freq=0.001..0.05" in address and "mean=1.." in address and "max=..15" in address
    other = visit(small, address)
    wait_for_cards(other, cards(page))
    assert float(other.locator("#freq-from").input_value()) == 0.1
    other.get_by_role("button", name="Clear all filters").first.click()
    wait_for_cards(other, in_order(small, list(SHOWN), "freq", descending=True))


@pytest.mark.parametrize(
    "address", ["#sort=constructor&view=<b>&freq=x..y&feature=999", "#%%%&feature=-1", "#feature=1e1&ids=%3Cimg%3E"]
)
def test_an_address_that_makes_no_sense_shows_the_list(visit: Open, small: Gallery, address: str):
    page = visit(small, address)
    expect(page.locator("#overview")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("of 60 features")


@pytest.mark.parametrize("view", ["grid", "table"])
def test_who_comes_back_to_the_list_has_the_focus_on_the_feature_left(visit: Open, large: Gallery, view: str):
    page = visit(large, f"#view={view}&show=all&sort=id&order=asc")
    if view == "table":
        page.get_by_role("region", name="Table of features").evaluate("box => box.scrollTop = 34 * 90")
    feature = {"grid": 2, "table": 100}[view]
    row = page.locator(f"[data-feature='{feature}'] a")
    row.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#feature-title")).to_have_text(f"Feature {feature}")
    page.keyboard.press("Escape")
    expect(row).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#feature-title")).to_have_text(f"Feature {feature}")
    expect(page.locator("#overview")).to_be_hidden()  # an arrow that comes before is the list's
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#feature-title")).to_have_text(f"Feature {feature + 60}")
    page.keyboard.press("Escape")
    later = page.locator(f"[data-feature='{feature + 60}'] a")
    expect(later).to_be_focused()
    expect(later).to_be_in_viewport()


def test_the_policy_lets_no_other_script_run_and_no_request_out(browser: Browser, small: Gallery):
    page = browser.new_page()
    page.goto(small.url)
    page.evaluate("""async () => {
      document.body.insertAdjacentHTML("beforeend", '<img src="missing.png" onerror="window.hacked=1">');
      const script = document.createElement("script"); script.textContent = "window.hacked=2"; document.body.append(script);
      window.reached = await fetch("http://127.0.0.1:9/").then(() => true, () => false);
      await new Promise((done) => setTimeout(done, 200));
    }""")
    assert page.evaluate("[window.hacked ?? null, window.reached]") == [None, False]
    page.close()


def test_a_gallery_whose_data_are_missing_says_so(browser: Browser, small: Gallery, tmp_path):
    (tmp_path / "index.html").write_text((small.dpath / "index.html").read_text())
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    expect(page.get_by_role("alert")).to_contain_text("data.js is missing")
    page.close()


def test_four_hundred_features_are_all_there_and_load_their_pictures_when_near(visit: Open, large: Gallery):
    page = visit(large)
    assert len(cards(page)) == 400
    n_images = page.locator("#grid img").count()
    assert n_images == 400 * 2 * 4  # close-ups and heatmaps
    page.wait_for_function("() => document.querySelector('#grid img').complete")
    loaded = "() => [...document.querySelectorAll('#grid img')].filter((image) => image.complete && image.naturalWidth).length"
    assert 0 < page.evaluate(loaded) < n_images / 2
    page.locator("#grid > li").last.scroll_into_view_if_needed()
    last = "() => [...document.querySelectorAll('#grid > li:last-child img')].every((image) => image.complete && image.naturalWidth)"
    page.wait_for_function(last)


def test_more_cards_follow_as_the_reader_comes_near(visit: Open, large: Gallery):
    page = visit(large, "#show=all")
    before = len(cards(page))
    assert 0 < before < 16_000
    page.locator("#more").scroll_into_view_if_needed()
    page.wait_for_function("n => document.querySelectorAll('#grid > li').length > n", arg=before)


def test_a_table_of_16000_features_keeps_few_rows_and_reaches_the_last(visit: Open, large: Gallery):
    page = visit(large, "#view=table&show=all&sort=id&order=asc")
    table, rows = page.get_by_role("region", name="Table of features"), page.locator("#rows [data-feature]")
    assert page.locator("#table table").get_attribute("aria-rowcount") == "16001"
    assert 0 < rows.count() < 100 and page.locator("#grid > li").count() == 0
    table.evaluate("box => box.scrollTop = box.scrollHeight")
    expect(rows.last).to_have_attribute("data-feature", "15999")
    expect(rows.last).to_have_attribute("aria-rowindex", "16001")
    assert 0 < rows.count() < 100
    page.get_by_role("button", name="Largest").click()
    best = int(np.argmax(large.table.max_s))
    expect(rows.first).to_have_attribute("data-feature", str(best))
    expect(page.locator("th[data-sort=max]")).to_have_attribute("aria-sort", "descending")
    assert f"{large.table.n_active_s[best]:,}" in rows.first.inner_text()
    page.get_by_role("button", name="Largest").click()
    table.evaluate("box => box.scrollTop = box.scrollHeight")
    expect(rows.last).to_have_attribute("data-feature", "5")  # the dead one is last in either order
    assert "never" in rows.last.inner_text()
    rows.last.get_by_role("link").click()
    expect(page.get_by_role("heading", name="Feature 5")).to_be_visible()


def luminance(page: Page, selector: str, property_name: str) -> float:
    script = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name].match(/[0-9.]+/g).slice(0, 3).map(Number)"
    return float(np.dot(page.evaluate(script, [selector, property_name]), [0.2126, 0.7152, 0.0722]))


TEXTS = {
    0.0009994: "9.99e-4", 0.0009996: "0.00100", 12.345: "12.3", 999.4: "999", 999.7: "999.70", 1000.2: "1000.2", 99_999.4: "99999",
    99_999.8: "1.00e+5", 1_234_567.0: "1.23e+6",
}  # fmt: skip


def test_the_digits_of_a_score_are_those_of_the_rounded_number(visit: Open, small: Gallery, tmp_path: Path):
    n = len(TEXTS)
    table = replace(
        small.table, log10_freq_s=np.full(n, -1.0), log10_mean_s=np.zeros(n), max_s=np.array([*TEXTS], np.float32),
        percentile_s=np.ones(n, np.float32), n_active_s=np.full(n, N_TOKENS // 10),
    )  # fmt: skip
    facts = replace(small.facts, d_sae=n)
    (tmp_path / "index.html").write_text(index_html(facts), encoding="utf-8")
    (tmp_path / "data.js").write_text(data_js(facts, table, []), encoding="utf-8")
    page = visit(Gallery(tmp_path, facts, table, (), {}), "#view=table&sort=id&order=asc")
    assert page.locator("#rows [data-feature] td:nth-child(5)").all_text_contents() == [*TEXTS.values()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_readers_colour_scheme(visit: Open, small: Gallery, scheme: str):
    page = visit(small, color_scheme=scheme)
    ground, ink = luminance(page, "html", "backgroundColor"), luminance(page, "body", "color")
    assert (ground < 50 and ink > 200) if scheme == "dark" else (ground > 200 and ink < 50)
    before = dots(page)
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    assert len(before)
    page.wait_for_function(f"n => ({ACCENTED})().length > n / 2", arg=len(before))  # drawn anew in the other accent


@pytest.mark.parametrize("address", ["", "#view=table&show=all", "#feature=10", "#feature=33", "#feature=21"])
def test_nothing_is_wider_than_a_phone(visit: Open, small: Gallery, address: str):
    page = visit(small, address, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    if not address:
        expect(page.locator("#filters")).to_be_hidden()  # pictures first
        assert page.locator("#grid > li").first.bounding_box()["y"] < 740
        page.get_by_text("Choose features").tap()
        expect(page.locator("#filters")).to_be_visible()


NAMELESS = """() => [...document.querySelectorAll("a, button, input, select, [role=slider], [role=img], [role=region]")]
  .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"""


@pytest.mark.parametrize("address", ["", "#view=table", "#feature=10"])
def test_everything_that_can_be_operated_has_a_name(visit: Open, small: Gallery, address: str):
    page = visit(small, address)
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("() => [...document.images].every((image) => image.hasAttribute('alt'))")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    assert page.url.endswith(address)
