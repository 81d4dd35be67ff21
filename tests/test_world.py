"""Ranks that meet without torchrun, end at different times, or die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import TCPStore

from saev_dist import world
from saev_dist.errors import ConfigError
from saev_dist.world import BEAT_S, LOST_AFTER_S, World, _look_for_dead
from tests.crash import wait_for
from tests.ranks import ENV, Attempt, artifact_hashes, run_ranks, server
from tests.synthetic import make_command


class Beats(dict):
    """A store, of signs of life by rank."""

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self


def test_who_is_silent_is_dead_but_not_who_left_nor_to_one_that_stood_still_itself(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(world.time, "monotonic", lambda: clock[0])
    store = Beats({"beat/1": b"1", "beat/2": b"1", "beat/3": b"left"})  # rank 4 never came
    looks = _look_for_dead(store, range(1, 5), BEAT_S)

    def look_until(seconds: float) -> list[int]:
        dead = next(looks)
        while clock[0] < seconds:
            clock[0] += BEAT_S + 0.1
            store["beat/1"] += b"1"
            dead = next(looks)
        return dead

    assert look_until(LOST_AFTER_S - 1) == []
    assert look_until(LOST_AFTER_S + 2 * BEAT_S) == [2, 4]
    clock[0] += 10 * LOST_AFTER_S  # a job that was suspended, all of it
    assert look_until(clock[0] + LOST_AFTER_S - BEAT_S) == []
    assert look_until(clock[0] + 2 * BEAT_S) == [2, 4]


SLOW = """
import os, time
import saev_dist.extract as job
whole = job.{phase}
def slow(*args):
    if os.environ["RANK"] == "{rank}":
        print("delayed", flush=True)
        time.sleep({delay_s})
    return whole(*args)
job.{phase} = slow
"""


def start_ranks(slow_rank: int, delay_s: float, *args: object, phase: str = "_stream", n_ranks: int = 3) -> Attempt:
    """Ranks that no torchrun watches, as srun starts them. One of them sleeps before a phase of `extract`."""
    before = SLOW.format(rank=slow_rank, delay_s=delay_s, phase=phase)
    return server().start(*args, n_ranks=n_ranks, before=before, apart=True)


@pytest.fixture
def agent() -> Iterator[dict[str, str]]:
    """Environment of ranks whose store is in a process that outlives them all, as in torchrun's own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    yield place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    del store  # it ends with its last reference


@pytest.fixture
def args(tmp_path):
    return make_command(tmp_path)


@pytest.mark.parametrize("slow_rank", [0, 2])
def test_ranks_that_arrive_late_are_waited_for_without_torchrun(tmp_path, args, slow_rank):
    ranks = start_ranks(slow_rank, 4, *args, tmp_path / "run")
    assert server().wait(ranks) == [0, 0, 0], ranks.output()
    assert all(log.read_text() == "" for log in ranks.error_logs[1:])
    assert run_ranks(*args, tmp_path / "alone").returncode == 0
    assert artifact_hashes(tmp_path / "run") == artifact_hashes(tmp_path / "alone")
    again = start_ranks(-1, 0, *args, tmp_path / "run")
    assert server().wait(again) == [0, 0, 0], again.output()
    assert "nothing to do" in again.logs[0].read_text()


@pytest.mark.parametrize(("victim", "phase"), [(0, "_stream"), (1, "_stream"), (0, "_merge"), (1, "_merge"), (2, "_merge")])
def test_a_killed_rank_stops_the_others_and_is_named(tmp_path, args, victim, phase):
    """Also those that exchange nothing with it, as the one that watches 2 of 4, and where the one that watches it stands still for
    a while, as on a busy machine."""
    ranks = start_ranks(victim, 300, *args, tmp_path / "run", phase=phase, n_ranks=4)
    n_partials = 3 if phase == "_stream" else 4
    wait_for(lambda: ranks.logs[victim].read_text() == "delayed\n", say=ranks.output)
    wait_for(lambda: len(list((tmp_path / "run/partials").glob("*.partial"))) == n_partials, say=ranks.output)
    time.sleep(1)
    os.kill(ranks.pids[victim], signal.SIGKILL)
    if (victim, phase) == (1, "_merge"):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            time.sleep(6)
            os.kill(ranks.pids[0], number)
    codes = [1, 1, 1]
    codes.insert(victim, -signal.SIGKILL)
    assert server().wait(ranks, timeout_s=50) == codes
    errors = [log.read_text() for log in ranks.error_logs]
    shown = [line for err in errors for line in err.splitlines()]
    message = "lost contact with the host of all ranks" if victim == 0 else f"rank {victim} of 4 died or hangs"
    assert shown and all(line.startswith("saev-dist: error: ") and message in line for line in shown), errors
    assert not list((tmp_path / "run").glob("*.*"))
    # What the others had done is there, and so is the victim's where it had finished its share.
    assert len(list((tmp_path / "run/partials").glob("*.partial"))) == n_partials
    done = run_ranks(*args, tmp_path / "run")
    assert done.returncode == 0 and "done before" in done.stdout, done.stderr
    assert run_ranks(*args, tmp_path / "alone").returncode == 0
    assert artifact_hashes(tmp_path / "run") == artifact_hashes(tmp_path / "alone")


