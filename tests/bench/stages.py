"""What encoding and counting cost by themselves: `python -m tests.bench.stages`.

    encode   `Encoder`, pieces as `extract` makes them, over the bare product of the same tokens
    update   the statistics and the rows of the codes, in shares of that product

One thread, and its CPU time, so that other work on the machine counts less. The tokens lie in memory. The codes are
checked against a dense transcription of the activation.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from saev_dist.accumulators.base import Codes
from saev_dist.config import Extract
from saev_dist.extract import _rows
from saev_dist.job import open_job
from saev_dist.sae.encoder import Encoder
from saev_dist.sae.model import Sae, TopK
from saev_dist.statistics import make_bundle
from saev_dist.world import World
from tests.bench.extract import CASES, PRODUCT, Case, make_inputs, read_all
from tests.bench.record import emit

N_BATCHES = 3


def cpu_s(work: Callable[[], None]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def check(pieces: list[Codes], acts_bd: torch.Tensor, sae: Sae, h_bs: torch.Tensor) -> None:
    """Hold the codes against the dense product."""
    h_bs = h_bs[: len(acts_bd)]
    if isinstance(sae.activation, TopK):
        value, feature = h_bs.topk(sae.activation.k, dim=1)
        dense_bs = torch.zeros_like(h_bs).scatter_(1, feature, value)
    else:
        dense_bs = h_bs * (h_bs > getattr(sae.activation, "threshold", 0.0))
    for codes in pieces:
        token_n = codes.token_n + (codes.img_i - pieces[0].img_i) * codes.n_patches
        dense_bs[token_n, codes.feature_n] -= codes.value_n
    n_off = int((dense_bs.abs() > 1e-4).sum())
    assert n_off <= 1e-5 * sum(len(codes.value_n) for codes in pieces), "what all but ties may differ, no more"


def measure(case: Case, rounds: int, **settings: object) -> None:
    """Print the line of one case."""
    with TemporaryDirectory() as name, World(60) as world:
        shards, sae = make_inputs(Path(name), case)
        cfg = Extract(shards=shards, sae=sae, out=Path(name) / "run", top_k=case.top_k, device="cpu", **settings)
        job = open_job(cfg, world)
        batches = read_all(shards).split(case.batch_tokens)
    h_bs = torch.empty(case.batch_tokens, case.d_sae)

    def product() -> None:
        torch.addmm(job.sae.b_enc_s, batches[-1], job.sae.w_enc_ds, out=h_bs)

    bundle, encode_s, update_s = make_bundle(job.cfg, job.sae, job.shards), [], []
    with Encoder(job.sae, job.device, cfg.precision, 1) as encoder:
        product_s = [cpu_s(product)]
        for _ in range(rounds):
            for index, acts_bd in enumerate(batches):
                img_i = index * case.batch_tokens // case.n_patches
                began = time.process_time()
                pieces = [codes.result() for codes in encoder.submit_batch(acts_bd, img_i=img_i, n_patches=case.n_patches)]
                encoded = time.process_time()
                for codes in pieces:
                    bundle.update(codes)
                    _rows(codes, cfg, case.d_sae, 1)
                encode_s.append(encoded - began)
                update_s.append(time.process_time() - encoded)
            product_s.append(cpu_s(product))
    product()
    check(pieces, batches[-1], job.sae, h_bs)
    encode = median(encode_s)
    ceiling = median((a + b) / 2 for a, b in pairwise(product_s))
    update = median(update_s[len(update_s) // 2 :])  # when the slots are filled
    per_token = 1e6 / case.batch_tokens
    emit(
        "stages",
        "".join([f"encode: {case}", *(f", {key} {value}" for key, value in settings.items())]),
        asdict(case) | settings,
        ceiling=PRODUCT,
        share=ceiling / encode,
        us_per_token={
            "product": round(ceiling * per_token, 1),
            "encode": round(encode * per_token, 1),
            "update": round(update * per_token, 1),
        },
        update_share_of_product=round(update / ceiling, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers in CASES; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for index in args.cases:
        n_imgs = N_BATCHES * (CASES[index].batch_tokens // CASES[index].n_patches)
        measure(replace(CASES[index], n_imgs=n_imgs), args.rounds)


if __name__ == "__main__":
    main()
