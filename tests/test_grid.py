"""Ranks that meet in rows and columns, on one machine or on several, and merge their states."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from saev_dist.grid import Grid, slice_sizes
from tests.ranks import ENV, server

MERGES = """
import torch
from saev_dist.world import World
with World(60) as world:
    state = dict(a=torch.arange(7) * 10**world.rank, b=torch.full((1, 2), 10.0**world.rank), c=torch.zeros(0))
    whole = world.merge(state, lambda states: {name: sum(state[name] for state in states) for name in states[0]})
    print([tensor.tolist() for tensor in whole.values()])
raise SystemExit(0)
"""


@pytest.mark.parametrize("n_ranks", [2, 4, 5, 6])
def test_all_states_are_merged_on_rank_0(n_ranks):
    ranks = server().start(n_ranks=n_ranks, before=MERGES, apart=True)
    assert server().wait(ranks) == [0] * n_ranks, [log.read_text() for log in ranks.error_logs]
    ones = int("1" * n_ranks)
    first, *others = (log.read_text().strip() for log in ranks.logs)
    assert first == str([[i * ones for i in range(7)], [[float(ones)] * 2], []])
    assert others == [str([[], [], []])] * (n_ranks - 1)


@pytest.mark.parametrize(("size", "most_peers"), [(1, 0), (2, 1), (7, 6), (12, 2 + 3), (64, 7 + 7), (1024, 31 + 31)])
def test_a_rank_is_connected_with_few(size, most_peers):
    """Yet each is in one row and one column, the same for all in it, in which rank 0 is first."""
    ranks_by_place: dict[tuple[str, int], dict[int, int]] = {}
    for rank in range(size):
        groups = Grid(rank, size).groups
        assert sum(group.size - 1 for group in groups) == most_peers
        for group in groups:
            assert ranks_by_place.setdefault((group.name, group.size), {}).setdefault(group.place, rank) == rank
    assert all(sorted(ranks) == list(range(n_ranks)) for (_, n_ranks), ranks in ranks_by_place.items())
    assert all(group.place == 0 for group in Grid(0, size).groups)


@pytest.mark.parametrize("n_rows", [0, 1, 7, 1024])
@pytest.mark.parametrize("n_ranks", [1, 2, 5, 64])
def test_slices_cover_all_rows_evenly(n_rows, n_ranks):
    sizes = slice_sizes(n_rows, n_ranks)
    assert sum(sizes) == n_rows and max(sizes) - min(sizes) <= 1


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: to each other like machines whose own names lead to themselves alone.

    Of two ranks gloo lets the one of the higher address call the other: theirs are above 127.0.0.1.
    """
    names = [f"saev{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        cable = ["type", "veth", "peer", "name", "eth1", "netns", names[1]]
        subprocess.run(["ip", "-n", names[0], "link", "add", "eth1", *cable], check=True, capture_output=True)
        for number, name in enumerate(names, 1):
            for words in (f"addr add 198.51.100.{number}/24 dev eth1", "link set eth1 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True, capture_output=True)
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as err:
        pytest.skip(f"network namespaces need root and iproute2 ({err})")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def meet(
    machines: list[str], hosts: list[str], *, timeout_s: int = 60, interfaces: tuple[str, str] = ("", "")
) -> list[tuple[int, str]]:
    """How a rank on each machine ends, and what it prints."""
    script = MERGES.replace("World(60)", f"World({timeout_s})")
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29400"}
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", machine, sys.executable, "-c", script],
            env=ENV | place | {"RANK": str(rank), "MASTER_ADDR": host, "GLOO_SOCKET_IFNAME": interfaces[rank]},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, (machine, host) in enumerate(zip(machines, hosts, strict=True))
    ]  # fmt: skip
    found = []
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        found.append((rank.returncode, out.strip() or err.strip()))
    return found


@pytest.mark.parametrize(("host", "interface"), [("198.51.100.1", ""), ("127.0.1.1", ""), ("127.0.1.1", "eth1")])
def test_machines_whose_own_names_lead_to_themselves_meet_on_the_way_to_the_first(machines, host, interface):
    """On the first one MASTER_ADDR may be such a name, too, and it alone may have been told better."""
    ends = meet(machines, [host, "198.51.100.1"], interfaces=(interface, ""))
    assert ends == [(0, str([[i * 11 for i in range(7)], [[11.0, 11.0]], []])), (0, str([[], [], []]))]


def test_an_interface_by_which_machines_do_not_meet_is_named(machines):
    ends = meet(machines, ["198.51.100.1"] * 2, timeout_s=4, interfaces=("lo", "lo"))
    for code, said in ends:
        assert code == 1 and "could not connect with other ranks (this one listens on interface lo: " in said
        assert "Set GLOO_SOCKET_IFNAME to the name of a network interface" in said
