"""The gallery's view of one feature in a real Chromium, opened from the disk."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from playwright.sync_api import expect

from saev_dist import replay
from saev_dist.render.gallery import card, coarse, data_js
from tests.browsing import Open, cards, check_close_up, wait_for_cards
from tests.pages import HOSTILE, HOSTILE_LABEL, N_COLS, N_PATCHES, N_TOKENS, PATCH, SHOWN, Gallery, write_gallery
from tests.replays import make_pictures, make_replay, make_run


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
    counts, box = [], page.locator("#histogram svg").bounding_box()
    for bar in page.locator("#histogram rect").all():  # pointed at from above it
        x, width = (float(bar.get_attribute(name)) for name in ("x", "width"))
        page.mouse.move(box["x"] + (x + width / 2) * box["width"] / 560, box["y"] + 5)
        expect(bar).to_have_class("bar-rect told")
        counts.append(int(page.locator("#bar").inner_text().split(": ")[1].split()[0].replace(",", "")))
    expect(page.locator("#bar-hint")).to_be_hidden()
    page.mouse.move(0, 0)
    expect(page.locator("#bar-hint")).to_be_visible()
    expect(page.locator("#bar")).to_be_hidden()
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


def test_beside_each_image_is_a_close_up_of_its_patch_where_there_are_pictures(visit: Open, small: Gallery, tmp_path: Path):
    page = visit(small, "#feature=10")
    frames = page.locator("#images .close-up")
    expect(frames).to_have_count(len(small.views[10].images))
    for i, image in enumerate(small.views[10].images):
        frames.nth(i).scroll_into_view_if_needed()
        check_close_up(frames.nth(i), 10, image)
    shutil.copytree(small.dpath, tmp_path / "visuals")
    plain = [card(s, view.images, close_ups=False) for s, view in small.views.items()]
    (tmp_path / "visuals/data.js").write_text(data_js(small.facts, small.table, plain), encoding="utf-8")
    page = visit(replace(small, dpath=tmp_path / "visuals"), "#feature=10")
    expect(page.locator("#images .picture").first).to_be_visible()
    assert page.locator(".close-up").count() == 0


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
