"""Damaged partials, rows and artifacts: nothing is silently wrong, and nothing whole is lost."""

import errno
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from saev_dist import files, partials
from saev_dist.errors import DamagedError, RunError
from saev_dist.store import Run
from tests.crash import Fault, killed, unfinished
from tests.ranks import artifact_hashes


def test_any_changed_byte_of_a_partial_or_its_rows_is_found(tmp_path, server, whole):
    fpath = unfinished(server, whole[0], tmp_path / "run")
    assert partials.fault(fpath) == ""
    rng = np.random.default_rng(0)
    for victim in (fpath, *fpath.parent.glob("*.bin")):
        content = victim.read_bytes()
        segments = partials.read_header(fpath).segments
        kind = victim.name.split(".")[0]
        begin = 0 if victim == fpath else min(segment.extents[kind][0] for segment in segments)
        size = len(content) if victim == fpath else max(segment.extents[kind][1] for segment in segments)
        for place in {begin, size - 1, *rng.integers(begin, size, 30).tolist()}:
            victim.write_bytes(content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :])
            assert partials.fault(fpath), (victim.name, place)
            if victim == fpath:
                with pytest.raises(DamagedError):
                    partials.load(fpath)
        for end in (0, 10, size - 1):
            victim.write_bytes(content[:end])
            assert partials.fault(fpath), (victim.name, end)
        victim.write_bytes(content)
    assert partials.fault(fpath) == ""


@pytest.mark.parametrize("what", ["partial", "rows", "rows gone"])
def test_a_damaged_partial_is_set_aside_and_computed_again(tmp_path, server, whole, what):
    args, expected, _ = whole
    out = tmp_path / "run"
    fpath = unfinished(server, args, out)
    victim = fpath if what == "partial" else next(out.glob("partials/img_acts_data.*.bin"))
    if what == "rows gone":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    attempt = server.start(*args, out, fault=Fault(ops="m", at=4, how="kill"), roots=(out,))
    server.wait(attempt)
    assert f"warning: {victim}" in attempt.output() and f"set aside as {fpath.name}.damaged" in attempt.output()
    assert (fpath.parent / f"{fpath.name}.damaged").exists()
    codes, output = server.run(*args, out, n_ranks=3)
    assert codes == [0, 0, 0], output
    assert artifact_hashes(out) == expected


def test_the_newest_partial_is_told_by_its_number_not_by_its_name(tmp_path):
    for number in (999_999, 1_000_000):
        partial = partials.Partial(
            fingerprint="f", owner="00000-x", number=number, absorbed=(), segments=(), arithmetic=(), tensors={}
        )
        partials.write(tmp_path, partial, {})
    assert [partial.number for partial in partials.newest(tmp_path)] == [1_000_000]


def test_partials_are_read_while_ranks_replace_theirs(tmp_path, monkeypatch):
    """A file that is gone when it is opened is looked for under its next name, and what was read is not read again."""

    def put(rank: int, number: int, **fields) -> partials.Partial:
        partial = partials.Partial(
            fingerprint="f",
            owner=f"{rank:05d}-x",
            number=number,
            segments=(),
            arithmetic=(),
            tensors={},
            **{"absorbed": (), **fields},
        )
        partials.write(tmp_path, partial, {})
        return partial

    for rank in range(3):
        put(rank, 0)
    read, opened = partials.read_header, []

    def slowly(fpath: Path) -> partials.Partial:
        opened.append(fpath.name)
        if len(opened) == 2:
            (tmp_path / "00001-x.000000.partial").unlink()
            put(1, 1)
        if len(opened) == 4:
            put(3, 0, absorbed=("00002-x",))
            (tmp_path / "00002-x.000000.partial").unlink()
        return read(fpath)

    monkeypatch.setattr(partials, "read_header", slowly)
    found = {(partial.owner, partial.number) for partial in partials.newest(tmp_path)}
    assert found == {("00000-x", 0), ("00001-x", 1), ("00003-x", 0)}
    assert len(opened) == 5 and opened.count("00000-x.000000.partial") == 1
    (tmp_path / "00004-x.000000.partial").symlink_to("nowhere")  # listed, and never there
    with pytest.raises(RunError, match="cannot read: No such file"):
        partials.newest(tmp_path)


def test_a_partial_of_another_run_is_refused(tmp_path, server, whole):
    args, _, _ = whole
    fpath = unfinished(server, args, tmp_path / "a")
    other = [*args[:-1], "--percentile", 50, "--out"]
    unfinished(server, other, tmp_path / "b")
    for path in (fpath, *fpath.parent.glob("*.bin")):
        (tmp_path / "b/partials" / path.name).write_bytes(path.read_bytes())
    codes, output = server.run(*other, tmp_path / "b")
    assert codes == [1] and f"{fpath.name} belongs to another run" in output


