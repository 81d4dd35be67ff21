"""The reader over a bare sequential read of the same bytes: `python -m tests.bench.read`.

`data.reader.Reader`, as `extract` makes it, delivers every batch to a consumer that does nothing. The ceiling is one thread
that reads the same bytes in the same order, `PIECE_BYTES` at a time, and fills as much memory as the reader's buffers take,
in turn; both begin without memory, which a virtual machine may get more slowly than it reads. It is taken right before and
right after each reading; the share is the median over the rounds. `of_cached` is the share of the same thread's speed where
it throws each piece away, so that its buffer stays in the CPU's cache.

Warm: all of it is in the page cache. Cold: synced and dropped with posix_fadvise before each pass over the files, asserted by
the bytes that the kernel then fetched. The host of a virtual machine has caches out of sight, and hands its disk out in bursts:
who reads faster finds less of it left in the next second. So the same reading, cold as well, goes untimed before each timed
one, which goes over the files until bursts are even. What is delivered is checked against NumPy, and what the reader asks for
against what is wanted, outside of the timed part. One JSON line a case.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch

from saev_dist.config import Extract
from saev_dist.data.reader import MAX_GAP_BYTES, Reader, buffer_examples, most_buffers
from saev_dist.data.shards import Shards, ShardWriter
from saev_dist.plan import Plan
from tests.bench.record import emit

PIECE_BYTES = 1 << 20  # the fastest of 128 KB to 64 MB here, warm; cold, there is no difference
READ_BYTES = 10e9  # a reading goes over the files again until it has read as much
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Layout:
    """Shapes of a shard directory, as ViT-B/16 gives them."""

    n_shards: int
    examples_per_shard: int
    n_layers: int = 1
    cls_token: bool = False
    n_patches: int = 196
    d_model: int = 768


FEW_BIG = "few big shards"
LAYOUTS = {
    FEW_BIG: Layout(4, 664),  # 8 batches each
    "few big shards, CLS between": Layout(4, 664, cls_token=True),
    "one of 12 layers, CLS": Layout(2, 166, n_layers=12, cls_token=True),
    "200 shards of 10 images": Layout(200, 10),
    "2,000 shards of one image": Layout(2_000, 1),
}
DEPTHS = (1, 2, 3, 4, 8)


def write_shards(dpath: Path, layout: Layout) -> Shards:
    """Noise in which every example and layer is marked, on the disk; one of its layers, opened."""
    n_tokens = layout.n_patches + layout.cls_token
    noise_eltd = np.random.default_rng(0).standard_normal((10, layout.n_layers, n_tokens, layout.d_model), np.float32)
    with ShardWriter(
        dpath, family="bench", ckpt="noise", layers=range(layout.n_layers), content_tokens_per_example=layout.n_patches,
        d_model=layout.d_model, cls_token=layout.cls_token, max_tokens_per_shard=layout.examples_per_shard * layout.n_layers * n_tokens,
    ) as writer:  # fmt: skip
        n_examples = layout.n_shards * layout.examples_per_shard
        for first in range(0, n_examples, len(noise_eltd)):
            noise_eltd[..., 0] = np.arange(first, first + len(noise_eltd))[:, None, None]
            noise_eltd[..., 1] = np.arange(layout.n_layers)[:, None]
            writer.write(noise_eltd[: n_examples - first])
    os.sync()
    return Shards.open(dpath, layer=layout.n_layers // 2)


def make_reader(shards: Shards, depth: int, n_passes: int = 1) -> Reader:
    """As `extract` has it, over all batches, `n_passes` times."""
    plan = Plan(shards.examples, max(1, Extract.batch_tokens // shards.n_patches))
    return Reader(shards, plan, ((0, plan.n_batches),) * n_passes, depth=depth)


def read(shards: Shards, depth: int, n_passes: int) -> None:
    for _ in make_reader(shards, depth, n_passes):
        pass


def read_bare(shards: Shards, n_bytes: int, n_passes: int) -> None:
    """What the reader is held against: a buffer of so many bytes, filled again and again. Small gaps are read as well."""
    # from torch, which aligns it: a bytearray is filled at half the speed
    buffer = memoryview(torch.empty(n_bytes, dtype=torch.uint8).numpy().data)
    filled, whole = 0, shards.example_bytes - shards.content_bytes <= MAX_GAP_BYTES
    for _ in range(n_passes):
        for name, n_examples in zip(shards.names, shards.examples, strict=True):
            fd = os.open(shards.dpath / name, os.O_RDONLY)
            for example_i in range(1 if whole else n_examples):
                low = 0 if whole else shards.content_offset(example_i)
                high = n_examples * shards.example_bytes if whole else low + shards.content_bytes
                for at in range(low, high, PIECE_BYTES):
                    size = min(PIECE_BYTES, high - at)
                    filled = filled if filled + size <= len(buffer) else 0
                    assert os.preadv(fd, [buffer[filled : filled + size]], at) == size
                    filled += size
            os.close(fd)


def io_counters() -> dict[str, int]:
    """Bytes that this process asked for (`rchar`), and that the kernel fetched for it from the disk (`read_bytes`)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def drop(shards: Shards) -> None:
    """Take the files out of the page cache; they are on the disk."""
    for name in shards.names:
        fd = os.open(shards.dpath / name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def rate(shards: Shards, work: Callable[[int], None], *, cold: bool) -> float:
    """GB/s of wanted bytes of `work(n_passes)`: from the disk, or from the page cache, or the bench stops."""
    n_bytes = shards.n_examples * shards.content_bytes
    n_passes = round(READ_BYTES / n_bytes)
    if not cold:
        seconds, fetched = timed(work, n_passes)
        assert fetched < 0.01 * n_passes * n_bytes, f"fetched {fetched:,} bytes"
        return n_passes * n_bytes / seconds / 1e9
    total_s = 0.0
    for pass_i in range(1 + n_passes):
        drop(shards)
        seconds, fetched = timed(work, 1)
        assert fetched >= 0.99 * n_bytes, f"fetched {fetched:,} of {n_bytes:,} bytes"
        total_s += seconds if pass_i else 0
    return n_passes * n_bytes / total_s / 1e9


def timed(work: Callable[[int], None], n_passes: int) -> tuple[float, int]:
    """Seconds of `work(n_passes)`, and the bytes that the kernel fetched for it from the disk."""
    before, began = io_counters()["read_bytes"], time.perf_counter()
    work(n_passes)
    return time.perf_counter() - began, io_counters()["read_bytes"] - before


def check(shards: Shards, depth: int) -> dict[str, int]:
    """What the reader delivers is what NumPy reads; from a cold start it takes no more of the disk than it says."""
    drop(shards)
    got, expected = hashlib.sha256(), hashlib.sha256()
    before = io_counters()
    for _, acts_bd in make_reader(shards, depth):
        got.update(acts_bd.numpy().data)
    asked, fetched = (io_counters()[name] - before[name] for name in ("rchar", "read_bytes"))
    shape = (-1, len(shards.layers), shards.n_patches + shards.cls_token, shards.d_model)
    for name in shards.names:
        for acts_ltd in np.memmap(shards.dpath / name, "<f4", "r").reshape(shape):
            expected.update(acts_ltd[shards.layers.index(shards.layer), shards.cls_token :].data)
    assert got.digest() == expected.digest(), "the reader delivers something else"
    wanted, gap = shards.n_examples * shards.content_bytes, shards.example_bytes - shards.content_bytes
    most = wanted + shards.n_examples * (gap if gap <= MAX_GAP_BYTES else 0)
    edges = 2 * PAGE_BYTES * (shards.n_examples + 2 * len(shards.names))  # whole pages, and the files' own
    assert wanted <= asked <= most + 2 * PAGE_BYTES, f"asked for {asked:,} bytes, wants {wanted:,}"  # and /proc itself
    assert fetched <= most + edges, f"fetched {fetched:,} bytes, wants {wanted:,}"
    return {"wanted_bytes": wanted, "asked_bytes": asked, "fetched_bytes": fetched}


def measure(what: str, shards: Shards, big: Shards, depth: int, rounds: int) -> None:
    """Print the two lines of one case."""
    checked = check(shards, depth)
    reader = make_reader(shards, depth)
    n_examples = most_buffers(reader.plan, shards, depth, reader.hold) * buffer_examples(reader.plan, shards)
    small, large = PIECE_BYTES, max(PIECE_BYTES, n_examples * shards.content_bytes)
    for cold in (False, True):
        if not cold:  # into the page cache by the same hand: how it got there decides how fast it comes out
            for each in (shards, big):
                drop(each)
                read_bare(each, small, 1)
        bare, ours = [rate(shards, lambda n: read_bare(shards, large, n), cold=cold)], []
        of_cached, of_big, bare_of_big = [], [], []
        for _ in range(rounds):
            ours.append(rate(shards, lambda n: read(shards, depth, n), cold=cold))
            bare.append(rate(shards, lambda n: read_bare(shards, large, n), cold=cold))
            of_cached.append(ours[-1] / rate(shards, lambda n: read_bare(shards, small, n), cold=cold))
            if len(shards.names) > len(big.names):
                of_big.append(ours[-1] / rate(big, lambda n: read(big, depth, n), cold=cold))
                bare_of_big.append(bare[-1] / rate(big, lambda n: read_bare(big, large, n), cold=cold))
        shares = [2 * rate / (a + b) for (a, b), rate in zip(pairwise(bare), ours, strict=True)]
        emit(
            "read",
            f"read, {'cold' if cold else 'warm'}: {what}, read-ahead {depth}",
            asdict(LAYOUTS[what]) | {"read_ahead": depth, "cold": cold},
            ceiling="a bare sequential read of the same bytes into as much memory, one thread",
            share=median(shares),
            shares=[round(share, 3) for share in shares],
            of_cached=round(median(of_cached), 3),
            **({"of_few_big": round(median(of_big), 3), "bare_of_few_big": round(median(bare_of_big), 3)} if of_big else {}),
            reader_gb_per_s=[round(value, 2) for value in ours],
            bare_gb_per_s=[round(value, 2) for value in bare],
            **checked,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=LAYOUTS, help="default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        big = write_shards(Path(name) / "big", LAYOUTS[FEW_BIG])
        for what in args.layouts:
            with tempfile.TemporaryDirectory(dir=name) as other:
                shards = big if what == FEW_BIG else write_shards(Path(other), LAYOUTS[what])
                for depth in DEPTHS if what == FEW_BIG else (Extract.read_ahead,):
                    measure(what, shards, big, depth, args.rounds)


if __name__ == "__main__":
    main()
