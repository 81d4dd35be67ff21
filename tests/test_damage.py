"""Damaged files, a disk that refuses, bad shards: nothing is silently wrong, and nothing whole is lost."""

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
import scipy.sparse
import torch

from saev_dist import files, partials, progress
from saev_dist.cli import main
from saev_dist.data import reader
from saev_dist.data.shards import Shards
from saev_dist.errors import DamagedError, DataError, RunError
from saev_dist.spill import Rows, Spill
from saev_dist.store import Run
from tests.crash import Fault, killed, operations, unfinished
from tests.ranks import artifact_hashes
from tests.synthetic import N_IMGS, N_PATCHES, RELU, dense_codes, make_acts, make_sae, make_shards, make_weights

# ---- damage


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
    (fpath.parent / "x.partial.tmp").write_bytes(b"half")
    killed(server, args, out, at=1)
    assert rows.stat().st_size <= size and not orphan.exists() and not (fpath.parent / "x.partial.tmp").exists()
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


# ---- the disk


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


def is_threads_write(what: str) -> bool:
    """Whether it is of img_acts.npz what several threads write, each to its place."""
    return what.startswith("pwrite64 ") and "img_acts.npz" in what


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["rm", "-rf", target], check=True)
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


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


# ---- bad shards


@pytest.fixture
def with_bad_shards(tmp_path):
    """Four shards of 7, 7, 7 and 2 images: the second is missing, the third too short."""
    shards = make_shards(tmp_path / "shards", make_acts())
    (shards / "acts000001.bin").unlink()
    os.truncate(shards / "acts000002.bin", 100)
    args = [
        "extract",
        "--shards",
        str(shards),
        "--sae",
        str(make_sae(tmp_path / "sae.pt")),
        "--batch-tokens",
        "10",
        "--self-check",
        "off",
    ]
    return [*args, "--top-k", "4", "--no-progress", "--metrics", "--out"]


def test_bad_shards_are_left_out_counted_and_listed(tmp_path, server, with_bad_shards, capsys):
    args, out = with_bad_shards, tmp_path / "run"
    codes, output = server.run(*args, out)
    assert codes == [1] and "acts000001.bin: No such file" in output and "leave it out with extract --skip-bad-shards" in output
    main([*args, str(out), "--skip-bad-shards"])
    printed = capsys.readouterr().out
    assert "14 images of 2 bad shards: acts000001.bin, acts000002.bin" in printed and "45 of 9 images" in printed
    codes, output = server.run(*args, tmp_path / "three", "--skip-bad-shards", n_ranks=3)
    assert codes == [0, 0, 0], output
    assert artifact_hashes(out) == artifact_hashes(tmp_path / "three")

    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    assert [(part["shard"], part["img_i"], part["n_images"]) for part in left_out] == [
        ("acts000001.bin", 7, 7),
        ("acts000002.bin", 14, 7),
    ]
    assert "No such file" in left_out[0]["reason"] and "holds 100 bytes" in left_out[1]["reason"]

    # Everything is as if those images had no activations at all.
    kept = np.r_[0:7, 21:23]
    codes_eps = dense_codes(make_acts(), make_weights(), RELU)
    sparsity = (codes_eps[kept] > 0).mean((0, 1))
    assert np.allclose(torch.load(out / "sparsity.pt").numpy(), sparsity)
    assert set(torch.load(out / "top_img_i.pt").unique().tolist()) <= {-1, *kept.tolist()}
    csr = scipy.sparse.load_npz(out / "img_acts.npz")
    assert csr.shape[0] == N_IMGS and csr[7:21].nnz == 0 and csr[:7].nnz > 0
    samples = torch.load(out / "distributions.pt").view(24, N_IMGS, N_PATCHES).numpy()
    assert np.isnan(samples[:, 7:21]).all() and np.array_equal(samples[:, kept], codes_eps[kept].transpose(2, 0, 1))
    assert json.loads((out / "metrics.json").read_text())["n_tokens"] == 45

    main([*args, str(out), "--skip-bad-shards"])
    assert "finished without 14 images of 2 bad shards: acts000001.bin, acts000002.bin. Where" in capsys.readouterr().out
    main(["inspect", str(out)])
    inspected = capsys.readouterr().out
    assert "45: 9 images of 23 × 5 patches" in inspected and "14 images of 2 bad shards" in inspected
    main(["verify", "--run", str(out), "--no-progress"])
    assert "14 images of bad shards" in capsys.readouterr().out
    main(["replay", "--run", str(out), "--no-progress", "--no-pictures", "--n-features", "3"])
    assert "14 of them left out: bad shards" in (out / "visuals/index.html").read_text()


