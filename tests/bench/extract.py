"""End-to-end extraction over the bare matrix product of the same shapes: `python -m tests.bench.extract`.

Shards, SAE and run directory are real files; progress, snapshots, checks and the default's artifacts are on: it is `extract.run`
that is timed, by the manifest's stages: the start and the self-check are not in them. The ceiling is one `torch.addmm` in
fp32 per batch over the same activations, into one reused array, before and after every run; the share is the median over
the rounds of their mean over the run's time. `of_numpy` holds a run against `np.matmul` instead, right after it. The last
round's slots are checked against a dense search: the first of each feature, and all of some features. One JSON line for a
case and a `--screen`.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, median

import numpy as np
import torch

from saev_dist.config import Extract
from saev_dist.data.shards import Shards, ShardWriter
from saev_dist.extract import run
from saev_dist.sae.saev import load_saev, save_saev
from saev_dist.sae.screen import PAYS, speedup
from tests.bench.record import emit

PRODUCT = "the bare fp32 product of the same tokens"
N_SEARCHED = 32
"""Features whose slots are all checked."""


@dataclass(frozen=True)
class Case:
    """Shapes, and the SAE's activation with its mean number of codes a token."""

    activation: str = "TopK"
    l0: int = 32
    n_imgs: int = 1_992
    n_patches: int = 196
    d_model: int = 768
    d_sae: int = 12_288
    top_k: int = 128

    @property
    def n_tokens(self) -> int:
        return self.n_imgs * self.n_patches

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, by the default of `--batch-tokens`."""
        return max(1, Extract.batch_tokens // self.n_patches) * self.n_patches

    def __str__(self) -> str:
        return (
            f"{self.d_model} → {self.d_sae:,}, {self.activation}, L0 {self.l0:,}, top_k {self.top_k}, {self.n_patches} patches"
        )


CASES = [
    Case(),
    Case(top_k=16),
    Case("BatchTopK"),
    Case("Relu", 30),
    Case("Relu", 300),
    Case("TopK", n_imgs=204, n_patches=1_920),
    Case("TopK", 64, n_imgs=996, d_model=1_024, d_sae=16_384),
    Case("Relu", 300, n_imgs=996, d_model=1_024, d_sae=16_384),
    Case("TopK", 32, n_imgs=664, d_model=1_024, d_sae=32_768),
    Case("Relu", 3_000, n_imgs=332, d_model=1_024, d_sae=32_768),
]


def make_inputs(dpath: Path, case: Case) -> tuple[Path, Path]:
    """Shards and an SAE with the statistics of neither: Gaussian activations and weights, and a bias that makes the L0."""
    random = torch.Generator().manual_seed(0)
    w_enc = torch.nn.functional.normalize(torch.randn(case.d_model, case.d_sae, generator=random), dim=0)
    bar = NormalDist().inv_cdf(1 - case.l0 / case.d_sae)
    params = {"TopK": {"top_k": case.l0}, "BatchTopK": {"threshold": bar}, "Relu": {}}[case.activation]
    b_enc = torch.full((case.d_sae,), -bar if case.activation == "Relu" else 0.0)
    tag = {"cls": case.activation, "params": params}
    save_saev(dpath / "sae.pt", w_enc, b_enc, w_enc.T, torch.zeros(case.d_model), tag)
    with ShardWriter(
        dpath / "shards", family="bench", ckpt="gauss", layers=[0], content_tokens_per_example=case.n_patches,
        d_model=case.d_model, cls_token=False, max_tokens_per_shard=max(case.n_patches, 200_000),
    ) as writer:  # fmt: skip
        for first in range(0, case.n_imgs, 64):
            shape = (min(64, case.n_imgs - first), 1, case.n_patches, case.d_model)
            writer.write(torch.randn(shape, generator=random).numpy())
    return dpath / "shards", dpath / "sae.pt"


def read_all(dpath: Path) -> torch.Tensor:
    """Activations by plain NumPy, float32 (tokens, d_model)."""
    shards = Shards.open(dpath)
    acts_td = np.concatenate([np.fromfile(dpath / name, "<f4") for name in shards.names]).reshape(-1, shards.d_model)
    return torch.from_numpy(acts_td)


def bare_product_s(acts_td: torch.Tensor, w_ds: torch.Tensor, b_s: torch.Tensor, batch_tokens: int) -> float:
    """Seconds for the encoder's products alone, by torch."""
    out = torch.empty(batch_tokens, w_ds.shape[1], dtype=w_ds.dtype)
    began = time.perf_counter()
    for x_bd in acts_td.split(batch_tokens):
        torch.addmm(b_s, x_bd.to(w_ds.dtype), w_ds, out=out[: len(x_bd)])
    return time.perf_counter() - began


def numpy_product_s(acts_td: torch.Tensor, w_ds: torch.Tensor, batch_tokens: int) -> float:
    """The same by NumPy, without the bias."""
    out, w = torch.empty(batch_tokens, w_ds.shape[1]).numpy(), w_ds.numpy()
    began = time.perf_counter()
    for x_bd in acts_td.split(batch_tokens):
        np.matmul(x_bd.numpy(), w, out=out[: len(x_bd)])
    return time.perf_counter() - began


@dataclass(frozen=True, kw_only=True, eq=False)
class Searched:
    """What a dense search of the tokens found. What does not exceed the threshold is no code."""

    best_s: torch.Tensor
    """Best score of each feature, float32 (d_sae,)."""
    place_s: torch.Tensor
    """Its token."""
    some_s: torch.Tensor
    """Some features."""
    strongest_sk: torch.Tensor
    """Their strongest scores, in descending order, float32 (some, top_k at most)."""
    threshold: float


