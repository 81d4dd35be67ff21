"""Two processes on one run directory: who waits, who is refused, and what is left for the second."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from saev_dist import lock
from saev_dist.errors import RunError
from saev_dist.store import Run
from saev_dist.world import World
from tests.crash import SLOW, wait_for
from tests.ranks import ENV, artifact_hashes
from tests.ranks import server as forks


def test_a_look_at_the_lock_keeps_nobody_out(tmp_path, monkeypatch):
    (tmp_path / "partials").mkdir()
    waited = []
    with open(tmp_path / "partials/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def wait(seconds: float) -> None:
            waited.append(seconds)
            fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(lock.time, "sleep", wait)
        monkeypatch.setattr(lock, "GLANCE_S", 600 * lock.GLANCE_S)
        with Run(tmp_path).lock.hold():
            assert len(waited) == 1
    assert not (tmp_path / "partials").exists()


def test_one_who_looks_takes_no_other_who_looks_for_a_run_but_one_without_a_name(tmp_path):
    (tmp_path / "partials").mkdir()
    with open(tmp_path / "partials/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert lock.Lock(tmp_path).holder() == ""
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock.Lock(tmp_path).holder() == "another process"


def test_where_there_are_no_locks_a_run_is_warned_and_goes_on(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.Lock(tmp_path).hold():
        pass
    assert "partials/lock: cannot lock (No locks available); see to it that no other run uses" in capsys.readouterr().err


def test_a_lock_that_goes_from_a_linked_directory_is_had_anew(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to("there")
    fstat, gone = os.fstat, [True]

    def once(*args):
        if gone and gone.pop():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return fstat(*args)

    monkeypatch.setattr(lock.os, "fstat", once)
    with lock.Lock(tmp_path / "run").hold():
        assert not gone and (tmp_path / "there/partials/lock").exists()


def test_a_file_in_the_place_of_its_directory_is_not_waited_for(tmp_path):
    (tmp_path / "partials").touch()
    with pytest.raises(RunError, match="partials leads to no directory"), lock.Lock(tmp_path).hold():
        pass


def test_a_lock_that_goes_while_another_waits_for_it_is_had_anew(tmp_path):
    """Each holder removes it, and the directory with it."""
    n_times = 300
    code = "import sys, pathlib, saev_dist.lock as s\n"
    code += "sleep = s.time.sleep\ns.time.sleep = lambda _: sleep(0.0005)\n"
    code += f"for _ in range({n_times}):\n"
    code += "    with s.Lock(pathlib.Path(sys.argv[1])).hold(patience_s=60):\n"
    code += "        p = pathlib.Path(sys.argv[1]) / 'n'; p.write_text(str(int(p.read_text()) + 1))\n"
    (tmp_path / "n").write_text("0")
    workers = [subprocess.Popen([sys.executable, "-c", code, tmp_path], env=ENV, stderr=subprocess.PIPE) for _ in range(4)]
    said = [worker.communicate()[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, said
    assert (tmp_path / "n").read_text() == str(4 * n_times), "never two at once"
    assert all("is in use by" in line for text in said for line in text.splitlines())


@pytest.mark.parametrize("where", ["flock", "fstat"])
def test_a_lock_that_another_machine_has_removed_is_had_anew(tmp_path, monkeypatch, capsys, where):
    """NFS calls what is gone there a stale handle."""
    module = lock.fcntl if where == "flock" else lock.os
    real, stale = getattr(module, where), [True, True]

    def once(*args):
        if stale and stale.pop():
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*args)

    monkeypatch.setattr(module, where, once)
    with Run(tmp_path).lock.hold():
        assert not stale and Run(tmp_path).lock.holder().startswith(f"process {os.getpid()} on ")
    assert capsys.readouterr().err == ""


def test_a_second_run_on_one_directory_is_refused(tmp_path, server, long_run):
    out = tmp_path / "run"
    first = server.start(*long_run, out, before=SLOW)
    wait_for(lambda: list(out.glob("partials/*.bin")))
    for flags in ([], ["--force"], ["--force", "--self-check", "warn"]):  # which does not look at the SAE first
        codes, output = server.run(*long_run, out, *flags)
        assert codes == [1] and output.count("\n") == 1, output
        assert f"{out} is in use by process {first.pids[0]} on " in output
    codes, output = server.run("merge", "--run", out)
    assert codes == [1] and "is in use by" in output
    text = server.run("inspect", out)[1]
    assert f"under way: process {first.pids[0]} on " in text and "nothing yet of 360 batches; snapshots add to it" in text
    server.kill(first)
    server.wait(first)
    assert (out / "partials/lock").exists(), "the file stays, the lock does not"
    text = server.run("inspect", out)[1]
    assert "unfinished; run the same extract again" in text and "snapshots" not in text
    assert server.run(*long_run, out)[0] == [0]
    assert not (out / "partials").exists()


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_what_another_process_finishes_while_a_restarted_job_waits_is_not_done_again(tmp_path, server, whole, n_ranks):
    """As the last attempt of the same job may, which Slurm or torchrun gave up."""
    args, expected, _ = whole
    out = tmp_path / "run"
    restarted = 'import os; os.environ["SLURM_RESTART_COUNT"] = "1"\n'
    held = f'import time, pathlib as p, saev_dist.{{0}} as j; f = j.{{1}}\ndef late(*a): p.Path("{tmp_path}/{{0}}").touch()'
    held += (
        f'; [time.sleep(0.05) for _ in range(6000) if not p.Path("{tmp_path}/go {{0}}").exists()]; return f(*a)\nj.{{1}} = late'
    )
    gallery = ("replay", "--run", out, "--n-features", "2", "--no-pictures")
    for command, where, is_done in (((*args, out), ("extract", "_merge"), 0), (gallery, ("replay", "write_page"), 1)):
        first = server.start(*command, before=held.format(*where))
        wait_for((tmp_path / where[0]).exists)
        second = server.start(*command, n_ranks=n_ranks, before=restarted)
        wait_for(lambda: "Waiting for it, 120 s at most." in second.output())  # noqa: B023
        (tmp_path / f"go {where[0]}").touch()
        assert server.wait(first) == [0], first.output()
        assert server.wait(second) == [0] * n_ranks, second.output()
        said = "is this gallery, finished" if is_done else "holds this run, finished"
        assert second.output().count(said) == 1, second.output()
        assert not (out / "partials").exists()
        assert artifact_hashes(out) == expected


def test_a_run_of_other_settings_that_another_process_has_just_begun_is_not_taken_for_this_one(tmp_path):
    identity, others = {"top_k": 4}, {"top_k": 5}
    store = Run(tmp_path)
    store.refuse_others(identity, force=False)
    assert not store.is_finished()
    with Run(tmp_path).lock.hold():
        Run(tmp_path).begin(others, {}, afresh=False)  # and dies
    with pytest.raises(RunError, match=r"an unfinished run with other settings \(top_k: there 5, here 4\)"), store.lock.hold():
        store.begin(identity, {}, afresh=False)
    with store.lock.hold():
        assert store.begin(others, {}, afresh=False) == others, "that one goes on"


def test_a_restarted_job_waits_for_the_lock_of_the_attempt_before(tmp_path, monkeypatch, capsys):
    """A file server may hold that of a node that crashed for a while."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held = ExitStack()
    held.enter_context(Run(tmp_path).lock.hold())
    Run(tmp_path).begin({}, {}, afresh=False)
    tell = lock.tell
    monkeypatch.setattr(lock, "tell", lambda text: (tell(text), threading.Timer(0.5, held.close).start()))
    with Run(tmp_path).lock.hold(patience_s=World(600).patience_s):
        pass
    said = rf"saev-dist: {tmp_path} is in use by process {os.getpid()} on .*\. Waiting for it, 120 s at most\.\n"
    assert re.fullmatch(said, capsys.readouterr().err)

    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with (
        Run(tmp_path).lock.hold(),
        pytest.raises(RunError, match="is in use by"),
        Run(tmp_path).lock.hold(patience_s=World(600).patience_s),
    ):
        pass


