"""What a snapshot costs: `python -m tests.bench.snapshot`.

A run at the headline shape writes a snapshot after every batch, on the main thread, so that its whole cost shows:
flushing and syncing rows, hashing and writing the state, the renames. As a share of a run that takes one every 300 s this
is an upper bound, since there another thread writes. The ceiling is a bare write and fsync of as many bytes, before and
after. One JSON line on stdout.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from saev_dist import partials
from saev_dist.config import Extract
from saev_dist.extract import run
from tests.bench.extract import cpu_model, make_inputs


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
    parser.add_argument("--n-imgs", type=int, default=64)
    parser.add_argument("--n-patches", type=int, default=1_920)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=128)
    args = parser.parse_args()
    sizes: list[int] = []
    write = partials.write

    def noting(dpath: Path, partial: partials.Partial, state: partials.State) -> None:
        write(dpath, partial, state)
        sizes.append((dpath / partial.name).stat().st_size)

    partials.write = noting  # the files are gone when the run is done
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_inputs(dpath, args.n_imgs, args.n_patches, args.d_model, args.d_sae, args.k)
        run(Extract(shards=shards, sae=sae, out=dpath / "run", top_k=args.top_k, device="cpu", snapshot_every=0))
        bare = [bare_write_s(dpath, max(sizes)) for _ in range(3)]
        rank = json.loads((dpath / "run/manifest.json").read_text())["ranks"][0]
    each_s = rank["snapshot_s"] / len(sizes)
    result = {
        "bench": "snapshot",
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "shapes": vars(args),
        "partial_mb": round(max(sizes) / 1e6, 1),
        "n_snapshots": len(sizes),
        "snapshot_s": round(each_s, 3),
        "bare_write_s": [round(seconds, 3) for seconds in bare],
        "share_of_300_s": round(each_s / 300, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
