"""What the end of a run takes, of one whose rows are large beside its products: `python -m tests.bench.write`.

It is `extract.run` that is timed, by the manifest's stage "write", which ends when all artifacts are on the disk. The same run
once more does not go on from its own file of rows, as one that is resumed, and copies all of them. The ceiling is a bare write
and fsync of as many bytes as `img_acts.npz` has, before and after each. Some images' means are checked against a dense product.
A JSON line on stdout for either.
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import numpy as np
import scipy.sparse

from saev_dist.config import Extract
from saev_dist.extract import run
from saev_dist.sae.saev import load_saev
from saev_dist.spill import Rows
from tests.bench.extract import Case, make_inputs, read_all
from tests.bench.record import emit
from tests.bench.snapshot import bare_write_s

CASE = Case("Relu", 64, n_imgs=100_000, n_patches=16, d_model=16, d_sae=16_384, top_k=16)
N_CHECKED = 50


def check_means(npz_fpath: Path, shards_dpath: Path, sae_fpath: Path) -> None:
    """Images spread over the data."""
    found = scipy.sparse.load_npz(npz_fpath)
    assert found.shape == (CASE.n_imgs, CASE.d_sae)
    some = np.linspace(0, CASE.n_imgs - 1, N_CHECKED).astype(int)
    sae, acts = load_saev(sae_fpath), read_all(shards_dpath).view(CASE.n_imgs, CASE.n_patches, CASE.d_model)[some]
    codes = (acts @ sae.w_enc_ds + sae.b_enc_s).relu()
    expected = codes.topk(3, dim=1).values.mean(dim=1)
    assert expected.count_nonzero() > N_CHECKED * 500
    np.testing.assert_allclose(found[some].toarray(), expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="pairs of runs, of some minutes each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        shards, sae = make_inputs(dpath, CASE)
        out = dpath / "run"
        cfg = Extract(shards=shards, sae=sae, out=out, top_k=CASE.top_k, device="cpu", n_distributions=0, force=True)
        run(cfg)  # for its size
        n_bytes = (out / "img_acts.npz").stat().st_size
        bare, written = [bare_write_s(dpath, n_bytes)], []
        for _ in range(args.rounds):
            for copies in (False, True):
                with patch.object(Rows, "beginning", lambda *_: None) if copies else nullcontext():
                    run(cfg)
                check_means(out / "img_acts.npz", shards, sae)
                written.append(json.loads((out / "manifest.json").read_text())["wall_s"]["write"])
                bare.append(bare_write_s(dpath, n_bytes))
    ceilings = [mean(pair) for pair in pairwise(bare)]
    for copies, what in enumerate(("begun while the stream went on", "all of it copied")):
        mine = slice(copies, None, 2)
        shares = [ceiling / seconds for ceiling, seconds in zip(ceilings[mine], written[mine], strict=True)]
        emit(
            "write",
            f"img_acts.npz, {what}",
            asdict(CASE),
            ceiling="a bare write and fsync of as many bytes",
            share=median(shares),
            shares=[round(share, 3) for share in shares],
            gb=round(n_bytes / 1e9, 2),
            write_s=[round(seconds, 2) for seconds in written[mine]],
            bare_write_s=[round(seconds, 2) for seconds in bare],
        )


if __name__ == "__main__":
    main()
