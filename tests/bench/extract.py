"""End-to-end extraction over the bare matrix product of the same shapes: `python -m tests.bench.extract`.

Shards, SAE and run directory are real files; progress, checks and every artifact are on: it is `extract.run` that is
timed, from the manifest's stages. The ceiling is one `torch.addmm` per batch over the same activations, into one
reused array, before and after every run; the share is the median over the rounds of their mean over the run's time. The slots are checked against a dense search. One JSON line on stdout.
"""

import argparse
import json
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch

from saev_dist.config import Extract
from saev_dist.data.shards import Shards, ShardWriter
from saev_dist.extract import run
from saev_dist.sae.saev import load_saev, save_saev


def make_inputs(dpath: Path, n_imgs: int, n_patches: int, d_model: int, d_sae: int, k: int) -> tuple[Path, Path]:
    """Shards and a TopK SAE with the statistics of neither: Gaussian activations, unit decoder rows."""
    random = torch.Generator().manual_seed(0)
    w_enc = torch.randn(d_model, d_sae, generator=random) / d_model**0.5
    save_saev(
        dpath / "sae.pt", w_enc, torch.zeros(d_sae), w_enc.T, torch.zeros(d_model), {"cls": "TopK", "params": {"top_k": k}}
    )
    with ShardWriter(
        dpath / "shards", family="bench", ckpt="gauss", layers=[0], content_tokens_per_example=n_patches,
        d_model=d_model, cls_token=False, max_tokens_per_shard=max(n_patches, 200_000),
    ) as writer:  # fmt: skip
        for first in range(0, n_imgs, 64):
            shape = (min(64, n_imgs - first), 1, n_patches, d_model)
            writer.write(torch.randn(shape, generator=random).numpy())
    return dpath / "shards", dpath / "sae.pt"


def read_all(dpath: Path) -> np.ndarray:
    """Activations by plain NumPy, float32 (tokens, d_model)."""
    shards = Shards.open(dpath)
    return np.concatenate([np.fromfile(dpath / name, "<f4") for name in shards.names]).reshape(-1, shards.d_model)


def bare_product_s(acts_td: torch.Tensor, w_ds: torch.Tensor, b_s: torch.Tensor, batch_tokens: int) -> float:
    """Seconds for the encoder's products alone."""
    out = torch.empty(batch_tokens, w_ds.shape[1])
    began = time.perf_counter()
    for x_bd in acts_td.split(batch_tokens):
        torch.addmm(b_s, x_bd, w_ds, out=out[: len(x_bd)])
    return time.perf_counter() - began


def check_slots(out_dpath: Path, acts_td: torch.Tensor, w_ds: torch.Tensor, k: int, n_patches: int) -> None:
    """The best score of every feature, and its place, by a dense search."""
    best_s, place_s = torch.full((w_ds.shape[1],), -torch.inf), torch.full((w_ds.shape[1],), -1)
    for first in range(0, len(acts_td), 2048):
        h = acts_td[first : first + 2048] @ w_ds
        value, feature = h.topk(k, dim=1)
        codes = torch.zeros_like(h).scatter_(1, feature, value)
        top, where = codes.max(dim=0)
        better = top > best_s
        best_s[better], place_s[better] = top[better], where[better] + first
    values, imgs, patches = (
        torch.load(out_dpath / f"top_{s}.pt", weights_only=True)[:, 0] for s in ("values", "img_i", "patch_i")
    )
    fired = best_s > 0
    torch.testing.assert_close(values[fired], best_s[fired], rtol=1e-4, atol=1e-5)
    assert (values[~fired] == -torch.inf).all()
    assert (imgs * n_patches + patches == place_s)[fired].float().mean() > 0.999, "places may differ where scores all but tie"


def cpu_model() -> str:
    """The processor's name, as Linux has it."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-imgs", type=int, default=1992)
    parser.add_argument("--n-patches", type=int, default=196)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_inputs(dpath, args.n_imgs, args.n_patches, args.d_model, args.d_sae, args.k)
        acts_td = torch.from_numpy(read_all(shards))
        w_ds, b_s = load_saev(sae).w_enc_ds, torch.zeros(args.d_sae)
        batch_tokens = 16_384 // args.n_patches * args.n_patches
        # A shared machine's speed wanders: the ceiling is taken right before and right after each run.
        products, manifests = [bare_product_s(acts_td, w_ds, b_s, batch_tokens)], []
        for _ in range(args.rounds):
            run(Extract(shards=shards, sae=sae, out=dpath / "run", top_k=args.top_k, device="cpu", force=True))
            products.append(bare_product_s(acts_td, w_ds, b_s, batch_tokens))
            manifests.append(json.loads((dpath / "run/manifest.json").read_text()))
        check_slots(dpath / "run", acts_td, w_ds, args.k, args.n_patches)
    totals = [sum(manifest["wall_s"].values()) for manifest in manifests]
    shares = [(a + b) / 2 / total for (a, b), total in zip(pairwise(products), totals, strict=True)]
    n_tokens = args.n_imgs * args.n_patches
    result = {
        "bench": "extract",
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "shapes": vars(args),
        "share_of_product": round(median(shares), 3),
        "shares": [round(share, 3) for share in shares],
        "tokens_per_s": round(n_tokens / min(totals)),
        "product_gflops": round(2 * n_tokens * args.d_model * args.d_sae / min(products) / 1e9, 1),
        "product_s": [round(seconds, 2) for seconds in products],
        "rounds": [
            {stage: round(seconds, 2) for stage, seconds in manifest["wall_s"].items()}
            | {key: round(manifest["ranks"][0][key], 2) for key in ("encode_s", "accumulate_s", "rows_s", "read_wait_s")}
            for manifest in manifests
        ],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
