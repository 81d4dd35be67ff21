"""Killed, stopped, damaged, refused by the disk: what a run does then, and what the next attempt makes of it."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import HealthCheck, given, settings

from saev_dist import partials, progress, spill
from saev_dist.cli import main
from saev_dist.data import reader
from saev_dist.errors import DamagedError, DataError, RunError
from saev_dist.plan import Plan
from saev_dist.spill import Spill, covered
from saev_dist.store import Run
from tests.crash import SLOW, Fault
from tests.laws import KINDS, batches, fold, same
from tests.ranks import ENV, artifact_hashes
from tests.soak import Soak
from tests.synthetic import N_IMGS, N_PATCHES, RELU, TOPK, dense_codes, make_acts, make_sae, make_shards, make_weights

N_BATCHES = 13
"""Of two images; shards have 7, 7, 7 and 2."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, server):
    """Shards, an SAE, the command for them, and the hashes of an uninterrupted run."""
    dpath = tmp_path_factory.mktemp("whole")
    shards, sae = make_shards(dpath / "shards", make_acts()), make_sae(dpath / "sae.pt")
    args = [
        "extract",
        "--shards",
        shards,
        "--sae",
        sae,
        "--batch-tokens",
        10,
        "--top-k",
        4,
        "--no-progress",
        "--self-check",
        "off",
    ]
    args += ["--snapshot-every", 0, "--out"]
    codes, output = server.run(*args, dpath / "run")
    assert codes == [0], output
    return args, artifact_hashes(dpath / "run"), shards


def killed(server, args, out, *, at: int, n_ranks: int = 1, ops: str = "m", rank: int = 0) -> None:
    """Start a run that is killed at the n-th rename below `out`, and its other ranks with it."""
    fault = Fault(ops=ops, at=at, how="kill", rank=rank)
    attempt = server.start(*args, out, n_ranks=n_ranks, fault=fault, roots=(out,))
    assert min(server.wait(attempt, for_one=True)) == -9, attempt.output()
    server.kill(attempt)
    server.wait(attempt)


# ---- killed and resumed


