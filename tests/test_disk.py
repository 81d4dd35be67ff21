"""A disk that refuses or fills up: one line, and nothing whole is lost."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from saev_dist import files, partials
from saev_dist.cli import main
from saev_dist.data.shards import Shards
from saev_dist.errors import RunError
from saev_dist.spill import Rows, Spill
from saev_dist.store import Run
from tests.crash import Fault, killed, operations
from tests.ranks import artifact_hashes
from tests.synthetic import make_acts, make_shards


def test_a_second_try_opens_the_file_anew(tmp_path, monkeypatch):
    """What an NFS server's failover made stale stays stale."""
    (tmp_path / "file").write_bytes(b"0123456789")
    pread, stale = os.pread, []

    def failing(fd: int, size: int, offset: int) -> bytes:
        if not stale:
            stale.append(os.fstat(fd).st_ino)
            os.dup2(os.open("/dev/null", os.O_RDONLY), fd)
            raise OSError(errno.ESTALE, "stale")
        return pread(fd, min(size, 4), offset)

    monkeypatch.setattr(files.os, "pread", failing)
    monkeypatch.setattr(files, "DELAYS_S", (0.0,))
    assert files.read_part(tmp_path / "file", 7, 2) == b"2345678" and stale
    assert files.read_part(tmp_path / "file", 7, 6) == b"6789"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_where_one_file_system_cannot_be_synced_all_are(tmp_path, monkeypatch, number):
    """Old kernels and odd file systems know no syncfs; a disk that refuses is another thing."""
    synced = []

    class Libc:
        def syncfs(self, fd: int) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(files.ctypes, "CDLL", lambda name, use_errno: Libc())
    monkeypatch.setattr(files.os, "sync", lambda: synced.append(True))
    with pytest.raises(OSError, match="Input/output error") if number == errno.EIO else nullcontext():
        files.sync_file_system(tmp_path)
    assert bool(synced) == (number != errno.EIO)


