"""The browser that opens galleries, and what tests read off their list."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from saev_dist.render.gallery import TopImage
from tests.pages import FLAGS, N_COLS, N_TOKENS, PATCH, SHOWN, Gallery, chromium

WAIT_MS = 60_000  # only a test that fails waits so long; on a loaded machine a browser may need seconds
expect.set_options(timeout=WAIT_MS)

VIEWPORT = {"width": 1300, "height": 850}
Open = Callable[..., Page]


@contextmanager
def started() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield chrome
        chrome.close()


@cache
def usual_context(browser: Browser) -> BrowserContext:
    context = browser.new_context(viewport=VIEWPORT)
    context.new_page()  # whose process takes in those that follow, while it is open
    return context


@contextmanager
def visiting(browser: Browser) -> Iterator[Open]:
    """Opens a gallery; in the end nothing may be on the console, and nothing requested from outside of its folder.

    Pages in the usual window share a context, which takes a second to make: a gallery stores nothing there.
    """
    opened: list[Page | BrowserContext] = []
    said, requested = [], []

    def open_page(gallery: Gallery, address: str = "", **options: Any) -> Page:
        if options:
            context = browser.new_context(**({"viewport": VIEWPORT} | options))
            opened.append(context)
        else:
            context = usual_context(browser)
        page = context.new_page()
        opened.append(page)
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requested.append((request.url, gallery.dpath.as_uri() + "/")))
        page.goto(gallery.url + address)
        return page

    yield open_page
    for one in reversed(opened):
        one.close()
    assert not said
    assert requested and all(url.startswith(folder) or url == "data:," for url, folder in requested), requested


def cards(page: Page) -> list[int]:
    return [int(s) for s in page.locator("#grid > li").evaluate_all("items => items.map((item) => item.dataset.feature)")]


def wait_for_cards(page: Page, expected: list[int]) -> None:
    page.wait_for_function("n => document.querySelectorAll('#grid > li').length === n", arg=len(expected))
    assert cards(page) == expected


def check_close_up(frame: Locator, feature: int, image: TopImage) -> None:
    """It shows the winning patch in the middle of as much again of the picture."""
    picture = frame.locator("img")
    assert picture.get_attribute("src") == f"features/{feature}/{image.picture}"
    box, whole = frame.bounding_box(), picture.bounding_box()
    row, column = divmod(image.patch_i, N_COLS)
    for start, size, patch_i, n_px in (("x", "width", column, image.width), ("y", "height", row, image.height)):
        patch = PATCH * whole[size] / n_px
        at = whole[start] + patch_i * patch - box[start]  # where the patch starts in the frame
        assert box[size] == pytest.approx(2 * patch, abs=0.1)
        assert at == pytest.approx(patch / 2, abs=0.1)


def in_order(gallery: Gallery, features: list[int], key: str, descending: bool) -> list[int]:
    """Plain sort: dead ones last, ties by id."""
    table = gallery.table
    value = {"id": np.arange(60), "freq": table.n_active_s, "mean": table.log10_mean_s, "max": table.max_s}[key]
    alive = sorted(
        (s for s in features if key == "id" or gallery.fires(s)), key=lambda s: (-value[s] if descending else value[s], s)
    )
    return alive + [s for s in features if s not in alive]


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