def test_what_a_given_up_rank_wrote_late_counts_only_once(tmp_path, server, whole):
    """The same batches under two owners: one of them is dropped."""
    args, expected, _ = whole
    out = tmp_path / "run"
    fpath = unfinished(server, args, out)
    late = {path: path.read_bytes() for path in fpath.parent.iterdir()}
    for path in late:
        if path.name not in ("lock", "run.json"):
            path.unlink()
    unfinished(server, args, out)
    for path, content in late.items():
        path.write_bytes(content)
    assert len(list(out.glob("partials/*.partial"))) == 2
    codes, output = server.run(*args, out)
    assert codes == [0] and "is not needed: batches 0 to 11 are covered twice" in output
    assert artifact_hashes(out) == expected


def test_torn_ends_and_leftovers_are_removed(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    fpath = unfinished(server, args, out)
    (rows,) = out.glob("partials/distributions.*.bin")
    size = rows.stat().st_size
    with open(rows, "ab") as file:
        file.write(b"torn")
    orphan = rows.with_name("distributions.00007-abc.bin")
    orphan.write_bytes(b"of an attempt that died before its first snapshot")
    for name in ("x.partial.tmp", ".x.partial.tmp"):  # the former is what earlier versions called it
        (fpath.parent / name).write_bytes(b"half")
    killed(server, args, out, at=1)
    assert rows.stat().st_size <= size and not orphan.exists() and not list(fpath.parent.glob("*x.partial.tmp"))
    assert server.run(*args, out)[0] == [0]
    assert artifact_hashes(out) == expected


def test_an_artifact_cut_off_anywhere_is_one_line(tmp_path):
    """As torch once wrote them too: its reader's own assertions and struct.error are among what comes of it."""
    fpath = tmp_path / "top_values.pt"
    torch.save(torch.ones(2, 3), fpath, _use_new_zipfile_serialization=False)
    content = fpath.read_bytes()
    assert Run(tmp_path).load_tensor("top_values.pt", (2, 3)).sum() == 6
    for size in range(0, len(content) - 24, 3):  # the numbers themselves are not missed by torch
        fpath.write_bytes(content[:size])
        with pytest.raises(RunError, match=r"top_values\.pt is damaged; run extract again with --force"):
            Run(tmp_path).load_tensor("top_values.pt", (2, 3))


def test_a_look_at_a_run_bears_with_a_damaged_partial_as_the_run_itself_does(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    unfinished(server, args, out).write_bytes(b"no partial")
    for look in (["inspect", out], [*args, out, "--dry-run"]):
        codes, output = server.run(*look)
        assert codes == [0] and re.search(r"^kept +unknown: .*its header is not one of a partial", output, re.M), output
    assert server.run(*args, out)[0] == [0] and artifact_hashes(out) == expected


def test_a_partial_of_a_former_version_does_not_say_what_computed_it(tmp_path, monkeypatch):
    partial = partials.Partial(fingerprint="f", owner="00000-x", number=0, absorbed=(), segments=(), arithmetic=(), tensors={})
    fields = partials.asdict
    monkeypatch.setattr(partials, "asdict", lambda obj: {k: v for k, v in fields(obj).items() if k != "arithmetic"})
    partials.write(tmp_path, partial, {})
    assert partials.load(tmp_path / partial.name)[0] == partial


def test_a_partial_is_read_whole_from_a_disk_that_stumbles(tmp_path, monkeypatch):
    """It gives less than it is asked for, and nothing for now: no error to whoever reads through a buffer."""
    state = {"small.x": torch.arange(3), "large.x": torch.arange(9_000).view(-1, 2)}
    tensors = {name: ("int64", tuple(tensor.shape)) for name, tensor in state.items()}
    absorbed = tuple(f"{rank:05d}-y" for rank in range(9_000))  # a header larger than what is read at first
    empty = {"fingerprint": "f", "segments": (), "arithmetic": ()}
    partial = partials.Partial(**empty, owner="00000-x", number=0, absorbed=absorbed, tensors=tensors)
    partials.write(tmp_path, partial, state)
    pread, n = os.pread, itertools.count()

    def stumbling(fd: int, size: int, offset: int) -> bytes:
        if next(n) % 7 == 0:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return pread(fd, min(size, 2**16 - 1), offset)

    monkeypatch.setattr(files.os, "pread", stumbling)
    monkeypatch.setattr(files, "DELAYS_S", (0.0,) * 3)
    found, tensors = partials.load(tmp_path / partial.name)
    assert found == partial and next(n) > 14
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    monkeypatch.setattr(partials, "check_digest", lambda fpath: None)  # as it was when that looked
    os.truncate(tmp_path / partial.name, os.path.getsize(tmp_path / partial.name) - 1_000)
    with pytest.raises(DamagedError, match="was cut short while it was read"):
        partials.load(tmp_path / partial.name)