SAYING_THAT_IT_FINISHES = """
import saev_dist.world as world
world.ACKNOWLEDGE_S = world.LEAVE_S = 600  # who lingers so long hangs
finish = world.World.finish
world.World.finish = lambda self: (print("finishes", flush=True), finish(self))
"""


@pytest.mark.parametrize(("victim", "phase"), [(0, "_merge"), (2, "_merge"), (0, "artifacts.write")])
def test_ranks_that_torchrun_tells_to_leave_do_not_wait_for_the_dead_one(tmp_path, args, agent, victim, phase):
    """Else it would kill them after 30 s. Whoever hosts the store, as torchrun itself may, goes on."""
    before = SLOW.format(rank=victim, delay_s=300, phase=phase) + SAYING_THAT_IT_FINISHES
    ranks = server().start(*args, tmp_path / "run", n_ranks=3, before=before, apart=True, envs=[agent] * 3)
    others = [rank for rank in range(3) if rank != victim]
    said = "" if phase == "_merge" else "finishes\n"
    wait_for(lambda: ranks.logs[victim].read_text() == "delayed\n", say=ranks.output)
    wait_for(lambda: all(ranks.logs[rank].read_text() == said for rank in others), say=ranks.output)
    os.kill(ranks.pids[victim], signal.SIGKILL)
    for rank in others:
        os.kill(ranks.pids[rank], signal.SIGTERM)
    assert LOST_AFTER_S + 2 * BEAT_S < 25
    codes = server().wait(ranks, timeout_s=45)  # and some more where the machine is busy
    assert [codes[rank] for rank in others] == ([75, 75] if phase == "_merge" else [1, 1])
    if victim:
        assert f"rank {victim} of 3 died or hangs" in ranks.error_logs[0].read_text()


MEETS_LATE = """
import os, time, saev_dist.world as w
from saev_dist.grid import Group
w.BEAT_S, w.LOST_AFTER_S = 0.2, 3.0
meet = Group.meet
def meet_late(self, *args):
    if os.environ["RANK"] == "3" and self.name == "column 1":
        time.sleep(6)
    meet(self, *args)
Group.meet = meet_late
"""


def test_a_rank_that_is_late_to_meet_is_not_missed_by_those_that_have_met_all_of_theirs(tmp_path, args):
    ranks = server().start(*args, tmp_path / "run", n_ranks=4, before=MEETS_LATE, apart=True)
    assert server().wait(ranks) == [0, 0, 0, 0], [log.read_text() for log in ranks.error_logs]


def test_an_error_that_all_ranks_find_is_said_once(tmp_path, args):
    args[args.index("--sae") + 1] = tmp_path / "nowhere.pt"
    ranks = server().start(*args, tmp_path / "run", n_ranks=4, apart=True)
    assert server().wait(ranks) == [1, 1, 1, 1]
    (line,) = "".join(log.read_text() for log in ranks.error_logs).splitlines()
    assert line.startswith("saev-dist: error: rank ") and "nowhere.pt" in line


COMES_TOO_LATE = """
import os, time
from saev_dist import grid
from saev_dist.errors import SaevDistError
from saev_dist.world import World
wait = grid._wait_for_all
def late(store, what, *args):
    if (what, os.environ["RANK"]) == ("met", "0"):
        time.sleep(6)
    wait(store, what, *args)
grid._wait_for_all = late
try:
    with World(3) as world:
        world.wait()
except SaevDistError as err:
    print(type(err).__name__, err)
raise SystemExit(0)
"""


