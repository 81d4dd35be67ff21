"""Rows and snapshots on their way to the disk."""

import errno
import os
import re
import threading
import time

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from saev_dist import files, partials, spill
from saev_dist.errors import RunError
from saev_dist.spill import Spill, covered
from tests.crash import Fault, killed, wait_for
from tests.laws import KINDS, batches, fold, same
from tests.ranks import artifact_hashes

# ---- rows


def test_rows_are_written_in_order(tmp_path, monkeypatch):
    """Also those of many pieces, of batches with a gap between, and where the disk is slow."""
    monkeypatch.setattr(files, "SYNC_BYTES", 100)
    random = np.random.default_rng(0)
    batches_i = [0, 1, 2, 5, 6, 7, 8, 20]
    kinds = {"a": np.float32, "b": np.int64}
    pieces = [
        [{k: random.integers(0, 9, random.integers(0, 50)).astype(t) for k, t in kinds.items()} for _ in range(3)]
        for _ in batches_i
    ]
    with Spill(tmp_path, "00000-x", {"a": 0, "b": 100}) as rows:
        for batch_i, group in zip(batches_i, pieces, strict=True):
            rows.append(batch_i, group)
        segments = rows.segments
        rows.sync()
        assert rows.segments == segments
    assert covered(segments) == ((0, 3), (5, 9), (20, 21))
    for kind in kinds:
        for segment in segments:
            inside = [group for i, group in zip(batches_i, pieces, strict=True) if segment.first <= i < segment.stop]
            expected = b"".join(piece[kind].tobytes() for group in inside for piece in group)
            begin, end, _ = segment.extents[kind]
            assert segment.fpath(tmp_path, kind).read_bytes()[begin:end] == expected
            spill.check_extent(tmp_path, segment, kind, lambda: None)
        assert segments[0].fpath(tmp_path, kind).stat().st_size == segments[-1].extents[kind][1]


def test_a_batch_whose_rows_the_disk_does_not_take_is_not_written_and_none_after_it(tmp_path, monkeypatch):
    write = spill._Writer._write

    def full(self, arrays, goes_on):
        with spill.writing(self._fpath):
            if self._fpath.name.startswith("b") and arrays[0][0] == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, arrays, goes_on)

    monkeypatch.setattr(spill._Writer, "_write", full)
    rows = Spill(tmp_path, "00000-x", {"a": 0, "b": 0})
    for batch_i in range(2):
        rows.append(batch_i, [{"a": np.full(3, batch_i), "b": np.full(3, batch_i)}])
    assert [(s.first, s.stop) for s in rows.segments] == [(0, 2)]
    for batch_i in range(2, 2 + spill.MAX_WAITING):
        rows.append(batch_i, [{"a": np.full(3, batch_i), "b": np.full(3, batch_i)}])
    for _ in range(2):
        with pytest.raises(RunError, match=r"b\.00000-x\.bin: No space left"):
            rows.append(9, [{"a": np.zeros(3), "b": np.zeros(3)}])
        with pytest.raises(RunError, match=r"b\.00000-x\.bin: No space left"):
            _ = rows.segments
    assert [(s.first, s.stop) for s in rows._written] == [(0, 2)]
    with pytest.raises(RunError, match=r"b\.00000-x\.bin: No space left"):  # on leaving, too
        rows.__exit__(None, None, None)
    with pytest.raises(RunError, match=r"b\.00001-x\.bin: No space left"), Spill(tmp_path, "00001-x", {"b": 0}) as last:
        last.append(2, [{"b": np.full(3, 2)}])  # of which nobody asks any more


def test_no_more_than_some_batches_wait_and_leaving_waits_for_them(tmp_path, monkeypatch):
    go_on, write = threading.Event(), spill._Writer._write
    monkeypatch.setattr(spill._Writer, "_write", lambda *args: (go_on.wait(60), write(*args))[1])
    n_appended = []

    def append_all():
        with Spill(tmp_path, "00000-x", {"a": 0}) as rows:
            for batch_i in range(10):
                rows.append(batch_i, [{"a": np.full(100, batch_i)}])
                n_appended.append(batch_i)

    thread = threading.Thread(target=append_all)
    thread.start()
    wait_for(lambda: len(n_appended) >= spill.MAX_WAITING)
    thread.join(0.5)
    assert len(n_appended) == spill.MAX_WAITING
    go_on.set()
    thread.join(60)
    assert np.fromfile(tmp_path / "a.00000-x.bin", np.int64).tolist() == [i for i in range(10) for _ in range(100)]


@pytest.fixture
def failed(monkeypatch):
    """The first fsync fails, which this event tells; the others succeed: the kernel says once what it could not write."""
    failed = threading.Event()

    def fsync(fd):
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "SYNC_BYTES", 100)
    monkeypatch.setattr(os, "fsync", fsync)
    return failed