def stumble(monkeypatch, fname: str, number: int, n_times: int) -> None:
    """Asking for the size of a file of that name fails so often."""
    stat, left = Path.stat, [None] * n_times

    def failing(path: Path, **settings: bool) -> os.stat_result:
        if path.name == fname and left:
            left.pop()
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, **settings)

    monkeypatch.setattr(Path, "stat", failing)
    monkeypatch.setattr(files, "DELAYS_S", (0.0, 0.0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_shard_whose_size_cannot_be_had_once_is_no_bad_shard(tmp_path, monkeypatch, number):
    shards = Shards.open(make_shards(tmp_path, make_acts()))
    stumble(monkeypatch, "acts000001.bin", number, 2)
    assert shards.bad_files() == {}
    stumble(monkeypatch, "acts000001.bin", number, 3)
    assert list(shards.bad_files()) == [1]


@pytest.mark.parametrize("n_times", [2, 3])
def test_rows_whose_size_cannot_be_had_are_named(tmp_path, monkeypatch, n_times):
    with Spill(tmp_path, "00000-x", {"r": 0}) as written:
        written.append(0, [{"r": np.ones(6, np.float32)}])
        rows = Rows(tmp_path, "r", written.segments, 1, np.float32, filler=lambda _: np.ones(0), check=lambda: None)
    stumble(monkeypatch, "r.00000-x.bin", errno.ESTALE, n_times)
    with (
        nullcontext()
        if n_times == 2
        else pytest.raises(RunError, match=r"r\.00000-x\.bin: cannot read: Stale file handle; run")
    ):
        rows.check_size(24)


def test_an_error_of_a_disk_that_nobody_foresaw_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(cfg):
        raise OSError(errno.EIO, "Input/output error", "/data/x")

    monkeypatch.setattr("saev_dist.inspect.run", fail)
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["inspect", str(tmp_path)])
    assert capsys.readouterr().err == "saev-dist: error: /data/x: Input/output error.\n"


def is_threads_write(what: str) -> bool:
    """Whether it is of img_acts.npz what several threads write, each to its place."""
    return what.startswith("pwrite64 ") and "img_acts.npz" in what


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["rm", "-rf", target], check=True)
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def test_every_file_operation_may_fail_once(tmp_path, server, whole):
    """Then the run ends well, or with one line; and the next one ends well, with the same bytes."""
    args, expected, shards = whole
    hows = {"w": ["28", "5", "short"], "f": ["5"], "m": ["5"], "r": ["5"], "t": ["5"], "u": ["5"], "o": ["28"]}
    killed(server, args, tmp_path / "begun", at=6)
    for op, errors in hows.items():
        log = tmp_path / f"{op}.log"
        fault = Fault(ops=op, at=0, how="5")
        out = copy(tmp_path / "begun", tmp_path / "counted")
        assert server.run(*args, out, fault=fault, roots=(out, shards), log=log)[0] == [0]
        done = operations(log)
        assert done
        assert op != "w" or any(is_threads_write(what) for _, what in done)
        if "SOAK" not in os.environ:  # a sample that has every kind of file: first and last of all rows, of all tensors
            seen: dict[str, list[tuple[int, str]]] = {}
            for at, what in done:
                kind = re.sub(r"[0-9a-f]{5,}", "#", what)
                seen.setdefault(re.sub(r"\w+(?=\.#-#\.bin$|\.pt$)", "*", kind), []).append((at, what))
            done = sorted({one for group in seen.values() for one in (group[0], group[-1])})
        struck = [
            (at, what, how) for at, what in done for how in (errors if is_threads_write(what) else [errors[at % len(errors)]])
        ]
        for at, what, how in struck:
            out = copy(tmp_path / "begun", tmp_path / "struck")
            codes, output = server.run(*args, out, fault=Fault(ops=op, at=at, how=how), roots=(out, shards))
            where = (op, at, what, how, output)
            assert codes[0] in (0, 1), where
            assert codes == [1] or how == "short" or not is_threads_write(what), where
            if codes == [1]:
                news = ("saev-dist: warning: ", f"{out} holds ")
                errors_shown = [line for line in output.splitlines() if not line.startswith(news)]
                assert len(errors_shown) == 1 and errors_shown[0].startswith("saev-dist: error: "), where
                assert not (op == "r" and "acts" in what.split("/")[-1] and "shards/" in what), where
                codes, output = server.run(*args, out)
                assert codes == [0], (where, output)
            assert artifact_hashes(out) == expected, where


def test_rows_that_become_an_artifact_stay_rows(tmp_path, server, whole):
    """An uninterrupted process makes img_acts.npz of a file of its rows: a death meanwhile, or a full disk, costs neither."""
    args, expected, _ = whole
    log, ops, out = tmp_path / "log", "wflmu", tmp_path / "run"
    assert server.run(*args, out, fault=Fault(ops=ops, at=0, how="5"), roots=(out,), log=log)[0] == [0]
    done = operations(log)
    names = [what for _, what in done]
    linked, put = names.index(f"link {out}/partials/img_acts.npz"), names.index(f"rename {out}/partials/img_acts.npz")
    published = done[put + 1 : names.index(f"unlink {out}/partials/run.json", put) + 1]
    staging: dict[str, list[tuple[int, str]]] = {}
    for at, what in done[linked:put]:
        if "img_acts" in what:
            staging.setdefault(what, []).append((at, what))
    struck = sorted({one for group in staging.values() for one in (group[0], group[-1])})
    assert [what.split()[0] for _, what in struck] == ["link", "write", "pwrite64", "write", "fsync", "fsync"] and published
    out = tmp_path / "struck"
    strikes = [(at, what, how) for at, what in struck for how in ("kill", str(errno.ENOSPC))]
    for at, what, how in strikes + [(at, what, "kill") for at, what in published]:
        shutil.rmtree(out, ignore_errors=True)
        codes, output = server.run(*args, out, fault=Fault(ops=ops, at=at, how=how), roots=(out,))
        if what.startswith("link") and how != "kill":  # a file system that knows no second names
            assert codes == [0], output
        else:
            assert codes == [-9 if how == "kill" else 1], output
            if (at, what) in published:  # under its final name, which the next attempt leaves whole until it replaces it
                killed(server, args, out, at=1, ops="f")
                found = hashlib.sha256((out / "img_acts.npz").read_bytes()).hexdigest()
                assert found == expected["img_acts.npz"], what
            elif how != "kill":
                (segment,) = partials.read_header(next(out.glob("partials/*.partial"))).segments
                n_bytes = segment.fpath(out / "partials", "img_acts_data").stat().st_size
                assert n_bytes == segment.extents["img_acts_data"][1], "a full disk gets back what cannot be used"
            codes, output = server.run(*args, out)
            ranks = json.loads((out / "manifest.json").read_bytes())["ranks"]
            assert codes == [0] and sum(rank["n_tokens"] for rank in ranks) == 0, (what, how, output)
        assert artifact_hashes(out) == expected, (what, how)


