"""The tables beside the gallery: the same rows in Parquet and CSV, in any number of batches, byte for byte."""

import csv
import math
from io import BytesIO, StringIO

import numpy as np
import pyarrow.parquet as pq
import pytest

from saev_dist.choose import FeatureTable
from saev_dist.render import tables
from saev_dist.render.tables import write_features_csv, write_features_parquet, write_images_parquet

D_SAE, TOP_K = 11, 4


@pytest.fixture(params=[65_536, 4])
def batch_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tables, "BATCH_ROWS", request.param)
    return int(request.param)


def features() -> tuple[FeatureTable, np.ndarray]:
    """Feature 3 never fires; slots repeat images, as they do when patches are ranked."""
    rng = np.random.default_rng(0)
    table = FeatureTable(
        log10_freq_s=rng.normal(-3, 1, D_SAE),
        log10_mean_s=rng.normal(0, 1, D_SAE),
        max_s=rng.uniform(1, 9, D_SAE).astype(np.float32),
        percentile_s=rng.uniform(0, 1, D_SAE).astype(np.float32),
        n_active_s=rng.integers(1, 2**40, D_SAE),
    )
    table.log10_freq_s[3], table.log10_mean_s[3], table.max_s[3], table.percentile_s[3], table.n_active_s[3] = (
        -np.inf,
        np.nan,
        -np.inf,
        0,
        0,
    )
    top_img_i_sk = rng.integers(0, 3, (D_SAE, TOP_K))
    top_img_i_sk[3], top_img_i_sk[5, 2:], top_img_i_sk[6, 0] = -1, -1, 2**33
    return table, top_img_i_sk


def written(write: object, *args: object) -> bytes:
    file = BytesIO()
    write(file, *args)  # type: ignore[operator]
    assert not file.closed
    return file.getvalue()


def expected_rows() -> list[dict[str, object]]:
    table, top_img_i_sk = features()
    rows = []
    for s in range(D_SAE):
        images: list[int] = []
        for img_i in top_img_i_sk[s].tolist():
            if img_i >= 0 and img_i not in images:
                images.append(img_i)
        row = {
            "feature": s, "log10_freq": float(table.log10_freq_s[s]), "log10_mean": float(table.log10_mean_s[s]), "max": float(table.max_s[s]),
            "percentile": float(table.percentile_s[s]), "n_active": int(table.n_active_s[s]), "top_images": images or None,
        }  # fmt: skip
        rows.append(
            {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        )
    return rows


def test_parquet_holds_a_row_per_feature_and_null_for_what_a_dead_one_lacks(batch_rows: int):
    read = pq.read_table(BytesIO(written(write_features_parquet, *features())))
    assert read.to_pylist() == expected_rows()
    assert [row["feature"] for row in read.to_pylist() if row["max"] is None] == [3]


def test_csv_holds_the_same_rows_as_plain_numbers(batch_rows: int):
    text = written(write_features_csv, *features()).decode()
    rows = list(csv.DictReader(StringIO(text)))
    assert '"' not in text and text.startswith("feature,log10_freq,log10_mean,max,percentile,n_active,top_images\n")
    expected = expected_rows()
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert [int(s) for s in row.pop("top_images").split()] == (want.pop("top_images") or [])
        for key, text_value in row.items():
            assert (text_value == "") == (want[key] is None)
            if text_value:
                kind = np.float32 if key in ("max", "percentile") else type(want[key])
                assert kind(text_value) == want[key], key  # numbers are written in full


HOSTILE = ["=HYPERLINK(1)", 'a,b\n"c"', "ü/\u2028.png", "\udcff.png", "", "c/z.png", "-1", "@x", "+1"]


def test_images_are_numbered_as_they_come_and_texts_are_kept(batch_rows: int):
    read = pq.read_table(BytesIO(written(write_images_parquet, ((path, path[:3]) for path in HOSTILE))))
    shown = [path.replace("\udcff", "\\udcff") for path in HOSTILE]
    assert read.column("img_i").to_pylist() == list(range(len(HOSTILE)))
    assert read.column("path").to_pylist() == shown
    assert read.column("label").to_pylist() == [path[:3].replace("\udcff", "\\udcff") for path in HOSTILE]


def test_no_images_make_an_empty_table():
    assert pq.read_table(BytesIO(written(write_images_parquet, []))).to_pylist() == []


def test_images_are_read_no_further_ahead_than_a_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 10)
    taken = 0

    def images():
        nonlocal taken
        for taken in range(1, 101):  # noqa: B007
            yield "path", "label"

    batches = tables._image_batches(images())
    assert [(len(next(batches)), taken) for _ in range(3)] == [(10, 10), (10, 20), (10, 30)]


def test_the_same_rows_give_the_same_bytes():
    for write in (write_features_parquet, write_features_csv):
        assert written(write, *features()) == written(write, *features())
    assert written(write_images_parquet, [("a", "b")]) == written(write_images_parquet, [("a", "b")])
