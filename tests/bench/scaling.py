"""How the work divides among ranks: `python -m tests.bench.scaling`; `--parts` takes some of them.

    ranks    one rank on one core against two ranks on two, the same data: half of the one's time over the two's
    merge    bytes, memory and CPU time per rank of the exchange and gather, from 2 to 64 ranks, processes on loopback
    meeting  time, CPU time and bytes from the moment at which all ranks are there until all have met, up to 1,024 of them,
             which take 8 GB and three minutes of two cores

Answers are asserted: artifacts are the same bytes from one rank and from two, a merged state equals that of one process
which saw everything, and ranks that have met hear each other. Bytes are what the kernel counts on each process's own sockets,
memory is the peak of resident pages above what was there before. One JSON line a measurement.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median

import numpy as np
import torch

from saev_dist import extract
from saev_dist.accumulators.base import Codes
from saev_dist.accumulators.bundle import Bundle
from saev_dist.accumulators.histogram import Histogram
from saev_dist.accumulators.moments import Moments
from saev_dist.accumulators.reconstruction import Reconstruction
from saev_dist.accumulators.topk import TopK
from saev_dist.grid import Grid
from saev_dist.world import World
from tests.bench.extract import Case, bare_product_s, make_inputs
from tests.bench.forks import FORK, forget_peak, in_forks, status
from tests.bench.record import emit
from tests.ranks import artifact_hashes, run_cli

RANKS = Case(n_imgs=4_080)  # four full shards: two for each rank
WORLDS = (2, 4, 8, 16, 32, 64)
MEETINGS = (16, 64, 256, 1_024)
D_SAE, TOP_K, N_PATCHES, N_IMGS = 4_096, 32, 64, 8


# ---- ranks


def product_s(rounds: int) -> float:
    """Seconds of the bare product on one thread, beside whatever else the machine does."""
    random = torch.Generator().manual_seed(0)
    acts_td, w_ds = (
        torch.randn(16_384, RANKS.d_model, generator=random),
        torch.randn(RANKS.d_model, RANKS.d_sae, generator=random),
    )
    return sum(bare_product_s(acts_td, w_ds, torch.zeros(RANKS.d_sae), 2_048) for _ in range(rounds))


def measure_ranks(rounds: int) -> None:
    """Two ranks against one rank right before and after; and what the machine gives two bare products at once against one."""
    shares: dict[str, list[float]] = {"machine": [], "job": [], "stream": [], "command": []}
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_inputs(dpath, RANKS)

        def run_on(n_ranks: int) -> dict[str, float]:
            """Seconds of the command, of the job, and of the job's stages."""
            out, began, cores = dpath / f"run{n_ranks}", time.perf_counter(), os.sched_getaffinity(0)
            # A rank of one thread encodes on it, and counts and writes on another: it would take a part of a free core.
            os.sched_setaffinity(0, sorted(cores)[:n_ranks])
            flags = ("--shards", shards, "--sae", sae, "--out", out, "--device", "cpu", "--force", "--no-progress")
            done = run_cli("extract", *flags, n_ranks=n_ranks)
            command_s = time.perf_counter() - began
            os.sched_setaffinity(0, cores)
            assert done.returncode == 0, done.stderr
            manifest = json.loads((out / "manifest.json").read_text())
            assert manifest["world_size"] == n_ranks and manifest["machine"]["n_threads"] == 1
            wall = manifest["wall_s"]
            return {"command": command_s, "job": sum(wall.values())} | wall

        ones, twos = [run_on(1)], []
        for _ in range(rounds):
            (alone,), both = in_forks(product_s, (2,)), in_forks(product_s, (2,), (2,))
            shares["machine"].append(alone / max(both))
            twos.append(run_on(2))
            ones.append(run_on(1))
            assert artifact_hashes(dpath / "run1") == artifact_hashes(dpath / "run2")
            for stage in ("job", "stream", "command"):
                shares[stage].append((ones[-2][stage] + ones[-1][stage]) / 2 / twos[-1][stage] / 2)
    emit(
        "scaling",
        "scaling: two ranks of one thread",
        asdict(RANKS),
        ceiling="half of one rank's time",
        share=median(shares["job"]),
        **{f"{name}_shares": [round(share, 3) for share in values] for name, values in shares.items()},
        wall_s={
            name: [{stage: round(s, 2) for stage, s in wall.items()} for wall in walls]
            for name, walls in (("one", ones), ("two", twos))
        },
    )


# ---- merge


