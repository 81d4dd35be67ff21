"""The gallery's files: what scripts and page hold, of whatever a run was called."""

import base64
import json
import re
import shlex
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saev_dist.choose import FeatureTable
from saev_dist.render.gallery import MAX_BARS, FeatureView, TopImage, card, coarse, data_js, feature_js, index_html
from tests.pages import EDGES_H, HOSTILE, HOSTILE_LABEL, SHOWN, Gallery


def payload(script: str) -> Any:
    """The JSON value that a script hands over."""
    return json.loads(re.fullmatch(r"(?:galleryFeature\(|window\.gallery = )(.*?)\)?;\n", script, re.S)[1])


@given(st.lists(st.integers(0, 3), min_size=len(EDGES_H) - 1, max_size=len(EDGES_H) - 1), st.integers(1, 60))
def test_coarse_bins_hold_what_lay_between_their_edges(counts, max_bars):
    counts_h = np.array(counts, np.int64)
    edges, joined = coarse(EDGES_H, counts_h, max_bars)
    assert len(joined) <= max_bars and joined.sum() == counts_h.sum()
    assert len(edges) == (len(joined) + 1 if len(joined) else 0)
    for left, right, n in zip(edges, edges[1:], joined, strict=False):
        assert n == sum(counts[i] for i in range(len(counts)) if left <= EDGES_H[i] < right)


def test_an_empty_histogram_has_no_bars_and_a_full_one_no_infinity():
    assert len(coarse(EDGES_H, np.zeros(514, np.int64))[1]) == 0
    view = FeatureView(feature=0, upper=1, edges_h=EDGES_H, counts_h=np.ones(514, np.int64), images=[])
    histogram = payload(feature_js(view))["histogram"]
    assert histogram["edges"][-1] is None and histogram["edges"][0] == 0 and len(histogram["counts"]) <= MAX_BARS


def top_image(values_p: np.ndarray, **changes: Any) -> TopImage:
    given = {
        "img_i": 3,
        "score": 1.0,
        "patch_i": 0,
        "label": "",
        "path": "",
        "picture": "a",
        "heatmap": "b",
        "width": 8,
        "height": 8,
    }
    return TopImage(**(given | {"n_cols": len(values_p), "n_rows": 1, "patch": 16.0, "values_p": values_p} | changes))


def view_of(*images: TopImage) -> FeatureView:
    return FeatureView(feature=5, upper=1.0, edges_h=EDGES_H, counts_h=np.zeros(514, np.int64), images=images)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_patch_values_survive_within_the_stated_error_and_zero_exactly(values):
    image = payload(feature_js(view_of(top_image(np.array(values, np.float32)))))["images"][0]
    read = np.frombuffer(base64.b64decode(image["values"]), "<i2") * (image["scale"] / 32767)
    assert np.abs(read - values).max() <= 2e-5 * np.abs(values).max()
    assert (read[np.array(values) == 0] == 0).all()


@given(st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from([HOSTILE, HOSTILE_LABEL, "\udcff.png"]))
def test_no_text_can_end_a_script_and_every_text_comes_back(text):
    view = view_of(top_image(np.ones(2, np.float32), label=text, path=text))
    one = np.ones(1)
    table = FeatureTable(log10_freq_s=one, log10_mean_s=one, max_s=one, percentile_s=one, n_active_s=one)
    facts = SimpleNamespace(d_sae=1, n_tokens=1, features=(), flags=("--images", text))
    scripts = feature_js(view), data_js(facts, table, [card(5, view.images)])
    assert all(script.isascii() and not set("<>&") & set(script) for script in scripts)
    image = payload(scripts[0])["images"][0]
    # Two lone surrogates in a row make one character in JSON, as they do in JavaScript.
    assert image["label"] == image["path"] == payload(scripts[1])["cards"][0][2][0] == json.loads(json.dumps(text))
    assert payload(scripts[1])["flags"] == json.loads(json.dumps(shlex.join(facts.flags)))


def test_columns_hold_every_feature(small: Gallery):
    content = payload(data_js(small.facts, small.table, [card(s, view.images) for s, view in small.views.items()]))
    columns = {
        key: np.frombuffer(base64.b64decode(text), "<f8" if key == "n_active" else "<f4")
        for key, text in content["columns"].items()
    }
    np.testing.assert_array_equal(columns["n_active"], small.table.n_active_s)
    np.testing.assert_array_equal(columns["log10_freq"], small.table.log10_freq_s.astype(np.float32))
    np.testing.assert_array_equal(columns["log10_mean"], small.table.log10_mean_s.astype(np.float32))
    np.testing.assert_array_equal(columns["max"], small.table.max_s)
    np.testing.assert_array_equal(columns["percentile"], small.table.percentile_s)
    assert [feature for feature, *_ in content["cards"]] == list(SHOWN)


def test_the_page_names_the_run_escaped_and_leaves_out_what_is_not_known(small: Gallery):
    html = index_html(small.facts)
    assert HOSTILE not in html and "&lt;img src=x onerror=" in html
    assert small.facts.fit in html
    assert "normalized MSE" not in html and "31.9" in html and "3.3%" in html
    assert "0.1234" in index_html(type(small.facts)(**(vars(small.facts) | {"normalized_mse": 0.12341})))


def test_a_path_that_is_no_text_does_not_break_the_page(small: Gallery):
    html = index_html(type(small.facts)(**(vars(small.facts) | {"shards": "/data/\udcff"})))
    assert "/data/\\udcff" in html.encode("utf-8").decode()
