"""Kill runs at random instants, resume them at other world sizes, compare every artifact: `python -m tests.soak 200`.

A trial is a function of its seed: the data's kind, how many ranks each attempt has, and where each is struck: by SIGKILL
at the n-th file operation of a rank, by SIGKILL after a random time, or by a signal that asks it to leave. After one to
four such attempts nothing strikes, and the artifacts must be the bytes of an uninterrupted run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.crash import Fault, FaultyServer, compile_faults
from tests.ranks import artifact_hashes
from tests.synthetic import RELU, TOPK, make_acts, make_sae, make_shards

N_IMGS = 40
KINDS = {
    "ReLU, patches": (RELU, ["--rank-by", "patch", "--metrics"]),
    "TopK, images": (TOPK, ["--rank-by", "image", "--max-distribution-samples", 50]),
    "no rows": (RELU, ["--no-img-acts", "--n-distributions", 0]),
    "bad shards": (RELU, ["--skip-bad-shards"]),
    "in order": (RELU, ["--percentile-estimator", "saev"]),
}
ONE_RANK = "in order"
MAX_OPS = 120
"""About as many operations as rank 0 does below the run directory."""


class Soak:
    """Reference runs, and trials against them.

    Args:
        dpath: a directory of its own.
        server: starts ranks.
    """

    def __init__(self, dpath: Path, server: FaultyServer) -> None:
        self.dpath, self.server = dpath, server
        self.strikes: Counter[str] = Counter()
        """How attempts ended."""
        self.n_tokens_before = 0
        """Tokens that the attempts which finished did not have to do again."""
        shards, with_bad = (make_shards(dpath / name, make_acts(N_IMGS)) for name in ("shards", "bad"))
        (with_bad / "acts000001.bin").unlink()
        os.truncate(with_bad / "acts000003.bin", 100)
        self.args, self.expected = {}, {}
        for number, (kind, (activation, flags)) in enumerate(KINDS.items()):
            sae = make_sae(dpath / f"sae{number}.pt", activation)
            self.args[kind] = [
                "extract",
                "--shards",
                with_bad if "--skip-bad-shards" in flags else shards,
                "--sae",
                sae,
                "--batch-tokens",
                10,
                "--top-k",
                4,
                "--self-check",
                "off",
            ]
            self.args[kind] += ["--no-progress", *flags]
            codes, output = server.run(*self.args[kind], "--out", dpath / f"whole{number}")
            assert codes == [0], output
            self.expected[kind] = artifact_hashes(dpath / f"whole{number}")

    def trial(self, seed: int) -> None:
        """One run, struck and resumed; AssertionError where a byte differs."""
        rng = random.Random(seed)
        kind = rng.choice(list(KINDS))
        out, most_ranks = self.dpath / f"trial{seed}", 1 if kind == ONE_RANK else 4
        for _ in range(rng.randint(1, 4)):
            if self._strike(rng, [*self.args[kind], "--out", out], out, most_ranks):
                break
        n_ranks = rng.randint(1, most_ranks)
        codes, output = self.server.run(*self.args[kind], "--out", out, n_ranks=n_ranks)
        assert codes == [0] * n_ranks, (seed, output)
        assert artifact_hashes(out) == self.expected[kind], seed
        assert not (out / "partials").exists()
        ranks = json.loads((out / "manifest.json").read_bytes())["ranks"]
        self.n_tokens_before += sum(rank["n_tokens_before"] for rank in ranks)
        shutil.rmtree(out)

    def _strike(self, rng: random.Random, args: list[object], out: Path, most_ranks: int) -> bool:
        """An attempt that something befalls, if it lives long enough; whether it has finished."""
        n_ranks = rng.randint(1, most_ranks)
        # after every batch, on the main thread; or on the other one, as soon as the last is done; or at the end only
        args = [*args, "--snapshot-every", rng.choice([0, 1e-6, 300])]
        how = rng.choice(["operation", "operation", "operation", "time", "signal"])
        fault = None
        if how == "operation":
            # Skewed to the beginning: with several ranks each has less to do.
            at = int(MAX_OPS ** rng.random())
            fault = Fault(ops=rng.choice(["wflmu", "m", "u", "f", "wtflmuo"]), at=at, how="kill", rank=rng.randrange(n_ranks))
        attempt = self.server.start(*args, n_ranks=n_ranks, fault=fault, roots=(out,))
        if how != "operation":
            time.sleep(rng.uniform(0, 0.5))
            self.server.kill(attempt, signal.SIGKILL if how == "time" else rng.choice([signal.SIGTERM, signal.SIGUSR1]))
        codes = self.server.wait(attempt, for_one=True)
        if all(code == 0 for code in codes):
            self.strikes["finished before"] += 1
            return True
        time.sleep(rng.choice([0, 0, 0.2]))  # the others may go on for a while
        self.server.kill(attempt)
        for code, log in zip(self.server.wait(attempt), attempt.logs, strict=True):
            gave_up = code == 1 and ("lost contact with" in log.read_text() or "died or hangs" in log.read_text())
            assert gave_up or code in (0, 75, -9, -signal.SIGTERM, -signal.SIGUSR1), (code, attempt.output())
        self.strikes[how] += 1
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n_trials", type=int, nargs="?", default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dpath = Path(folder)
        with FaultyServer(dpath, compile_faults(dpath)) as server:
            soak = Soak(dpath, server)
            for seed in range(args.first_seed, args.first_seed + args.n_trials):
                soak.trial(seed)
                print(f"seed {seed}: same bytes", flush=True)
    assert soak.n_tokens_before or args.n_trials < 20, "no attempt had anything of an earlier one"
    struck = f"{args.n_trials} runs struck {sum(soak.strikes.values())} times ({dict(soak.strikes)})"
    print(f"{struck}: {soak.n_tokens_before:,} tokens not done again, 0 differing bytes")


if __name__ == "__main__":
    main()
