"""Run the program as users do: in processes of its own, one or several ranks under torchrun."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

# One thread everywhere, as torchrun does by itself: several ranks share the test machine's cores.
ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_cli(
    *args: object, n_ranks: int = 1, n_threads: int = 1, timeout_s: float = 300, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `saev-dist ARGS`: plain for one rank, under torchrun for several. A hang fails the test."""
    launcher: list[str] = []
    if n_ranks > 1 or torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command = [sys.executable, *launcher, "-m", "saev_dist", *map(str, args)]
    env = ENV | {"OMP_NUM_THREADS": str(n_threads)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)


def artifact_hashes(dpath: Path) -> dict[str, str]:
    """SHA-256 of every file of a finished run but the manifest, which holds times."""
    assert (dpath / "manifest.json").exists(), sorted(path.name for path in dpath.iterdir())
    files = {path.name: path for path in dpath.iterdir() if path.is_file()}
    del files["manifest.json"]
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}
