"""End-to-end extraction on a GPU over the bare matrix product: `python -m tests.bench.gpu`.

At fp32, TF32 and bf16, all artifacts on, from the page cache: the shards are one file under many names, so that a run is
long and the disk is not what is measured. The ceiling is one `torch.addmm` a batch in the same precision, of tokens that
lie on the device, before and after each run; the share is given of the whole run and of its stream. What a run writes at
its end takes as long as the disk does: the line says how many bytes, and how long one thread takes to write and sync so
many. What else remains is in it: seconds of each stage, the kernels that took longest, and the most device memory, caches
included. The slots of fp32 are checked against a dense search on the CPU, those of the others against fp32's: that they
are as close as the precision has it.

`--device cpu` tries the bench itself out, at small shapes. One JSON line a case and precision.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from saev_dist.config import Extract
from saev_dist.extract import run
from saev_dist.sae.saev import load_saev
from tests.bench.extract import Case, check_slots, make_inputs, read_all, search
from tests.bench.record import emit

CASES = [
    Case("TopK", 64, n_imgs=996, d_model=1_024, d_sae=16_384),
    Case("Relu", 300, n_imgs=996, d_model=1_024, d_sae=16_384),
    Case("TopK", 32, n_imgs=996, d_model=1_024, d_sae=32_768),
]
SMALL = [Case("TopK", 8, n_imgs=200, d_model=64, d_sae=512, top_k=16)]
PRECISIONS = ("fp32", "tf32", "bf16")
N_KERNELS = 12
ROUNDING = {"tf32": 2**-8, "bf16": 2**-5}
"""Of the largest scores, relative to them: some units in the last place of what is multiplied."""


def repeat(dpath: Path, n: int) -> None:
    """Give the one shard of a directory `n` names."""
    metadata = json.loads((dpath / "metadata.json").read_text())
    (entry,) = json.loads((dpath / "shards.json").read_text())
    entries = [entry] + [entry | {"name": f"acts{i:06d}.bin"} for i in range(1, n)]
    for other in entries[1:]:
        os.link(dpath / entry["name"], dpath / other["name"])
    (dpath / "shards.json").write_text(json.dumps(entries))
    (dpath / "metadata.json").write_text(json.dumps(metadata | {"n_examples": n * metadata["n_examples"]}))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall clock until the device has done it."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def kernels(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of the kernels (on the CPU the operations) that took longest together."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        work()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, name))
    return {row.key[:80]: round(getattr(row, name) / 1e3, 1) for row in rows[:N_KERNELS]}


def bare_write_s(fpath: Path, n_bytes: int) -> float:
    """Seconds to write and sync so many bytes, by one thread."""
    chunk = os.urandom(2**24)
    began = time.perf_counter()
    with open(fpath, "wb", buffering=0) as file:
        for first in range(0, n_bytes, len(chunk)):
            file.write(chunk[: n_bytes - first])
        os.fsync(file.fileno())
    taken = time.perf_counter() - began
    fpath.unlink()
    return taken


def measure(case: Case, precisions: Sequence[str], device: torch.device, args: argparse.Namespace) -> None:
    """Print the lines of one case."""
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, _ = make_inputs(dpath, case)
        acts_td = read_all(shards)
        repeat(shards, args.names)
        for precision in precisions:
            measure_precision(case, precision, device, args, dpath, acts_td)


def measure_precision(
    case: Case, precision: str, device: torch.device, args: argparse.Namespace, dpath: Path, acts_td: torch.Tensor
) -> None:
    """Print one line."""
    n_names = args.names
    sae = load_saev(dpath / "sae.pt")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    w_ds, b_s = sae.w_enc_ds.to(device, dtype), sae.b_enc_s.to(device, dtype)
    batch_tokens = max(1, args.batch_tokens // case.n_patches) * case.n_patches
    x_bd = acts_td[:batch_tokens].to(device, dtype)
    out_bs = torch.empty(len(x_bd), case.d_sae, device=device, dtype=dtype)
    n_tokens = n_names * case.n_tokens
    n_batches = n_names * -(-case.n_tokens // batch_tokens)

    def product() -> None:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        for _ in range(n_batches):
            torch.addmm(b_s, x_bd, w_ds, out=out_bs)

    def extract() -> None:
        run(
            Extract(
                shards=dpath / "shards",
                sae=dpath / "sae.pt",
                out=dpath / "run",
                top_k=case.top_k,
                device=device.type,
                precision=precision,
                read_ahead=args.read_ahead,
                batch_tokens=args.batch_tokens,
                img_acts=args.img_acts,
                force=True,
            )
        )

    def product_s() -> float:
        return seconds(product, device) * n_tokens / (n_batches * len(x_bd))

    extract()  # so that all is loaded and compiled
    longest = kernels(extract, device)
    product_s()
    most = 0
    products, manifests = [product_s()], []
    for _ in range(args.rounds):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        extract()
        if device.type == "cuda":
            most = max(most, torch.cuda.max_memory_reserved(device))
        products.append(product_s())
        manifests.append(json.loads((dpath / "run/manifest.json").read_text()))
    if precision == "fp32":
        check_slots(dpath / "run", search(acts_td, dpath / "sae.pt", case), case, n_names=n_names)
    else:
        values_sk = torch.load(dpath / "run/top_values.pt", weights_only=True)
        exact_s = torch.full((case.d_sae,), -torch.inf)
        for part_bd in acts_td.split(2048):
            exact_s = torch.maximum(exact_s, torch.addmm(sae.b_enc_s, part_bd, sae.w_enc_ds).amax(dim=0))
        fired, tolerance = values_sk[:, 0] > 0, ROUNDING[precision]
        assert fired.float().mean() > 0.99
        torch.testing.assert_close(values_sk[fired, 0], exact_s[fired], rtol=tolerance, atol=tolerance * float(exact_s.max()))
    written = sum(fpath.stat().st_size for fpath in (dpath / "run").iterdir())
    ceilings = [(a + b) / 2 for a, b in pairwise(products)]

    def share(stages: Sequence[str]) -> list[float]:
        """Of the ceiling's time over these stages'."""
        taken = [sum(manifest["wall_s"][stage] for stage in stages) for manifest in manifests]
        return [round(ceiling / one, 3) for ceiling, one in zip(ceilings, taken, strict=True)]

    all_s = min(sum(manifest["wall_s"].values()) for manifest in manifests)
    emit(
        "gpu",
        f"gpu: {case}, {precision}",
        asdict(case)
        | {
            "precision": precision,
            "names": n_names,
            "read_ahead": args.read_ahead,
            "batch_tokens": args.batch_tokens,
            "img_acts": args.img_acts,
            "device": manifests[-1]["machine"]["gpu"] or device.type,
        },
        ceiling=f"the bare {precision} product of as many tokens on the device",
        share=median(share(list(manifests[0]["wall_s"]))),
        shares=share(list(manifests[0]["wall_s"])),
        stream_shares=share(["stream"]),
        n_batches=n_batches,
        tokens_per_s=round(n_tokens / all_s),
        read_gb_per_s=round(n_tokens * case.d_model * 4 / all_s / 1e9, 2),
        product_tflops=round(2 * n_tokens * case.d_model * case.d_sae / min(products) / 1e12, 1),
        written_gb=round(written / 1e9, 2),
        bare_write_s=round(bare_write_s(dpath / "written", written), 2),
        device_gb=round((most - x_bd.nbytes - out_bs.nbytes - w_ds.nbytes) / 1e9, 2) if most else None,
        rounds=[
            manifest["wall_s"]
            | {key: manifest["ranks"][0][key] for key in ("encode_s", "accumulate_s", "rows_s", "read_wait_s")}
            for manifest in manifests
        ],
        kernels_ms=longest,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--names", type=int, default=32, help="names of the shard: 0.8 GB to read each")
    parser.add_argument("--read-ahead", type=int, default=Extract.read_ahead, help="as of extract")
    parser.add_argument("--batch-tokens", type=int, default=Extract.batch_tokens, help="the same")
    parser.add_argument("--img-acts", action=argparse.BooleanOptionalAction, default=True, help="the same")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers in CASES; default: all")
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=PRECISIONS)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        return
    args.names = 4 if on_cpu else args.names
    for case in SMALL if on_cpu else [CASES[index] for index in args.cases]:
        precisions = [one for one in args.precisions if not (on_cpu and one == "tf32")]
        measure(case, precisions, torch.device(args.device), args)


if __name__ == "__main__":
    main()
