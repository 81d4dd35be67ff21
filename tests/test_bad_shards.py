"""Shards that cannot be read: an error by name, or with --skip-bad-shards left out, counted and listed."""

import errno
import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.sparse
import torch

from saev_dist import progress
from saev_dist.cli import main
from saev_dist.data import reader
from saev_dist.errors import DataError
from tests.crash import Fault, killed
from tests.ranks import artifact_hashes
from tests.synthetic import N_IMGS, N_PATCHES, RELU, dense_codes, make_acts, make_sae, make_shards, make_weights


@pytest.fixture
def with_bad_shards(tmp_path):
    """Four shards of 7, 7, 7 and 2 images: the second is missing, the third too short."""
    shards = make_shards(tmp_path / "shards", make_acts())
    (shards / "acts000001.bin").unlink()
    os.truncate(shards / "acts000002.bin", 100)
    args = [
        "extract",
        "--shards",
        str(shards),
        "--sae",
        str(make_sae(tmp_path / "sae.pt")),
        "--batch-tokens",
        "10",
        "--self-check",
        "off",
    ]
    return [*args, "--top-k", "4", "--no-progress", "--metrics", "--out"]


def test_bad_shards_are_left_out_counted_and_listed(tmp_path, server, with_bad_shards, capsys):
    args, out = with_bad_shards, tmp_path / "run"
    codes, output = server.run(*args, out)
    assert codes == [1] and "acts000001.bin: No such file" in output and "leave it out with extract --skip-bad-shards" in output
    main([*args, str(out), "--skip-bad-shards"])
    printed = capsys.readouterr().out
    assert "14 images of 2 bad shards: acts000001.bin, acts000002.bin" in printed and "45 of 9 images" in printed
    codes, output = server.run(*args, tmp_path / "three", "--skip-bad-shards", n_ranks=3)
    assert codes == [0, 0, 0], output
    assert artifact_hashes(out) == artifact_hashes(tmp_path / "three")

    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    assert [(part["shard"], part["img_i"], part["n_images"]) for part in left_out] == [
        ("acts000001.bin", 7, 7),
        ("acts000002.bin", 14, 7),
    ]
    assert "No such file" in left_out[0]["reason"] and "holds 100 bytes" in left_out[1]["reason"]

    # Everything is as if those images had no activations at all.
    kept = np.r_[0:7, 21:23]
    codes_eps = dense_codes(make_acts(), make_weights(), RELU)
    sparsity = (codes_eps[kept] > 0).mean((0, 1))
    assert np.allclose(torch.load(out / "sparsity.pt", weights_only=True).numpy(), sparsity)
    assert set(torch.load(out / "top_img_i.pt", weights_only=True).unique().tolist()) <= {-1, *kept.tolist()}
    csr = scipy.sparse.load_npz(out / "img_acts.npz")
    assert csr.shape[0] == N_IMGS and csr[7:21].nnz == 0 and csr[:7].nnz > 0
    samples = torch.load(out / "distributions.pt", weights_only=True).view(24, N_IMGS, N_PATCHES).numpy()
    assert np.isnan(samples[:, 7:21]).all() and np.array_equal(samples[:, kept], codes_eps[kept].transpose(2, 0, 1))
    assert json.loads((out / "metrics.json").read_text())["n_tokens"] == 45

    main([*args, str(out), "--skip-bad-shards"])
    assert "finished without 14 images of 2 bad shards: acts000001.bin, acts000002.bin. Where" in capsys.readouterr().out
    main(["inspect", str(out)])
    inspected = capsys.readouterr().out
    assert "45: 9 images of 23 × 5 patches" in inspected and "14 images of 2 bad shards" in inspected
    main(["verify", "--run", str(out), "--no-progress"])
    assert "14 images of 2 bad shards: acts000001.bin, acts000002.bin" in capsys.readouterr().out
    main(["replay", "--run", str(out), "--no-progress", "--no-pictures", "--n-features", "3"])
    assert "14 of them left out: bad shards" in (out / "visuals/index.html").read_text()