def fill(ranks: range) -> Bundle:
    """The state of what these ranks have seen: 32 codes on each token."""
    w_dec_sd = torch.zeros(D_SAE, 64)
    parts = {"topk": TopK(D_SAE, TOP_K, N_PATCHES, "patch"), "moments": Moments(D_SAE), "histogram": Histogram(D_SAE, 99.0)}
    bundle = Bundle(parts | {"reconstruction": Reconstruction(w_dec_sd, w_dec_sd[0])})
    for rank in ranks:
        rng, n_tokens = np.random.default_rng(rank), N_IMGS * N_PATCHES
        feature_n = np.sort((rng.integers(D_SAE, size=(n_tokens, 1)) + rng.permutation(D_SAE)[:32]) % D_SAE, axis=None)
        codes = Codes(
            token_n=torch.from_numpy(np.arange(n_tokens * 32) // 7 % n_tokens),
            feature_n=torch.from_numpy(feature_n),
            value_n=torch.from_numpy(rng.random(n_tokens * 32, np.float32) + 0.1),
            img_i=rank * N_IMGS,
            n_imgs=N_IMGS,
            n_patches=N_PATCHES,
            acts_bd=torch.from_numpy(rng.random((n_tokens, 64), np.float32)),
        )
        bundle.update(codes)
    bundle.flush()
    return bundle


def socket_bytes() -> tuple[int, int]:
    """Bytes that this process's open TCP connections have sent, as acknowledged, and received: the kernel's count."""
    sent = received = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(fd))) as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        except OSError:  # not a connection, or the listing itself
            continue
        sent, received = sent + int.from_bytes(info[120:128], "little"), received + int.from_bytes(info[128:136], "little")
    return sent, received


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def merge_rank(rank: int, n_ranks: int, port: int) -> dict[str, float]:
    """One rank's part in the merge of `n_ranks`, and its cost."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    bundle = fill(range(rank, rank + 1))
    with World(timeout_s=100) as world:
        world.wait()
        forget_peak()
        resident, (sent, received), cpu_s = status("VmRSS"), socket_bytes(), time.process_time()
        whole = extract._merge(bundle, world)
        cpu_s, peak = time.process_time() - cpu_s, status("VmHWM")
        world.wait()
        sent, received = (after - before for after, before in zip(socket_bytes(), (sent, received), strict=True))
        if rank == 0:
            expected = fill(range(n_ranks)).state_dict()
            assert all(torch.equal(expected[name], tensor) for name, tensor in whole.state_dict().items())
        world.wait()
    state = sum(tensor.nbytes for tensor in bundle.state_dict().values())
    figures = {"sent": sent / state, "received": received / state, "peak": (peak - resident) / state}
    return figures | {"cpu_s": cpu_s, "state_mb": state / 1e6}


def measure_merge() -> None:
    """All world sizes; sent and received in states: what a rank sends is its state less its own slice, then its merged slice,
    or that of its column."""
    rows = []
    for n_ranks in WORLDS:
        port = free_port()
        first, *others = in_forks(merge_rank, *((rank, n_ranks, port) for rank in range(n_ranks)))
        groups = Grid(0, n_ranks).groups
        hands_on = 1 / groups[0].size if len(groups) == 2 else 1 / n_ranks
        law = {"sent0": 1 - 1 / n_ranks, "received0": 2 - 2 / n_ranks}
        law |= {"sent": 1 - 1 / n_ranks + hands_on, "received": 1 - 2 / n_ranks + hands_on}
        row = {"ranks": n_ranks, "sent0": first["sent"], "received0": first["received"], "peak0": first["peak"]}
        row |= {key: max(other[key] for other in others) for key in ("sent", "received", "peak", "cpu_s")}
        assert all(abs(row[key] - expected) < 0.02 for key, expected in law.items()), (row, law)
        rows.append({key: round(value, 3) for key, value in row.items()})
    shapes = {"d_sae": D_SAE, "top_k": TOP_K, "state_mb": round(first["state_mb"], 1)}
    law_words = (
        "in states, n ranks in rows of w: rank 0 sends 1 - 1/n and receives 2 - 2/n; another sends at most 1 - 1/n + 1/w "
        "and receives 1 - 2/n + 1/w; where all are in one group 1 and 1 - 1/n"
    )
    emit("scaling", "scaling: merge, per rank", shapes, law=law_words, rows=rows)


# ---- meeting


def meeting_rank(rank: int, n_ranks: int, port: int, start: Barrier) -> dict[str, float]:
    """One rank's part in a meeting of `n_ranks`, and its cost."""
    # torch looks its peer's name up, for messages: a resolver that does not know it costs the meeting 10 s, this one at most 1
    os.environ["RES_OPTIONS"] = "attempts:1 timeout:1"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start.wait()
    began, cpu_s = time.perf_counter(), time.process_time()
    with World(timeout_s=300) as world:
        world.wait()
        seconds, cpu_s, (sent, received) = time.perf_counter() - began, time.process_time() - cpu_s, socket_bytes()
        whole = world.merge({"ranks": torch.ones(n_ranks)}, lambda states: {"ranks": sum(state["ranks"] for state in states)})
        assert rank or torch.equal(whole["ranks"], torch.full((n_ranks,), float(n_ranks)))
    return {"seconds": seconds, "cpu_s": cpu_s, "sent_mb": sent / 1e6, "received_mb": received / 1e6}


def measure_meeting() -> None:
    """Rank 0, which hosts the store, and the most of any other rank. The CPU time is what counts: all share these cores."""
    rows = []
    for n_ranks in MEETINGS:
        port, start = free_port(), FORK.Barrier(n_ranks)
        first, *others = in_forks(meeting_rank, *((rank, n_ranks, port, start) for rank in range(n_ranks)))
        row = {"ranks": n_ranks, "seconds": first["seconds"]}
        for key in ("cpu_s", "sent_mb", "received_mb"):
            row |= {f"{key}0": first[key], key: max(other[key] for other in others)}
        rows.append({key: round(value, 3) for key, value in row.items()})
    emit("scaling", "scaling: meeting", {}, n_cores=len(os.sched_getaffinity(0)), rows=rows)


PARTS = {"ranks": measure_ranks, "merge": lambda rounds: measure_merge(), "meeting": lambda rounds: measure_meeting()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    torch.set_num_threads(1)
    args = parser.parse_args()
    for part in args.parts:
        PARTS[part](args.rounds)


if __name__ == "__main__":
    main()