@pytest.mark.parametrize("job", ["extract", "replay"])
def test_a_job_that_waits_for_the_lock_obeys_signals(tmp_path, server, whole, job):
    args, out = whole[0], tmp_path / "run"
    command = (*args, out)
    if job == "replay":
        assert server.run(*args, out)[0] == [0]
        command = ("replay", "--run", out)
    with Run(out).lock.hold():
        waiting = server.start(*command, before='import os; os.environ["SLURM_RESTART_COUNT"] = "1"')
        wait_for(lambda: "Waiting for it, 120 s at most." in waiting.output())
        server.kill(waiting, signal.SIGTERM)
        assert server.wait(waiting) == [75], waiting.output()


LAGGING = """
import os, time, saev_dist.extract as e
rows, n = e._rows, [0]
def lag(*args):
    n[0] += 1
    time.sleep(0.05)
    while os.environ["RANK"] == "1" and n[0] > 1 and not os.path.exists({go_on!r}):
        open({lags!r}, "w").close()
        time.sleep(0.05)
    return rows(*args)
e._rows = lag
"""


def test_a_run_is_in_use_until_its_last_rank_has_left(tmp_path, long_run):
    """Rank 0 leaves for a signal while another is still within a batch, whose snapshot is to come."""
    out, go_on, lags = tmp_path / "run", tmp_path / "go on", tmp_path / "lags"
    server = forks()  # whose ranks are as patient as a user's
    attempt = server.start(*long_run, out, n_ranks=2, before=LAGGING.format(go_on=str(go_on), lags=str(lags)))
    wait_for(lambda: lags.exists() and list(out.glob("partials/img_acts_counts.00000-*")))
    server.kill(attempt, signal.SIGTERM)
    wait_for(lambda: list(out.glob("partials/00000-*.partial")))
    codes, said = server.run(*long_run, out)
    assert codes == [1] and f"{out} is in use by process {attempt.pids[0]} on " in said
    go_on.touch()
    assert server.wait(attempt) == [75, 75], attempt.output()
    assert "what is done is kept" in attempt.output()
    assert {name.name[:5] for name in out.glob("partials/*.partial")} == {"00000", "00001"}
