"""A signal that asks a run to leave: what is done is kept, and who has finished is not made to fail."""

import os
import re
import signal

import pytest

from tests.crash import SLOW, STOPPING, unfinished, wait_for
from tests.ranks import artifact_hashes
from tests.synthetic import N_PATCHES

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
    assert 0 < done_before < 360 * N_PATCHES


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("same_s", "passed_on_s", "second", "code"),
    [(1e9, 1e9, TERM, None), (0, 1e9, TERM, -TERM), (0, 1e9, INT, None), (0, 0, INT, -INT)],
)
def test_a_second_signal_leaves_at_once_unless_it_may_be_the_first_passed_on(
    tmp_path, server, whole, same_s, passed_on_s, second, code
):
    stuck = "import time, saev_dist.extract as e, saev_dist.signals as s\n"
    stuck += f"s.SAME_S, s.PASSED_ON_S = {same_s}, {passed_on_s}\n"
    # many short sleeps: a signal that comes when Python has just gone to sleep is noted at the end of it
    stuck += "e._rows = lambda *a: (print('here', flush=True), [time.sleep(0.1) for _ in range(6000)])"
    attempt = server.start(*whole[0], tmp_path / "run", before=stuck)
    wait_for(lambda: "here" in attempt.output())
    os.kill(attempt.pids[0], signal.SIGTERM)
    wait_for(lambda: "SIGTERM: leaving, after this batch and a snapshot at the latest; the same again," in attempt.output())
    os.kill(attempt.pids[0], second)
    if code is None:
        with pytest.raises(TimeoutError):
            server.wait(attempt, timeout_s=1)
        server.kill(attempt)
    assert server.wait(attempt) == [code or -signal.SIGKILL]


def test_a_signal_during_the_self_check_ends_it_and_nothing_is_said_to_be_kept(tmp_path, server, whole):
    checking = "import os, saev_dist.selfcheck as s, saev_dist.accumulators.reconstruction as r\n"
    checking += "f = r.Reconstruction.add\ndef add(*a): print('here', flush=True); os.kill(os.getpid(), 15); f(*a)\n"
    checking += "r.Reconstruction.add = add\ns.CHUNK_CODES, s.GROWTH = 1, 1"  # eight tokens at a time
    attempt = server.start(*whole[0], tmp_path / "run", "--self-check", "warn", before=checking)
    assert server.wait(attempt) == [75]
    assert "SIGTERM: stopped before anything was done. Run the same command again." in attempt.output()
    assert attempt.output().count("here") == 1 and not (tmp_path / "run").exists()


def test_who_leaves_without_a_last_snapshot_does_not_say_that_all_is_kept(tmp_path, server, long_run):
    out = tmp_path / "run"
    full = "\nimport saev_dist.partials as p\ndef full(*_): raise OSError(28, 'No space left on device')\np.write = full"
    attempt = server.start(*long_run, out, before=SLOW + full)
    wait_for(lambda: list(out.glob("partials/*.bin")))
    os.kill(attempt.pids[0], signal.SIGTERM)
    assert server.wait(attempt) == [75]
    said = attempt.output()
    assert "no snapshot: " in said and "what was done before the last snapshot is kept in " in said
    assert "what is done is kept" not in said


@pytest.mark.parametrize(
    ("when", "n_ranks", "whose"),
    [("amid the stream", 2, "rank 1"), ("amid the stream", 3, "2 ranks"), ("after its share", 2, "rank 1")],
)
def test_rank_0_says_so_of_another_ranks_loss(tmp_path, server, long_run, when, n_ranks, whose):
    out = tmp_path / "run"
    full = "\nimport os, saev_dist.partials as p\nw = p.write\ndef full(*_): raise OSError(28, 'No space left on device')"
    full += (
        "\nif os.environ['RANK'] != '0': p.write = full; e._rows = f"
        if when == "after its share"
        else "\nif os.environ['RANK'] != '0': p.write = full"
    )
    attempt = server.start(*long_run, out, n_ranks=n_ranks, before=SLOW + full)
    if when == "after its share":
        wait_for(lambda: "no snapshot: " in attempt.output())
    wait_for(lambda: all(list(out.glob(f"partials/*.{rank:05d}-*.bin")) for rank in range(n_ranks)))
    os.kill(attempt.pids[0], signal.SIGTERM)
    assert server.wait(attempt) == [75] * n_ranks, attempt.output()
    (line,) = (line for line in attempt.output().splitlines() if "stopped, and" in line)
    assert line.endswith(f"(But the disk did not take the last snapshot of {whose}: what came since the one before is lost.)")


def test_a_signal_is_obeyed_between_partials(tmp_path, server, whole):
    """There may be a thousand, and no rows in whose midst to look."""
    args, out = [*whole[0][:-1], "--no-img-acts", "--n-distributions", 0, "--out"], tmp_path / "run"
    attempt = server.start(*args, out, n_ranks=2, before=STOPPING)
    wait_for(lambda: all(list(out.glob(f"partials/{rank:05d}-*.partial")) for rank in range(2)))
    server.kill(attempt)
    server.wait(attempt)
    for function in ("check_digest", "load"):
        codes, output = server.run(*args, out, before=HIT.format("partials", function))
        assert codes == [75] and output.count("struck") == 1, output


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
    assert codes == [0, 0] and output.count("struck") == 1, output
    assert artifact_hashes(tmp_path / "run") == expected


STRUCK = """
import os, signal, time
from pathlib import Path
from saev_dist import artifacts, store
from saev_dist.world import World
publish, finish, is_there = store.Run.publish, World.finish, Path("{}")

def publish_late(*args):
    is_there.touch()
    time.sleep(1.5)
    publish(*args)

def look(job, store, world, *args):
    is_there.touch()
    while True:
        world.check()
        time.sleep(0.05)

def finish_struck(self):
    if self.rank == 1:
        while not is_there.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        print("struck", flush=True)
    finish(self)

World.finish = finish_struck
"""
"""Code for `before`: rank 1 has a signal while it waits for rank 0 to finish, once a file says how far that is."""


def test_a_signal_to_another_rank_does_not_make_a_finished_run_a_failed_one(tmp_path, server, whole):
    args, expected, _ = whole
    codes, output = server.run(
        *args, tmp_path / "run", n_ranks=3, before=f"{STRUCK.format(tmp_path / 'there')}store.Run.publish = publish_late"
    )
    assert codes == [0, 0, 0], output
    assert output.count("struck") == 1
    assert artifact_hashes(tmp_path / "run") == expected


def test_a_signal_to_another_rank_is_obeyed_while_rank_0_still_obeys(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    codes, output = server.run(*args, out, n_ranks=3, before=f"{STRUCK.format(tmp_path / 'there')}artifacts.write = look")
    assert codes == [75, 75, 75] and "SIGTERM on rank 1" in output
    assert server.run(*args, out)[0] == [0]
    assert artifact_hashes(out) == expected
