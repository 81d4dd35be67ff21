"""Memory is bounded: at the shape that broke the dense pipeline, and from few images to many."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saev_dist.data.shards import ShardWriter
from saev_dist.sae.saev import save_saev

D_MODEL, D_SAE, TOP_K, N_PATCHES = 64, 16_384, 128, 1_920

SCRIPT = """
import json, sys
from pathlib import Path
import saev_dist.extract
from saev_dist.config import Extract
def peak():  # not ru_maxrss: that one starts at what the parent had when it forked
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
before = peak()
shards, sae, out = map(Path, sys.argv[2:])
cfg = Extract(shards=shards, sae=sae, out=out, top_k=int(sys.argv[1]), progress=False, max_distribution_samples=10_000)
saev_dist.extract.run(cfg)
print(json.dumps({"before": before, "after": peak()}))
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[int, int]:
    """Peak resident bytes above the imports, by number of images, each in a process of its own."""
    dpath: Path = tmp_path_factory.mktemp("memory")
    random = torch.Generator().manual_seed(0)
    w_enc = torch.randn(D_MODEL, D_SAE, generator=random)
    b_enc = torch.zeros(D_SAE)
    b_enc[7] = 1000  # a feature that fires on every token: its candidates must not widen the rows of the others
    save_saev(dpath / "sae.pt", w_enc, b_enc, w_enc.T, torch.zeros(D_MODEL), {"cls": "TopK", "params": {"top_k": 32}})
    found = {}
    for n_imgs in (20, 100):
        with ShardWriter(
            dpath / f"shards{n_imgs}", family="t", ckpt="t", layers=[0], content_tokens_per_example=N_PATCHES,
            d_model=D_MODEL, cls_token=False, max_tokens_per_shard=30 * N_PATCHES,
        ) as writer:  # fmt: skip
            for _ in range(n_imgs // 20):
                writer.write(torch.randn(20, 1, N_PATCHES, D_MODEL, generator=random).numpy())
        paths = (dpath / name for name in (f"shards{n_imgs}", "sae.pt", f"run{n_imgs}"))
        command = [sys.executable, "-c", SCRIPT, str(TOP_K), *paths]
        # glibc keeps freed blocks per thread; fewer arenas make the peak a property of the program. So do fixed threads.
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        found[n_imgs] = report["after"] - report["before"]
    print(found)
    return found


def test_the_headline_shape_stays_under_1_gb(peaks):
    """The dense (d_sae, top_k, n_patches) tensor of float32 would take 16.1 GB."""
    assert max(peaks.values()) < 1e9


def test_peak_memory_does_not_grow_with_the_images(peaks):
    assert peaks[100] < peaks[20] * 1.1 + 50e6
