"""The ranks of a run: who there is, how they fail together, and how they merge their states.

With `grid` the only file that imports torch.distributed. A single process has no process group at all. Elsewhere (torchrun,
srun) the ranks meet through the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), exchange CPU tensors
with gloo, and share a small key-value store. The store carries what must not hang: the first error, and the waits
between phases, in which a rank may be hours ahead of another.
"""

import itertools
import json
import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

from saev_dist.errors import ConfigError, PeerError, Preempted, RunError
from saev_dist.grid import INTERFACE, Disconnected, Grid, State
from saev_dist.identity import contrast, differing
from saev_dist.signals import Signals

CHECK_EVERY_S = 1.0
ASKS_PER_S = 300  # of all ranks that wait: few ranks may ask often, many must not keep rank 0 busy
ACKNOWLEDGE_S = 10.0
BEAT_S = 2.0
LOST_AFTER_S = 15.0
SLEPT_S = 2.0
"""A rank that looks this much later than planned stood still itself, as all do in a job that was suspended: what it sees then
says nothing about the others."""
RESTART_PATIENCE_S = 120.0
"""How long a restarted job waits for its former attempt's lock: a node that crashed keeps it until its NFS lease expires."""
LEAVE_S = 60.0
MAX_PORT = 65_535
MAX_VALUE = 4 * 2**20
"""Bytes in a value of the store, which hangs up on those of more than 8 MiB (MAX_PAYLOAD_LEN of torch's TCPStore)."""
STORE_ERRORS = (ConnectionError, RuntimeError)  # what a store raises when its host is gone