def test_a_shard_that_cannot_be_read_stops_the_run_or_is_left_out(tmp_path, server, whole):
    args, expected, shards = whole
    fault = Fault(ops="r", at=3, how=str(errno.EIO), forever=True)  # the first two are the fingerprint's
    roots = (shards / "acts000002.bin",)
    codes, output = server.run(*args, tmp_path / "run", fault=fault, roots=roots)
    assert codes == [1] and "acts000002.bin: cannot read: Input/output error" in output
    codes, output = server.run(*args, tmp_path / "run", "--skip-bad-shards", fault=fault, roots=roots)
    assert codes == [0] and "images of 1 bad shards: acts000002.bin" in output
    codes, output = server.run(*args, tmp_path / "other", "--skip-bad-shards", fault=fault, roots=roots)
    manifest = json.loads((tmp_path / "other/manifest.json").read_bytes())
    assert sum(rank["n_tokens"] for rank in manifest["ranks"]) == manifest["metrics"]["n_tokens"] < 115
    codes, output = server.run(*args, tmp_path / "b", fault=fault, roots=roots)
    assert codes == [1]
    codes, output = server.run(*args, tmp_path / "b")  # the disk has been mended
    assert codes == [0] and "done before" in output
    assert artifact_hashes(tmp_path / "b") == expected


@pytest.mark.parametrize("bad", [{2}, {3}, {0, 1, 2, 3}], ids=["middle", "last", "all"])
def test_progress_does_not_wait_for_what_cannot_be_read(tmp_path, whole, monkeypatch, capsys, bad):
    args, read = whole[0], reader.read_batch

    def fail(shards, batch, *rest, **settings):
        if batch.shard_i in bad:
            raise DataError("bad")
        read(shards, batch, *rest, **settings)

    monkeypatch.setattr(reader, "read_batch", fail)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    with pytest.raises(SystemExit, match=r"^1$") if len(bad) == 4 else nullcontext():
        main([*map(str, args), str(tmp_path / "run"), "--skip-bad-shards", "--progress"])
    n_tokens = N_PATCHES * sum(7 if shard_i < 3 else 2 for shard_i in {0, 1, 2, 3} - bad)
    lines = [line.split()[1:4] for line in capsys.readouterr().err.splitlines() if "tok/s" in line]
    whole_line = ["100.0%", f"{n_tokens}/{n_tokens}", "tokens"]
    # The stream's own last line, and one more once it has ended.
    assert lines[-2:] == [whole_line] * (2 if n_tokens else 1)


def test_a_shard_may_go_bad_or_be_mended_while_the_run_is_under_way(tmp_path, server, whole):
    args, expected, _ = whole
    shards, args = make_shards(tmp_path / "shards", make_acts()), list(args)
    args[args.index("--shards") + 1] = shards
    first = shards / "acts000000.bin"
    content = first.read_bytes()
    killed(server, args, tmp_path / "a", at=4)  # two of its batches are done
    first.write_bytes(content[:100])
    killed(server, [*args[:-1], "--skip-bad-shards", "--out"], tmp_path / "b", at=4)
    codes, output = server.run(*args, tmp_path / "a")
    assert codes == [1] and "acts000000.bin holds 100 bytes" in output
    codes, output = server.run(*args, tmp_path / "a", "--skip-bad-shards", n_ranks=2)
    assert codes == [0, 0] and "3 images of 1 bad shards: acts000000.bin" in output and "done before" in output
    codes, output = server.run("verify", "--run", tmp_path / "a", "--no-progress")
    assert codes == [1] and "acts000000.bin" in output, "it needs images of the two batches"
    first.write_bytes(content)
    assert server.run("verify", "--run", tmp_path / "a", "--no-progress")[0] == [0]
    codes, output = server.run(*args, tmp_path / "b", n_ranks=2)
    assert codes == [0, 0] and "done before" in output, output
    assert artifact_hashes(tmp_path / "b") == expected
    first.write_bytes(content[::-1])
    codes, output = server.run(*args, tmp_path / "a")
    assert codes == [1] and "shards_probes: there" in output


def test_a_read_that_fails_once_is_tried_again(tmp_path, server, whole):
    args, expected, shards = whole
    for number in (errno.EIO, errno.ESTALE):
        out = tmp_path / str(number)
        codes, output = server.run(*args, out, fault=Fault(ops="r", at=3, how=str(number)), roots=(shards / "acts000002.bin",))
        assert codes == [0] and artifact_hashes(out) == expected, output


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


def test_no_shard_at_all_is_an_error(tmp_path, server, with_bad_shards):
    for fpath in (tmp_path / "shards").glob("*.bin"):
        fpath.unlink()
    codes, output = server.run(*with_bad_shards, tmp_path / "run", "--skip-bad-shards")
    assert codes == [1] and "no shard can be read, so there is nothing to write; the first: " in output