def test_who_comes_when_the_others_have_given_up_is_told_so(agent):
    ranks = server().start(n_ranks=3, before=COMES_TOO_LATE, apart=True, envs=[agent] * 3)
    assert server().wait(ranks, timeout_s=LOST_AFTER_S) == [0, 0, 0]
    late, *others = (log.read_text() for log in ranks.logs)
    assert late.startswith("PeerError rank ") and "could not meet all 3 ranks" in late
    assert sorted(said.split()[0] for said in others) == ["PeerError", "RunError"]


CONNECTS = """
import resource
from saev_dist.world import World
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))  # 1024 is usual
with World(60):
    print(resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most))
raise SystemExit(0)
"""


def test_there_may_be_as_many_connections_as_the_machine_allows():
    ranks = server().start(n_ranks=2, before=CONNECTS, apart=True)
    assert server().wait(ranks) == [0, 0] and [log.read_text().strip() for log in ranks.logs] == ["True"] * 2


LEAVES = """
import os, signal, time
from pathlib import Path
from saev_dist import world as w
from saev_dist.errors import SaevDistError, RunError
from saev_dist.world import World
import torch
w.ACKNOWLEDGE_S = w.LEAVE_S = 600  # who lingers so long hangs
try:
    with World(600) as world, world.obeying_signals(Path("kept")):
        world.wait()
        if world.rank:
            world.merge(dict(a=torch.zeros(1000)), lambda states: states[0])
        time.sleep(1)
        if {how!r} == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            world.wait()
        raise RunError("disk full")
except SaevDistError as err:
    print(type(err).__name__, str(err)[:17])
raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [("signal", ["Preempted SIGTERM on rank 0"] * 4), ("error", ["RunError disk full"] + ["PeerError rank 0: disk full"] * 3)],
)
def test_ranks_inside_a_collective_leave_with_the_one_that_stays_outside(how, said):
    """Two wait for it, and the last one for one of these."""
    ranks = server().start(n_ranks=4, before=LEAVES.format(how=how), apart=True)
    assert server().wait(ranks) == [0, 0, 0, 0], [log.read_text() for log in ranks.error_logs]
    assert [log.read_text().strip() for log in ranks.logs] == said


ADDRESS = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "rank 0: WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is not set; start the ranks"),
        ({"WORLD_SIZE": "2"}, "rank ?: WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT is not set; start the ranks"),
        ({"WORLD_SIZE": "abc"}, "rank ?: environment variable WORLD_SIZE is 'abc'; it should be an integer of at least 1."),
        ({"WORLD_SIZE": "0"}, "rank ?: environment variable WORLD_SIZE is '0'; it should be an integer of at least 1."),
        ({"WORLD_SIZE": "2", **ADDRESS, "MASTER_PORT": "abc"}, "rank 0: environment variable MASTER_PORT is 'abc'; it should"),
        ({"WORLD_SIZE": "2", **ADDRESS, "MASTER_PORT": "70000"}, "variable MASTER_PORT is 70000; ports end at 65,535"),
        ({"LOCAL_WORLD_SIZE": "0"}, "variable LOCAL_WORLD_SIZE is '0'; it should be an integer of at least 1."),
        ({"RANK": "1"}, "error: RANK is 1 but WORLD_SIZE is not set; start the ranks with torchrun."),
        ({"WORLD_SIZE": "2", **ADDRESS, "RANK": "2"}, "rank 2: RANK is 2 of WORLD_SIZE 2; ranks count from 0."),
    ],
)
def test_an_environment_in_which_ranks_cannot_meet_is_one_line(args, tmp_path, env, words):
    rank = server().start(*args, tmp_path / "run", "--timeout-s", 2, envs=[env], apart=True)
    codes = server().wait(rank)
    (line,) = rank.error_logs[0].read_text().splitlines()
    assert codes == [1] and line.startswith("saev-dist: error: ") and words in line


def test_a_rank_that_meets_nobody_says_so_in_one_line(args, tmp_path):
    """To its very end, at which libraries may print too."""
    command = [sys.executable, "-m", "saev_dist", *map(str, args), tmp_path / "run", "--timeout-s", "2"]
    env = ENV | ADDRESS | {"WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("saev-dist: error: rank 1: could not meet all 2 ranks ("), line


def test_a_single_process_has_no_process_group():
    assert os.environ.get("WORLD_SIZE") is None
    with World(10) as world:
        assert world._store is None and world._grid.groups == []
        state = {"a": torch.arange(3)}
        assert world.merge(state, lambda states: {}) == state
        assert world.tell({"x": 1}) == {"x": 1} and world.collect(2) == [2]


@pytest.mark.parametrize(("local_rank", "n_gpus", "index"), [(0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3)])
def test_a_rank_takes_its_own_gpu_also_where_the_cluster_shows_it_only_that(monkeypatch, local_rank, n_gpus, index):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert World(10).device("auto") == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


@pytest.mark.parametrize(
    ("env", "n_gpus", "said"),
    [
        ({"WORLD_SIZE": "2"}, 4, "rank 0 cannot tell which of 4 GPUs is its own: set LOCAL_RANK"),
        ({"LOCAL_RANK": "2"}, 2, "local rank 2 has no GPU of its own: torch sees 2"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch, env, n_gpus, said):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    for wanted in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=said):
            World(10).device(wanted)


WAITS_FOR_RANK_0 = """
import os, time, saev_dist.extract as job
rows = job._rows
def slow(*args):
    if os.environ["RANK"] == "0":
        print("at work", flush=True)
        while not os.path.exists("{go_on}"):
            time.sleep(0.05)
    return rows(*args)
