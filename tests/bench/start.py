"""What a rank of 1,024 does before it streams 10^5 shards: `python -m tests.bench.start`.

It is `extract.run` up to its stream, checks of every file and the self-check on, on the first rank and on one in the
middle: afresh, and where as many partials of an earlier attempt lie; and the command --dry-run. The other ranks are not
there: they would have nothing to report. The shards are sparse files. Asserted: under 10 s and 200 MB above the imports,
and the shares of all ranks cover what is left, once. One JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import torch

from saev_dist import extract, partials
from saev_dist.config import Extract
from saev_dist.job import open_job
from saev_dist.plan import Intervals, Plan, complement, union
from saev_dist.spill import Segment
from saev_dist.statistics import make_bundle
from saev_dist.store import Run
from saev_dist.world import World
from tests.bench.extract import Case, make_inputs
from tests.bench.forks import forget_peak, in_forks, status
from tests.bench.record import emit

N_SHARDS, MANY = 100_000, 1_024


class Begun(Exception):
    """A rank has its share, and would stream it now."""


class OneOfMany(World):
    """A rank whose peers have nothing to report. What rank 0 tells is kept for the others, who start after it."""

    def __init__(self, rank: int, told: Path) -> None:
        super().__init__(timeout_s=10)
        self.rank, self.size, self._told, self._n_told = rank, MANY, told, 0

    def __enter__(self) -> Self:
        return self

    def tell(self, message: Any = None) -> Any:
        fpath, self._n_told = self._told / f"{self._n_told}.json", self._n_told + 1
        if self.rank == 0:
            fpath.write_text(json.dumps(message))
        return json.loads(fpath.read_text())

    def collect(self, report: Any) -> list[Any]:
        if self.rank:
            return []
        mine = json.loads(json.dumps(report))
        nothing = {key: value if isinstance(value, str) else type(value)() for key, value in mine.items()}
        return [mine, *([nothing] * (MANY - 1))]


def start(rank: int, cfg: Extract, told: Path) -> dict[str, Any]:
    """What `extract` does on this rank before it streams: seconds, peak bytes above the imports, the rank's share."""

    def stream(job: extract.Job, store: Run, world: World, share: extract.Share) -> None:
        raise Begun(share)

    extract.World = lambda timeout_s: OneOfMany(rank, told)  # type: ignore[misc, assignment]
    extract._stream = stream  # type: ignore[assignment]
    forget_peak()
    resident, began = status("VmRSS"), time.perf_counter()
    try:
        extract.run(cfg)
    except Begun as begun:
        share = begun.args[0]
        return {
            "s": time.perf_counter() - began,
            "mb": (status("VmHWM") - resident) / 1e6,
            "todo": share.todo,
            "n_absorbed": len(share.absorbed),
        }
    raise AssertionError("it did not come to stream")


def make_many(dpath: Path) -> tuple[Path, Path]:
    """10^5 sparse shards, 2 * 10^9 images in all, and a small SAE."""
    case = Case(n_imgs=1, d_model=64, d_sae=256)
    first, sae = make_inputs(dpath, case)
    metadata, examples = json.loads((first / "metadata.json").read_text()), 20_000
    shards = dpath / "many"
    shards.mkdir()
    listed = [{"name": f"acts{i:06d}.bin", "n_examples": examples} for i in range(N_SHARDS)]
    for entry in listed:
        with open(shards / str(entry["name"]), "wb") as file:
            file.truncate(examples * case.n_patches * case.d_model * 4)
    (shards / "shards.json").write_text(json.dumps(listed, indent=2))
    (shards / "metadata.json").write_text(json.dumps(metadata | {"n_examples": N_SHARDS * examples}))
    return shards, sae


def write_partials(cfg: Extract) -> Intervals:
    """A partial of each of 1,024 ranks that did the first half of its share; return what is left."""
    job, store = open_job(cfg, World(timeout_s=10)), Run(cfg.out)
    fields = store.under_way()
    assert fields is not None
    state = make_bundle(job.cfg, job.sae, job.shards).state_dict()
    tensors = {name: (str(tensor.numpy().dtype), tuple(tensor.shape)) for name, tensor in state.items()}
    done = []
    for rank, ((first, stop),) in enumerate(job.plan.deal(complement((), job.plan.n_batches), MANY)):
        owner = partials.new_owner(rank)
        segment = Segment(first, (first + stop) // 2, owner, {})
        done.append((segment.first, segment.stop))
        partial = partials.Partial(
            fingerprint=partials.fingerprint(fields.get("identity", dict)),
            owner=owner,
            number=0,
            absorbed=(),
            segments=(segment,),
            arithmetic=(),
            tensors=tensors,
        )
        partials.write(store.partials_dpath, partial, state)
    return complement(tuple(done), job.plan.n_batches)


def main() -> None:
    """The first and another rank of 1,024, afresh and with partials there; and the whole command --dry-run."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_many(dpath)
        cfg = Extract(shards=shards, sae=sae, out=dpath / "run", top_k=16, device="cpu")
        rows: dict[str, dict[str, Any]] = {}
        for what in ("afresh", "after 1,024 partials"):
            left = in_forks(write_partials, (cfg,))[0] if rows else None
            for rank in (0, MANY // 2 - 1):
                (row,) = in_forks(start, (rank, cfg, dpath))
                todo, n_absorbed = row.pop("todo"), row.pop("n_absorbed")
                plan = Plan((20_000,) * N_SHARDS, 16_384 // 196)
                shares = plan.deal(complement((), plan.n_batches) if left is None else left, MANY)
                assert todo == shares[rank] and n_absorbed == (left is not None)
                assert union(shares) == (((0, plan.n_batches),) if left is None else left)
                rows[f"{what}, rank {rank}"] = row
        (command,) = in_forks(dry_run, (cfg,))
    assert all(row["s"] < 10 and row["mb"] < 200 for row in rows.values()), rows
    rounded = {what: {key: round(value, 2) for key, value in row.items()} for what, row in rows.items()}
    shapes = {"n_shards": N_SHARDS, "n_ranks": MANY, "n_batches": plan.n_batches, "d_sae": 256}
    emit("start", "start: before the stream", shapes, rows=rounded, dry_run=command)


def dry_run(cfg: Extract) -> dict[str, float]:
    """The command, imports and all; and its peak, above the imports and in all."""
    code = "import sys; from saev_dist.cli import main; import saev_dist.extract; from tests.bench.forks import status; "
    code += "before = status('VmHWM'); main(sys.argv[1:]); print(before, status('VmHWM'))"
    command = ["extract", "--shards", cfg.shards, "--sae", cfg.sae, "--out", cfg.out.parent / "none", "--dry-run"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    assert "24,100,000 of up to 83 images" in done.stdout, done.stdout
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    return {"s": round(seconds, 2), "mb": round((peak - before) / 1e6, 1), "mb_in_all": round(peak / 1e6, 1)}


if __name__ == "__main__":
    main()