def test_one_five_and_two_ranks_do_each_their_part(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    killed(server, args, out, at=4)  # run.json and two partials
    killed(server, args, out, at=2, n_ranks=5, rank=1)
    done = covered(segment for partial in partials.newest(out / "partials") for segment in partial.segments)
    n_done = Plan([7, 7, 7, 2], 2).n_examples_in(done) * N_PATCHES
    codes, output = server.run(*args, out, n_ranks=2)
    assert codes == [0, 0], output
    assert artifact_hashes(out) == expected
    ranks = json.loads((out / "manifest.json").read_text())["ranks"]
    assert sum(rank["n_tokens_before"] for rank in ranks) == n_done > 20, "what was done is not done again"
    assert sum(rank["n_tokens_before"] + rank["n_tokens"] for rank in ranks) == N_IMGS * N_PATCHES
    assert "tokens were done before" in output
    assert (
        f"{out} holds {n_done // N_PATCHES} of {N_IMGS} images ({n_done / N_PATCHES / N_IMGS:.1%}) of this run: going on."
        in output
    )


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_runs_killed_at_random_end_in_the_same_bytes(soak, seed):
    soak.trial(seed)


@pytest.fixture(scope="module")
def soak(tmp_path_factory, server):
    return Soak(tmp_path_factory.mktemp("soak"), server)


def test_a_restart_by_torchrun_continues_by_itself(tmp_path, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    slow = f"import time, saev_dist.extract as e; f = e._rows; e._rows = lambda *a: (time.sleep(0.2), f(*a))[1]; from saev_dist.cli import main; main({[*map(str, args), str(out)]!r})"  # fmt: skip
    (tmp_path / "slow.py").write_text(slow)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = subprocess.Popen(
        [*command, tmp_path / "slow.py"], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: list(out.glob("partials/00000-*.partial")))
    os.kill(int(re.match(r"process (\d+) ", (out / "partials/lock").read_text())[1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert "tokens were done before" in stdout
    assert artifact_hashes(out) == expected


def test_force_starts_over_but_not_in_a_restart_of_the_same_job(tmp_path, server, whole, monkeypatch):
    args, expected, _ = whole
    killed(server, args, tmp_path / "a", at=5)
    codes, output = server.run(*args, tmp_path / "a", "--force")
    assert codes == [0] and "done before" not in output
    killed(server, args, tmp_path / "b", at=5)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    done = subprocess.run([sys.executable, "-m", "saev_dist", *map(str, args), tmp_path / "b", "--force"], env={**ENV, "SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "done before" in done.stdout, done.stderr
    assert artifact_hashes(tmp_path / "a") == artifact_hashes(tmp_path / "b") == expected


def test_force_computes_nothing_again_when_the_job_is_restarted_after_its_end(tmp_path, server, whole):
    """A rank may die between the last rename and its exit; a job of another id is asked for a new computation."""
    args, expected, _ = whole
    out = tmp_path / "run"
    assert server.run(*args, out)[0] == [0]
    before = "import os; os.environ |= {{'SLURM_JOB_ID': '{}', 'SLURM_RESTART_COUNT': '{}'}}"
    for job_id, n_restarts, is_done in (("7", 0, False), ("7", 1, True), ("7", 0, False), ("8", 1, False)):
        codes, output = server.run(*args, out, "--force", before=before.format(job_id, n_restarts))
        assert codes == [0] and ("nothing to do" in output) == is_done, (job_id, n_restarts, output)
        assert artifact_hashes(out) == expected


def test_forcing_keeps_the_finished_artifacts_until_the_new_ones_are_there(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    assert server.run(*args, out)[0] == [0]
    killed(server, [*args[:-1], "--force", "--percentile", 50, "--out"], out, at=5)
    before = {path.name for path in out.iterdir()}
    assert before == {*expected, "manifest.json", "partials"}
    codes, output = server.run(*args, out)
    assert codes == [1] and "holds an unfinished run of other settings (percentile: there 50.0, here 99.0)" in output
    codes, output = server.run(*args[:-1], "--percentile", 50, "--out", out)
    assert codes == [0] and "done before" in output


def test_saevs_percentile_resumes(tmp_path, server, whole):
    args = [*whole[0][:-1], "--percentile-estimator", "saev", "--out"]
    codes, output = server.run(*args, tmp_path / "run", "--skip-bad-shards")  # it needs all tokens
    assert codes == [1] and "it does not go with --skip-bad-shards" in output
    assert server.run(*args, tmp_path / "a")[0] == [0]
    killed(server, args, tmp_path / "b", at=6)
    codes, output = server.run(*args, tmp_path / "b")
    assert codes == [0] and "done before" in output
    assert artifact_hashes(tmp_path / "a") == artifact_hashes(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "difference"),
    [(["--top-k", 5], "top_k: there 4, here 5"), (["--no-img-acts"], "img_acts: there true, here false")],
)
def test_other_settings_are_refused_by_name(tmp_path, server, whole, flags, difference):
    args, expected, _ = whole
    killed(server, args, tmp_path / "run", at=4)
    codes, output = server.run(*args, tmp_path / "run", *flags)
    assert codes == [1] and output.count("\n") == 1 and difference in output
    assert server.run(*args, tmp_path / "run")[0] == [0]
    assert artifact_hashes(tmp_path / "run") == expected


def test_another_sae_is_refused(tmp_path, server, whole):
    args, _, _ = whole
    killed(server, args, tmp_path / "run", at=4)
    other = make_sae(tmp_path / "other.pt", TOPK)
    codes, output = server.run(*args, tmp_path / "run", "--sae", other)
    assert codes == [1] and "sae_sha256: there" in output


# ---- signals


@pytest.fixture
def long_run(tmp_path):
    """1500 batches of one image: half a minute on one rank where they are SLOW."""
    shards = make_shards(tmp_path / "shards", make_acts(1500), imgs_per_shard=500)
    args = [
        "extract",
        "--shards",
        shards,
        "--sae",
        make_sae(tmp_path / "sae.pt"),
        "--batch-tokens",
        5,
        "--top-k",
        4,
        "--self-check",
        "off",
    ]
    return [*args, "--no-progress", "--n-distributions", 0, "--out"]


LATE = """
import os, saev_dist.partials as p
w = p.write
if os.environ.get("RANK") == "2":
    p.write = lambda *a: (time.sleep(2), w(*a))
"""
"""Rank 2 takes its time with a snapshot."""


@pytest.mark.parametrize(("name", "n_ranks"), [("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 3), ("SIGUSR2", 1)])
def test_a_signal_to_one_rank_makes_all_leave_with_75(tmp_path, server, long_run, name, n_ranks):
    out = tmp_path / "run"
    attempt = server.start(*long_run, out, n_ranks=n_ranks, before=SLOW + LATE)
    # A rank that has done nothing yet writes no partial.
    wait_for(lambda: all(list(out.glob(f"partials/*.{rank:05d}-*.bin")) for rank in range(n_ranks)))
    os.kill(attempt.pids[-1], getattr(signal, name))
    server.wait(attempt, for_one=True)
    n_partials = len(list(out.glob("partials/*.partial")))
    assert n_partials == n_ranks, "a launcher that sees one rank leave kills the others: not while they write"
    assert server.wait(attempt) == [75] * n_ranks, attempt.output()
    lines = attempt.output().splitlines()
    assert sum("stopped, and what is done is kept in" in line for line in lines) == 1, lines
    codes, output = server.run(*long_run, out)
    assert codes == [0], output
    assert server.run(*long_run, tmp_path / "alone")[0] == [0]
    assert artifact_hashes(out) == artifact_hashes(tmp_path / "alone")
    done_before = int(re.search(r"([\d,]+) tokens were done before", output)[1].replace(",", ""))
    assert 0 < done_before < 7500


@pytest.mark.parametrize(("same_s", "code"), [(1e9, None), (0, -signal.SIGTERM)])
def test_a_second_signal_leaves_at_once_unless_it_comes_too_soon_to_be_another(tmp_path, server, whole, same_s, code):
    stuck = f"import time, saev_dist.extract as e, saev_dist.signals as s; s.SAME_S = {same_s}\n"
    stuck += "e._rows = lambda *a: (print('here', flush=True), time.sleep(600))"
    attempt = server.start(*whole[0], tmp_path / "run", before=stuck)
    wait_for(lambda: "here" in attempt.output())
    os.kill(attempt.pids[0], signal.SIGTERM)
    wait_for(lambda: "SIGTERM: leaving after this batch and a snapshot" in attempt.output())
    os.kill(attempt.pids[0], signal.SIGTERM)
    if code is None:
        with pytest.raises(TimeoutError):
            server.wait(attempt, timeout_s=1)
        server.kill(attempt)
    assert server.wait(attempt) == [code or -signal.SIGKILL]


HIT = """
import os, signal, saev_dist.{0} as m
f = m.{1}
m.{1} = lambda *a: (print("struck"), os.kill(os.getpid(), signal.SIGTERM), f(*a))[2]
"""
"""Code for `before`: the process has a signal whenever it calls a function."""


@pytest.mark.parametrize(("module", "function"), [("spill", "crc32_combine"), ("partials", "check_extent")])
def test_a_signal_is_obeyed_while_rows_are_put_together_or_verified(tmp_path, server, whole, module, function):
    args, expected, _ = whole
    out = tmp_path / "run"
    unfinished(server, args, out)
    codes, output = server.run(*args, out, before=HIT.format(module, function))
    assert codes == [75] and "Run the same command again" in output and output.count("struck") == 1
    assert list(out.glob("partials/*.partial")) and not list(out.glob("*.*"))
    assert server.run(*args, out)[0] == [0]
    assert artifact_hashes(out) == expected


def test_a_signal_after_the_last_rename_does_not_make_a_finished_run_a_failed_one(tmp_path, server, whole):
    args, expected, _ = whole
    codes, output = server.run(*args, tmp_path / "run", n_ranks=2, before=HIT.format("extract", "summary"))
    assert codes == [0, 0], output
    assert artifact_hashes(tmp_path / "run") == expected


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- two runs at once


def test_a_look_at_the_lock_keeps_nobody_out(tmp_path):
    (tmp_path / "partials").mkdir()
    with open(tmp_path / "partials/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        looks = threading.Timer(0.02, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        looks.start()
        with Run(tmp_path).lock():
            looks.join()
    assert not (tmp_path / "partials").exists()


def test_a_second_run_on_one_directory_is_refused(tmp_path, server, long_run):
    out = tmp_path / "run"
    first = server.start(*long_run, out, before=SLOW)
    wait_for(lambda: list(out.glob("partials/*.bin")))
    for flags in ([], ["--force"]):
        codes, output = server.run(*long_run, out, *flags)
        assert codes == [1] and output.count("\n") == 1, output
        assert f"{out} is in use by process {first.pids[0]} on " in output
    codes, output = server.run("merge", "--run", out)
    assert codes == [1] and "is in use by" in output
    assert f"under way: process {first.pids[0]} on " in server.run("inspect", out)[1]
    server.kill(first)
    server.wait(first)
    assert (out / "partials/lock").exists(), "the file stays, the lock does not"
    assert "unfinished; run the same extract again" in server.run("inspect", out)[1]
    assert server.run(*long_run, out)[0] == [0]
    assert not (out / "partials").exists()


def test_a_run_that_another_process_has_just_finished_is_not_computed_again(tmp_path, server, whole):
    args, expected, _ = whole
    assert server.run(*args, tmp_path / "run")[0] == [0]
    store = Run(tmp_path / "run")
    identity = store.manifest().get("identity", dict)
    with pytest.raises(RunError, match="has just been finished by another process"), store.lock():
        store.begin(identity, {}, N_BATCHES, afresh=False)
    assert artifact_hashes(tmp_path / "run") == expected


# ---- merge


@pytest.mark.parametrize("flags", [[], ["--screen", "bf16"]], ids=str)
def test_merge_makes_the_artifacts_when_all_is_done(tmp_path, server, whole, flags):
    args, expected, shards = whole
    args = [args[0], *flags, *args[1:]]
    out = tmp_path / "run"
    codes, output = server.run("merge", "--run", out)
    assert codes == [1] and f"{out} is not a run" in output
    killed(server, args, out, at=6, n_ranks=2)
    codes, output = server.run("inspect", out)
    assert codes == [0] and re.search(r"kept +[1-9]\d* of 13 batches \(.*%\), in [12] partials", output), output
    codes, output = server.run(*args, out, "--dry-run")
    assert codes == [0] and re.search(r"kept +[1-9]\d* of 13 batches", output), output
    codes, output = server.run("merge", "--run", out)
    assert codes == [1] and re.search(r"batches \d+ to \d+(, \d+ to \d+)* of 13 are not done. Run extract again.", output)
    n_renames = 1 + N_BATCHES  # run.json, a partial after each batch
    killed(server, args, out.with_name("b"), at=n_renames + 3)  # among the artifacts
    moved = tmp_path / "moved"
    os.symlink(shards, moved)
    codes, output = server.run("merge", "--run", out.with_name("b"), "--shards", moved)
    assert codes == [0], output
    assert artifact_hashes(out.with_name("b")) == expected
    codes, output = server.run("merge", "--run", out.with_name("b"))
    assert codes == [1] and "is finished: there are no partials to merge" in output
    run_fpath = out / "partials/run.json"
    content = json.loads(run_fpath.read_bytes())
    aside = run_fpath.rename(tmp_path / "run.json")
    for command in (["merge", "--run", out], [*args, out]):
        codes, output = server.run(*command)
        assert codes == [1] and "run.json is missing, so nobody can tell what run the" in output, output
    run_fpath.write_bytes(aside.read_bytes()[:100])
    codes, output = server.run(*args, out)
    assert codes == [1] and re.search(r"run.json is not JSON.*: damaged. Run extract again with --force", output), output
    assert server.run(*args, out, "--dry-run", "--force")[0] == [0]
    run_fpath.write_text(json.dumps(content | {"config": content["config"] | {"of_the_future": 1}}))
    codes, output = server.run("merge", "--run", out)
    assert codes == [1] and re.search(
        r"run.json: these are no settings of this version's extract: .*'of_the_future'. Use the version", output
    )


def test_memory_that_runs_out_without_a_word_is_one_line(tmp_path, server, whole):
    code = "import saev_dist.extract as e\ndef full(*_): raise MemoryError\ne._rows = full\n"
    codes, output = server.run(*whole[0], tmp_path / "run", before=code)
    assert codes == [1] and "error: out of memory on cpu (MemoryError); lower --batch-tokens or --top-k." in output


# ---- damage


def unfinished(server, args, out: Path) -> Path:
    """A run killed before its last partial; the partial."""
    killed(server, args, out, at=1 + N_BATCHES)
    (fpath,) = out.glob("partials/*.partial")
    return fpath


def test_any_changed_byte_of_a_partial_or_its_rows_is_found(tmp_path, server, whole):
    fpath = unfinished(server, whole[0], tmp_path / "run")
    assert partials.fault(fpath) == ""
    rng = np.random.default_rng(0)
    for victim in (fpath, *fpath.parent.glob("*.bin")):
        content = victim.read_bytes()
        segments = partials.read_header(fpath).segments
        kind = victim.name.split(".")[0]
        size = len(content) if victim == fpath else max(segment.extents[kind][1] for segment in segments)
        for place in {0, size - 1, *rng.integers(0, size, 30).tolist()}:
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
        partial = partials.Partial(fingerprint="f", owner="00000-x", number=number, absorbed=(), segments=(), tensors={})
        partials.write(tmp_path, partial, {})
    assert [partial.number for partial in partials.newest(tmp_path)] == [1_000_000]


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


# ---- rows


def test_rows_are_written_in_order(tmp_path, monkeypatch):
    """Also those of many pieces, of batches with a gap between, and where the disk is slow."""
    monkeypatch.setattr(spill, "SYNC_BYTES", 100)
    random = np.random.default_rng(0)
    batches_i = [0, 1, 2, 5, 6, 7, 8, 20]
    kinds = {"a": np.float32, "b": np.int64}
    pieces = [
        [{k: random.integers(0, 9, random.integers(0, 50)).astype(t) for k, t in kinds.items()} for _ in range(3)]
        for _ in batches_i
    ]
    with Spill(tmp_path, "00000-x", kinds) as rows:
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
    rows = Spill(tmp_path, "00000-x", ["a", "b"])
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


def test_no_more_than_some_batches_wait_and_leaving_waits_for_them(tmp_path, monkeypatch):
    go_on, write = threading.Event(), spill._Writer._write
    monkeypatch.setattr(spill._Writer, "_write", lambda *args: (go_on.wait(60), write(*args))[1])
    n_appended = []

    def append_all():
        with Spill(tmp_path, "00000-x", ["a"]) as rows:
            for batch_i in range(10):
                rows.append(batch_i, [{"a": np.full(100, batch_i)}])
                n_appended.append(batch_i)

    thread = threading.Thread(target=append_all)
    thread.start()
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

    monkeypatch.setattr(spill, "SYNC_BYTES", 100)
    monkeypatch.setattr(os, "fsync", fsync)
    return failed


def test_rows_that_the_disk_did_not_take_meanwhile_are_never_taken_for_safe(tmp_path, failed):
    with Spill(tmp_path, "00000-x", ["a"]) as rows:
        rows.append(0, [{"a": np.zeros(100)}])
        assert rows.segments and failed.wait(60)
        for _ in range(2):
            with pytest.raises(RunError, match=r"a\.00000-x\.bin: cannot write: Input/output error"):
                rows.sync()


def test_nor_are_rows_appended_to_them(tmp_path, failed):
    def append_many():
        with Spill(tmp_path, "00000-x", ["a"]) as rows:
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
        with Spill(tmp_path, "00000-x", ["a"]) as rows:
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
    with Spill(tmp_path, owner, []) as rows, partials.Keeper(rows, "f", [], 0) as keeper:
        rows.append(0, [{}])
        keeper.save(before.state_dict())
    _, state = partials.load(tmp_path / f"{owner}.000000.partial")
    after.load_state_dict(state)
    for codes in group[n_before:]:
        after.update(codes)
    assert same(after, fold(KINDS[kind], group))


def test_a_snapshot_is_of_the_instant_it_was_asked_for(tmp_path, monkeypatch):
    """The stream goes on while it is written."""
    write, go_on = partials.write, threading.Event()
    monkeypatch.setattr(partials, "write", lambda *args: (go_on.wait(60), write(*args)))
    state = {"a": torch.arange(4)}
    with Spill(tmp_path, "00000-x", ["r"]) as rows, partials.Keeper(rows, "f", [], 1e-9) as keeper:
        rows.append(0, [{"r": np.zeros(3)}])
        keeper.save_if_due(lambda: state)  # it returns, so it is written on another thread
        state["a"] += 10
        rows.append(1, [{"r": np.ones(3)}])
        keeper.save_if_due(lambda: state)  # the last one is under way: no second one
        assert not list(tmp_path.glob("*.partial"))
        go_on.set()
    (fpath,) = tmp_path.glob("*.partial")
    partial, kept = partials.load(fpath)
    assert kept["a"].tolist() == [0, 1, 2, 3]
    assert [(s.first, s.stop, s.extents["r"][:2]) for s in partial.segments] == [(0, 1, (0, 24))]
    assert partials.fault(fpath) == ""


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
        lines = Path(f"{log}.0").read_text().splitlines()
        assert lines
        places = range(1, len(lines) + 1)
        if "SOAK" not in os.environ:  # a sample that has every kind of file
            seen: dict[str, list[int]] = {}
            for place, line in zip(places, lines, strict=True):
                seen.setdefault(re.sub(r"[0-9a-f]{5,}", "#", line), []).append(place)
            places = sorted({place for group in seen.values() for place in (group[0], group[-1])})
        for place in places:
            how = errors[place % len(errors)]
            out = copy(tmp_path / "begun", tmp_path / "struck")
            codes, output = server.run(*args, out, fault=Fault(ops=op, at=place, how=how), roots=(out, shards))
            where = (op, place, lines[place - 1], how, output)
            assert codes[0] in (0, 1), where
            if codes == [1]:
                news = ("saev-dist: warning: ", f"{out} holds ")
                errors_shown = [line for line in output.splitlines() if not line.startswith(news)]
                assert len(errors_shown) == 1 and errors_shown[0].startswith("saev-dist: error: "), where
                assert not (op == "r" and "acts" in lines[place - 1].split("/")[-1] and "shards/" in lines[place - 1]), where
                codes, output = server.run(*args, out)
                assert codes == [0], (where, output)
            assert artifact_hashes(out) == expected, where


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
    with pytest.raises(SystemExit, match="1") if len(bad) == 4 else nullcontext():
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


def test_no_shard_at_all_is_an_error(tmp_path, server, with_bad_shards):
    for fpath in (tmp_path / "shards").glob("*.bin"):
        fpath.unlink()
    codes, output = server.run(*with_bad_shards, tmp_path / "run", "--skip-bad-shards")
    assert codes == [1] and "no shard can be read; the first: " in output