class World:
    """This process among its peers. Use as a context; on the way out an error is made known to the peers.

    Inside `obeying_signals`, `check`, `wait` and all that waits also raise `Preempted` once a signal has asked this
    process or a peer to leave.

    Args:
        timeout_s: longest wait inside one collective operation.
    """

    def __init__(self, timeout_s: int) -> None:
        self.rank = _env("RANK", 0)
        self.size = _env("WORLD_SIZE", 1, least=1)
        self.local_rank = _env("LOCAL_RANK", _env("SLURM_LOCALID", 0))
        self._knows_place = self.size == 1 or not {"LOCAL_RANK", "SLURM_LOCALID"}.isdisjoint(os.environ)
        self.local_size = _env("LOCAL_WORLD_SIZE", 1, least=1)
        self._timeout = timedelta(seconds=timeout_s)
        self._store: dist.Store | None = None
        self._grid = Grid(self.rank, self.size)
        self._n_phases = 0
        self._checked = time.monotonic()
        self._left = threading.Event()
        self._lost = ""
        self._has_lost = False
        self._signals = Signals(self.rank)
        self._catching = ExitStack()

    @contextmanager
    def obeying_signals(self, kept: Path, *, last: str = "this batch and a snapshot") -> Iterator[None]:
        """Leave in an orderly way when a signal asks for it. Signals are caught until the world is left: a rank that leaves
        because of another's may have its own while it still waits for the others.

        Args:
            kept: where what is done is kept, for the message.
            last: what is still done before that, for the message.

        Raises:
            Preempted: on every rank, once one of them has had a signal.
        """
        self._signals.last = last
        self._catching.enter_context(self._signals)
        try:
            yield
        except Preempted as err:
            if not os.path.exists(kept):
                raise Preempted(f"{err}: stopped before anything was done. Run the same command again.") from None
            what = "what was done before the last snapshot" if self._has_lost else "what is done"
            raise Preempted(
                f"{err}: stopped, and {what} is kept in {kept}. "
                "Run the same command again, on any number of ranks, to continue."
            ) from None

    def note_loss(self) -> None:
        """The disk did not take this rank's last snapshot: where ranks leave now, nobody is to say that all is kept."""
        if not self._has_lost and self._store is not None:
            with suppress(*STORE_ERRORS):
                self._store.set("loss", f"rank {self.rank}")
                self._store.add("losses", 1)
        self._has_lost = True

    @property
    def restarted(self) -> bool:
        """Whether torchrun or Slurm has started this job before, so that it goes on with what an earlier attempt began."""
        return _env("TORCHELASTIC_RESTART_COUNT", 0) > 0 or _env("SLURM_RESTART_COUNT", 0) > 0

    @property
    def patience_s(self) -> float:
        """How long to wait for the run's lock."""
        return RESTART_PATIENCE_S if self.restarted else 0.0

    @property
    def job_id(self) -> str | None:
        """What Slurm or torchrun call this job, in all its attempts; None where neither knows."""
        found = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
        if found != "none":
            return found
        # Torchrun's default, of all jobs. Its own process starts each attempt; the number alone may be another's later.
        agent = os.getppid()
        with suppress(OSError):
            since = Path(f"/proc/{agent}/stat").read_text().rsplit(")", 1)[1].split()[19]  # proc(5): starttime
            return f"{platform.node()} {agent} {since}"
        return None

    def __enter__(self) -> Self:
        if self.rank and "WORLD_SIZE" not in os.environ:
            raise ConfigError(f"RANK is {self.rank} but WORLD_SIZE is not set; start the ranks with torchrun.")
        if self.rank >= self.size:
            raise ConfigError(f"RANK is {self.rank} of WORLD_SIZE {self.size}; ranks count from 0. Start them with torchrun.")
        if self.size == 1:
            return self
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigError(f"WORLD_SIZE is {self.size} but {', '.join(missing)} is not set; start the ranks with torchrun.")
        if _env("MASTER_PORT", 0, least=1) > MAX_PORT:
            raise ConfigError(f"environment variable MASTER_PORT is {os.environ['MASTER_PORT']}; ports end at {MAX_PORT:,}.")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # rank 0 holds a connection to each rank
        try:
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.size, timeout=self._timeout))
            # After a restart by torchrun the store still holds the keys of the attempt before.
            attempt = _env("TORCHELASTIC_RESTART_COUNT", 0)
            self._store = dist.PrefixStore(f"saev_dist/{attempt}", store)
            self._grid.meet(self._store, self._timeout)
            self._watcher = threading.Thread(target=self._watch, args=(self._store,), daemon=True, name="watch")
            self._watcher.start()
        except (Disconnected, *STORE_ERRORS) as err:
            self._grid.part()
            said, first = self._why_not_met(err), True
            with suppress(*STORE_ERRORS):
                if self._store is not None:  # who comes too late is to know, and not to wait for this rank
                    first = self._is_first_to_fail(said)
                    self._store.add("gone", 1)
            raise (RunError if first else PeerError)(said) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        with self._catching:
            self._leave(err)

    def _leave(self, err: BaseException | None) -> None:
        if self._store is None:
            return
        self._left.set()
        self._watcher.join(ACKNOWLEDGE_S)
        first, dead, loss = True, list[int](), ""
        with suppress(*STORE_ERRORS):
            if err is not None and not isinstance(err, (PeerError, Preempted)):
                first = self._is_first_to_fail(str(err))
            # A peer that waits for this rank inside a collective must not wait until it has lingered: gloo tells it now.
            self._grid.part()
            # Whoever hosts the store must not take it away before the others have read it, and a launcher that sees
            # a rank fail ends the others: it may not do so while they write their last partials.
            n_gone = self._store.add("gone", 1)
            until = time.monotonic() + (LEAVE_S if isinstance(err, Preempted) else ACKNOWLEDGE_S)
            lingers = self.rank == 0 or not (err is None or isinstance(err, PeerError))
            looks = _look_for_dead(self._store, range(self.size), max(BEAT_S, self.size**2 / ASKS_PER_S))  # all may be looking
            while lingers and n_gone < self.size - max(bool(self._lost), len(dead)) and time.monotonic() < until:
                time.sleep(max(0.05, min(CHECK_EVERY_S, self.size / ASKS_PER_S)))
                n_gone, dead = self._store.add("gone", 0), next(looks)
            if isinstance(err, Preempted) and not self._has_lost and self._store.check(["loss"]):
                n = self._store.add("losses", 0)
                whose = f"{n} ranks" if n > 1 else self._store.get("loss").decode()
                loss = f" (But the disk did not take the last snapshot of {whose}: what came since the one before is lost.)"
        self._grid.part()  # also where the store is gone
        self._store = None
        if not first:  # the same fault was found, and shown, by another rank
            raise PeerError(str(err)) from err
        if dead and isinstance(err, Preempted):  # torchrun asks all to leave when one of them has died
            raise Preempted(f"{err} ({_died(dead[0], self.size)}){loss}") from err
        if loss:
            raise Preempted(f"{err}{loss}") from err

    def _why_not_met(self, err: Exception) -> str:
        if isinstance(err, Disconnected):
            return (
                f"could not connect with other ranks ({err}). Set {INTERFACE} to the name of a network interface by which all "
                "machines reach each other, on each of them."
            )
        first, limit_s = str(err).splitlines()[0].rstrip("."), self._timeout.total_seconds()
        return (
            f"could not meet all {self.size} ranks ({first}; the limit is {limit_s:.0f} s, --timeout-s). Start all "
            "ranks with the same MASTER_ADDR and MASTER_PORT, a port that nothing else uses."
        )

    def _is_first_to_fail(self, message: str) -> bool:
        """Make it known to the peers, unless one of them has failed already."""
        assert self._store is not None
        if self._store.add("errors", 1) > 1:
            return False
        self._store.set("error", f"rank {self.rank}: {message}")
        return True

    def device(self, wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
        """This rank's device: its own GPU by local rank, also where the cluster shows each rank only one.

        Raises:
            ConfigError: CUDA is asked for and absent, or there are more local ranks than GPUs, or none knows its number. (Where
            only one GPU is visible it is taken for this rank's own.)
        """
        if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise ConfigError(
                "--device cuda, but torch sees no GPU here; use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES."
            )
        n_gpus = torch.cuda.device_count()
        if n_gpus > 1 and not self._knows_place:
            raise ConfigError(
                f"rank {self.rank} cannot tell which of {n_gpus} GPUs is its own: set LOCAL_RANK, its number among those on "
                "this machine, as torchrun does."
            )
        if n_gpus > 1 and self.local_rank >= n_gpus:
            raise ConfigError(
                f"local rank {self.local_rank} has no GPU of its own: torch sees {n_gpus}. Start one rank per GPU."
            )
        device = torch.device("cuda", self.local_rank if n_gpus > 1 else 0)
        torch.cuda.set_device(device)
        return device

    def check(self) -> None:
        """Raise PeerError if another rank has failed, Preempted if ranks should leave. Asks peers at most once a second."""
        if not self._signals.received and time.monotonic() - self._checked < CHECK_EVERY_S:
            return
        self._checked = time.monotonic()
        self._ask(lambda store: None)

    def wait(self) -> None:
        """Return when all ranks are here; raise PeerError when one fails on its way. No timeout: peers may need hours."""
        self._n_phases += 1
        key, delay_s = f"phase{self._n_phases}", 0.01
        n_here = self._ask(lambda store: store.add(key, 1))
        while n_here is not None and n_here < self.size:
            time.sleep(delay_s)
            delay_s = min(CHECK_EVERY_S, self.size / ASKS_PER_S, 1.5 * delay_s)
            n_here = self._ask(lambda store: store.add(key, 0))

    def finish(self) -> None:
        """Wait until rank 0 has put the result in place. A signal is passed on to rank 0, and obeyed if rank 0 obeys it.
        Where rank 0 has begun to replace files it does not look for signals and dead peers any more: they come too late to
        make a finished job a failed one."""
        if self._store is None:
            return
        if self.rank == 0:
            with suppress(*STORE_ERRORS):
                self._store.set("finished", "")
            return
        while True:
            has_left, is_finished = self._ask(_look_at_rank_0, obey=False)  # in this order
            if is_finished:
                return
            if has_left:
                self._ask(lambda store: None)  # raises what rank 0 has left for, as soon as it has said so
            time.sleep(min(CHECK_EVERY_S, self.size / ASKS_PER_S))

    def tell(self, message: Any = None) -> Any:
        """Rank 0's `message` (JSON), on every rank, once all are here."""
        key = f"message{self._n_phases}"
        if self.rank == 0:
            self._ask(lambda store: _put(store, key, message))
        self.wait()
        return message if self._store is None else self._ask(lambda store: _get(store, key))

    def agree(self, identity: dict[str, Any], *, would: str, advice: str) -> None:
        """Raise RunError unless rank 0 does the same: on another node a path may lead to other files, or there is no GPU.

        Args:
            identity: what the bytes depend on.
            would: what this rank would do otherwise, for the message.
            advice: what to do about it, the same.
        """
        first = self.tell(identity)
        if names := differing(identity, first):
            here, there = contrast(identity.get(names[0]), first.get(names[0]), most=200)
            raise RunError(f"it would {would} than rank 0: {names[0]} is {here} here, {there} there. {advice}")

    def collect(self, report: Any) -> list[Any]:
        """Every rank's `report` (JSON) in rank order, once all are here; on ranks other than 0 an empty list."""
        key = f"report{self._n_phases}"
        self._ask(lambda store: _put(store, f"{key}/{self.rank}", report))
        self.wait()
        if self.size == 1:
            return [report]
        ranks = range(self.size if self.rank == 0 else 0)
        reports: list[Any] = self._ask(lambda store: [_get(store, f"{key}/{rank}") for rank in ranks])
        return reports

    def merge(self, state: State, merge: Callable[[list[State]], State]) -> State:
        """All ranks' states as one, on rank 0; elsewhere the result has no rows. See `Grid.merge`."""
        try:
            return self._grid.merge(state, merge)
        except Disconnected as err:
            # A peer that failed closes its connections. Its own error, or its silence, says more than gloo does.
            # Who watches it counts its silence anew after standing still itself, so there is time for several such counts.
            pause_s = max(0.1, min(CHECK_EVERY_S, self.size / ASKS_PER_S))
            for _ in range(int(4 * LOST_AFTER_S / pause_s)):  # looks, and no clock: this rank may stand still, too
                lost = self._ask(lambda store: store.get("lost").decode() if store.check(["lost"]) else "")
                self._lost = lost or self._lost
                time.sleep(pause_s)
            raise RunError(f"lost contact with another rank in the merge: {err}") from None

    def _watch(self, store: dist.Store) -> None:
        """Give a sign of life, and watch the next rank's: each rank is watched by one, whatever the world size."""
        looks = _look_for_dead(store, [(self.rank + 1) % self.size], BEAT_S)
        with suppress(*STORE_ERRORS):
            for n_beats in itertools.count(1):
                if self._left.wait(BEAT_S):
                    break
                store.set(f"beat/{self.rank}", str(n_beats))
                if dead := next(looks):
                    self._lost = _died(dead[0], self.size)
                    store.set("lost", self._lost)  # for those that exchanged with it: this rank may be waiting for one of them
            store.set(f"beat/{self.rank}", "left")

    def _ask(self, question: Callable[[dist.Store], Any], *, obey: bool = True) -> Any:
        """Put a question to the store, after a look at whether a peer has failed. None in a single process.

        Args:
            obey: raise Preempted when ranks have been asked to leave.
        """
        signal = self._signals.received
        if self._store is None:
            if signal:
                raise Preempted(signal)
            return None
        if self._lost:
            raise RunError(self._lost)
        try:
            if self._store.check(["error"]):
                raise PeerError(self._store.get("error").decode())
            if signal:
                self._store.set("leave", f"{signal} on rank {self.rank}")
            if obey and self._store.check(["leave"]):
                raise Preempted(self._store.get("leave").decode())
            return question(self._store)
        except STORE_ERRORS as err:
            first = str(err).splitlines()[0]
            raise RunError(
                f"lost contact with the host of all ranks' store: rank 0, or torchrun on its node, died "
                f"({first}). Run the same command again to continue."
            ) from None


def _look_for_dead(store: dist.Store, ranks: Sequence[int], every_s: float) -> Iterator[list[int]]:
    """On each call, those ranks that neither left nor gave a sign of life; the store is read every `every_s` at most."""
    looked = now = time.monotonic()
    last, since = dict.fromkeys(ranks, b""), dict.fromkeys(ranks, now)
    dead: list[int] = []
    while True:
        now = time.monotonic()
        if now - looked > every_s:
            has_slept, looked = now - looked > every_s + SLEPT_S, now
            for rank in ranks:
                beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
                if beat != last[rank] or has_slept:
                    last[rank], since[rank] = beat, now
            dead = [rank for rank in ranks if last[rank] != b"left" and now - since[rank] > LOST_AFTER_S]
        yield dead


def _put(store: dist.Store, key: str, message: Any) -> None:
    """Hand JSON over, in parts that the store takes. The first says how many there are."""
    text = json.dumps(message)
    first, *others = [text[start : start + MAX_VALUE] for start in range(0, len(text), MAX_VALUE)]
    for number, part in enumerate(others, 1):
        store.set(f"{key}+{number}", part)
    store.set(key, f"{len(others)} {first}")


def _get(store: dist.Store, key: str) -> Any:
    n_others, _, first = store.get(key).decode().partition(" ")
    return json.loads(first + "".join(store.get(f"{key}+{number}").decode() for number in range(1, int(n_others) + 1)))


def _look_at_rank_0(store: dist.Store) -> tuple[bool, bool]:
    """Whether it has left, and whether it had finished."""
    has_left = store.check(["beat/0"]) and store.get("beat/0") == b"left"
    return has_left, store.check(["finished"])


def _died(rank: int, size: int) -> str:
    return f"rank {rank} of {size} died or hangs: no sign of life for {LOST_AFTER_S:.0f} s. Run the same command again."


def _env(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"environment variable {name} is {text!r}; it should be an integer of at least {least}.")
    return int(text)
