"""How time and memory grow with the data and with the SAE: `python -m tests.bench.growth`.

    tokens     from 10^4 to 10^6 tokens at one SAE: CPU time and peak memory; the straight line, a start and a time per token,
               that comes nearest to all sizes, how far it misses any, and what a token takes from each size to the next
    features   from 4 k to 131 k features over the same tokens: CPU time and peak memory per feature

Each run is `extract.run` in a process of its own with one thread, all artifacts on; sizes take turns, so that a shared
machine's moods fall on all of them, and CPU time is counted, which waiting for a core does not lengthen. The self-check is
off: it looks at a fixed number of tokens; distributions.pt has 10,000 of them, so it is as large in all. The slots are checked against a dense search. One JSON line a part.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from tests.bench.extract import Case, check_slots, make_inputs, read_all, search
from tests.bench.record import emit

TOKENS = Case(n_imgs=10_000, n_patches=100, d_model=128, d_sae=4_096, top_k=32)
FEATURES = Case(n_imgs=480, n_patches=100, d_model=64, d_sae=4_096, top_k=32)
SIZES = (100, 200, 400, 1_000, 2_500, 10_000)
"""Images: less than a batch, 10^4 tokens, to 61 batches, 10^6."""
WIDTHS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072)

RUN = """
import json, sys, time
from pathlib import Path
from saev_dist import extract
from saev_dist.config import Extract
def peak():  # not ru_maxrss: that one starts at what the parent had when it forked
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
shards, sae, out, top_k = *map(Path, sys.argv[1:4]), int(sys.argv[4])
cfg = Extract(shards=shards, sae=sae, out=out, top_k=top_k, device="cpu", self_check="off", progress=False, force=True,
    max_distribution_samples=10_000)
before, cpu_s, began = peak(), time.process_time(), time.perf_counter()
extract.run(cfg)
wall_s = time.perf_counter() - began
print(json.dumps({"cpu_s": time.process_time() - cpu_s, "wall_s": wall_s, "peak": peak() - before}))
"""


def run(shards: Path, sae: Path, out: Path, top_k: int) -> dict[str, float]:
    """One extraction: seconds, peak bytes above the imports, and the stages' seconds."""
    command = [sys.executable, "-c", RUN, shards, sae, out, str(top_k)]
    # glibc keeps freed blocks per thread; fewer arenas make the peak a property of the program
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    manifest = json.loads((out / "manifest.json").read_text())
    rank = manifest["ranks"][0]
    stages = {key: rank[key] for key in ("encode_s", "accumulate_s", "rows_s", "read_wait_s")}
    return found | {f"{key}_s": value for key, value in manifest["wall_s"].items()} | stages


def beginning(shards: Path, n_imgs: int, out: Path) -> Path:
    """The first shards of a directory, linked: its first `n_imgs` images."""
    out.mkdir()
    metadata = json.loads((shards / "metadata.json").read_text()) | {"n_examples": n_imgs}
    listed, left = [], n_imgs
    for entry in json.loads((shards / "shards.json").read_text()):
        if left > 0:
            os.link(shards / entry["name"], out / entry["name"])
            listed.append(entry | {"n_examples": min(left, entry["n_examples"])})
            left -= entry["n_examples"]
    (out / "shards.json").write_text(json.dumps(listed))
    (out / "metadata.json").write_text(json.dumps(metadata))
    return out


def all_runs(inputs: dict[int, tuple[Path, Path]], top_k: int, out: Path, rounds: int, few: int) -> dict[int, dict[str, float]]:
    """Medians of what runs of all sizes took, in turns; sizes of `few` or less, which take no time, five times a round."""
    taken: dict[int, list[dict[str, float]]] = defaultdict(list)
    for turn in range(5 * rounds):
        for size, (shards, sae) in inputs.items():
            if size <= few or turn % 5 == 0:
                taken[size].append(run(shards, sae, out / f"run{size}", top_k))
    return {size: {key: median(one[key] for one in each) for key in each[0]} for size, each in taken.items()}


def measure_tokens(rounds: int) -> None:
    """What a token takes beyond the start."""
    case = TOKENS
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_inputs(dpath, case)
        inputs = {n: (beginning(shards, n, dpath / f"shards{n}"), sae) for n in SIZES}
        taken = all_runs(inputs, case.top_k, dpath, rounds, few=SIZES[3])
        for n in SIZES:
            acts_td = read_all(shards)[: n * case.n_patches]
            check_slots(dpath / f"run{n}", search(acts_td, sae, case), case)
    cpu_s = {n * case.n_patches: taken[n]["cpu_s"] for n in SIZES}
    slope_s, start_s = np.polyfit(list(cpu_s), list(cpu_s.values()), 1, w=[1 / seconds for seconds in cpu_s.values()])
    emit(
        "growth",
        "growth: CPU time per token, from 10^4 to 10^6 tokens",
        asdict(case),
        n_threads=1,
        start_s=round(start_s, 3),
        us_per_token=round(1e6 * slope_s, 2),
        line_misses_by={n: round(seconds / (start_s + n * slope_s) - 1, 3) for n, seconds in cpu_s.items()},
        us_per_added_token={f"{a} to {b}": round(1e6 * (cpu_s[b] - cpu_s[a]) / (b - a), 2) for a, b in pairwise(cpu_s)},
        peak_mb={n * case.n_patches: round(taken[n]["peak"] / 1e6) for n in SIZES},
        seconds={n * case.n_patches: rounded(taken[n]) for n in SIZES},
    )


def measure_features(rounds: int) -> None:
    """What a feature takes: each doubling's difference over the features that it added."""
    with tempfile.TemporaryDirectory() as name:
        dpath, inputs = Path(name), {}
        for width in WIDTHS:
            (dpath / str(width)).mkdir()
            inputs[width] = make_inputs(dpath / str(width), replace(FEATURES, d_sae=width))
        taken = all_runs(inputs, FEATURES.top_k, dpath, rounds, few=WIDTHS[2])
        for width, (shards, sae) in inputs.items():
            case = replace(FEATURES, d_sae=width)
            check_slots(dpath / f"run{width}", search(read_all(shards), sae, case), case)

    def slopes(key: str, unit: float) -> dict[str, float]:
        pairs = {f"{a} to {b}": (taken[b][key] - taken[a][key]) / (b - a) for a, b in pairwise(WIDTHS)}
        return {pair: round(slope / unit, 2) for pair, slope in pairs.items()}

    emit(
        "growth",
        "growth: CPU time and memory per feature, from 4 k to 131 k features",
        asdict(FEATURES),
        n_threads=1,
        us_per_feature=slopes("cpu_s", 1e-6),
        kb_per_feature=slopes("peak", 1e3),
        peak_mb={width: round(taken[width]["peak"] / 1e6) for width in WIDTHS},
        seconds={width: rounded(taken[width]) for width in WIDTHS},
    )


def rounded(taken: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in taken.items() if key.endswith("_s")}


PARTS = {"tokens": measure_tokens, "features": measure_features}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    for part in args.parts:
        PARTS[part](args.rounds)


if __name__ == "__main__":
    main()