def search(acts_td: torch.Tensor, sae_fpath: Path, case: Case) -> Searched:
    """By torch, the whole dense product."""
    sae = load_saev(sae_fpath)
    some_s = torch.arange(0, case.d_sae, -(-case.d_sae // N_SEARCHED))
    found: list[torch.Tensor] = []
    best_s, place_s = torch.full((case.d_sae,), -torch.inf), torch.full((case.d_sae,), -1)
    for first in range(0, len(acts_td), 2048):
        codes = torch.addmm(sae.b_enc_s, acts_td[first : first + 2048], sae.w_enc_ds)
        if case.activation == "TopK":
            value, feature = codes.topk(case.l0, dim=1)
            codes = torch.zeros_like(codes).scatter_(1, feature, value)
        found.append(codes[:, some_s])
        better_x = (codes.amax(dim=0) > best_s).nonzero()[:, 0]
        best_s[better_x], where_x = codes[:, better_x].max(dim=0)
        place_s[better_x] = where_x + first
    strongest_sk = torch.cat(found).topk(min(case.top_k, len(acts_td)), dim=0).values.T
    threshold = getattr(sae.activation, "threshold", 0)
    return Searched(best_s=best_s, place_s=place_s, some_s=some_s, strongest_sk=strongest_sk, threshold=threshold)


def check_slots(out_dpath: Path, searched: Searched, case: Case, *, n_names: int = 1) -> None:
    """The best score of every feature, and its place; and all scores of some features.

    Args:
        n_names: how often the run saw these tokens. Of equal scores the first images' win.
    """
    values_sk, imgs_sk, patches_sk = (
        torch.load(out_dpath / f"top_{s}.pt", weights_only=True) for s in ("values", "img_i", "patch_i")
    )
    values, imgs, patches = values_sk[:, 0], imgs_sk[:, 0], patches_sk[:, 0]
    fired = searched.best_s > searched.threshold
    assert fired.float().mean() > 0.99, "hardly anything fires: the bench would measure nothing"
    torch.testing.assert_close(values[fired], searched.best_s[fired], rtol=1e-4, atol=1e-5)
    assert (values[~fired] == -torch.inf).all()
    assert (imgs * case.n_patches + patches == searched.place_s)[fired].float().mean() > 0.999, (
        "places may differ where scores all but tie"
    )
    expected_sk = searched.strongest_sk.repeat_interleave(n_names, dim=1)[:, : case.top_k]
    # what is just above the threshold here may be just below it there
    found_sk = values_sk[searched.some_s].clamp(min=searched.threshold)
    torch.testing.assert_close(found_sk, expected_sk.clamp(min=searched.threshold), rtol=1e-4, atol=1e-5)


def measure(case: Case, rounds: int, screens: list[str], **settings: object) -> None:
    """Print a line of one case for each `--screen`; `settings` are of `Extract`."""
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_inputs(dpath, case)
        acts_td, loaded = read_all(shards), load_saev(sae)
        product = acts_td, loaded.w_enc_ds, loaded.b_enc_s, case.batch_tokens
        # A shared machine's speed wanders: the ceiling is taken right before and right after each run.
        products, numpy_products, manifests = [bare_product_s(*product)], [], []
        for _ in range(rounds):
            for screen in screens:
                out = dpath / f"run-{screen}"
                on = {"shards": shards, "sae": sae, "out": out, "top_k": case.top_k, "screen": screen} | settings
                run(Extract(**on, device="cpu", force=True))
                numpy_products.append(numpy_product_s(acts_td, loaded.w_enc_ds, case.batch_tokens))
                products.append(bare_product_s(*product))
                manifests.append(json.loads((out / "manifest.json").read_text()))
        searched = search(acts_td, sae, case)
        for screen in screens:
            check_slots(dpath / f"run-{screen}", searched, case)
    totals = [sum(manifest["wall_s"].values()) for manifest in manifests]
    shares = [(a + b) / 2 / total for (a, b), total in zip(pairwise(products), totals, strict=True)]
    numpy_shares = [a / b for a, b in zip(numpy_products, totals, strict=True)]
    for index, screen in enumerate(screens):
        mine = slice(index, None, len(screens))
        on = ({} if screen == "none" else {"screen": screen}) | settings
        emit(
            "extract",
            "".join([f"extract: {case}", *(f", {key} {value}" for key, value in on.items())]),
            asdict(case) | on,
            ceiling=PRODUCT,
            share=median(shares[mine]),
            shares=[round(share, 3) for share in shares[mine]],
            by=manifests[index]["ranks"][0]["product"],
            of_numpy=round(median(numpy_shares[mine]), 3),
            l0=round(manifests[index]["metrics"]["l0"], 1),
            tokens_per_s=round(case.n_tokens / min(totals[mine])),
            product_gflops=round(2 * case.n_tokens * case.d_model * case.d_sae / min(products) / 1e9, 1),
            product_s=[[round(seconds, 2) for seconds in pair] for pair in [*pairwise(products)][mine]],
            rounds=[
                {stage: round(seconds, 2) for stage, seconds in manifest["wall_s"].items()}
                | {key: round(manifest["ranks"][0][key], 2) for key in ("encode_s", "accumulate_s", "rows_s", "read_wait_s")}
                for manifest in manifests[mine]
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each case, of some minutes each")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers in CASES; default: all")
    parser.add_argument("--screen", nargs="*", choices=("none", "bf16"), help="default: none, and bf16 where it pays")
    parser.add_argument("--metrics", action="store_true", help="measure the reconstruction too")
    args = parser.parse_args()
    screens = args.screen or ["none", *(["bf16"] if speedup(CASES[0].d_model) >= PAYS else [])]
    for index in args.cases:
        measure(CASES[index], args.rounds, screens, **({"metrics": True} if args.metrics else {}))


if __name__ == "__main__":
    main()
