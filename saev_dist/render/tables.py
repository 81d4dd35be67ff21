"""PURE. The tables beside the gallery: Parquet and CSV, written to an open file in bounded memory.

    features.parquet, features.csv   a row per feature: feature, log10_freq, log10_mean, max, percentile, n_active, top_images
    images.parquet                   a row per image: img_i, path, label

What a feature that never fired does not have is null (an empty cell in CSV): its logarithms, its maximum, its images.
The same rows give the same bytes.

Names: `s` features, `k` slots.
"""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from saev_dist.choose import FeatureTable

BATCH_ROWS = 65_536

IMAGES = pa.schema([("img_i", pa.int64()), ("path", pa.string()), ("label", pa.string())])


def write_features_parquet(file: BinaryIO, table: FeatureTable, top_img_i_sk: NDArray[np.int64]) -> None:
    """Write a row per feature; `top_images` is a list of distinct images, strongest first.

    Args:
        file: open for writing; it is left open.
        table: d_sae rows.
        top_img_i_sk: int64 (d_sae, top_k), -1 for an empty slot.
    """
    _write_parquet(file, _FEATURES, _feature_batches(table, top_img_i_sk))


def write_features_csv(file: BinaryIO, table: FeatureTable, top_img_i_sk: NDArray[np.int64]) -> None:
    """The same rows as text, UTF-8, with `top_images` as image ids between spaces.

    Every cell is a number, such ids, or empty: there is no text in it that a spreadsheet could run as a formula.
    """
    schema = _FEATURES.set(_FEATURES.get_field_index("top_images"), pa.field("top_images", pa.string()))
    # Texts here are digits and spaces: pyarrow would put quotes around them, and around the names.
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
    file.write(f"{','.join(schema.names)}\n".encode())
    with pyarrow.csv.CSVWriter(file, schema, write_options=options) as writer:
        for batch in _feature_batches(table, top_img_i_sk):
            lists = batch.column("top_images").to_pylist()
            joined = pa.array([" ".join(map(str, ids)) if ids else None for ids in lists], pa.string())
            writer.write_batch(pa.record_batch([*batch.columns[:-1], joined], schema=schema))


def write_images_parquet(file: BinaryIO, images: Iterable[tuple[str, str]]) -> None:
    """Write a row per image, as they come; at most `BATCH_ROWS` are held.

    Args:
        file: open for writing; it is left open.
        images: (path, label) of image 0, 1, … A path or label that is no UTF-8 is written with its bytes as \\xNN.
    """
    _write_parquet(file, IMAGES, _image_batches(images))


_FEATURES = pa.schema(
    [
        ("feature", pa.int64()),
        ("log10_freq", pa.float64()),
        ("log10_mean", pa.float64()),
        ("max", pa.float32()),
        ("percentile", pa.float32()),
        ("n_active", pa.int64()),
        ("top_images", pa.list_(pa.int64())),
    ]
)


def _feature_batches(table: FeatureTable, top_img_i_sk: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    d_sae = len(table.n_active_s)
    assert len(top_img_i_sk) == d_sae
    for start in range(0, d_sae, BATCH_ROWS):
        part = slice(start, min(start + BATCH_ROWS, d_sae))
        freq_s, mean_s, max_s = table.log10_freq_s[part], table.log10_mean_s[part], table.max_s[part]
        yield pa.record_batch(
            [
                pa.array(np.arange(part.start, part.stop)),
                *(pa.array(values_s, mask=~np.isfinite(values_s)) for values_s in (freq_s, mean_s, max_s)),
                pa.array(table.percentile_s[part]),
                pa.array(table.n_active_s[part]),
                _distinct(top_img_i_sk[part]),
            ],
            schema=_FEATURES,
        )


def _distinct(img_i_sk: NDArray[np.int64]) -> pa.Array:
    """Each row's images above -1, the first time that they occur, as lists; null for a row without any."""
    lists = [list(dict.fromkeys(row[row >= 0].tolist())) or None for row in img_i_sk]
    return pa.array(lists, pa.list_(pa.int64()))


def _image_batches(images: Iterable[tuple[str, str]]) -> Iterator[pa.RecordBatch]:
    start, rows = 0, []
    for row in images:
        rows.append(row)
        if len(rows) == BATCH_ROWS:
            yield _image_batch(start, rows)
            start, rows = start + len(rows), []
    if rows:
        yield _image_batch(start, rows)


def _image_batch(start: int, rows: list[tuple[str, str]]) -> pa.RecordBatch:
    columns = ([text.encode("utf-8", "backslashreplace").decode() for text in column] for column in zip(*rows, strict=True))
    return pa.record_batch([pa.array(np.arange(start, start + len(rows))), *map(pa.array, columns)], schema=IMAGES)


def _write_parquet(file: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer:
        for batch in batches:
            writer.write_batch(batch)
