"""The gallery in a real Chromium, opened from the disk."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

from saev_dist import replay
from saev_dist.render.gallery import card, coarse, data_js, feature_js, index_html
from tests.pages import (
    FLAGS,
    HOSTILE,
    HOSTILE_LABEL,
    N_COLS,
    N_PATCHES,
    N_TOKENS,
    PATCH,
    SHOWN,
    Gallery,
    chromium,
    write_gallery,
)
from tests.replays import make_pictures, make_replay, make_run

WAIT_MS = 60_000  # only a test that fails waits so long; on a loaded machine a browser may need seconds
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield chrome
        chrome.close()


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens a gallery; in the end nothing may be on the console, and nothing requested from outside of its folder."""
    contexts, said, requested = [], [], []

    def open_page(gallery: Gallery, address: str = "", **options: Any) -> Page:
        contexts.append(browser.new_context(**({"viewport": {"width": 1300, "height": 850}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requested.append((request.url, gallery.dpath.as_uri() + "/")))
        page.goto(gallery.url + address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert requested and all(url.startswith(folder) or url == "data:," for url, folder in requested), requested


def cards(page: Page) -> list[int]:
    return [int(s) for s in page.locator("#grid > li").evaluate_all("items => items.map((item) => item.dataset.feature)")]


def wait_for_cards(page: Page, expected: list[int]) -> None:
    page.wait_for_function("n => document.querySelectorAll('#grid > li').length === n", arg=len(expected))
    assert cards(page) == expected


def in_order(gallery: Gallery, features: list[int], key: str, descending: bool) -> list[int]:
    """Plain sort: dead ones last, ties by id."""
    table = gallery.table
    value = {"id": np.arange(60), "freq": table.n_active_s, "mean": table.log10_mean_s, "max": table.max_s}[key]
    alive = sorted(
        (s for s in features if key == "id" or gallery.fires(s)), key=lambda s: (-value[s] if descending else value[s], s)
    )
    return alive + [s for s in features if s not in alive]


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
    frames = page.locator("#grid .close-ups span")
    expect(frames).to_have_count(4)
    for i, image in enumerate(small.views[10].images[:4]):
        picture = frames.nth(i).locator("img")
        assert picture.get_attribute("src") == f"features/10/{image.picture}"
        frame, whole = frames.nth(i).bounding_box(), picture.bounding_box()
        row, column = divmod(image.patch_i, N_COLS)
        for start, size, patch_i, n_px in (("x", "width", column, image.width), ("y", "height", row, image.height)):
            patch = PATCH * whole[size] / n_px
            at = whole[start] + patch_i * patch - frame[start]  # where the patch starts in the frame
            assert frame[size] == pytest.approx(2 * patch, abs=0.1)
            assert at == pytest.approx(patch / 2, abs=0.1)


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


@pytest.mark.parametrize(
    ("lacking", "labels", "said"),
    [
        ({}, ["class 0"], "class 0"),
        ({"label": "", "path": ""}, [], ""),  # no pictures
        ({"label": ""}, [], ""),  # a flat folder
        ({"label": ""}, ["class 1"], "no label"),  # the others have one
    ],
)
def test_labels_are_spoken_of_where_there_are_some(
    visit: Open, small: Gallery, tmp_path: Path, lacking: dict[str, str], labels: list[str], said: str
):
    view = small.views[small.shown[0]]
    first, *others = [replace(image, **lacking) for image in view.images]
    images = [first, *(replace(image, label=labels[0]) if labels else image for image in others)]
    shutil.copytree(small.dpath, tmp_path / "visuals")
    (tmp_path / "visuals" / "features" / str(view.feature) / "data.js").write_text(feature_js(replace(view, images=images)))
    page = visit(replace(small, dpath=tmp_path / "visuals"), f"#feature={view.feature}")
    shown = page.locator("#images > li").first
    expect(shown.locator(".label")).to_have_text(said)
    text = shown.text_content()
    assert f"image {first.img_i}" in text and (" · " in text) == bool(first.path)
    spoken = shown.locator(".stage").get_attribute("aria-label")
    assert (f", {said}, number 1" if said else f"image {first.img_i}, number 1") in spoken, spoken


def test_enter_in_the_search_opens_the_first_found(visit: Open, small: Gallery):
    page = visit(small)
    page.keyboard.press("/")
    page.keyboard.type("13")
    wait_for_cards(page, [13])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Feature 13")).to_be_focused()


def expected_within(gallery: Gallery, **ranges: tuple[float, float]) -> list[int]:
    table = gallery.table
    values = {
        "freq": table.n_active_s / N_TOKENS,
        "mean": 10 ** table.log10_mean_s.astype(np.float32).astype(float),
        "max": table.max_s,
    }
    chosen = []
    for s in SHOWN:
        if gallery.fires(s) and all(low <= values[key][s] <= high for key, (low, high) in ranges.items()):
            chosen.append(s)
    return chosen


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


ACCENTED = """() => {
  const canvas = document.getElementById("scatter"), ratio = canvas.width / canvas.clientWidth;
  const style = document.createElement("i"); document.body.append(style); style.style.color = "var(--accent)";
  const [r, g, b] = getComputedStyle(style).color.match(/[0-9]+/g).map(Number); style.remove();
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data, width } = copy.getImageData(0, 0, canvas.width, canvas.height), found = [];
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 100 && Math.hypot(data[i] - r, data[i + 1] - g, data[i + 2] - b) < 12) {
    found.push([((i / 4) % width) / ratio, Math.floor(i / 4 / width) / ratio]);
  }
  return found;
}"""


def dots(page: Page) -> np.ndarray:
    """Places of the chosen features' pixels on the canvas."""
    return np.array(page.evaluate(ACCENTED)).reshape(-1, 2)


def test_a_click_on_a_dot_opens_its_feature(visit: Open, small: Gallery):
    page = visit(small, "#ids=10")  # its dot alone has the accent
    x, y = dots(page).mean(axis=0)
    canvas = page.locator("#scatter")
    canvas.hover(position={"x": x, "y": y})
    expect(page.locator("#tip")).to_contain_text("10: fires on")
    canvas.click(position={"x": x, "y": y})
    expect(page.get_by_role("heading", name="Feature 10")).to_be_visible()


def test_a_tap_on_a_dot_opens_its_feature_and_touches_nothing_of_what_it_shows(visit: Open, small: Gallery):
    page = visit(small, "#show=all&sort=id&order=asc&ids=10", viewport={"width": 360, "height": 740}, has_touch=True)
    page.get_by_text("Choose features").tap()
    x, y = dots(page).mean(axis=0)
    page.evaluate("() => addEventListener('click', (event) => (window.clicked = event.target.id), true)")
    page.locator("#scatter").tap(position={"x": x, "y": y})
    expect(page.locator("#feature-title")).to_have_text("Feature 10")
    assert page.evaluate("() => window.clicked") == "scatter"


def test_dots_stand_where_their_numbers_say(visit: Open, small: Gallery):
    ids = [s for s in range(0, 60, 7) if small.fires(s)]
    page = visit(small)
    places = []
    for s in ids:
        page.locator("#ids").fill(str(s))
        wait_for_cards(page, [s])
        places.append(dots(page).mean(axis=0))
    x, y = np.array(places).T
    assert np.corrcoef(x, small.table.log10_freq_s[ids])[0, 1] > 0.9999
    assert np.corrcoef(y, small.table.log10_mean_s[ids])[0, 1] < -0.9999


def test_a_brush_chooses_the_dots_inside_of_it(visit: Open, small: Gallery):
    page = visit(small)
    box = page.locator("#scatter").bounding_box()
    corners = [(0.3, 0.1), (0.8, 0.6)]
    (x0, y0), (x1, y1) = [(box["x"] + box["width"] * a, box["y"] + box["height"] * b) for a, b in corners]
    page.mouse.move(x1, y1)
    page.mouse.down()
    page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
    page.mouse.move(x0, y0)
    page.mouse.up()
    page.wait_for_function("() => location.hash.includes('mean=')")
    ranges = {key: tuple(map(float, re.search(rf"{key}=([^&]*)", page.url)[1].split(".."))) for key in ("freq", "mean")}
    expected = expected_within(small, **ranges)
    assert 0 < len(expected) < len(SHOWN)
    wait_for_cards(page, in_order(small, expected, "max", descending=True))
    inside = dots(page)
    assert len(inside)
    assert (inside > [x0 - box["x"] - 4, y0 - box["y"] - 4]).all() and (inside < [x1 - box["x"] + 4, y1 - box["y"] + 4]).all()
    expect(page.locator("#brush")).to_be_visible()


def test_a_brush_that_leaves_the_map_ends_at_its_edge(visit: Open, small: Gallery):
    found = []
    for beyond in (0, 700):
        page = visit(small)
        box = page.locator("#scatter").bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] + beyond, max(0, box["y"] - beyond), steps=3)
        page.mouse.up()
        page.wait_for_function("() => location.hash.includes('mean=')")
        found.append(page.url.split("#")[1])
    assert found[0] == found[1]


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


def test_a_feature_opens_by_keyboard_and_arrows_escape_and_back_move_on(visit: Open, small: Gallery):
    page = visit(small, "#sort=id&order=asc")
    page.get_by_role("link", name="Feature 4", exact=True).focus()
    page.keyboard.press("Enter")
    heading = page.locator("#feature-title")
    expect(heading).to_have_text("Feature 4")
    expect(heading).to_be_focused()
    expect(page.locator("#place")).to_have_text(f"3 of {len(SHOWN)}")  # 1, 2, 4: multiples of 3 have no pictures
    page.keyboard.press("ArrowRight")
    expect(heading).to_have_text("Feature 5")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(heading).to_have_text("Feature 2")
    page.keyboard.press("Escape")
    expect(page.locator("#overview")).to_be_visible()
    expect(page.get_by_role("link", name="Feature 2", exact=True)).to_be_focused()
    assert "sort=id" in page.url
    page.go_back()
    expect(heading).to_have_text("Feature 2")


def test_no_key_press_is_lost_when_they_come_fast(visit: Open, small: Gallery):
    page = visit(small, "#sort=id&order=asc&feature=4")
    press = "for (let i = 0; i < 5; i++) document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }))"
    page.evaluate(press)
    expect(page.locator("#feature-title")).to_have_text(f"Feature {SHOWN[SHOWN.index(4) + 5]}")


# Text within a card or a picture's row is read by `text_content()`: under `content-visibility: auto`, `inner_text()` is empty
# until the browser has drawn it.


def test_a_feature_shows_its_numbers_histogram_and_pictures(visit: Open, small: Gallery):
    page = visit(small, "#feature=10")
    view = small.views[10]
    stages = page.get_by_role("slider", name=re.compile("Patches of image"))
    expect(stages).to_have_count(len(view.images))
    assert f"{small.table.n_active_s[10]:,} of {N_TOKENS:,} patches" in page.locator("#f-active").inner_text()
    for i, image in enumerate(view.images):
        item = page.locator("#images > li").nth(i)
        assert float(item.locator(".score").text_content()) == float(f"{image.score:.3g}")
        assert item.locator(".label").text_content() == image.label
        assert item.locator(".path").text_content() == f"image {image.img_i:,} · {image.path}"
    loaded = "images => images.every((image) => image.complete && image.naturalWidth > 0)"
    page.wait_for_function(f"() => ({loaded})([...document.querySelectorAll('#images img')])")
    counts = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in page.locator("#histogram title").evaluate_all("all => all.map((title) => title.textContent)")]  # fmt: skip
    np.testing.assert_array_equal(counts, coarse(view.edges_h, view.counts_h)[1])
    for name, expected in (
        ("x", np.log(coarse(view.edges_h, view.counts_h)[0][:-1])),
        ("width", np.diff(np.log(coarse(view.edges_h, view.counts_h)[0]))),
    ):
        drawn = np.array(
            page.locator("#histogram rect").evaluate_all(f"all => all.map((rect) => Number(rect.getAttribute('{name}')))")
        )
        slope, start = np.polyfit(expected, drawn, 1)
        assert slope > 0 and np.abs(slope * expected + start - drawn).max() < 0.01, name
    heights = page.locator("#histogram rect").evaluate_all("all => all.map((rect) => Number(rect.getAttribute('height')))")
    areas = np.array(heights) * np.diff(np.log(coarse(view.edges_h, view.counts_h)[0]))  # as the eye sees them
    assert np.corrcoef(areas, counts)[0, 1] > 0.999


@pytest.mark.parametrize(
    ("n", "shown"), [(150_000, "0 50K 100K 150K"), (1_300_000, "0 500K 1M"), (1.5e15, "0 500T 1e+15 1.5e+15")]
)
def test_numbers_beside_the_histogram_are_those_of_its_lines(visit: Open, small: Gallery, tmp_path: Path, n, shown):
    shutil.copytree(small.dpath, tmp_path / "visuals")
    counts_h = np.zeros_like(small.views[10].counts_h)
    at = int(np.searchsorted(small.views[10].edges_h, 1.0))
    counts_h[at] = n * (np.log2(small.views[10].edges_h[at + 1]) - np.log2(small.views[10].edges_h[at])) * 1.001
    view = replace(small.views[10], counts_h=counts_h)
    (tmp_path / "visuals/features/10/data.js").write_text(feature_js(view), encoding="utf-8")
    page = visit(replace(small, dpath=tmp_path / "visuals"), "#feature=10")
    expect(page.locator("#histogram")).to_be_visible()
    texts = page.locator("#histogram text[text-anchor=end]").all_text_contents()
    assert " ".join(texts) == shown


def check_value(text: str, values_p: np.ndarray, patch_i: int) -> None:
    name, value = text.split(": ")
    assert name == f"patch {patch_i}"
    assert float(value) == pytest.approx(float(values_p[patch_i]), rel=6e-3, abs=2e-5 * float(values_p.max()))


def test_hovering_reads_the_patch_under_the_pointer(visit: Open, small: Gallery):
    page = visit(small, "#feature=10")
    values_p = small.views[10].images[1].values_p
    item = page.locator("#images > li").nth(1)
    stage = item.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    scale = box["width"] / (N_COLS * PATCH + 8)
    for patch_i in range(N_PATCHES):  # six columns, four rows: a transposed grid would read others
        row, column = divmod(patch_i, N_COLS)
        stage.hover(position={"x": (column + 0.5) * PATCH * scale, "y": (row + 0.5) * PATCH * scale})
        check_value(item.locator(".value").text_content(), values_p, patch_i)
        mark = item.locator(".cursor").bounding_box()
        assert mark["x"] - box["x"] == pytest.approx(column * PATCH * scale, abs=1.5)
        assert mark["y"] - box["y"] == pytest.approx(row * PATCH * scale, abs=1.5)
    stage.hover(position={"x": (N_COLS * PATCH + 6) * scale, "y": 5})  # right of the last patch
    expect(item.locator(".cursor")).to_be_hidden()
    check_value(item.locator(".value").text_content(), values_p, small.views[10].images[1].patch_i)


def test_arrow_keys_read_patches_of_a_focused_picture_and_leave_the_feature_alone(visit: Open, small: Gallery):
    page = visit(small, "#feature=10")
    values_p = small.views[10].images[0].values_p
    stage = page.get_by_role("slider", name=re.compile("Patches of image")).first
    stage.focus()
    page.keyboard.press("Home")
    for key, patch_i in (
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("ArrowDown", N_COLS + 1),
        ("ArrowUp", 1),
        ("ArrowUp", 1),
        ("End", N_PATCHES - 1),
    ):
        page.keyboard.press(key)
        check_value(page.locator("#images > li").first.locator(".value").text_content(), values_p, patch_i)
        assert stage.get_attribute("aria-valuenow") == str(patch_i)
    assert f"row {N_PATCHES // N_COLS}, column {N_COLS}" in stage.get_attribute("aria-valuetext")
    expect(page.locator("#feature-title")).to_have_text("Feature 10")


def test_a_tap_reads_a_patch(visit: Open, small: Gallery):
    page = visit(small, "#feature=10", viewport={"width": 390, "height": 844}, has_touch=True)
    stage = page.locator(".stage").first
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    scale = box["width"] / (N_COLS * PATCH + 8)
    stage.tap(position={"x": 2.5 * PATCH * scale, "y": 1.5 * PATCH * scale})
    check_value(page.locator(".value").first.text_content(), small.views[10].images[0].values_p, N_COLS + 2)


def test_the_slider_fades_the_heatmap_and_the_box_hides_it(visit: Open, small: Gallery):
    page = visit(small, "#feature=10")
    heatmap = page.locator("#images .heatmap").first
    expect(heatmap).to_have_css("opacity", "1")
    page.get_by_label("Opacity").fill("40")
    expect(heatmap).to_have_css("opacity", "0.4")
    page.get_by_label("Heatmap").uncheck()
    expect(heatmap).to_have_css("visibility", "hidden")
    expect(page.locator("#images .picture").first).to_be_visible()
    page.locator("#feature-title").focus()
    page.keyboard.press("h")
    expect(heatmap).to_have_css("visibility", "visible")
    page.keyboard.press("ArrowRight")  # and the next feature keeps the setting
    expect(page.locator("#images .heatmap").first).to_have_css("opacity", "0.4")


def test_a_dead_feature_is_shown_as_such_without_pictures(visit: Open, small: Gallery):
    page = visit(small, "#show=dead")
    wait_for_cards(page, [7, 21])
    assert page.locator("#grid img").count() == 0
    assert all("never fires" in text for text in page.locator(".card").all_text_contents())
    page.get_by_role("link", name="Feature 21").click()  # it was rendered, with nothing to render
    expect(page.locator("#f-note")).to_contain_text("never fired")
    assert page.locator("#images img").count() == 0
    expect(page.locator("#histogram")).to_be_hidden()
    page.keyboard.press("h")  # there is nothing that it could hide
    assert page.locator("#heat").is_checked()


def test_a_feature_without_pictures_has_its_numbers_and_the_command_that_renders_it(visit: Open, small: Gallery):
    page = visit(small, "#show=all&feature=33")
    assert f"{small.table.n_active_s[33]:,} of" in page.locator("#f-active").inner_text()
    expect(page.locator("#f-note code")).to_have_text(
        f"saev-dist replay --run '{small.dpath.parent}' --images '/data/my images' --no-pictures --features 5 0 33"
    )
    expect(page.locator("#next")).to_be_enabled()


def test_a_gallery_in_a_folder_whose_name_is_no_text_still_shows_its_notes(visit: Open, tmp_path):
    dpath = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    gallery = write_gallery(dpath / "visuals", d_sae=4, shown=(0,))
    page = visit(SimpleNamespace(dpath=tmp_path, url=f"{tmp_path.as_uri()}/%FF/visuals/index.html"), "#feature=3")
    assert gallery.fires(3)
    expect(page.locator("#f-note code")).to_contain_text(
        re.compile("^saev-dist replay --run RUN --images .* --features 5 0 3$")
    )


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the gallery that `replay` made of it; the name of one picture is an attack."""
    tmp_path = tmp_path_factory.mktemp("replayed")
    images = make_pictures(tmp_path / "images")
    (images / "class0/000.png").rename(images / "class0" / HOSTILE)
    run = make_run(tmp_path)
    replay.run(make_replay(run, images=images, patch_size=5, n_images=12, image_format="webp", features=(2,)))
    return run


def test_the_gallery_of_a_replay_shows_the_slots_of_its_run(visit: Open, replayed: Path):
    page = visit(
        SimpleNamespace(dpath=replayed / "visuals", url=(replayed / "visuals/index.html").as_uri()), "#sort=id&order=asc"
    )
    stored = {name: torch.load(replayed / f"top_{name}.pt", weights_only=True) for name in ("values", "img_i", "patch_i")}
    fired = (stored["values"][:, 0] > 0).nonzero().squeeze(1).tolist()
    assert cards(page) == sorted({*fired, 2}) and 2 not in fired  # feature 2 was asked for, and never fires
    page.wait_for_function("() => [...document.querySelectorAll('#grid img')].slice(0, 8).every((image) => image.naturalWidth)")
    for s in fired[:3]:
        page.goto(f"{(replayed / 'visuals/index.html').as_uri()}#feature={s}")
        expect(page.locator("#feature-title")).to_have_text(f"Feature {s}")
        best = {}  # of each image the first slot, strongest first
        for score, img_i, patch_i in zip(*(stored[name][s].tolist() for name in ("values", "img_i", "patch_i")), strict=True):
            if img_i >= 0:
                best.setdefault(img_i, (score, patch_i))
        expect(page.locator("#images > li")).to_have_count(len(best))
        for i, (img_i, (score, patch_i)) in enumerate(best.items()):
            item = page.locator("#images > li").nth(i)
            assert item.locator(".path").text_content().startswith(f"image {img_i} · class{img_i * 3 // 23}/")
            assert float(item.locator(".score").text_content()) == pytest.approx(score, rel=5e-3)
            check_value(item.locator(".value").text_content(), np.full(6, score), patch_i)
        page.wait_for_function(
            "() => [...document.querySelectorAll('#images img')].every((image) => image.naturalWidth === 15)"
        )
    assert page.evaluate("window.hacked") is None


def test_hostile_labels_and_paths_are_only_text(visit: Open, tmp_path):
    hostile = write_gallery(tmp_path / "visuals", d_sae=6, shown=(0, 1), label=HOSTILE_LABEL)
    page = visit(hostile, "#feature=1")
    expect(page.locator("#images .label").first).to_have_text(HOSTILE_LABEL)
    assert HOSTILE in page.locator("#images .path").first.text_content()
    page.keyboard.press("Escape")
    assert page.locator(".tiles img").first.get_attribute("alt") == HOSTILE_LABEL
    page.get_by_text("About this run").click()
    expect(page.locator(".run")).to_contain_text(HOSTILE)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return write_gallery(
        tmp_path_factory.mktemp("large") / "visuals", d_sae=16_000, shown=tuple(range(0, 16_000, 40)), dead=(5,)
    )


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