def test_a_file_that_becomes_an_artifact_is_never_cut(tmp_path, monkeypatch):
    """Whether the file system makes a second name, or makes it and the answer is lost, or does not."""
    run, link = Run(tmp_path), os.link
    run.partials_dpath.mkdir()
    rows_fpath, staged_fpath = run.partials_dpath / "rows.bin", run.partials_dpath / "img_acts.npz"
    rows_fpath.write_bytes(b"rows")

    def stage(content):
        with run.stage("img_acts.npz", onto=rows_fpath) as file:
            file.seek(0, os.SEEK_END)
            file.write(content)
            if content == b"fails":
                raise KeyError

    for answers, is_made in (("made", True), ("lost", True), ("refused", False)):

        def answer(here, there, answers=answers):
            if answers != "refused":
                link(here, there)
            if answers != "made":
                raise OSError(errno.EEXIST if answers == "lost" else errno.EPERM, "no")

        monkeypatch.setattr(os, "link", answer)
        with pytest.raises(KeyError):
            stage(b"fails")
        assert rows_fpath.read_bytes() == b"rows" and not staged_fpath.exists(), answers
        stage(b" and more")
        assert staged_fpath.read_bytes() == (b"rows and more" if is_made else b" and more"), answers
        assert rows_fpath.read_bytes() == (b"rows and more" if is_made else b"rows")
        stage(b" again")  # what a killed process staged goes, and not its rows
        os.truncate(rows_fpath, 4)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr("saev_dist.store.open", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")), raising=False)
    with pytest.raises(RunError, match="cannot write"):
        stage(b"")
    assert rows_fpath.read_bytes() == b"rows" and not staged_fpath.exists()


def test_a_snapshot_that_does_not_fit_is_tried_again(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    # The 3rd fsync of a partial's own file fails: 4 spill files, the partial and the directory each time.
    fault = Fault(ops="f", at=2 + 6 + 5, how=str(errno.ENOSPC))
    codes, output = server.run(*args, out, fault=fault, roots=(out,))
    assert codes == [0], output
    assert re.search(r"warning: no snapshot: .*\.partial: No space left on device. The one before stays", output)
    assert artifact_hashes(out) == expected


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_loses_nothing(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    killed(server, args, out, at=6)
    (fpath,) = out.glob("partials/*.partial")
    content = fpath.read_bytes()
    codes, output = server.run(*args, out, fault=Fault(ops="f", at=1, how=str(errno.ENOSPC), forever=True), roots=(out,))
    assert codes == [1]
    assert "No space left on device; free some space there" in output.splitlines()[-1]
    assert fpath.read_bytes() == content
    assert not list(out.glob("*.*"))
    codes, output = server.run(*args, out)
    assert codes == [0] and "done before" in output
    assert artifact_hashes(out) == expected


def test_a_read_that_fails_once_is_tried_again(tmp_path, server, whole):
    args, expected, shards = whole
    for number in (errno.EIO, errno.ESTALE):
        out = tmp_path / str(number)
        codes, output = server.run(*args, out, fault=Fault(ops="r", at=3, how=str(number)), roots=(shards / "acts000002.bin",))
        assert codes == [0] and artifact_hashes(out) == expected, output