def test_rows_that_the_disk_did_not_take_meanwhile_are_never_taken_for_safe(tmp_path, failed):
    with Spill(tmp_path, "00000-x", {"a": 0}) as rows:
        rows.append(0, [{"a": np.zeros(100)}])
        assert rows.segments and failed.wait(60)
        for _ in range(2):
            with pytest.raises(RunError, match=r"a\.00000-x\.bin: cannot write: Input/output error"):
                rows.sync()


def test_nor_are_rows_appended_to_them(tmp_path, failed):
    def append_many():
        with Spill(tmp_path, "00000-x", {"a": 0}) as rows:
            for batch_i in range(1000):
                rows.append(batch_i, [{"a": np.zeros(100)}])
                time.sleep(0.01)

    with pytest.raises(RunError, match="Input/output error"):
        append_many()
    assert failed.is_set()


def test_a_failed_fsync_of_rows_ends_the_run_and_keeps_the_last_snapshot(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    killed(server, args, out, at=6)
    (fpath,) = out.glob("partials/*.partial")
    codes, output = server.run(*args, out, fault=Fault(ops="f", at=2, how=str(errno.EIO)), roots=(out / "partials",))
    assert codes == [1] and re.search(r"error: .*\.bin: cannot write: Input/output error", output.splitlines()[-1])
    assert fpath.exists()
    assert server.run(*args, out)[0] == [0]
    assert artifact_hashes(out) == expected


def test_an_error_that_ends_the_rows_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(spill._Writer, "_write", lambda *args: 1 / 0)

    def end() -> None:
        with Spill(tmp_path, "00000-x", {"a": 0}) as rows:
            rows.append(0, [{"a": np.zeros(3)}])
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        end()


# ---- the keeper


@pytest.mark.parametrize("kind", KINDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example has a name of its own
@given(group=batches(), n_before=st.integers(0, 6))
def test_a_state_that_went_through_a_partial_continues_as_if_it_had_not(tmp_path, kind, group, n_before):
    before, after = fold(KINDS[kind], group[:n_before]), KINDS[kind]()
    owner = partials.new_owner(0)
    with Spill(tmp_path, owner, {}) as rows, partials.Keeper(rows, "f", [], "CPU", 0) as keeper:
        rows.append(0, [{}])
        keeper.save(before.state_dict())
    _, state = partials.load(tmp_path / f"{owner}.000000.partial")
    after.load_state_dict(state)
    for codes in group[n_before:]:
        after.update(codes)
    assert same(after, fold(KINDS[kind], group))


def test_a_snapshot_is_of_the_instant_it_was_asked_for(tmp_path, monkeypatch):
    """The stream goes on while it is written."""
    write, go_on, segments, readers = partials.write, threading.Event(), Spill.segments.fget, set()
    monkeypatch.setattr(partials, "write", lambda *args: (go_on.wait(60), write(*args)))
    monkeypatch.setattr(Spill, "segments", property(lambda self: (readers.add(threading.current_thread()), segments(self))[1]))
    state = {"a": torch.arange(4)}
    with Spill(tmp_path, "00000-x", {"r": 0}) as rows, partials.Keeper(rows, "f", [], "CPU", 1e-9) as keeper:
        rows.append(0, [{"r": np.zeros(3)}])
        keeper.save_if_due(lambda: state)  # it returns, so it is written on another thread
        state["a"] += 10
        rows.append(1, [{"r": np.ones(3)}])
        keeper.save_if_due(lambda: state)  # the last one is under way: no second one
        assert not list(tmp_path.glob("*.partial"))
        go_on.set()
    assert readers == {threading.current_thread()}, "two threads at once would lose batches"
    (fpath,) = tmp_path.glob("*.partial")
    partial, kept = partials.load(fpath)
    assert partial.arithmetic == ("CPU",)
    assert kept["a"].tolist() == [0, 1, 2, 3]
    assert [(s.first, s.stop, s.extents["r"][:2]) for s in partial.segments] == [(0, 1, (0, 24))]
    assert partials.fault(fpath) == ""


def test_an_error_of_a_snapshot_is_met_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(partials, "write", lambda *args: 1 / 0)
    with Spill(tmp_path, "00000-x", {"r": 0}) as rows, partials.Keeper(rows, "f", [], "CPU", 1e-9) as keeper:
        rows.append(0, [{"r": np.zeros(3)}])
        keeper.save_if_due(dict)
        wait_for(lambda: keeper._writing.done())
        with pytest.raises(ZeroDivisionError):
            keeper.save_if_due(dict)


def test_what_is_kept_is_not_written_again(tmp_path):
    with Spill(tmp_path, "00000-x", {"r": 0}) as rows, partials.Keeper(rows, "f", [], "CPU", 0) as keeper:
        rows.append(0, [{"r": np.zeros(3)}])
        assert keeper.save({}) and keeper.save({})
    assert [fpath.name for fpath in tmp_path.glob("*.partial")] == ["00000-x.000000.partial"]
