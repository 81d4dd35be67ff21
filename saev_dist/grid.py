"""How ranks exchange tensors: by gloo, in the rows and columns of a grid.

Gloo connects each rank of a group with each other, by way of the store. So the ranks of a run are not one group but a grid, and
each is in two, its row and its column: of 1,024 ranks it is connected with 62.
"""

import math
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fcntl import ioctl
from ipaddress import IPv4Address
from typing import Any

import torch.distributed as dist
from torch import Tensor

State = dict[str, Tensor]

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Gloo's variable: the network interface that it listens on. Without it gloo takes the one of the machine's own name, which on
many machines is 127.0.1.1 (hosts(5), as Debian installs it) and reached by no other."""
SIOCGIFADDR = 0x8915  # netdevice(7)


class Disconnected(Exception):
    """A peer is not reached, hung up, died, or is silent for too long."""


class Grid:
    """A rank's row and column, where they hold more than itself.

    In a row are neighbours: as many as divide the world evenly, and at most its square root. So a prime number of ranks is one
    column.
    """

    def __init__(self, rank: int, size: int) -> None:
        width = max(divisor for divisor in range(1, math.isqrt(size) + 1) if size % divisor == 0)
        row, column = divmod(rank, width)
        both = Group(f"row {row}", column, width), Group(f"column {column}", row, size // width)
        self.size = size
        self.groups = [group for group in both if group.size > 1]

    def meet(self, store: dist.Store, timeout: timedelta) -> None:
        """Connect with the peers, and return when all ranks have: before that nobody leaves, or is missed.

        Raises:
            Disconnected: not all peers are reached.
            RuntimeError: of the store, also where not all ranks come.
        """
        found = _interface(store, self.size, timeout)  # all ranks take part
        interface = os.environ.get(INTERFACE) or found
        with _listening_on(interface):
            for group in self.groups:
                try:
                    group.meet(store, timeout)
                except RuntimeError as err:
                    where = f"interface {interface}" if interface else "the address of its own name"
                    raise Disconnected(f"this one listens on {where}: {_first_line(err)}") from None
        _wait_for_all(store, "met", self.size, timeout)

    def part(self) -> None:
        """Hang up, which a peer inside a collective is told."""
        for group in self.groups:
            group.part()

    def merge(self, state: State, merge: Callable[[list[State]], State]) -> State:
        """All ranks' states as one, on rank 0; elsewhere the result has no rows.

        A rank merges its slice of its row's states, then its slice of that of its column's. What arrives in all is one state's
        worth of bytes, whatever the world size. Then the slices go to the first rank of each column, and from there to rank 0.

        Args:
            state: this rank's; the same names and shapes everywhere.
            merge: makes several states one, each row of a tensor by itself.

        Raises:
            Disconnected: a peer is gone.
        """
        n_rows = []
        for group in self.groups:
            n_rows.append({name: len(tensor) for name, tensor in state.items()})
            state = merge(group.exchange(state))
        for group, whole in zip(reversed(self.groups), reversed(n_rows), strict=True):
            state = group.gather(state, whole)
            if group.place:
                break
        return state


@dataclass
class Group:
    """Ranks that are all connected, as one of them sees it."""

    name: str
    place: int
    """Of this rank, from 0."""
    size: int
    _gloo: Any = None
    """`ProcessGroupGloo`, whose stubs leave out half of it. It hangs up when nothing refers to it any more, neither a frame of
    a traceback nor a `Work` that it was given."""

    def meet(self, store: dist.Store, timeout: timedelta) -> None:
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore(self.name, store), self.place, self.size, timeout)

    def part(self) -> None:
        self._gloo = None

    def exchange(self, state: State) -> list[State]:
        """Send each rank its slice of the rows; return this rank's slice of every rank's state, in their order."""
        slices: list[State] = [{} for _ in range(self.size)]
        for name, tensor in state.items():
            sizes = slice_sizes(len(tensor), self.size)
            own = sizes[self.place]
            received = tensor.new_empty((own * self.size, *tensor.shape[1:]))
            self._all_to_all(received, tensor, [own] * self.size, sizes)
            for place in range(self.size):
                slices[place][name] = received[own * place : own * (place + 1)]
        return slices

    def gather(self, state: State, n_rows: dict[str, int]) -> State:
        """Put slices together on the first rank; elsewhere the result has no rows.

        Args:
            state: this rank's slice.
            n_rows: rows of each whole tensor.
        """
        whole: State = {}
        for name, tensor in state.items():
            incoming = [0] * self.size if self.place else slice_sizes(n_rows[name], self.size)
            whole[name] = tensor.new_empty((sum(incoming), *tensor.shape[1:]))
            self._all_to_all(whole[name], tensor, incoming, [len(tensor)] + [0] * (self.size - 1))
        return whole

    def _all_to_all(self, out: Tensor, tensor: Tensor, out_rows: list[int], in_rows: list[int]) -> None:
        """`torch.distributed.all_to_all_single`."""
        tensor = tensor.contiguous()
        try:
            self._gloo.alltoall_base(out, tensor, out_rows, in_rows).wait()
        except RuntimeError as err:
            raise Disconnected(_first_line(err)) from None


def slice_sizes(n_rows: int, n_ranks: int) -> list[int]:
    """Rows in each rank's slice."""
    return [n_rows * (rank + 1) // n_ranks - n_rows * rank // n_ranks for rank in range(n_ranks)]


def _interface(store: dist.Store, size: int, timeout: timedelta) -> str | None:
    """The network interface by which other ranks reach this one; None: gloo may choose.

    It is the one of the way to the store's host; or, where that is this machine, the one of the way to a rank elsewhere.
    """
    address = _own_address_towards(os.environ["MASTER_ADDR"])
    if address and not address.is_loopback:
        store.set("elsewhere", str(address))
    _wait_for_all(store, "addressed", size, timeout)
    if address and address.is_loopback and store.check(["elsewhere"]):
        address = _own_address_towards(store.get("elsewhere").decode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if address and ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == address.packed:
                    return name
    return None


def _own_address_towards(host: str) -> IPv4Address | None:
    """Where another machine reaches this one, as far as the way there tells; None where it has only IPv6."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # of datagrams: it sends nothing
        return IPv4Address(probe.getsockname()[0])
    return None


@contextmanager
def _listening_on(interface: str | None) -> Iterator[None]:
    before = os.environ.get(INTERFACE)
    if interface:
        os.environ[INTERFACE] = interface
    try:
        yield
    finally:
        if interface and not before:
            del os.environ[INTERFACE]


def _wait_for_all(store: dist.Store, what: str, size: int, timeout: timedelta) -> None:
    if store.add(what, 1) == size:
        store.set(f"all {what}", "")
    store.wait([f"all {what}"], timeout)


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0].rstrip(".")
