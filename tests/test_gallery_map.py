"""The gallery's map of features in a real Chromium, opened from the disk."""

import re

import numpy as np
from playwright.sync_api import expect

from tests.browsing import Open, dots, expected_within, in_order, wait_for_cards
from tests.pages import SHOWN, Gallery


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
