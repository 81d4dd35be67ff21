"""img_acts.npz: what SciPy reads, put together by threads from rows in several files."""

import errno
import io
import os
import zipfile
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given

from saev_dist import csr, files, spill
from saev_dist.errors import DamagedError, RunError
from saev_dist.spill import Rows, Spill, crc32_combine, read_columns

N_BATCHES, N_IMGS = 12, 3
LEFT_OUT = {4, 5, 11}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Rows of two processes, cut in chunks of 13 numbers; and the matrix that they are."""
    monkeypatch.setattr(spill, "COPY_BYTES", 52)
    random = np.random.default_rng(0)
    dense = random.integers(0, 3, (N_BATCHES, N_IMGS, 40)).astype(np.float32)
    dense[sorted(LEFT_OUT)] = 0
    segments = []
    for owner, batches in (("00000-x", range(7)), ("00001-y", range(7, 12))):
        with Spill(tmp_path, owner, {"counts": 0, "indices": 0, "data": csr.ROOM}) as rows:
            for batch_i in sorted(set(batches) - LEFT_OUT):
                matrix = scipy.sparse.csr_array(dense[batch_i])
                counts = np.diff(matrix.indptr).astype(np.int64)
                rows.append(batch_i, [{"counts": counts, "indices": matrix.indices.astype(np.int32), "data": matrix.data}])
            segments += rows.segments

    def made(kind, dtype, n_filler=0, check=lambda: None):
        return Rows(tmp_path, kind, segments, N_BATCHES, dtype, filler=lambda _: np.zeros(n_filler, dtype), check=check)

    return made, scipy.sparse.csr_array(dense.reshape(-1, 40)), tmp_path


def write(made, fpath, mode="wb", **kwargs):
    with open(fpath, mode) as file:
        csr.write_csr(
            file, (N_BATCHES * N_IMGS, 40), made("counts", np.int64, N_IMGS, **kwargs), made("indices", np.int32), made("data", np.float32)
        )  # fmt: skip


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_scipy_reads_what_it_would_have_written(make, monkeypatch, index_dtype):
    made, expected, dpath = make
    if index_dtype is np.int64:
        monkeypatch.setattr(csr, "MAX_INT32", 39)
    write(made, dpath / "found.npz")
    found = scipy.sparse.load_npz(dpath / "found.npz")
    assert (found != expected).nnz == 0 and found.shape == expected.shape
    expected.indices, expected.indptr = expected.indices.astype(index_dtype), expected.indptr.astype(index_dtype)
    scipy.sparse.save_npz(dpath / "scipy.npz", scipy.sparse.csr_matrix(expected), compressed=False)
    with zipfile.ZipFile(dpath / "found.npz") as mine, zipfile.ZipFile(dpath / "scipy.npz") as theirs:
        assert mine.testzip() is None
        for name in ("indices.npy", "indptr.npy", "data.npy", "shape.npy", "format.npy"):
            one, other = (np.load(io.BytesIO(archive.read(name))) for archive in (mine, theirs))
            assert one.dtype == (index_dtype if name[:3] == "ind" else other.dtype)
            np.testing.assert_array_equal(one, other)
            assert mine.getinfo(name).external_attr == 0o600 << 16 and mine.getinfo(name).date_time == csr.DATE
        assert len(mine.namelist()) == len(theirs.namelist())


def test_values_that_the_file_holds_already_are_not_written_again(make, monkeypatch):
    made, _, dpath = make
    write(made, dpath / "copied.npz")
    fpath = dpath / "data.00000-x.bin"
    n_bytes, written, pwrite = fpath.stat().st_size, [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (written.append(at), pwrite(fd, data, at))[1])
    data = made("data", np.float32)
    assert data.beginning("00001-y", csr.ROOM) is None, "its rows are not the first"
    assert data.beginning("00000-x", csr.ROOM - 1) is None, "no room for the headers"
    assert data.beginning("00000-x", csr.ROOM) == fpath
    write(made, fpath, mode="r+b")
    assert fpath.read_bytes() == (dpath / "copied.npz").read_bytes()
    assert min(written) == n_bytes
    assert data.beginning("00000-x", csr.ROOM) is None, "something else follows"


@pytest.mark.parametrize("n", [0, 1, 10**6, 10**12, 10**15])
def test_the_headers_before_the_values_have_one_size(n):
    info, header = csr._headers("data", np.dtype(np.float32), n)
    assert len(info.FileHeader(zip64=True)) + len(header) == csr.ROOM


@pytest.mark.parametrize("kind", ["counts", "indices", "data"])
def test_damage_is_found(make, kind):
    made, _, dpath = make
    fpath = dpath / f"{kind}.00001-y.bin"
    content = bytearray(fpath.read_bytes())
    content[-20] ^= 1
    fpath.write_bytes(content)
    with pytest.raises(DamagedError, match=rf"{kind}\.00001-y\.bin is damaged in the rows of batches 7 to 10; run again"):
        write(made, dpath / "found.npz")
    fpath.unlink()
    with pytest.raises(RunError, match=rf"the ranks' {kind} files hold .* bytes; expected"):
        write(made, dpath / "found.npz")


def test_it_can_be_stopped(make):
    class Stopped(Exception):
        pass

    made, _, dpath = make
    n_asked = []

    def check():
        n_asked.append(1)
        if len(n_asked) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        write(made, dpath / "found.npz", check=check)


@pytest.mark.parametrize("sync_bytes", [100, 10**9], ids=["meanwhile", "at-the-end"])
def test_what_the_disk_did_not_take_is_told(make, monkeypatch, sync_bytes):
    """Whichever fsync the kernel told it: it says so once."""
    made, _, dpath = make
    n_synced = []

    def fsync(fd):
        n_synced.append(1)
        if len(n_synced) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "SYNC_BYTES", sync_bytes)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"found\.npz: cannot write: Input/output error"):
        write(made, dpath / "found.npz")


def test_columns_are_the_transpose(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "COPY_BYTES", 100)
    values = np.random.default_rng(0).random((50, 6), dtype=np.float32)
    with Spill(tmp_path, "00000-x", {"r": 0}) as rows:
        for batch_i in range(4):
            rows.append(batch_i, [{"r": values[10 * batch_i : 10 * batch_i + 10]}])
        made = Rows(
            tmp_path, "r", rows.segments, 5, np.float32, n_columns=6,
            filler=lambda _: np.full(60, np.nan, np.float32), check=lambda: None,
        )  # fmt: skip
    values[40:] = np.nan
    np.testing.assert_array_equal(read_columns(made, 6, 50), values.T)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_crcs_are_put_together(data, cut):
    first, second = data[:cut], data[cut:]
    assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)


def test_crcs_of_much_are_put_together():
    second = bytes(5_000_003)
    assert crc32_combine(zlib.crc32(b"much"), zlib.crc32(second), len(second)) == zlib.crc32(b"much" + second)