def test_a_shard_that_cannot_be_read_stops_the_run_or_is_left_out(tmp_path, server, whole):
    args, expected, shards = whole
    fault = Fault(ops="r", at=3, how=str(errno.EIO), forever=True)  # the first two are the fingerprint's
    roots = (shards / "acts000002.bin",)
    codes, output = server.run(*args, tmp_path / "run", fault=fault, roots=roots)
    assert codes == [1] and "acts000002.bin: cannot read: Input/output error" in output
    codes, output = server.run(*args, tmp_path / "run", "--skip-bad-shards", fault=fault, roots=roots)
    assert codes == [0] and "images of 1 bad shard: acts000002.bin" in output
    codes, output = server.run(*args, tmp_path / "other", "--skip-bad-shards", fault=fault, roots=roots)
    manifest = json.loads((tmp_path / "other/manifest.json").read_bytes())
    assert sum(rank["n_tokens"] for rank in manifest["ranks"]) == manifest["metrics"]["n_tokens"] < 115
    codes, output = server.run(*args, tmp_path / "b", fault=fault, roots=roots)
    assert codes == [1]
    codes, output = server.run(*args, tmp_path / "b")  # the disk has been mended
    assert codes == [0] and "done before" in output
    assert artifact_hashes(tmp_path / "b") == expected


@pytest.mark.parametrize("bad", [{2}, {3}, {0, 1, 2, 3}], ids=["middle", "last", "all"])
def test_progress_does_not_wait_for_what_cannot_be_read(tmp_path, whole, monkeypatch, capsys, bad):
    args, read = whole[0], reader.read_batch

    def fail(shards, batch, *rest, **settings):
        if batch.shard_i in bad:
            raise DataError("bad")
        read(shards, batch, *rest, **settings)

    monkeypatch.setattr(reader, "read_batch", fail)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    with pytest.raises(SystemExit, match=r"^1$") if len(bad) == 4 else nullcontext():
        main([*map(str, args), str(tmp_path / "run"), "--skip-bad-shards", "--progress"])
    n_tokens = N_PATCHES * sum(7 if shard_i < 3 else 2 for shard_i in {0, 1, 2, 3} - bad)
    lines = [line.split()[1:4] for line in capsys.readouterr().err.splitlines() if "tok/s" in line]
    whole_line = ["100.0%", f"{n_tokens}/{n_tokens}", "tokens"]
    # The stream's own last line, and one more once it has ended.
    assert lines[-2:] == [whole_line] * (2 if n_tokens else 1)


def test_a_shard_may_go_bad_or_be_mended_while_the_run_is_under_way(tmp_path, server, whole):
    args, expected, _ = whole
    shards, args = make_shards(tmp_path / "shards", make_acts()), list(args)
    args[args.index("--shards") + 1] = shards
    first = shards / "acts000000.bin"
    content = first.read_bytes()
    killed(server, args, tmp_path / "a", at=4)  # two of its batches are done
    first.write_bytes(content[:100])
    killed(server, [*args[:-1], "--skip-bad-shards", "--out"], tmp_path / "b", at=4)
    codes, output = server.run(*args, tmp_path / "a")
    assert codes == [1] and "acts000000.bin holds 100 bytes" in output
    codes, output = server.run(*args, tmp_path / "a", "--skip-bad-shards", n_ranks=2)
    assert codes == [0, 0] and "3 images of 1 bad shard: acts000000.bin" in output and "done before" in output
    codes, output = server.run("verify", "--run", tmp_path / "a", "--no-progress")
    assert codes == [1] and "acts000000.bin" in output, "it needs images of the two batches"
    first.write_bytes(content)
    assert server.run("verify", "--run", tmp_path / "a", "--no-progress")[0] == [0]
    codes, output = server.run(*args, tmp_path / "b", n_ranks=2)
    assert codes == [0, 0] and "done before" in output, output
    assert artifact_hashes(tmp_path / "b") == expected
    first.write_bytes(content[::-1])
    codes, output = server.run(*args, tmp_path / "a")
    assert codes == [1] and "shards_probes: there" in output


def test_no_shard_at_all_is_an_error(tmp_path, server, with_bad_shards):
    for fpath in (tmp_path / "shards").glob("*.bin"):
        fpath.unlink()
    codes, output = server.run(*with_bad_shards, tmp_path / "run", "--skip-bad-shards")
    assert codes == [1] and "no shard can be read, so there is nothing to write; the first: " in output