job._rows = slow
"""


def test_a_rank_that_leaves_for_anothers_signal_may_have_its_own_while_it_waits(tmp_path, args):
    """As srun sends them: not at the same instant to all."""
    before = WAITS_FOR_RANK_0.format(go_on=tmp_path / "go on")
    ranks = server().start(*args, tmp_path / "run", n_ranks=2, before=before, apart=True)
    wait_for(lambda: "at work" in ranks.logs[0].read_text(), say=ranks.output)
    wait_for(lambda: list((tmp_path / "run/partials").glob("00001-*.partial")), say=ranks.output)
    for at_s, rank in ((0, 1), (1, 0), (0.5, 1)):  # rank 1 has done its share and leaves at once; rank 0 ends its batch
        time.sleep(at_s)
        os.kill(ranks.pids[rank], signal.SIGUSR2 if at_s else signal.SIGTERM)
    time.sleep(0.5)  # for rank 1 to have it
    (tmp_path / "go on").touch()
    assert server().wait(ranks) == [75, 75], [log.read_text() for log in ranks.error_logs]


def test_a_job_that_was_suspended_goes_on(tmp_path, args):
    """For longer than a rank may be silent: when it is continued, each has heard nothing of the others for that long."""
    before = (
        WAITS_FOR_RANK_0.format(go_on=tmp_path / "go on") + "import saev_dist.world as w\nw.BEAT_S, w.LOST_AFTER_S = 0.2, 8.0"
    )
    ranks = server().start(*args, tmp_path / "run", n_ranks=3, before=before, apart=True)
    wait_for(lambda: "at work" in ranks.logs[0].read_text(), say=ranks.output)
    for number, pause_s in ((signal.SIGSTOP, 10), (signal.SIGCONT, 2)):
        for pid in ranks.pids:
            os.kill(pid, number)
        time.sleep(pause_s)
    (tmp_path / "go on").touch()  # each has looked at another since
    assert server().wait(ranks) == [0, 0, 0], [log.read_text() for log in ranks.error_logs]


def test_reports_may_be_larger_than_a_value_of_the_store(tmp_path, args):
    assert run_ranks(*args, tmp_path / "one").returncode == 0
    done = run_ranks(*args, tmp_path / "two", n_ranks=2, before="import saev_dist.world as world; world.MAX_VALUE = 7")
    assert done.returncode == 0, done.stderr
    assert artifact_hashes(tmp_path / "two") == artifact_hashes(tmp_path / "one")
    manifest = json.loads((tmp_path / "two/manifest.json").read_text())
    assert [rank["rank"] for rank in manifest["ranks"]] == [0, 1]


def test_a_reader_of_stderr_that_has_gone_takes_nothing_from_the_run(tmp_path, args):
    """As `2>&1 | tee` does at Ctrl-C."""
    reading, writing = os.pipe()
    os.close(reading)
    args = [*(word for word in args if word != "--no-progress")]  # so that it has something to say
    command = [sys.executable, "-m", "saev_dist", *map(str, args), tmp_path / "run"]
    done = subprocess.run(command, env=ENV, stdout=subprocess.PIPE, stderr=writing, text=True)
    os.close(writing)
    assert done.returncode == 0 and "tokens " in done.stdout
