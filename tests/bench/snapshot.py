"""What a snapshot costs: `python -m tests.bench.snapshot`.

A run at the headline shape writes a snapshot after every batch, on the main thread, so that its whole cost shows:
flushing and syncing rows, hashing and writing the state, the renames. In a run that takes one every 300 s another thread
does it, which may also have to wait for some of the last 64 MB of rows. The ceiling is a bare write and fsync of as many
bytes, before and after. The last snapshot is read through. One JSON line on stdout.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from saev_dist import partials
from saev_dist.config import Extract
from saev_dist.extract import run
from tests.bench.extract import Case, make_inputs
from tests.bench.record import emit


def bare_write_s(dpath: Path, n_bytes: int) -> float:
    """Seconds to write and sync a file."""
    data = os.urandom(n_bytes)
    began = time.perf_counter()
    with open(dpath / "bare", "wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    case = Case(n_imgs=64, n_patches=1_920, d_model=256, d_sae=16_384)
    n_batches = case.n_tokens // case.batch_tokens
    sizes: list[int] = []
    checked_s = 0.0
    write = partials.write

    def noting(dpath: Path, partial: partials.Partial, state: partials.State) -> None:
        nonlocal checked_s
        write(dpath, partial, state)
        began = time.perf_counter()
        sizes.append((dpath / partial.name).stat().st_size)
        if len(sizes) == n_batches:  # the files are gone when the run is done
            kept, _ = partials.load(dpath / partial.name)
            assert partials.fault(dpath / partial.name) == "" and kept.segments[-1].stop == n_batches
        checked_s += time.perf_counter() - began

    partials.write = noting
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_inputs(dpath, case)
        bare = [bare_write_s(dpath, 93_000_000) for _ in range(2)]
        run(Extract(shards=shards, sae=sae, out=dpath / "run", top_k=case.top_k, device="cpu", snapshot_every=0))
        assert len(sizes) == n_batches
        bare += [bare_write_s(dpath, max(sizes)) for _ in range(2)]
        rank = json.loads((dpath / "run/manifest.json").read_text())["ranks"][0]
    each_s = (rank["snapshot_s"] - checked_s) / n_batches
    emit(
        "snapshot",
        "a snapshot that stops the stream, every 300 s",
        asdict(case),
        ceiling="a bare write and fsync of as many bytes",
        share=median(bare) / each_s,
        partial_mb=round(max(sizes) / 1e6, 1),
        n_snapshots=len(sizes),
        snapshot_s=round(each_s, 3),
        bare_write_s=[round(seconds, 3) for seconds in bare],
        share_of_300_s=round(each_s / 300, 5),
    )


if __name__ == "__main__":
    main()
